//! Chains that no honest driver makes, and the odd ones that it may (cases B3 to B45 of packed rings).

use outboard_queue::{DeviceQueue, RingError};

use crate::rig::*;

#[test]
fn b4_b40_a_buffer_id_outside_the_ring_breaks_this_ring_and_no_other() {
    for id in [5, 8, 0x8000, 0xffff] {
        let mut rig = Rig::new(5, 0);
        let mut other = Rig::new(5, 0);
        rig.offer(id, &[(DATA, 16, 0)]);
        rig.breaks(|e| e == RingError::Head { head: id, size: 5 });
        other.offer(4, &[(DATA, 16, 0)]);
        assert_eq!(other.take().head(), 4);
    }
}

/// R8: an id is in flight once.
#[test]
fn b7_a_buffer_id_in_flight_cannot_be_taken_again() {
    let mut rig = Rig::new(6, 0);
    rig.offer(3, &[(DATA, 16, 0)]);
    rig.offer(3, &[(DATA, 16, 0)]);
    let first = rig.take();
    rig.breaks(|e| e == RingError::HeadInFlight { head: 3 });
    // What was in flight can still be given back, and shown.
    assert_eq!(rig.device.in_flight(), 1);
    rig.device.complete(first, 16);
    assert_eq!(rig.device.in_flight(), 0);
    assert!(rig.device.publish().is_ok());
    assert_eq!(rig.used(0), (3, 16, AVAIL | USED | WRITE));
}

#[test]
fn b7_a_buffer_id_that_was_given_back_can_be_taken_again() {
    let mut rig = Rig::new(3, 0);
    for _ in 0..20 {
        rig.offer(2, &[(DATA, 16, 0)]);
        rig.serve();
    }
}

#[test]
fn the_id_of_a_chain_is_the_one_of_its_last_descriptor() {
    let mut rig = Rig::new(5, 0);
    rig.push(DATA, 16, 4, NEXT);
    rig.push(DATA, 16, 0xffff, NEXT);
    rig.push(DATA, 16, 2, WRITE);
    assert_eq!(rig.take().head(), 2);
}

#[test]
fn b5_a_ring_that_the_device_holds_whole_has_nothing_more_to_take() {
    let mut rig = Rig::new(4, 0);
    for id in 0..4 {
        rig.offer(id, &[(DATA, 16, 0)]);
    }
    let held: Vec<_> = (0..4).map(|_| rig.take()).collect();
    assert!(rig.device.pop().unwrap().is_none(), "the next ones are those of the last lap");
    // The driver makes what we hold available once more.
    rig.offer(3, &[(DATA, 16, 0)]);
    rig.breaks(|e| e == RingError::ChainLength { head: 0, size: 0 });
    assert_eq!(held.len(), 4);
}

/// A driver that has not been told of a descriptor cannot offer it again: a batch is never longer than the ring.
#[test]
fn b5_what_was_completed_and_not_shown_cannot_be_offered_again() {
    let mut rig = Rig::new(4, 0);
    for id in 0..4 {
        rig.offer(id, &[(DATA, 16, 0)]);
    }
    for _ in 0..4 {
        let chain = rig.take();
        rig.device.complete(chain, 0);
    }
    rig.offer(0, &[(DATA, 16, 0)]);
    let base = rig.device.base();
    rig.breaks(|e| e == RingError::ChainLength { head: 0, size: 0 });
    assert_eq!((rig.device.base(), base), (0x8000_0000, 0x8000_0000));
    // Where a queue says that it is, another can go on.
    DeviceQueue::new(rig.layout, PACKED, base, rig.view.clone()).unwrap();
}

#[test]
fn b25_a_chain_that_runs_into_what_the_device_holds_breaks_the_ring() {
    let mut rig = Rig::new(5, 0);
    rig.offer(0, &[(DATA, 16, 0); 3]);
    let _held = rig.take();
    rig.offer(1, &[(DATA, 16, 0); 3]);
    rig.breaks(|e| e == RingError::ChainLength { head: 3, size: 2 });
}

