//! The dirty log of a ring: what is marked, when, and that nothing is missed (cases A71, A72, C16).

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use outboard_memory::{DirtyLog, Iotlb, LOG_PAGE, Permission, View};
use outboard_queue::{DeviceQueue, QueueLayout, RingLog};

use crate::rig::*;

/// Where the used ring is said to lie: outside of memory, in the last page of the log.
const USED: u64 = END + LOG_PAGE;

fn log() -> Arc<DirtyLog> {
    Arc::new(DirtyLog::memfd(USED + LOG_PAGE).unwrap().0)
}

fn to(log: &Arc<DirtyLog>, used: Option<u64>) -> Option<RingLog> {
    Some(RingLog { log: Arc::clone(log), used, notify: None })
}

fn taken(log: &DirtyLog) -> Vec<u64> {
    let mut pages = Vec::new();
    log.take(|page| pages.push(page));
    pages
}

/// A request of 16 bytes to read and `len` bytes at `addr` to write, at descriptors `at` and the next one.
fn offer(rig: &mut Rig, at: u16, addr: u64, len: u32) {
    rig.desc(at, DATA, 16, NEXT, at + 1);
    rig.desc(at + 1, addr, len, WRITE, 0);
    rig.offer(at);
}

#[test]
fn a_request_is_marked_before_the_device_sees_it_and_again_when_it_is_given_back() {
    let mut rig = Rig::new(8, 0);
    let log = log();
    rig.device.set_log(to(&log, None));
    // Across the seam of two regions, from the last byte of a page to the first one of another.
    offer(&mut rig, 0, SEAM - LOG_PAGE - 1, 2 * u32::try_from(LOG_PAGE).unwrap() + 2);
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

#[test]
fn what_is_only_read_is_not_marked() {
    let mut rig = Rig::new(8, 0);
    let log = log();
    rig.device.set_log(to(&log, None));
    rig.desc(0, DATA, 4096, 0, 0);
    rig.offer(0);
    let chain = rig.take();
    rig.device.complete(chain, 0);
    rig.device.publish().unwrap();
    rig.device.arm();
    assert_eq!(taken(&log), []);
}

#[test]
fn each_field_of_the_used_ring_is_marked_at_its_own_place_when_that_was_asked_for() {
    for (features, wish) in [(0, 0), (EVENT_IDX, 4 + 8 * 2048)] {
        // A ring whose used ring is longer than four pages; its log address is aligned so that offsets show.
        let mut rig = Rig::new(2048, features);
        let log = Arc::new(DirtyLog::memfd(USED + 8 * LOG_PAGE).unwrap().0);
        rig.device.set_log(to(&log, Some(USED)));
        assert!(!rig.device.arm());
        assert_eq!(taken(&log), [USED + wish / LOG_PAGE * LOG_PAGE]);
        rig.device.disarm();
        assert_eq!(taken(&log), [USED + wish / LOG_PAGE * LOG_PAGE]);
        rig.desc(0, DATA, 16, 0, 0);
        for _ in 0..600 {
            rig.offer(0);
            let chain = rig.take();
            rig.device.complete(chain, 0);
            rig.device.publish().unwrap();
        }
        // Elements 0 to 599 are in the first two pages.
        assert_eq!(taken(&log), [USED, USED + LOG_PAGE]);
        rig.offer(0);
        let chain = rig.take();
        rig.device.complete(chain, 0);
        assert_eq!(taken(&log), [USED + LOG_PAGE], "the element before the index covers it");
        rig.device.publish().unwrap();
        assert_eq!(taken(&log), [USED, USED + LOG_PAGE], "index and element");
    }
}

#[test]
fn a_batch_that_goes_round_the_end_of_the_used_ring_is_marked_at_both_ends() {
    let mut rig = Rig::new(1024, 0);
    let log = Arc::new(DirtyLog::memfd(USED + 4 * LOG_PAGE).unwrap().0);
    rig.desc(0, DATA, 16, 0, 0);
    rig.desc(1, DATA, 16, 0, 0);
    for _ in 0..1023 {
        rig.offer(0);
        let chain = rig.take();
        rig.device.complete(chain, 0);
        rig.device.publish().unwrap();
    }
    rig.device.set_log(to(&log, Some(USED)));
    rig.offer(0);
    rig.offer(1);
    let (first, second) = (rig.take(), rig.take());
    rig.device.complete(first, 0);
    rig.device.complete(second, 0);
    taken(&log);
    rig.device.publish().unwrap();
    // Element 1023 ends in the third page, by its last four bytes.
    assert_eq!(taken(&log), [USED, USED + LOG_PAGE, USED + 2 * LOG_PAGE]);
}

#[test]
fn what_was_in_flight_when_the_log_came_is_marked_in_it() {
    let mut rig = Rig::new(8, INDIRECT_DESC);
    offer(&mut rig, 0, DATA + 0x1000, 4096);
    offer(&mut rig, 2, DATA + 0x3000, 1);
    let (first, second) = (rig.take(), rig.take());
    let one = log();
    rig.device.set_log(to(&one, None));
    assert_eq!(taken(&one), [DATA + 0x1000, DATA + 0x3000]);
    rig.device.complete(second, 1);
    assert_eq!(taken(&one), [DATA + 0x3000]);
    // Another log in its place: the old one hears nothing more, the new one of what is in flight.
    let two = log();
    rig.device.set_log(to(&two, None));
    assert_eq!(Arc::strong_count(&one), 1, "the old one is let go");
    assert_eq!(taken(&two), [DATA + 0x1000]);
    rig.device.complete(first, 4096);
    assert_eq!(taken(&two), [DATA + 0x1000]);
    // Off: requests go the quick way again, also those that were taken the other way.
    offer(&mut rig, 4, DATA + 0x5000, 1);
    let third = rig.take();
    taken(&two);
    rig.device.set_log(None);
    assert_eq!(Arc::strong_count(&two), 1);
    rig.device.complete(third, 1);
    offer(&mut rig, 0, DATA + 0x1000, 4096);
    let fourth = rig.take();
    rig.device.complete(fourth, 1);
    rig.device.publish().unwrap();
    assert_eq!((taken(&two), rig.used_idx(), rig.device.in_flight()), (Vec::new(), 4, 0));
}

/// A driver that changes what is in flight hides nothing: everything counts as written.
#[test]
fn a_request_in_flight_that_cannot_be_walked_any_more_marks_all_of_memory() {
    let mut rig = Rig::new(8, 0);
    offer(&mut rig, 0, DATA, 1);
    let chain = rig.take();
    rig.desc(1, END, 1, WRITE, 0);
    let log = log();
    rig.device.set_log(to(&log, None));
    let all = (0..END / LOG_PAGE).map(|page| page * LOG_PAGE);
    assert!(taken(&log).into_iter().eq(all.clone()));
    rig.device.complete(chain, 1);
    assert!(taken(&log).into_iter().eq(all));
    rig.device.publish().unwrap();
    assert!(!rig.device.is_broken());
}

#[test]
fn requests_seen_and_not_taken_when_the_log_comes_are_taken_through_it() {
    let mut rig = Rig::new(8, 0);
    for at in [0, 2, 4] {
        offer(&mut rig, at, DATA + 0x1000 * u64::from(at), 1);
    }
    // This look sees all three.
    let first = rig.take();
    let log = log();
    rig.device.set_log(to(&log, None));
    taken(&log);
    let second = rig.take();
    assert_eq!(taken(&log), [DATA + 0x2000]);
    rig.device.set_log(None);
    let third = rig.take();
    for chain in [third, second, first] {
        rig.device.complete(chain, 1);
    }
    assert!(rig.device.pop().unwrap().is_none());
    assert_eq!(taken(&log), []);
}

/// A71, A72: nothing that is wrong with the log is the ring's business.
#[test]
fn a72_a_log_that_is_too_short_or_cut_short_leaves_the_ring_alone() {
    let mut rig = Rig::new(8, 0);
    let (log, _file) = DirtyLog::memfd(LOG_PAGE).unwrap();
    let log = Arc::new(log);
    rig.device.set_log(to(&log, Some(u64::MAX - 8)));
    offer(&mut rig, 0, DATA, 4096);
    let chain = rig.take();
    rig.device.complete(chain, 1);
    rig.device.publish().unwrap();
    assert_eq!(rig.used_idx(), 1);
    assert!(log.outside() >= 4, "{log:?}");
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(4096).unwrap();
    let ours = file.try_clone().unwrap().into();
    let log = Arc::new(DirtyLog::map(ours, 0, 4096).unwrap());
    rig.device.set_log(to(&log, None));
    file.set_len(0).unwrap();
    offer(&mut rig, 0, DATA, 4096);
    let chain = rig.take();
    rig.device.complete(chain, 1);
    rig.device.publish().unwrap();
    assert_eq!(rig.used_idx(), 2);
    assert!(log.is_poisoned() && !rig.device.is_broken());
}

/// A broken ring says so, with a log as without.
#[test]
fn a_ring_with_a_log_breaks_as_any_ring_does() {
    let mut rig = Rig::new(8, 0);
    rig.device.set_log(to(&log(), None));
    rig.desc(0, END, 1, WRITE, 0);
    rig.offer(0);
    rig.breaks(|error| matches!(error, outboard_queue::RingError::Buffer { .. }));
    let mut rig = Rig::new(8, 0);
    rig.device.set_log(to(&log(), None));
    rig.set_avail(9);
    rig.breaks(|error| matches!(error, outboard_queue::RingError::AvailIndex { .. }));
    rig.device.set_log(None);
    rig.stays_silent();
    let mut rig = Rig::new(8, 0);
    rig.device.set_log(to(&log(), None));
    offer(&mut rig, 0, DATA, 1);
    let chain = rig.take();
    rig.offer(0);
    rig.breaks(|error| error == outboard_queue::RingError::HeadInFlight { head: 0 });
    rig.device.complete(chain, 0);
    rig.device.publish().unwrap();
    assert_eq!(rig.used_idx(), 1, "what was in flight is given back all the same");
}

#[test]
fn the_front_end_is_told_once_for_a_batch() {
    let mut rig = Rig::new(8, 0);
    let log = log();
    let told = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&told);
    let notify = move || {
        count.fetch_add(1, Ordering::Relaxed);
    };
    rig.device.set_log(Some(RingLog { log, used: None, notify: Some(Arc::new(notify)) }));
    for at in [0, 2] {
        offer(&mut rig, at, DATA, 1);
        let chain = rig.take();
        rig.device.complete(chain, 1);
    }
    rig.device.publish().unwrap();
    rig.device.publish().unwrap();
    assert_eq!(told.load(Ordering::Relaxed), 1);
}

