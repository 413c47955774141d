//! A part of somebody else's file, mapped to look at: what the front-end makes of SHMEM_MAP (vhost-user, "Back-end
//! message types").
//!
//! Invariant: like guest memory, its bytes are never borrowed, because the other process changes them at any time; a
//! window that was mapped for reading refuses to be written; a file cut short is an error of the access.
#![expect(unsafe_code, reason = "raw copies out of and into a mapping")]

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};

use crate::copy;
use crate::error::{MapError, WindowError};
use crate::mapping::{self, Mapping, rounded};
use crate::num::{index, wide};
use crate::region;

/// A mapped range of a file. The mapping goes with the value.
pub struct Window {
    mapping: Mapping,
    /// From the start of the mapping to the first byte of the window.
    delta: usize,
    size: u64,
    writable: bool,
}

impl Window {
    /// Maps `size` bytes of `file` from `offset` on and closes the descriptor. The offset may be any number.
    ///
    /// # Errors
    /// Empty, wrapping, no regular file, file too short, or a call that the system refused: a writable window of a file
    /// that was opened for reading is one. Nothing stays mapped.
    pub fn map(file: OwnedFd, offset: u64, size: u64, writable: bool) -> Result<Self, MapError> {
        Self::make(file, (offset, size), offset.saturating_add(size), writable)
    }

    /// As [`Self::map`], but the file may end before the window does, and grow into it. An access behind the page
    /// in which the file ends poisons the window: whoever maps so looks at the file's length first.
    ///
    /// # Errors
    /// As [`Self::map`], but for the file's length.
    pub fn map_beyond(
        file: OwnedFd,
        offset: u64,
        size: u64,
        writable: bool,
    ) -> Result<Self, MapError> {
        Self::make(file, (offset, size), 0, writable)
    }

    /// The file has at least `length` bytes.
    fn make(
        file: OwnedFd,
        (offset, size): (u64, u64),
        length: u64,
        writable: bool,
    ) -> Result<Self, MapError> {
        let wraps = MapError::Wraps { what: "file offset", start: offset, size };
        if size == 0 {
            return Err(MapError::NoBytes);
        }
        if offset.checked_add(size).is_none_or(|end| end > i64::MAX.unsigned_abs()) {
            return Err(wraps);
        }
        region::guard()?;
        region::check_file(0, length, &file)?;
        let page = region::page_size(&file)?;
        let (start, len, delta) = rounded(offset, size, page).ok_or(wraps)?;
        let mapping = Mapping::new(file.as_fd(), start, len, page, writable, true)?;
        Ok(Self { mapping, delta: index(delta), size, writable })
    }

    /// Bytes in the window.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Whether it was mapped for writing too.
    #[must_use]
    pub const fn is_writable(&self) -> bool {
        self.writable
    }

    /// Copies bytes out, from `at` on.
    ///
    /// # Errors
    /// The range does not lie inside, or the file was cut short.
    pub fn read(&self, at: u64, to: &mut [u8]) -> Result<(), WindowError> {
        let from = self.checked(at, to.len())?;
        // SAFETY: `checked` found the whole range inside our live mapping; `to` is our own memory.
        unsafe { copy::copy_in(from, to.as_mut_ptr(), to.len()) };
        self.intact()
    }

    /// Copies bytes in, from `at` on.
    ///
    /// # Errors
    /// The range does not lie inside, the window is read-only, or the file was cut short.
    pub fn write(&self, at: u64, from: &[u8]) -> Result<(), WindowError> {
        if !self.writable {
            return Err(WindowError::ReadOnly);
        }
        let to = self.checked(at, from.len())?;
        // SAFETY: `checked` found the whole range inside our live mapping, which is writable; `from` is our own memory.
        unsafe { copy::copy_out(from.as_ptr(), to, from.len()) };
        self.intact()
    }

    /// The address of a range that lies inside.
    pub(crate) fn checked(&self, at: u64, len: usize) -> Result<*mut u8, WindowError> {
        let len = wide(len);
        match at.checked_add(len) {
            Some(end) if end <= self.size => {
                Ok(self.mapping.base().wrapping_add(self.delta).wrapping_add(index(at)))
            }
            _ => Err(WindowError::Outside { at, len, size: self.size }),
        }
    }

    /// The address of a byte that lies inside a writable window.
    #[cfg(not(outboard_loom))]
    pub(crate) fn byte(&self, at: u64) -> Option<*mut u8> {
        self.checked(at, 1).ok().filter(|_| self.writable)
    }

    /// The address of a part that lies inside a writable window.
    pub(crate) fn part(&self, at: u64, len: u64) -> Option<*mut u8> {
        let len = usize::try_from(len).ok()?;
        self.checked(at, len).ok().filter(|_| self.writable)
    }

