//! A device behind an IOMMU (feature 33, IOTLB_MSG in both directions): misses, updates, invalidations
//! that wait for what is in flight, rings whose own pages come and go, permissions, and front-ends that
//! answer wrongly or never (protocol facts f, "IOMMU"; case A87).

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

#[path = "../common/mod.rs"]
mod common;
mod everything;
mod hostile;
mod rig;

use std::time::Duration;

use common::{FEATURES, PATIENCE, PROTOCOL, Ring, rang, serve};
use outboard::protocol::payload::{IOTLB_ACCESS_FAIL, Iotlb};
use outboard::protocol::{ProtocolFeatures, virtio};
use outboard::{DeviceRequestHandler, HandlerOptions, LoopKind};
use outboard_frontend::{Connection, SharedMemory};
use outboard_protocol::Request as Message;
use rig::{IO, MOMENT, PAGE, Rig, offer};

#[test]
fn a_ring_asks_for_its_parts_and_for_each_buffer_and_serves() {
    for mut rig in [Rig::new(), Rig::packed()] {
        let mut ring = rig.started(0);
        rig.round(&mut ring, b"translated");
        let asked = rig.misses;
        assert!((3..=5).contains(&asked), "ring, text, answer: {asked} misses");
        rig.round(&mut ring, b"known by now");
        assert_eq!(rig.misses, asked, "entries are kept");
        rig.leave();
    }
}

#[test]
fn an_entry_may_come_before_or_after_the_answer_to_its_miss() {
    for answer_first in [false, true] {
        let mut rig = Rig::new();
        let mut ring = rig.started(0);
        offer(&mut ring, b"in any order");
        ring.kick();
        while ring.driver.pop_used().unwrap().is_none() {
            let Some(miss) = rig.miss(Duration::from_millis(5)) else { continue };
            let page = miss.iova & !(PAGE - 1);
            let (guest, perm) = rig.pages[&page];
            let user = SharedMemory::user_address(guest);
            if answer_first {
                rig.channel.answer(miss.ticket, Ok(())).unwrap();
                assert!(rig.miss(MOMENT).is_none(), "it waits for the entry");
                rig.front.iotlb_update(page, PAGE, user, perm).unwrap();
            } else {
                rig.front.iotlb_update(page, PAGE, user, perm).unwrap();
                rig.channel.answer(miss.ticket, Ok(())).unwrap();
            }
        }
        rig.leave();
    }
}

#[test]
fn an_invalidation_waits_for_the_request_that_the_device_holds_back() {
    for mut rig in [Rig::new(), Rig::packed()] {
        let mut ring = rig.started(0);
        rig.round(&mut ring, b"all mapped");
        offer(&mut ring, b"hold this");
        ring.kick();
        let request = loop {
            if let Some(request) = rig.held.lock().unwrap().pop() {
                break request;
            }
            std::thread::yield_now();
        };
        let at = ring.data.guest() + IO + PAGE;
        let finished = std::thread::spawn(move || {
            let mut request = request;
            std::thread::sleep(MOMENT);
            request.writable().write_all(b"late").unwrap();
            let then = std::time::Instant::now();
            request.done(4);
            then
        });
        rig.front.iotlb_invalidate(at, PAGE).unwrap();
        let answered = std::time::Instant::now();
        assert!(
            finished.join().unwrap() <= answered,
            "the answer came before the request was done"
        );
        assert_eq!(
            ring.driver.pop_used().unwrap(),
            Some((7, 4)),
            "it was given back before the answer"
        );
        let asked = rig.misses;
        rig.round(&mut ring, b"asked for anew");
        assert!(rig.misses > asked);
        rig.leave();
    }
}

/// The answer has its own way: it may come while the queue waits with an invalidation, and is not forgotten then.
#[test]
fn an_answer_that_comes_while_an_invalidation_waits_does_not_stand_in_the_way_of_the_next_question()
{
    for mut rig in [Rig::new(), Rig::packed()] {
        let mut ring = rig.started(0);
        let late = rig.round_but_for_the_last_answer(&mut ring, b"all mapped");
        offer(&mut ring, b"hold this");
        ring.kick();
        let request = loop {
            if let Some(request) = rig.held.lock().unwrap().pop() {
                break request;
            }
            std::thread::yield_now();
        };
        let at = ring.data.guest() + IO + PAGE;
        std::thread::scope(|scope| {
            let (front, channel) = (&mut rig.front, &mut rig.channel);
            let invalidated = scope.spawn(move || front.iotlb_invalidate(at, PAGE).unwrap());
            std::thread::sleep(MOMENT);
            channel.answer(late.ticket, Ok(())).unwrap();
            std::thread::sleep(MOMENT);
            request.done(0);
            invalidated.join().unwrap();
        });
        assert_eq!(ring.driver.pop_used().unwrap(), Some((7, 0)));
        rig.round(&mut ring, b"asked for anew");
        rig.leave();
    }
}

