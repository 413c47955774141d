//! The dirty log of running rings: switched on and off, swapped, and what is wrong with one (cases A70–A74, C16).

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{FEATURES, PATIENCE, PROTOCOL, Rig, doorbell, rang};
use outboard::memory::{DirtyLog, LOG_PAGE};
use outboard::protocol::{ProtocolFeatures, virtio};
use outboard::{HandlerOptions, LoopKind};
use outboard_frontend::{Error as FrontError, SharedMemory};

const LOG: u64 = FEATURES | virtio::LOG_ALL;
/// Behind all memory of the tests.
const END: u64 = 0x4100_0000;

/// Memory shared, LOG_SHMFD negotiated, logging off.
fn ready(kind: LoopKind) -> Rig {
    let mut rig = Rig::bare(kind, HandlerOptions::default());
    rig.front.set_owner().unwrap();
    let offered = rig.front.get_features().unwrap();
    assert_eq!(offered & LOG, LOG, "offered: {offered:#x}");
    let protocol = rig.front.get_protocol_features().unwrap();
    assert!(protocol.contains(ProtocolFeatures::LOG_SHMFD), "offered: {protocol:?}");
    rig.front.set_protocol_features(PROTOCOL | ProtocolFeatures::LOG_SHMFD).unwrap();
    rig.front.set_features(FEATURES).unwrap();
    rig.front.set_mem_table(rig.memory.regions()).unwrap();
    rig
}

/// A log of the test's own, known to the back-end.
fn based(rig: &mut Rig) -> DirtyLog {
    let (log, file) = DirtyLog::memfd(END).unwrap();
    rig.front.set_log_base(&file, log.size(), 0).unwrap();
    log
}

fn taken(log: &DirtyLog) -> Vec<u64> {
    let mut pages = Vec::new();
    log.take(|page| pages.push(page));
    pages
}

fn page(address: u64) -> u64 {
    address / LOG_PAGE * LOG_PAGE
}

fn refused(outcome: Result<(), FrontError>) -> bool {
    matches!(outcome, Err(FrontError::Refused { .. }))
}

#[test]
fn a_running_ring_notes_its_writes_between_two_acknowledgements() {
    for kind in [LoopKind::Uring, LoopKind::Epoll] {
        let mut rig = ready(kind);
        let mut ring = rig.started(0);
        let log = based(&mut rig);
        let answer = page(ring.data.guest() + 4096);
        let used = page(ring.layout.used);
        ring.round(b"a log, and LOG_ALL off");
        assert_eq!(taken(&log), []);
        for round in 0..20 {
            rig.front.set_features(LOG).unwrap();
            ring.round(b"noted");
            assert_eq!(taken(&log), [answer], "the used ring was not asked for, round {round}");
            rig.front.set_vring_addr_logged(0, &ring.layout, Some(ring.layout.used)).unwrap();
            ring.round(b"noted, and the ring");
            let mut both = vec![answer, used];
            both.sort_unstable();
            assert_eq!(taken(&log), both);
            rig.front.set_vring_addr(0, &ring.layout).unwrap();
            rig.front.set_features(FEATURES).unwrap();
            taken(&log);
            ring.round(b"not noted");
            assert_eq!(taken(&log), []);
        }
        assert_eq!(log.outside(), 0);
    }
}

#[test]
fn a_ring_that_starts_while_the_log_is_on_notes_from_its_first_request() {
    let mut rig = ready(LoopKind::Auto);
    let log = based(&mut rig);
    rig.front.set_features(LOG).unwrap();
    let mut ring = rig.ring(0);
    rig.set_up(&ring);
    rig.front.set_vring_addr_logged(0, &ring.layout, Some(0x1000)).unwrap();
    ring.offer(b"there before the kick");
    rig.front.set_vring_kick(0, &ring.kick).unwrap();
    rig.front.set_vring_enable(0, true).unwrap();
    ring.expect(b"there before the kick");
    assert_eq!(
        taken(&log),
        [page(0x1000 + ring.layout.used % 0x1000), page(ring.data.guest() + 4096)]
            .map(|at| if at < 0x2000 { 0x1000 } else { at })
    );
    // A stop and a start keep it; a reset of the device ends it.
    rig.front.get_vring_base(0).unwrap();
    // It may have asked for a kick since its answer, which is noted.
    assert!(taken(&log).iter().all(|page| *page == 0x1000));
    let mut again = rig.started(1);
    again.round(b"another");
    assert_eq!(taken(&log), [page(again.data.guest() + 4096)]);
    rig.front.reset_device().unwrap();
    rig.front.set_features(FEATURES).unwrap();
    let mut third = rig.started(1);
    third.round(b"off again");
    assert_eq!(taken(&log), []);
}

#[test]
fn log_all_without_a_log_does_nothing_and_a_log_that_comes_then_is_used_at_once() {
    let mut rig = ready(LoopKind::Auto);
    let mut ring = rig.started(0);
    rig.front.set_features(LOG).unwrap();
    rig.front.set_vring_addr_logged(0, &ring.layout, Some(u64::MAX)).unwrap();
    ring.round(b"nowhere to note it");
    rig.front.set_vring_addr(0, &ring.layout).unwrap();
    let log = based(&mut rig);
    ring.round(b"here");
    assert_eq!(taken(&log), [page(ring.data.guest() + 4096)]);
}