/// C16: writes that race the front-end's taking of marks, and logs that are swapped under the ring: when it is over,
/// every page that differs from the copy is marked in the last log. A page is copied after its mark was taken.
fn race(writes: u64) {
    const PAGES: u64 = 64;
    let mut rig = Rig::new(8, EVENT_IDX);
    let (view, used_at) = (rig.view.clone(), rig.layout.used);
    let (swap, logs) = std::sync::mpsc::sync_channel::<Arc<DirtyLog>>(1);
    let (swapped, done) = std::sync::mpsc::channel();
    let first = log();
    rig.device.set_log(to(&first, Some(used_at)));
    let writer = std::thread::spawn(move || {
        let mut page = 1_u64;
        for write in 0..writes {
            // A walk through the pages that comes back to each of them again and again.
            page = (page * 48271) % 0x7fff_ffff;
            offer(&mut rig, 0, DATA + page % PAGES * LOG_PAGE, 8);
            let mut chain = rig.take();
            chain.writable().write_obj(&(write + 1)).unwrap();
            rig.device.complete(chain, 8);
            rig.device.publish().unwrap();
            if let Ok(log) = logs.try_recv() {
                rig.device.set_log(to(&log, Some(used_at)));
                swapped.send(()).unwrap();
            }
        }
        drop(logs);
        rig
    });
    let mut copy = vec![0_u8; usize::try_from(PAGES * LOG_PAGE).unwrap()];
    let mut used_copy = vec![0_u8; 4096];
    let mut take = |log: &DirtyLog| {
        log.take(|page| match page.checked_sub(DATA) {
            Some(at) => {
                let at = usize::try_from(at).unwrap();
                view.read(page, &mut copy[at..at + 4096]).unwrap();
            }
            None => view.read(page, &mut used_copy).unwrap(),
        });
    };
    let mut now = first;
    let mut rounds = 0_u64;
    while !writer.is_finished() {
        rounds += 1;
        take(&now);
        if rounds.is_multiple_of(16) {
            let next = log();
            if swap.send(Arc::clone(&next)).is_ok() && done.recv().is_ok() {
                // Acknowledged: nothing is marked in the old one any more.
                take(&now);
                assert_eq!(Arc::strong_count(&now), 1);
                now = next;
            }
        }
    }
    let rig = writer.join().unwrap();
    assert!(rounds > 16, "{rounds} rounds: the two did not race");
    take(&now);
    let mut memory = vec![0; copy.len()];
    rig.view.read(DATA, &mut memory).unwrap();
    let differs: BTreeSet<_> =
        (0..copy.len()).filter(|&at| copy[at] != memory[at]).map(|at| at / 4096).collect();
    assert!(differs.is_empty(), "pages {differs:?} were written and not marked");
    let mut ring = vec![0; 4096];
    rig.view.read(used_at / LOG_PAGE * LOG_PAGE, &mut ring).unwrap();
    let at = usize::try_from(used_at % LOG_PAGE).unwrap();
    let end = at + 6 + 8 * 8;
    assert_eq!(used_copy[at..end], ring[at..end], "the used ring was written and not marked");
}

