//! What a back-end must not keep: descriptors, mappings, memory, processor time (hostile cases A38,
//! A94; rule R20).

use std::time::Duration;

use outboard_protocol::FrontendCode as Code;

use super::case::Case;
use super::finding::{Finding, Outcome, Verdict};
use super::message;
use super::ring::eventfd;

/// Load that counts as rest: what a periodic tick may take.
const REST: f64 = 0.03;

/// That the process uses next to nothing.
fn idle(case: &Case<'_>, when: &str) -> Outcome {
    let windows = if case.quick { [50, 100, 200, 200] } else { [300, 500, 500, 500] };
    match case.peer.settles(&windows, REST) {
        None => Err(Finding::not_offered("its processor time cannot be read")),
        Some(Ok(())) => Ok(()),
        Some(Err(load)) if load <= REST => {
            let why = format!("a thread of it never sleeps {when}");
            Err(Finding::new(Verdict::Spins, why))
        }
        Some(Err(load)) => {
            let why = format!("it uses {:.0} % of a processor {when}", load * 100.0);
            Err(Finding::new(Verdict::Spins, why))
        }
    }
}

pub(crate) fn idle_alone(case: &mut Case<'_>) -> Outcome {
    drop(case.wire()?);
    std::thread::sleep(case.quiet);
    idle(case, "with no front-end")
}

pub(crate) fn idle_connected(case: &mut Case<'_>) -> Outcome {
    let _session = case.session()?;
    idle(case, "with a front-end that says nothing")
}

pub(crate) fn idle_running(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    disk.serves("on a ring that runs")?;
    // It may look for more work for a while.
    std::thread::sleep(case.quiet);
    idle(case, "with a ring that runs and is empty")
}

pub(crate) fn idle_stopped(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    disk.serves("on a ring that runs")?;
    disk.stop()?;
    disk.ring.kick()?;
    std::thread::sleep(case.quiet);
    idle(case, "with a ring that was stopped and kicked")
}

/// Descriptors, mappings of ours and resident KiB.
fn holdings(case: &Case<'_>) -> Outcome<(usize, usize, u64)> {
    let (fds, maps) = (case.peer.open_fds(), case.peer.shared_maps());
    match (fds, maps, case.peer.resident()) {
        (Some(fds), Some(maps), Some(resident)) => Ok((fds, maps, resident)),
        _ => Err(Finding::not_offered("its /proc entries cannot be read")),
    }
}

/// That a repeated thing leaves nothing; `often` is how often it was done.
fn flat(case: &Case<'_>, before: (usize, usize, u64), often: u32, what: &str) -> Outcome {
    let mut now = holdings(case)?;
    for _ in 0..50 {
        if now.0 <= before.0 && now.1 <= before.1 {
            break;
        }
        std::thread::sleep(Duration::from_millis(4));
        now = holdings(case)?;
    }
    let leak = |why: String| Err(Finding::new(Verdict::Leaks, why));
    if now.0 > before.0 + 1 {
        return leak(format!("{} descriptors stay open after {often} {what}", now.0 - before.0));
    }
    if now.1 > before.1 + 1 {
        return leak(format!("{} mappings stay after {often} {what}", now.1 - before.1));
    }
    let grown = now.2.saturating_sub(before.2);
    if grown > 4096 {
        return leak(format!("{grown} KiB stay after {often} {what}"));
    }
    Ok(())
}

pub(crate) fn tables(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session()?;
    let memory = super::disk::memory()?;
    for _ in 0..5 {
        session.share(memory.regions())?;
    }
    let before = holdings(case)?;
    let often = if case.quick { 50 } else { 500 };
    for _ in 0..often {
        session.share(memory.regions())?;
    }
    flat(case, before, often, "memory tables")
}

pub(crate) fn slots(case: &mut Case<'_>) -> Outcome {
    use super::conformance::memory as m;
    let (mut session, memory) = (m::slots(case)?, m::files(1)?);
    let before = holdings(case)?;
    let often = if case.quick { 50 } else { 500 };
    for _ in 0..often {
        m::add(&mut session, &memory, &m::region(0, 8))?;
        session.done(&message::slot(Code::RemMemReg, &m::region(0, 8)))?;
    }
    flat(case, before, often, "memory slots")
}

pub(crate) fn calls(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    disk.serves("on a ring that runs")?;
    let before = holdings(case)?;
    let often = if case.quick { 50 } else { 500 };
    for _ in 0..often {
        for code in [Code::SetVringCall, Code::SetVringKick, Code::SetVringErr] {
            let fd = eventfd()?;
            disk.session.done(&message::notifier(code, 0, &fd))?;
        }
    }
    flat(case, before, often, "call, kick and err descriptors")
}

pub(crate) fn restarts(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    disk.revive()?;
    let before = holdings(case)?;
    let often = if case.quick { 20 } else { 200 };
    for _ in 0..often {
        disk.revive()?;
    }
    flat(case, before, often, "stops and starts of a ring")
}

pub(crate) fn mappings_at_disconnect(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session()?;
    let memory = super::disk::memory()?;
    session.share(memory.regions())?;
    drop(session);
    let mut maps = Some(0);
    for _ in 0..100 {
        maps = case.peer.shared_maps();
        if maps == Some(0) {
            break;
        }
        std::thread::sleep(Duration::from_millis(4));
    }
    let maps = maps.ok_or_else(|| Finding::not_offered("its mappings cannot be read"))?;
    if maps > 0 && case.traits.serves_again {
        let why = format!("{maps} mappings of a front-end that has left stay");
        return Err(Finding::new(Verdict::Leaks, why));
    }
    Ok(())
}

pub(crate) fn sessions(case: &mut Case<'_>) -> Outcome {
    case.needs_another_turn()?;
    for _ in 0..3 {
        one_session(case)?;
    }
    let before = holdings(case)?;
    let often = if case.quick { 20 } else { 300 };
    for _ in 0..often {
        one_session(case)?;
    }
    flat(case, before, often, "front-ends that came and left")
}

/// A front-end that sets up as much as the device allows, and leaves.
fn one_session(case: &mut Case<'_>) -> Outcome {
    if case.traits.capacity.is_some() {
        return case.disk()?.serves("of one front-end after another");
    }
    let mut session = case.session()?;
    session.share(super::disk::memory()?.regions())
}
