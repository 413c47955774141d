//! What a guest can write into descriptors: B1 to B29 of the list of hostile cases.

use crate::rig::*;
use outboard_memory::AccessError;
use outboard_queue::RingError;

#[test]
fn b1_a_descriptor_that_leads_to_itself_breaks_the_ring() {
    let mut rig = Rig::new(8, 0);
    rig.desc(3, DATA, 16, NEXT, 3);
    rig.offer(3);
    rig.breaks(|e| e == RingError::ChainLength { head: 3, size: 8 });
}

#[test]
fn b1_an_empty_descriptor_that_leads_to_itself_breaks_the_ring() {
    let mut rig = Rig::new(8, 0);
    rig.desc(3, DATA, 0, NEXT, 3);
    rig.offer(3);
    rig.breaks(|e| e == RingError::ChainLength { head: 3, size: 8 });
}

#[test]
fn b2_a_loop_over_the_whole_table_breaks_the_ring() {
    let mut rig = Rig::new(256, 0);
    for at in 0..256 {
        rig.desc(at, DATA, 1, NEXT, (at + 1) % 256);
    }
    rig.offer(7);
    rig.breaks(|e| e == RingError::ChainLength { head: 7, size: 256 });
}

#[test]
fn b3_a_next_outside_the_table_breaks_the_ring() {
    for next in [8, 9, 0x7fff, 0xffff] {
        let mut rig = Rig::new(8, 0);
        rig.desc(0, DATA, 16, NEXT, next);
        rig.offer(0);
        rig.breaks(|e| e == RingError::Next { index: next });
    }
}

#[test]
fn b3_a_next_outside_an_indirect_table_breaks_the_ring() {
    let mut rig = Rig::new(8, INDIRECT_DESC);
    rig.desc_at(DATA, DATA, 16, NEXT, 2);
    rig.desc_at(DATA + 16, DATA, 16, 0, 0);
    rig.desc(0, DATA, 32, INDIRECT, 0);
    rig.offer(0);
    rig.breaks(|e| e == RingError::Next { index: 2 });
}

#[test]
fn b4_a_head_outside_the_table_breaks_this_ring_and_no_other() {
    for head in [8, 0x8000, 0xffff] {
        let mut rig = Rig::new(8, 0);
        let mut other = Rig::new(8, 0);
        rig.offer(head);
        rig.breaks(|e| e == RingError::Head { head, size: 8 });
        other.desc(0, DATA, 16, 0, 0);
        other.offer(0);
        assert_eq!(other.take().head(), 0);
    }
}

#[test]
fn b4_all_heads_outside_the_table_break_the_ring_once() {
    let mut rig = Rig::new(8, 0);
    for _ in 0..8 {
        rig.offer(0xffff);
    }
    rig.breaks(|e| e == RingError::Head { head: 0xffff, size: 8 });
}

#[test]
fn b5_an_available_index_too_far_ahead_breaks_the_ring_once() {
    for ahead in [9, 100, 0x7fff, 0xffff] {
        let mut rig = Rig::new(8, 0);
        rig.set_avail(ahead);
        let told = rig.avail_error(ahead, 0);
        rig.breaks(|e| e == told);
    }
}

#[test]
fn b5_an_available_index_just_one_ring_ahead_is_legal() {
    let mut rig = Rig::new(8, 0);
    for head in 0..8 {
        rig.desc(head, DATA, 16, 0, 0);
        rig.offer(head);
    }
    for head in 0..8 {
        assert_eq!(rig.take().head(), head);
    }
    assert!(rig.device.pop().unwrap().is_none());
}

#[test]
fn b6_an_available_index_that_moves_back_breaks_the_ring() {
    let mut rig = Rig::new(8, 0);
    for head in [0, 1] {
        rig.desc(head, DATA, 16, 0, 0);
        rig.offer(head);
        let chain = rig.take();
        rig.device.complete(chain, 0);
    }
    rig.set_avail(1);
    let told = rig.avail_error(1, 2);
    rig.breaks(|e| e == told);
}