// OUTBOARD_WRITES sets how many there are, for a longer look.
#[test]
fn c16_every_page_written_while_marks_are_taken_and_logs_are_swapped_is_in_a_log() {
    let asked = std::env::var("OUTBOARD_WRITES").ok();
    race(asked.and_then(|writes| writes.parse().ok()).unwrap_or(100_000));
}

/// The log knows guest-physical pages, whatever the addresses of ring and buffers are.
#[test]
fn behind_an_iommu_marks_are_at_guest_physical_addresses() {
    let memory = memory();
    let user = |guest: u64| {
        let region = memory.regions().iter().rev().find(|r| r.spec().guest_addr <= guest).unwrap();
        region.spec().user_addr + guest - region.spec().guest_addr
    };
    let mut iotlb = Iotlb::new();
    // The ring at an I/O address of its own, the data at two that change places.
    let (ring, data) = (1 << 40, 1 << 41);
    iotlb.update(&memory, ring, LOG_PAGE, user(DATA), Permission::BOTH).unwrap();
    iotlb.update(&memory, data, LOG_PAGE, user(DATA + 0x5000), Permission::BOTH).unwrap();
    iotlb
        .update(&memory, data + LOG_PAGE, LOG_PAGE, user(DATA + 0x3000), Permission::BOTH)
        .unwrap();
    let view = View::new(Arc::new(iotlb.view(2, &memory)));
    let physical = View::new(Arc::clone(&memory));
    let (layout, _) = QueueLayout::split_at(ring, 8).unwrap();
    let mut device = DeviceQueue::new(layout, 0, 0, view).unwrap();
    let log = log();
    device.set_log(to(&log, Some(layout.used)));
    let mut bytes = data.to_le_bytes().to_vec();
    bytes.extend([0, 0x20, 0, 0, 2, 0, 0, 0]);
    physical.write(DATA, &bytes).unwrap();
    physical.write(DATA + layout.avail - ring + 2, &[1, 0]).unwrap();
    let chain = device.pop().unwrap().unwrap();
    assert_eq!(taken(&log), [DATA + 0x3000, DATA + 0x5000]);
    device.complete(chain, 1);
    device.publish().unwrap();
    assert_eq!(taken(&log), [DATA, DATA + 0x3000, DATA + 0x5000]);
    // The ring lies elsewhere in another generation.
    iotlb.update(&memory, ring, LOG_PAGE, user(DATA + 0x7000), Permission::BOTH).unwrap();
    device.set_memory(View::new(Arc::new(iotlb.view(3, &memory)))).unwrap();
    device.arm();
    device.disarm();
    assert_eq!((taken(&log), log.outside()), (vec![DATA + 0x7000], 0));
}
