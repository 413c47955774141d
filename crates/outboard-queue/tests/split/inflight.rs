//! What an in-flight region may hold when a ring takes it up: what a device left, or whatever a peer put there (cases A76,
//! A77). Deaths between stores are tried in `loom_deaths`.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use outboard_memory::{SharedArea, View, Window};
use outboard_queue::{DeviceQueue, InflightArea, QueueLayout, RingError};
use proptest::prelude::*;

use crate::rig::*;

const SIZE: u16 = 8;

struct Region {
    window: Arc<Window>,
    file: OwnedFd,
}

impl Region {
    fn new() -> Self {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = rustix::fs::memfd_create("region", flags).unwrap();
        rustix::fs::ftruncate(&file, InflightArea::size(SIZE)).unwrap();
        let ours = file.try_clone().unwrap();
        let window = Window::map(ours, 0, InflightArea::size(SIZE), true).unwrap();
        Self { window: Arc::new(window), file }
    }

    fn area(&self) -> InflightArea {
        InflightArea::new(&self.window, 0, SIZE).unwrap()
    }

    fn raw(&self) -> SharedArea {
        SharedArea::new(&self.window, 0, InflightArea::size(SIZE)).unwrap()
    }

    /// As a device of version 1 left it: used index, head of the list; per head in flight, next, counter.
    fn left(used: u16, last: u16, entries: &[(u16, u8, u16, u64)]) -> Self {
        let region = Self::new();
        let raw = region.raw();
        raw.store16(8, 1);
        raw.store16(10, SIZE);
        raw.store16(12, last);
        raw.store16(14, used);
        for &(head, in_flight, next, counter) in entries {
            let at = 16 + 16 * usize::from(head);
            raw.store8(at, in_flight);
            raw.store16(at + 6, next);
            raw.store64(at + 8, counter);
        }
        region
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(InflightArea::size(SIZE)).unwrap()];
        rustix::io::pread(&self.file, &mut bytes, 0).unwrap();
        bytes
    }
}

/// A ring whose eight descriptors are requests of 16 bytes, with these indices.
fn ring(avail: u16, used: u16) -> (View, QueueLayout) {
    let rig = Rig::new(SIZE, 0);
    for head in 0..SIZE {
        rig.desc(head, DATA + 0x100 * u64::from(head), 16, 0, 0);
        rig.view.write(rig.layout.avail + 4 + 2 * u64::from(head), &head.to_le_bytes()).unwrap();
    }
    rig.view.write(rig.layout.avail + 2, &avail.to_le_bytes()).unwrap();
    rig.view.write(rig.layout.used + 2, &used.to_le_bytes()).unwrap();
    (rig.view, rig.layout)
}

fn device(region: &Region, avail: u16, used: u16) -> Result<DeviceQueue, RingError> {
    let (view, layout) = ring(avail, used);
    let mut device = DeviceQueue::new(layout, 0, 0, view)?;
    device.set_inflight(region.area()).map(|()| device)
}

fn owed(device: &mut DeviceQueue) -> Vec<u16> {
    let mut heads = Vec::new();
    while let Some(chain) = device.pop_owed().unwrap() {
        heads.push(chain.head());
        device.complete(chain, 0);
    }
    heads
}

fn wrong(region: &Region, used: u16) -> RingError {
    let before = region.bytes();
    let error = device(region, 8, used).unwrap_err();
    assert_eq!(region.bytes(), before, "nothing was written");
    error
}

#[test]
fn what_is_in_flight_is_owed_in_the_order_of_its_counters() {
    let region = Region::left(5, 0, &[(0, 1, 0, 70), (3, 1, 0, 68), (6, 1, 0, 69), (7, 0, 0, 1)]);
    // Eight are available, five used, three in flight.
    let mut device = device(&region, 8, 5).unwrap();
    assert_eq!((device.owed(), device.in_flight(), device.base()), (3, 0, 8));
    assert!(device.pop().unwrap().is_none(), "nothing new is there");
    let first = device.pop_owed().unwrap().unwrap();
    assert_eq!((first.head(), device.owed(), device.in_flight()), (3, 2, 1));
    assert_eq!(owed(&mut device), [6, 0]);
    device.complete(first, 0);
    device.publish().unwrap();
    assert_eq!((device.in_flight(), region.raw().load16(14)), (0, Some(8)));
    // What is taken next has a newer counter.
    let view = device.view().clone();
    view.write(device.layout().avail + 2, &[9, 0]).unwrap();
    let chain = device.pop().unwrap().unwrap();
    assert_eq!(region.raw().load64(16 + 8), Some(71));
    assert_eq!(region.raw().load8(16), Some(1));
    device.complete(chain, 0);
}