/// R8: a head is in flight once.
#[test]
fn b7_a_head_in_flight_cannot_be_taken_again() {
    let mut rig = Rig::new(8, 0);
    rig.desc(5, DATA, 16, 0, 0);
    rig.offer(5);
    rig.offer(5);
    let first = rig.take();
    rig.breaks(|e| e == RingError::HeadInFlight { head: 5 });
    // What was in flight can still be given back.
    assert_eq!(rig.device.in_flight(), 1);
    rig.device.complete(first, 16);
    assert_eq!(rig.device.in_flight(), 0);
    rig.device.publish().unwrap();
    assert_eq!((rig.used_idx(), rig.used(0)), (1, (5, 16)));
}

#[test]
fn b7_a_head_that_was_given_back_can_be_taken_again() {
    let mut rig = Rig::new(8, 0);
    rig.desc(5, DATA, 16, 0, 0);
    for round in 1..20 {
        rig.offer(5);
        let chain = rig.take();
        rig.device.complete(chain, 1);
        rig.device.publish().unwrap();
        assert_eq!(rig.used_idx(), round);
    }
}

#[test]
fn b9_a_descriptor_in_two_chains_is_bounded_in_both() {
    let mut rig = Rig::new(8, 0);
    rig.desc(0, DATA, 16, NEXT, 1);
    rig.desc(1, DATA + 64, 32, 0, 0);
    rig.offer(0);
    rig.offer(1);
    let mut whole = rig.take();
    let mut part = rig.take();
    assert_eq!((whole.readable().len(), part.readable().len()), (48, 32));
    rig.device.complete(whole, 0);
    rig.device.complete(part, 0);
    assert_eq!(rig.device.in_flight(), 0);
}

#[test]
fn b10_a_buffer_outside_memory_breaks_the_ring_wherever_it_stands() {
    for bad in 0..3 {
        let mut rig = Rig::new(8, 0);
        let place = |at| if at == bad { END + 0x1000 } else { DATA };
        rig.desc(0, place(0), 16, NEXT, 1);
        rig.desc(1, place(1), 512, NEXT | WRITE, 2);
        rig.desc(2, place(2), 1, WRITE, 0);
        rig.offer(0);
        rig.breaks(|e| {
            matches!(e, RingError::Buffer { head: 0, source: AccessError::Outside { .. } })
        });
    }
}

#[test]
fn b11_a_buffer_that_wraps_breaks_the_ring() {
    for (addr, len) in
        [(u64::MAX, 2), (u64::MAX - 15, 16), (u64::MAX - 15, 17), (u64::MAX, u32::MAX)]
    {
        let mut rig = Rig::new(8, 0);
        rig.desc(0, addr, len, 0, 0);
        rig.offer(0);
        rig.breaks(|e| matches!(e, RingError::Buffer { head: 0, .. }));
    }
}

#[test]
fn b12_a_length_of_four_gigabytes_breaks_the_ring() {
    let mut rig = Rig::new(8, 0);
    rig.desc(0, DATA, u32::MAX, WRITE, 0);
    rig.offer(0);
    rig.breaks(|e| matches!(e, RingError::Buffer { head: 0, .. }));
}

#[test]
fn b14_a_buffer_across_the_end_of_memory_is_refused_whole() {
    for (addr, len) in [(END - 16, 17), (END - 1, 2), (SEAM - 16, 0x20_0011)] {
        let mut rig = Rig::new(8, 0);
        rig.desc(0, addr, len, WRITE, 0);
        rig.offer(0);
        rig.breaks(|e| matches!(e, RingError::Buffer { head: 0, .. }));
    }
}

#[test]
fn b14_a_buffer_across_two_regions_that_meet_is_served() {
    let mut rig = Rig::new(8, 0);
    rig.desc(0, SEAM - 100, 300, WRITE, 0);
    rig.offer(0);
    let mut chain = rig.take();
    assert_eq!(chain.writable().segments().len(), 2);
    let bytes = pattern(300, 9);
    chain.writable().write_all(&bytes).unwrap();
    let mut seen = vec![0; 300];
    rig.view.read(SEAM - 100, &mut seen).unwrap();
    assert_eq!(seen, bytes);
}

