//! Messages behind protocol features that not every back-end offers: reset, status, channel, log,
//! in-flight region, device state, postcopy (vhost-user, the sections of the same names).

use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;

use outboard_protocol::FrontendCode as Code;
use outboard_protocol::features::{ProtocolFeatures as P, virtio};
use outboard_protocol::payload::{self, DeviceState, Inflight, Log, ShmemConfig};
use zerocopy::IntoBytes as _;

use crate::judge::case::Case;
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::message::{self, Msg};
use crate::judge::ring::eventfd;
use crate::judge::session::{PLAIN, Session, USUAL};
use crate::judge::wire::Came;

/// An unsealed file in memory.
pub(crate) fn file(size: u64) -> Outcome<OwnedFd> {
    let fd = rustix::fs::memfd_create("outboard-check", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(|errno| Finding::own("make a file", errno))?;
    rustix::fs::ftruncate(&fd, size).map_err(|errno| Finding::own("size a file", errno))?;
    Ok(fd)
}

pub(crate) fn reset_owner(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session()?;
    session.done(&message::vring_base(0, 9))?;
    session.done(&Msg::bare(Code::ResetOwner))?;
    session.alive()?;
    let base = session.base(0)?;
    ensure!(base == 9, "RESET_OWNER changed the base of a ring from 9 to {base}");
    Ok(())
}

pub(crate) fn reset_device(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(P::RESET_DEVICE, "RESET_DEVICE")?;
    session.done(&Msg::bare(Code::ResetDevice))?;
    session.alive()?;
    session.done(&message::set_features(session.features))?;
    session.done(&Msg::bare(Code::ResetDevice))
}

pub(crate) fn status(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(P::STATUS, "STATUS")?;
    for value in [1, 3, 0] {
        session.done(&Msg::u64(Code::SetStatus, value))?;
        let got = session.ask(&Msg::bare(Code::GetStatus))?.number()?;
        ensure!(got == value, "status {value} was set, {got} came back");
    }
    Ok(())
}

pub(crate) fn channel(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(P::BACKEND_REQ, "BACKEND_REQ")?;
    for _ in 0..2 {
        let (_ours, theirs) = pair()?;
        session.done(&Msg::bare(Code::SetBackendReqFd).fd(&theirs))?;
    }
    session.alive()
}

pub(crate) fn pair() -> Outcome<(UnixStream, UnixStream)> {
    UnixStream::pair().map_err(|error| Finding::own("make a socket pair", error))
}

pub(crate) fn channel_no_socket(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(P::BACKEND_REQ, "BACKEND_REQ")?;
    session.needs_acks()?;
    session
        .refused(&Msg::bare(Code::SetBackendReqFd), "SET_BACKEND_REQ_FD without a descriptor")?;
    drop(session);
    let mut session = case.session_for(P::BACKEND_REQ, "BACKEND_REQ")?;
    let file = file(4096)?;
    session.refused(&Msg::bare(Code::SetBackendReqFd).fd(&file), "a channel that is no socket")?;
    Ok(())
}

pub(crate) fn log_base(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(P::LOG_SHMFD, "LOG_SHMFD")?;
    let file = file(0x10_0000)?;
    for size in [0x1000, 0x10_0000] {
        let body = Log { mmap_size: size, mmap_offset: 0 };
        let msg = Msg::new(Code::SetLogBase.id(), body.as_bytes().to_vec()).fd(&file);
        let reply = session.ask(&msg)?;
        let len = reply.payload.len();
        ensure!(matches!(len, 0 | 8 | 16), "the answer to SET_LOG_BASE has {len} bytes");
    }
    case.digests();
    session.wire.silent(case.quiet, "a second time")?;
    session.alive()
}

pub(crate) fn log_toggle(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(P::LOG_SHMFD, "LOG_SHMFD")?;
    session.needs_bit(virtio::LOG_ALL, "LOG_ALL")?;
    let plain = session.features;
    for bits in [plain | virtio::LOG_ALL, plain, plain | virtio::LOG_ALL, plain] {
        session.done(&message::set_features(bits))?;
    }
    session.alive()
}

pub(crate) fn inflight(
    session: &mut Session,
    queues: u16,
    size: u16,
) -> Outcome<(Inflight, Vec<OwnedFd>)> {
    let body = Inflight { num_queues: queues, queue_size: size, ..Inflight::default() };
    let reply = session.ask(&Msg::new(Code::GetInflightFd.id(), body.as_bytes().to_vec()))?;
    let area = payload::decode_inflight(&reply.payload).ok_or_else(|| {
        Finding::breaks(format!("the answer to GET_INFLIGHT_FD has {} bytes", reply.payload.len()))
    })?;
    Ok((area, reply.fds))
}

pub(crate) fn inflight_given(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(P::INFLIGHT_SHMFD, "INFLIGHT_SHMFD")?;
    let (area, fds) = inflight(&mut session, 1, 64)?;
    let [fd] = fds.as_slice() else {
        return Err(Finding::breaks(format!("GET_INFLIGHT_FD brought {} descriptors", fds.len())));
    };
    let stat = rustix::fs::fstat(fd).map_err(|errno| Finding::own("look at a file", errno))?;
    let end = area.mmap_offset.saturating_add(area.mmap_size);
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    ensure!(area.mmap_size > 0 && end <= size, "an in-flight region of {end} bytes in {size}");
    let body = Inflight { num_queues: 1, queue_size: 64, ..area };
    session.done(&Msg::new(Code::SetInflightFd.id(), body.as_bytes().to_vec()).fd(fd))
}

pub(crate) fn inflight_impossible(case: &mut Case<'_>) -> Outcome {
    for (queues, size) in [(0, 64), (1, 0), (u16::MAX, u16::MAX)] {
        let mut session = case.session_for(P::INFLIGHT_SHMFD, "INFLIGHT_SHMFD")?;
        let body = Inflight { num_queues: queues, queue_size: size, ..Inflight::default() };
        session.wire.send(&Msg::new(Code::GetInflightFd.id(), body.as_bytes().to_vec()))?;
        if let Came::Reply(reply) = session.wire.receive(case.limit)? {
            let got = reply.fds.len();
            ensure!(got == 0, "an in-flight region was given for {queues} rings of {size}");
        }
        case.lives()?;
    }
    Ok(())
}

pub(crate) fn inflight_too_small(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(P::INFLIGHT_SHMFD, "INFLIGHT_SHMFD")?;
    session.needs_acks()?;
    let file = file(64)?;
    let body =
        Inflight { mmap_size: 0x10_0000, num_queues: 1, queue_size: 1024, ..Inflight::default() };
    let msg = Msg::new(Code::SetInflightFd.id(), body.as_bytes().to_vec()).fd(&file);
    session.refused(&msg, "an in-flight region that is longer than its file")?;
    Ok(())
}

pub(crate) fn transfer<'f>(direction: u32, fd: &'f OwnedFd) -> Msg<'f> {
    let body = DeviceState { direction, phase: 0 };
    Msg::new(Code::SetDeviceStateFd.id(), body.as_bytes().to_vec()).fd(fd)
}

