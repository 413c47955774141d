//! Both ends of the back-end channel, joined: every message, every wrong shape, answers out of step.

use outboard_protocol::channel::{ChannelRequest as Request, MAX_OUTSTANDING};
use outboard_protocol::payload::{Iotlb, ShmemMap, Uuid, VringArea, VringFd, VringState};
use outboard_protocol::table::{ReplyKind, back_end_table};
use outboard_protocol::{
    BackendCode, ChannelAnswer, ChannelBackend, ChannelEffect, ChannelFrontend, ChannelStep, Frame,
    ProtocolFeatures, Refusal, Violation,
};

use crate::channel::one_of_each;
use crate::common::channel_pair::{Channel, IOMMU};
use crate::common::{Fd, all_protocol};

/// What an effect asks for.
fn asked(effect: &ChannelEffect<Fd>) -> Request<Fd> {
    match effect {
        ChannelEffect::Request { request, .. } => request.clone(),
        ChannelEffect::Lookup { uuid, .. } => Request::SharedObjectLookup(*uuid),
    }
}

#[test]
fn every_message_arrives_and_is_answered_with_success_and_with_failure() {
    for reply_ack in [true, false] {
        let mut protocol = all_protocol();
        protocol.set(ProtocolFeatures::REPLY_ACK, reply_ack);
        for request in one_of_each() {
            for success in [true, false] {
                for chunk in [1, usize::MAX] {
                    let mut channel = Channel { chunk, ..Channel::new(protocol) };
                    let row = row_of(&request);
                    let sent = channel.back.send(request.clone()).expect("legal");
                    assert_eq!(sent.answer, reply_ack || row.reply.is_own(), "{}", row.name);
                    channel.drive();
                    assert_eq!(asked(&channel.effects[0]), request);
                    assert_eq!(channel.effects.len(), 1);
                    channel.settle(0, success);
                    let expected = match (success, row.reply) {
                        (false, _) => Err(1),
                        (true, ReplyKind::StatusAndFd) => Ok(Some(77)),
                        (true, _) => Ok(None),
                    };
                    let answers = channel.results();
                    if sent.answer {
                        assert_eq!(answers, [(sent.id, expected)], "{}", row.name);
                    } else {
                        assert!(answers.is_empty(), "{}: {answers:?}", row.name);
                    }
                    assert_eq!((channel.back.owed(), channel.front.outstanding()), (0, 0));
                    assert!(channel.violations.is_empty());
                }
            }
        }
    }
}

fn row_of(request: &Request<Fd>) -> &'static outboard_protocol::MessageInfo {
    let id = request.code().id();
    back_end_table().iter().find(|row| row.id == id).expect("a row for each code")
}

fn uuid(byte: u8) -> Uuid {
    Uuid { bytes: [byte; 16] }
}

#[test]
fn answers_of_different_messages_may_come_in_any_order() {
    let mut channel = Channel::new(all_protocol());
    let change = channel.send(Request::ConfigChange);
    let add = channel.send(Request::SharedObjectAdd(uuid(1)));
    let lookup = channel.send(Request::SharedObjectLookup(uuid(2)));
    channel.drive();
    assert_eq!((channel.effects.len(), channel.back.outstanding()), (3, 3));
    channel.settle(2, true);
    assert_eq!(channel.results(), [(lookup, Ok(Some(77)))]);
    channel.settle(1, false);
    assert_eq!(channel.results(), [(add, Err(1))]);
    channel.settle(0, true);
    assert_eq!(channel.results(), [(change, Ok(None))]);
}

#[test]
fn answers_of_one_message_keep_the_order_of_their_requests() {
    let mut channel = Channel::new(all_protocol());
    let add = |byte| Request::SharedObjectAdd(uuid(byte));
    let ids = [1, 2, 3].map(|byte| channel.send(add(byte)));
    channel.drive();
    channel.settle(2, false);
    assert_eq!(channel.results(), [], "the third waits for the first");
    channel.settle(0, true);
    assert_eq!(channel.results(), [(ids[0], Ok(None))], "the second is still out");
    channel.effects.clear();
    assert_eq!(channel.results(), [(ids[1], Err(1)), (ids[2], Err(1))], "a dropped ticket refuses");
    assert_eq!(channel.front.outstanding(), 0);
}

