//! The orders of messages that real front-ends use (protocol facts d.1; the lists are recorded ones).

use outboard_protocol::FrontendCode as Code;
use outboard_protocol::features::{ProtocolFeatures as P, virtio};
use outboard_protocol::payload::{self, Inflight};
use zerocopy::IntoBytes as _;

use crate::judge::case::Case;
use crate::judge::disk::{BASE, Disk, memory};
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::message::{self, Msg};
use crate::judge::ring::{Ring, eventfd};
use crate::judge::session::{PLAIN, Session, USUAL};
use crate::judge::wire::{Came, Wire};

/// A session that was negotiated by hand.
const fn session(wire: Wire, offered: u64, features: u64, protocol: P) -> Session {
    Session { wire, offered, features, protocol }
}

fn offer(wire: &mut Wire) -> Outcome<(u64, P)> {
    let offered = wire.ask(&message::get_features())?.number()?;
    if offered & virtio::PROTOCOL_FEATURES == 0 {
        return Err(Finding::not_offered("it does not offer PROTOCOL_FEATURES"));
    }
    let bits = wire.ask(&Msg::bare(Code::GetProtocolFeatures))?.number()?;
    Ok((offered, P::from_bits_retain(bits)))
}

/// A disk of which nothing is set up.
fn bare_disk(session: Session, capacity: u64) -> Outcome<Disk> {
    let memory = memory()?;
    let ring = Ring::new(&memory, 0, 16, BASE)?;
    let limit = session.wire.limit;
    Ok(Disk { session, memory, ring, limit, capacity })
}

/// QEMU 10: `1 15 16 17 21 3 1 13 14 24 | 2 13 2 5 8 10 9 12 18 … 11`, three times.
pub(crate) fn qemu(case: &mut Case<'_>) -> Outcome {
    let capacity = case.capacity()?;
    let mut wire = case.wire()?;
    let (offered, all) = offer(&mut wire)?;
    let chosen = all & (USUAL | P::BACKEND_REQ);
    wire.send(&Msg::u64(Code::SetProtocolFeatures, chosen.bits()))?;
    let mut session = session(wire, offered, offered & PLAIN, chosen);
    if chosen.contains(P::MQ) {
        session.ask(&Msg::bare(Code::GetQueueNum))?;
    }
    let (_ours, theirs) = std::os::unix::net::UnixStream::pair()
        .map_err(|error| Finding::own("make a socket pair", error))?;
    if chosen.contains(P::BACKEND_REQ) {
        session.done(&Msg::bare(Code::SetBackendReqFd).fd(&theirs))?;
    }
    session.wire.send(&Msg::bare(Code::SetOwner))?;
    session.alive()?;
    let mut disk = bare_disk(session, capacity)?;
    disk.session.done(&message::notifier(Code::SetVringCall, 0, &disk.ring.call))?;
    disk.session.done(&message::notifier(Code::SetVringErr, 0, &disk.ring.err))?;
    if chosen.contains(P::CONFIG) {
        disk.session.ask(&message::get_config(0, 60))?;
    }
    for _ in 0..3 {
        disk.ring.clear()?;
        qemu_start(&mut disk)?;
        disk.serves("set up in QEMU's order")?;
        disk.session.done(&message::enable(0, 0))?;
        disk.stop()?;
    }
    Ok(())
}

fn qemu_start(disk: &mut Disk) -> Outcome {
    let masked = eventfd()?;
    let features = message::set_features(disk.session.features);
    let session = &mut disk.session;
    session.wire.send(&features)?;
    session.done(&message::notifier(Code::SetVringCall, 0, &masked))?;
    session.wire.send(&features)?;
    session.share(disk.memory.regions())?;
    session.wire.send(&message::vring_num(0, 16))?;
    session.wire.send(&message::vring_base(0, 0))?;
    session.wire.send(&message::vring_addr(&disk.ring.addr()))?;
    disk.ring.start(session)?;
    // QEMU injects a kick.
    disk.ring.kick()?;
    session.done(&message::enable(0, 1))?;
    session.done(&message::notifier(Code::SetVringCall, 0, &disk.ring.call))
}

