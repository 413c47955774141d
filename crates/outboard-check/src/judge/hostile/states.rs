//! Messages at the wrong time, and everything with a file of its own: log, in-flight region, device
//! state, postcopy, IOTLB, crypto (hostile cases A70 to A91).

use std::io::Write as _;
use std::os::fd::OwnedFd;

use outboard_protocol::FrontendCode as Code;
use outboard_protocol::features::{ProtocolFeatures as P, virtio};
use outboard_protocol::payload::{CryptoSession, DeviceState, Inflight, Iotlb, Log, VringAddr};
use zerocopy::IntoBytes as _;

use super::{answered_or_closed, not_silent};
use crate::judge::case::Case;
use crate::judge::conformance::optional::file;
use crate::judge::disk::{BASE, Disk, MEMORY};
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::message::{self, Msg};
use crate::judge::session::{PLAIN, Session, USUAL};

pub(crate) fn log_impossible(case: &mut Case<'_>) -> Outcome {
    let file = file(0x1000)?;
    let logs = [
        (0, 0),
        (u64::MAX, 0),
        (0x1000, u64::MAX - 0xfff),
        (1 << 62, 0),
        (0x1000, 0x1000),
        (0x10, 7),
    ];
    for (mmap_size, mmap_offset) in logs {
        let mut session = case.session_for(P::LOG_SHMFD, "LOG_SHMFD")?;
        let body = Log { mmap_size, mmap_offset };
        let msg = Msg::new(Code::SetLogBase.id(), body.as_bytes().to_vec()).fd(&file);
        let what = format!("a log of {mmap_size:#x} bytes at {mmap_offset:#x}");
        answered_or_closed(&mut session, &msg, &what)?;
        drop(session);
        case.lives()?;
    }
    Ok(())
}

/// A disk that logs into a log of `said` bytes in a file of `size`.
fn logging(case: &mut Case<'_>, said: u64, size: u64) -> Outcome<(Disk, OwnedFd)> {
    let capacity = case.capacity()?;
    let session = case.session_with(PLAIN, USUAL | P::LOG_SHMFD)?;
    session.needs(P::LOG_SHMFD, "LOG_SHMFD")?;
    session.needs_bit(virtio::LOG_ALL, "LOG_ALL")?;
    let mut disk = Disk::start(session, capacity)?;
    let log = file(size)?;
    let body = Log { mmap_size: said, mmap_offset: 0 };
    let msg = Msg::new(Code::SetLogBase.id(), body.as_bytes().to_vec()).fd(&log);
    answered_or_closed(&mut disk.session, &msg, "a log")?;
    let on = message::set_features(disk.session.features | virtio::LOG_ALL);
    answered_or_closed(&mut disk.session, &on, "LOG_ALL")?;
    Ok((disk, log))
}

/// Requests while the log is bad: served or not, the process lives.
fn log_and_live(case: &mut Case<'_>, mut disk: Disk) -> Outcome {
    for _ in 0..3 {
        if disk.read(0, 4096).is_err() {
            break;
        }
    }
    drop(disk);
    case.lives()
}

pub(crate) fn log_too_short(case: &mut Case<'_>) -> Outcome {
    let (disk, _log) = logging(case, 8, 4096)?;
    log_and_live(case, disk)
}

pub(crate) fn log_in_a_short_file(case: &mut Case<'_>) -> Outcome {
    let (disk, _log) = logging(case, (BASE + MEMORY) / 4096 / 8, 64)?;
    log_and_live(case, disk)
}

pub(crate) fn log_cut_short(case: &mut Case<'_>) -> Outcome {
    let size = (BASE + MEMORY) / 4096 / 8;
    let (disk, log) = logging(case, size, size)?;
    rustix::fs::ftruncate(&log, 0).map_err(|errno| Finding::own("cut a file", errno))?;
    log_and_live(case, disk)
}

/// The used ring's place in the log is the front-end's to choose.
pub(crate) fn log_ring_outside(case: &mut Case<'_>) -> Outcome {
    let size = (BASE + MEMORY) / 4096 / 8;
    for place in [BASE + MEMORY, 1 << 40, u64::MAX - 0xfff] {
        let (mut disk, _log) = logging(case, size, size)?;
        let addr = VringAddr { flags: 1, log_guest_addr: place, ..disk.ring.addr() };
        let what = format!("a used ring that is logged at {place:#x}");
        answered_or_closed(&mut disk.session, &message::vring_addr(&addr).need_reply(), &what)?;
        log_and_live(case, disk)?;
    }
    Ok(())
}

