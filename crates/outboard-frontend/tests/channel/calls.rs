//! The typed calls of a connection and `Vmm::open_channel`, against a device that has everything.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, channel};

use outboard_frontend::{ChannelEvent, Connection, Error, SharedObjects, Vmm, Wanted};
use outboard_protocol::payload::{CryptoSession, Uuid};
use outboard_protocol::{
    Backend, ChannelBackend, ChannelRequest, Effect, Notifier, ProtocolFeatures, Refusal, virtio,
};

use crate::peer::{BackEnd, PATIENCE, all_protocol, config, device, file, map, page};

/// What happened to a device, as text; and its channels.
enum Seen {
    Text(String),
    Channel(OwnedFd),
}

/// A connection to a device that says yes to everything but sessions, with all features negotiated.
fn negotiated() -> (Connection, Receiver<Seen>) {
    let (sender, seen) = channel();
    let (mut connection, _) = device(move |machine, effect| {
        let text = format!("{effect:?}")
            .replace(", ticket: Ticket", "")
            .replace(" { ticket: Ticket }", "");
        // The test has gone when nobody listens.
        let _ = sender.send(Seen::Text(text));
        if let Some(channel) = settle(machine, effect) {
            let _ = sender.send(Seen::Channel(channel));
        }
    });
    connection.get_features().expect("an answer");
    connection.get_protocol_features().expect("an answer");
    connection.set_protocol_features(all_protocol()).expect("accepted");
    // ACCESS_PLATFORM is shown now only.
    connection.get_features().expect("an answer");
    let all = virtio::VERSION_1 | virtio::ACCESS_PLATFORM | virtio::PROTOCOL_FEATURES;
    connection.set_features(all).expect("accepted");
    while seen.try_recv().is_ok() {}
    (connection, seen)
}

fn settle(machine: &mut Backend<OwnedFd>, effect: Effect<OwnedFd>) -> Option<OwnedFd> {
    match effect {
        Effect::GetStatus { ticket } => machine.answer(ticket, Ok(0x4f)),
        Effect::GetSharedObject { ticket, uuid } => {
            machine.answer(ticket, Ok((uuid.bytes[0] == 1).then(|| file(1))));
        }
        Effect::GetShmemConfig { ticket } => machine.answer(ticket, Ok(Box::new(config()))),
        Effect::CreateCryptoSession { ticket, session } => machine
            .answer(ticket, if session.op_code == 0 { Ok(33) } else { Err(Refusal::Unsupported) }),
        Effect::GetVringBase { ticket, .. } => machine.answer(ticket, Ok(5)),
        Effect::SetBackendReqFd { ticket, channel } => {
            machine.answer(ticket, Ok(()));
            return Some(channel);
        }
        Effect::CloseCryptoSession { ticket, id } => {
            machine.answer(ticket, if id == 33 { Ok(()) } else { Err(Refusal::Unsupported) });
        }
        Effect::SetFeatures { ticket, .. }
        | Effect::SetProtocolFeatures { ticket, .. }
        | Effect::ResetOwner { ticket }
        | Effect::ResetDevice { ticket }
        | Effect::SetStatus { ticket, .. }
        | Effect::SendRarp { ticket, .. }
        | Effect::NetSetMtu { ticket, .. }
        | Effect::SetVringKick { ticket, kick: Notifier::Poll, .. }
        | Effect::SetVringCall { ticket, call: Notifier::Poll, .. }
        | Effect::SetVringErr { ticket, err: Notifier::Poll, .. }
        | Effect::VringKick { ticket, .. }
        | Effect::SetVringEndian { ticket, .. }
        | Effect::Iotlb { ticket, .. }
        | Effect::GpuSetSocket { ticket, .. } => machine.answer(ticket, Ok(())),
        other => panic!("not expected: {other:?}"),
    }
    None
}

fn text(seen: &Receiver<Seen>) -> String {
    match seen.recv_timeout(PATIENCE) {
        Ok(Seen::Text(text)) => text,
        _ => panic!("nothing happened"),
    }
}

fn socket(seen: &Receiver<Seen>) -> OwnedFd {
    loop {
        match seen.recv_timeout(PATIENCE) {
            Ok(Seen::Channel(socket)) => return socket,
            Ok(Seen::Text(_)) => {}
            Err(error) => panic!("no channel came: {error}"),
        }
    }
}

#[test]
fn calls_to_the_device_reach_it_with_their_values() {
    let (mut c, seen) = negotiated();
    c.set_status(0xf).expect("done");
    assert_eq!(text(&seen), "SetStatus { status: 15 }");
    assert_eq!(c.get_status().expect("done"), 0x4f);
    assert_eq!(text(&seen), "GetStatus");
    c.send_rarp([1, 2, 3, 4, 5, 6]).expect("done");
    assert_eq!(text(&seen), "SendRarp { mac: [1, 2, 3, 4, 5, 6] }");
    c.net_set_mtu(9000).expect("done");
    assert_eq!(text(&seen), "NetSetMtu { mtu: 9000 }");
    c.reset_owner().expect("done");
    assert_eq!(text(&seen), "ResetOwner");
    assert_eq!(c.create_crypto_session(CryptoSession::default()).expect("done"), 33);
    let other = CryptoSession { op_code: 1, ..CryptoSession::default() };
    let refused = c.create_crypto_session(other);
    assert!(matches!(refused, Err(Error::Refused { code: u64::MAX, .. })), "{refused:?}");
    c.close_crypto_session(33).expect("done");
    assert!(matches!(c.close_crypto_session(34), Err(Error::Refused { code: 1, .. })));
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
    c.gpu_set_socket(ours.as_fd()).expect("done");
    c.reset_device().expect("done");
    assert!(matches!(c.iotlb_invalidate(0, 1), Err(Error::Unsendable(_))), "features are gone");
}

