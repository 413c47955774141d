//! The front-end does not trust the back-end: every reply that is not exactly what the table says
//! ends the connection, once and for all.

use outboard_protocol::header::Header;
use outboard_protocol::payload::{Inflight, MemRegion, VringState, encode_config};
use outboard_protocol::{
    Answer, Expect, Frame, Frontend, FrontendCode as Code, Notifier, ProtocolFeatures, Refusal,
    Request, StateDirection, Violation, virtio,
};
use zerocopy::IntoBytes;

use crate::common::{FEATURES, Fd, all_protocol};

/// A front-end that has negotiated everything with a back-end that offered everything.
fn front_end() -> Frontend<Fd> {
    let mut front = Frontend::new();
    let steps: [(Request<Fd>, u64); 2] =
        [(Request::GetFeatures, FEATURES), (Request::GetProtocolFeatures, all_protocol().bits())];
    for (request, offered) in steps {
        let code = request.code();
        assert_eq!(front.send(request), Ok(Expect::Reply));
        reply(&mut front, code, offered.as_bytes(), 0);
        assert!(front.poll().expect("a good reply").is_some());
    }
    assert_eq!(front.send(Request::SetProtocolFeatures(all_protocol())), Ok(Expect::Nothing));
    assert_eq!(front.send(Request::SetFeatures(FEATURES)), Ok(Expect::Ack));
    reply(&mut front, Code::SetFeatures, 0u64.as_bytes(), 0);
    assert!(front.poll().expect("a good reply").is_some_and(|answer| answer.is_success()));
    while front.transmit().is_some() {}
    front
}

fn reply(front: &mut Frontend<Fd>, code: Code, payload: &[u8], fds: usize) {
    let frame = Frame::reply(code.id(), payload, vec![1; fds]);
    front.receive(&frame.bytes, frame.fds);
}

/// Sends a request and plays a reply.
fn play(request: Request<Fd>, payload: &[u8], fds: usize) -> Result<Answer<Fd>, Violation> {
    let mut front = front_end();
    let code = request.code();
    assert_ne!(front.send(request), Ok(Expect::Nothing));
    reply(&mut front, code, payload, fds);
    let answer = front.poll();
    if answer.is_err() {
        assert_eq!(front.poll(), answer, "over is over");
    }
    answer.map(|answer| answer.expect("whole"))
}

#[test]
fn replies_with_other_flags_than_five_end_the_connection() {
    for flags in [0x1, 0x4, 0x6, 0x7, 0xd, 0x15, 0x8000_0005] {
        let mut front = front_end();
        assert_eq!(front.send(Request::GetFeatures), Ok(Expect::Reply));
        let frame = Frame::raw(Header { request: 1, flags, size: 8 }, &[0; 8], Vec::new());
        front.receive(&frame.bytes, frame.fds);
        assert_eq!(front.poll(), Err(Violation::ReplyFlags { request: 1, flags }));
    }
}

#[test]
fn replies_to_nobody_and_to_another_request_end_the_connection() {
    let mut front = front_end();
    reply(&mut front, Code::GetFeatures, &[0; 8], 0);
    assert_eq!(front.poll(), Err(Violation::ReplyUnasked { request: 1 }));

    let mut front = front_end();
    assert_eq!(front.send(Request::GetQueueNum), Ok(Expect::Reply));
    assert_eq!(front.send(Request::GetFeatures), Ok(Expect::Reply));
    reply(&mut front, Code::GetFeatures, &[0; 8], 0);
    let wrong = Violation::ReplyOrder { message: "GET_QUEUE_NUM", expected: 17, got: 1 };
    assert_eq!(front.poll(), Err(wrong));
}