pub(crate) fn inflight_lies(case: &mut Case<'_>) -> Outcome {
    let file = file(0x10_0000)?;
    let regions = [
        (u64::MAX, 0, 1, 64),
        (0x1000, u64::MAX, 1, 64),
        (0x10, 0, 1, 1024),
        (0x10_0000, 0, 60_000, 64),
        (0x10_0000, 0, 0, 0),
    ];
    for (mmap_size, mmap_offset, num_queues, queue_size) in regions {
        let mut session = case.session_for(P::INFLIGHT_SHMFD, "INFLIGHT_SHMFD")?;
        session.needs_acks()?;
        let padding = [0; 4];
        let body = Inflight { mmap_size, mmap_offset, num_queues, queue_size, padding };
        let msg = Msg::new(Code::SetInflightFd.id(), body.as_bytes().to_vec()).fd(&file);
        let what = format!("an in-flight region of {mmap_size:#x} for {num_queues} rings");
        session.refused(&msg, &what)?;
        drop(session);
        case.lives()?;
    }
    Ok(())
}

pub(crate) fn inflight_garbage(case: &mut Case<'_>) -> Outcome {
    let capacity = case.capacity()?;
    let session = case.session_for(P::INFLIGHT_SHMFD, "INFLIGHT_SHMFD")?;
    let mut disk = Disk::prepare(session, capacity)?;
    let file = file(0x1000)?;
    let mut random = crate::judge::storm::Random::new(case.seed);
    let noise: Vec<u8> = (0..0x1000).map(|_| random.byte()).collect();
    rustix::io::pwrite(&file, &noise, 0).map_err(|errno| Finding::own("fill a file", errno))?;
    let body = Inflight { mmap_size: 0x1000, num_queues: 1, queue_size: 16, ..Inflight::default() };
    let msg = Msg::new(Code::SetInflightFd.id(), body.as_bytes().to_vec()).fd(&file);
    answered_or_closed(&mut disk.session, &msg, "an in-flight region of noise")?;
    // It may refuse to run with that.
    let _ = disk.ring.run(&mut disk.session);
    std::thread::sleep(case.quiet / 4);
    case.lives()?;
    case.rests("with an in-flight region of noise")
}

pub(crate) fn inflight_often(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(P::INFLIGHT_SHMFD, "INFLIGHT_SHMFD")?;
    let body = Inflight { num_queues: 1, queue_size: 64, ..Inflight::default() };
    let msg = Msg::new(Code::GetInflightFd.id(), body.as_bytes().to_vec());
    let before = case.peer.open_fds();
    for _ in 0..200 {
        session.ask(&msg)?;
    }
    let after = case.peer.open_fds();
    if let (Some(before), Some(after)) = (before, after) {
        ensure!(after <= before + 2, "{} in-flight regions stay open", after - before);
    }
    Ok(())
}

pub(crate) fn state_of_noise(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(P::DEVICE_STATE, "DEVICE_STATE")?;
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair()
        .map_err(|error| Finding::own("make a socket pair", error))?;
    let body = DeviceState { direction: 1, phase: 0 };
    let msg = Msg::new(Code::SetDeviceStateFd.id(), body.as_bytes().to_vec()).fd(&theirs);
    session.ask(&msg)?;
    drop(theirs);
    let mut random = crate::judge::storm::Random::new(case.seed);
    let noise: Vec<u8> = (0..5000).map(|_| random.byte()).collect();
    // It may close its end at the first byte.
    let _ = ours.write_all(&noise);
    drop(ours);
    let code = session.ask(&Msg::bare(Code::CheckDeviceState))?.number()?;
    ensure!(code != 0, "a device state of noise was loaded");
    session.alive()
}

pub(crate) fn postcopy_often(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(P::PAGEFAULT, "PAGEFAULT")?;
    for _ in 0..50 {
        session.wire.send(&Msg::bare(Code::PostcopyAdvise))?;
        match session.wire.receive(case.limit)? {
            crate::judge::wire::Came::Reply(_) => {}
            _ => break,
        }
    }
    Ok(())
}