#[test]
fn b15_a_buffer_that_is_the_ring_itself_breaks_at_most_the_ring() {
    let mut rig = Rig::new(8, 0);
    let everything = u32::try_from(rig.layout.used + 4 + 64).unwrap();
    rig.desc(0, 0, everything, WRITE, 0);
    rig.offer(0);
    let mut chain = rig.take();
    chain.writable().write_all(&pattern(everything as usize, 0xff)).unwrap();
    rig.device.complete(chain, everything);
    rig.device.publish().unwrap();
    while let Ok(Some(chain)) = rig.device.pop() {
        rig.device.complete(chain, 0);
    }
    assert!(rig.device.is_broken(), "the index we wrote over is far off");
}

#[test]
fn b17_an_indirect_table_inside_an_indirect_table_breaks_the_ring() {
    for at in 0..2 {
        let mut rig = Rig::new(8, INDIRECT_DESC);
        rig.desc_at(DATA, DATA, 16, NEXT | if at == 0 { INDIRECT } else { 0 }, 1);
        rig.desc_at(DATA + 16, DATA, 16, if at == 1 { INDIRECT } else { 0 }, 0);
        rig.desc(0, DATA, 32, INDIRECT, 0);
        rig.offer(0);
        rig.breaks(|e| e == RingError::IndirectNested { index: at });
    }
}

#[test]
fn b18_an_indirect_descriptor_with_a_next_one_breaks_the_ring() {
    let mut rig = Rig::new(8, INDIRECT_DESC);
    rig.desc(0, DATA, 32, INDIRECT | NEXT, 1);
    rig.desc(1, DATA, 32, 0, 0);
    rig.offer(0);
    rig.breaks(|e| e == RingError::IndirectNext { index: 0 });
}

#[test]
fn b19_an_indirect_table_of_odd_length_breaks_the_ring() {
    for len in [0, 1, 15, 17, 31, 33] {
        let mut rig = Rig::new(8, INDIRECT_DESC);
        rig.desc_at(DATA, DATA, 16, 0, 0);
        rig.desc(0, DATA, len, INDIRECT, 0);
        rig.offer(0);
        rig.breaks(|e| e == RingError::IndirectLength { len, size: 8 });
    }
}

/// R7: a walk is bounded by the ring's size.
#[test]
fn b20_an_indirect_table_longer_than_the_ring_breaks_the_ring() {
    for len in [9 * 16, 1 << 24, 0xffff_fff0] {
        let mut rig = Rig::new(8, INDIRECT_DESC);
        rig.desc(0, DATA, len, INDIRECT, 0);
        rig.offer(0);
        rig.breaks(|e| e == RingError::IndirectLength { len, size: 8 });
    }
}

#[test]
fn b21_an_indirect_table_outside_memory_breaks_the_ring() {
    for addr in [END, END - 16, u64::MAX - 31, u64::MAX] {
        let mut rig = Rig::new(8, INDIRECT_DESC);
        rig.desc(0, addr, 32, INDIRECT, 0);
        rig.offer(0);
        rig.breaks(|e| matches!(e, RingError::Buffer { head: 0, .. }));
    }
}

#[test]
fn b21_an_indirect_table_across_two_regions_is_served() {
    for start in [SEAM - 16, SEAM - 8, SEAM - 33] {
        let mut rig = Rig::new(8, INDIRECT_DESC);
        rig.desc_at(start, DATA, 100, NEXT, 2);
        rig.desc_at(start + 32, DATA + 1000, 10, NEXT | WRITE, 1);
        rig.desc_at(start + 16, DATA + 2000, 1, WRITE, 0);
        rig.desc(0, start, 48, INDIRECT, 0);
        rig.offer(0);
        let mut chain = rig.take();
        assert_eq!((chain.readable().len(), chain.writable().len()), (100, 11));
    }
}

#[test]
fn b22_an_indirect_table_at_an_odd_address_is_served() {
    for odd in [1, 3, 8, 15] {
        let mut rig = Rig::new(8, INDIRECT_DESC);
        rig.desc_at(DATA + odd, DATA + 0x1000, 16, NEXT, 1);
        rig.desc_at(DATA + odd + 16, DATA + 0x2000, 4096, WRITE, 0);
        rig.desc(0, DATA + odd, 32, INDIRECT, 0);
        rig.offer(0);
        let mut chain = rig.take();
        assert_eq!((chain.readable().len(), chain.writable().len()), (16, 4096));
    }
}