#[test]
fn replies_of_another_length_end_the_connection() {
    let config = Request::GetConfig { offset: 0, size: 4 };
    let cases: Vec<(Request<Fd>, Vec<usize>)> = vec![
        (Request::GetFeatures, vec![0, 7, 9, 16]),
        (Request::SetOwner, vec![0, 7, 9]),
        (Request::GetVringBase { index: 0 }, vec![0, 7, 9]),
        (config, vec![8, 13, 15, 17]),
        (Request::PostcopyAdvise, vec![]),
        (Request::GetInflightFd { num_queues: 1, queue_size: 1 }, vec![0, 8, 19, 21, 25]),
        (Request::GetShmemConfig, vec![0, 8, 2055, 2057]),
        (Request::CheckDeviceState, vec![0, 4, 12]),
        (Request::GetStatus, vec![0, 1]),
        (Request::GetSharedObject(Default::default()), vec![1, 16]),
        (Request::CreateCryptoSession(Default::default()), vec![0, 8, 1071]),
    ];
    for (request, wrong) in cases {
        for size in wrong {
            let answer = play(request.clone(), &vec![0; size], 0);
            let shape = matches!(answer, Err(Violation::ReplyShape { .. }));
            assert!(shape, "{request:?} with {size} bytes: {answer:?}");
        }
    }
}

#[test]
fn replies_with_surplus_descriptors_end_the_connection() {
    let state = VringState { index: 0, num: 0 };
    for (request, payload) in [
        (Request::GetFeatures, 0u64.as_bytes()),
        (Request::GetVringBase { index: 0 }, state.as_bytes()),
        (Request::SetOwner, 0u64.as_bytes()),
        (Request::CheckDeviceState, 0u64.as_bytes()),
    ] {
        let answer = play(request, payload, 1);
        assert!(matches!(answer, Err(Violation::ReplyShape { fds: 1, .. })), "{answer:?}");
    }
    let two = play(Request::GetSharedObject(Default::default()), &[], 2);
    assert!(matches!(two, Err(Violation::ReplyShape { fds: 2, .. })));
}

#[test]
fn a_base_of_another_ring_ends_the_connection() {
    let payload = VringState { index: u32::MAX, num: u32::MAX };
    let answer = play(Request::GetVringBase { index: 1 }, payload.as_bytes(), 0);
    let expected = Violation::ReplyContents {
        message: "GET_VRING_BASE",
        what: "ring",
        expected: 1,
        got: 0xffff_ffff,
    };
    assert_eq!(answer, Err(expected));
}

/// Both error forms that back-ends use: an empty reply, and a head without bytes.
#[test]
fn a_refused_config_is_no_violation() {
    let refused = Ok(Answer::Config { offset: 4, bytes: None });
    let request = || Request::GetConfig { offset: 4, size: 8 };
    assert_eq!(play(request(), &[], 0), refused);
    assert_eq!(play(request(), &[0; 12], 0), refused);
    // qemu-storage-daemon ignores the offset and says so in the head.
    let bytes = encode_config(0, 0, &[9; 8]);
    assert_eq!(
        play(request(), &bytes, 0),
        Ok(Answer::Config { offset: 4, bytes: Some(vec![9; 8]) })
    );
}

/// qemu-storage-daemon answers with a stale number, DPDK with nothing, rust-vmm with the log.
#[test]
fn any_reply_to_set_log_base_is_taken() {
    for size in [0, 8, 16] {
        let log = outboard_protocol::payload::Log { mmap_size: 4096, mmap_offset: 0 };
        let payload = vec![0x10; size];
        assert_eq!(play(Request::SetLogBase(log, 1), &payload, 0), Ok(Answer::LogBase));
    }
}

#[test]
fn device_state_is_an_error_or_a_descriptor_or_the_word_for_none_and_never_two_of_them() {
    let request = || Request::SetDeviceStateFd(StateDirection::Save, 3);
    let play = |word: u64, fds| play(request(), word.as_bytes(), fds);
    assert_eq!(play(0x100, 0), Ok(Answer::DeviceState(Ok(None))));
    assert_eq!(play(0, 1), Ok(Answer::DeviceState(Ok(Some(1)))));
    assert_eq!(play(0x101, 0), Ok(Answer::DeviceState(Err(0x101))));
    for (word, fds) in [(0, 0), (0x100, 1), (0x101, 1), (0x1, 1)] {
        assert!(matches!(play(word, fds), Err(Violation::ReplyShape { .. })), "{word:#x} {fds}");
    }
}