#[test]
fn a_batch_that_was_shown_and_not_struck_off_is_struck_off() {
    // Heads 2, 5, 1 were the batch, 2 the newest; 5 was struck off already. 4 is in flight.
    let entries = [(2, 1, 5, 3), (5, 0, 1, 2), (1, 1, 7, 1), (4, 1, 0, 9)];
    let region = Region::left(4, 2, &entries);
    let mut device = device(&region, 8, 7).unwrap();
    assert_eq!((device.owed(), device.base()), (1, 8));
    assert_eq!(owed(&mut device), [4]);
    let raw = region.raw();
    assert_eq!(
        (raw.load8(16 + 32), raw.load8(16 + 16), raw.load16(14)),
        (Some(0), Some(0), Some(7))
    );
}

#[test]
fn a_fresh_area_is_prepared_and_the_base_stays() {
    let region = Region::new();
    region.raw().store8(16 + 32, 1);
    let (view, layout) = ring(7, 5);
    let mut device = DeviceQueue::new(layout, 0, 6, view).unwrap();
    device.set_inflight(region.area()).unwrap();
    assert_eq!((device.owed(), device.base()), (0, 6));
    let raw = region.raw();
    let head = (raw.load16(8), raw.load16(10), raw.load16(12), raw.load16(14));
    assert_eq!(head, (Some(1), Some(SIZE), Some(0), Some(5)));
    assert_eq!(raw.load8(16 + 32), Some(0), "whatever was there");
}

#[test]
fn with_nothing_in_flight_the_ring_goes_on_behind_what_is_used_wherever_the_region_stood() {
    // A ring that was set up anew: the list leads in a circle, the index is another one.
    let region = Region::left(4711, 3, &[(3, 0, 3, 5)]);
    let device = device(&region, 2, 0).unwrap();
    assert_eq!((device.base(), device.owed(), region.raw().load16(14)), (0, 0, Some(0)));
}

/// A77: what no device leaves behind is refused by name, and nothing is written.
#[test]
fn a77_nonsense_in_a_region_is_refused_by_name() {
    let inflight = |field, value| RingError::Inflight { field, value };
    let one = (4, 1, 0, 1);
    let region = Region::left(0, 0, &[one]);
    region.raw().store16(8, 77);
    assert_eq!(wrong(&region, 0), inflight("version", 77));
    let region = Region::left(0, 0, &[one]);
    region.raw().store64(0, 2);
    assert_eq!(wrong(&region, 0), inflight("features", 2));
    for entries in [0, 7, 9, u16::MAX] {
        let region = Region::left(0, 0, &[one]);
        region.raw().store16(10, entries);
        assert_eq!(wrong(&region, 0), inflight("desc_num", entries.into()));
    }
    // The head of the list, and its links, outside of the ring.
    assert_eq!(wrong(&Region::left(0, 8, &[one]), 1), inflight("batch list", 8));
    assert_eq!(wrong(&Region::left(0, u16::MAX, &[one]), 1), inflight("batch list", 65535));
    assert_eq!(wrong(&Region::left(0, 2, &[one, (2, 1, 9, 0)]), 2), inflight("batch list", 9));
    // A circle, of one and of two.
    assert_eq!(wrong(&Region::left(0, 2, &[one, (2, 1, 2, 0)]), 2), inflight("batch list", 2));
    let circle = [one, (2, 1, 3, 0), (3, 1, 2, 0)];
    assert_eq!(wrong(&Region::left(0, 2, &circle), 3), inflight("batch list", 2));
    // More used since the last batch than the ring has entries.
    assert_eq!(wrong(&Region::left(0, 0, &[one]), 9), inflight("used_idx", 9));
    assert_eq!(wrong(&Region::left(1, 0, &[one]), 0), inflight("used_idx", 65535));
}