#[test]
fn b23_an_indirect_table_without_the_feature_breaks_the_ring() {
    let mut rig = Rig::new(8, 0);
    rig.desc_at(DATA, DATA, 16, 0, 0);
    rig.desc(0, DATA, 16, INDIRECT, 0);
    rig.offer(0);
    rig.breaks(|e| e == RingError::IndirectNotNegotiated { index: 0 });
}

#[test]
fn b24_the_write_flag_of_an_indirect_descriptor_is_ignored() {
    let mut rig = Rig::new(8, INDIRECT_DESC);
    rig.desc_at(DATA, DATA, 16, NEXT, 1);
    rig.desc_at(DATA + 16, DATA, 1, WRITE, 0);
    rig.desc(0, DATA, 32, INDIRECT | WRITE, 0);
    rig.offer(0);
    let mut chain = rig.take();
    assert_eq!((chain.readable().len(), chain.writable().len()), (16, 1));
}

#[test]
fn b24_descriptors_in_front_of_an_indirect_table_are_served() {
    let mut rig = Rig::new(8, INDIRECT_DESC);
    rig.desc(4, DATA, 16, NEXT, 6);
    rig.desc(6, DATA + 0x1000, 32, INDIRECT | WRITE, 0);
    rig.desc_at(DATA + 0x1000, DATA + 0x2000, 7, NEXT, 1);
    rig.desc_at(DATA + 0x1010, DATA + 0x3000, 9, WRITE, 0);
    rig.offer(4);
    let mut chain = rig.take();
    assert_eq!((chain.readable().len(), chain.writable().len()), (23, 9));
}

/// R7: a walk is bounded by the ring's size.
#[test]
fn b25_a_chain_longer_than_the_ring_breaks_the_ring() {
    // Direct descriptors and a full table behind them: nine in a ring of eight.
    let mut rig = Rig::new(8, INDIRECT_DESC);
    rig.desc(0, DATA, 16, NEXT, 1);
    rig.desc(1, DATA, 8 * 16, INDIRECT, 0);
    for at in 0..8 {
        rig.desc_at(DATA + 16 * at, DATA, 16, NEXT, u16::try_from(at + 1).unwrap());
    }
    rig.offer(0);
    rig.breaks(|e| e == RingError::ChainLength { head: 0, size: 8 });
}

#[test]
fn b25_a_chain_as_long_as_the_ring_is_served() {
    for indirect in [false, true] {
        let mut rig = Rig::new(1024, INDIRECT_DESC);
        let table = if indirect { DATA } else { rig.layout.desc };
        for at in 0..1024 {
            let more = if at < 1023 { NEXT } else { 0 };
            rig.desc_at(
                table + 16 * u64::from(at),
                DATA + 0x10_0000 + u64::from(at),
                1,
                more,
                at + 1,
            );
        }
        if indirect {
            rig.desc(0, DATA, 1024 * 16, INDIRECT, 0);
        }
        rig.offer(0);
        let bytes = pattern(1024, 3);
        rig.view.write(DATA + 0x10_0000, &bytes).unwrap();
        let mut chain = rig.take();
        let mut seen = vec![0; 1024];
        chain.readable().read_exact(&mut seen).unwrap();
        assert_eq!(seen, bytes);
        assert!(chain.readable().is_empty());
    }
}

/// R7: a walk is bounded in bytes too.
#[test]
fn b26_a_chain_of_more_than_four_gigabytes_breaks_the_ring() {
    let mut rig = Rig::new(32_768, 0);
    let len = u32::try_from(END - DATA).unwrap();
    let enough = u16::try_from((1_u64 << 32) / u64::from(len) + 1).unwrap();
    for at in 0..enough {
        let more = if at + 1 < enough { NEXT } else { 0 };
        rig.desc(at, DATA, len, more, at + 1);
    }
    rig.offer(0);
    rig.breaks(|e| matches!(e, RingError::ChainBytes { head: 0, .. }));
}