#[test]
fn a_request_without_its_feature_is_refused_by_one_end_and_turned_down_by_the_other() {
    let rows = back_end_table().iter().zip(one_of_each_row());
    for (row, request) in rows {
        let (protocol, features) = (all_protocol() - row.needs.protocol, IOMMU & !row.needs.acked);
        let mut back = ChannelBackend::new(protocol, features);
        let mut front: ChannelFrontend<Fd> = ChannelFrontend::new(protocol, features);
        if protocol == all_protocol() && features == IOMMU {
            assert!(row.id > 1000, "{} needs nothing", row.name);
            continue;
        }
        let missing = Refusal::NotNegotiated { message: row.name };
        assert_eq!(back.send(request.clone()), Err(missing));
        assert_eq!((back.transmit(), back.owed()), (None, 0));
        let frame = request.encode(true);
        front.receive(&frame.bytes, frame.fds);
        let step = front.poll().expect("in step");
        let Some(ChannelStep::Violation(violation)) = step else { panic!("{step:?}") };
        assert_eq!(violation, Violation::NotNegotiated { message: row.name });
        let nak = Frame::reply(row.id, &1u64.to_ne_bytes(), Vec::new());
        assert_eq!(front.transmit(), Some(nak), "an answer was asked for");
        // It becomes legal when the feature is negotiated, also while the channel is open.
        back.negotiate(all_protocol(), IOMMU);
        assert!(back.send(one_of_each_row().swap_remove(position(row.id))).is_ok());
    }
}

/// One request for each row of the table, in its order.
fn one_of_each_row() -> Vec<Request<Fd>> {
    let mut requests = one_of_each();
    requests.dedup_by_key(|request| request.code());
    requests
}

fn position(id: u32) -> usize {
    BackendCode::ALL.iter().position(|code| code.id() == id).expect("a code")
}

#[test]
fn a_wrong_shape_is_turned_down_and_the_channel_lives() {
    for request in one_of_each() {
        let row = row_of(&request);
        let right = request.encode(true);
        let (payload, fds) = (right.bytes[12..].to_vec(), right.fds.clone());
        let mut wrong =
            vec![Frame::request(row.id, true, &[&payload[..], &[0]].concat(), fds.clone())];
        if let Some((_, less)) = payload.split_last() {
            wrong.push(Frame::request(row.id, true, less, fds.clone()));
        }
        let more = [&fds[..], &[9]].concat();
        wrong.push(Frame::request(row.id, true, &payload, more));
        if !fds.is_empty() {
            wrong.push(Frame::request(row.id, true, &payload, Vec::new()));
        }
        for frame in wrong {
            for asks in [true, false] {
                let mut channel = Channel::new(all_protocol());
                let bytes =
                    [&row.id.to_ne_bytes()[..], &[if asks { 9 } else { 1 }], &frame.bytes[5..]];
                channel.to_front.send(&bytes.concat(), frame.fds.clone());
                while channel.step_front() {}
                let shape = matches!(
                    channel.violations[..],
                    [Violation::Size { .. } | Violation::FdCount { .. }]
                );
                assert!(
                    shape && channel.effects.is_empty(),
                    "{}: {:?}",
                    row.name,
                    channel.violations
                );
                let nak = Frame::reply(row.id, &1u64.to_ne_bytes(), Vec::new());
                let due = (asks || row.reply.is_own()).then_some(nak);
                assert_eq!(channel.front.transmit(), due, "{} {asks}", row.name);
                let alive = channel.send(Request::ConfigChange);
                channel.drive();
                channel.settle(0, true);
                assert_eq!(channel.results(), [(alive, Ok(None))]);
            }
        }
    }
}

#[test]
fn values_that_mean_nothing_are_refused_by_one_end_and_turned_down_by_the_other() {
    let map = ShmemMap { shm_offset: 4096, len: 4096, ..ShmemMap::default() };
    let miss = Iotlb { iova: 4096, perm: 1, kind: 1, ..Iotlb::default() };
    let area = VringArea { vring: VringFd::new(0, true).0, size: 4096, offset: 0 };
    let wrong: Vec<Request<Fd>> = vec![
        Request::Iotlb(Iotlb { kind: 2, ..miss }),
        Request::Iotlb(Iotlb { kind: 0, ..miss }),
        Request::Iotlb(Iotlb { perm: 0, ..miss }),
        Request::Iotlb(Iotlb { perm: 4, ..miss }),
        Request::Iotlb(Iotlb { size: u64::MAX, ..miss }),
        Request::HostNotifier(VringArea { size: 0, ..area }, Some(1)),
        Request::HostNotifier(VringArea { offset: u64::MAX, ..area }, Some(1)),
        Request::HostNotifier(area, None),
        Request::HostNotifier(VringArea { vring: VringFd::new(0, false).0, ..area }, Some(1)),
        Request::ShmemMap(ShmemMap { len: 0, ..map }, 1),
        Request::ShmemMap(ShmemMap { fd_offset: u64::MAX, ..map }, 1),
        Request::ShmemMap(ShmemMap { shm_offset: u64::MAX, ..map }, 1),
        Request::ShmemMap(ShmemMap { flags: 2, ..map }, 1),
        Request::ShmemUnmap(ShmemMap { len: u64::MAX, ..map }),
        Request::GpuMap(Default::default(), 1),
        Request::ExternalMap(Default::default()),
    ];
    for request in wrong {
        let mut channel = Channel::new(all_protocol());
        let refused = channel.back.send(request.clone());
        assert!(matches!(refused, Err(Refusal::Because(_))), "{request:?}: {refused:?}");
        let name = row_of(&request).name;
        channel.back.send_raw(request.encode(false));
        while channel.step_front() {}
        assert!(channel.effects.is_empty(), "{name}");
        assert_eq!(channel.violations.len(), 1, "{name}");
        assert!(!channel.violations[0].is_fatal());
    }
}

