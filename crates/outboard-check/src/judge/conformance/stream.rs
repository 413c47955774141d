//! The stream: headers, acknowledgements, pieces, order (vhost-user, "Communication", "Header",
//! "REPLY_ACK").

use std::time::Duration;

use outboard_protocol::FrontendCode as Code;
use outboard_protocol::features::ProtocolFeatures;

use crate::judge::case::Case;
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::message::{self, Msg, name_of};
use crate::judge::ring::eventfd;
use crate::judge::session::{PLAIN, USUAL};
use crate::judge::wire::Came;

pub(crate) fn reply_flags(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session()?;
    session.alive()?;
    session.done(&message::vring_num(0, 16))?;
    session.base(0)?;
    if let Some((id, flags)) = session.wire.odd_flags {
        let name = name_of(id);
        let why = format!("the answer to {name} has flags {flags:#x}, a reply has exactly 0x5");
        return Err(Finding::breaks(why));
    }
    Ok(())
}

pub(crate) fn ack_when_asked(case: &mut Case<'_>) -> Outcome {
    let mut session = case.acking()?;
    let reply = session.ask(&message::vring_base(0, 0).need_reply())?;
    ensure!(reply.number()? == 0, "SET_VRING_BASE 0 was refused");
    ensure!(reply.fds.is_empty(), "{} descriptors came with an acknowledgement", reply.fds.len());
    Ok(())
}

pub(crate) fn ack_only_when_asked(case: &mut Case<'_>) -> Outcome {
    let mut session = case.acking()?;
    session.wire.send(&message::vring_base(0, 0))?;
    case.digests();
    session.wire.silent(case.quiet, "that did not ask for one")?;
    session.alive()
}

pub(crate) fn ack_not_before_agreed(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_with(PLAIN, ProtocolFeatures::MQ)?;
    session.wire.send(&message::vring_base(0, 0).need_reply())?;
    case.digests();
    session.wire.silent(case.quiet, "although REPLY_ACK was not negotiated")?;
    session.alive()
}

pub(crate) fn performed_without_ack(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_with(PLAIN, ProtocolFeatures::MQ)?;
    session.wire.send(&message::vring_base(0, 77).need_reply())?;
    let base = session.base(0)?;
    ensure!(base == 77, "SET_VRING_BASE with need_reply was not performed: the base is {base}");
    Ok(())
}

pub(crate) fn own_reply_once(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session()?;
    session.ask(&message::get_features().need_reply())?;
    case.digests();
    session.wire.silent(case.quiet, "a second time")?;
    session.alive()
}

pub(crate) fn in_order(case: &mut Case<'_>) -> Outcome {
    let mut wire = case.wire()?;
    let mut burst = Vec::new();
    for _ in 0..8 {
        burst.extend(message::get_features().bytes());
        burst.extend(Msg::bare(Code::GetProtocolFeatures).bytes());
        burst.extend(message::vring_base(0, 3).bytes());
    }
    wire.bytes(&burst, &[])?;
    for _ in 0..8 {
        wire.answer(Code::GetFeatures.id())?;
        wire.answer(Code::GetProtocolFeatures.id())?;
    }
    Ok(())
}

pub(crate) fn in_pieces(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session()?;
    let mut whole = message::vring_base(0, 99).bytes();
    whole.extend(message::get_base(0).bytes());
    for byte in whole {
        session.wire.bytes(&[byte], &[])?;
        case.peer.digests(Duration::from_millis(5));
    }
    let reply = session.wire.answer(Code::GetVringBase.id())?;
    let base = reply.payload.get(4..8).and_then(|bytes| bytes.try_into().ok());
    ensure!(base.map(u32::from_ne_bytes) == Some(99), "a message in pieces was not performed");
    Ok(())
}

pub(crate) fn fds_with_the_first_byte(case: &mut Case<'_>) -> Outcome {
    let mut session = case.acking()?;
    let call = eventfd()?;
    let msg = message::notifier(Code::SetVringCall, 0, &call).need_reply();
    let bytes = msg.bytes();
    let (first, rest) = bytes.split_at(5);
    session.wire.bytes(first, &msg.fds)?;
    case.digests();
    session.wire.bytes(rest, &[])?;
    let code = session.wire.answer(msg.id)?.number()?;
    ensure!(code == 0, "SET_VRING_CALL in two pieces was refused with {code}");
    session.alive()
}

pub(crate) fn unknown_refused(case: &mut Case<'_>) -> Outcome {
    let mut session = case.acking()?;
    for (id, size) in [(0, 0), (46, 0), (200, 0), (u32::MAX, 0), (201, 40)] {
        let what = format!("the unknown message {id} of {size} bytes");
        if !session.turned_down(&Msg::new(id, vec![7; size]), &what)? {
            session = case.acking()?;
        }
    }
    Ok(())
}

/// It gets no answer; that the connection ends is legal ("it may also close the connection").
pub(crate) fn unknown_passed_over(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_with(PLAIN, USUAL)?;
    session.wire.send(&Msg::new(200, Vec::new()))?;
    case.digests();
    session.wire.silent(case.quiet, "that nobody asked for")?;
    session.wire.send(&message::get_features())?;
    match session.wire.receive(session.wire.limit)? {
        Came::Nothing => Err(Finding::hangs("it is silent after an unknown message")),
        Came::Closed | Came::Reply(_) => Ok(()),
    }
}

pub(crate) fn barrier(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_with(PLAIN, ProtocolFeatures::MQ)?;
    for base in 0..50 {
        session.wire.send(&message::vring_base(0, base))?;
    }
    session.alive()?;
    let base = session.base(0)?;
    ensure!(base == 49, "GET_FEATURES was answered before an earlier message was done ({base})");
    Ok(())
}
