//! The table of regions: what overlaps, what is found, what a change does; and ranges across regions (A30, A40, A42).
#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use outboard_memory::{
    AccessError, GuestMemory, LayoutError, MapOptions, Region, RegionSpec, View,
};
use proptest::prelude::*;

fn region(guest_addr: u64, user_addr: u64, size: u64) -> Region {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    let spec = RegionSpec { guest_addr, user_addr, size, offset: 0 };
    Region::map(spec, file.into(), MapOptions::default()).unwrap()
}

fn memory(parts: &[(u64, u64, u64)]) -> Result<GuestMemory, LayoutError> {
    let regions = parts.iter().map(|&(guest, user, size)| Arc::new(region(guest, user, size)));
    GuestMemory::new(1, regions.collect())
}

#[test]
fn no_region_at_all_is_a_table() {
    let memory = memory(&[]).unwrap();
    assert_eq!(memory.user_to_guest(0, 1), None);
    assert!(!memory.poisoned());
    let view = View::new(Arc::new(memory));
    assert!(view.cells(0, 1).is_err());
    assert!(view.read(0, &mut [0]).is_err());
    assert!(view.read(0, &mut []).is_ok());
}

#[test]
fn a30_regions_that_overlap_in_guest_space_are_refused() {
    for second in [0x1000, 0x1fff, 0x2fff, 0x3fff] {
        let refused = memory(&[(0x2000, 0, 0x2000), (second, 0x10_0000, 0x1001)]).unwrap_err();
        let LayoutError::Overlap { space, .. } = refused else { panic!("{refused:?}") };
        assert_eq!(space, "guest");
    }
    assert!(
        memory(&[(0x2000, 0, 0x2000), (0x4000, 0x10_0000, 0x1000), (0x1000, 0x20_0000, 0x1000)])
            .is_ok()
    );
}

#[test]
fn a30_regions_that_overlap_in_user_space_are_refused() {
    let refused = memory(&[(0, 0x5000, 0x1000), (0x8000, 0x4800, 0x1000)]).unwrap_err();
    assert_eq!(refused, LayoutError::Overlap { space: "user", first: 0x4800, second: 0x5000 });
}

#[test]
fn regions_come_back_in_the_order_of_guest_addresses() {
    let memory =
        memory(&[(0x9000, 0, 0x1000), (0, 0x9000, 0x1000), (0x4000, 0x4000, 0x1000)]).unwrap();
    let starts: Vec<_> = memory.regions().iter().map(|region| region.spec().guest_addr).collect();
    assert_eq!(starts, [0, 0x4000, 0x9000]);
}

#[test]
fn a40_a42_changes_make_a_new_generation_and_leave_the_old_one() {
    let first = memory(&[(0, 0x1_0000, 0x1000)]).unwrap();
    let second = first.with_region(region(0x4000, 0x2_0000, 0x1000)).unwrap();
    assert_eq!((first.generation(), second.generation()), (1, 2));
    assert_eq!((first.regions().len(), second.regions().len()), (1, 2));
    assert!(
        Arc::ptr_eq(&first.regions()[0], &second.regions()[0]),
        "what stays is not mapped again"
    );
    assert!(second.with_region(region(0x4800, 0x3_0000, 0x1000)).is_err());

    let spec = RegionSpec { guest_addr: 0, user_addr: 0x1_0000, size: 0x1000, offset: 77 };
    for (guest_addr, user_addr, size) in
        [(1, 0x1_0000, 0x1000), (0, 0x1_0001, 0x1000), (0, 0x1_0000, 0xfff)]
    {
        let wrong = RegionSpec { guest_addr, user_addr, size, ..spec };
        assert_eq!(
            second.without_region(&wrong).unwrap_err(),
            LayoutError::Unknown { guest_addr, user_addr, size }
        );
    }
    let third = second.without_region(&spec).unwrap();
    assert_eq!((third.generation(), third.regions().len()), (3, 1));
    assert!(View::new(Arc::new(third)).read(0, &mut [0]).is_err());
    assert!(View::new(Arc::new(second)).read(0, &mut [0]).is_ok());
}

