//! The driver side against a device that writes what it likes, and at its limits.

use outboard_memory::View;
use outboard_queue::{DriverQueue, QueueFull, QueueLayout, RingError};

use crate::rig::*;

fn driver(size: u16, features: u64) -> (DriverQueue, View, QueueLayout) {
    let view = View::new(memory());
    let (layout, _) = QueueLayout::split_at(0, size).unwrap();
    (DriverQueue::new(layout, features, view.clone()).unwrap(), view, layout)
}

/// The device uses `id`, with `written` bytes, as element `at`, and moves its index to `index`.
fn uses(view: &View, layout: &QueueLayout, at: u16, (id, written): (u32, u32), index: u16) {
    let place = layout.used + 4 + 8 * u64::from(at % layout.size);
    view.write(place, &id.to_le_bytes()).unwrap();
    view.write(place + 4, &written.to_le_bytes()).unwrap();
    view.write(layout.used + 2, &index.to_le_bytes()).unwrap();
}

#[test]
fn a_fresh_queue_clears_what_was_in_its_memory() {
    let view = View::new(memory());
    let (layout, end) = QueueLayout::split_at(0, 8).unwrap();
    view.write(0, &vec![0xff; usize::try_from(end).unwrap()]).unwrap();
    let mut driver = DriverQueue::starting_at(layout, EVENT_IDX, view.clone(), 0xfff0).unwrap();
    assert_eq!(driver.pop_used().unwrap(), None);
    assert_eq!((driver.next_avail(), driver.in_flight(), driver.free()), (0xfff0, 0, 8));
    for place in [layout.avail + 2, layout.used + 2] {
        let mut index = [0; 2];
        view.read(place, &mut index).unwrap();
        assert_eq!(u16::from_le_bytes(index), 0xfff0);
    }
    for place in [layout.avail, layout.used] {
        let mut flags = [1; 2];
        view.read(place, &mut flags).unwrap();
        assert_eq!(flags, [0, 0]);
    }
}

#[test]
fn a_used_index_beyond_what_is_in_flight_is_refused() {
    for (offered, index) in [(0, 1), (1, 2), (2, 3), (2, 0xffff), (8, 9)] {
        let (mut driver, view, layout) = driver(8, 0);
        for token in 0..offered {
            driver.add(&[(DATA, 1)], &[], token).unwrap();
        }
        driver.publish();
        uses(&view, &layout, 0, (0, 0), index);
        let in_flight = u16::try_from(offered).unwrap();
        assert_eq!(
            driver.pop_used(),
            Err(RingError::UsedIndex { used: index, next: 0, in_flight })
        );
    }
}

#[test]
fn a_used_head_that_is_not_in_flight_is_refused() {
    for id in [1, 2, 7, 8, 0xffff, 0x1_0000, u32::MAX] {
        let (mut driver, view, layout) = driver(8, 0);
        // Head 0 with a second descriptor behind it, which is no head.
        assert_eq!(driver.add(&[(DATA, 1)], &[(DATA, 1)], 5), Ok(0));
        driver.publish();
        uses(&view, &layout, 0, (id, 0), 1);
        assert_eq!(driver.pop_used(), Err(RingError::UsedHead { id }));
        assert_eq!((driver.in_flight(), driver.free()), (1, 6), "nothing was given up");
    }
}

#[test]
fn a_head_used_twice_is_refused_the_second_time() {
    let (mut driver, view, layout) = driver(8, 0);
    for token in [10, 11] {
        driver.add(&[(DATA, 1)], &[], token).unwrap();
    }
    driver.publish();
    uses(&view, &layout, 0, (0, 3), 1);
    uses(&view, &layout, 1, (0, 3), 2);
    assert_eq!(driver.pop_used(), Ok(Some((10, 3))));
    assert_eq!(driver.pop_used(), Err(RingError::UsedHead { id: 0 }));
}

#[test]
fn what_the_device_writes_into_descriptors_changes_nothing_for_the_driver() {
    let (mut driver, view, layout) = driver(4, 0);
    for round in 0..20_u16 {
        let head = driver.add(&[(DATA, 1), (DATA, 2)], &[(DATA, 3)], u64::from(round)).unwrap();
        driver.publish();
        view.write(layout.desc, &[0xff; 64]).unwrap();
        uses(&view, &layout, round, (u32::from(head), 0), round + 1);
        assert_eq!(driver.pop_used(), Ok(Some((u64::from(round), 0))));
        assert_eq!(driver.free(), 4);
    }
}

#[test]
fn a_chain_that_does_not_fit_is_refused_and_takes_nothing() {
    let (mut driver, ..) = driver(4, INDIRECT_DESC);
    driver.set_indirect_area(DATA, 3);
    driver.add(&[(DATA, 1), (DATA, 1)], &[(DATA, 1)], 1).unwrap();
    assert_eq!(driver.add(&[(DATA, 1)], &[(DATA, 1)], 2), Err(QueueFull { needed: 2, free: 1 }));
    assert_eq!(driver.add_indirect(&[(DATA, 1); 4], &[], 2), Err(QueueFull { needed: 4, free: 3 }));
    driver.add_indirect(&[(DATA, 1); 3], &[], 3).unwrap();
    assert_eq!(driver.add_indirect(&[(DATA, 1)], &[], 4), Err(QueueFull { needed: 1, free: 0 }));
    assert_eq!(driver.add(&[], &[], 4), Err(QueueFull { needed: 1, free: 0 }));
    assert_eq!((driver.in_flight(), driver.free()), (2, 0));
}

#[test]
fn an_indirect_chain_needs_an_area_for_its_table() {
    let (mut driver, ..) = driver(4, INDIRECT_DESC);
    assert_eq!(driver.add_indirect(&[(DATA, 1)], &[], 1), Err(QueueFull { needed: 1, free: 0 }));
    driver.set_indirect_area(END, 4);
    assert!(driver.add_indirect(&[(DATA, 1)], &[], 1).is_err(), "the area is not in memory");
    driver.set_indirect_area(u64::MAX - 15, 4);
    assert!(driver.add_indirect(&[(DATA, 1)], &[], 1).is_err(), "the area wraps");
    assert_eq!((driver.in_flight(), driver.free()), (0, 4));
}

#[test]
fn kicks_are_wanted_as_the_device_asked() {
    let (mut flagged, view, layout) = driver(8, 0);
    assert!(!flagged.publish(), "nothing to kick for");
    for (flags, wanted) in [(0_u16, true), (1, false), (0xfffe, true)] {
        view.write(layout.used, &flags.to_le_bytes()).unwrap();
        flagged.add(&[(DATA, 1)], &[], 0).unwrap();
        assert_eq!(flagged.publish(), wanted);
    }
    let (mut evented, view, layout) = driver(8, EVENT_IDX);
    for (event, wanted) in [(0_u16, true), (0, false), (2, true), (7, false)] {
        view.write(layout.used + 4 + 64, &event.to_le_bytes()).unwrap();
        evented.add(&[(DATA, 1)], &[], 0).unwrap();
        assert_eq!(evented.publish(), wanted);
    }
}