#[test]
fn an_invalidation_of_what_is_not_there_waits_for_nothing() {
    for mut rig in [Rig::new(), Rig::packed()] {
        let mut ring = rig.started(0);
        rig.round(&mut ring, b"all mapped");
        offer(&mut ring, b"hold this");
        ring.kick();
        while rig.held.lock().unwrap().is_empty() {
            std::thread::yield_now();
        }
        rig.front.iotlb_invalidate(0, IO).unwrap();
        rig.front.iotlb_invalidate(IO + (1 << 40), u64::MAX - IO - (1 << 40)).unwrap();
        assert!(ring.driver.pop_used().unwrap().is_none(), "it is still held back");
        let request = rig.held.lock().unwrap().pop();
        request.unwrap().done(0);
        assert_eq!(rig.answered(&mut ring), 0);
        rig.leave();
    }
}

#[test]
fn a_ring_whose_own_pages_are_invalidated_rests_until_they_are_back() {
    let mut rig = Rig::new();
    let mut ring = rig.started(0);
    for round in 0..20 {
        rig.round(&mut ring, b"there");
        rig.front.iotlb_invalidate(ring.area.guest() + IO, PAGE).unwrap();
        offer(&mut ring, b"gone");
        ring.kick();
        let miss = rig.miss(PATIENCE).expect("the ring asks for itself");
        assert!(ring.driver.pop_used().unwrap().is_none(), "round {round}");
        assert!(!rang(&ring.err, Duration::ZERO), "resting is not broken");
        assert!(rig.settle(miss));
        assert_eq!(rig.answered(&mut ring), 4);
    }
    rig.leave();
}

/// Generations come and go while two rings serve: no request is lost, none is answered wrongly.
#[test]
fn a_storm_of_invalidations_and_entries_under_load_loses_nothing() {
    let mut rig = Rig::new();
    let mut rings = [rig.started(0), rig.started(1)];
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    for round in 0..1500_u32 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let which = usize::from(random & 1 != 0);
        for ring in &mut rings {
            offer(ring, format!("round {round}").as_bytes());
            ring.kick();
        }
        let hit = &rings[which];
        let page =
            [hit.area.guest(), hit.data.guest(), hit.data.guest() + PAGE][round as usize % 3];
        match random >> 8 & 3 {
            0 => rig.front.iotlb_invalidate(0, u64::MAX - 1).unwrap(),
            1 => rig.front.iotlb_invalidate(page + IO, PAGE).unwrap(),
            2 => {
                let user = SharedMemory::user_address(page);
                rig.front.iotlb_update(page + IO, PAGE, user, 3).unwrap();
            }
            _ => {}
        }
        for ring in &mut rings {
            let text = format!("round {round}");
            assert_eq!(rig.answered(ring) as usize, text.len());
            let mut back = vec![0; text.len()];
            ring.data.read(4096, &mut back).unwrap();
            assert_eq!(back, text.as_bytes());
        }
    }
    rig.leave();
}

#[test]
fn a_read_only_page_is_not_written_and_the_failure_is_reported() {
    // The front-end refuses to grant more; or grants, and does not mean it.
    for refuses in [true, false] {
        let mut rig = Rig::new();
        let mut ring = rig.started(0);
        let page = ring.data.guest() + PAGE;
        rig.pages.insert(page + IO, (page, 1));
        let user = SharedMemory::user_address(page);
        rig.front.iotlb_update(page + IO, PAGE, user, 1).unwrap();
        offer(&mut ring, b"may not be answered");
        ring.kick();
        let failure = loop {
            let (entry, ticket) = rig.request(PATIENCE).expect("a miss or a failure");
            if entry.kind == IOTLB_ACCESS_FAIL {
                rig.channel.answer(ticket, Ok(())).unwrap();
                break entry;
            }
            if entry.iova == page + IO && !refuses {
                assert_eq!(entry.perm, 2, "permission is asked for first");
                rig.front.iotlb_update(page + IO, PAGE, user, 1).unwrap();
                rig.channel.answer(ticket, Ok(())).unwrap();
                continue;
            }
            rig.settle(rig::Miss { iova: entry.iova, perm: entry.perm, ticket });
        };
        let Iotlb { iova, perm, .. } = failure;
        assert_eq!((iova, perm), (page + IO, 2));
        assert!(rang(&ring.err, PATIENCE), "the ring is retired");
        let mut bytes = [0; 4];
        ring.data.read(4096, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 4], "nothing was written");
        assert_eq!(rig.front.get_vring_base(0).unwrap(), 0, "nothing was taken");
        rig.leave();
    }
}

