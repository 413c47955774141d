//! Kicks and calls: swapped, missing, suppressed (vhost-user, SET_VRING_KICK and SET_VRING_CALL;
//! virtio 1.3 §2.7.7 and §2.7.10).

use outboard_protocol::FrontendCode as Code;
use outboard_protocol::features::virtio;

use crate::judge::case::Case;
use crate::judge::disk::Disk;
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::message;
use crate::judge::ring::{eventfd, signalled};

pub(crate) fn called(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    for _ in 0..20 {
        disk.serves("on a ring that runs")?;
        ensure!(disk.ring.called(case.limit), "it did not call after a request was finished");
    }
    Ok(())
}

pub(crate) fn call_swapped(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    disk.serves("on a ring that runs")?;
    for _ in 0..20 {
        let old = std::mem::replace(&mut disk.ring.call, eventfd()?);
        disk.session.done(&message::notifier(Code::SetVringCall, 0, &disk.ring.call))?;
        signalled(&old, std::time::Duration::ZERO);
        signalled(&disk.ring.call, std::time::Duration::ZERO);
        disk.serves("after its call descriptor was replaced")?;
        ensure!(disk.ring.called(case.limit), "the new call descriptor is not used");
        ensure!(!signalled(&old, case.quiet / 50), "the old call descriptor is still used");
    }
    Ok(())
}

pub(crate) fn call_taken_away(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    disk.session.done(&message::polled(Code::SetVringCall, 0))?;
    disk.ring.called(std::time::Duration::ZERO);
    disk.serves("after its call descriptor was taken away")?;
    ensure!(!disk.ring.called(case.quiet), "it calls although the guest polls (bit 8)");
    disk.session.done(&message::notifier(Code::SetVringCall, 0, &disk.ring.call))?;
    disk.ring.called(case.quiet / 10);
    disk.serves("after its call descriptor came back")?;
    ensure!(disk.ring.called(case.limit), "the call descriptor that came back is not used");
    Ok(())
}

pub(crate) fn call_late(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.still_disk()?;
    disk.session.done(&message::vring_num(0, 16))?;
    disk.session.done(&message::vring_base(0, 0))?;
    disk.session.done(&message::vring_addr(&disk.ring.addr()))?;
    disk.ring.start(&mut disk.session)?;
    disk.ring.enable(&mut disk.session, true)?;
    disk.serves("that has no call descriptor yet")?;
    disk.session.done(&message::notifier(Code::SetVringCall, 0, &disk.ring.call))?;
    disk.ring.called(case.quiet / 10);
    disk.serves("after its call descriptor came")?;
    ensure!(disk.ring.called(case.limit), "a call descriptor that came after the kick is not used");
    Ok(())
}

pub(crate) fn kick_swapped(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    for _ in 0..20 {
        disk.ring.kick = eventfd()?;
        disk.session.done(&message::notifier(Code::SetVringKick, 0, &disk.ring.kick))?;
        disk.serves("after its kick descriptor was replaced")?;
        disk.serves("after its kick descriptor was replaced")?;
    }
    Ok(())
}

pub(crate) fn kick_polled(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.still_disk()?;
    disk.ring.configure(&mut disk.session)?;
    disk.session.done(&message::polled(Code::SetVringKick, 0))?;
    disk.ring.enable(&mut disk.session, true)?;
    for _ in 0..3 {
        disk.serves("that has no kick descriptor: the back-end polls")?;
    }
    disk.stop()?;
    Ok(())
}

pub(crate) fn kick_with_nothing(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    disk.serves("on a ring that runs")?;
    for _ in 0..100 {
        disk.ring.kick()?;
    }
    case.digests();
    disk.idle(case.quiet / 2, "although none was offered")?;
    disk.serves("after kicks without requests")
}

pub(crate) fn batch(case: &mut Case<'_>) -> Outcome {
    use crate::judge::disk::{DATA, HEADER, IN, STATUS};
    use crate::judge::ring::WRITE;
    let mut disk = case.disk()?;
    for _ in 0..20 {
        disk.header(IN, 0)?;
        for at in 0..5 {
            let data = DATA + 0x1000 * u64::from(at);
            disk.ring.chain(at * 3, &[(HEADER, 16, 0), (data, 512, WRITE), (STATUS, 1, WRITE)])?;
            disk.ring.list(at * 3)?;
        }
        disk.ring.publish()?;
        disk.ring.kick()?;
        let mut heads = Vec::new();
        for _ in 0..5 {
            let lost = || Finding::hangs("of five requests with one kick not all come back");
            let (id, _) = disk.ring.next_used(disk.limit)?.ok_or_else(lost)?;
            heads.push(id);
        }
        heads.sort_unstable();
        ensure!(heads == [0, 3, 6, 9, 12], "five heads were offered, {heads:?} came back");
    }
    Ok(())
}

/// A ring with EVENT_IDX.
fn with_event_idx(case: &mut Case<'_>) -> Outcome<Disk> {
    let disk =
        case.disk_with(virtio::RING_EVENT_IDX, outboard_protocol::ProtocolFeatures::empty())?;
    disk.session.needs_bit(virtio::RING_EVENT_IDX, "EVENT_IDX")?;
    Ok(disk)
}

/// Writes used_event, which lies behind the available ring.
fn used_event(disk: &Disk, value: u16) -> Outcome {
    disk.ring.store(disk.ring.avail + 4 + 2 * u64::from(disk.ring.size), value)
}

pub(crate) fn event_idx_calls(case: &mut Case<'_>) -> Outcome {
    let mut disk = with_event_idx(case)?;
    for at in 0..20 {
        used_event(&disk, at)?;
        disk.serves("with EVENT_IDX")?;
        ensure!(disk.ring.called(case.limit), "used_event {at} was reached without a call");
    }
    Ok(())
}

pub(crate) fn event_idx_suppresses(case: &mut Case<'_>) -> Outcome {
    let mut disk = with_event_idx(case)?;
    // The first completion may call whatever used_event says: nothing was signalled before it.
    used_event(&disk, 0)?;
    disk.serves("with EVENT_IDX")?;
    disk.ring.called(case.quiet);
    used_event(&disk, 10)?;
    for _ in 1..10 {
        disk.serves("with EVENT_IDX")?;
    }
    ensure!(!disk.ring.called(case.quiet), "it called before used_event 10 was reached");
    disk.serves("with EVENT_IDX")?;
    ensure!(disk.ring.called(case.limit), "used_event 10 was reached without a call");
    Ok(())
}

pub(crate) fn event_idx_asks(case: &mut Case<'_>) -> Outcome {
    let mut disk = with_event_idx(case)?;
    for at in 1..5 {
        disk.serves("with EVENT_IDX")?;
        let event = disk.ring.used + 4 + 8 * u64::from(disk.ring.size);
        // It may look for itself a while before it asks to be kicked again.
        let until = std::time::Instant::now() + case.limit;
        while disk.ring.load(event)? != at {
            let got = disk.ring.load(event)?;
            ensure!(std::time::Instant::now() < until, "avail_event is {got}, not {at}, at rest");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
    Ok(())
}
