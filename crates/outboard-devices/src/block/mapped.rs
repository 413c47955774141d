//! The engine for images that live in memory: copies between the mapped file and guest memory.
//!
//! ```text
//!  Read, Write ─▶ are all its pages known to be there? ─ yes ─▶ copy ─▶ hole met (SIGBUS)? ─ no ─▶ done
//!                                      └ no ─▶ system call ◀──────────────────── yes ─┘
//!                                                   └─▶ which pages are there now: mincore
//! ```
//! A page fault on a hole of a tmpfs file would take memory for it, also to read, and kill with
//! SIGBUS where there is none left. So only pages that are known to hold data are touched; all
//! others go by `preadv` and `pwritev`, which read holes for nothing and can say ENOSPC. hugetlbfs
//! and DAX have no such pages and are touched anywhere.
//!
//! Invariants: a file that was cut short costs a look by system call, which answers as the other
//! engines do, and from then on nothing else is touched; since a store into the rest of a cut page is
//! seen by nobody, a flush of a file that is too short fails.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use outboard::memory::{MapError, RESIDENT_PAGES, Window, page_size};
use outboard::{Counter, Request};

use super::engine::{Engine, Op, SyncEngine};
use super::turns::Turns;

/// A mapped image, shared by its workers.
#[derive(Debug)]
pub(crate) struct Mapped {
    window: Window,
    /// Bytes of the window. What an image has grown by lies behind it and goes by system calls.
    size: u64,
    /// Which pages hold data. None: all of them may be touched.
    present: Option<Pages>,
    /// Whether the log has it that the file was cut short.
    told: AtomicBool,
    turns: Turns,
}

/// A bit for each page.
#[derive(Debug)]
struct Pages {
    words: Box<[AtomicU64]>,
    shift: u32,
}

impl Pages {
    fn new(bytes: u64) -> Self {
        let shift = page_size().trailing_zeros();
        let words = (bytes >> shift) / 64 + 1;
        Self { words: (0..words).map(|_| AtomicU64::new(0)).collect(), shift }
    }

    /// Word and mask of each word that a range of bytes has pages in.
    fn words(&self, at: u64, length: u64) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let first = at >> self.shift;
        let last = at.saturating_add(length.max(1) - 1) >> self.shift;
        (first / 64..=last / 64).filter_map(move |number| {
            let from = first.saturating_sub(number * 64).min(63);
            let to = (last - number * 64).min(63);
            let mask = (u64::MAX << from) & (u64::MAX >> (63 - to));
            Some((self.words.get(usize::try_from(number).ok()?)?, mask))
        })
    }

    fn has(&self, at: u64, length: u64) -> bool {
        self.words(at, length).all(|(word, mask)| word.load(Ordering::Relaxed) & mask == mask)
    }

    fn add(&self, at: u64, length: u64) {
        for (word, mask) in self.words(at, length) {
            word.fetch_or(mask, Ordering::Relaxed);
        }
    }

    fn remove(&self, at: u64, length: u64) {
        for (word, mask) in self.words(at, length) {
            word.fetch_and(!mask, Ordering::Relaxed);
        }
    }
}

impl Mapped {
    /// Maps `size` bytes of `file`. `holes`: it may have some, which are not to be touched.
    pub(crate) fn new(
        file: OwnedFd,
        size: u64,
        writable: bool,
        holes: bool,
    ) -> Result<Self, MapError> {
        let window = Window::map(file, 0, size, writable)?;
        let present = holes.then(|| Pages::new(size));
        Ok(Self { window, size, present, told: AtomicBool::new(false), turns: Turns::default() })
    }

    /// How often a worker waited until another one had written.
    pub(crate) const fn waits(&self) -> &Counter {
        self.turns.waits()
    }

    /// Whether these bytes may be touched.
    fn may_touch(&self, at: u64, length: u64) -> bool {
        at.saturating_add(length) <= self.size
            && !self.window.is_poisoned()
            && self.present.as_ref().is_none_or(|present| present.has(at, length))
    }

