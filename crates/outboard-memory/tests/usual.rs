//! The bounds of the quick way to gather a request, which its caller relies on.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use outboard_memory::{Buffers, Descriptor, Descriptors, GuestMemory, Region, Rules, View};

const GIB: u64 = 1 << 30;

/// Six gigabytes, of which nothing is ever touched but the first page.
fn rig(chain: &[(u64, u32, u16)]) -> (View, Descriptors, Buffers) {
    let region = Region::memfd(0, 6 * GIB).unwrap().0;
    let view = View::new(Arc::new(GuestMemory::new(1, vec![Arc::new(region)]).unwrap()));
    let ring = view.cells(0, 256).unwrap().descriptors(0, 16).unwrap();
    let last = chain.len() - 1;
    for (at, &(addr, len, flags)) in chain.iter().enumerate() {
        let more = if at < last { Descriptor::NEXT } else { 0 };
        let at = u16::try_from(at).unwrap();
        ring.set(at, Descriptor { addr, len, flags: flags | more, next: at + 1 }).unwrap();
    }
    // An earlier request left room for sixteen pieces.
    let buffers = room(&view, 16);
    (view, ring, buffers)
}

fn room(view: &View, most: u16) -> Buffers {
    let mut buffers = Buffers::for_requests(view, most);
    let start = view.memory().regions()[0].spec().guest_addr;
    let mut gather = view.gather_pieces(&mut buffers);
    for _ in 0..16 {
        gather.push(start, 1).unwrap();
    }
    gather.finish(false);
    buffers
}

fn rules(most: u16) -> Rules {
    Rules { most, indirect: true }
}

#[test]
fn a_request_of_more_pieces_than_allowed_is_not_usual() {
    let (view, ring, mut buffers) = rig(&[(0x1000, 1, 0); 5]);
    let mut few = room(&view, 4);
    assert_eq!(view.gather_usual(&ring, 0, &rules(16), &mut few), None);
    assert_eq!(view.gather_usual(&ring, 0, &rules(16), &mut buffers), Some(5));
    assert_eq!(buffers.readable().len(), 5);
}

#[test]
fn a_request_of_more_than_four_gigabytes_is_not_usual() {
    let part = u32::try_from(2 * GIB).unwrap();
    let (view, ring, mut buffers) = rig(&[(0, part, 0), (GIB, part, 0), (0, 1, Descriptor::WRITE)]);
    assert_eq!(view.gather_usual(&ring, 0, &rules(8), &mut buffers), None);
    // As many is left to the careful way, which takes it.
    let (view, ring, mut buffers) = rig(&[(0, part, 0), (GIB, part, Descriptor::WRITE)]);
    assert_eq!(view.gather_usual(&ring, 0, &rules(8), &mut buffers), None);
    let (view, ring, mut buffers) = rig(&[(0, part, 0), (GIB, part - 1, Descriptor::WRITE)]);
    assert_eq!(view.gather_usual(&ring, 0, &rules(8), &mut buffers), Some(2));
    assert_eq!((buffers.readable().len(), buffers.writable().len()), (2 * GIB, 2 * GIB - 1));
    assert_eq!(buffers.room(), 2 * GIB - 1);
}

#[test]
fn a_buffer_that_begins_before_a_region_or_ends_behind_it_is_not_usual() {
    // So large that both sides of its first and last address have one slot of the table.
    let (start, size) = (GIB + 0x10_0000, 3 * GIB + 0x10_0000);
    let region = Arc::new(Region::memfd(start, size).unwrap().0);
    let view = View::new(Arc::new(GuestMemory::new(1, vec![region]).unwrap()));
    let ring = view.cells(start, 16).unwrap().descriptors(0, 1).unwrap();
    let mut buffers = room(&view, 16);
    let mut is_usual = |addr: u64, len: u32| {
        ring.set(0, Descriptor { addr, len, flags: 0, next: 0 }).unwrap();
        view.gather_usual(&ring, 0, &rules(8), &mut buffers).is_some()
    };
    let end = start + size;
    assert!(is_usual(start, 0x20) && is_usual(end - 0x20, 0x20));
    for (addr, len) in [
        (start - 0x10, 0x20),
        (start - 1, 1),
        (start - 1, u32::MAX),
        (end - 0x10, 0x20),
        (end, 1),
        (end - 1, u32::MAX),
        (u64::MAX, 2),
        (u64::MAX, u32::MAX),
    ] {
        assert!(!is_usual(addr, len), "{addr:#x} {len:#x}");
    }
}