#[test]
fn b26_a_chain_of_just_four_gigabytes_is_served() {
    let mut rig = Rig::new(32_768, 0);
    let len = 1 << 18;
    for at in 0..16_384 {
        let more = if at < 16_383 { NEXT } else { 0 };
        rig.desc(at, DATA, len, more | WRITE, at + 1);
    }
    rig.offer(0);
    assert_eq!(rig.take().writable().len(), 1 << 32);
}

#[test]
fn b27_many_descriptors_of_the_same_memory_cost_no_memory_of_ours() {
    let mut rig = Rig::new(256, 0);
    let len = u32::try_from(END - DATA).unwrap();
    for at in 0..255 {
        let more = if at < 254 { NEXT } else { 0 };
        rig.desc(at, DATA, len, more, at + 1);
    }
    rig.offer(0);
    let mut chain = rig.take();
    assert_eq!(chain.readable().len(), 255 * u64::from(len));
    assert!(chain.readable().segments().len() <= 2 * 255);
    chain.readable().skip(254 * u64::from(len)).unwrap();
    assert_eq!(chain.readable().len(), u64::from(len));
}

#[test]
fn b28_empty_descriptors_are_skipped_wherever_they_stand() {
    for empty_at in 0..6 {
        let mut rig = Rig::new(8, 0);
        let mut parts = vec![
            (DATA, 16, 0),
            (DATA + 100, 4, 0),
            (DATA + 200, 50, WRITE),
            (DATA + 300, 1, WRITE),
        ];
        let at = empty_at.min(4);
        let flag = if at < 3 { 0 } else { WRITE };
        // An empty one may even lie outside memory.
        parts.insert(at, (if empty_at == 5 { u64::MAX } else { DATA }, 0, flag));
        for (index, &(addr, len, flag)) in (0..).zip(&parts) {
            let more = if index < 4 { NEXT } else { 0 };
            rig.desc(index, addr, len, flag | more, index + 1);
        }
        rig.offer(0);
        let mut chain = rig.take();
        assert_eq!(
            (chain.readable().len(), chain.writable().len()),
            (20, 51),
            "empty at {empty_at}"
        );
        chain.readable().read_exact(&mut [0; 20]).unwrap();
        assert!(chain.readable().is_empty());
        chain.reserve_tail(1).unwrap();
        chain.writable().write_all(&[5; 50]).unwrap();
        assert!(chain.writable().is_empty());
        chain.write_tail(&[6]).unwrap();
        let mut status = [0];
        rig.view.read(DATA + 300, &mut status).unwrap();
        assert_eq!(status, [6]);
    }
}

#[test]
fn b28_a_chain_of_nothing_has_nothing_to_read_or_write() {
    let mut rig = Rig::new(8, 0);
    rig.desc(0, DATA, 0, NEXT, 1);
    rig.desc(1, DATA, 0, WRITE, 0);
    rig.offer(0);
    let mut chain = rig.take();
    assert!(chain.readable().is_empty() && chain.writable().is_empty());
    assert!(chain.readable().read_obj::<u8>().is_err());
    assert!(chain.reserve_tail(1).is_err());
    assert!(chain.write_tail(&[1]).is_err());
    rig.device.complete(chain, 0);
    rig.device.publish().unwrap();
    assert_eq!(rig.used(0), (0, 0));
}

#[test]
fn b29_a_readable_buffer_behind_a_writable_one_breaks_the_ring() {
    for len in [0, 16] {
        let mut rig = Rig::new(8, 0);
        rig.desc(0, DATA, 16, NEXT, 1);
        rig.desc(1, DATA, 16, NEXT | WRITE, 2);
        rig.desc(2, DATA, len, 0, 0);
        rig.offer(0);
        rig.breaks(|e| e == RingError::Order { head: 0, index: 2 });
    }
}

