//! The end of the ring and both wrap counters (B42), bases, and rings of any size (A45).

use outboard_memory::View;
use outboard_queue::{DeviceQueue, DriverQueue, QueueLayout, RingError};

use crate::rig::*;

#[test]
fn b42_a_chain_over_the_end_of_the_ring_is_served_and_used_where_it_began() {
    let mut rig = Rig::new(5, 0);
    for lap in 0..12 {
        // Three descriptors in a ring of five: it begins everywhere.
        let (start, wrap) = (rig.at, rig.wrap);
        let bytes = pattern(30, lap);
        rig.view.write(DATA, &bytes).unwrap();
        rig.offer(1, &[(DATA, 10, 0), (DATA + 10, 20, 0), (DATA + 64, 8, WRITE)]);
        let mut chain = rig.take();
        assert_eq!(chain.readable().read_obj::<[u8; 30]>().unwrap()[..], bytes);
        rig.device.complete(chain, 8);
        rig.device.publish().unwrap();
        let state = if wrap { AVAIL | USED } else { 0 };
        assert_eq!(rig.used(start), (1, 8, state | WRITE));
        assert!(rig.device.pop().unwrap().is_none());
    }
    assert!(!rig.device.is_broken());
}

#[test]
fn b42_a_chain_that_fills_the_ring_exactly_is_served_for_ever() {
    for size in [1, 2, 3, 7, 8, 100] {
        let mut rig = Rig::new(size, 0);
        for lap in 0..5_u16 {
            rig.offer(0, &vec![(DATA, 3, 0); usize::from(size)]);
            assert_eq!(rig.take_len(), 3 * u64::from(size), "lap {lap}");
        }
        assert_eq!(rig.device.base() & 0x8000 == 0, size % 2 == 1 || rig.at == 0 && !rig.wrap);
    }
}

impl Rig {
    /// Serves the next chain: its readable bytes.
    fn take_len(&mut self) -> u64 {
        let mut chain = self.take();
        let len = chain.readable().len();
        self.device.complete(chain, 0);
        self.device.publish().unwrap();
        len
    }
}

#[test]
fn nothing_of_a_batch_shows_before_it_is_published_and_then_all_of_it() {
    let mut rig = Rig::new(7, 0);
    for id in 0..3 {
        rig.offer(id, &[(DATA, 1, 0), (DATA, 1, WRITE)]);
    }
    let [first, second, third] = [rig.take(), rig.take(), rig.take()];
    // Out of order: used descriptors stand where the oldest chain stood, one after the other.
    rig.device.complete(third, 1);
    rig.device.complete(first, 0);
    assert_eq!(rig.used(0).2 & (AVAIL | USED), AVAIL, "the first one still looks available");
    rig.device.publish().unwrap();
    assert_eq!(rig.used(0), (2, 1, AVAIL | USED | WRITE));
    assert_eq!(rig.used(2), (0, 0, AVAIL | USED));
    rig.device.complete(second, 1);
    rig.device.publish().unwrap();
    assert_eq!(rig.used(4), (1, 1, AVAIL | USED | WRITE));
}

#[test]
fn a_base_has_both_halves_and_a_queue_made_with_it_goes_on_there() {
    for size in [3, 5, 8] {
        let mut rig = Rig::new(size, 0);
        for _ in 0..3 * size {
            rig.offer(0, &[(DATA, 1, 0)]);
            let chain = rig.take();
            let taken = rig.at | if rig.wrap { 0x8000 } else { 0 };
            let base = rig.device.base();
            assert_eq!(base & 0xffff, u32::from(taken));
            assert_ne!(base >> 16, u32::from(taken), "one is held");
            rig.device.complete(chain, 0);
            assert_eq!(rig.device.base(), base, "not shown is not used");
            rig.device.publish().unwrap();
            let base = rig.device.base();
            assert_eq!(base, u32::from(taken) | u32::from(taken) << 16);
            let layout = rig.layout;
            rig.device = DeviceQueue::new(layout, PACKED, base, rig.view.clone()).unwrap();
            assert_eq!(rig.device.base(), base);
        }
    }
}

#[test]
fn a54_a_used_half_of_zero_says_nothing() {
    let (layout, _) = QueueLayout::packed_at(0, 6).unwrap();
    for (base, both) in [(0x8000, 0x8000_8000), (0x8003, 0x8003_8003), (2, 0x2_0002)] {
        let device = DeviceQueue::new(layout, PACKED, base, View::new(memory())).unwrap();
        assert_eq!(device.base(), both);
    }
}