/// R7: a walk is bounded by the ring's size.
#[test]
fn b1_b2_b25_a_chain_round_and_round_breaks_the_ring() {
    for size in [1, 2, 7, 300] {
        let mut rig = Rig::new(size, 0);
        for at in 0..size {
            rig.desc(at, DATA, 16, 0, NEXT | AVAIL);
        }
        // The first one is not available in the next lap.
        let told = RingError::NotAvailable { head: 0, index: 0 };
        rig.breaks(|e| e == told);
    }
}

#[test]
fn b3_b39_a_chain_that_leads_to_what_is_not_available_breaks_the_ring() {
    // Fresh, used in this lap, available in another one.
    for state in [0, AVAIL | USED, USED] {
        let mut rig = Rig::new(8, 0);
        rig.desc(1, DATA, 16, 0, state);
        rig.push(DATA, 16, 0, NEXT);
        rig.breaks(|e| e == RingError::NotAvailable { head: 0, index: 1 });
    }
}

#[test]
fn b39_what_is_used_or_stale_or_of_another_lap_is_not_taken() {
    let mut rig = Rig::new(6, 0);
    for _ in 0..2 {
        for _ in 0..6 {
            let stale = [0, AVAIL | USED, AVAIL ^ USED ^ rig.available()];
            for state in stale {
                rig.desc(rig.at, DATA, 16, 0, state);
                assert!(rig.device.pop().unwrap().is_none(), "{state:#x}");
                assert!(!rig.device.has_available() && !rig.device.arm());
            }
            rig.offer(0, &[(DATA, 16, 0)]);
            rig.serve();
        }
    }
    assert!(!rig.device.is_broken());
}

#[test]
fn b6_a_driver_whose_wrap_counter_is_wrong_offers_nothing() {
    let mut rig = Rig::new(4, 0);
    rig.wrap = false;
    rig.offer(0, &[(DATA, 16, 0)]);
    assert!(rig.device.pop().unwrap().is_none());
    assert!(!rig.device.is_broken());
}

#[test]
fn b10_b11_b12_b14_a_buffer_outside_memory_breaks_the_ring_wherever_it_stands() {
    let bad = [
        (END, 1),
        (u64::MAX, 1),
        (u64::MAX - 15, 16),
        (u64::MAX - 15, 0xffff_ffff),
        (DATA, 0xffff_ffff),
        (END - 8, 9),
    ];
    for (addr, len) in bad {
        for place in 0..3 {
            let mut rig = Rig::new(8, 0);
            let mut buffers = [(DATA, 16, 0), (DATA, 512, WRITE), (DATA, 1, WRITE)];
            (buffers[place].0, buffers[place].1) = (addr, len);
            rig.offer(0, &buffers);
            rig.breaks(|e| matches!(e, RingError::Buffer { head: 0, .. }));
        }
    }
}

#[test]
fn b14_a_buffer_across_two_regions_that_meet_is_served() {
    let mut rig = Rig::new(8, 0);
    let bytes = pattern(32, 3);
    rig.view.write(SEAM - 16, &bytes).unwrap();
    rig.offer(0, &[(SEAM - 16, 32, 0)]);
    let mut chain = rig.take();
    assert_eq!(chain.readable().read_obj::<[u8; 32]>().unwrap()[..], bytes);
}

#[test]
fn b15_a_buffer_that_is_the_ring_itself_breaks_at_most_the_ring() {
    let mut rig = Rig::new(4, 0);
    rig.offer(0, &[(0, 64, 0), (0, 64, WRITE)]);
    let mut chain = rig.take();
    chain.writable().write_all(&[0xff; 64]).unwrap();
    rig.device.complete(chain, 64);
    rig.device.publish().unwrap();
    for _ in 0..4 {
        let _ = rig.device.pop();
    }
    assert!(rig.device.in_flight() <= 4);
}

#[test]
fn b17_an_indirect_table_inside_an_indirect_table_breaks_the_ring() {
    let mut rig = Rig::new(8, INDIRECT_DESC);
    rig.entry(DATA, DATA, 16, 0);
    rig.entry(DATA + 16, DATA, 16, INDIRECT);
    rig.push(DATA, 32, 0, INDIRECT);
    rig.breaks(|e| e == RingError::IndirectNested { index: 1 });
}

