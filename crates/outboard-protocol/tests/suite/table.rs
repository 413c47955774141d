//! Tests generated from the message table: every message against wrong lengths, wrong descriptor
//! counts, missing features, a host that declines, and any split.

use outboard_protocol::features::virtio;
use outboard_protocol::payload::{VringState, read_u64};
use outboard_protocol::table::{
    FdRule, Gate, MessageInfo, PayloadKind, Sizes, back_end_table, front_end_table,
};
use outboard_protocol::{Frame, Offer, ProtocolFeatures, Violation, table};
use zerocopy::FromBytes;

use crate::common::host::{Seen, Verdict, drain, exchange};
use crate::common::rows::{
    EVERYTHING, assert_alive, assert_turned_down, in_every_voice, named, ready, replies, request,
    send, state,
};
use crate::common::{FEATURES, all_protocol, full_offer, negotiated, postcopy_protocol, valid};

/// The numbers of the specification, typed by hand: id, name, payload lengths, descriptors, reply.
const FACTS: &str = "
1 GET_FEATURES 0 0 own|2 SET_FEATURES 8 0 ack|3 SET_OWNER 0 0 ack|4 RESET_OWNER 0 0 ack
5 SET_MEM_TABLE 8..1032 n ack|6 SET_LOG_BASE 8,16 1 own|7 SET_LOG_FD 0 1 ack
8 SET_VRING_NUM 8 0 ack|9 SET_VRING_ADDR 40 0 ack|10 SET_VRING_BASE 8 0 ack
11 GET_VRING_BASE 8 0 own|12 SET_VRING_KICK 8 0-1 ack|13 SET_VRING_CALL 8 0-1 ack
14 SET_VRING_ERR 8 0-1 ack|15 GET_PROTOCOL_FEATURES 0 0 own|16 SET_PROTOCOL_FEATURES 8 0 ack
17 GET_QUEUE_NUM 0 0 own|18 SET_VRING_ENABLE 8 0 ack|19 SEND_RARP 8 0 ack|20 NET_SET_MTU 8 0 ack
21 SET_BACKEND_REQ_FD 0 1 ack|22 IOTLB_MSG 32 0 own|23 SET_VRING_ENDIAN 8 0 ack
24 GET_CONFIG 12..268 0 own|25 SET_CONFIG 12..268 0 ack|26 CREATE_CRYPTO_SESSION 1072 0 own
27 CLOSE_CRYPTO_SESSION 8 0 ack|28 POSTCOPY_ADVISE 0 0 own|29 POSTCOPY_LISTEN 0 0 ack
30 POSTCOPY_END 0 0 own|31 GET_INFLIGHT_FD 20,24 0 own|32 SET_INFLIGHT_FD 20,24 1 ack
33 GPU_SET_SOCKET 0 1 ack|34 RESET_DEVICE 0 0 ack|35 VRING_KICK 8 0 ack
36 GET_MAX_MEM_SLOTS 0 0 own|37 ADD_MEM_REG 40 1 ack|38 REM_MEM_REG 40 0-1 ack
39 SET_STATUS 8 0 ack|40 GET_STATUS 0 0 own|41 GET_SHARED_OBJECT 0,16 0 own
42 SET_DEVICE_STATE_FD 8 1 own|43 CHECK_DEVICE_STATE 0 0 own|44 GET_SHMEM_CONFIG 0 0 own
45 GET_VRING_BASE_SKIP_DRAIN 8 0 own
1 IOTLB_MSG 32 0 ack|2 CONFIG_CHANGE_MSG 0 0 ack|3 VRING_HOST_NOTIFIER_MSG 24 0-1 ack
4 VRING_CALL 8 0 ack|5 VRING_ERR 8 0 ack|6 SHARED_OBJECT_ADD 16 0 ack
7 SHARED_OBJECT_REMOVE 16 0 ack|8 SHARED_OBJECT_LOOKUP 16 0 own|9 SHMEM_MAP 40 1 ack
10 SHMEM_UNMAP 40 0 ack|1006 GPU_MAP 64 1 own|1007 EXTERNAL_MAP 32 0 own";