/// Requests of other kinds of device, with absurd contents, on any device.
pub(crate) fn foreign(case: &mut Case<'_>) -> Outcome {
    let mut crypto = CryptoSession::default();
    crypto.body.fill(0xff);
    let iotlb =
        Iotlb { iova: 0, size: u64::MAX, uaddr: u64::MAX, perm: 9, kind: 9, padding: [0; 6] };
    let messages = [
        Msg::new(Code::CreateCryptoSession.id(), crypto.as_bytes().to_vec()),
        Msg::new(Code::IotlbMsg.id(), iotlb.as_bytes().to_vec()).need_reply(),
        Msg::u64(Code::SendRarp, u64::MAX).need_reply(),
        Msg::u64(Code::NetSetMtu, u64::MAX).need_reply(),
        Msg::state(Code::VringKick, u32::MAX, 0).need_reply(),
        Msg::state(Code::GetVringBaseSkipDrain, u32::MAX, 0),
        Msg::state(Code::SetVringEndian, u32::MAX, 7).need_reply(),
    ];
    for msg in messages {
        let mut session = case.session()?;
        let what = format!("{} on a device that has no use for it", msg.name());
        answered_or_closed(&mut session, &msg, &what)?;
        drop(session);
        case.lives()?;
    }
    Ok(())
}

/// A device that is reset while requests are under way.
pub(crate) fn reset_while_busy(case: &mut Case<'_>) -> Outcome {
    for code in [Code::ResetOwner, Code::ResetDevice] {
        let capacity = case.capacity()?;
        let session = case.session_with(PLAIN, USUAL | P::RESET_DEVICE)?;
        let mut disk = Disk::start(session, capacity)?;
        for _ in 0..3 {
            crate::judge::semantics::enabling::queue_read(&mut disk)?;
        }
        disk.ring.kick()?;
        answered_or_closed(&mut disk.session, &Msg::bare(code).need_reply(), "a reset")?;
    }
    Ok(())
}

/// Gone while requests are under way.
pub(crate) fn gone_while_busy(case: &mut Case<'_>) -> Outcome {
    for _ in 0..10 {
        let mut disk = case.disk()?;
        for _ in 0..3 {
            crate::judge::semantics::enabling::queue_read(&mut disk)?;
        }
        disk.ring.kick()?;
    }
    case.disk()?.serves("after front-ends that left in the middle of their requests")
}

/// Kicks before there is anything to kick (A56), of any device.
pub(crate) fn kick_before_all(case: &mut Case<'_>) -> Outcome {
    let kick = crate::judge::ring::eventfd()?;
    let mut wire = case.wire()?;
    wire.send(&message::notifier(Code::SetVringKick, 0, &kick))?;
    crate::judge::ring::signal(&kick)?;
    not_silent(&mut wire, "a kick as the first message")?;
    drop(wire);
    let mut session = case.session()?;
    session.wire.send(&message::notifier(Code::SetVringKick, 0, &kick))?;
    session.wire.send(&message::enable(0, 1))?;
    crate::judge::ring::signal(&kick)?;
    not_silent(&mut session.wire, "a kick without memory")?;
    case.lives()?;
    case.rests("after a kick without memory")
}

/// A size that changes under a ring that runs (A47).
pub(crate) fn size_under_way(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    disk.serves("before its size was changed")?;
    for size in [32768, 8, 0, 65536] {
        disk.session.wire.send(&message::vring_num(0, size))?;
        disk.ring.kick()?;
    }
    not_silent(&mut disk.session.wire, "another size for a ring that runs")?;
    // Served or given up.
    let _ = disk.read(0, 512);
    case.lives()
}

/// Unknown feature sets: nothing, and everything.
pub(crate) fn all_features(case: &mut Case<'_>) -> Outcome {
    for bits in [u64::MAX, 0, 1 << 63, 1 << 30] {
        let mut session = Session::hello(case.wire()?, USUAL)?;
        let msg = message::set_features(bits);
        answered_or_closed(&mut session, &msg.need_reply(), &format!("features {bits:#x}"))?;
        drop(session);
        let mut session = Session::hello(case.wire()?, P::empty())?;
        let msg = Msg::u64(Code::SetProtocolFeatures, bits);
        answered_or_closed(&mut session, &msg, &format!("protocol features {bits:#x}"))?;
        drop(session);
        case.lives()?;
    }
    Ok(())
}