#[test]
fn a_loop_ends_where_the_room_does() {
    let (view, ring, mut buffers) = rig(&[(0, 1, 0), (0, 1, 0)]);
    ring.set(1, Descriptor { addr: 0, len: 1, flags: Descriptor::NEXT, next: 0 }).unwrap();
    assert_eq!(view.gather_usual(&ring, 0, &rules(16), &mut buffers), None);
}

#[test]
fn buffers_of_another_generation_are_let_go_before_they_are_filled() {
    let (view, ring, mut buffers) = rig(&[(0x1000, 8, Descriptor::WRITE)]);
    let other = Region::memfd(0, 0x2000).unwrap().0;
    let other = View::new(Arc::new(GuestMemory::new(2, vec![Arc::new(other)]).unwrap()));
    // A list of the other memory, with room.
    let mut foreign = Buffers::new(&other);
    for buffers in [&mut foreign, &mut buffers] {
        let mut gather = other.gather(&ring, buffers);
        gather.push(0x1000, 8).unwrap();
        gather.finish(false);
    }
    let gone = Arc::downgrade(other.memory());
    drop(other);
    assert_eq!(view.gather_usual(&ring, 0, &rules(8), &mut foreign), None, "no room yet");
    let mut gather = view.gather(&ring, &mut buffers);
    gather.turn();
    gather.push(0x1000, 8).unwrap();
    gather.finish(true);
    assert!(gone.upgrade().is_none(), "nobody holds the other memory any more");
    assert_eq!(view.gather_usual(&ring, 0, &rules(8), &mut buffers), Some(1));
    buffers.writable().write_all(&[3; 8]).unwrap();
    let mut seen = [0; 8];
    view.read(0x1000, &mut seen).unwrap();
    assert_eq!(seen, [3; 8]);
}

#[test]
fn a_tail_does_not_outlive_its_request() {
    let (view, ring, mut buffers) = rig(&[(0x1000, 8, Descriptor::WRITE)]);
    for _ in 0..2 {
        assert_eq!(view.gather_usual(&ring, 0, &rules(8), &mut buffers), Some(1));
        assert!(buffers.tail().is_empty());
        assert_eq!(buffers.tail().write_all(&[1]), None);
        buffers.split_tail(8).unwrap();
        assert_eq!(buffers.tail().len(), 8);
    }
    let mut gather = view.gather(&ring, &mut buffers);
    gather.push(0x1000, 8).unwrap();
    gather.finish(false);
    assert!(buffers.tail().is_empty());
}

#[test]
fn a_table_in_a_table_or_behind_a_buffer_is_not_usual() {
    let (view, ring, mut buffers) = rig(&[(0, 1, 0)]);
    let set = |place: u64, descriptor: Descriptor| {
        view.cells(place, 16).unwrap().descriptors(0, 1).unwrap().set(0, descriptor).unwrap();
    };
    let plain = Descriptor { addr: 0, len: 7, flags: 0, next: 0 };
    let table = |addr| Descriptor { addr, len: 16, flags: Descriptor::INDIRECT, next: 0 };
    set(0x3000, plain);
    set(0x2000, table(0x3000));
    ring.set(0, table(0x2000)).unwrap();
    assert_eq!(view.gather_usual(&ring, 0, &rules(8), &mut buffers), None);
    ring.set(0, Descriptor { flags: Descriptor::NEXT, next: 1, ..plain }).unwrap();
    ring.set(1, table(0x3000)).unwrap();
    assert_eq!(view.gather_usual(&ring, 0, &rules(8), &mut buffers), None);
    assert_eq!(view.gather_usual(&ring, 1, &rules(8), &mut buffers), Some(1));
    let none = Rules { indirect: false, ..rules(8) };
    assert_eq!(view.gather_usual(&ring, 1, &none, &mut buffers), None);
    for wrong in [
        Descriptor { len: 17, ..table(0x3000) },
        Descriptor { len: 0, ..table(0x3000) },
        Descriptor { len: 9 * 16, ..table(0x3000) },
        Descriptor { flags: Descriptor::INDIRECT | Descriptor::NEXT, ..table(0x3000) },
        table(6 * GIB - 8),
        table(u64::MAX),
    ] {
        ring.set(1, wrong).unwrap();
        assert_eq!(view.gather_usual(&ring, 1, &rules(8), &mut buffers), None, "{wrong:?}");
    }
}
