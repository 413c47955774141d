//! Kick and call descriptors that are none (hostile cases A58, A60, A61).

use std::os::fd::{AsFd, OwnedFd};

use outboard_protocol::FrontendCode as Code;

use super::not_silent;
use crate::judge::case::Case;
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::message;

fn open(path: &str, write: bool) -> Outcome<OwnedFd> {
    let file = std::fs::OpenOptions::new().read(!write).write(write).open(path);
    file.map(OwnedFd::from).map_err(|error| Finding::own("open a file", error))
}

/// A ring whose kick is something else: no crash, no spinning.
fn kicked_by(case: &mut Case<'_>, fd: &OwnedFd, what: &str) -> Outcome {
    let mut session = case.session()?;
    let memory = crate::judge::disk::memory()?;
    session.share(memory.regions())?;
    let ring = crate::judge::ring::Ring::new(&memory, 0, 16, crate::judge::disk::BASE)?;
    session.wire.send(&message::vring_num(0, 16))?;
    session.wire.send(&message::vring_base(0, 0))?;
    session.wire.send(&message::vring_addr(&ring.addr()))?;
    session.wire.send(&message::notifier(Code::SetVringCall, 0, &ring.call))?;
    session.wire.send(&message::notifier(Code::SetVringKick, 0, fd))?;
    session.wire.send(&message::enable(0, 1))?;
    not_silent(&mut session.wire, what)?;
    case.lives()?;
    case.rests(&format!("with {what}"))
}

pub(crate) fn kick_file(case: &mut Case<'_>) -> Outcome {
    let fd = crate::judge::conformance::optional::file(4096)?;
    kicked_by(case, &fd, "a file as kick")
}

pub(crate) fn kick_zero(case: &mut Case<'_>) -> Outcome {
    kicked_by(case, &open("/dev/zero", false)?, "/dev/zero as kick")
}

pub(crate) fn kick_closed_pipe(case: &mut Case<'_>) -> Outcome {
    let (reader, writer) = rustix::pipe::pipe().map_err(|e| Finding::own("make a pipe", e))?;
    drop(writer);
    kicked_by(case, &reader, "a pipe that nobody writes as kick")
}

pub(crate) fn kick_socket(case: &mut Case<'_>) -> Outcome {
    let (near, far) = std::os::unix::net::UnixStream::pair()
        .map_err(|error| Finding::own("make a socket pair", error))?;
    drop(far);
    kicked_by(case, &near.into(), "a socket without another end as kick")
}

pub(crate) fn kick_epoll(case: &mut Case<'_>) -> Outcome {
    let fd = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC)
        .map_err(|errno| Finding::own("make an epoll", errno))?;
    kicked_by(case, &fd, "an epoll descriptor as kick")
}

/// A ring that calls through something else: requests are served, or the ring is given up.
fn called_by(case: &mut Case<'_>, fd: &impl AsFd, what: &str) -> Outcome {
    let mut disk = case.disk()?;
    disk.session.wire.send(&message::notifier(Code::SetVringCall, 0, fd))?;
    not_silent(&mut disk.session.wire, what)?;
    for _ in 0..3 {
        // It may be given up: what counts is what happens to the process.
        if disk.serves(what).is_err() {
            break;
        }
    }
    case.lives()?;
    case.rests(&format!("with {what}"))?;
    not_silent(&mut disk.session.wire, what)
}

pub(crate) fn call_closed_pipe(case: &mut Case<'_>) -> Outcome {
    let (reader, writer) = rustix::pipe::pipe().map_err(|e| Finding::own("make a pipe", e))?;
    drop(reader);
    called_by(case, &writer, "a pipe that nobody reads as call")
}

pub(crate) fn call_full(case: &mut Case<'_>) -> Outcome {
    called_by(case, &open("/dev/full", true)?, "/dev/full as call")
}

pub(crate) fn call_full_pipe(case: &mut Case<'_>) -> Outcome {
    let (_reader, writer) = rustix::pipe::pipe().map_err(|e| Finding::own("make a pipe", e))?;
    let nonblocking = rustix::fs::OFlags::NONBLOCK;
    let set =
        |flags| rustix::fs::fcntl_setfl(&writer, flags).map_err(|e| Finding::own("set flags", e));
    set(nonblocking)?;
    while rustix::io::write(&writer, &[0; 4096]).is_ok() {}
    while rustix::io::write(&writer, &[0]).is_ok() {}
    set(rustix::fs::OFlags::empty())?;
    called_by(case, &writer, "a full pipe as call")
}

pub(crate) fn call_read_only(case: &mut Case<'_>) -> Outcome {
    called_by(case, &open("/dev/null", false)?, "a read-only file as call")
}

pub(crate) fn call_is_the_kick(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    let kick = &disk.ring.kick;
    disk.session.done(&message::notifier(Code::SetVringCall, 0, kick))?;
    disk.serves("that calls its own kick")?;
    case.rests("while a ring calls its own kick")
}

pub(crate) fn call_full_eventfd(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    // As high as it goes: one more would block a writer that is willing to block. It may call meanwhile.
    let full = (0..50).any(|_| {
        disk.ring.called(case.quiet / 50);
        rustix::io::write(&disk.ring.call, &(u64::MAX - 1).to_ne_bytes()).is_ok()
    });
    ensure!(full, "it calls for a ring on which nothing was asked for, again and again");
    for _ in 0..5 {
        disk.serves("whose call descriptor is full")?;
    }
    disk.session.alive()
}