/// R5: the whole range, not its first byte.
#[test]
fn user_addresses_are_translated_as_ranges_in_one_region() {
    let memory = memory(&[
        (0, 0x7000_0000, 0x1000),
        (0x1000, 0x7000_1000, 0x1000),
        (0x8000, 0x5000, 0x2000),
    ])
    .unwrap();
    for (user, len, guest) in [
        (0x7000_0000, 0x1000, Some(0)),
        (0x7000_0fff, 1, Some(0xfff)),
        (0x7000_0fff, 2, None),
        (0x7000_1000, 0x1000, Some(0x1000)),
        (0x7000_2000, 1, None),
        (0x6fff_ffff, 1, None),
        (0x5000, 0x2000, Some(0x8000)),
        (0x5001, 0x2000, None),
        (0x5001, u64::MAX, None),
        (0x4fff, 1, None),
        (u64::MAX, 2, None),
        (0, 1, None),
    ] {
        assert_eq!(memory.user_to_guest(user, len), guest, "{user:#x} + {len:#x}");
    }
}

/// R5: a range across regions is several segments.
#[test]
fn a_range_may_cross_regions_that_meet_and_no_gap() {
    let parts = [
        (0x1000, 0, 0x1000),
        (0x2000, 0x1_0000, 0x800),
        (0x2800, 0x2_0000, 0x1000),
        (0x5000, 0x3_0000, 0x1000),
    ];
    let view = View::new(Arc::new(memory(&parts).unwrap()));
    let bytes: Vec<u8> = (0..0x1800_u32).map(|at| u8::try_from(at % 253).unwrap()).collect();
    view.write(0x1c00, &bytes).unwrap();
    let mut seen = vec![0; bytes.len()];
    view.read(0x1c00, &mut seen).unwrap();
    assert_eq!(seen, bytes);
    for (guest, len) in
        [(0x1c00, 0x1c01), (0x37ff, 2), (0x3800, 1), (0x4fff, 2), (0x5fff, 2), (0xfff, 2)]
    {
        let outside = AccessError::Outside { guest, len };
        let mut bytes = vec![1; usize::try_from(len).unwrap()];
        assert_eq!(view.read(guest, &mut bytes), Err(outside));
        assert_eq!(view.write(guest, &bytes), Err(outside));
    }
    view.read(0x37ff, &mut seen[..1]).unwrap();
    assert_eq!(seen[0], 0, "a write that is refused writes nothing");
}

#[test]
fn cells_lie_in_one_region_and_are_aligned() {
    let parts = [(0x1000, 0, 0x1000), (0x2000, 0x1_0000, 0x1000)];
    let view = View::new(Arc::new(memory(&parts).unwrap()));
    assert!(
        matches!(view.cells(0x1ff0, 0x11), Err(AccessError::Outside { .. })),
        "no ring across a seam"
    );
    assert!(view.cells(u64::MAX, 2).is_err());
    let cells = view.cells(0x1ff0, 16).unwrap();
    assert!(matches!(cells.u16_at(1), Err(AccessError::Misaligned { .. })));
    assert!(matches!(cells.u16_at(16), Err(AccessError::OutsideCells { .. })));
    assert!(matches!(cells.u16_at(u64::MAX), Err(AccessError::OutsideCells { .. })));
    assert!(matches!(cells.ring16(0, 3), Err(AccessError::NotAPowerOfTwo { count: 3 })));
    assert!(matches!(cells.ring16(2, 8), Err(AccessError::OutsideCells { .. })));
    assert!(cells.pairs(4, 1).is_ok() && cells.pairs(2, 1).is_err());
    assert!(cells.descriptors(0, 1).is_ok() && cells.descriptors(8, 0).is_err());
    let cell = cells.u16_at(14).unwrap();
    cell.store(0xabcd, Ordering::Release);
    let mut bytes = [0; 2];
    view.read(0x1ffe, &mut bytes).unwrap();
    assert_eq!((u16::from_le_bytes(bytes), cell.load(Ordering::Acquire)), (0xabcd, 0xabcd));
}

