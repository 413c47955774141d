//! Setting up rings (vhost-user, "Ring states", "Starting and stopping rings"; messages 8 to 14 and 18).

use outboard_protocol::FrontendCode as Code;
use outboard_protocol::payload::VringAddr;

use crate::judge::case::Case;
use crate::judge::disk::{BASE, memory};
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::message;
use crate::judge::ring::{Ring, eventfd};
use crate::judge::session::Session;

pub(crate) fn num_accepted(case: &mut Case<'_>) -> Outcome {
    let mut session = case.acking()?;
    for size in [1, 2, 64, 128] {
        session.done(&message::vring_num(0, size))?;
    }
    Ok(())
}

pub(crate) fn num_zero(case: &mut Case<'_>) -> Outcome {
    case.acking()?.turned_down(&message::vring_num(0, 0), "a ring of 0 entries").map(drop)
}

pub(crate) fn num_odd(case: &mut Case<'_>) -> Outcome {
    for size in [3, 100] {
        let mut session = case.acking()?;
        let what = format!("a split ring of {size} entries, no power of two");
        session.turned_down(&message::vring_num(0, size), &what)?;
    }
    Ok(())
}

pub(crate) fn num_huge(case: &mut Case<'_>) -> Outcome {
    for size in [0x1_0000, 0x1_0010, u32::MAX] {
        let what = format!("a ring of {size} entries");
        case.acking()?.turned_down(&message::vring_num(0, size), &what)?;
    }
    Ok(())
}

/// A ring whose addresses are checked: memory is shared.
fn placed(case: &mut Case<'_>) -> Outcome<(Session, Ring, outboard_frontend::SharedMemory)> {
    let mut session = case.acking()?;
    let memory = memory()?;
    session.share(memory.regions())?;
    let ring = Ring::new(&memory, 0, 16, BASE)?;
    session.done(&message::vring_num(0, 16))?;
    Ok((session, ring, memory))
}

pub(crate) fn addr_accepted(case: &mut Case<'_>) -> Outcome {
    let (mut session, ring, _memory) = placed(case)?;
    session.done(&message::vring_addr(&ring.addr()))
}

pub(crate) fn addr_alignment(case: &mut Case<'_>) -> Outcome {
    let (mut session, ring, _memory) = placed(case)?;
    let good = ring.addr();
    let bad = [
        ("a descriptor table at +8, not on 16 bytes", VringAddr { desc: good.desc + 8, ..good }),
        ("an available ring at +1, not on 2 bytes", VringAddr { avail: good.avail + 1, ..good }),
        ("a used ring at +2, not on 4 bytes", VringAddr { used: good.used + 2, ..good }),
    ];
    for (what, addr) in bad {
        if !session.turned_down(&message::vring_addr(&addr), what)? {
            (session, _, _) = placed(case)?;
        }
    }
    session.done(&message::vring_addr(&good))
}

pub(crate) fn addr_flags(case: &mut Case<'_>) -> Outcome {
    let (mut session, ring, _memory) = placed(case)?;
    let bad = VringAddr { flags: 0x10, ..ring.addr() };
    session
        .turned_down(&message::vring_addr(&bad), "unknown flags 0x10 in SET_VRING_ADDR")
        .map(drop)
}

pub(crate) fn base_fresh(case: &mut Case<'_>) -> Outcome {
    let base = case.session()?.base(0)?;
    ensure!(base == 0, "a ring that never had a base has base {base}");
    Ok(())
}

pub(crate) fn base_returned(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session()?;
    for base in [0x1234, 0xffff, 0] {
        session.done(&message::vring_base(0, base))?;
        let got = session.base(0)?;
        ensure!(got == base, "base {base:#x} was set on a stopped ring, {got:#x} came back");
    }
    Ok(())
}

pub(crate) fn base_wide(case: &mut Case<'_>) -> Outcome {
    case.acking()?
        .turned_down(&message::vring_base(0, 0x1_0000), "base 0x10000 of a split ring")
        .map(drop)
}