#[test]
fn what_is_taken_and_dropped_by_a_disabled_ring_is_noted_in_the_used_ring() {
    let mut rig = ready(LoopKind::Auto);
    let log = based(&mut rig);
    rig.front.set_features(LOG).unwrap();
    let mut ring = rig.started(2);
    rig.front.set_vring_addr_logged(2, &ring.layout, Some(ring.layout.used)).unwrap();
    rig.front.set_vring_enable(2, false).unwrap();
    taken(&log);
    ring.offer(b"dropped");
    ring.kick();
    assert_eq!(ring.answered(), 0);
    assert!(taken(&log).contains(&page(ring.layout.used)));
}

/// C16: everything at once. The ring runs, the log is switched on and off and swapped, marks are taken and pages copied:
/// at each end of a logged stretch the copy is the memory.
#[test]
fn c16_a_copy_made_by_marks_is_the_memory_after_every_stretch_under_load() {
    for kind in [LoopKind::Uring, LoopKind::Epoll] {
        let mut rig = ready(kind);
        let mut ring = rig.started(0);
        let (view, start) = (rig.memory.view(), ring.data.guest());
        let stop = Arc::new(AtomicBool::new(false));
        let pause = Arc::new(std::sync::Barrier::new(2));
        let (enough, between) = (Arc::clone(&stop), Arc::clone(&pause));
        // Stretches of load, with a pause after each.
        let load = std::thread::spawn(move || {
            let mut rounds = 0_u64;
            while !enough.load(Ordering::Relaxed) {
                for _ in 0..250 {
                    rounds += 1;
                    ring.round(format!("{rounds:08}").as_bytes());
                }
                between.wait();
                between.wait();
            }
            (ring, rounds)
        });
        for stretch in 0..20 {
            let mut log = based(&mut rig);
            rig.front.set_features(LOG).unwrap();
            // All of it once, then what is marked: as a migration does.
            let mut copy = vec![0; 8192];
            view.read(start, &mut copy).unwrap();
            let mut take = |log: &DirtyLog| {
                log.take(|page| {
                    if let Some(at) = page.checked_sub(start).filter(|at| *at < 8192) {
                        let at = usize::try_from(at).unwrap();
                        view.read(page, &mut copy[at..at + 4096]).unwrap();
                    }
                });
            };
            for round in 0..30 {
                take(&log);
                if round % 10 == 9 {
                    let next = based(&mut rig);
                    take(&log);
                    log = next;
                }
            }
            stop.store(stretch == 19, Ordering::Relaxed);
            pause.wait();
            rig.front.set_features(FEATURES).unwrap();
            take(&log);
            let mut memory = vec![0; 4096];
            view.read(start + 4096, &mut memory).unwrap();
            assert_eq!(copy[4096..], memory, "stretch {stretch}");
            pause.wait();
        }
        let (mut ring, rounds) = load.join().unwrap();
        assert_eq!(rounds, 20 * 250);
        ring.round(b"and on it goes");
    }
}

/// A70: an impossible log is refused and changes nothing. (SET_LOG_BASE has no form for a refusal; what counts is that
/// the old log stays.)
#[test]
fn a70_a_log_that_cannot_be_mapped_leaves_the_one_that_is_there() {
    let mut rig = ready(LoopKind::Auto);
    let mut ring = rig.started(0);
    let log = based(&mut rig);
    rig.front.set_features(LOG).unwrap();
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let short = tempfile::tempfile_in("/dev/shm").unwrap();
    short.set_len(4096).unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let read_only = std::fs::File::open(std::env::current_exe().unwrap()).unwrap();
    for (fd, size, offset) in [
        (pipe.as_fd(), 4096, 0),
        (null.as_fd(), 4096, 0),
        (read_only.as_fd(), 4096, 0),
        (short.as_fd(), 4097, 0),
        (short.as_fd(), 4096, 8),
        (short.as_fd(), 0, 0),
        (short.as_fd(), 8, 4),
        (short.as_fd(), 8, 1 << 40),
        (short.as_fd(), u64::MAX, 8),
        (short.as_fd(), 1 << 62, 0),
    ] {
        let _ = rig.front.set_log_base(fd, size, offset);
        ring.round(b"still the first one");
        assert_eq!(taken(&log), [page(ring.data.guest() + 4096)], "after {size:#x} at {offset:#x}");
    }
}

/// A71: bits that the log has not are dropped.
#[test]
fn a71_a_log_shorter_than_memory_is_written_as_far_as_it_goes() {
    let mut rig = ready(LoopKind::Auto);
    let mut ring = rig.started(0);
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(4096).unwrap();
    rig.front.set_log_base(&file, 8, 4088).unwrap();
    rig.front.set_features(LOG).unwrap();
    for _ in 0..10 {
        ring.round(b"a page without a bit");
    }
    let mut bytes = vec![0; 4096];
    rustix::io::pread(&file, &mut bytes, 0).unwrap();
    assert_eq!(bytes, [0; 4096]);
}

