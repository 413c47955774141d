//! What an in-flight region may hold when a packed ring takes it up: what a device left, or whatever a peer put there
//! (cases A76, A77). Deaths between stores are tried in `loom_deaths`.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use outboard_memory::{SharedArea, View, Window};
use outboard_queue::{Chain, DeviceQueue, InflightArea, QueueLayout, RingError};
use proptest::prelude::*;

use crate::rig::*;

const SIZE: u16 = 8;
/// Wrap counters of 1, now and old.
const LAP_ONE: u64 = 1 << 32 | 1 << 40;

struct Region {
    window: Arc<Window>,
    file: OwnedFd,
}

/// An entry as a device left it: its place, in flight, next, last, number, counter.
type Entry = (u16, u8, u16, u16, u16, u64);

impl Region {
    fn new() -> Self {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = rustix::fs::memfd_create("region", flags).unwrap();
        rustix::fs::ftruncate(&file, InflightArea::packed_size(SIZE)).unwrap();
        let ours = file.try_clone().unwrap();
        let window = Window::map(ours, 0, InflightArea::packed_size(SIZE), true).unwrap();
        Self { window: Arc::new(window), file }
    }

    fn area(&self) -> InflightArea {
        InflightArea::packed(&self.window, 0, SIZE).unwrap()
    }

    fn raw(&self) -> SharedArea {
        SharedArea::new(&self.window, 0, InflightArea::packed_size(SIZE)).unwrap()
    }

    /// As a device of version 1 left it: free head and old one, used index and old one in the first lap. Entries are
    /// linked one to the next unless they are given; each holds the request whose id is its place.
    fn left(free: (u16, u16), used: (u16, u16), entries: &[Entry]) -> Self {
        let region = Self::new();
        let raw = region.raw();
        raw.store16(8, 1);
        raw.store16(10, SIZE);
        raw.store16(12, free.0);
        raw.store16(14, free.1);
        raw.store64(16, u64::from(used.0) | u64::from(used.1) << 16 | LAP_ONE);
        for at in 0..SIZE {
            let place = 32 + 32 * usize::from(at);
            raw.store16(place + 2, at + 1);
            raw.store16(place + 16, at);
            raw.store64(place + 24, DATA + 0x100 * u64::from(at));
        }
        for &(at, in_flight, next, last, count, counter) in entries {
            let place = 32 + 32 * usize::from(at);
            raw.store8(place, in_flight);
            raw.store16(place + 2, next);
            raw.store16(place + 4, last);
            raw.store16(place + 6, count);
            raw.store64(place + 8, counter);
        }
        region
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(InflightArea::packed_size(SIZE)).unwrap()];
        rustix::io::pread(&self.file, &mut bytes, 0).unwrap();
        bytes
    }

    fn in_flight(&self) -> Vec<u16> {
        let raw = self.raw();
        (0..SIZE).filter(|at| raw.load8(32 + 32 * usize::from(*at)) != Some(0)).collect()
    }
}

/// A ring in its first lap whose first `count` descriptors are requests of 16 bytes, the id of each its place.
fn ring(count: u16) -> (View, QueueLayout) {
    let view = View::new(memory());
    let (layout, _) = QueueLayout::packed_at(0, SIZE).unwrap();
    for at in 0..count {
        put(&view, at, AVAIL);
    }
    (view, layout)
}

fn put(view: &View, at: u16, flags: u16) {
    let place = 16 * u64::from(at);
    view.write(place, &(DATA + 0x100 * u64::from(at)).to_le_bytes()).unwrap();
    view.write(place + 8, &16_u32.to_le_bytes()).unwrap();
    view.write(place + 12, &at.to_le_bytes()).unwrap();
    view.write(place + 14, &flags.to_le_bytes()).unwrap();
}

fn flags(view: &View, at: u16) -> u16 {
    let mut bytes = [0; 2];
    view.read(16 * u64::from(at) + 14, &mut bytes).unwrap();
    u16::from_le_bytes(bytes)
}

