//! The source of entropy as a driver meets it (virtio 1.3 §5.4; case B72).
#![expect(clippy::expect_used, reason = "a failed step of a test is its end")]

#[path = "../rig/mod.rs"]
mod rig;

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use outboard::LoopKind;
use outboard_devices::rng::{Limit, MOST, Rng, RngOptions};
use rig::Rig;

const BOTH: [LoopKind; 2] = [LoopKind::Epoll, LoopKind::Uring];

fn started(options: RngOptions, events: LoopKind) -> Rig {
    let mut rig = Rig::asleep(Rng::new(options).expect("a source"), events, u64::MAX);
    rig.activate(&[0], 64);
    rig
}

fn from(source: &Path) -> RngOptions {
    RngOptions { source: source.to_owned(), ..RngOptions::default() }
}

fn fifo(folder: &Path) -> std::path::PathBuf {
    let path = folder.join("fifo");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0)
        .expect("a fifo");
    path
}

#[test]
fn a_buffer_is_filled_with_bytes_that_differ_each_time() {
    for events in BOTH {
        let mut rig = started(RngOptions::default(), events);
        let mut seen = Vec::new();
        for length in [1, 64, 255, 256, 257, 4096] {
            let room = rig.at(0);
            rig.store(room, &[0; 4096]);
            rig.offer(0, &[], &[(room, length)], 1);
            assert_eq!(rig.back(0), (1, length));
            seen.push(rig.load(room, length));
        }
        for pair in seen.windows(2).skip(1) {
            assert_ne!(pair[0][..64], pair[1][..64]);
        }
        let tail = seen.pop().expect("the longest");
        assert!(tail.chunks(64).all(|piece| piece.iter().any(|&byte| byte != 0)), "all of it");
        rig.end();
    }
}

/// B72: 4 GiB of buffer, most of it the same bytes again and again.
#[test]
fn b72_a_guest_that_asks_for_gigabytes_gets_a_bounded_piece() {
    for events in BOTH {
        let mut rig = started(RngOptions::default(), events);
        let room = rig.at(0);
        let aliased = [(room, 8 << 20); 63];
        rig.offer(0, &[], &aliased, 1);
        assert_eq!(rig.back(0), (1, MOST));
        rig.offer(0, &[], &[(room, 100), (room, 100)], 2);
        assert_eq!(rig.back(0), (2, 200));
        rig.end();
    }
}

#[test]
fn b72_a_request_without_room_or_with_bytes_to_read_comes_back() {
    for events in BOTH {
        let mut rig = started(RngOptions::default(), events);
        let room = rig.at(0);
        rig.offer(0, &[(room, 16)], &[], 1);
        assert_eq!(rig.back(0), (1, 0));
        rig.offer(0, &[(room, 16)], &[(room + 64, 8)], 2);
        assert_eq!(rig.back(0), (2, 8));
        rig.end();
    }
}

#[test]
fn requests_wait_for_a_silent_source_and_the_ring_stops_all_the_same() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let path = fifo(folder.path());
        let mut rig = started(from(&path), events);
        let room = rig.at(0);
        rig.offer(0, &[], &[(room, 8)], 1);
        // It stays in the ring: nothing is in flight, and the next index says so.
        let bases = rig.vmm.sleep().expect("stops").expect("was active");
        assert_eq!(bases, [(0, 0)], "nothing was taken");
        rig.vmm.wake().expect("starts");
        assert!(!rig.is_back(0));
        let mut writer = File::options().write(true).open(&path).expect("somebody reads");
        writer.write_all(b"entropy!").expect("taken");
        assert_eq!(rig.back(0), (1, 8));
        assert_eq!(rig.load(room, 8), b"entropy!");
        // The writer leaves, another one comes.
        drop(writer);
        rig.offer(0, &[], &[(room, 8)], 2);
        let mut writer = File::options().write(true).open(&path).expect("somebody reads");
        writer.write_all(b"more").expect("taken");
        assert_eq!(rig.back(0), (2, 4));
        assert_eq!(rig.load(room, 4), b"more");
        rig.end();
    }
}

#[test]
fn the_end_of_a_file_is_no_busy_loop_and_no_answer() {
    for events in BOTH {
        let mut source = tempfile::NamedTempFile::new().expect("a file");
        source.write_all(&[7; 300]).expect("room");
        let mut rig = started(from(source.path()), events);
        let room = rig.at(0);
        rig.offer(0, &[], &[(room, 290)], 1);
        assert_eq!(rig.back(0), (1, 290));
        rig.offer(0, &[], &[(room, 290)], 2);
        assert_eq!(rig.back(0), (2, 10), "what was left");
        rig.offer(0, &[], &[(room, 290)], 3);
        let bases = rig.vmm.sleep().expect("stops").expect("was active");
        assert_eq!(bases, [(0, 2)], "the third one was not taken");
        rig.end();
    }
}

/// The first period may be over by the time that the first byte went, so only sums are certain.
#[test]
fn a_limit_holds_in_each_period_and_what_waits_is_served_in_a_later_one() {
    for events in BOTH {
        let period = Duration::from_millis(200);
        let limit = Some(Limit { bytes: 100, period });
        let mut rig = started(RngOptions { limit, ..RngOptions::default() }, events);
        let room = rig.at(0);
        let start = Instant::now();
        for token in 0..5 {
            rig.offer(0, &[], &[(room, 60)], token);
        }
        let mut total = 0;
        for token in 0..5 {
            let (back, length) = rig.back(0);
            assert_eq!(back, token);
            assert!((1..=60).contains(&length), "{length} bytes");
            total += u64::from(length);
        }
        assert!(total > 100, "{total} bytes are more than one period's");
        let periods = total.div_ceil(100);
        let least = period * u32::try_from(periods - 1).expect("few");
        assert!(start.elapsed() >= least, "{total} bytes in {:?}", start.elapsed());
        rig.end();
    }
}