#[test]
fn a_ring_index_is_for_the_host_to_judge() {
    let mut channel = Channel::new(all_protocol());
    channel.send(Request::VringCall(VringState { index: u32::MAX, num: 0 }));
    channel.drive();
    let call = Request::VringCall(VringState { index: u32::MAX, num: 0 });
    assert_eq!(asked(&channel.effects[0]), call);
}

#[test]
fn what_is_forgotten_before_it_was_sent_is_never_sent() {
    let mut channel = Channel::new(all_protocol());
    let first = channel.send(Request::ConfigChange);
    let second = channel.send(Request::SharedObjectAdd(uuid(1)));
    assert_eq!(channel.back.unsent(), 2);
    assert!(channel.back.forget(first));
    assert_eq!((channel.back.unsent(), channel.back.owed()), (1, 1));
    channel.drive();
    assert_eq!(channel.effects.len(), 1);
    channel.settle(0, true);
    assert_eq!(channel.results(), [(second, Ok(None))]);
}

#[test]
fn a_late_answer_to_a_forgotten_request_is_swallowed() {
    let mut channel = Channel::new(all_protocol());
    let first = channel.send(Request::SharedObjectLookup(uuid(1)));
    let second = channel.send(Request::SharedObjectLookup(uuid(2)));
    channel.drive();
    assert!(!channel.back.forget(first), "it may have been carried out");
    assert!(!channel.back.forget(first), "once is enough");
    assert_eq!((channel.back.outstanding(), channel.back.owed()), (1, 2));
    channel.settle(0, true);
    assert_eq!(channel.results(), []);
    channel.settle(0, false);
    assert_eq!(channel.results(), [(second, Err(1))], "and not the first one's");
    assert!(!channel.back.forget(second), "answered already");
    assert_eq!(channel.back.owed(), 0);
}

/// A back-end that sent one config change, and what it says to this reply.
fn replied(reply: &Frame<Fd>) -> Result<Option<ChannelAnswer<Fd>>, Violation> {
    let mut back: ChannelBackend<Fd> = ChannelBackend::new(all_protocol(), 0);
    let _ = back.send(Request::ConfigChange).expect("legal");
    back.transmit().expect("a frame");
    back.receive(&reply.bytes, reply.fds.clone());
    let answer = back.poll();
    if let Err(fatal) = &answer {
        assert!(fatal.is_fatal());
        assert_eq!(back.poll().as_ref(), Err(fatal), "closed for good");
        assert!(back.send(Request::ConfigChange).is_err());
    }
    answer
}

#[test]
fn flags_of_an_answer_are_checked_as_far_as_front_ends_agree_on_them() {
    let with = |flags: u32| {
        let mut reply: Frame<Fd> = Frame::reply(2, &0u64.to_ne_bytes(), Vec::new());
        reply.bytes[4..8].copy_from_slice(&flags.to_ne_bytes());
        replied(&reply)
    };
    for flags in [5, 0x15, 0x8000_0005] {
        assert!(
            matches!(with(flags), Ok(Some(ChannelAnswer { result: Ok(None), .. }))),
            "{flags:#x}"
        );
    }
    for flags in [0, 1, 4, 6, 7, 9, 13, 0x1d] {
        assert_eq!(with(flags), Err(Violation::ReplyFlags { request: 2, flags }));
    }
}

#[test]
fn an_answer_of_the_wrong_shape_ends_the_channel() {
    for (size, fds) in [(0, 0), (4, 0), (7, 0), (9, 0), (16, 0), (8, 1)] {
        let reply = Frame::reply(2, &vec![0; size], vec![3; fds]);
        let shape = Violation::ReplyShape { message: "CONFIG_CHANGE_MSG", size, fds };
        assert_eq!(replied(&reply), Err(shape));
    }
    let long = Frame::reply(2, &[0; 4097], Vec::new());
    assert!(matches!(replied(&long), Err(Violation::TooLong { size: 4097, .. })));
}