#[test]
fn calls_to_a_ring_reach_it_with_their_values() {
    let (mut c, seen) = negotiated();
    c.set_vring_call_polled(1).expect("done");
    assert_eq!(text(&seen), "SetVringCall { index: 1, call: Poll }");
    c.set_vring_err_polled(1).expect("done");
    assert_eq!(text(&seen), "SetVringErr { index: 1, err: Poll }");
    c.set_vring_endian(1, false).expect("done");
    assert_eq!(text(&seen), "SetVringEndian { index: 1, big_endian: false }");
    c.set_vring_kick_polled(1).expect("done");
    assert_eq!(text(&seen), "SetVringKick { index: 1, kick: Poll }");
    c.vring_kick(1).expect("done");
    assert_eq!(text(&seen), "VringKick { index: 1 }");
    assert_eq!(c.get_vring_base_skip_drain(1).expect("done"), 5);
    assert_eq!(text(&seen), "GetVringBase { index: 1, skip_drain: true }");
    c.iotlb_update(0x1000, 0x2000, 0x3000, 3).expect("done");
    assert_eq!(
        text(&seen),
        "Iotlb { message: Iotlb { iova: 4096, size: 8192, uaddr: 12288, perm: 3, kind: 2, padding: [0, 0, 0, 0, 0, 0] } }"
    );
    c.iotlb_invalidate(0x1000, 0x2000).expect("done");
    assert!(text(&seen).contains("kind: 3"));
}

#[test]
fn shared_objects_and_regions_come_back() {
    let (mut c, _seen) = negotiated();
    assert!(c.get_shared_object(Uuid { bytes: [1; 16] }).expect("done").is_some());
    assert!(c.get_shared_object(Uuid { bytes: [2; 16] }).expect("done").is_none());
    assert_eq!(*c.get_shmem_config().expect("done"), config());
}

fn vmm(wanted: Wanted) -> (Vmm, Receiver<Seen>) {
    let (connection, seen) = {
        let (sender, seen) = channel();
        let (connection, _) = device(move |machine, effect| {
            if let Some(channel) = settle(machine, effect) {
                let _ = sender.send(Seen::Channel(channel));
            }
        });
        (connection, seen)
    };
    (Vmm::new(connection, wanted).expect("negotiated"), seen)
}

fn back_end(seen: &Receiver<Seen>, vmm: &Vmm) -> BackEnd {
    let machine = ChannelBackend::new(vmm.protocol_features(), vmm.features());
    BackEnd::over(socket(seen), machine)
}

#[test]
fn a_vmm_opens_a_channel_and_the_device_is_heard_over_it() {
    let (mut vmm, seen) = vmm(Wanted::default().with_channel());
    let mut channel = vmm.open_channel(SharedObjects::new()).expect("opened");
    let mut back = back_end(&seen, &vmm);
    let (event, answer) = back.round(&mut channel, ChannelRequest::ConfigChange);
    assert!(matches!(event, ChannelEvent::ConfigChanged) && answer.is_ok());
    assert_eq!(channel.regions().sizes(), [(1, 16 * page()), (7, 4 * page())]);
    // Ring 2 of 2 was asked for with GET_QUEUE_NUM.
    let index =
        |index| outboard_protocol::payload::VringArea { vring: index, ..Default::default() };
    let notifier = |at: u64| ChannelRequest::HostNotifier(index(at | 0x100), None);
    assert!(back.round(&mut channel, notifier(1)).1.is_ok());
    back.refused(&mut channel, notifier(2));
}

#[test]
fn mappings_outlive_the_channel_and_go_with_a_reset_and_with_the_vmm() {
    let (mut vmm, seen) = vmm(Wanted::default().with_channel());
    let mut first = vmm.open_channel(SharedObjects::new()).expect("opened");
    let mut back = back_end(&seen, &vmm);
    let request = |at| ChannelRequest::ShmemMap(map(at, 1), file(1));
    assert!(back.round(&mut first, request(0)).1.is_ok());
    let mut second = vmm.open_channel(SharedObjects::new()).expect("replaced");
    drop((first, back));
    let regions = second.regions().clone();
    assert_eq!(regions.mappings(1).len(), 1);
    let mut back = back_end(&seen, &vmm);
    back.refused(&mut second, request(0));
    vmm.reset(Vec::new()).expect("nothing is active");
    assert!(regions.mappings(1).is_empty());
    assert!(back.round(&mut second, request(0)).1.is_ok());
    assert_eq!(regions.mappings(1).len(), 1);
    drop(vmm);
    assert!(regions.mappings(1).is_empty());
}

#[test]
fn no_channel_is_opened_to_a_device_that_offers_none() {
    let (mut vmm, _seen) = vmm(Wanted::default());
    let refused = vmm.open_channel(SharedObjects::new());
    assert!(matches!(refused, Err(Error::NotOffered("BACKEND_REQ"))), "{refused:?}");
    assert!(!vmm.protocol_features().contains(ProtocolFeatures::BACKEND_REQ));
}
