//! Packed rings through the handler: offered, and carried out in every message that knows of rings (virtio 1.3 §2.8; cases A45, A54, A62, B40).
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use std::time::Duration;

use common::{FEATURES, PATIENCE, PROTOCOL, Rig, Ring, doorbell, rang};
use outboard::{HandlerOptions, LoopKind};
use outboard_frontend::Error;
use outboard_memory::DirtyLog;
use outboard_protocol::{ProtocolFeatures, virtio};
use outboard_queue::{DriverQueue, QueueLayout};

const PACKED: u64 = FEATURES | virtio::RING_PACKED;
const KINDS: [LoopKind; 2] = [LoopKind::Auto, LoopKind::Epoll];

/// Negotiated, memory shared.
fn ready(kind: LoopKind) -> Rig {
    let mut rig = Rig::bare(kind, HandlerOptions::default());
    rig.negotiate(PACKED);
    rig.front.set_mem_table(rig.memory.regions()).unwrap();
    rig
}

/// A packed ring of `size` in shared memory, not yet known to the back-end.
fn ring(rig: &Rig, index: u16, size: u16) -> Ring {
    let area = rig.memory.allocate(4096, 4096).unwrap();
    area.fill(0).unwrap();
    let data = rig.memory.allocate(8192, 4096).unwrap();
    let (layout, _) = QueueLayout::packed_at(area.guest(), size).unwrap();
    let driver = DriverQueue::new(layout, PACKED, rig.memory.view()).unwrap();
    let (kick, call, err) = (doorbell(), doorbell(), doorbell());
    Ring { index, layout, driver, kick, call, err, area, data, patience: PATIENCE }
}

/// NUM, ADDR, BASE, CALL, ERR, KICK, ENABLE.
fn start(rig: &mut Rig, ring: &Ring, base: u32) {
    let index = ring.index;
    rig.front.set_vring_num(index, ring.layout.size).unwrap();
    rig.front.set_vring_addr(index, &ring.layout).unwrap();
    rig.front.set_vring_base(index, base).unwrap();
    rig.front.set_vring_call(index, &ring.call).unwrap();
    rig.front.set_vring_err(index, &ring.err).unwrap();
    rig.front.set_vring_kick(index, &ring.kick).unwrap();
    rig.front.set_vring_enable(index, true).unwrap();
}

fn started(rig: &mut Rig, index: u16, size: u16) -> Ring {
    let ring = ring(rig, index, size);
    start(rig, &ring, ring.driver.base());
    ring
}

#[test]
fn packed_rings_are_offered_unless_they_are_hidden() {
    let without =
        HandlerOptions { without_features: virtio::RING_PACKED, ..HandlerOptions::default() };
    for (options, offered) in [(HandlerOptions::default(), virtio::RING_PACKED), (without, 0)] {
        let mut front = Rig::bare(LoopKind::Auto, options).front;
        front.set_owner().unwrap();
        assert_eq!(front.get_features().unwrap() & virtio::RING_PACKED, offered);
    }
}

#[test]
fn b42_requests_go_round_rings_of_any_size() {
    for kind in KINDS {
        let mut rig = ready(kind);
        for (index, size) in [(0, 7), (1, 2)] {
            let mut ring = started(&mut rig, index, size);
            for round in 0..5 * size {
                ring.round(format!("round {round} of {size}").as_bytes());
            }
        }
    }
}

#[test]
fn a54_a62_a_base_has_both_halves_and_the_ring_goes_on_where_it_stopped() {
    let mut rig = ready(LoopKind::Auto);
    let mut ring = ring(&rig, 0, 5);
    assert_eq!(rig.front.get_vring_base(0).unwrap(), 0, "never set");
    // A front-end that knows split rings only begins with 0.
    start(&mut rig, &ring, 0);
    for round in 0..24 {
        for _ in 0..=round % 3 {
            ring.round(format!("round {round}").as_bytes());
        }
        let base = rig.front.get_vring_base(0).unwrap();
        assert_eq!(base, ring.driver.base(), "round {round}");
        assert_eq!(base >> 16, base & 0xffff, "everything was finished");
        assert_eq!(rig.front.get_vring_base(0).unwrap(), base, "asked twice");
        start(&mut rig, &ring, base);
    }
    ring.round(b"the last one");
    // A base that is none of the ring: it does not start, and nothing is told of it but by the ring.
    let base = rig.front.get_vring_base(0).unwrap();
    rig.front.set_vring_base(0, 0x8005_8005).unwrap();
    assert!(matches!(rig.front.set_vring_kick(0, &ring.kick), Err(Error::Refused { .. })));
    start(&mut rig, &ring, base);
    ring.round(b"and on");
}

