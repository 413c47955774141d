//! The log by itself: which bits a range sets, and what a peer can do to the file.

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::*;

fn taken(log: &DirtyLog) -> Vec<u64> {
    let mut pages = Vec::new();
    log.take(|guest| pages.push(guest / LOG_PAGE));
    pages
}

fn file(size: u64) -> OwnedFd {
    let file = memfd_create("log", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&file, size).expect("room");
    file
}

#[test]
fn a_range_marks_every_page_it_touches_and_no_other() {
    let (log, _file) = DirtyLog::memfd(64 * LOG_PAGE).expect("a log");
    for first in 0..40 {
        for count in 1..24 {
            // From the last byte of the first page to the first byte of the last one, and whole pages.
            let short = if count == 1 { 1 } else { (count - 2) * LOG_PAGE + 2 };
            log.mark(first * LOG_PAGE + LOG_PAGE - 1, short);
            assert_eq!(taken(&log), (first..first + count).collect::<Vec<_>>());
            log.mark(first * LOG_PAGE, count * LOG_PAGE);
            assert_eq!(taken(&log), (first..first + count).collect::<Vec<_>>());
        }
    }
    log.mark(0, 0);
    assert_eq!((taken(&log), log.outside()), (Vec::new(), 0));
}

#[test]
fn bit_and_byte_lie_where_the_specification_has_them() {
    let shared = file(16);
    let log = DirtyLog::map(shared.try_clone().expect("a descriptor"), 8, 8).expect("a log");
    log.mark(9 * LOG_PAGE, 1);
    log.mark(63 * LOG_PAGE, 1);
    let mut bytes = [0; 16];
    rustix::io::pread(&shared, &mut bytes, 0).expect("the file");
    assert_eq!(bytes, [0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0x80]);
}

/// A71: bits beyond the log are dropped and counted.
#[test]
fn a71_a_page_without_a_bit_is_counted_and_nothing_is_written_behind_the_log() {
    // The mapping has a whole page, of which the log is one byte.
    let shared = file(4096);
    let log = DirtyLog::map(shared.try_clone().expect("a descriptor"), 0, 1).expect("a log");
    log.mark(8 * LOG_PAGE, 1);
    log.mark(u64::MAX, 1);
    log.mark(u64::MAX, u64::MAX);
    assert_eq!((taken(&log), log.outside()), (Vec::new(), 3));
    log.mark(7 * LOG_PAGE, 2 * LOG_PAGE);
    assert_eq!((taken(&log), log.outside()), (vec![7], 4));
    log.mark(0, u64::MAX);
    assert_eq!((taken(&log), log.outside()), ((0..8).collect(), 5));
    let mut bytes = [0; 64];
    rustix::io::pread(&shared, &mut bytes, 0).expect("the file");
    assert_eq!(bytes, [0; 64]);
    assert!(log.covers(0, 8 * LOG_PAGE) && log.covers(8 * LOG_PAGE, 0));
    assert!(!log.covers(0, 8 * LOG_PAGE + 1) && !log.covers(u64::MAX, 2));
}

/// A72: a log that the front-end cuts short.
#[test]
fn a72_a_log_cut_short_costs_its_marks_and_not_the_process() {
    let shared = file(8192);
    let log = DirtyLog::map(shared.try_clone().expect("a descriptor"), 0, 8192).expect("a log");
    ftruncate(&shared, 0).expect("cut");
    assert!(!log.is_poisoned());
    log.mark(5000 * 8 * LOG_PAGE, LOG_PAGE);
    assert!(log.is_poisoned());
}

/// A70: what cannot be mapped.
#[test]
fn a70_what_is_no_log_is_refused() {
    let refused = |file, offset, size| DirtyLog::map(file, offset, size).err();
    assert_eq!(refused(file(64), 0, 0), Some(MapError::NoBytes));
    let short = MapError::FileTooShort { size: 64, needed: 72 };
    assert_eq!(refused(file(64), 8, 64), Some(short));
    assert!(matches!(refused(file(64), u64::MAX - 3, 8), Some(MapError::Wraps { .. })));
    let (pipe, _writer) = rustix::pipe::pipe().expect("a pipe");
    assert_eq!(refused(pipe, 0, 64), Some(MapError::NotAFile { kind: "a pipe" }));
}
