//! Who is told when: EVENT_IDX, NO_INTERRUPT, NO_NOTIFY (B34 to B38; virtio 1.3 §2.7.7, §2.7.9, §2.7.10).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use outboard_queue::{DeviceQueue, DriverQueue, QueueLayout, need_event};

use crate::rig::*;

#[test]
fn b34_an_event_is_due_exactly_when_the_index_passes_it() {
    // Every distance of the event from the old index, for every step the index can take.
    let old = 0xfff0_u16;
    for step in (0..=u16::MAX).step_by(1) {
        let new = old.wrapping_add(step);
        // The places passed are old .. new: `step` of them. Check both borders and a spread between.
        for distance in [
            0,
            1,
            step.wrapping_sub(2),
            step.wrapping_sub(1),
            step,
            step.wrapping_add(1),
            0x7fff,
            0xffff,
        ] {
            let event = old.wrapping_add(distance);
            assert_eq!(
                need_event(event, new, old),
                distance < step,
                "step {step}, distance {distance}"
            );
        }
    }
}

#[test]
fn b34_for_a_few_steps_every_event_is_tried() {
    for old in [0, 1, 0x7fff, 0x8000, 0xffff_u16] {
        for step in [0, 1, 2, 255, 256, 32_768, 65_535_u16] {
            let due = (0..=u16::MAX)
                .filter(|&event| need_event(event, old.wrapping_add(step), old))
                .count();
            assert_eq!(due, usize::from(step), "as many events are due as places are passed");
        }
    }
}

/// Serves `count` requests in one batch and says whether a call is due.
fn serve(rig: &mut Rig, count: u16) -> bool {
    for head in 0..count {
        rig.desc(head, DATA, 16, 0, 0);
        rig.offer(head);
        let chain = rig.take();
        rig.device.complete(chain, 0);
    }
    rig.device.publish().unwrap()
}

#[test]
fn the_first_publication_calls_whatever_the_driver_asked_for() {
    for features in [0, EVENT_IDX] {
        let mut rig = Rig::new(8, features);
        rig.view.write(rig.layout.avail, &1_u16.to_le_bytes()).unwrap();
        rig.view.write(used_event(&rig), &1000_u16.to_le_bytes()).unwrap();
        assert!(!rig.device.publish().unwrap(), "nothing to show is nothing to call for");
        assert!(serve(&mut rig, 1));
        assert!(!serve(&mut rig, 1));
    }
}

fn used_event(rig: &Rig) -> u64 {
    rig.layout.avail + 4 + 2 * u64::from(rig.layout.size)
}

fn avail_event(rig: &Rig) -> u64 {
    rig.layout.used + 4 + 8 * u64::from(rig.layout.size)
}

#[test]
fn b34_a_call_is_due_when_the_used_index_passes_used_event() {
    let mut rig = Rig::new(8, EVENT_IDX);
    serve(&mut rig, 1);
    for (event, count, due) in
        [(1_u16, 1, true), (1, 1, false), (4, 1, false), (4, 1, true), (5, 4, true), (9, 1, true)]
    {
        rig.view.write(used_event(&rig), &event.to_le_bytes()).unwrap();
        assert_eq!(serve(&mut rig, count), due, "event {event}, used {}", rig.used_idx());
    }
}

#[test]
fn without_the_feature_the_flag_decides_and_events_do_not() {
    let mut rig = Rig::new(8, 0);
    serve(&mut rig, 1);
    rig.view.write(used_event(&rig), &1_u16.to_le_bytes()).unwrap();
    for (flags, due) in [(0_u16, true), (1, false), (1, false), (0, true)] {
        rig.view.write(rig.layout.avail, &flags.to_le_bytes()).unwrap();
        assert_eq!(serve(&mut rig, 1), due);
    }
}

#[test]
fn b35_reserved_flags_are_ignored() {
    let mut rig = Rig::new(8, 0);
    serve(&mut rig, 1);
    for (flags, due) in [(0xfffe_u16, true), (0xffff, false)] {
        rig.view.write(rig.layout.avail, &flags.to_le_bytes()).unwrap();
        assert_eq!(serve(&mut rig, 1), due);
    }
    let mut rig = Rig::new(8, EVENT_IDX);
    serve(&mut rig, 1);
    // With EVENT_IDX the flag must be 0, and is ignored.
    rig.view.write(rig.layout.avail, &1_u16.to_le_bytes()).unwrap();
    rig.view.write(used_event(&rig), &1_u16.to_le_bytes()).unwrap();
    assert!(serve(&mut rig, 1));
}

#[test]
fn arming_asks_for_the_next_request_and_disarming_for_none() {
    let mut rig = Rig::new(8, EVENT_IDX);
    serve(&mut rig, 3);
    assert!(!rig.device.arm());
    assert_eq!(rig.u16_at(avail_event(&rig)), 3);
    assert!(need_event(rig.u16_at(avail_event(&rig)), 4, 3), "the driver kicks for the next one");
    rig.device.disarm();
    assert!(!need_event(rig.u16_at(avail_event(&rig)), 4, 3));
    assert!(!need_event(rig.u16_at(avail_event(&rig)), 0x8003, 3));

    let mut rig = Rig::new(8, 0);
    rig.device.disarm();
    assert_eq!(rig.u16_at(rig.layout.used), 1);
    assert!(!rig.device.arm());
    assert_eq!(rig.u16_at(rig.layout.used), 0);
}

#[test]
fn arming_takes_a_last_look() {
    for features in [0, EVENT_IDX] {
        let mut rig = Rig::new(8, features);
        rig.desc(0, DATA, 16, 0, 0);
        rig.offer(0);
        assert!(rig.device.arm(), "there is work after all");
        let _chain = rig.take();
        assert!(!rig.device.arm());
    }
}

#[test]
fn arming_sees_what_was_seen_and_not_taken() {
    let mut rig = Rig::new(8, 0);
    for head in 0..2 {
        rig.desc(head, DATA, 16, 0, 0);
        rig.offer(head);
    }
    let _first = rig.take();
    assert!(rig.device.arm());
}

#[test]
fn b38_a_kick_on_an_empty_ring_is_nothing() {
    let mut rig = Rig::new(8, EVENT_IDX);
    for _ in 0..1000 {
        assert!(rig.device.pop().unwrap().is_none());
        assert!(!rig.device.publish().unwrap());
        assert!(!rig.device.arm());
    }
    assert!(!rig.device.is_broken());
    assert_eq!(rig.used_idx(), 0);
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
    for features in [0, EVENT_IDX] {
        let memory = memory();
        let view = outboard_memory::View::new(Arc::clone(&memory));
        let (layout, _) = QueueLayout::split_at(0, 4).unwrap();
        let mut driver = DriverQueue::new(layout, features, view.clone()).unwrap();
        let mut device = DeviceQueue::new(layout, features, 0, view).unwrap();
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
                // NO_INTERRUPT toggled at speed.
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