/// A76: the ring must fit.
#[test]
fn a76_a_ring_larger_than_its_area_is_refused_and_a_smaller_one_served() {
    let region = Region::new();
    let view = View::new(memory());
    let (layout, _) = QueueLayout::split_at(0, 16).unwrap();
    let mut device = DeviceQueue::new(layout, 0, 0, view.clone()).unwrap();
    let refused = device.set_inflight(region.area()).unwrap_err();
    assert_eq!(refused, RingError::Inflight { field: "number of entries", value: 8 });
    let (layout, _) = QueueLayout::split_at(0, 4).unwrap();
    let mut device = DeviceQueue::new(layout, 0, 0, view).unwrap();
    device.set_inflight(region.area()).unwrap();
    assert_eq!(region.raw().load16(10), Some(SIZE), "the area's own number");
}

/// A77: an owed head whose descriptors are nonsense breaks the ring, as it would in any request.
#[test]
fn a77_an_owed_head_is_walked_by_the_same_rules_as_any() {
    let region = Region::left(0, 0, &[(4, 1, 0, 1)]);
    let (view, layout) = ring(1, 0);
    view.write(layout.desc + 16 * 4, &u64::MAX.to_le_bytes()).unwrap();
    let mut device = DeviceQueue::new(layout, 0, 0, view).unwrap();
    device.set_inflight(region.area()).unwrap();
    assert!(matches!(device.pop_owed(), Err(RingError::Buffer { head: 4, .. })));
    assert!(device.is_broken());
    assert!(device.pop_owed().unwrap().is_none() && device.pop().unwrap().is_none());
}

/// A driver that offers again what is still owed is found out.
#[test]
fn a_head_that_is_owed_cannot_be_taken_from_the_ring_too() {
    let region = Region::left(0, 0, &[(0, 1, 0, 1)]);
    // Head 0 was taken; the second entry offers it again.
    let (view, layout) = ring(2, 0);
    view.write(layout.avail + 4 + 2, &[0, 0]).unwrap();
    let mut device = DeviceQueue::new(layout, 0, 0, view).unwrap();
    device.set_inflight(region.area()).unwrap();
    let held = device.pop_owed().unwrap().unwrap();
    assert_eq!(device.pop().unwrap_err(), RingError::HeadInFlight { head: 0 });
    device.complete(held, 0);
}

/// A region that the front-end cuts short under the ring.
#[test]
fn a_region_cut_short_under_the_ring_leaves_the_ring_alone() {
    let region = Region::new();
    let (view, layout) = ring(8, 0);
    let mut device = DeviceQueue::new(layout, 0, 0, view).unwrap();
    let area = region.area();
    device.set_inflight(area.clone()).unwrap();
    rustix::fs::ftruncate(&region.file, 0).unwrap();
    for _ in 0..8 {
        let chain = device.pop().unwrap().unwrap();
        device.complete(chain, 0);
    }
    device.publish().unwrap();
    assert!(area.is_poisoned() && !device.is_broken());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Any bytes at all: refused, or taken up and served to the end, and nothing outside is touched.
    #[test]
    fn a77_any_bytes_in_a_region_are_refused_or_served(
        bytes in prop::collection::vec(any::<u8>(), 144),
        shape in 0..8_u8,
        used in any::<u16>(),
        ahead in 0..12_u16,
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
            raw.store16(14, used.wrapping_sub(u16::from(shape)));
        }
        if shape > 3 {
            for (head, byte) in bytes.iter().take(8).enumerate() {
                raw.store16(16 + 16 * head + 6, u16::from(*byte) % 9);
            }
            raw.store16(12, u16::from(bytes[9]) % 9);
        }
        if let Ok(mut device) = device(&region, used.wrapping_add(ahead), used) {
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