#[test]
fn b18_b43_an_indirect_descriptor_in_a_list_breaks_the_ring() {
    let mut rig = Rig::new(8, INDIRECT_DESC);
    rig.entry(DATA, DATA, 16, 0);
    rig.push(DATA, 16, 0, INDIRECT | NEXT);
    rig.push(DATA, 16, 0, 0);
    rig.breaks(|e| e == RingError::IndirectNext { index: 0 });
    let mut rig = Rig::new(8, INDIRECT_DESC);
    rig.entry(DATA, DATA, 16, 0);
    rig.push(DATA, 16, 0, NEXT);
    rig.push(DATA, 16, 0, INDIRECT);
    rig.breaks(|e| e == RingError::IndirectNext { index: 1 });
}

#[test]
fn b19_b20_b43_an_indirect_table_of_odd_length_breaks_the_ring() {
    for len in [0, 1, 15, 17, 16 * 9, 0x10_0000, 0xffff_fff0, u32::MAX] {
        let mut rig = Rig::new(8, INDIRECT_DESC);
        rig.push(DATA, len, 0, INDIRECT);
        rig.breaks(|e| e == RingError::IndirectLength { len, size: 8 });
    }
}

#[test]
fn b21_an_indirect_table_outside_memory_breaks_the_ring() {
    for place in [END, END - 16, u64::MAX - 15] {
        let mut rig = Rig::new(8, INDIRECT_DESC);
        rig.push(place, 32, 0, INDIRECT);
        rig.breaks(|e| matches!(e, RingError::Buffer { head: 0, .. }));
    }
}

#[test]
fn b21_b22_an_indirect_table_across_two_regions_or_at_an_odd_address_is_served() {
    for place in [SEAM - 24, DATA + 3] {
        let mut rig = Rig::new(8, INDIRECT_DESC);
        rig.entry(place, DATA + 0x100, 10, NEXT);
        rig.entry(place + 16, DATA + 0x200, 20, NEXT | WRITE);
        rig.entry(place + 32, DATA + 0x300, 30, WRITE);
        rig.push(place, 48, 5, INDIRECT);
        let mut chain = rig.take();
        assert_eq!((chain.head(), chain.readable().len(), chain.writable().len()), (5, 10, 50));
    }
}

#[test]
fn b23_an_indirect_table_without_the_feature_breaks_the_ring() {
    let mut rig = Rig::new(8, 0);
    rig.entry(DATA, DATA, 16, 0);
    rig.push(DATA, 16, 0, INDIRECT);
    rig.breaks(|e| e == RingError::IndirectNotNegotiated { index: 0 });
}

#[test]
fn b24_reserved_flags_are_ignored() {
    let mut rig = Rig::new(8, INDIRECT_DESC);
    // The entries of a table have neither NEXT nor wrap counters, whatever stands there.
    rig.entry(DATA, DATA, 10, NEXT | AVAIL | USED | 0x7f78);
    rig.entry(DATA + 16, DATA, 20, WRITE | AVAIL);
    rig.push(DATA, 32, 1, INDIRECT | WRITE);
    let mut chain = rig.take();
    assert_eq!((chain.readable().len(), chain.writable().len()), (10, 20));
    rig.push(DATA, 7, 2, 0x7f78);
    assert_eq!(rig.take().readable().len(), 7);
}

#[test]
fn b26_a_chain_of_more_than_four_gigabytes_breaks_the_ring() {
    // 2 MiB at a time, in a table as long as a ring may be.
    let count = 2049_u16;
    let mut rig = Rig::new(4096, INDIRECT_DESC);
    for at in 0..count {
        rig.entry(DATA + 16 * u64::from(at), DATA, 0x20_0000, 0);
    }
    rig.push(DATA, 16 * u32::from(count), 0, INDIRECT);
    rig.breaks(|e| matches!(e, RingError::ChainBytes { head: 0, bytes: 0x1_0020_0000 }));
}

