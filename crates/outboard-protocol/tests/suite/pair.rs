//! Both ends joined: what one encodes the other understands, in any split, through whole
//! life-cycles.

use outboard_protocol::payload::{Inflight, Iotlb, Log, ShmemConfig, Uuid};
use outboard_protocol::table::front_end_table;
use outboard_protocol::{
    Answer, Frame, FrontendCode, Notifier, ProtocolFeatures, Request, RunState, StateDirection,
    VringAddr,
};

use crate::common::channel_pair::IOMMU;
use crate::common::host::Verdict;
use crate::common::pair::Pair;
use crate::common::valid::{ADDR, REGION};
use crate::common::{FEATURES, Fd, all_protocol, full_offer, postcopy_protocol};

/// Negotiates as a VMM does.
fn connect(protocol: ProtocolFeatures) -> Pair {
    let mut pair = Pair::new(full_offer());
    pair.succeed(Request::SetOwner);
    pair.succeed(Request::GetFeatures);
    pair.succeed(Request::GetProtocolFeatures);
    pair.succeed(Request::SetProtocolFeatures(protocol));
    // Some features are shown now only.
    pair.succeed(Request::GetFeatures);
    let features = pair.front.negotiated().offered;
    let hidden = if protocol.contains(ProtocolFeatures::BACKEND_REQ) { 0 } else { IOMMU };
    assert_eq!(features, FEATURES & !hidden);
    pair.succeed(Request::SetFeatures(features));
    pair
}

fn activate(pair: &mut Pair, rings: u32) {
    pair.succeed(Request::SetFeatures(pair.front.negotiated().offered));
    pair.succeed(Request::SetMemTable(vec![(REGION, 10)]));
    for index in 0..rings {
        pair.succeed(Request::SetVringNum { index, size: 256 });
        pair.succeed(Request::SetVringAddr(VringAddr { index, ..ADDR }));
        let base = pair.back.rings()[usize::try_from(index).expect("small")].base;
        pair.succeed(Request::SetVringBase { index, base });
        pair.succeed(Request::SetVringCall { index, call: Notifier::Fd(20 + index) });
        pair.succeed(Request::SetVringKick { index, kick: Notifier::Fd(30 + index) });
        pair.succeed(Request::SetVringEnable { index, enabled: true });
        let ring = pair.back.rings()[usize::try_from(index).expect("small")];
        assert!(ring.run == RunState::Running && ring.enabled, "{ring:?}");
    }
}

fn stop(pair: &mut Pair, rings: u32, served: u32) {
    for index in 0..rings {
        pair.succeed(Request::SetVringEnable { index, enabled: false });
        let before = pair.back.rings()[usize::try_from(index).expect("small")].base;
        pair.verdicts.push_back(Verdict::Base(before + served));
        let answer = pair.succeed(Request::GetVringBase { index });
        assert_eq!(answer, Some(Answer::VringBase { index, base: before + served }));
    }
    assert!(pair.back.rings().iter().all(|ring| ring.run == RunState::Stopped));
}

/// Contract §4, steps 1 to 4, with and without a back-end channel, rings stopped by reset and by
/// sleep, each time with some requests served.
#[test]
fn the_life_cycle_of_a_device_runs_through() {
    for channel in [false, true] {
        let mut protocol = all_protocol() - ProtocolFeatures::INBAND_NOTIFICATIONS;
        protocol.set(ProtocolFeatures::BACKEND_REQ, channel);
        let mut pair = connect(protocol);
        if channel {
            pair.succeed(Request::SetBackendReqFd(50));
        }
        let config = pair.succeed(Request::GetConfig { offset: 8, size: 4 });
        let bytes = Some(vec![8, 9, 10, 11]);
        assert_eq!(config, Some(Answer::Config { offset: 8, bytes }));
        activate(&mut pair, 2);
        stop(&mut pair, 2, 5);
        activate(&mut pair, 2);
        assert_eq!(pair.back.rings()[1].base, 5, "the base survives");
        stop(&mut pair, 2, 7);
        pair.succeed(Request::SetDeviceStateFd(StateDirection::Save, 60));
        pair.succeed(Request::CheckDeviceState);
        activate(&mut pair, 2);
        assert_eq!(pair.back.rings()[0].base, 12);
        let others = &pair.back.rings()[2..];
        assert!(others.iter().all(|ring| *ring == Default::default()), "untouched: {others:?}");
        assert!(pair.violations.is_empty());
        assert!(pair.back.at_message_boundary() && pair.front.at_message_boundary());
    }
}

