//! The dirty log of a packed ring: what is marked, when, and that nothing is missed (cases A71, C16).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use outboard_memory::{DirtyLog, LOG_PAGE, View};
use outboard_queue::{DeviceQueue, QueueLayout, RingLog};

use crate::rig::*;

fn log() -> Arc<DirtyLog> {
    Arc::new(DirtyLog::memfd(END).unwrap().0)
}

fn to(log: &Arc<DirtyLog>, used: Option<u64>) -> Option<RingLog> {
    Some(RingLog { log: Arc::clone(log), used, notify: None })
}

fn taken(log: &DirtyLog) -> Vec<u64> {
    let mut pages = Vec::new();
    log.take(|page| pages.push(page));
    pages
}

/// A rig whose ring is longer than a page, with its event structures in pages of their own.
fn rig(size: u16, features: u64) -> Rig {
    let mut rig = Rig::new(size, features);
    rig.layout = QueueLayout { avail: 0x10_0000, used: 0x11_0000, ..rig.layout };
    let view = rig.view.clone();
    rig.device = DeviceQueue::new(rig.layout, features | PACKED, FRESH, view).unwrap();
    rig
}

const EVENT: u64 = 0x11_0000;

#[test]
fn a_request_is_marked_before_the_device_sees_it_and_again_when_it_is_given_back() {
    for indirect in [false, true] {
        let mut rig = Rig::new(6, INDIRECT_DESC);
        let log = log();
        rig.device.set_log(to(&log, None));
        let page = u32::try_from(LOG_PAGE).unwrap();
        let buffers = [(DATA, 16, 0), (SEAM - LOG_PAGE - 1, 2 * page + 2, WRITE)];
        if indirect {
            for (at, (addr, len, flags)) in (0..).zip(buffers) {
                rig.entry(DATA + 0x1000 + 16 * at, addr, len, flags);
            }
            rig.push(DATA + 0x1000, 32, 0, INDIRECT);
        } else {
            rig.offer(0, &buffers);
        }
        let pages = [-2_i64, -1, 0, 1].map(|page| SEAM.wrapping_add_signed(page * 4096));
        let mut chain = rig.take();
        assert_eq!(taken(&log), pages, "marked when it is taken");
        chain.writable().write_all(&[1; 8000]).unwrap();
        assert_eq!(taken(&log), []);
        rig.device.complete(chain, 8000);
        assert_eq!(taken(&log), pages, "marked when it is given back, whatever was consumed");
        rig.device.publish().unwrap();
        assert_eq!((taken(&log), log.outside()), (Vec::new(), 0));
    }
}

#[test]
fn what_is_written_into_the_ring_is_marked_where_the_ring_lies_when_that_was_asked_for() {
    let mut rig = rig(600, EVENT_IDX);
    let log = log();
    // Whatever the front-end gives for an address: QEMU the event structure's, DPDK the ring's.
    for given in [EVENT, 0, END * 16] {
        rig.device.set_log(to(&log, Some(given)));
        assert!(!rig.device.arm());
        assert_eq!(taken(&log), [EVENT]);
        rig.device.disarm();
        assert_eq!(taken(&log), [EVENT]);
    }
    for at in 0..600_u64 {
        rig.offer(0, &[(DATA, 16, 0)]);
        let chain = rig.take();
        assert_eq!(taken(&log), []);
        rig.device.complete(chain, 0);
        let page = at * 16 / LOG_PAGE * LOG_PAGE;
        assert_eq!(taken(&log), [page], "before the flags show it");
        rig.device.publish().unwrap();
        assert_eq!(taken(&log), [page], "and again");
    }
    rig.device.set_log(to(&log, None));
    rig.device.arm();
    rig.offer(0, &[(DATA, 16, 0)]);
    rig.serve();
    assert_eq!(taken(&log), []);
}

#[test]
fn a_batch_that_goes_round_the_end_of_the_ring_is_marked_at_both_ends() {
    let mut rig = rig(600, 0);
    for _ in 0..598 {
        rig.offer(0, &[(DATA, 16, 0)]);
        rig.serve();
    }
    let log = log();
    rig.device.set_log(to(&log, Some(0)));
    for id in 0..2 {
        rig.offer(id, &[(DATA, 16, 0), (DATA, 16, 0)]);
    }
    let (first, second) = (rig.take(), rig.take());
    rig.device.complete(second, 0);
    rig.device.complete(first, 0);
    taken(&log);
    rig.device.publish().unwrap();
    assert_eq!(taken(&log), [0, 2 * LOG_PAGE]);
}

