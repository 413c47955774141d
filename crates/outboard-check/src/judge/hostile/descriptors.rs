//! Descriptors that do not belong (hostile cases A17 to A20 and A83).

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use outboard_protocol::FrontendCode as Code;
use outboard_protocol::features::ProtocolFeatures as P;
use outboard_protocol::table::{FdRule, front_end_table};

use super::{answered_or_closed, not_silent};
use crate::judge::case::Case;
use crate::judge::finding::{Finding, Outcome, Verdict};
use crate::judge::message::{self, Msg};
use crate::judge::ring::eventfd;
use crate::judge::session::{PLAIN, USUAL};
use crate::judge::wire::{Came, MOST_FDS};

/// A stray descriptor with a message that takes none.
pub(crate) fn stray(case: &mut Case<'_>) -> Outcome {
    let stray = eventfd()?;
    for row in front_end_table().iter().filter(|row| row.fds == FdRule::None) {
        let mut session = case.session()?;
        let size = usize::try_from(row.payload.sizes().smallest()).unwrap_or(0);
        let msg = Msg::new(row.id, vec![0; size]).fd(&stray);
        answered_or_closed(&mut session, &msg, &format!("{} with a descriptor", row.name))?;
        drop(session);
        case.lives()?;
    }
    Ok(())
}

/// Many of them while the connection lasts: the runner counts when it is over, this one before.
pub(crate) fn stray_often(case: &mut Case<'_>) -> Outcome {
    let stray = eventfd()?;
    let mut session = case.session()?;
    let before = case.peer.open_fds();
    for _ in 0..200 {
        session.wire.send(&message::get_features().fd(&stray))?;
        match session.wire.receive(case.limit)? {
            Came::Reply(_) => {}
            Came::Closed | Came::Nothing => return Ok(()),
        }
    }
    let after = case.peer.open_fds();
    if let (Some(before), Some(after)) = (before, after)
        && after > before + 1
    {
        let why = format!("{} of 200 stray descriptors stay open", after - before);
        return Err(Finding::new(Verdict::Leaks, why));
    }
    Ok(())
}

/// Many descriptors with one message.
fn crowd(case: &mut Case<'_>, count: usize) -> Outcome {
    let fds: Vec<OwnedFd> = (0..count).map(|_| eventfd()).collect::<Outcome<_>>()?;
    let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(OwnedFd::as_fd).collect();
    for msg in [message::get_features(), message::vring_base(0, 0), message::mem_table(&[])] {
        let mut session = case.session()?;
        let mut msg = msg;
        msg.fds.clone_from(&borrowed);
        session.wire.send(&msg)?;
        not_silent(&mut session.wire, &format!("{count} descriptors with one message"))?;
        drop(session);
        case.lives()?;
    }
    Ok(())
}

pub(crate) fn nine(case: &mut Case<'_>) -> Outcome {
    crowd(case, 9)
}

pub(crate) fn thirty_two(case: &mut Case<'_>) -> Outcome {
    crowd(case, 32)
}

pub(crate) fn most(case: &mut Case<'_>) -> Outcome {
    crowd(case, MOST_FDS)
}

/// Descriptors in the middle of a message.
pub(crate) fn in_the_middle(case: &mut Case<'_>) -> Outcome {
    let stray = eventfd()?;
    let mut session = case.session()?;
    let bytes = message::vring_base(0, 0).bytes();
    let (head, body) = bytes.split_at(12);
    session.wire.bytes(head, &[])?;
    session.wire.bytes(body, &[stray.as_fd()])?;
    not_silent(&mut session.wire, "a descriptor with the body of a message")
}

/// Descriptors with an announced message that never comes.
pub(crate) fn with_half_a_message(case: &mut Case<'_>) -> Outcome {
    let stray = eventfd()?;
    for _ in 0..5 {
        let mut session = case.session()?;
        let bytes = message::notifier(Code::SetVringCall, 0, &stray).bytes();
        session.wire.bytes(bytes.get(..13).unwrap_or_default(), &[stray.as_fd()])?;
    }
    Ok(())
}

/// Everything that comes with a descriptor, twice: the second replaces the first.
pub(crate) fn replaced(case: &mut Case<'_>) -> Outcome {
    let fd = eventfd()?;
    let mut session = case.session()?;
    for _ in 0..100 {
        for code in [Code::SetVringKick, Code::SetVringCall, Code::SetVringErr] {
            session.done(&message::notifier(code, 0, &fd))?;
        }
    }
    let before = case.peer.open_fds();
    for _ in 0..100 {
        session.done(&message::notifier(Code::SetVringCall, 0, &fd))?;
    }
    leaked(case, before)
}

pub(crate) fn channels(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_with(PLAIN, USUAL | P::BACKEND_REQ)?;
    session.needs(P::BACKEND_REQ, "BACKEND_REQ")?;
    let (_ours, theirs) = std::os::unix::net::UnixStream::pair()
        .map_err(|error| Finding::own("make a socket pair", error))?;
    session.done(&Msg::bare(Code::SetBackendReqFd).fd(&theirs))?;
    let before = case.peer.open_fds();
    for _ in 0..200 {
        session.done(&Msg::bare(Code::SetBackendReqFd).fd(&theirs))?;
    }
    leaked(case, before)
}

/// More descriptors than before, after things were replaced one for one.
fn leaked(case: &Case<'_>, before: Option<usize>) -> Outcome {
    std::thread::sleep(case.quiet / 4);
    if let (Some(before), Some(after)) = (before, case.peer.open_fds())
        && after > before + 2
    {
        let why = format!("{} descriptors that were replaced stay open", after - before);
        return Err(Finding::new(Verdict::Leaks, why));
    }
    Ok(())
}

/// No number is free for another descriptor, and front-ends come all the same.
pub(crate) fn none_left(case: &mut Case<'_>) -> Outcome {
    case.needs_another_turn()?;
    let unseen = || Finding::not_offered("its limit of descriptors cannot be set");
    // Nobody is connected, and it has seen that.
    case.rests("with no front-end")?;
    let free = case.peer.free_fd().ok_or_else(unseen)?;
    let usual = case.peer.limit_fds(Some(free)).ok_or_else(unseen)?;
    let mut first = case.wire()?;
    let asked = first.send(&message::get_features());
    let second = case.wire();
    let calm = case.rests("while it has no descriptor left for a front-end");
    case.peer.limit_fds(usual).ok_or_else(unseen)?;
    asked?;
    calm?;
    drop(second?);
    // It may have given up those who came meanwhile; the next one finds it as it was.
    let _ = first.receive(case.quiet)?;
    drop(first);
    let mut next = case.wire()?;
    next.ask(&message::get_features())?;
    Ok(())
}