/// Requests of every kind, in an order in which all of them are legal.
fn one_of_each() -> Vec<Request<Fd>> {
    let inflight =
        Inflight { mmap_size: 1 << 20, num_queues: 4, queue_size: 256, ..Inflight::default() };
    vec![
        Request::SetBackendReqFd(1),
        Request::GpuSetSocket(2),
        Request::GetQueueNum,
        Request::GetMaxMemSlots,
        Request::NetSetMtu(9000),
        Request::SendRarp([2, 0, 0, 1, 2, 3]),
        Request::SetStatus(0xf),
        Request::GetStatus,
        Request::SetLogBase(Log { mmap_size: 4096, mmap_offset: 0 }, 3),
        Request::SetLogFd(4),
        Request::AddMemReg(REGION, 5),
        Request::RemMemReg(REGION),
        Request::SetMemTable(vec![(REGION, 6)]),
        Request::Iotlb(Iotlb { size: 4096, perm: 1, kind: 2, ..Iotlb::default() }),
        Request::GetInflightFd { num_queues: 4, queue_size: 256 },
        Request::SetInflightFd(inflight, 7),
        Request::SetVringNum { index: 3, size: 256 },
        Request::SetVringAddr(VringAddr { index: 3, ..ADDR }),
        Request::SetVringBase { index: 3, base: 0x8000_8000 },
        Request::SetVringEndian { index: 3, big_endian: true },
        Request::SetVringCall { index: 3, call: Notifier::Fd(8) },
        Request::SetVringErr { index: 3, err: Notifier::Poll },
        Request::SetVringKick { index: 3, kick: Notifier::Fd(9) },
        Request::SetVringEnable { index: 3, enabled: true },
        Request::VringKick { index: 3 },
        Request::GetVringBase { index: 3 },
        Request::GetVringBaseSkipDrain { index: 3 },
        Request::GetConfig { offset: 0, size: 60 },
        Request::SetConfig { offset: 32, bytes: vec![1], migration: true },
        Request::CreateCryptoSession(Box::default()),
        Request::CloseCryptoSession(7),
        Request::GetSharedObject(Uuid { bytes: [3; 16] }),
        Request::SetDeviceStateFd(StateDirection::Load, 11),
        Request::CheckDeviceState,
        Request::GetShmemConfig,
        Request::ResetOwner,
        Request::ResetDevice,
    ]
}

fn postcopy() -> Vec<Request<Fd>> {
    vec![Request::PostcopyAdvise, Request::PostcopyListen, Request::PostcopyEnd]
}

/// Everything that happened, for comparison.
fn run(chunk: usize) -> (Vec<String>, Vec<Answer<Fd>>) {
    let (mut effects, mut answers) = (Vec::new(), Vec::new());
    let sessions = [(all_protocol(), one_of_each()), (postcopy_protocol(), postcopy())];
    for (protocol, requests) in sessions {
        let mut pair = connect(protocol);
        pair.chunk = chunk;
        for request in requests {
            let refused_without_fd =
                matches!(request, Request::GetInflightFd { .. } | Request::GetSharedObject(_));
            if refused_without_fd {
                pair.verdicts.push_back(Verdict::WithFd(77));
            }
            pair.succeed(request);
        }
        assert!(pair.violations.is_empty(), "{:?}", pair.violations);
        effects.append(&mut pair.effects);
        answers.append(&mut pair.answers);
    }
    (effects, answers)
}

#[test]
fn every_request_passes_from_one_end_to_the_other_in_any_split() {
    let mut codes: Vec<_> =
        one_of_each().iter().chain(&postcopy()).map(|request| request.code().id()).collect();
    // The rest is what `connect` says.
    codes.extend([1, 2, 3, 15, 16]);
    codes.sort_unstable();
    let all: Vec<_> = front_end_table().iter().map(|row| row.id).collect();
    assert_eq!(codes, all, "every message is sent");
    let whole = run(usize::MAX);
    for chunk in [1, 2, 3, 5, 7, 12, 13, 64] {
        assert_eq!(run(chunk), whole, "in pieces of {chunk}");
    }
}