#[test]
fn what_was_in_flight_when_the_log_came_is_marked_in_it() {
    let mut rig = Rig::new(7, 0);
    for (id, page) in [(4, 1), (2, 3), (6, 5)] {
        rig.offer(id, &[(DATA, 16, 0), (DATA + page * LOG_PAGE, 1, WRITE)]);
    }
    let [first, second, third] = [rig.take(), rig.take(), rig.take()];
    // Its used descriptor is written over the first chain, of which nothing is known then.
    rig.device.complete(second, 1);
    let one = log();
    rig.device.set_log(to(&one, None));
    let all = END / LOG_PAGE;
    assert_eq!(taken(&one).len() as u64, all);
    rig.device.complete(third, 1);
    assert_eq!(taken(&one), [DATA + 5 * LOG_PAGE], "this one was still there");
    rig.device.complete(first, 1);
    assert_eq!(taken(&one).len() as u64, all);
    // Another log is told of what is in flight too.
    rig.offer(1, &[(DATA + LOG_PAGE, 1, WRITE)]);
    let chain = rig.take();
    let two = log();
    rig.device.set_log(to(&two, None));
    assert_eq!(taken(&two), [DATA + LOG_PAGE]);
    rig.device.set_log(None);
    rig.device.complete(chain, 1);
    rig.device.publish().unwrap();
    assert_eq!(taken(&two), [], "no log, no marks");
}

#[test]
fn the_log_is_told_of_each_batch() {
    let mut rig = Rig::new(7, 0);
    let (log, count) = (log(), Arc::new(AtomicU64::new(0)));
    let counter = Arc::clone(&count);
    let notify: Arc<dyn Fn() + Send + Sync> = Arc::new(move || {
        counter.fetch_add(1, Ordering::Relaxed);
    });
    rig.device.set_log(Some(RingLog { log, used: None, notify: Some(notify) }));
    rig.device.publish().unwrap();
    assert_eq!(count.load(Ordering::Relaxed), 0);
    for id in 0..2 {
        rig.offer(id, &[(DATA, 1, WRITE)]);
    }
    let (first, second) = (rig.take(), rig.take());
    rig.device.complete(first, 1);
    rig.device.complete(second, 1);
    rig.device.publish().unwrap();
    assert_eq!(count.load(Ordering::Relaxed), 1);
}

/// Every byte of guest memory that differs from what it was lies in a page that was marked.
#[test]
fn c16_nothing_is_written_that_is_not_marked() {
    let mut rig = rig(11, EVENT_IDX);
    let log = log();
    let read = |view: &View| {
        let mut bytes = vec![0; usize::try_from(END).unwrap()];
        view.read(0, &mut bytes).unwrap();
        bytes
    };
    rig.device.set_log(to(&log, Some(0)));
    let mut held = Vec::new();
    for round in 0..60_u16 {
        let place = DATA + u64::from(round) * 3000;
        rig.offer(round % 5, &[(DATA, 16, 0), (place, 5000, WRITE)]);
        let before = read(&rig.view);
        taken(&log);
        let mut chain = rig.take();
        chain.writable().write_all(&pattern(5000, round.to_le_bytes()[0] | 1)).unwrap();
        held.push(chain);
        if round % 5 == 4 {
            for chain in held.drain(..).rev() {
                rig.device.complete(chain, 5000);
            }
            rig.device.publish().unwrap();
            rig.device.disarm();
            rig.device.arm();
        }
        let marked = taken(&log);
        let page = usize::try_from(LOG_PAGE).unwrap();
        let after = read(&rig.view);
        for (at, (old, new)) in before.chunks(page).zip(after.chunks(page)).enumerate() {
            let guest = at as u64 * LOG_PAGE;
            assert!(old == new || marked.contains(&guest), "page {guest:#x} in round {round}");
        }
    }
}