/// A permission that was granted after the entry was fetched needs no invalidation: it is asked for.
#[test]
fn a_permission_that_has_grown_since_is_asked_for() {
    let mut rig = Rig::new();
    let mut ring = rig.started(0);
    let page = ring.data.guest() + PAGE;
    rig.front.iotlb_update(page + IO, PAGE, SharedMemory::user_address(page), 1).unwrap();
    rig.round(&mut ring, b"by now it may be written");
    rig.leave();
}

#[test]
fn an_address_that_is_not_mapped_is_the_end_of_its_ring_and_of_no_other() {
    let mut rig = Rig::new();
    let mut ring = rig.started(0);
    let mut other = rig.started(1);
    rig.round(&mut ring, b"fine");
    rig.round(&mut other, b"fine");
    ring.driver.add(&[(0xdead_0000, 4)], &[(IO, 4)], 7).unwrap();
    ring.driver.publish();
    ring.kick();
    let miss = rig.miss(PATIENCE).unwrap();
    assert_eq!((miss.iova, miss.perm), (0xdead_0000, 1));
    assert!(!rig.settle(miss), "refused");
    assert!(rang(&ring.err, PATIENCE));
    let (entry, ticket) = rig.request(PATIENCE).unwrap();
    assert_eq!((entry.kind, entry.iova), (IOTLB_ACCESS_FAIL, 0xdead_0000));
    rig.channel.answer(ticket, Ok(())).unwrap();
    rig.round(&mut other, b"goes on");
    rig.leave();
}

#[test]
fn two_queues_that_miss_the_same_page_ask_once() {
    let mut rig = Rig::new();
    let mut first = rig.started(0);
    let mut second = rig.started(1);
    rig.round(&mut first, b"rings are mapped");
    rig.round(&mut second, b"rings are mapped");
    // Both read the same page.
    let shared = rig.memory.allocate(4096, 4096).unwrap();
    rig.allow(shared.guest(), PAGE, 1);
    for ring in [&mut first, &mut second] {
        let answer = ring.data.guest() + IO + PAGE;
        ring.driver.add(&[(shared.guest() + IO, 8)], &[(answer, 8)], 7).unwrap();
        ring.driver.publish();
        ring.kick();
    }
    let miss = rig.miss(PATIENCE).unwrap();
    assert!(rig.miss(MOMENT).is_none(), "the second waits for the first one's answer");
    assert!(rig.settle(miss));
    assert_eq!((rig.answered(&mut first), rig.answered(&mut second)), (8, 8));
    rig.leave();
}

#[test]
fn an_indirect_table_is_translated_too() {
    let mut rig = Rig::new();
    let mut ring = rig.started(0);
    rig.round(&mut ring, b"direct");
    // The driver's side knows a table by one address: its I/O address is its guest address.
    let tables = rig.memory.allocate(16 * 4 * 16, 4096).unwrap();
    rig.pages.insert(tables.guest(), (tables.guest(), 1));
    ring.driver.set_indirect_area(tables.guest(), 4);
    ring.data.write(0, b"by table").unwrap();
    let at = ring.data.guest() + IO;
    let halves = [(at, 4), (at + 4, 4)];
    ring.driver.add_indirect(&halves, &[(at + PAGE, 8)], 7).unwrap();
    ring.driver.publish();
    ring.kick();
    let miss = rig.miss(PATIENCE).unwrap();
    assert_eq!((miss.iova & !(PAGE - 1), miss.perm), (tables.guest(), 1));
    assert!(rig.settle(miss));
    assert_eq!(rig.answered(&mut ring), 8);
    rig.leave();
}

#[test]
fn neighbours_behind_the_iommu_need_not_be_neighbours_in_memory() {
    let mut rig = Rig::new();
    let mut ring = rig.started(0);
    let (low, high) = (rig.memory.allocate(4096, 4096).unwrap(), ring.data.guest());
    // One buffer over two I/O pages: its first half lies above its second.
    rig.pages.insert(0x7_0000_0000, (high, 1));
    rig.pages.insert(0x7_0000_1000, (low.guest(), 1));
    ring.data.write(4092, b"abcd").unwrap();
    low.write(0, b"efgh").unwrap();
    let answer = high + PAGE + IO;
    ring.driver.add(&[(0x7_0000_0ffc, 8)], &[(answer, 8)], 7).unwrap();
    ring.driver.publish();
    ring.kick();
    assert_eq!(rig.answered(&mut ring), 8);
    let mut back = [0; 8];
    ring.data.read(4096, &mut back).unwrap();
    assert_eq!(&back, b"abcdefgh");
    rig.leave();
}