fn device_on(
    region: &Region,
    (view, layout): (View, QueueLayout),
) -> Result<DeviceQueue, RingError> {
    let mut device = DeviceQueue::new(layout, PACKED, FRESH, view)?;
    device.set_inflight(region.area()).map(|()| device)
}

fn owed(device: &mut DeviceQueue) -> Vec<u16> {
    let mut ids = Vec::new();
    while let Some(chain) = device.pop_owed().unwrap() {
        ids.push(chain.head());
        device.complete(chain, 0);
    }
    ids
}

fn pop(device: &mut DeviceQueue) -> Chain {
    device.pop().unwrap().unwrap()
}

fn wrong(region: &Region) -> RingError {
    let before = region.bytes();
    let error = device_on(region, ring(SIZE)).unwrap_err();
    assert_eq!(region.bytes(), before, "nothing was written");
    error
}

fn inflight(field: &'static str, value: u64) -> RingError {
    RingError::Inflight { field, value }
}

#[test]
fn what_is_in_flight_is_owed_in_the_order_of_its_counters_wherever_the_ring_has_it_now() {
    let entries = [(0, 1, 1, 0, 1, 70), (1, 1, 2, 1, 1, 68), (2, 1, 3, 2, 1, 69)];
    let region = Region::left((3, 3), (2, 2), &entries);
    // Five were taken, two used: their descriptors were written over.
    let (view, layout) = ring(5);
    put(&view, 0, AVAIL | USED);
    put(&view, 1, AVAIL | USED);
    let mut device = device_on(&region, (view.clone(), layout)).unwrap();
    assert_eq!((device.owed(), device.in_flight(), device.is_idle()), (3, 0, true));
    assert_eq!(device.base(), 0x8002_8005);
    assert!(device.pop().unwrap().is_none(), "nothing new is there");
    assert_eq!(owed(&mut device), [1, 2, 0]);
    device.publish().unwrap();
    assert_eq!((device.in_flight(), device.is_idle(), device.base()), (0, true, 0x8005_8005));
    assert_eq!(region.in_flight(), []);
    assert_eq!(region.raw().load16(16), Some(5));
    // What is taken next has a newer counter.
    put(&view, 5, AVAIL);
    let chain = pop(&mut device);
    let entry = region.in_flight();
    assert_eq!(entry.len(), 1);
    assert_eq!(region.raw().load64(32 + 32 * usize::from(entry[0]) + 8), Some(71));
    device.complete(chain, 0);
}

/// The first descriptor of a batch is the driver's already: the batch was shown.
#[test]
fn a_batch_that_was_shown_and_not_struck_off_is_struck_off() {
    // Entries 0 and 1 were given back: free, in front of the others, and still marked.
    let entries = [(0, 1, 3, 0, 1, 7), (1, 1, 0, 1, 1, 8), (2, 1, 3, 2, 1, 9)];
    let region = Region::left((1, 3), (2, 0), &entries);
    let (view, layout) = ring(3);
    put(&view, 0, AVAIL | USED);
    put(&view, 1, AVAIL | USED);
    let mut device = device_on(&region, (view, layout)).unwrap();
    assert_eq!((device.owed(), device.base()), (1, 0x8002_8003));
    assert_eq!(region.in_flight(), [2]);
    assert_eq!(owed(&mut device), [2]);
}

/// It is not: whatever was written behind it is taken back, or the driver would find it behind another one.
#[test]
fn a_batch_that_was_not_shown_is_owed_again_and_taken_back_from_the_ring() {
    let entries = [(0, 1, 3, 0, 1, 7), (1, 1, 0, 1, 1, 8), (2, 1, 3, 2, 1, 9)];
    let region = Region::left((1, 3), (2, 0), &entries);
    let (view, layout) = ring(3);
    put(&view, 1, AVAIL | USED);
    let mut device = device_on(&region, (view.clone(), layout)).unwrap();
    assert_eq!(flags(&view, 1) & (AVAIL | USED), AVAIL);
    assert_eq!((device.owed(), device.base()), (3, 0x8000_8003));
    assert_eq!(owed(&mut device), [0, 1, 2]);
}