/// KICK, CALL and ERR with and without a descriptor.
pub(crate) fn notifier(case: &mut Case<'_>, code: Code) -> Outcome {
    let mut session = case.acking()?;
    let fd = eventfd()?;
    session.done(&message::notifier(code, 0, &fd))?;
    session.done(&message::polled(code, 0))?;
    session.done(&message::notifier(code, 0, &fd))
}

/// A descriptor is announced and none comes (A20).
pub(crate) fn notifier_missing(case: &mut Case<'_>, code: Code) -> Outcome {
    let name = message::name_of(code.id());
    let mut msg = message::polled(code, 0);
    msg.payload = 0u64.to_ne_bytes().to_vec();
    case.acking()?
        .turned_down(&msg, &format!("{name} without the descriptor that it announces"))
        .map(drop)
}

pub(crate) fn enable_values(case: &mut Case<'_>) -> Outcome {
    let mut session = case.acking()?;
    for on in [1, 0, 0, 1] {
        session.done(&message::enable(0, on))?;
    }
    Ok(())
}

pub(crate) fn enable_other(case: &mut Case<'_>) -> Outcome {
    let mut session = case.acking()?;
    for value in [2, u32::MAX] {
        if !session.turned_down(&message::enable(0, value), &format!("SET_VRING_ENABLE {value}"))? {
            session = case.acking()?;
        }
    }
    Ok(())
}

/// A ring that runs, with nothing in it: any kind of device can have one.
fn running(case: &mut Case<'_>) -> Outcome<(Session, Ring, outboard_frontend::SharedMemory)> {
    let (mut session, ring, memory) = placed(case)?;
    ring.run(&mut session)?;
    Ok((session, ring, memory))
}

pub(crate) fn num_while_running(case: &mut Case<'_>) -> Outcome {
    let (mut session, _ring, _memory) = running(case)?;
    session.turned_down(&message::vring_num(0, 32), "another size for a ring that runs").map(drop)
}

pub(crate) fn base_while_running(case: &mut Case<'_>) -> Outcome {
    let (mut session, _ring, _memory) = running(case)?;
    session.turned_down(&message::vring_base(0, 5), "another base for a ring that runs").map(drop)
}

pub(crate) fn addr_again_while_running(case: &mut Case<'_>) -> Outcome {
    let (mut session, ring, _memory) = running(case)?;
    session.done(&message::vring_addr(&ring.addr()))
}

pub(crate) fn stop_twice(case: &mut Case<'_>) -> Outcome {
    let (mut session, _ring, _memory) = running(case)?;
    let (first, second) = (session.base(0)?, session.base(0)?);
    ensure!(first == second, "the base of a stopped ring went from {first} to {second}");
    Ok(())
}

pub(crate) fn many_rings(case: &mut Case<'_>) -> Outcome {
    let queues = case.traits.queues;
    let mut session = case.acking()?;
    if queues < 2 {
        return Err(Finding::not_offered("it has one ring"));
    }
    let last = u32::try_from(queues.min(256) - 1).unwrap_or(0);
    for ring in [0, last] {
        session.done(&message::vring_base(ring, ring + 1))?;
    }
    for ring in [0, last] {
        let base = session.base(ring)?;
        ensure!(base == ring + 1, "ring {ring} has base {base}, {} was set", ring + 1);
    }
    Ok(())
}

pub(crate) fn any_order(case: &mut Case<'_>) -> Outcome {
    let mut session = case.acking()?;
    let memory = memory()?;
    let ring = Ring::new(&memory, 0, 16, BASE)?;
    session.done(&message::enable(0, 1))?;
    session.done(&message::notifier(Code::SetVringErr, 0, &ring.err))?;
    session.done(&message::notifier(Code::SetVringCall, 0, &ring.call))?;
    session.done(&message::vring_base(0, 0))?;
    session.done(&message::vring_num(0, 16))?;
    session.share(memory.regions())?;
    session.done(&message::vring_addr(&ring.addr()))?;
    session.done(&message::notifier(Code::SetVringKick, 0, &ring.kick))?;
    session.base(0)?;
    Ok(())
}