#[test]
fn a_new_memory_table_flushes_every_entry() {
    let mut rig = Rig::new();
    let mut ring = rig.started(0);
    rig.round(&mut ring, b"before");
    let asked = rig.misses;
    rig.front.set_mem_table(rig.memory.regions()).unwrap();
    rig.round(&mut ring, b"after");
    assert!(rig.misses >= asked + 3, "all is asked for anew");
    rig.leave();
}

#[test]
fn the_stop_of_the_last_ring_flushes_every_entry_and_its_base_is_true() {
    let mut rig = Rig::new();
    let mut ring = rig.started(0);
    rig.round(&mut ring, b"one");
    rig.round(&mut ring, b"two");
    // A third waits for a page that is not there: it stays in the ring.
    rig.front.iotlb_invalidate(ring.data.guest() + IO, PAGE).unwrap();
    offer(&mut ring, b"three");
    ring.kick();
    let miss = rig.miss(PATIENCE).unwrap();
    assert_eq!(rig.front.get_vring_base(0).unwrap(), 2);
    rig.channel.answer(miss.ticket, Ok(())).unwrap();
    rig.start(&ring, 2);
    let miss = rig.miss(PATIENCE).unwrap();
    assert_eq!(miss.iova & !(PAGE - 1), ring.area.guest() + IO, "the ring itself is asked for");
    assert!(rig.settle(miss));
    assert_eq!(rig.answered(&mut ring), 5, "the third was not lost");
    rig.leave();
}

#[test]
fn an_open_miss_is_asked_again_on_the_next_channel() {
    let mut rig = Rig::new();
    let mut ring = rig.started(0);
    offer(&mut ring, b"moved");
    let _unanswered = rig.miss(PATIENCE).unwrap();
    let begun = std::time::Instant::now();
    rig.channel = rig::channel(&mut rig.front);
    assert_eq!(rig.answered(&mut ring), 5);
    assert!(begun.elapsed() < Duration::from_secs(4), "at once, not when the first one is late");
    rig.leave();
}

/// What a front-end that acknowledges the feature and has no channel gets: no IOMMU.
#[test]
fn without_a_channel_addresses_are_what_they_are_without_an_iommu() {
    let (device, _) = common::echo(LoopKind::Auto, 1);
    let (ours, thread) =
        serve(DeviceRequestHandler::new(device, HandlerOptions::default()).unwrap());
    let mut front = Connection::from_fd(ours.into(), PATIENCE).unwrap();
    let offered = front.get_features().unwrap();
    assert_eq!(offered & virtio::ACCESS_PLATFORM, 0);
    front.get_protocol_features().unwrap();
    front.set_protocol_features(PROTOCOL | ProtocolFeatures::BACKEND_REQ).unwrap();
    front.get_features().unwrap();
    front.set_features(FEATURES | virtio::ACCESS_PLATFORM).unwrap();
    let memory = SharedMemory::with_size(1 << 20).unwrap();
    front.set_mem_table(memory.regions()).unwrap();
    let mut ring = Ring::new(&memory, 0, FEATURES);
    front.set_vring_num(0, common::SIZE).unwrap();
    front.set_vring_addr(0, &ring.layout).unwrap();
    front.set_vring_call(0, &ring.call).unwrap();
    front.set_vring_kick(0, &ring.kick).unwrap();
    front.set_vring_enable(0, true).unwrap();
    ring.round(b"plain");
    // A channel turns it on: the ring, at a user address that is no I/O address, rests.
    let channel = rig::channel(&mut front);
    ring.offer(b"unknown");
    ring.kick();
    assert!(channel.wait(PATIENCE).unwrap(), "it asks");
    assert!(ring.silent_for(MOMENT));
    drop((front, channel));
    thread.join().unwrap().0.unwrap();
}

#[test]
fn no_channel_to_be_had_means_no_iommu_offered() {
    let options = HandlerOptions {
        without_protocol_features: ProtocolFeatures::BACKEND_REQ,
        ..HandlerOptions::default()
    };
    let (device, _) = common::echo(LoopKind::Auto, 1);
    let (ours, _thread) = serve(DeviceRequestHandler::new(device, options).unwrap());
    let mut front = Connection::from_fd(ours.into(), PATIENCE).unwrap();
    front.get_features().unwrap();
    front.get_protocol_features().unwrap();
    front.set_protocol_features(PROTOCOL).unwrap();
    assert_eq!(front.get_features().unwrap() & virtio::ACCESS_PLATFORM, 0);
    let refused = front.call(Message::SetFeatures(FEATURES | virtio::ACCESS_PLATFORM));
    assert!(refused.is_err(), "{refused:?}");
}