#[test]
fn a_fresh_area_is_prepared_and_the_base_stays() {
    let region = Region::new();
    region.raw().store8(32 + 64, 1);
    let (view, layout) = ring(3);
    let mut device = DeviceQueue::new(layout, PACKED, 0x8001_8001, view).unwrap();
    device.set_inflight(region.area()).unwrap();
    assert_eq!((device.owed(), device.base()), (0, 0x8001_8001));
    let raw = region.raw();
    assert_eq!((raw.load16(8), raw.load16(10)), (Some(1), Some(SIZE)));
    assert_eq!(raw.load64(16), Some(0x0001_0001 | LAP_ONE));
    assert_eq!(raw.load64(32 + 64), Some(3 << 16), "free, linked to the next");
}

/// A guest that starts anew zeroes its ring; the front-end keeps the region.
#[test]
fn with_nothing_in_flight_a_ring_that_was_set_up_anew_begins_where_the_front_end_says() {
    let region = Region::left((0, 0), (5, 5), &[]);
    let device = device_on(&region, ring(2)).unwrap();
    assert_eq!((device.base(), device.owed()), (FRESH, 0));
    assert_eq!(region.raw().load64(16), Some(LAP_ONE));
}

/// A77: what no device leaves behind is refused by name, and nothing is written.
#[test]
fn a77_nonsense_in_a_region_is_refused_by_name() {
    let one = (0, 1, 1, 0, 1, 1);
    let left = |entries: &[Entry]| Region::left((1, 1), (0, 0), entries);
    let region = left(&[one]);
    region.raw().store16(8, 77);
    assert_eq!(wrong(&region), inflight("version", 77));
    let region = left(&[one]);
    region.raw().store64(0, 2);
    assert_eq!(wrong(&region), inflight("features", 2));
    for entries in [0, 7, 9, u16::MAX] {
        let region = left(&[one]);
        region.raw().store16(10, entries);
        assert_eq!(wrong(&region), inflight("desc_num", entries.into()));
    }
    assert_eq!(wrong(&Region::left((1, 1), (8, 0), &[one])), inflight("used_idx", 8));
    assert_eq!(wrong(&Region::left((1, 1), (0, 9), &[one])), inflight("used_idx", 9));
    // A free list in a circle.
    assert_eq!(wrong(&left(&[one, (4, 0, 2, 0, 0, 0)])), inflight("free list", 2));
    // A chain of no descriptor, of more than the ring has, into free entries, out of the area, to another end.
    assert_eq!(wrong(&left(&[(0, 1, 1, 0, 0, 1)])), inflight("num", 0));
    assert_eq!(wrong(&left(&[(0, 1, 1, 0, 9, 1)])), inflight("num", 9));
    assert_eq!(wrong(&left(&[(0, 1, 1, 1, 2, 1)])), inflight("next", 1));
    assert_eq!(wrong(&left(&[(0, 1, 99, 1, 2, 1)])), inflight("next", 99));
    assert_eq!(wrong(&left(&[(0, 1, 1, 3, 1, 1)])), inflight("last", 3));
}

/// A76: the ring must fit, and be of the area's layout.
/// Nothing is in flight, and the free entries do not lead on: they cannot hold a chain of two.
#[test]
fn a77_a_chain_that_cannot_be_noted_is_not_taken_and_not_in_flight() {
    let region = Region::left((7, 7), (0, 0), &[]);
    let (view, layout) = ring(2);
    put(&view, 0, AVAIL | NEXT);
    let mut device = device_on(&region, (view, layout)).unwrap();
    assert_eq!(device.pop().unwrap_err(), inflight("free head", 8));
    assert_eq!((device.in_flight(), device.is_idle(), region.in_flight().len()), (0, true, 0));
}

