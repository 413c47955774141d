//! The device's state in the hands of another process, or of a bad channel (vhost-user, "Migrating back-end
//! state"; hostile case A80).

use crate::judge::case::Case;
use crate::judge::conformance::transfer::{loaded, saved};
use crate::judge::disk::Disk;
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::session::{PLAIN, Session, USUAL};
use outboard_protocol::features::ProtocolFeatures as P;

fn session(case: &mut Case<'_>) -> Outcome<Session> {
    case.session_for(P::DEVICE_STATE, "DEVICE_STATE")
}

/// That a device serves; other devices than disks can only be asked something.
fn works(case: &Case<'_>, mut session: Session, when: &str) -> Outcome {
    match case.traits.capacity {
        Some(capacity) => Disk::start(session, capacity)?.serves(when),
        None => session.alive(),
    }
}

/// A migration may fail and be tried again: the second state is as good as the first.
pub(crate) fn twice(case: &mut Case<'_>) -> Outcome {
    let mut session = session(case)?;
    let states = [saved(case, &mut session)?, saved(case, &mut session)?];
    works(case, session, "after its state was saved twice")?;
    for (number, state) in ["first", "second"].into_iter().zip(&states) {
        let mut session = self::session(case)?;
        ensure!(loaded(&mut session, state)?, "it does not load the {number} of two states");
        works(case, session, "after one of two states was loaded")?;
    }
    Ok(())
}

/// The state goes to a process that has never seen the device, with the ring at its base.
pub(crate) fn restored(case: &mut Case<'_>) -> Outcome {
    case.needs_restarts()?;
    let Some(capacity) = case.traits.capacity else {
        let mut before = session(case)?;
        let state = saved(case, &mut before)?;
        drop(before);
        case.restart()?;
        let mut session = session(case)?;
        ensure!(loaded(&mut session, &state)?, "another process does not load its state");
        return session.alive();
    };
    let mut disk = Disk::start(session(case)?, capacity)?;
    for _ in 0..5 {
        disk.serves("before its state was saved")?;
    }
    let base = disk.stop()?;
    let state = saved(case, &mut disk.session)?;
    case.restart()?;
    disk.session = session(case)?;
    let size = state.len();
    ensure!(
        loaded(&mut disk.session, &state)?,
        "another process does not load the {size} bytes of its state"
    );
    let memory = disk.memory.clone();
    disk.session.share(memory.regions())?;
    let next = u32::from(disk.ring.next_avail);
    ensure!(base == next, "after {next} requests the base is {base}");
    disk.ring.run(&mut disk.session)?;
    disk.serves("in another process that has loaded its state")
}

/// Offers what is no state of this device; it must be refused, and the device goes on.
fn refused(case: &mut Case<'_>, state: &[u8], what: &str) -> Outcome {
    let mut session = session(case)?;
    let taken = loaded(&mut session, state)?;
    ensure!(!taken, "it loads {what}");
    works(case, session, &format!("after {what} was refused"))
}

/// The state of a device whose state is more than nothing.
fn some_state(case: &mut Case<'_>) -> Outcome<Vec<u8>> {
    let mut session = session(case)?;
    let state = saved(case, &mut session)?;
    match state.is_empty() {
        true => Err(Finding::not_offered("its state is empty: nothing can be spoilt")),
        false => Ok(state),
    }
}

/// A bit that fell over on its way.
pub(crate) fn flipped(case: &mut Case<'_>) -> Outcome {
    let state = some_state(case)?;
    let count = if case.quick { 8 } else { 64 }.min(state.len());
    for number in 0..count {
        let at = number * (state.len() - 1) / count.max(2).saturating_sub(1);
        let mut bad = state.clone();
        if let Some(byte) = bad.get_mut(at) {
            *byte ^= 1 << (number % 8);
        }
        let what = format!("its state with bit {} of byte {at} turned over", number % 8);
        refused(case, &bad, &what)?;
    }
    Ok(())
}

/// States of other devices, and things that are no state.
pub(crate) fn foreign(case: &mut Case<'_>) -> Outcome {
    let state = some_state(case)?;
    let more = [state.as_slice(), b"more"].concat();
    let twice = [state.as_slice(), state.as_slice()].concat();
    let others: [(&str, &[u8]); 5] = [
        ("4096 zeros", &[0; 4096]),
        ("a state of QEMU", b"QEVM\0\0\0\x03\x01\0\0\0\0\x05block"),
        ("a line of text", b"{\"version\":1,\"queues\":[]}\n"),
        ("its state with more behind it", &more),
        ("its state twice over", &twice),
    ];
    for (what, bytes) in others {
        refused(case, bytes, what)?;
    }
    Ok(())
}

/// A ring that runs is no place for a state; afterwards it runs on.
pub(crate) fn loaded_while_running(case: &mut Case<'_>) -> Outcome {
    let capacity = case.capacity()?;
    let mut first = session(case)?;
    let state = saved(case, &mut first)?;
    drop(first);
    let session = case.session_with(PLAIN, USUAL | P::DEVICE_STATE)?;
    let mut disk = Disk::start(session, capacity)?;
    disk.serves("before a state was offered")?;
    let taken = loaded(&mut disk.session, &state)?;
    ensure!(!taken, "it loads a state while a ring runs");
    disk.serves("after a state was refused")
}