pub(crate) fn state_saved(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(P::DEVICE_STATE, "DEVICE_STATE")?;
    let (mut ours, theirs) = pair()?;
    let theirs: OwnedFd = theirs.into();
    let reply = session.ask(&transfer(0, &theirs))?;
    let code = reply.number()?;
    drop(theirs);
    ensure!(code & 0xff == 0, "saving the state of a stopped device failed with {code:#x}");
    let own = code & 0x100 == 0;
    ensure!(
        own != reply.fds.is_empty(),
        "bit 8 of {code:#x} does not say whether a descriptor came"
    );
    ours.set_read_timeout(Some(case.limit)).map_err(|error| Finding::own("set a limit", error))?;
    let mut state = Vec::new();
    if !own {
        ours.read_to_end(&mut state)
            .map_err(|_| Finding::hangs("the saved state never ends: the descriptor stays open"))?;
    }
    let code = session.ask(&Msg::bare(Code::CheckDeviceState))?.number()?;
    ensure!(code == 0, "CHECK_DEVICE_STATE after a save says {code}");
    Ok(())
}

pub(crate) fn state_without_transfer(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(P::DEVICE_STATE, "DEVICE_STATE")?;
    let code = session.ask(&Msg::bare(Code::CheckDeviceState))?.number()?;
    ensure!(code != 0, "CHECK_DEVICE_STATE without a transfer says 0");
    Ok(())
}

pub(crate) fn state_impossible(case: &mut Case<'_>) -> Outcome {
    let file = file(4096)?;
    let mut late = transfer(0, &file);
    late.payload = DeviceState { direction: 0, phase: 1 }.as_bytes().to_vec();
    for (what, msg) in [("direction 7", transfer(7, &file)), ("phase 1", late)] {
        let mut session = case.session_for(P::DEVICE_STATE, "DEVICE_STATE")?;
        session.wire.send(&msg)?;
        let reply = match session.wire.receive(case.limit)? {
            Came::Reply(reply) => reply,
            Came::Closed => continue,
            Came::Nothing => return Err(Finding::hangs(format!("it is silent after {what}"))),
        };
        let code = reply.number()?;
        ensure!(code & 0xff != 0, "SET_DEVICE_STATE_FD with {what} says {code:#x}");
        ensure!(reply.fds.is_empty(), "SET_DEVICE_STATE_FD with {what} fails and has a descriptor");
        session.alive()?;
    }
    Ok(())
}