#[test]
fn a76_a_ring_larger_than_its_area_or_of_another_layout_is_refused() {
    let region = Region::new();
    let view = View::new(memory());
    let make = |size: u16, features| {
        let lay =
            if features & PACKED != 0 { QueueLayout::packed_at } else { QueueLayout::split_at };
        let base = if features & PACKED != 0 { FRESH } else { 0 };
        DeviceQueue::new(lay(0, size).unwrap().0, features, base, view.clone()).unwrap()
    };
    let refused = make(16, PACKED).set_inflight(region.area()).unwrap_err();
    assert_eq!(refused, inflight("number of entries", 8));
    assert!(make(SIZE, 0).set_inflight(region.area()).is_err(), "split");
    let split = InflightArea::new(&region.window, 0, SIZE).unwrap();
    assert!(make(SIZE, PACKED).set_inflight(split).is_err(), "packed");
    make(5, PACKED).set_inflight(region.area()).unwrap();
    assert_eq!(region.raw().load16(10), Some(SIZE), "the area's own number");
}

/// A77: an owed request whose descriptors are nonsense breaks the ring, as any would.
#[test]
fn a77_an_owed_request_is_walked_by_the_same_rules_as_any() {
    let region = Region::left((1, 1), (0, 0), &[(0, 1, 1, 0, 1, 1)]);
    region.raw().store64(32 + 24, u64::MAX);
    region.raw().store64(32 + 16, 16 << 32);
    let mut device = device_on(&region, ring(1)).unwrap();
    assert!(matches!(device.pop_owed(), Err(RingError::Buffer { .. })));
    assert!(device.is_broken());
    assert!(device.pop_owed().unwrap().is_none() && device.pop().unwrap().is_none());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Any bytes at all: refused, or taken up and served to the end, and nothing outside is touched.
    #[test]
    fn a77_any_bytes_in_a_region_are_refused_or_served(
        bytes in prop::collection::vec(any::<u8>(), 288),
        shape in 0..8_u8,
    ) {
        let region = Region::new();
        let raw = region.raw();
        for (at, byte) in bytes.iter().enumerate() {
            raw.store8(at, *byte);
        }
        // Mostly a head that passes, so that what is behind it is looked at.
        if shape > 0 {
            raw.store64(0, 0);
            raw.store16(8, 1);
            raw.store16(10, SIZE);
        }
        if shape > 1 {
            for field in [12, 14, 16, 18] {
                raw.store16(field, u16::from(bytes[field]) % 8);
            }
        }
        if shape > 3 {
            for entry in 0..usize::from(SIZE) {
                let place = 32 + 32 * entry;
                raw.store8(place, bytes[place] & 1);
                for field in [2, 4, 6] {
                    raw.store16(place + field, u16::from(bytes[place + field]) % 9);
                }
                if shape > 5 {
                    // Chains of one, or of two neighbours.
                    let two = u16::from(bytes[place] & 2 != 0 && entry < 7);
                    let first = u16::try_from(entry).unwrap();
                    raw.store16(place + 2, first + 1);
                    raw.store16(place + 4, first + two);
                    raw.store16(place + 6, 1 + two);
                }
            }
            if shape > 5 {
                raw.store16(12, SIZE);
                raw.store16(14, SIZE);
            }
        }
        if let Ok(mut device) = device_on(&region, ring(SIZE)) {
            let mut served = 0;
            loop {
                let next = match device.pop_owed() {
                    Ok(None) => device.pop(),
                    other => other,
                };
                let Ok(Some(chain)) = next else { break };
                device.complete(chain, 0);
                served += 1;
                prop_assert!(served <= 16);
            }
            let _ = device.publish();
            prop_assert_eq!(device.in_flight(), 0);
        }
    }
}