#[test]
fn elements_are_little_endian_and_wrap() {
    let view = View::new(Arc::new(memory(&[(0, 0, 0x1000)]).unwrap()));
    let cells = view.cells(0, 0x100).unwrap();
    let (ring, pairs, table) = (
        cells.ring16(2, 4).unwrap(),
        cells.pairs(20, 2).unwrap(),
        cells.descriptors(64, 2).unwrap(),
    );
    ring.store(5, 0x1234);
    pairs.store(3, 0x1122_3344, 0x5566_7788);
    let descriptor =
        outboard_memory::Descriptor { addr: 0x0102_0304_0506_0708, len: 9, flags: 3, next: 0xfffe };
    assert_eq!(table.set(1, descriptor), Some(()));
    assert_eq!((table.set(2, descriptor), table.get(2)), (None, None));
    assert_eq!(
        (ring.load(1), pairs.load(1), table.get(1)),
        (0x1234, (0x1122_3344, 0x5566_7788), Some(descriptor))
    );
    let mut bytes = [0; 16];
    view.read(80, &mut bytes).unwrap();
    assert_eq!(bytes, [8, 7, 6, 5, 4, 3, 2, 1, 9, 0, 0, 0, 3, 0, 0xfe, 0xff]);
    view.read(28, &mut bytes[..8]).unwrap();
    assert_eq!(bytes[..8], [0x44, 0x33, 0x22, 0x11, 0x88, 0x77, 0x66, 0x55]);
}

#[test]
fn memory_far_up_and_spread_out_is_found() {
    let parts = [
        (0, 0, 0x1000),
        (0xffff_f000, 0x1_0000, 0x1000),
        (0x1_0000_0000, 0x2_0000, 0x3000),
        (1 << 46, 0x3_0000, 0x1000),
        (u64::MAX - 0x1fff, 0x4_0000, 0x1000),
    ];
    let view = View::new(Arc::new(memory(&parts).unwrap()));
    for (start, _, size) in parts {
        for at in [start, start + size - 1, start + size / 2] {
            view.write(at, &[7]).unwrap();
        }
    }
    assert!(view.write(0xffff_ffff, &[1, 2]).is_ok(), "two regions meet at 4 GiB");
    assert!(view.write((1 << 46) - 1, &[1]).is_err());
    assert!(view.write(u64::MAX, &[1]).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Look-ups against the plain truth: every byte is where it should be, or nowhere.
    #[test]
    fn any_range_is_found_exactly_when_all_of_it_is_there(
        parts in prop::collection::vec((0..40_u64, 1..5_u64), 1..10),
        ranges in prop::collection::vec((0..50 * 0x1000_u64, 1..0x4000_usize), 50),
    ) {
        let mut laid = Vec::new();
        let mut end = 0;
        for &(gap, pages) in &parts {
            // Small gaps are none: neighbours.
            let start = end + gap.saturating_sub(20) * 0x1000;
            laid.push((start, 0x100_0000 + start, pages * 0x1000));
            end = start + pages * 0x1000;
        }
        let view = View::new(Arc::new(memory(&laid).unwrap()));
        let has = |at: u64| laid.iter().any(|&(start, _, size)| at >= start && at - start < size);
        for (guest, len) in ranges {
            let whole = (guest..guest + len as u64).step_by(0x1000).chain([guest + len as u64 - 1]).all(has);
            let found = view.write(guest, &vec![1; len]);
            prop_assert_eq!(found.is_ok(), whole, "{:#x} + {:#x}", guest, len);
            let found = view.memory().user_to_guest(0x100_0000 + guest, len as u64);
            let in_one = laid.iter().any(|&(start, _, size)| guest >= start && guest + len as u64 <= start + size);
            prop_assert_eq!(found, in_one.then_some(guest));
        }
    }
}

#[test]
fn a_request_falls_into_a_bounded_number_of_pieces() {
    let parts: Vec<_> = (0..500_u64).map(|at| (at * 0x1000, at * 0x1000, 0x1000)).collect();
    let view = View::new(Arc::new(memory(&parts).unwrap()));
    let ring = view.cells(0, 16).unwrap().descriptors(0, 1).unwrap();
    let mut buffers = outboard_memory::Buffers::new(&view);
    let mut gather = view.gather(&ring, &mut buffers);
    let refused = (0..1000).find_map(|_| gather.push(0, 500 * 0x1000).err()).unwrap();
    assert!(matches!(refused, AccessError::TooManySegments { limit: 66_560 }), "{refused:?}");
    let (_, pieces) = gather.finish(false);
    assert_eq!(pieces, 66_560);
}