pub(crate) fn postcopy(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(P::PAGEFAULT, "PAGEFAULT")?;
    let reply = session.ask(&Msg::bare(Code::PostcopyAdvise))?;
    let size = reply.payload.len();
    ensure!(size == 0, "the answer to POSTCOPY_ADVISE has {size} bytes, QEMU fails on any");
    ensure!(reply.fds.len() <= 1, "{} descriptors came with it", reply.fds.len());
    session.alive()
}

pub(crate) fn postcopy_unadvised(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(P::PAGEFAULT, "PAGEFAULT")?;
    session.needs_acks()?;
    session.refused(&Msg::bare(Code::PostcopyListen), "POSTCOPY_LISTEN before POSTCOPY_ADVISE")?;
    Ok(())
}

pub(crate) fn postcopy_with_slots(case: &mut Case<'_>) -> Outcome {
    let both = P::PAGEFAULT | P::CONFIGURE_MEM_SLOTS;
    let mut session = case.session_with(PLAIN, USUAL | both)?;
    session.needs(both, "PAGEFAULT and CONFIGURE_MEM_SLOTS")?;
    session.wire.send(&Msg::bare(Code::PostcopyAdvise))?;
    if let Came::Reply(reply) = session.wire.receive(case.limit)? {
        ensure!(reply.fds.is_empty(), "postcopy was advised although memory slots were negotiated");
    }
    Ok(())
}

pub(crate) fn shmem_config(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(P::SHMEM, "SHMEM")?;
    let reply = session.ask(&Msg::bare(Code::GetShmemConfig))?;
    let config =
        payload::read::<ShmemConfig>(&reply.payload).filter(|_| reply.payload.len() == 2056);
    let Some(config) = config else {
        let size = reply.payload.len();
        return Err(Finding::breaks(format!("the answer to GET_SHMEM_CONFIG has {size} bytes")));
    };
    let used = config.sizes.iter().filter(|&&size| size != 0).count();
    let said = usize::try_from(config.count).unwrap_or(usize::MAX);
    ensure!(said == used, "it says {said} shared-memory regions and describes {used}");
    let odd = config.sizes.iter().find(|&&size| size % 4096 != 0);
    ensure!(odd.is_none(), "a shared-memory region is not of whole pages: {odd:?}");
    Ok(())
}

pub(crate) fn shared_object(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(P::SHARED_OBJECT, "SHARED_OBJECT")?;
    for body in [vec![0x77; 16], Vec::new()] {
        let reply = session.ask(&Msg::new(Code::GetSharedObject.id(), body))?;
        ensure!(reply.fds.is_empty(), "a shared object that does not exist came with a descriptor");
    }
    session.alive()
}

pub(crate) fn inband_alone(case: &mut Case<'_>) -> Outcome {
    if !case.traits.protocol.contains(P::INBAND_NOTIFICATIONS) {
        return Err(Finding::not_offered("it does not offer INBAND_NOTIFICATIONS"));
    }
    let mut session = Session::hello(case.wire()?, P::MQ)?;
    let msg = Msg::u64(Code::SetProtocolFeatures, P::INBAND_NOTIFICATIONS.bits());
    session.wire.send(&msg)?;
    session.wire.send(&Msg::state(Code::VringKick, 0, 0).need_reply())?;
    session.wire.send(&message::get_features())?;
    match session.wire.receive(case.limit)? {
        Came::Closed => Ok(()),
        _ => Err(Finding::breaks("INBAND_NOTIFICATIONS without its companions does not close")),
    }
}

pub(crate) fn rarp(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(P::RARP, "RARP")?;
    session.done(&Msg::u64(Code::SendRarp, 0x0605_0403_0202))?;
    session.alive()
}

pub(crate) fn mtu(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(P::MTU, "MTU")?;
    session.needs_bit(virtio::NET_MTU, "a settable MTU")?;
    session.done(&Msg::u64(Code::NetSetMtu, 1500))?;
    session.alive()
}

pub(crate) fn log_fd(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(P::LOG_SHMFD, "LOG_SHMFD")?;
    let fd = eventfd()?;
    session.done(&Msg::bare(Code::SetLogFd).fd(&fd.as_fd()))?;
    session.alive()
}
