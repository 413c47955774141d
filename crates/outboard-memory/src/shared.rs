//! A part of a file that a process and the one that follows it after a crash both keep notes in: the in-flight region of
//! one ring (vhost-user, "Inflight I/O tracking").
//!
//! Invariant: fields are read and written whole, by value; nothing outside of the part is touched; a store is there,
//! after all stores before it, also when the process is killed at the next instruction.
#![expect(unsafe_code, reason = "atomic access to the fields of a mapping")]

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use crate::window::Window;

/// A part of a writable [`Window`], shared by clones. It keeps the window mapped.
#[derive(Clone)]
pub struct SharedArea {
    /// The first byte, aligned to 8.
    at: *mut u8,
    len: usize,
    window: Arc<Window>,
}

// SAFETY: shared memory belongs to no thread; the Arc keeps it mapped; all access is atomic, by value.
unsafe impl Send for SharedArea {}
// SAFETY: likewise.
unsafe impl Sync for SharedArea {}

macro_rules! fields {
    ($($load:ident $store:ident $int:ty, $atomic:ty;)*) => {$(
        /// The field at byte `at`, a multiple of its size; `None` outside.
        #[inline(always)]
        pub fn $load(&self, at: usize) -> Option<$int> {
            let field = self.field(at, size_of::<$int>())?;
            // SAFETY: aligned and inside a live mapping, as `field` found; an atomic, which others may write too.
            Some(unsafe { <$atomic>::from_ptr(field.cast()) }.load(Ordering::Acquire))
        }

        /// Replaces the field at byte `at`, a multiple of its size; nothing happens outside.
        #[inline(always)]
        pub fn $store(&self, at: usize, value: $int) {
            #[cfg(outboard_loom)]
            crate::cells::twin::step();
            if let Some(field) = self.field(at, size_of::<$int>()) {
                // SAFETY: as above; the window is writable.
                unsafe { <$atomic>::from_ptr(field.cast()) }.store(value, Ordering::Release);
            }
        }
    )*};
}

impl SharedArea {
    /// `len` bytes of a window from `start` on; `None` when they do not lie inside, the window is read-only, or the
    /// first byte is not aligned to 8.
    pub fn new(window: &Arc<Window>, start: u64, len: u64) -> Option<Self> {
        let at = window.part(start, len)?;
        let len = usize::try_from(len).ok()?;
        at.addr().is_multiple_of(8).then(|| Self { at, len, window: Arc::clone(window) })
    }

    fields! {
        load8 store8 u8, AtomicU8;
        load16 store16 u16, AtomicU16;
        load64 store64 u64, AtomicU64;
    }

    /// Whether the file was cut short and an access met the hole: what was noted is lost.
    pub fn is_poisoned(&self) -> bool {
        self.window.is_poisoned()
    }

    #[inline(always)]
    fn field(&self, at: usize, size: usize) -> Option<*mut u8> {
        let inside = at.is_multiple_of(size) && at < self.len && size <= self.len - at;
        inside.then(|| self.at.wrapping_add(at))
    }
}

impl fmt::Debug for SharedArea {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedArea {{ {:#x} bytes }}", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    fn window(size: u64, writable: bool) -> (Arc<Window>, std::os::fd::OwnedFd) {
        let file = memfd_create("area", MemfdFlags::CLOEXEC).expect("a memfd");
        ftruncate(&file, size).expect("room");
        let ours = file.try_clone().expect("a descriptor");
        (Arc::new(Window::map(ours, 0, size, writable).expect("mapped")), file)
    }

    #[test]
    fn fields_are_where_they_are_said_to_be_and_nothing_is_touched_beside_them() {
        let (window, file) = window(4096, true);
        let area = SharedArea::new(&window, 64, 24).expect("inside");
        area.store16(2, 0x1234);
        area.store8(23, 0x56);
        area.store64(8, 0x1122_3344_5566_7788);
        // Outside, across the end, not aligned.
        area.store8(24, 0xff);
        area.store64(17, u64::MAX);
        area.store16(23, 0xffff);
        area.store64(usize::MAX - 6, u64::MAX);
        assert_eq!((area.load8(24), area.load16(23), area.load64(24)), (None, None, None));
        assert_eq!((area.load16(2), area.load8(23)), (Some(0x1234), Some(0x56)));
        assert_eq!(area.load64(8), Some(0x1122_3344_5566_7788));
        let mut bytes = [0; 40];
        rustix::io::pread(&file, &mut bytes, 56).expect("the file");
        let mut expected = [0; 40];
        expected[10..12].copy_from_slice(&[0x34, 0x12]);
        expected[16..24].copy_from_slice(&[0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]);
        expected[31] = 0x56;
        assert_eq!(bytes, expected);
    }

    #[test]
    fn a_part_that_is_not_there_is_no_area() {
        let (writable, _file) = window(4096, true);
        for (start, len) in [(0, 4097), (4096, 1), (u64::MAX, 2), (8, 4089), (4, 8)] {
            assert!(SharedArea::new(&writable, start, len).is_none(), "{start} {len}");
        }
        let (read_only, _file) = window(4096, false);
        assert!(SharedArea::new(&read_only, 0, 8).is_none());
    }

    #[test]
    fn a_file_cut_short_is_poison_and_no_signal() {
        let (window, file) = window(4096, true);
        let area = SharedArea::new(&window, 0, 64).expect("inside");
        ftruncate(&file, 0).expect("cut");
        area.store64(0, 7);
        assert!(area.is_poisoned());
    }
}