/// QEMU before 7.2 negotiates protocol features and does not send bit 30 back.
pub(crate) fn old_qemu(case: &mut Case<'_>) -> Outcome {
    let capacity = case.capacity()?;
    let mut wire = case.wire()?;
    let (offered, all) = offer(&mut wire)?;
    let chosen = all & USUAL;
    wire.send(&Msg::u64(Code::SetProtocolFeatures, chosen.bits()))?;
    wire.send(&Msg::bare(Code::SetOwner))?;
    let features = offered & virtio::VERSION_1;
    let mut disk = bare_disk(session(wire, offered, features, chosen), capacity)?;
    disk.session.wire.send(&message::set_features(features))?;
    disk.session.share(disk.memory.regions())?;
    disk.ring.configure(&mut disk.session)?;
    disk.ring.start(&mut disk.session)?;
    disk.serves("set up by a QEMU before 7.2")?;
    disk.session.wire.send(&message::set_features(features))?;
    disk.session.alive()?;
    disk.serves("set up by a QEMU before 7.2, after SET_FEATURES came again")
}

/// cloud-hypervisor: NUM before everything, in-flight region, CALL, KICK, ENABLE, channel last.
pub(crate) fn cloud_hypervisor(case: &mut Case<'_>) -> Outcome {
    let capacity = case.capacity()?;
    let wanted = USUAL | P::INFLIGHT_SHMFD | P::BACKEND_REQ | P::CONFIGURE_MEM_SLOTS;
    let session = case.session_with(PLAIN, wanted)?;
    let mut disk = bare_disk(session, capacity)?;
    let session = &mut disk.session;
    session.share(disk.memory.regions())?;
    session.done(&message::vring_num(0, 16))?;
    if session.protocol.contains(P::INFLIGHT_SHMFD) {
        let body = Inflight { num_queues: 1, queue_size: 16, ..Inflight::default() };
        let reply = session.ask(&Msg::new(Code::GetInflightFd.id(), body.as_bytes().to_vec()))?;
        let area = payload::decode_inflight(&reply.payload).unwrap_or_default();
        if let [fd] = reply.fds.as_slice() {
            let body = Inflight { num_queues: 1, queue_size: 16, ..area };
            session.done(&Msg::new(Code::SetInflightFd.id(), body.as_bytes().to_vec()).fd(fd))?;
        }
    }
    session.done(&message::vring_addr(&disk.ring.addr()))?;
    session.done(&message::vring_base(0, 0))?;
    session.done(&message::notifier(Code::SetVringCall, 0, &disk.ring.call))?;
    disk.ring.start(session)?;
    disk.ring.enable(session, true)?;
    if session.protocol.contains(P::BACKEND_REQ) {
        let (_ours, theirs) = std::os::unix::net::UnixStream::pair()
            .map_err(|error| Finding::own("make a socket pair", error))?;
        session.done(&Msg::bare(Code::SetBackendReqFd).fd(&theirs))?;
    }
    disk.serves("set up in cloud-hypervisor's order")?;
    disk.ring.enable(&mut disk.session, false)?;
    disk.stop()?;
    Ok(())
}

