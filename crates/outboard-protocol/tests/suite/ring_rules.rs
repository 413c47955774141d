//! Every message in every ring state, and every ring index: the columns of the table that concern
//! rings, against lists typed by hand.

use outboard_protocol::features::virtio;
use outboard_protocol::table::{MessageInfo, PayloadKind, ReplyKind, RingRule, front_end_table};
use outboard_protocol::{Backend, ProtocolFeatures, RingEvent, RunState};

use crate::common::host::exchange;
use crate::common::rows::{
    EVERYTHING, Setting, assert_alive, assert_turned_down, in_every_voice, named, ready, request,
    send, state,
};
use crate::common::{FEATURES, Fd, valid};

/// Brings ring 0 into a state, size and addresses set.
fn put_ring(backend: &mut Backend<Fd>, run: RunState) {
    for name in ["SET_VRING_NUM", "SET_VRING_ADDR"] {
        let row = named(name);
        assert!(send(backend, row, false).violations.is_empty());
    }
    let events: &[RingEvent] = match run {
        RunState::Stopped => &[],
        RunState::Waiting => &[RingEvent::Kicked],
        RunState::Running => &[RingEvent::Kicked, RingEvent::Started],
        RunState::Parked => &[RingEvent::Kicked, RingEvent::Started, RingEvent::Parked],
        RunState::Broken => &[RingEvent::Kicked, RingEvent::Started, RingEvent::Broken],
    };
    for event in events {
        assert!(backend.ring_event(0, *event));
    }
    assert_eq!(backend.ring(0).expect("ring 0").run, run);
}

/// The messages that a live ring (running, parked or broken) does not allow, typed by hand.
const NOT_WHILE_LIVE: &[&str] = &[
    "SET_VRING_NUM",
    "SET_VRING_BASE",
    "SET_VRING_ENDIAN",
    "GET_INFLIGHT_FD",
    "SET_INFLIGHT_FD",
    "SET_DEVICE_STATE_FD",
];

/// A47, A56, A57, A62, A64: every message in every ring state under every set of features that
/// makes a difference.
#[test]
fn every_message_in_every_ring_state_does_what_the_table_says() {
    let mut checked = 0;
    let sets = [
        FEATURES,
        FEATURES & !virtio::PROTOCOL_FEATURES,
        FEATURES & !virtio::RING_PACKED,
        FEATURES | virtio::LOG_ALL,
        FEATURES & !virtio::LOG_ALL,
    ];
    for row in front_end_table() {
        for run in RunState::ALL {
            for features in sets {
                for reply_ack in [true, false] {
                    let Some(mut backend) = ready(row, Setting { features, reply_ack }) else {
                        let shut = !row.needs.protocol.is_empty() || row.needs.acked != 0;
                        assert!(shut, "{} is not ready", row.name);
                        continue;
                    };
                    put_ring(&mut backend, run);
                    one_message_in_one_state(&mut backend, row, run, features);
                    checked += 1;
                }
            }
        }
    }
    assert!(checked > 2000, "only {checked} cases");
}