#[test]
fn an_inflight_region_has_a_descriptor_exactly_when_it_has_a_size() {
    let request = || Request::GetInflightFd { num_queues: 1, queue_size: 64 };
    let none = Inflight::default();
    let some = Inflight { mmap_size: 4096, ..none };
    assert_eq!(play(request(), none.as_bytes(), 0), Ok(Answer::Inflight(none, None)));
    assert_eq!(play(request(), some.as_bytes(), 1), Ok(Answer::Inflight(some, Some(1))));
    assert!(play(request(), some.as_bytes(), 0).is_err());
    assert!(play(request(), none.as_bytes(), 1).is_err());
}

#[test]
fn requests_without_their_feature_are_not_sent() {
    let mut front: Frontend<Fd> = Frontend::new();
    let refused = |message| Err(Refusal::NotNegotiated { message });
    assert_eq!(front.send(Request::GetProtocolFeatures), refused("GET_PROTOCOL_FEATURES"));
    assert_eq!(front.send(Request::GetConfig { offset: 0, size: 4 }), refused("GET_CONFIG"));
    assert_eq!(
        front.send(Request::SetVringEnable { index: 0, enabled: true }),
        refused("SET_VRING_ENABLE")
    );
    assert!(front.transmit().is_none() && front.outstanding() == 0);
}

#[test]
fn requests_that_no_message_can_hold_are_not_sent() {
    let mut front = front_end();
    let kick = Request::SetVringKick { index: 256, kick: Notifier::Poll };
    let table = (0..33)
        .map(|at| (MemRegion { guest_addr: at << 12, size: 4096, ..Default::default() }, 1))
        .collect();
    let requests = [
        kick,
        Request::SetMemTable(table),
        Request::GetConfig { offset: 0, size: 257 },
        Request::GetConfig { offset: 0, size: u32::MAX },
        Request::SetConfig { offset: 0, bytes: vec![0; 257], migration: false },
    ];
    for request in requests {
        let answer = front.send(request.clone());
        assert!(matches!(answer, Err(Refusal::Unencodable { .. })), "{request:?}: {answer:?}");
    }
    assert!(front.transmit().is_none() && front.outstanding() == 0);
}

#[test]
fn unoffered_bits_are_not_acknowledged() {
    let mut front = front_end();
    let bits = virtio::IN_ORDER;
    let refused = Refusal::Unoffered { message: "SET_FEATURES", bits };
    assert_eq!(front.send(Request::SetFeatures(FEATURES | bits)), Err(refused));
    let xen = ProtocolFeatures::XEN_MMAP;
    let refused = Refusal::Unoffered { message: "SET_PROTOCOL_FEATURES", bits: xen.bits() };
    assert_eq!(front.send(Request::SetProtocolFeatures(xen)), Err(refused));
    assert_eq!(front.negotiated().acked, FEATURES);
}

#[test]
fn a_refused_set_of_features_is_not_remembered() {
    let mut front = front_end();
    assert_eq!(front.send(Request::SetFeatures(0)), Ok(Expect::Ack));
    assert_eq!(front.negotiated().acked, 0, "what follows is gated by the new set");
    reply(&mut front, Code::SetFeatures, 1u64.as_bytes(), 0);
    let answer = front.poll().expect("a good reply").expect("whole");
    assert_eq!(answer, Answer::Ack { request: Code::SetFeatures, value: 1 });
    assert!(!answer.is_success());
    assert_eq!(front.negotiated().acked, FEATURES);
}

#[test]
fn an_acknowledgement_is_asked_for_only_where_one_can_come() {
    let mut front = front_end();
    assert_eq!(front.send(Request::SetOwner), Ok(Expect::Ack));
    assert_eq!(front.send_without_ack(Request::SetOwner), Ok(Expect::Nothing));
    assert_eq!(front.send(Request::GetFeatures), Ok(Expect::Reply));
    assert_eq!(front.send_without_ack(Request::GetFeatures), Ok(Expect::Reply));
    let without = all_protocol() - ProtocolFeatures::REPLY_ACK;
    assert_eq!(front.send(Request::SetProtocolFeatures(without)), Ok(Expect::Nothing));
    assert_eq!(front.send(Request::SetOwner), Ok(Expect::Nothing));
    let flags: Vec<u8> = std::iter::from_fn(|| front.transmit()).map(|f| f.bytes[4]).collect();
    assert_eq!(flags, [9, 1, 1, 1, 1, 1]);
    assert_eq!(front.outstanding(), 3);
}
