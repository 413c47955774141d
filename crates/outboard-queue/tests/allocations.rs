//! In the long run a request allocates nothing, on neither side, however it is laid out.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use outboard_memory::{GuestMemory, Region, View};
use outboard_queue::{Chain, DeviceQueue, DriverQueue, QueueFeatures, QueueLayout};

/// The system's allocator, counting for each thread.
struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

#[expect(unsafe_code, reason = "passes every call on as it is")]
// SAFETY: every call goes to the system's allocator with the same arguments; a `Cell` in a const thread-local allocates
// nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.set(COUNT.get() + 1);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        COUNT.set(COUNT.get() + 1);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(place, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const REGION: u64 = 1 << 20;
const SIZE: u16 = 64;

fn rig(regions: u64, features: u64) -> (DriverQueue, DeviceQueue) {
    let regions = (0..regions).map(|at| Arc::new(Region::memfd(at * REGION, REGION).unwrap().0));
    let view = View::new(Arc::new(GuestMemory::new(1, regions.collect()).unwrap()));
    let shape = QueueFeatures::from_bits(features);
    let (layout, end) = QueueLayout::at(0, SIZE, shape).unwrap();
    let mut driver = DriverQueue::new(layout, features, view.clone()).unwrap();
    driver.set_indirect_area(end, SIZE);
    let device = DeviceQueue::new(layout, features, driver.base(), view).unwrap();
    (driver, device)
}

/// One batch of requests of `pieces` writable buffers each, `depth` in flight, completed out of order.
fn batch(
    driver: &mut DriverQueue,
    device: &mut DeviceQueue,
    chains: &mut Vec<Chain>,
    (pieces, indirect, seam): (usize, bool, u64),
) {
    let writable = [(seam, 600); 40];
    for token in 0..16 {
        let (readable, writable) = ([(0x8_0000, 16)], &writable[..pieces]);
        let added = if indirect {
            driver.add_indirect(&readable, writable, token)
        } else {
            driver.add(&readable, writable, token)
        };
        if added.is_err() {
            break;
        }
    }
    driver.publish();
    while let Some(mut chain) = device.pop().unwrap() {
        let _header: [u8; 16] = chain.readable().read_obj().unwrap();
        chain.reserve_tail(1).unwrap();
        chain.writable().write_all(&[1; 100]).unwrap();
        chain.write_tail(&[0]).unwrap();
        chains.push(chain);
    }
    while let Some(chain) = chains.pop() {
        device.complete(chain, 101);
    }
    device.publish().unwrap();
    while driver.pop_used().unwrap().is_some() {}
    assert_eq!(driver.in_flight(), 0);
    assert!(!device.arm());
    driver.arm();
    device.disarm();
}

#[test]
fn no_request_allocates_once_the_queue_is_warm() {
    for regions in [1, 8] {
        for features in [0, 1 << 28 | 1 << 29, 1 << 34, 1 << 34 | 1 << 28 | 1 << 29] {
            let (mut driver, mut device) = rig(regions, features);
            let mut chains = Vec::with_capacity(usize::from(SIZE));
            // The last kind straddles two regions when there are several: the careful way.
            let seam = if regions > 1 { 3 * REGION - 300 } else { 0x9_0000 };
            let tables = features >> 28 & 1 == 1;
            let shapes = [(2, false, 0x9_0000), (2, tables, 0x9_0000), (40, tables, seam)];
            for shape in shapes {
                for _ in 0..20 {
                    batch(&mut driver, &mut device, &mut chains, shape);
                }
            }
            let before = COUNT.get();
            for _ in 0..50 {
                for shape in shapes {
                    batch(&mut driver, &mut device, &mut chains, shape);
                }
            }
            assert_eq!(COUNT.get() - before, 0, "{regions} regions, features {features:#x}");
        }
    }
}