    /// Whether the file was cut short and an access met the hole.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.mapping.is_poisoned()
    }

    pub(crate) fn intact(&self) -> Result<(), WindowError> {
        if self.mapping.is_poisoned() { Err(WindowError::Poisoned) } else { Ok(()) }
    }
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = if self.writable { "read-write" } else { "read-only" };
        write!(f, "Window {{ {:#x} bytes, {access} }}", self.size)
    }
}

/// Bytes of a page of this host, a power of two.
#[must_use]
pub fn page_size() -> u64 {
    mapping::page_size()
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, Mode, OFlags, ftruncate, memfd_create};

    use super::*;

    fn file(size: u64) -> OwnedFd {
        let file = memfd_create("window", MemfdFlags::CLOEXEC).expect("a memfd");
        ftruncate(&file, size).expect("room");
        file
    }

    fn again(file: &OwnedFd) -> OwnedFd {
        file.try_clone().expect("a descriptor")
    }

    #[test]
    fn two_windows_of_one_file_show_the_same_bytes() {
        let file = file(0x3000);
        let wide = Window::map(again(&file), 0, 0x3000, true).expect("mapped");
        let narrow = Window::map(file, 0x1010, 0x20, false).expect("at any offset");
        wide.write(0x1012, b"seen").expect("inside");
        let mut bytes = [0; 6];
        narrow.read(0, &mut bytes).expect("inside");
        assert_eq!(&bytes, b"\0\0seen");
        let long = vec![7; 0x2000];
        wide.write(0x1000, &long).expect("inside");
        let mut back = vec![0; 0x2000];
        wide.read(0x1000, &mut back).expect("inside");
        assert_eq!(back, long);
    }

    #[test]
    fn a_file_grows_into_a_window_that_ends_behind_it() {
        let file = file(0x1000);
        assert!(Window::map(again(&file), 0, 0x3000, true).is_err());
        let window = Window::map_beyond(again(&file), 0, 0x3000, true).expect("mapped");
        ftruncate(&file, 0x3000).expect("room");
        window.write(0x2fff, &[7]).expect("inside");
        let mut byte = [0];
        window.read(0x2fff, &mut byte).expect("inside");
        assert_eq!(byte, [7]);
        let (pipe, _) = rustix::pipe::pipe().expect("a pipe");
        assert!(Window::map_beyond(pipe, 0, 1, false).is_err());
    }

    #[test]
    fn a_window_is_not_looked_through_beside_its_frame() {
        let window = Window::map(file(0x1000), 0, 0x10, true).expect("mapped");
        let size = 0x10;
        for (at, len) in [(0x11, 0), (0x10, 1), (0, 0x11), (u64::MAX, 1), (0xf, 2)] {
            let outside = Err(WindowError::Outside { at, len: wide(len), size });
            assert_eq!(window.read(at, &mut vec![0; len]), outside);
            assert_eq!(window.write(at, &vec![0; len]), outside);
        }
        assert_eq!(window.read(0x10, &mut []), Ok(()));
    }

    #[test]
    fn a_read_only_window_is_not_written_and_a_read_only_file_has_no_other() {
        let file = file(0x1000);
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let only = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .expect("the same file");
        let refused = Window::map(again(&only), 0, 0x1000, true);
        assert!(matches!(refused, Err(MapError::Host { call: "mmap", .. })), "{refused:?}");
        let window = Window::map(only, 0, 0x1000, false).expect("mapped");
        assert!(!window.is_writable());
        assert_eq!(window.write(0, &[1]), Err(WindowError::ReadOnly));
        assert_eq!(window.read(0, &mut [1]), Ok(()));
    }

    #[test]
    fn what_is_no_file_or_too_short_is_not_mapped() {
        let refused = |offset, size| Window::map(file(0x1000), offset, size, true).err();
        assert_eq!(refused(0, 0), Some(MapError::NoBytes));
        assert!(matches!(refused(u64::MAX, 2), Some(MapError::Wraps { .. })));
        assert!(matches!(refused(1 << 62, 1 << 62), Some(MapError::Wraps { .. })));
        let short = MapError::FileTooShort { size: 0x1000, needed: 0x1001 };
        assert_eq!(refused(1, 0x1000), Some(short));
        let (pipe, _) = rustix::pipe::pipe().expect("a pipe");
        let refused = Window::map(pipe, 0, 1, false).err();
        assert_eq!(refused, Some(MapError::NotAFile { kind: "a pipe" }));
    }

    #[test]
    fn a_file_cut_short_costs_the_access_and_not_the_process() {
        let file = file(0x4000);
        let window = Window::map(again(&file), 0, 0x4000, true).expect("mapped");
        ftruncate(&file, 0).expect("cut");
        assert_eq!(window.read(0x2000, &mut [0; 8]), Err(WindowError::Poisoned));
        assert_eq!(window.write(0x2000, &[0; 8]), Err(WindowError::Poisoned));
    }
}
