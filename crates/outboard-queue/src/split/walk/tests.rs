//! The quick walk is the careful one for the usual requests: whatever it accepts, both make the same of.

use std::sync::{Arc, LazyLock};

use outboard_memory::{Buffers, Cursor, GuestMemory, Region, View};
use proptest::prelude::*;

use super::Source;

const REGION: u64 = 0x10_0000;
const TABLE: u64 = 0x1000;

/// Three regions, of which the first two meet.
static MEMORY: LazyLock<Arc<GuestMemory>> = LazyLock::new(|| {
    let regions =
        [0, REGION, 3 * REGION].map(|start| Arc::new(Region::memfd(start, REGION).unwrap().0));
    Arc::new(GuestMemory::new(1, regions.into()).unwrap())
});

/// Where the bytes lie; empty pieces and cuts inside a row do not count.
fn bytes(cursor: &Cursor<'_>) -> Vec<(usize, usize)> {
    let pieces = cursor.segments().iter().filter(|piece| piece.len() > 0);
    pieces.map(|piece| (piece.as_ptr().addr(), piece.len())).collect()
}

fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let addr = prop_oneof![
        6 => 0x8_0000..REGION,
        2 => REGION - 600..REGION,
        3 => 3 * REGION..4 * REGION,
        1 => Just(TABLE),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![8 => 1..600_u32, 1 => Just(0_u32), 1 => Just(32_u32), 1 => any::<u32>()];
    let flags = prop_oneof![6 => Just(1_u16), 3 => Just(3_u16), 2 => Just(2_u16), 1 => 0..8_u16, 1 => any::<u16>()];
    let next = prop_oneof![9 => 0..16_u16, 1 => any::<u16>()];
    let plain = (addr, len, flags, next);
    // Tables, good and bad, also where a table leads on.
    let table = (Just(TABLE), prop_oneof![6 => (1..17_u32).prop_map(|n| 16 * n), 1 => 0..400_u32]);
    let table =
        (table, prop_oneof![8 => Just(4_u16), 1 => Just(6_u16), 1 => Just(5_u16)], 0..16_u16);
    prop_oneof![8 => plain, 1 => table.prop_map(|((addr, len), flags, next)| (addr, len, flags, next))]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn what_the_quick_walk_accepts_the_careful_one_makes_the_same_of(
        descriptors in prop::collection::vec(descriptor(), 32),
        head in 0..18_u16,
        indirect in any::<bool>(),
    ) {
        let view = View::new(Arc::clone(&MEMORY));
        for (at, &(addr, len, flags, next)) in (0..).zip(&descriptors) {
            let place = if at < 16 { 16 * at } else { TABLE + 16 * (at - 16) };
            view.write(place, &addr.to_le_bytes()).unwrap();
            view.write(place + 8, &len.to_le_bytes()).unwrap();
            view.write(place + 12, &flags.to_le_bytes()).unwrap();
            view.write(place + 14, &next.to_le_bytes()).unwrap();
        }
        let desc = view.cells(0, 16 * 16).unwrap().descriptors(0, 16).unwrap();
        let source = Source::new(desc, view.clone(), 16, indirect);
        let mut careful = Buffers::new(&view);
        let truth = source.walk_carefully(head, &mut careful);
        // Room, and what an earlier request left behind.
        let mut quick = Buffers::new(&view);
        let _ = source.walk_carefully(0, &mut quick);
        let _ = source.walk_carefully(head, &mut quick);
        if let Some(pieces) = source.walk_quickly(head, &mut quick) {
            prop_assert!(truth.is_ok(), "the quick walk took what is {:?}", truth);
            prop_assert_eq!(pieces, quick.pieces());
            prop_assert_eq!(quick.room(), careful.room());
            prop_assert_eq!(bytes(&quick.readable()), bytes(&careful.readable()));
            prop_assert_eq!(bytes(&quick.writable()), bytes(&careful.writable()));
            prop_assert_eq!(bytes(&quick.tail()), []);
        } else {
            // A chain that is usual in every way is not left to the careful walk.
            let usual = truth.is_ok() && descriptors.iter().all(|&(addr, len, flags, _)| {
                flags & 4 == 0 && len > 0 && addr % REGION + u64::from(len) <= REGION
            });
            prop_assert!(!usual);
        }
    }
}
