//! The driver side against a device that writes what it likes, and at its limits.

use outboard_memory::View;
use outboard_queue::{DriverQueue, QueueFull, QueueLayout, RingError};

use crate::rig::*;

fn driver(size: u16, features: u64) -> (DriverQueue, View, QueueLayout) {
    let view = View::new(memory());
    let (layout, _) = QueueLayout::packed_at(0, size).unwrap();
    (DriverQueue::new(layout, features | PACKED, view.clone()).unwrap(), view, layout)
}

/// The device writes a used descriptor of the first lap.
fn uses(view: &View, layout: &QueueLayout, at: u16, id: u16, written: u32) {
    let place = layout.desc + 16 * u64::from(at);
    view.write(place + 8, &written.to_le_bytes()).unwrap();
    view.write(place + 12, &id.to_le_bytes()).unwrap();
    view.write(place + 14, &(AVAIL | USED).to_le_bytes()).unwrap();
}

#[test]
fn a_fresh_queue_clears_what_was_in_its_memory_wherever_it_starts() {
    for start in [0x8000, 0x8003, 0x0000, 0x0004] {
        let view = View::new(memory());
        let (layout, end) = QueueLayout::packed_at(0, 5).unwrap();
        for rubbish in [0x00, 0xff, 0x80] {
            view.write(0, &vec![rubbish; usize::try_from(end).unwrap()]).unwrap();
            let mut driver =
                DriverQueue::starting_at(layout, PACKED | EVENT_IDX, view.clone(), start).unwrap();
            assert_eq!(driver.pop_used().unwrap(), None);
            assert_eq!((driver.next_avail(), driver.in_flight(), driver.free()), (start, 0, 5));
            let base = driver.base();
            assert_eq!(base, u32::from(start) | u32::from(start) << 16);
            let mut device =
                outboard_queue::DeviceQueue::new(layout, PACKED, base, view.clone()).unwrap();
            assert!(device.pop().unwrap().is_none() && !device.arm());
        }
    }
    let (layout, _) = QueueLayout::packed_at(0, 5).unwrap();
    let refused = DriverQueue::starting_at(layout, PACKED, View::new(memory()), 0x8005);
    assert_eq!(refused.unwrap_err(), RingError::PackedBase { base: 0x8005, size: 5 });
}

#[test]
fn a_used_id_that_is_not_in_flight_is_refused() {
    for id in [1, 2, 5, 0xffff] {
        let (mut driver, view, layout) = driver(5, 0);
        assert_eq!(driver.add(&[(DATA, 1)], &[(DATA, 1)], 5), Ok(0));
        driver.publish();
        uses(&view, &layout, 0, id, 0);
        assert_eq!(driver.pop_used(), Err(RingError::UsedHead { id: id.into() }));
        assert_eq!((driver.in_flight(), driver.free()), (1, 3), "nothing was given up");
    }
}

#[test]
fn an_id_used_twice_is_refused_the_second_time() {
    let (mut driver, view, layout) = driver(5, 0);
    for token in [10, 11] {
        driver.add(&[(DATA, 1)], &[], token).unwrap();
    }
    driver.publish();
    uses(&view, &layout, 0, 0, 3);
    uses(&view, &layout, 1, 0, 3);
    assert_eq!(driver.pop_used(), Ok(Some((10, 3))));
    assert_eq!(driver.pop_used(), Err(RingError::UsedHead { id: 0 }));
}

#[test]
fn a_chain_that_does_not_fit_is_refused_and_takes_nothing() {
    let (mut driver, ..) = driver(5, INDIRECT_DESC);
    driver.set_indirect_area(DATA, 3);
    driver.add(&[(DATA, 1), (DATA, 1)], &[(DATA, 1), (DATA, 1)], 1).unwrap();
    assert_eq!(driver.add(&[(DATA, 1)], &[(DATA, 1)], 2), Err(QueueFull { needed: 2, free: 1 }));
    assert_eq!(driver.add_indirect(&[(DATA, 1); 4], &[], 2), Err(QueueFull { needed: 4, free: 3 }));
    driver.add_indirect(&[(DATA, 1); 3], &[], 3).unwrap();
    assert_eq!(driver.add_indirect(&[(DATA, 1)], &[], 4), Err(QueueFull { needed: 1, free: 0 }));
    assert_eq!((driver.in_flight(), driver.free()), (2, 0));
}

#[test]
fn nothing_shows_before_it_is_published() {
    let (mut driver, view, layout) = driver(5, 0);
    let flags = |at: u64| {
        let mut bytes = [0; 2];
        view.read(layout.desc + 16 * at + 14, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    };
    driver.add(&[(DATA, 1)], &[(DATA, 1)], 1).unwrap();
    driver.add(&[(DATA, 1)], &[], 2).unwrap();
    assert_eq!(flags(0) & (AVAIL | USED), 0);
    assert!(driver.publish());
    assert_eq!([flags(0), flags(1), flags(2)], [AVAIL | NEXT, AVAIL | WRITE, AVAIL]);
    assert!(!driver.publish(), "nothing new");
}