#[test]
fn a54_a62_a_base_of_zero_is_a_fresh_ring_unless_somebody_went_round_it() {
    // Chains of three in a ring of five: some laps end with a chain over the end, whose descriptor at index 0 was never
    // a used one.
    for (size, count) in [(5, 1), (5, 3), (3, 3), (1, 1), (4, 2), (7, 5)] {
        let mut rig = Rig::new(size, 0);
        let again = |rig: &Rig| DeviceQueue::new(rig.layout, PACKED, 0, rig.view.clone()).unwrap();
        assert_eq!(again(&rig).base(), FRESH, "nothing was offered yet");
        rig.offer(0, &vec![(DATA, 1, 0); count]);
        assert_eq!(again(&rig).base(), FRESH, "offered in the first lap");
        for _ in 0..6 * size {
            rig.serve();
            if rig.device.base() == 0 {
                assert_eq!(again(&rig).base(), 0, "between two laps");
                rig.offer(0, &vec![(DATA, 1, 0); count]);
                assert_eq!(again(&rig).base(), 0, "available in the second lap");
                rig.device = again(&rig);
            } else {
                rig.offer(0, &vec![(DATA, 1, 0); count]);
            }
        }
    }
}

#[test]
fn a54_a_base_that_is_none_of_the_ring_is_refused() {
    let (layout, _) = QueueLayout::packed_at(0, 6).unwrap();
    // Outside the ring; used in front of available; more than a ring behind.
    for base in [0x8006_8000, 0x8000_8006, 0xffff_ffff, 0x8002_8001, 0x8002_0003] {
        let refused = DeviceQueue::new(layout, PACKED, base, View::new(memory())).unwrap_err();
        assert_eq!(refused, RingError::PackedBase { base, size: 6 });
    }
    // Some held by nobody knows whom: the ring is so much shorter.
    let device = DeviceQueue::new(layout, PACKED, 0x8002_8005, View::new(memory())).unwrap();
    assert_eq!((device.base(), device.in_flight()), (0x8002_8005, 0));
}

#[test]
fn a45_a_ring_has_one_to_32768_descriptors() {
    let layout = |size| QueueLayout { size, desc: 0, avail: 0x10_0000, used: 0x18_0000 };
    for size in [0, 0x8001, 0xffff] {
        let refused = DeviceQueue::new(layout(size), PACKED, FRESH, View::new(memory()));
        assert_eq!(refused.unwrap_err(), RingError::Size { size });
    }
    for size in [1, 3, 1000, 32_767, 32_768] {
        let view = View::new(memory());
        let layout = QueueLayout::packed_at(0, size).unwrap().0;
        let mut driver = DriverQueue::new(layout, PACKED, view.clone()).unwrap();
        let mut device = DeviceQueue::new(layout, PACKED, driver.base(), view).unwrap();
        for lap in 0..2 {
            for token in 0..u64::from(size) {
                driver.add(&[(DATA, 1)], &[], token).unwrap();
            }
            assert!(driver.add(&[(DATA, 1)], &[], 0).is_err());
            driver.publish();
            while let Some(chain) = device.pop().unwrap() {
                device.complete(chain, 0);
            }
            device.publish().unwrap();
            for token in 0..u64::from(size) {
                assert_eq!(driver.pop_used().unwrap(), Some((token, 0)), "lap {lap} of {size}");
            }
            assert_eq!(driver.pop_used().unwrap(), None);
        }
    }
}

#[test]
fn a48_a49_a51_a_ring_outside_memory_or_not_aligned_is_refused() {
    let whole = QueueLayout { size: 8, desc: 0, avail: 0x1000, used: 0x2000 };
    let cases = [
        (QueueLayout { desc: END - 64, ..whole }, "descriptor ring"),
        (QueueLayout { desc: SEAM - 16, ..whole }, "descriptor ring"),
        (QueueLayout { desc: 8, ..whole }, "descriptor ring"),
        (QueueLayout { desc: u64::MAX - 15, ..whole }, "descriptor ring"),
        (QueueLayout { avail: END - 2, ..whole }, "driver event structure"),
        (QueueLayout { avail: 0x1002, ..whole }, "driver event structure"),
        (QueueLayout { used: END, ..whole }, "device event structure"),
        (QueueLayout { used: 0x2002, ..whole }, "device event structure"),
    ];
    for (layout, wrong) in cases {
        let refused = DeviceQueue::new(layout, PACKED, FRESH, View::new(memory())).unwrap_err();
        assert!(
            matches!(refused, RingError::Placement { part, .. } if part == wrong),
            "{layout:x?}: {refused:?}"
        );
    }
}