#[test]
fn the_table_holds_the_numbers_of_the_specification() {
    let line = |row: &MessageInfo| {
        let sizes = match row.payload.sizes() {
            Sizes::OneOf(sizes) => {
                sizes.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
            }
            Sizes::Steps(low, high, _) => format!("{low}..{high}"),
        };
        let fds = match row.fds {
            FdRule::None => "0",
            FdRule::One => "1",
            FdRule::OneIgnored | FdRule::VringFd => "0-1",
            FdRule::PerRegion => "n",
        };
        let reply = if row.reply.is_own() { "own" } else { "ack" };
        format!("{} {} {sizes} {fds} {reply}", row.id, row.name)
    };
    let rows: Vec<_> = table().iter().map(line).collect();
    let facts: Vec<_> = FACTS.trim().split(['\n', '|']).collect();
    assert_eq!(rows, facts);
    assert_eq!(front_end_table().len(), 45);
    assert_eq!(back_end_table().len(), 12);
}

/// The messages that only some sessions may send, and what they need (protocol facts b.1).
#[test]
fn the_gates_are_those_of_the_specification() {
    use ProtocolFeatures as P;
    let bits = |row: &MessageInfo| row.needs.protocol.bits();
    let gates: Vec<_> = front_end_table()
        .iter()
        .filter(|row| bits(row) != 0)
        .map(|row| (row.id, bits(row)))
        .collect();
    let one = |id: u32, feature: P| (id, feature.bits());
    let facts = [
        one(6, P::LOG_SHMFD),
        one(17, P::MQ),
        one(19, P::RARP),
        one(20, P::MTU),
        one(21, P::BACKEND_REQ),
        one(23, P::CROSS_ENDIAN),
        one(24, P::CONFIG),
        one(25, P::CONFIG),
        one(26, P::CRYPTO_SESSION),
        one(27, P::CRYPTO_SESSION),
        one(28, P::PAGEFAULT),
        one(29, P::PAGEFAULT),
        one(30, P::PAGEFAULT),
        one(31, P::INFLIGHT_SHMFD),
        one(32, P::INFLIGHT_SHMFD),
        one(34, P::RESET_DEVICE),
        one(35, P::INBAND_NOTIFICATIONS),
        one(36, P::CONFIGURE_MEM_SLOTS),
        one(37, P::CONFIGURE_MEM_SLOTS),
        one(38, P::CONFIGURE_MEM_SLOTS),
        one(39, P::STATUS),
        one(40, P::STATUS),
        one(41, P::SHARED_OBJECT),
        one(42, P::DEVICE_STATE),
        one(43, P::DEVICE_STATE),
        one(44, P::SHMEM),
        one(45, P::SKIP_DRAIN | P::GET_VRING_BASE_INFLIGHT | P::INFLIGHT_SHMFD),
    ];
    assert_eq!(gates, facts);
    let others: Vec<_> = front_end_table()
        .iter()
        .filter(|row| bits(row) == 0 && row.needs != Gate::OPEN)
        .map(|row| row.name)
        .collect();
    let facts = [
        "SET_LOG_FD",
        "GET_PROTOCOL_FEATURES",
        "SET_PROTOCOL_FEATURES",
        "SET_VRING_ENABLE",
        "IOTLB_MSG",
        "GPU_SET_SOCKET",
    ];
    assert_eq!(others, facts);
}

/// The valid requests of the harness are valid: without this, every refusal below would be vacuous.
#[test]
fn every_message_succeeds_when_it_is_legal() {
    for row in front_end_table() {
        in_every_voice(row, |backend, need_reply, asked| {
            let seen = send(backend, row, need_reply);
            assert!(seen.violations.is_empty() && seen.fatal.is_none(), "{}: {seen:?}", row.name);
            // This one is acknowledged under the set that it brings, REPLY_ACK included.
            let asked = asked || (row.name == "SET_PROTOCOL_FEATURES" && need_reply);
            let replies = replies(&seen, row);
            assert_eq!(replies.len(), usize::from(row.reply.is_own() || asked), "{}", row.name);
            if asked && !row.reply.is_own() {
                assert_eq!(replies, [vec![0; 8]], "{}: acknowledged with 0", row.name);
            }
            assert_alive(backend);
        });
    }
}

/// A3, A4, A5.
// R1: a message is parsed whole, at its exact length.
#[test]
fn every_message_with_a_byte_more_or_less_is_turned_down() {
    let mut checked = 0;
    for row in front_end_table() {
        let sizes = row.payload.sizes();
        let (payload, fds) = valid::parts(row);
        let near =
            [sizes.smallest(), sizes.largest(), u32::try_from(payload.len()).expect("small")];
        let mut wrong: Vec<u32> =
            near.iter().flat_map(|size| [size.saturating_sub(1), size + 1]).collect();
        wrong.push(0);
        wrong.sort_unstable();
        wrong.dedup();
        // A configuration message of a legal length lies about its own length all the same.
        let honest = row.payload != PayloadKind::Config;
        wrong.retain(|size| !(honest && sizes.allows(*size)));
        for size in wrong {
            let mut body = payload.clone();
            body.resize(usize::try_from(size).expect("small"), 0);
            checked += in_every_voice(row, |backend, need_reply, asked| {
                let before = state(backend);
                let seen = exchange(backend, &request(row, need_reply, &body, fds));
                assert_turned_down(backend, row, &before, asked, &seen);
            });
        }
    }
    assert!(checked > 350, "only {checked} cases");
}