/// A72: the front-end cuts its own log short.
#[test]
fn a72_a_log_cut_short_under_the_ring_costs_the_migration_and_not_the_ring() {
    let mut rig = ready(LoopKind::Auto);
    let mut ring = rig.started(0);
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(END / LOG_PAGE / 8).unwrap();
    rig.front.set_log_base(&file, END / LOG_PAGE / 8, 0).unwrap();
    rig.front.set_features(LOG).unwrap();
    ring.round(b"whole");
    file.set_len(0).unwrap();
    for _ in 0..10 {
        ring.round(b"cut");
    }
    assert!(!rang(&ring.err, Duration::ZERO), "the ring is not broken");
    // It is said at the next occasion.
    let used = Some(ring.layout.used);
    assert!(refused(rig.front.set_vring_addr_logged(0, &ring.layout, used)));
    rig.front.set_features(FEATURES).unwrap();
    assert!(refused(rig.front.set_features(LOG)));
    ring.round(b"lives");
    let log = based(&mut rig);
    rig.front.set_features(LOG).unwrap();
    ring.round(b"and notes again");
    assert_eq!(taken(&log), [page(ring.data.guest() + 4096)]);
}

/// A74: the used ring must fit the log.
#[test]
fn a74_a_used_ring_logged_beyond_the_log_is_refused() {
    let mut rig = ready(LoopKind::Auto);
    let mut ring = rig.started(0);
    let log = based(&mut rig);
    let end = log.size() * 8 * LOG_PAGE;
    for guest in [end, end - 8, u64::MAX, 1 << 60] {
        assert!(refused(rig.front.set_vring_addr_logged(0, &ring.layout, Some(guest))));
    }
    rig.front.set_vring_addr_logged(0, &ring.layout, Some(end - 4096)).unwrap();
    rig.front.set_features(LOG).unwrap();
    ring.round(b"in the last page of the log");
    assert_eq!(taken(&log), [page(ring.data.guest() + 4096), end - 4096]);
    // Of a running ring nothing else can change.
    let mut other = ring.layout;
    other.used += 4;
    assert!(refused(rig.front.set_vring_addr_logged(0, &other, None)));
}

#[test]
fn the_log_descriptor_is_signalled_after_writes_were_noted_and_not_before() {
    let mut rig = ready(LoopKind::Auto);
    let mut ring = rig.started(0);
    let bell = doorbell();
    rig.front.set_log_fd(&bell).unwrap();
    let log = based(&mut rig);
    ring.round(b"not noted");
    assert!(!rang(&bell, Duration::ZERO));
    rig.front.set_features(LOG).unwrap();
    ring.round(b"noted");
    assert!(rang(&bell, PATIENCE));
    assert_ne!(taken(&log), []);
    let another = doorbell();
    rig.front.set_log_fd(&another).unwrap();
    ring.round(b"noted");
    assert!(rang(&another, PATIENCE) && !rang(&bell, Duration::ZERO));
}

#[test]
fn marks_go_on_when_memory_is_replaced_and_grows_under_the_ring() {
    let mut rig = ready(LoopKind::Auto);
    let mut ring = rig.started(0);
    let log = based(&mut rig);
    rig.front.set_features(LOG).unwrap();
    for _ in 0..20 {
        rig.front.set_mem_table(rig.memory.regions()).unwrap();
        ring.round(b"mapped elsewhere now");
        assert_eq!(taken(&log), [page(ring.data.guest() + 4096)]);
    }
    let more = SharedMemory::with_regions(&[(0x4080_0000, 0x1000)]).unwrap();
    for (spec, file) in more.regions() {
        rig.front.add_mem_region(spec, file).unwrap();
        ring.round(b"more of it");
        rig.front.remove_mem_region(spec).unwrap();
    }
    ring.round(b"less of it");
    assert_eq!(taken(&log), [page(ring.data.guest() + 4096)]);
}

#[test]
fn a_log_leaves_no_mapping_and_no_descriptor_behind() {
    let mut rig = ready(LoopKind::Auto);
    let mut ring = rig.started(0);
    rig.front.set_features(LOG).unwrap();
    // A size of its own, so that mappings can be counted.
    let size = 0x5_3000;
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(size).unwrap();
    let maps = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let number = |text| u64::from_str_radix(text, 16).unwrap();
        let ours = maps.lines().filter(|line| line.contains("/dev/shm/"));
        let ranges = ours.filter_map(|line| line.split(' ').next()?.split_once('-'));
        ranges.filter(|(start, end)| number(end) - number(start) == size).count()
    };
    assert_eq!(maps(), 0);
    for _ in 0..50 {
        rig.front.set_log_base(&file, size, 0).unwrap();
        ring.round(b"in the newest");
        assert_eq!(maps(), 1);
    }
    rig.leave().0.unwrap();
    assert_eq!(maps(), 0);
}
