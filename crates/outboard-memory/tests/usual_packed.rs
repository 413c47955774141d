//! The bounds of the quick way to gather a request of a packed ring, which its caller relies on.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use outboard_memory::{
    Buffers, Descriptor, GuestMemory, Lap, PackedBody, PackedRing, PackedTaken, Region, View,
};

const GIB: u64 = 1 << 30;
const SIZE: u16 = 8;
/// The state of an available descriptor in an odd lap.
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
const NEXT: u16 = Descriptor::NEXT;
const WRITE: u16 = Descriptor::WRITE;
const INDIRECT: u16 = Descriptor::INDIRECT;

struct Rig {
    view: View,
    ring: PackedRing,
    buffers: Buffers,
    /// Descriptors that the driver can have made available.
    left: u16,
}

impl Rig {
    /// Six gigabytes, of which nothing is ever touched but the first pages, and a list with room for sixteen pieces.
    fn new() -> Self {
        let region = Region::memfd(0, 6 * GIB).unwrap().0;
        let view = View::new(Arc::new(GuestMemory::new(1, vec![Arc::new(region)]).unwrap()));
        let ring = view.cells(0, 256).unwrap().packed(0, SIZE).unwrap();
        let buffers = Self::buffers(&view, 16);
        Self { view, ring, buffers, left: SIZE }
    }

    fn buffers(view: &View, most: u16) -> Buffers {
        let mut buffers = Buffers::for_requests(view, most);
        let mut gather = view.gather_pieces(&mut buffers);
        for _ in 0..16 {
            gather.push(0, 1).unwrap();
        }
        gather.finish(false);
        buffers
    }

    fn set(&self, at: u16, (addr, len): (u64, u32), flags: u16) {
        self.ring.set_body(at, PackedBody { addr, len, id: 40 + at }).unwrap();
        self.ring.set_flags(at, flags, Ordering::Relaxed).unwrap();
    }

    /// What is gathered from descriptor `at` on, where at most `most` pieces are allowed.
    fn gather(&mut self, at: u16, most: u16) -> Option<PackedTaken> {
        let flags = self.ring.flags(at, Ordering::Relaxed).unwrap();
        self.buffers = Self::buffers(&self.view, most);
        let state = flags & (AVAIL | USED);
        let lap = Lap::new(&self.ring, at, state).unwrap();
        let left = 16 * u32::from(self.left);
        self.view.gather_packed(&lap, flags ^ state, left, &true, &mut self.buffers)
    }
}

#[test]
fn the_id_of_a_chain_is_that_of_its_last_descriptor() {
    let mut rig = Rig::new();
    rig.set(2, (0x1000, 16), AVAIL | NEXT);
    rig.set(3, (0x2000, 512), AVAIL | NEXT | WRITE);
    rig.set(4, (0x3000, 1), AVAIL | WRITE);
    assert_eq!(rig.gather(2, 3), Some(PackedTaken { id: 44, bytes: 48 }));
    assert_eq!((rig.buffers.readable().len(), rig.buffers.writable().len()), (16, 513));
    assert_eq!(rig.gather(2, 2), None, "more pieces than allowed");
    rig.left = 2;
    assert_eq!(rig.gather(2, 3), None, "longer than what the driver has");
    rig.left = 3;
    assert!(rig.gather(2, 3).is_some());
    rig.set(4, (0x3000, 1), AVAIL);
    assert_eq!(rig.gather(2, 3), None, "readable behind writable");
}

#[test]
fn what_follows_a_head_is_taken_only_where_it_is_available_in_the_same_lap() {
    for (head, behind, taken) in [
        (AVAIL, AVAIL, true),
        (USED, USED, true),
        (AVAIL, USED, false),
        (AVAIL, 0, false),
        (AVAIL, AVAIL | USED, false),
        (USED, AVAIL, false),
    ] {
        for write in [0, WRITE] {
            let mut rig = Rig::new();
            rig.set(0, (0x1000, 16), head | NEXT);
            rig.set(1, (0x2000, 16), behind | write);
            assert_eq!(rig.gather(0, 8).is_some(), taken, "{head:#x} {behind:#x} {write}");
        }
    }
}

#[test]
fn a_chain_that_goes_round_the_end_of_the_ring_is_not_usual() {
    let mut rig = Rig::new();
    rig.set(SIZE - 1, (0x1000, 16), AVAIL | NEXT);
    rig.set(0, (0x2000, 1), USED | WRITE);
    // What lies behind the ring looks like a descriptor that goes on.
    let longer = rig.view.cells(0, 256).unwrap().packed(0, SIZE + 1).unwrap();
    longer.set_body(SIZE, PackedBody { addr: 0x3000, len: 1, id: 0 }).unwrap();
    longer.set_flags(SIZE, AVAIL | WRITE, Ordering::Relaxed).unwrap();
    assert_eq!(rig.gather(SIZE - 1, 8), None);
    rig.set(SIZE - 1, (0x1000, 16), AVAIL);
    assert_eq!(rig.gather(SIZE - 1, 8), Some(PackedTaken { id: 40 + SIZE - 1, bytes: 16 }));
}

#[test]
fn a_request_of_more_than_four_gigabytes_is_not_usual() {
    let mut rig = Rig::new();
    let part = u32::try_from(2 * GIB).unwrap();
    rig.set(0, (0, part), AVAIL | NEXT);
    rig.set(1, (GIB, part), AVAIL | WRITE);
    assert_eq!(rig.gather(0, 8), None, "as many: the careful way takes it");
    rig.set(1, (GIB, part + 1), AVAIL | WRITE);
    assert_eq!(rig.gather(0, 8), None);
    rig.set(1, (GIB, part - 1), AVAIL | WRITE);
    assert!(rig.gather(0, 8).is_some());
}

#[test]
fn a_table_is_gathered_to_its_end_and_no_further() {
    let mut rig = Rig::new();
    let table = rig.view.cells(0x4000, 64).unwrap().packed(0, 4).unwrap();
    for (at, flags) in [(0, 0), (1, WRITE), (2, WRITE), (3, WRITE)] {
        table.set_body(at, PackedBody { addr: 0x1000, len: 8, id: 0 }).unwrap();
        table.set_flags(at, flags, Ordering::Relaxed).unwrap();
    }
    rig.set(0, (0x4000, 48), AVAIL | INDIRECT);
    assert_eq!(rig.gather(0, 4), Some(PackedTaken { id: 40, bytes: 16 }));
    assert_eq!((rig.buffers.readable().len(), rig.buffers.writable().len()), (8, 16));
    assert_eq!(rig.gather(0, 2), None, "more entries than allowed");
    table.set_flags(1, WRITE | INDIRECT, Ordering::Relaxed).unwrap();
    assert_eq!(rig.gather(0, 4), None, "a table in a table");
    for (what, flags) in [
        ((0x4000, 0), AVAIL | INDIRECT),
        ((0x4000, 40), AVAIL | INDIRECT),
        ((6 * GIB - 16, 32), AVAIL | INDIRECT),
        ((0x4000, 32), AVAIL | INDIRECT | NEXT),
    ] {
        table.set_flags(1, WRITE, Ordering::Relaxed).unwrap();
        rig.set(0, what, flags);
        assert_eq!(rig.gather(0, 4), None, "{what:?} {flags:#x}");
    }
}