/// A17, A18, A20, A24.
#[test]
fn every_message_with_a_descriptor_more_or_less_is_turned_down() {
    let mut checked = 0;
    for row in front_end_table() {
        let (payload, fds) = valid::parts(row);
        let mut wrong = vec![fds + 1, 8, 32, 33, 253];
        if fds > 0 {
            wrong.push(fds - 1);
        }
        if row.fds == FdRule::OneIgnored {
            wrong[0] = 2;
        }
        for count in wrong {
            checked += in_every_voice(row, |backend, need_reply, asked| {
                let before = state(backend);
                let seen = exchange(backend, &request(row, need_reply, &payload, count));
                assert_turned_down(backend, row, &before, asked, &seen);
            });
        }
    }
    assert!(checked > 900, "only {checked} cases");
}

/// A43.
#[test]
fn a_stray_descriptor_on_rem_mem_reg_does_no_harm() {
    let row = named("REM_MEM_REG");
    let mut backend = ready(row, EVERYTHING).expect("open");
    let seen = exchange(&mut backend, &request(row, true, &valid::parts(row).0, 1));
    assert_eq!(replies(&seen, row), [vec![0; 8]]);
    assert!(backend.regions().is_empty());
}

/// A67, A64: each bit of each gate is taken away by itself.
#[test]
fn every_message_without_one_of_its_features_is_turned_down() {
    let mut checked = 0;
    for row in front_end_table() {
        for (offer, features, protocol) in gates_short_of_one(row) {
            for need_reply in [true, false] {
                let mut backend = negotiated(offer.clone(), features, protocol);
                let before = state(&backend);
                let seen = send(&mut backend, row, need_reply);
                assert_eq!(seen.violations, [Violation::NotNegotiated { message: row.name }]);
                assert_eq!(seen.fatal, None, "{}: the connection lives", row.name);
                assert!(seen.effects.is_empty());
                assert_eq!(state(&backend), before);
                if need_reply && protocol.contains(ProtocolFeatures::REPLY_ACK) {
                    assert_eq!(replies(&seen, row), [1u64.to_ne_bytes()], "{}", row.name);
                }
                assert_alive(&mut backend);
                checked += 1;
            }
        }
    }
    assert!(checked >= 2 * 35, "only {checked} cases");
}

/// Sessions in which everything a row needs is there but for one thing.
fn gates_short_of_one(row: &MessageInfo) -> Vec<(Offer, u64, ProtocolFeatures)> {
    let needs = row.needs;
    let base = if needs.without.is_empty() { all_protocol() } else { postcopy_protocol() };
    let mut cases = Vec::new();
    for feature in needs.protocol.iter() {
        let dependents = match feature {
            ProtocolFeatures::INFLIGHT_SHMFD => {
                ProtocolFeatures::GET_VRING_BASE_INFLIGHT | ProtocolFeatures::SKIP_DRAIN
            }
            ProtocolFeatures::GET_VRING_BASE_INFLIGHT => ProtocolFeatures::SKIP_DRAIN,
            ProtocolFeatures::BACKEND_REQ => ProtocolFeatures::INBAND_NOTIFICATIONS,
            _ => ProtocolFeatures::empty(),
        };
        cases.push((full_offer(), FEATURES, base - feature - dependents));
    }
    if !needs.without.is_empty() {
        cases.push((full_offer(), FEATURES, all_protocol()));
    }
    for bit in (0..64).map(|bit| 1u64 << bit) {
        if needs.acked & bit != 0 {
            cases.push((full_offer(), FEATURES & !bit, base));
        }
        if needs.offered & bit != 0 {
            let mut offer = full_offer();
            offer.features &= !bit;
            let mut protocol = base;
            if bit == virtio::PROTOCOL_FEATURES {
                offer.protocol_features = ProtocolFeatures::empty();
                protocol = ProtocolFeatures::empty();
            }
            cases.push((offer, FEATURES & !bit, protocol));
        }
    }
    if needs.gpu_socket {
        cases.push((Offer { gpu_socket: false, ..full_offer() }, FEATURES, base));
    }
    cases
}

