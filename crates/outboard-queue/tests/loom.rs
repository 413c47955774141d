//! Every interleaving of driver and device around the moment where one goes to sleep and the other looks whether it
//! must be woken, under a weak memory model. Run with `RUSTFLAGS=--cfg=outboard_loom`, in a target directory of its own.
//!
//! The tests named `…_shows_without_the_fence` run the same models with the fences taken out, and must fail.
#![cfg(outboard_loom)]
#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;
use outboard_memory::{DirtyLog, GuestMemory, Region, View, twin};
use outboard_queue::{DeviceQueue, DriverQueue, QueueFeatures, QueueLayout, RingLog};

const EVENT_IDX: u64 = 1 << 29;
const PACKED: u64 = 1 << 34;
const DATA: u64 = 0x8000;

/// Both sides of a ring of two, in memory of its own.
fn both(features: u64) -> (DriverQueue, DeviceQueue) {
    let region = Region::memfd(0, 0x1_0000).unwrap().0;
    let view = View::new(Arc::new(GuestMemory::new(1, vec![Arc::new(region)]).unwrap()));
    let shape = QueueFeatures::from_bits(features);
    // An odd size, where that is legal.
    let (layout, _) = QueueLayout::at(0, if shape.packed { 3 } else { 2 }, shape).unwrap();
    let driver = DriverQueue::new(layout, features, view.clone()).unwrap();
    let device = DeviceQueue::new(layout, features, driver.base(), view).unwrap();
    (driver, device)
}

/// The device arms and goes to sleep while the driver offers a request: the device sees the request at its last look,
/// or the driver sees that it must kick.
fn arm_against_publish(features: u64) {
    loom::model(move || {
        let (mut driver, mut device) = both(features);
        // What was seen last is that no kicks are wanted.
        device.disarm();
        let kicked = Arc::new(AtomicBool::new(false));
        let kick = Arc::clone(&kicked);
        let other = thread::spawn(move || {
            driver.add(&[(DATA, 16)], &[], 1).unwrap();
            if driver.publish() {
                kick.store(true, Ordering::Relaxed);
            }
        });
        let works = device.arm();
        other.join().unwrap();
        assert!(works || kicked.load(Ordering::Relaxed), "a kick was lost");
        // Whoever woke it, the request is there.
        assert!(device.pop().unwrap().is_some());
    });
}

/// The driver arms and goes to sleep while the device gives a request back.
fn publish_against_arm(features: u64) {
    loom::model(move || {
        let (mut driver, mut device) = both(features);
        // The first publication calls in any case: get it over with.
        driver.add(&[(DATA, 16)], &[], 1).unwrap();
        driver.publish();
        let chain = device.pop().unwrap().unwrap();
        device.complete(chain, 1);
        assert!(device.publish().unwrap());
        assert_eq!(driver.pop_used().unwrap(), Some((1, 1)));
        driver.disarm();
        driver.add(&[(DATA, 16)], &[], 2).unwrap();
        driver.publish();
        let called = Arc::new(AtomicBool::new(false));
        let call = Arc::clone(&called);
        let other = thread::spawn(move || {
            let chain = device.pop().unwrap().unwrap();
            device.complete(chain, 7);
            if device.publish().unwrap() {
                call.store(true, Ordering::Relaxed);
            }
        });
        let answered = driver.arm();
        other.join().unwrap();
        assert!(answered || called.load(Ordering::Relaxed), "a call was lost");
        assert_eq!(driver.pop_used().unwrap(), Some((2, 7)));
    });
}

/// The front-end takes marks and copies what they stand for, while the device gives a request back: what it has not
/// copied is marked still. The page is the one of the used ring; the cell is its index.
fn mark_against_take() {
    loom::model(|| {
        let (mut driver, mut device) = both(0);
        driver.add(&[(DATA, 16)], &[], 1).unwrap();
        driver.publish();
        let chain = device.pop().unwrap().unwrap();
        let (log, _file) = DirtyLog::memfd(4096).unwrap();
        let log = Arc::new(log);
        device.set_log(Some(RingLog { log: Arc::clone(&log), used: Some(0), notify: None }));
        let used = device.layout().used;
        let index = device.view().cells(used, 4).unwrap().u16_at(2).unwrap();
        let theirs = Arc::clone(&log);
        let original = index.clone();
        let other = thread::spawn(move || {
            let mut copy = None;
            theirs.take(|_| copy = Some(original.load(Ordering::Relaxed)));
            copy.unwrap_or(0)
        });
        device.complete(chain, 0);
        device.publish().unwrap();
        let mut copy = other.join().unwrap();
        log.take(|_| copy = index.load(Ordering::Relaxed));
        assert_eq!(copy, 1, "a page was written and not marked");
    });
}

#[test]
fn no_write_is_missed_by_the_front_end_that_takes_the_marks() {
    mark_against_take();
}

#[test]
#[should_panic(expected = "a page was written and not marked")]
fn a_write_that_is_missed_shows_without_the_fence() {
    twin::without_fences(mark_against_take);
}

#[test]
fn no_kick_is_lost_when_the_device_arms_by_flag() {
    arm_against_publish(0);
}

#[test]
fn no_kick_is_lost_when_the_device_arms_by_event() {
    arm_against_publish(EVENT_IDX);
}

#[test]
fn no_call_is_lost_when_the_driver_arms_by_flag() {
    publish_against_arm(0);
}

#[test]
fn no_call_is_lost_when_the_driver_arms_by_event() {
    publish_against_arm(EVENT_IDX);
}

#[test]
fn no_kick_is_lost_when_the_device_of_a_packed_ring_arms() {
    arm_against_publish(PACKED);
    arm_against_publish(PACKED | EVENT_IDX);
}

