//! Front-ends that answer misses wrongly, late or never, and IOTLB messages that make no sense.

use std::time::Duration;

use outboard::protocol::payload::Iotlb;
use outboard_frontend::SharedMemory;
use outboard_protocol::{Answer, Request as Message};

use crate::common::{PATIENCE, rang};
use crate::rig::{IO, MOMENT, PAGE, Rig, offer};

/// A hostile front-end that never answers costs its own ring only.
#[test]
fn a_miss_that_is_never_answered_holds_nothing_but_its_ring() {
    let mut rig = Rig::new();
    let mut other = rig.started(1);
    rig.round(&mut other, b"fine");
    let mut ring = rig.started(0);
    offer(&mut ring, b"waits");
    ring.kick();
    let _unanswered = rig.miss(PATIENCE).unwrap();
    for _ in 0..100 {
        ring.kick();
        rig.round(&mut other, b"goes on");
    }
    assert!(rig.miss(MOMENT).is_none(), "it is not asked twice while it is open");
    rig.front.iotlb_invalidate(0, u64::MAX - 1).unwrap();
    assert_eq!(rig.front.get_vring_base(0).unwrap(), 0, "it can be stopped");
    rig.leave();
}

#[test]
fn answers_that_do_not_help_are_taken_so_often_and_no_more() {
    let mut rig = Rig::new();
    let mut ring = rig.started(0);
    rig.round(&mut ring, b"fine");
    rig.front.iotlb_invalidate(ring.data.guest() + IO, PAGE).unwrap();
    offer(&mut ring, b"never");
    ring.kick();
    let mut answers = 0_u64;
    while let Some(miss) = rig.miss(Duration::from_secs(2)) {
        answers += 1;
        assert!(answers <= 3 * 4096, "it asks for ever");
        // Another page each time, never the right one.
        let user = SharedMemory::user_address(ring.data.guest());
        rig.front.iotlb_update((1 << 50) + answers * PAGE, PAGE, user, 3).unwrap();
        rig.channel.answer(miss.ticket, Ok(())).unwrap();
        if rang(&ring.err, Duration::ZERO) {
            break;
        }
    }
    assert!(answers >= 4096, "{answers}: patient enough for any request");
    rig.front.get_vring_base(0).unwrap();
    rig.leave();
}

/// A87: type, permission, size and range are checked; the session and its rings go on.
#[test]
fn a87_an_iotlb_message_that_makes_no_sense_is_refused() {
    let mut rig = Rig::new();
    let mut ring = rig.started(0);
    rig.round(&mut ring, b"before");
    let user = SharedMemory::user_address(ring.data.guest());
    let good = Iotlb { iova: 0, size: PAGE, uaddr: user, perm: 3, kind: 2, padding: [0; 6] };
    let bad = [
        Iotlb { kind: 0, ..good },
        Iotlb { kind: 1, ..good },
        Iotlb { kind: 4, ..good },
        Iotlb { kind: 5, ..good },
        Iotlb { perm: 0, ..good },
        Iotlb { perm: 4, ..good },
        Iotlb { size: 0, ..good },
        Iotlb { size: u64::MAX, ..good },
        Iotlb { iova: u64::MAX - 1, ..good },
        Iotlb { uaddr: u64::MAX - 1, ..good },
        Iotlb { uaddr: 0, ..good },
        Iotlb { size: 1 << 40, ..good },
        Iotlb { kind: 3, size: 0, ..good },
        Iotlb { kind: 3, iova: u64::MAX, size: 2, ..good },
    ];
    for entry in bad {
        let answer = rig.front.call(Message::Iotlb(entry)).unwrap();
        let refused = matches!(answer, Some(Answer::Ack { value, .. }) if value != 0);
        assert!(refused, "{entry:?}: {answer:?}");
    }
    let asked = rig.misses;
    rig.round(&mut ring, b"after");
    assert_eq!(rig.misses, asked, "nothing has changed");
    rig.leave();
}

#[test]
fn a_flood_of_entries_costs_no_memory_and_the_ring_serves_afterwards() {
    let mut rig = Rig::new();
    let mut ring = rig.started(0);
    rig.round(&mut ring, b"before");
    let before = resident();
    let user = SharedMemory::user_address(ring.data.guest());
    for entry in 0..10_000 {
        rig.front.iotlb_update((1 << 50) + entry * 64, 8, user, 3).unwrap();
        while let Some(miss) = rig.miss(Duration::ZERO) {
            rig.settle(miss);
        }
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 8 << 20, "{grown} bytes");
    rig.round(&mut ring, b"after");
    rig.leave();
}

/// Resident bytes of this process.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}
