//! Rings that stop without waiting for what they hold (vhost-user, GET_VRING_BASE_SKIP_DRAIN; protocol
//! features GET_VRING_BASE_INFLIGHT and SKIP_DRAIN).
//!
//! Invariant: after the answer a request is either used or marked in the in-flight region, or was never
//! taken: base = used index + marks.

use outboard_protocol::FrontendCode as Code;
use outboard_protocol::features::ProtocolFeatures as P;
use outboard_protocol::payload::{VringState, read};

use super::inflight::{Kept, answered, go_on, lay_out};
use crate::judge::case::Case;
use crate::judge::disk::{BASE, Disk, IN, memory};
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::message::Msg;
use crate::judge::ring::Ring;
use crate::judge::semantics::enabling::queue_read;
use crate::judge::session::{PLAIN, Session, USUAL};

fn session(case: &mut Case<'_>) -> Outcome<(Session, u64)> {
    let capacity = case.capacity()?;
    let all = P::INFLIGHT_SHMFD | P::GET_VRING_BASE_INFLIGHT | P::SKIP_DRAIN;
    let session = case.session_with(PLAIN, USUAL | all)?;
    session.needs(all, "GET_VRING_BASE_SKIP_DRAIN")?;
    Ok((session, capacity))
}

/// Stops ring 0 without a drain; its base.
fn stop(session: &mut Session) -> Outcome<u32> {
    let reply = session.ask(&Msg::state(Code::GetVringBaseSkipDrain, 0, 0))?;
    let size = reply.payload.len();
    let state = read::<VringState>(&reply.payload).filter(|_| size == 8);
    let Some(state) = state else {
        let why = format!("the answer to GET_VRING_BASE_SKIP_DRAIN has {size} bytes, not 8");
        return Err(Finding::breaks(why));
    };
    let index = state.index;
    ensure!(index == 0, "GET_VRING_BASE_SKIP_DRAIN of ring 0 was answered for ring {index}");
    Ok(state.num)
}

/// A ring with nothing under way stops at its base, and goes on there.
pub(crate) fn stops(case: &mut Case<'_>) -> Outcome {
    let (session, capacity) = session(case)?;
    let mut disk = Disk::start(session, capacity)?;
    for _ in 0..5 {
        disk.serves("before it was stopped without a drain")?;
    }
    let base = stop(&mut disk.session)?;
    ensure!(base == 5, "after five requests the base is {base}");
    queue_read(&mut disk)?;
    disk.ring.kick()?;
    disk.idle(case.quiet, "on a ring that was stopped without a drain")?;
    // What was queued is at the base.
    let next = std::mem::replace(&mut disk.ring.next_avail, 5);
    disk.ring.run(&mut disk.session)?;
    disk.ring.next_avail = next;
    crate::judge::semantics::enabling::expect_read(&mut disk, "while it was stopped")
}

/// What is not used is in the region, and comes back once when the ring goes on.
pub(crate) fn kept(case: &mut Case<'_>) -> Outcome {
    const COUNT: u16 = 42;
    let (mut session, capacity) = session(case)?;
    let kept = Kept::ask(&mut session, 128)?;
    let memory = memory()?;
    let ring = Ring::new(&memory, 0, 128, BASE)?;
    let limit = session.wire.limit;
    let mut disk = Disk { session, memory, ring, limit, capacity };
    for _ in 0..if case.quick { 4 } else { 20 } {
        go_on(&mut disk, &kept)?;
        for number in 0..COUNT {
            lay_out(&disk.ring, number * 3, IN)?;
            disk.ring.list(number * 3)?;
        }
        disk.ring.publish()?;
        disk.ring.kick()?;
        let base = stop(&mut disk.session)?;
        let used = disk.ring.used_index()?;
        let marks = kept.marks(128)?;
        let taken = u32::from(used.wrapping_add(marks));
        ensure!(
            base == taken,
            "stopped at base {base} with used index {used} and {marks} requests in the region"
        );
        std::thread::sleep(case.quiet / 4);
        let late = disk.ring.used_index()?.wrapping_sub(used);
        ensure!(late == 0, "{late} requests came back after the stop");
        go_on(&mut disk, &kept)?;
        let mut heads = answered(case, &mut disk, usize::from(COUNT))?;
        heads.sort_unstable();
        let all: Vec<u32> = (0..COUNT).map(|number| u32::from(number) * 3).collect();
        ensure!(heads == all, "of {COUNT} requests there came back, with the stop, {heads:?}");
        disk.stop()?;
    }
    Ok(())
}