#[test]
fn no_call_is_lost_when_the_driver_of_a_packed_ring_arms() {
    publish_against_arm(PACKED);
    publish_against_arm(PACKED | EVENT_IDX);
}

#[test]
#[should_panic(expected = "a kick was lost")]
fn a_lost_kick_of_a_packed_ring_shows_without_the_fence() {
    twin::without_fences(|| arm_against_publish(PACKED | EVENT_IDX));
}

#[test]
#[should_panic(expected = "a call was lost")]
fn a_lost_call_of_a_packed_ring_shows_without_the_fence() {
    twin::without_fences(|| publish_against_arm(PACKED | EVENT_IDX));
}

/// Both sides write the same descriptors, in batches of several: whoever sees the first one of a batch sees all of it,
/// over the end of the ring too.
#[test]
fn what_the_first_descriptor_of_a_packed_batch_stands_for_is_there() {
    loom::model(|| {
        let (mut driver, mut device) = both(PACKED);
        // One request, so that the batch goes over the end.
        driver.add(&[(DATA, 16)], &[], 1).unwrap();
        driver.publish();
        let chain = device.pop().unwrap().unwrap();
        device.complete(chain, 1);
        device.publish().unwrap();
        assert_eq!(driver.pop_used().unwrap(), Some((1, 1)));
        let other = thread::spawn(move || {
            driver.add(&[(DATA, 16)], &[(DATA + 0x100, 8)], 3).unwrap();
            driver.add(&[(DATA, 5)], &[], 4).unwrap();
            driver.publish();
            let first = driver.pop_used().unwrap();
            assert!(matches!(first, None | Some((3, 8))), "{first:?}");
            if first.is_some() {
                assert_eq!(driver.pop_used().unwrap(), Some((4, 0)));
            }
        });
        if let Some(mut first) = device.pop().unwrap() {
            assert_eq!((first.readable().len(), first.writable().len()), (16, 8));
            let mut second = device.pop().unwrap().unwrap();
            assert_eq!((second.readable().len(), second.writable().len()), (5, 0));
            device.complete(first, 8);
            device.complete(second, 0);
            device.publish().unwrap();
        }
        other.join().unwrap();
    });
}

#[test]
#[should_panic(expected = "a kick was lost")]
fn a_lost_kick_by_flag_shows_without_the_fence() {
    twin::without_fences(|| arm_against_publish(0));
}

#[test]
#[should_panic(expected = "a kick was lost")]
fn a_lost_kick_by_event_shows_without_the_fence() {
    twin::without_fences(|| arm_against_publish(EVENT_IDX));
}

#[test]
#[should_panic(expected = "a call was lost")]
fn a_lost_call_by_flag_shows_without_the_fence() {
    twin::without_fences(|| publish_against_arm(0));
}

#[test]
#[should_panic(expected = "a call was lost")]
fn a_lost_call_by_event_shows_without_the_fence() {
    twin::without_fences(|| publish_against_arm(EVENT_IDX));
}

/// A chain and what it speaks of are whole when the index covers them, in both directions, also for a device that
/// looks at the wrong moment.
#[test]
fn what_an_index_covers_is_there() {
    loom::model(|| {
        let (mut driver, mut device) = both(EVENT_IDX);
        let other = thread::spawn(move || {
            driver.add(&[(DATA, 16)], &[(DATA + 0x100, 8)], 3).unwrap();
            driver.publish();
            driver
        });
        if let Some(mut chain) = device.pop().unwrap() {
            assert_eq!((chain.readable().len(), chain.writable().len()), (16, 8));
            device.complete(chain, 8);
            device.publish().unwrap();
        }
        let mut driver = other.join().unwrap();
        if let Some(answer) = driver.pop_used().unwrap() {
            assert_eq!(answer, (3, 8));
        }
    });
}

/// The answer is whole when the driver sees it.
#[test]
fn what_a_used_index_covers_is_there() {
    loom::model(|| {
        let (mut driver, mut device) = both(0);
        driver.add(&[(DATA, 16)], &[(DATA + 0x100, 8)], 3).unwrap();
        driver.publish();
        let other = thread::spawn(move || {
            let chain = device.pop().unwrap().unwrap();
            device.complete(chain, 8);
            device.publish().unwrap();
        });
        if let Some(answer) = driver.pop_used().unwrap() {
            assert_eq!(answer, (3, 8));
        }
        other.join().unwrap();
        drop(driver);
    });
}

/// A queue moves to another thread (from the handler to a worker, and back) with a request half done.
#[test]
fn a_queue_that_moves_to_another_thread_goes_on_where_it_was() {
    loom::model(|| {
        let (mut driver, mut device) = both(EVENT_IDX);
        driver.add(&[(DATA, 16)], &[], 1).unwrap();
        driver.publish();
        let chain = device.pop().unwrap().unwrap();
        let worker = thread::spawn(move || {
            device.complete(chain, 4);
            device.publish().unwrap();
            while let Some(chain) = device.pop().unwrap() {
                device.complete(chain, 4);
            }
            device.publish().unwrap();
            device
        });
        driver.add(&[(DATA, 16)], &[], 2).unwrap();
        driver.publish();
        let mut device = worker.join().unwrap();
        while let Some(chain) = device.pop().unwrap() {
            device.complete(chain, 4);
        }
        device.publish().unwrap();
        let mut answered = 0;
        while driver.pop_used().unwrap().is_some() {
            answered += 1;
        }
        assert_eq!((answered, device.in_flight(), device.base()), (2, 0, 2));
    });
}