#[test]
fn a45_a_packed_ring_of_a_size_that_no_split_ring_has() {
    let mut rig = ready(LoopKind::Auto);
    assert!(rig.front.set_vring_num(0, 0).is_err());
    for size in [1, 3, 6, 15] {
        let mut ring = ring(&rig, 0, size);
        // The echo needs two descriptors.
        start(&mut rig, &ring, ring.driver.base());
        if size > 1 {
            ring.round(b"odd");
        }
        rig.front.get_vring_base(0).unwrap();
    }
}

#[test]
fn what_changes_while_a_packed_ring_runs_is_lived_by() {
    for kind in KINDS {
        let mut rig = ready(kind);
        let mut ring = started(&mut rig, 0, 5);
        for round in 0..12 {
            ring.round(b"before");
            match round % 4 {
                0 => rig.front.set_mem_table(rig.memory.regions()).unwrap(),
                1 => {
                    ring.kick = doorbell();
                    rig.front.set_vring_kick(0, &ring.kick).unwrap();
                }
                2 => {
                    ring.call = doorbell();
                    rig.front.set_vring_call(0, &ring.call).unwrap();
                }
                _ => {
                    rig.front.set_vring_enable(0, false).unwrap();
                    ring.offer(b"while it is disabled");
                    ring.kick();
                    rig.front.set_vring_enable(0, true).unwrap();
                    ring.expect(b"while it is disabled");
                }
            }
            ring.round(b"behind");
        }
    }
}

#[test]
fn b40_a_packed_ring_that_its_driver_breaks_is_told_once_and_serves_again_when_set_up_anew() {
    let mut rig = ready(LoopKind::Auto);
    let mut good = started(&mut rig, 1, 4);
    let mut bad = started(&mut rig, 0, 5);
    bad.round(b"still whole");
    let data = bad.data.guest();
    bad.driver.add(&[(data, 16)], &[(data + 4096, 16)], 7).unwrap();
    // The last descriptor of the chain has an id that is none.
    rig.memory.view().write(bad.layout.desc + 16 * 3 + 12, &77_u16.to_le_bytes()).unwrap();
    bad.driver.publish();
    bad.kick();
    assert!(rang(&bad.err, PATIENCE));
    assert!(!rang(&bad.err, Duration::from_millis(30)), "told once");
    good.round(b"the other one runs");
    rig.front.get_vring_base(0).unwrap();
    let mut anew = started(&mut rig, 0, 5);
    anew.round(b"anew");
}

#[test]
fn the_log_of_a_packed_ring_is_turned_on_and_off() {
    let mut rig = Rig::bare(LoopKind::Auto, HandlerOptions::default());
    rig.front.set_owner().unwrap();
    rig.front.get_features().unwrap();
    rig.front.get_protocol_features().unwrap();
    rig.front.set_protocol_features(PROTOCOL | ProtocolFeatures::LOG_SHMFD).unwrap();
    rig.front.set_features(PACKED).unwrap();
    rig.front.set_mem_table(rig.memory.regions()).unwrap();
    let mut ring = started(&mut rig, 0, 5);
    let (log, file) = DirtyLog::memfd(outboard_frontend::DEFAULT_GUEST_BASE + (2 << 20)).unwrap();
    rig.front.set_log_base(&file, log.size(), 0).unwrap();
    let page = |at: u64| at & !4095;
    let taken = || {
        let mut pages = Vec::new();
        log.take(|page| pages.push(page));
        pages
    };
    let answer = page(ring.data.guest() + 4096);
    let area = page(ring.layout.desc);
    for round in 0..10 {
        ring.round(b"not noted");
        assert_eq!(taken(), [], "round {round}");
        rig.front.set_features(PACKED | virtio::LOG_ALL).unwrap();
        ring.round(b"noted");
        assert_eq!(taken(), [answer], "the ring was not asked for");
        // The address is the one of the event structure, as QEMU gives it.
        rig.front.set_vring_addr_logged(0, &ring.layout, Some(ring.layout.used)).unwrap();
        ring.round(b"noted, and the ring");
        let mut both = vec![answer, area];
        both.sort_unstable();
        assert_eq!(taken(), both);
        rig.front.set_vring_addr(0, &ring.layout).unwrap();
        rig.front.set_features(PACKED).unwrap();
        taken();
    }
    assert_eq!(log.outside(), 0);
}