#[test]
fn values_arrive_as_they_were_sent() {
    let (effects, answers) = run(usize::MAX);
    for effect in [
        "NetSetMtu { mtu: 0x2328 }",
        "SendRarp { mac: [0x2, 0x0, 0x0, 0x1, 0x2, 0x3] }",
        "SetVringErr { index: 0x3, err: Poll }",
        "SetVringKick { index: 0x3, kick: Fd(0x9) }",
        "WriteConfig { offset: 0x20, bytes: [0x1], migration: true }",
        "SetDeviceStateFd { direction: Load, fd: 0xb }",
        "GetVringBase { index: 0x3, skip_drain: true }",
    ] {
        assert!(effects.iter().any(|seen| seen == effect), "{effect} in {effects:#?}");
    }
    let mut sizes = ShmemConfig { count: 1, ..ShmemConfig::default() };
    sizes.sizes[3] = 0x1000;
    let inflight = Inflight {
        mmap_size: 4 * Inflight::area_size(256, false),
        num_queues: 4,
        queue_size: 256,
        ..Inflight::default()
    };
    for answer in [
        Answer::QueueNum(4),
        Answer::MaxMemSlots(8),
        Answer::Status(0xf),
        Answer::LogBase,
        Answer::CryptoSession(7),
        Answer::SharedObject(Some(77)),
        Answer::Inflight(inflight, Some(77)),
        Answer::VringBase { index: 3, base: 0x8000_8000 },
        Answer::ShmemConfig(Box::new(sizes)),
        Answer::UserFault(Some(99)),
        Answer::Ack { request: FrontendCode::PostcopyEnd, value: 0 },
    ] {
        assert!(answers.contains(&answer), "{answer:?}");
    }
}

#[test]
fn a_refusal_reaches_the_front_end_in_the_form_of_its_message() {
    let requests = one_of_each();
    let mut refused = 0;
    for request in requests {
        // A ring's stop has no form for no that a front-end should meet.
        let has_no_form = matches!(
            request,
            Request::GetVringBase { .. }
                | Request::GetVringBaseSkipDrain { .. }
                | Request::GetStatus
                | Request::GetShmemConfig
                | Request::RemMemReg(_)
                | Request::SetLogBase(..)
        );
        if has_no_form {
            continue;
        }
        let mut pair = connect(all_protocol());
        pair.verdicts.push_back(Verdict::Refuse);
        let before = pair.effects.len();
        let answer = pair.ask(request.clone()).expect("negotiated").expect("answered");
        if pair.effects.len() > before {
            assert!(!answer.is_success(), "{request:?}: {answer:?}");
            refused += 1;
        }
        assert!(pair.ask(Request::GetFeatures).is_ok(), "the connection lives");
    }
    assert!(refused > 25, "{refused}");
}

/// A13, A86: fifty requests before the first answer is looked at; answers in order.
#[test]
fn many_requests_in_flight_are_answered_in_order() {
    let mut pair = connect(all_protocol());
    let before = pair.answers.len();
    for index in 0..50 {
        let request = match index % 3 {
            0 => Request::GetFeatures,
            1 => Request::SetVringNum { index: 0, size: 1 << (index % 8) },
            _ => Request::GetVringBase { index: 0 },
        };
        assert!(pair.front.send(request).is_ok());
    }
    assert_eq!(pair.front.outstanding(), 50);
    pair.drive().expect("neither end breaks a rule");
    let answers = &pair.answers[before..];
    assert_eq!(answers.len(), 50);
    for (index, answer) in answers.iter().enumerate() {
        let in_order = match index % 3 {
            0 => matches!(answer, Answer::Features(_)),
            1 => matches!(answer, Answer::Ack { request: FrontendCode::SetVringNum, value: 0 }),
            _ => matches!(answer, Answer::VringBase { index: 0, base: 0 }),
        };
        assert!(in_order, "{index}: {answer:?}");
    }
}

#[test]
fn raw_frames_pass_unchanged() {
    let mut pair = connect(all_protocol());
    pair.front.send_raw(Frame::request(200, false, &[1, 2, 3], vec![4]));
    pair.drive().expect("in step");
    assert_eq!(pair.violations.len(), 1);
}