#[test]
fn an_answer_that_nobody_waits_for_ends_the_channel() {
    for request in [0, 1, 3, 9, 1006, 4000] {
        let reply = Frame::reply(request, &0u64.to_ne_bytes(), Vec::new());
        assert_eq!(replied(&reply), Err(Violation::ReplyUnasked { request }));
    }
    // Not even an answer to what was not transmitted yet.
    let mut back: ChannelBackend<Fd> = ChannelBackend::new(all_protocol(), 0);
    let _ = back.send(Request::ConfigChange).expect("legal");
    let reply: Frame<Fd> = Frame::reply(2, &0u64.to_ne_bytes(), Vec::new());
    back.receive(&reply.bytes, Vec::new());
    assert_eq!(back.poll(), Err(Violation::ReplyUnasked { request: 2 }));
    assert_eq!(back.transmit(), None, "nothing moves after that");
}

#[test]
fn a_lookup_may_be_answered_without_the_descriptor_it_needs() {
    let lookup = |value: u64, fds: Vec<Fd>| {
        let mut back: ChannelBackend<Fd> = ChannelBackend::new(all_protocol(), 0);
        let _ = back.send(Request::SharedObjectLookup(uuid(1))).expect("legal");
        back.transmit().expect("a frame");
        back.receive(&Frame::<Fd>::reply(8, &value.to_ne_bytes(), Vec::new()).bytes, fds);
        back.poll().map(|answer| answer.expect("an answer").result)
    };
    assert_eq!(lookup(0, vec![4]), Ok(Ok(Some(4))));
    assert_eq!(lookup(0, vec![]), Ok(Ok(None)), "QEMU sends it elsewhere");
    assert_eq!(lookup(u64::MAX, vec![4]), Ok(Err(u64::MAX)), "and the descriptor is closed");
    assert!(matches!(lookup(0, vec![4, 5]), Err(Violation::ReplyShape { fds: 2, .. })));
}

#[test]
fn a_silent_front_end_is_owed_nothing_and_a_flood_stays_in_the_socket() {
    let mut channel = Channel::new(all_protocol());
    for _ in 0..2 * MAX_OUTSTANDING {
        channel.send(Request::SharedObjectAdd(uuid(1)));
    }
    channel.drive();
    assert_eq!(channel.effects.len(), MAX_OUTSTANDING);
    assert_eq!(channel.front.wanted(), 0);
    assert!(!channel.to_front.is_empty());
    channel.settle(0, true);
    channel.drive();
    assert_eq!(channel.effects.len(), MAX_OUTSTANDING, "one more for each answer");
    channel.effects.clear();
    channel.drive();
    channel.effects.clear();
    channel.drive();
    assert_eq!((channel.answers.len(), channel.back.owed()), (2 * MAX_OUTSTANDING, 0));
}

#[test]
fn bytes_that_are_no_request_end_the_channel_for_the_front_end() {
    let frames: [Frame<Fd>; 3] = [
        Frame::reply(2, &[], Vec::new()),
        Frame {
            bytes: [2u32, 2, 0].iter().flat_map(|word| word.to_ne_bytes()).collect(),
            fds: vec![],
        },
        Frame::request(9, false, &[0; 5000], Vec::new()),
    ];
    for frame in frames {
        let mut front: ChannelFrontend<Fd> = ChannelFrontend::new(all_protocol(), 0);
        front.receive(&frame.bytes, Vec::new());
        let fatal = front.poll().expect_err("out of step");
        assert!(fatal.is_fatal());
        let fine: Frame<Fd> = Request::ConfigChange.encode(true);
        front.receive(&fine.bytes, Vec::new());
        assert_eq!(front.poll().expect_err("for good"), fatal);
    }
}

#[test]
fn a_ticket_of_another_channel_answers_nothing() {
    let mut channel = Channel::new(all_protocol());
    let mut other: ChannelFrontend<Fd> = ChannelFrontend::new(all_protocol(), 0);
    let id = channel.send(Request::ConfigChange);
    channel.drive();
    let Some(ChannelEffect::Request { ticket, .. }) = channel.effects.pop() else { panic!("one") };
    other.answer(ticket, Ok(()));
    assert_eq!(other.transmit(), None);
    assert_eq!(channel.results(), [(id, Err(1))], "and refuses over there");
}