#[test]
fn b28_empty_descriptors_are_skipped_wherever_they_stand() {
    for place in 0..4 {
        let mut rig = Rig::new(8, 0);
        let mut buffers = vec![(DATA, 16, 0), (DATA, 512, WRITE), (DATA, 1, WRITE)];
        let flags = if place < 2 { 0 } else { WRITE };
        buffers.insert(place, (u64::MAX, 0, flags));
        if place == 1 {
            buffers[1].2 = 0;
        }
        rig.offer(0, &buffers);
        let mut chain = rig.take();
        assert_eq!((chain.readable().len(), chain.writable().len()), (16, 513));
        chain.reserve_tail(1).unwrap();
        chain.write_tail(&[1]).unwrap();
    }
}

#[test]
fn b29_a_readable_buffer_behind_a_writable_one_breaks_the_ring() {
    let mut rig = Rig::new(8, INDIRECT_DESC);
    rig.offer(0, &[(DATA, 1, WRITE), (DATA, 1, 0)]);
    rig.breaks(|e| e == RingError::Order { head: 0, index: 1 });
    let mut rig = Rig::new(8, INDIRECT_DESC);
    rig.entry(DATA, DATA, 1, WRITE);
    rig.entry(DATA + 16, DATA, 1, 0);
    rig.push(DATA, 32, 0, INDIRECT);
    rig.breaks(|e| e == RingError::Order { head: 0, index: 1 });
}

#[test]
fn r11_chains_in_flight_that_fall_into_millions_of_pieces_break_the_ring() {
    let size = 32_768;
    let mut rig = Rig::new(size, INDIRECT_DESC);
    for at in 0..size {
        rig.entry(DATA + 16 * u64::from(at), DATA, 1, 0);
    }
    let mut held = Vec::new();
    let told = loop {
        rig.push(DATA, 16 * u32::from(size), u16::try_from(held.len()).unwrap(), INDIRECT);
        match rig.device.pop() {
            Ok(chain) => held.push(chain.unwrap()),
            Err(told) => break told,
        }
    };
    assert!(matches!(told, RingError::Pieces { .. }), "{told:?}");
    assert_eq!(held.len(), 128);
    for chain in held {
        rig.device.complete(chain, 0);
    }
    assert_eq!(rig.device.in_flight(), 0);
}

/// The quick walk and the careful one hold B3, B4, B5, B7, B10, B17, B18, B19, B21, B23, B25, B26, B28, B29, B39, B40,
/// B43 alike.
#[test]
fn every_case_ends_the_same_on_a_ring_that_has_served_before() {
    WORN.set(true);
    b4_b40_a_buffer_id_outside_the_ring_breaks_this_ring_and_no_other();
    b7_a_buffer_id_in_flight_cannot_be_taken_again();
    the_id_of_a_chain_is_the_one_of_its_last_descriptor();
    b5_a_ring_that_the_device_holds_whole_has_nothing_more_to_take();
    b25_a_chain_that_runs_into_what_the_device_holds_breaks_the_ring();
    b1_b2_b25_a_chain_round_and_round_breaks_the_ring();
    b39_what_is_used_or_stale_or_of_another_lap_is_not_taken();
    b10_b11_b12_b14_a_buffer_outside_memory_breaks_the_ring_wherever_it_stands();
    b14_a_buffer_across_two_regions_that_meet_is_served();
    b17_an_indirect_table_inside_an_indirect_table_breaks_the_ring();
    b18_b43_an_indirect_descriptor_in_a_list_breaks_the_ring();
    b19_b20_b43_an_indirect_table_of_odd_length_breaks_the_ring();
    b21_an_indirect_table_outside_memory_breaks_the_ring();
    b21_b22_an_indirect_table_across_two_regions_or_at_an_odd_address_is_served();
    b23_an_indirect_table_without_the_feature_breaks_the_ring();
    b24_reserved_flags_are_ignored();
    b26_a_chain_of_more_than_four_gigabytes_breaks_the_ring();
    b28_empty_descriptors_are_skipped_wherever_they_stand();
    b29_a_readable_buffer_behind_a_writable_one_breaks_the_ring();
    WORN.set(false);
}
