//! Stopping rings: drain, base, silence afterwards (vhost-user, GET_VRING_BASE).

use outboard_protocol::FrontendCode as Code;

use crate::judge::case::Case;
use crate::judge::disk::{DATA, Disk, HEADER, IN, STATUS};
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::message;
use crate::judge::ring::{Ring, WRITE, signalled};
use crate::judge::semantics::enabling::queue_read;

pub(crate) fn base_counts(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    for _ in 0..5 {
        disk.serves("on a ring that runs")?;
    }
    let base = disk.stop()?;
    ensure!(base == 5, "after five requests the base is {base}");
    Ok(())
}

/// Stop and start again at the base, as sleep and wake do.
fn again(disk: &mut Disk, base: u32) -> Outcome {
    disk.session.done(&message::vring_base(0, base))?;
    disk.ring.start(&mut disk.session)?;
    disk.ring.enable(&mut disk.session, true)
}

pub(crate) fn base_round_trip(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    for round in 1..4 {
        for _ in 0..7 {
            disk.serves("after a stop and a start at its base")?;
        }
        let base = disk.stop()?;
        ensure!(base == round * 7, "after {} requests the base is {base}", round * 7);
        disk.ring.configure(&mut disk.session)?;
        again(&mut disk, base)?;
    }
    disk.serves("after a stop and a start at its base")
}

pub(crate) fn restarted_by_kick(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    disk.serves("on a ring that runs")?;
    let base = disk.stop()?;
    again(&mut disk, base)?;
    disk.serves("started again without its size and addresses being sent again")
}

pub(crate) fn base_wraps(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.still_disk()?;
    disk.ring.begin_at(0xfffd, 0xfffd)?;
    disk.ring.run(&mut disk.session)?;
    for _ in 0..6 {
        disk.serves("whose index wraps at 65536")?;
    }
    let base = disk.stop()?;
    ensure!(base == 3, "six requests after base 65533 the base is {base}, not 3");
    Ok(())
}

pub(crate) fn used_from_memory(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.still_disk()?;
    // Two requests of the ring's past never came back: the used ring is two behind.
    disk.ring.begin_at(5, 3)?;
    disk.ring.run(&mut disk.session)?;
    disk.header(IN, 0)?;
    disk.ring.chain(0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)])?;
    disk.ring.offer(0)?;
    let none = || Finding::hangs("a ring with used index 3 and base 5 serves nothing");
    disk.ring.next_used(disk.limit)?.ok_or_else(none)?;
    let used = disk.ring.used_index()?;
    ensure!(used == 4, "the used index went from 3 to {used}: it was not read from memory");
    Ok(())
}

pub(crate) fn drains(case: &mut Case<'_>) -> Outcome {
    for round in 0..10 {
        let mut disk = case.disk()?;
        disk.header(IN, 0)?;
        for at in 0..5 {
            let data = DATA + 0x1000 * u64::from(at);
            disk.ring.chain(at * 3, &[(HEADER, 16, 0), (data, 4096, WRITE), (STATUS, 1, WRITE)])?;
            disk.ring.list(at * 3)?;
        }
        disk.ring.publish()?;
        disk.ring.kick()?;
        // The stop may come before the kick is heard: every other time it waits for the first request.
        if round % 2 == 1 {
            disk.ring.next_used(disk.limit)?;
        }
        let base = disk.stop()?;
        let used = u32::from(disk.ring.used_index()?);
        ensure!(base == used, "the base is {base}, and {used} requests have come back");
        std::thread::sleep(case.quiet / 10);
        let later = u32::from(disk.ring.used_index()?);
        ensure!(later == used, "{} requests came back after the stop", later - used);
    }
    Ok(())
}

pub(crate) fn silent_when_stopped(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    disk.serves("on a ring that runs")?;
    disk.stop()?;
    disk.ring.called(std::time::Duration::from_millis(1));
    queue_read(&mut disk)?;
    disk.ring.kick()?;
    case.digests();
    disk.idle(case.quiet, "on a ring that was stopped")?;
    ensure!(!disk.ring.called(case.quiet / 10), "it called for a ring that was stopped");
    Ok(())
}

pub(crate) fn silent_before_start(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.still_disk()?;
    disk.ring.configure(&mut disk.session)?;
    disk.ring.enable(&mut disk.session, true)?;
    queue_read(&mut disk)?;
    disk.ring.kick()?;
    case.digests();
    disk.idle(case.quiet, "on a ring that was never started")
}

pub(crate) fn stop_after_disable(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    disk.serves("on a ring that runs")?;
    disk.ring.enable(&mut disk.session, false)?;
    let base = disk.stop()?;
    ensure!(base == 1, "after one request and ENABLE 0 the base is {base}");
    disk.ring.configure(&mut disk.session)?;
    again(&mut disk, base)?;
    disk.serves("after ENABLE 0, a stop and a start")
}

/// A second ring of the same device, running.
pub(crate) fn second(case: &Case<'_>, disk: &mut Disk) -> Outcome<Ring> {
    if case.traits.queues < 2 {
        return Err(Finding::not_offered("it has one ring"));
    }
    let ring = disk.other_ring(1)?;
    ring.run(&mut disk.session)?;
    Ok(ring)
}

pub(crate) fn rings_are_independent(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    let other = second(case, &mut disk)?;
    disk.serves("while another ring runs")?;
    disk.session.base(1)?;
    disk.serves("while another ring is stopped")?;
    other.run(&mut disk.session)?;
    let ours = std::mem::replace(&mut disk.ring, other);
    disk.serves("on the second ring, started again")?;
    disk.session.base(0)?;
    disk.serves("on the second ring while the first is stopped")?;
    drop(ours);
    Ok(())
}

pub(crate) fn stopped_at_disconnect(case: &mut Case<'_>) -> Outcome {
    case.needs_another_turn()?;
    let mut disk = case.disk()?;
    disk.serves("on a ring that runs")?;
    let Disk { session, ring, memory, capacity, limit } = disk;
    drop(session);
    // The next front-end is served only after the first has been left for good.
    let session = case.session()?;
    let mut disk = Disk { session, ring, memory, capacity, limit };
    queue_read(&mut disk)?;
    disk.ring.kick()?;
    case.digests();
    disk.idle(case.quiet, "of a front-end that has left")
}

pub(crate) fn served_again(case: &mut Case<'_>) -> Outcome {
    case.needs_another_turn()?;
    for _ in 0..5 {
        case.disk()?.serves("of one front-end after another")?;
    }
    Ok(())
}

pub(crate) fn error_signalled(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    disk.serves("on a ring that runs")?;
    disk.ring.offer(999)?;
    let told = signalled(&disk.ring.err, case.limit.min(std::time::Duration::from_secs(1)));
    ensure!(told, "a head of 999 in a ring of 16 is not reported on the err descriptor");
    Ok(())
}

pub(crate) fn polled_err(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.still_disk()?;
    disk.ring.configure(&mut disk.session)?;
    disk.session.done(&message::polled(Code::SetVringErr, 0))?;
    disk.ring.start(&mut disk.session)?;
    disk.ring.enable(&mut disk.session, true)?;
    disk.serves("that has no err descriptor")
}
