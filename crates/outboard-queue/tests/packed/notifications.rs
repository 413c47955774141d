//! Who is told when, by event structures (B34 to B38, B45; virtio 1.3 §2.8.8, §2.8.10, §2.8.14).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use outboard_queue::{DeviceQueue, DriverQueue, QueueLayout};

use crate::rig::*;

const ENABLE: u16 = 0;
const DISABLE: u16 = 1;
const DESC: u16 = 2;

impl Rig {
    /// What the driver asks for.
    fn asks(&self, place: u16, flags: u16) {
        self.view.write(self.layout.avail, &place.to_le_bytes()).unwrap();
        self.view.write(self.layout.avail + 2, &flags.to_le_bytes()).unwrap();
    }

    /// Serves `count` requests in one batch and says whether a call is due.
    fn serve_batch(&mut self, count: u16) -> bool {
        for id in 0..count {
            self.offer(id, &[(DATA, 16, 0)]);
            let chain = self.take();
            self.device.complete(chain, 0);
        }
        self.device.publish().unwrap()
    }
}

#[test]
fn the_first_publication_calls_whatever_the_driver_asked_for() {
    for features in [0, EVENT_IDX] {
        let mut rig = Rig::new(6, features);
        rig.asks(0, DISABLE);
        assert!(!rig.device.publish().unwrap(), "nothing to show is nothing to call for");
        assert!(rig.serve_batch(1));
        assert!(!rig.serve_batch(1));
    }
}

#[test]
fn b34_a_call_is_due_when_the_place_is_passed() {
    let mut rig = Rig::new(6, EVENT_IDX);
    rig.serve_batch(1);
    // From index 1 on. The wrap counter of the place is bit 15.
    for (place, count, due) in [
        (0x8001_u16, 1, true),
        (0x8001, 1, false),
        (0x8003, 1, true),
        (0x0000, 1, false),
        // Index 5 and round the end.
        (0x0000, 2, true),
        (0x0000, 1, false),
        (0x0005, 3, false),
        (0x8000, 1, false),
        (0x8000, 1, true),
    ] {
        rig.asks(place, DESC);
        let from = (rig.at, rig.wrap);
        assert_eq!(rig.serve_batch(count), due, "{place:#x} from {from:?} by {count}");
    }
}

#[test]
fn b35_b45_reserved_flags_and_places_outside_the_ring_count_as_a_wish() {
    let mut rig = Rig::new(6, EVENT_IDX);
    rig.serve_batch(1);
    for (place, flags, due) in [
        (0, ENABLE, true),
        (0, DISABLE, false),
        (0, 3, true),
        (0, 0xfffc, true),
        (0, 0xfffd, false),
        (0x8006, DESC, true),
        (0xffff, DESC, true),
        (0x7fff, DESC, true),
    ] {
        rig.asks(place, flags);
        assert_eq!(rig.serve_batch(1), due, "{place:#x} {flags:#x}");
    }
    // Without the feature a place means nothing.
    let mut rig = Rig::new(6, 0);
    rig.serve_batch(1);
    rig.asks(0x8004, DESC);
    assert!(rig.serve_batch(1));
}

#[test]
fn arming_asks_for_the_next_request_and_disarming_for_none() {
    let mut rig = Rig::new(6, EVENT_IDX);
    rig.serve_batch(3);
    assert!(!rig.device.arm());
    assert_eq!(rig.wish(), (0x8003, DESC));
    rig.device.disarm();
    assert_eq!(rig.wish().1, DISABLE);
    rig.serve_batch(3);
    assert!(!rig.device.arm());
    assert_eq!(rig.wish(), (0, DESC), "the next lap");
    let mut rig = Rig::new(6, 0);
    rig.device.disarm();
    assert_eq!(rig.wish().1, DISABLE);
    assert!(!rig.device.arm());
    assert_eq!(rig.wish().1, ENABLE);
}

#[test]
fn arming_takes_a_last_look() {
    for features in [0, EVENT_IDX] {
        let mut rig = Rig::new(3, features);
        for id in 0..2 {
            rig.offer(id, &[(DATA, 16, 0)]);
        }
        assert!(rig.device.arm(), "there is work after all");
        let _first = rig.take();
        assert!(rig.device.arm());
        let _second = rig.take();
        assert!(!rig.device.arm());
    }
}

#[test]
fn b38_a_kick_on_an_empty_ring_is_nothing() {
    let mut rig = Rig::new(5, EVENT_IDX);
    for _ in 0..1000 {
        assert!(rig.device.pop().unwrap().is_none());
        assert!(!rig.device.publish().unwrap());
        assert!(!rig.device.arm());
    }
    assert!(!rig.device.is_broken());
}

/// A counter to sleep on: as an eventfd, without the system.
#[derive(Default)]
struct Bell {
    rung: AtomicU32,
    quits: AtomicBool,
}

impl Bell {
    fn ring(&self) {
        self.rung.fetch_add(1, Ordering::SeqCst);
    }

    /// Waits for a ring after the last `seen`; false when the other side is done.
    fn sleep(&self, seen: &mut u32) -> bool {
        let mut patience = 0_u64;
        loop {
            let rung = self.rung.load(Ordering::SeqCst);
            if rung != *seen {
                *seen = rung;
                return true;
            }
            if self.quits.load(Ordering::SeqCst) {
                return false;
            }
            patience += 1;
            assert!(patience < 2_000_000_000, "a wake was lost");
            if patience.is_multiple_of(64) {
                thread::yield_now();
            }
        }
    }
}

#[test]
fn b36_b37_no_wake_is_lost_between_two_threads_that_sleep_whenever_they_may() {
    let rounds: u64 =
        std::env::var("OUTBOARD_WAKES").ok().and_then(|n| n.parse().ok()).unwrap_or(20_000);
    for (features, size) in [(0, 3), (EVENT_IDX, 3), (EVENT_IDX, 1)] {
        let memory = memory();
        let view = outboard_memory::View::new(Arc::clone(&memory));
        let (layout, _) = QueueLayout::packed_at(0, size).unwrap();
        let features = features | PACKED;
        let mut driver = DriverQueue::new(layout, features, view.clone()).unwrap();
        let mut device = DeviceQueue::new(layout, features, driver.base(), view).unwrap();
        let (kick, call) = (Bell::default(), Bell::default());
        let (kick, call) = (&kick, &call);
        thread::scope(|scope| {
            scope.spawn(move || {
                let mut seen = 0;
                loop {
                    device.disarm();
                    while let Some(chain) = device.pop().unwrap() {
                        device.complete(chain, 1);
                        if device.publish().unwrap() {
                            call.ring();
                        }
                    }
                    if !device.arm() && !kick.sleep(&mut seen) {
                        break;
                    }
                }
            });
            let (mut sent, mut back, mut seen) = (0, 0, 0);
            while back < rounds {
                while sent < rounds && driver.add(&[(DATA, 1)], &[], sent).is_ok() {
                    sent += 1;
                    if driver.publish() {
                        kick.ring();
                    }
                }
                // Calls on and off at speed.
                driver.disarm();
                while let Some((token, _)) = driver.pop_used().unwrap() {
                    assert_eq!(token, back);
                    back += 1;
                }
                if back < rounds && driver.in_flight() > 0 && !driver.arm() {
                    assert!(call.sleep(&mut seen), "the device never quits first");
                }
            }
            kick.quits.store(true, Ordering::SeqCst);
        });
    }
}