/// A9.
#[test]
fn every_unknown_message_is_refused_and_the_connection_lives() {
    let known = |id: u32| front_end_table().iter().any(|row| row.id == id);
    let mut backend = negotiated(full_offer(), FEATURES, all_protocol());
    let before = state(&backend);
    let ids = (0..300).chain([1002, 1006, 1007, 0x100_0001, 0x8000_0000, u32::MAX]);
    for id in ids.filter(|id| !known(*id)) {
        for need_reply in [true, false] {
            let frame = Frame::request(id, need_reply, &[7; 24], vec![1, 2]);
            let seen = exchange(&mut backend, &frame);
            assert_eq!(seen.violations, [Violation::UnknownRequest { request: id }]);
            assert_eq!(seen.replies.len(), usize::from(need_reply));
            assert_eq!(seen.fatal, None);
        }
    }
    assert_eq!(state(&backend), before);
    assert_alive(&mut backend);
}

/// What every effect does when the host refuses it: the row's error form, and nothing changed.
#[test]
fn every_message_that_the_host_refuses_or_forgets_changes_nothing() {
    for row in front_end_table() {
        for verdict in [Verdict::Refuse, Verdict::Drop] {
            in_every_voice(row, |backend, need_reply, asked| {
                let before = state(backend);
                let (payload, fds) = valid::parts(row);
                let frame = request(row, need_reply, &payload, fds);
                backend.receive(&frame.bytes, frame.fds);
                let mut seen = drain(backend, &verdict);
                if std::mem::take(&mut seen.effects).is_empty() {
                    return;
                }
                // A refusal is the host's business: it is no violation of the peer.
                assert!(seen.violations.is_empty());
                seen.violations.push(Violation::UnknownRequest { request: 0 });
                assert_turned_down(backend, row, &before, asked, &seen);
            });
        }
    }
}

/// A12: every message split at every byte, and byte by byte; A14: every prefix waits.
#[test]
fn every_message_is_the_same_in_pieces() {
    for row in front_end_table() {
        let (payload, fds) = valid::parts(row);
        let frame = request(row, true, &payload, fds);
        let whole = {
            let mut backend = ready(row, EVERYTHING).expect("open");
            (exchange(&mut backend, &frame), state(&backend))
        };
        let step = (frame.bytes.len() / 60).max(1);
        for at in (1..frame.bytes.len()).step_by(step) {
            let mut backend = ready(row, EVERYTHING).expect("open");
            let (first, rest) = frame.bytes.split_at(at);
            backend.receive(first, frame.fds.clone());
            let waiting = drain(&mut backend, &Verdict::Succeed);
            assert_eq!(waiting, Seen::default(), "{} moved after {at} bytes", row.name);
            assert!(!backend.at_message_boundary());
            backend.receive(rest, Vec::new());
            assert_eq!(drain(&mut backend, &Verdict::Succeed), whole.0, "{} at {at}", row.name);
            assert_eq!(state(&backend), whole.1);
        }
        let mut backend = ready(row, EVERYTHING).expect("open");
        let mut fds = frame.fds.clone();
        for byte in &frame.bytes {
            assert!(backend.poll().expect("in step").is_none());
            backend.receive(&[*byte], std::mem::take(&mut fds));
        }
        assert_eq!(drain(&mut backend, &Verdict::Succeed), whole.0, "{} byte by byte", row.name);
    }
}

/// A10, A11 are in `in_every_voice`; here the values of the replies that the machine makes itself.
#[test]
fn the_machine_answers_by_itself_with_what_was_offered() {
    let answers = [
        ("GET_FEATURES", FEATURES),
        ("GET_PROTOCOL_FEATURES", all_protocol().bits()),
        ("GET_QUEUE_NUM", 4),
        ("GET_MAX_MEM_SLOTS", 8),
    ];
    for (name, value) in answers {
        let row = named(name);
        let mut backend = ready(row, EVERYTHING).expect("open");
        let seen = send(&mut backend, row, false);
        assert_eq!(read_u64(&replies(&seen, row)[0]), Some(value), "{name}");
        assert!(seen.effects.is_empty(), "{name} needs no host");
    }
    let row = named("GET_VRING_BASE");
    let mut backend = ready(row, EVERYTHING).expect("open");
    let frame = request(row, false, &[3, 0, 0, 0, 0, 0, 0, 0], 0);
    backend.receive(&frame.bytes, vec![]);
    let seen = drain(&mut backend, &Verdict::Base(0x8001_8002));
    let state = VringState::read_from_bytes(&replies(&seen, row)[0]).expect("8 bytes");
    assert_eq!(state, VringState { index: 3, num: 0x8001_8002 });
}