#[test]
fn r11_chains_in_flight_that_fall_into_millions_of_pieces_break_the_ring() {
    let mut rig = Rig::new(32_768, INDIRECT_DESC);
    // One table for all: 32,768 pieces of one byte each.
    for at in 0..32_768 {
        let more = if at < 32_767 { NEXT } else { 0 };
        rig.desc_at(DATA + 16 * u64::from(at), DATA, 1, more, at + 1);
    }
    for head in 0..200 {
        rig.desc(head, DATA, 32_768 * 16, INDIRECT, 0);
        rig.offer(head);
    }
    let mut chains = Vec::new();
    let told = loop {
        match rig.device.pop() {
            Ok(chain) => chains.push(chain.unwrap()),
            Err(told) => break told,
        }
    };
    assert!(matches!(told, RingError::Pieces { .. }), "{told:?}");
    assert_eq!(chains.len(), 128, "64 MiB of lists");
    for chain in chains {
        rig.device.complete(chain, 0);
    }
    assert_eq!(rig.device.in_flight(), 0);
}

/// All of the above, as B1 to B29 and R11 are met by a ring that has been in use.
const CASES: [fn(); 38] = [
    b1_a_descriptor_that_leads_to_itself_breaks_the_ring,
    b1_an_empty_descriptor_that_leads_to_itself_breaks_the_ring,
    b2_a_loop_over_the_whole_table_breaks_the_ring,
    b3_a_next_outside_the_table_breaks_the_ring,
    b3_a_next_outside_an_indirect_table_breaks_the_ring,
    b4_a_head_outside_the_table_breaks_this_ring_and_no_other,
    b4_all_heads_outside_the_table_break_the_ring_once,
    b5_an_available_index_too_far_ahead_breaks_the_ring_once,
    b5_an_available_index_just_one_ring_ahead_is_legal,
    b6_an_available_index_that_moves_back_breaks_the_ring,
    b7_a_head_in_flight_cannot_be_taken_again,
    b7_a_head_that_was_given_back_can_be_taken_again,
    b9_a_descriptor_in_two_chains_is_bounded_in_both,
    b10_a_buffer_outside_memory_breaks_the_ring_wherever_it_stands,
    b11_a_buffer_that_wraps_breaks_the_ring,
    b12_a_length_of_four_gigabytes_breaks_the_ring,
    b14_a_buffer_across_the_end_of_memory_is_refused_whole,
    b14_a_buffer_across_two_regions_that_meet_is_served,
    b15_a_buffer_that_is_the_ring_itself_breaks_at_most_the_ring,
    b17_an_indirect_table_inside_an_indirect_table_breaks_the_ring,
    b18_an_indirect_descriptor_with_a_next_one_breaks_the_ring,
    b19_an_indirect_table_of_odd_length_breaks_the_ring,
    b20_an_indirect_table_longer_than_the_ring_breaks_the_ring,
    b21_an_indirect_table_outside_memory_breaks_the_ring,
    b21_an_indirect_table_across_two_regions_is_served,
    b22_an_indirect_table_at_an_odd_address_is_served,
    b23_an_indirect_table_without_the_feature_breaks_the_ring,
    b24_the_write_flag_of_an_indirect_descriptor_is_ignored,
    b24_descriptors_in_front_of_an_indirect_table_are_served,
    b25_a_chain_longer_than_the_ring_breaks_the_ring,
    b25_a_chain_as_long_as_the_ring_is_served,
    b26_a_chain_of_more_than_four_gigabytes_breaks_the_ring,
    b26_a_chain_of_just_four_gigabytes_is_served,
    b27_many_descriptors_of_the_same_memory_cost_no_memory_of_ours,
    b28_empty_descriptors_are_skipped_wherever_they_stand,
    b28_a_chain_of_nothing_has_nothing_to_read_or_write,
    b29_a_readable_buffer_behind_a_writable_one_breaks_the_ring,
    r11_chains_in_flight_that_fall_into_millions_of_pieces_break_the_ring,
];

/// The quick walk and the careful one hold B1, B2, B3, B4, B5, B6, B7, B9, B10, B11, B12, B14, B15,
/// B17, B18, B19, B20, B21, B22, B23, B24, B25, B26, B27, B28 and B29 alike.
#[test]
fn every_case_ends_the_same_on_a_ring_that_has_served_before() {
    let listed = include_str!("hostile_chains.rs").matches("\n#[test]").count();
    assert_eq!(CASES.len() + 1, listed, "a case is missing from the list");
    WORN.set(true);
    CASES.iter().for_each(|case| case());
}