fn one_message_in_one_state(
    backend: &mut Backend<Fd>,
    row: &MessageInfo,
    run: RunState,
    features: u64,
) {
    let (mut payload, fds) = valid::parts(row);
    if row.name == "SET_FEATURES" {
        payload = (features ^ virtio::LOG_ALL).to_ne_bytes().to_vec();
    }
    let before = state(backend);
    let reply_ack = before.protocol.contains(ProtocolFeatures::REPLY_ACK);
    let seen = exchange(backend, &request(row, true, &payload, fds));
    let asked = reply_ack || row.reply == ReplyKind::AckWheneverAsked;
    let live = matches!(run, RunState::Running | RunState::Parked | RunState::Broken);
    if live && NOT_WHILE_LIVE.contains(&row.name) {
        assert_turned_down(backend, row, &before, asked, &seen);
        return;
    }
    assert!(seen.violations.is_empty() && seen.fatal.is_none(), "{} {run:?}: {seen:?}", row.name);
    let ring = *backend.ring(0).expect("ring 0");
    let old = before.rings[0];
    let expected = match row.name {
        "GET_VRING_BASE" | "GET_VRING_BASE_SKIP_DRAIN" | "RESET_DEVICE" => RunState::Stopped,
        "SET_VRING_KICK" | "VRING_KICK" if run == RunState::Stopped => RunState::Waiting,
        _ => run,
    };
    // The model host starts a waiting ring once there is memory.
    let starts = matches!(row.name, "SET_MEM_TABLE" | "ADD_MEM_REG");
    let started = starts || !backend.regions().is_empty();
    let expected = match expected {
        RunState::Waiting if started => RunState::Running,
        other => other,
    };
    assert_eq!(ring.run, expected, "{} in {run:?}", row.name);
    let enabled = match row.name {
        "SET_VRING_ENABLE" | "RESET_OWNER" | "RESET_DEVICE" => false,
        "SET_FEATURES" if features & virtio::PROTOCOL_FEATURES == 0 => true,
        _ => old.enabled,
    };
    assert_eq!(ring.enabled, enabled, "{} in {run:?}", row.name);
    assert_eq!((ring.size, ring.addresses), (old.size, old.addresses), "{}", row.name);
    assert_alive(backend);
}

/// The table's rule for SET_VRING_ADDR and for SET_FEATURES, beyond a change that is allowed.
#[test]
fn addresses_and_features_of_a_live_ring_stay() {
    for run in RunState::ALL {
        let live = matches!(run, RunState::Running | RunState::Parked | RunState::Broken);
        let row = named("SET_VRING_ADDR");
        assert_eq!(row.rings, RingRule::SameWhileLive);
        for at in [8, 16, 24] {
            let mut backend = ready(row, EVERYTHING).expect("open");
            put_ring(&mut backend, run);
            let before = state(&backend);
            let mut payload = valid::parts(row).0;
            payload[at] ^= 0x10;
            let seen = exchange(&mut backend, &request(row, true, &payload, 0));
            if live {
                assert_turned_down(&mut backend, row, &before, true, &seen);
            } else {
                assert!(seen.violations.is_empty());
            }
        }
        let row = named("SET_FEATURES");
        assert_eq!(row.rings, RingRule::LogToggleWhileLive);
        for bit in (0..64).map(|bit| 1u64 << bit).filter(|bit| FEATURES & bit != 0) {
            let mut backend = ready(row, EVERYTHING).expect("open");
            put_ring(&mut backend, run);
            let before = state(&backend);
            let payload = (FEATURES & !bit).to_ne_bytes();
            let seen = exchange(&mut backend, &request(row, true, &payload, 0));
            let toggles = bit == virtio::LOG_ALL || bit == virtio::PROTOCOL_FEATURES;
            if live && !toggles {
                assert_turned_down(&mut backend, row, &before, true, &seen);
            } else {
                assert_eq!(backend.acked_features(), FEATURES & !bit);
            }
        }
    }
}

/// A46: an index one beyond, and those that only look small when they are cut.
#[test]
fn every_message_with_a_ring_index_checks_it_at_full_width() {
    for row in front_end_table() {
        let wide: &[u64] = match row.payload {
            PayloadKind::VringState | PayloadKind::VringAddr => {
                &[4, 255, 256, 0x1_0000, 0x8000_0000, 0xffff_ffff]
            }
            PayloadKind::VringFd => &[4, 255, 0x200, 0x1_0000, 0xffff_fe00, 1 << 63],
            _ => continue,
        };
        for index in wide {
            in_every_voice(row, |backend, need_reply, asked| {
                let before = state(backend);
                let (mut payload, fds) = valid::parts(row);
                let width = if row.payload == PayloadKind::VringFd { 8 } else { 4 };
                payload[..width].copy_from_slice(&index.to_ne_bytes()[..width]);
                let seen = exchange(backend, &request(row, need_reply, &payload, fds));
                assert_turned_down(backend, row, &before, asked, &seen);
            });
        }
    }
}