/// crosvm asks for no acknowledgement, ever.
pub(crate) fn crosvm(case: &mut Case<'_>) -> Outcome {
    let capacity = case.capacity()?;
    let session = case.session_with(PLAIN, P::MQ | P::CONFIG)?;
    let mut disk = bare_disk(session, capacity)?;
    let wire = &mut disk.session.wire;
    let table: Vec<_> =
        disk.memory.regions().map(|(spec, fd)| (message::region(&spec), fd)).collect();
    wire.send(&message::mem_table(&table))?;
    wire.send(&message::vring_num(0, 16))?;
    wire.send(&message::vring_addr(&disk.ring.addr()))?;
    wire.send(&message::vring_base(0, 0))?;
    wire.send(&message::notifier(Code::SetVringCall, 0, &disk.ring.call))?;
    wire.send(&message::notifier(Code::SetVringKick, 0, &disk.ring.kick))?;
    wire.send(&message::enable(0, 1))?;
    disk.serves("set up in crosvm's order")?;
    disk.session.wire.silent(case.quiet / 4, "that nobody asked for")?;
    disk.session.wire.send(&message::enable(0, 0))?;
    disk.stop()?;
    Ok(())
}

/// User-mode Linux: one region in 72 bytes, bit 30 acknowledged, KICK before CALL, ENABLE last.
pub(crate) fn user_mode_linux(case: &mut Case<'_>) -> Outcome {
    let capacity = case.capacity()?;
    let session = case.session()?;
    let mut disk = bare_disk(session, capacity)?;
    let session = &mut disk.session;
    let table: Vec<_> =
        disk.memory.regions().map(|(spec, fd)| (message::region(&spec), fd)).collect();
    let mut msg = message::mem_table(&table);
    msg.payload.resize(72, 0);
    session.done(&msg)?;
    session.done(&message::vring_num(0, 16))?;
    session.done(&message::vring_base(0, 0))?;
    session.done(&message::vring_addr(&disk.ring.addr()))?;
    disk.ring.start(session)?;
    session.done(&message::notifier(Code::SetVringCall, 0, &disk.ring.call))?;
    disk.ring.enable(session, true)?;
    disk.serves("set up in User-mode Linux's order")
}

/// DPDK's virtio-user and others enable rings before they start them.
pub(crate) fn virtio_user(case: &mut Case<'_>) -> Outcome {
    let capacity = case.capacity()?;
    let session = case.session()?;
    let mut disk = bare_disk(session, capacity)?;
    let session = &mut disk.session;
    disk.ring.enable(session, true)?;
    session.done(&message::notifier(Code::SetVringCall, 0, &disk.ring.call))?;
    session.share(disk.memory.regions())?;
    session.done(&message::vring_num(0, 16))?;
    session.done(&message::vring_base(0, 0))?;
    session.done(&message::vring_addr(&disk.ring.addr()))?;
    disk.ring.start(session)?;
    disk.serves("set up in virtio-user's order")
}

/// A ring that is reset alone by the driver: ENABLE 0 and a stop, then everything again (RING_RESET).
pub(crate) fn ring_reset(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    for _ in 0..5 {
        disk.serves("reset by its driver and set up again")?;
        disk.ring.enable(&mut disk.session, false)?;
        disk.stop()?;
        disk.ring.clear()?;
        disk.ring.run(&mut disk.session)?;
    }
    Ok(())
}

/// A second front-end must not disturb the first (A93).
pub(crate) fn two_at_once(case: &mut Case<'_>) -> Outcome {
    case.needs_another_turn()?;
    let mut disk = case.disk()?;
    disk.serves("of the first front-end")?;
    let mut second = case.wire()?;
    second.send(&message::get_features())?;
    if let Came::Reply(reply) = second.receive(case.quiet)? {
        ensure!(reply.header.request == 1, "a second front-end gets strange answers");
    }
    disk.serves("of the first front-end while a second is there")?;
    drop(second);
    disk.serves("of the first front-end after a second has left")?;
    disk.session.alive()
}

/// Another front-end finds nothing of the first.
pub(crate) fn nothing_inherited(case: &mut Case<'_>) -> Outcome {
    case.needs_another_turn()?;
    let mut first = case.session()?;
    first.done(&message::vring_base(0, 7))?;
    first.alive()?;
    drop(first);
    let base = case.session()?.base(0)?;
    ensure!(base == 0, "a new front-end finds the base {base} of the one before");
    Ok(())
}