    /// Looks which pages are there, from `at` on. What another thread frees meanwhile is taken for
    /// there until it is freed again: that costs a page, no data.
    fn learn(&self, at: u64) {
        let Some(present) = self.present.as_ref().filter(|_| at < self.size) else { return };
        let page = page_size();
        let start = at & !(page - 1);
        if let Some(bits) = self.window.resident(at) {
            for n in (0..RESIDENT_PAGES as u64).filter(|n| bits >> n & 1 != 0) {
                present.add(start + n * page, 1);
            }
        }
    }

    /// An access met a hole that it should not.
    #[cold]
    fn lost(&self, path: &std::path::Path) {
        if !self.told.swap(true, Ordering::Relaxed) {
            tracing::warn!("image {} was cut short: from here on system calls", path.display());
        }
    }
}

/// See the module.
pub(crate) struct MmapEngine {
    sync: SyncEngine,
    map: Arc<Mapped>,
}

impl MmapEngine {
    pub(crate) fn new(sync: SyncEngine, map: Arc<Mapped>) -> Self {
        map.turns.join();
        Self { sync, map }
    }

    fn read(&mut self, op: Op, offset: u64, request: &mut Request<'_>) -> io::Result<u64> {
        let mut to = request.writable();
        if self.map.may_touch(offset, to.len()) {
            match to.read_from_window(&self.map.window, offset) {
                Ok(read) => return Ok(read),
                Err(_) => self.map.lost(self.sync.image().path()),
            }
        }
        let read = self.sync.run(op, request)?;
        self.map.learn(offset);
        Ok(read)
    }

    fn write(&mut self, op: Op, offset: u64, request: &mut Request<'_>) -> io::Result<u64> {
        let mut from = request.readable();
        let _turn = self.map.turns.take(offset, from.len());
        if self.map.may_touch(offset, from.len()) {
            match from.write_to_window(&self.map.window, offset) {
                Ok(written) => return Ok(written),
                Err(_) => self.map.lost(self.sync.image().path()),
            }
        }
        let written = self.sync.run(op, request)?;
        if let Some(present) = self.map.present.as_ref().filter(|_| written > 0) {
            present.add(offset, written);
        }
        Ok(written)
    }

    /// The image has all its bytes: no store went into what was cut off.
    fn whole(&self) -> io::Result<()> {
        let image = self.sync.image();
        if image.file().metadata()?.len() < image.geometry().size {
            return Err(io::Error::other("the image was cut short"));
        }
        Ok(())
    }
}

impl Drop for MmapEngine {
    fn drop(&mut self) {
        self.map.turns.leave();
    }
}

impl Engine for MmapEngine {
    fn run(&mut self, op: Op, request: &mut Request<'_>) -> io::Result<u64> {
        match op {
            Op::Read { offset } => return self.read(op, offset, request),
            Op::Write { offset } => return self.write(op, offset, request),
            Op::Sync => self.whole()?,
            Op::Allocate { offset, length, .. } => {
                let _turn = self.map.turns.take(offset, length);
                if let Some(present) = &self.map.present {
                    present.remove(offset, length);
                }
                return self.sync.run(op, request);
            }
            Op::WriteZeros { offset, length } => {
                let _turn = self.map.turns.take(offset, length);
                return self.sync.run(op, request);
            }
        }
        self.sync.run(op, request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_there_when_each_of_its_bits_was_added_and_none_removed() {
        let page = page_size();
        let pages = Pages::new(200 * page + 1);
        assert!(!pages.has(0, 1));
        pages.add(3 * page + 5, 1);
        assert!(pages.has(3 * page, page) && !pages.has(3 * page, page + 1));
        assert!(!pages.has(2 * page, page) && !pages.has(3 * page - 1, 2));
        pages.add(60 * page, 140 * page);
        assert!(pages.has(60 * page, 140 * page) && !pages.has(60 * page, 140 * page + 1));
        assert!(!pages.has(60 * page - 1, 2));
        pages.remove(127 * page, 2 * page);
        assert!(pages.has(60 * page, 67 * page) && !pages.has(60 * page, 68 * page));
        assert!(!pages.has(128 * page, 1) && pages.has(129 * page, 71 * page));
        pages.add(200 * page, 1);
        assert!(pages.has(200 * page, 1), "the part of a page at the end");
    }
}
