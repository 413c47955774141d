//! The dirty log: one bit for each 4096 bytes of guest-physical memory, set by the device when it writes there, taken by
//! the front-end that copies the memory elsewhere (vhost-user, "Migration").
//!
//! ```text
//!  device:     mark ─▶ write ─▶ fence(Release), mark ─▶ publish
//!  front-end:  take (exchange with 0) ─▶ fence(Acquire), copy the page
//! ```
//! Invariant: a mark that follows a write is either taken by an exchange whose copy then holds the write, or still there
//! afterwards (loom tests in `outboard-queue`). The log is the peer's: a page it has no bit for is counted and forgotten,
//! a file cut short costs the marks and not the process.
#![cfg_attr(
    not(outboard_loom),
    expect(unsafe_code, reason = "atomic access to the bytes of a mapping")
)]

use std::fmt;
use std::os::fd::OwnedFd;
#[cfg(not(outboard_loom))]
use std::sync::atomic::AtomicU8;
use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};

#[cfg(outboard_loom)]
use loom::sync::atomic::AtomicU8;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use crate::cells::fence;
use crate::error::MapError;
use crate::window::Window;

/// Bytes of guest memory that one bit stands for, whatever the page size of the host.
pub const LOG_PAGE: u64 = 4096;

/// A mapped log. The mapping goes with the last value that refers to it.
pub struct DirtyLog {
    window: Window,
    /// Marks that had pages without a bit.
    outside: AtomicU64,
    #[cfg(outboard_loom)]
    twin: crate::cells::twin::Bytes,
}

impl DirtyLog {
    /// Maps `size` bytes of `file` from `offset` on, as SET_LOG_BASE says, and closes the descriptor.
    ///
    /// # Errors
    /// Empty, wrapping, no regular file, file too short, or a call that the system refused. Nothing stays mapped.
    pub fn map(file: OwnedFd, offset: u64, size: u64) -> Result<Self, MapError> {
        let window = Window::map(file, offset, size, true)?;
        Ok(Self {
            window,
            outside: AtomicU64::new(0),
            #[cfg(outboard_loom)]
            twin: crate::cells::twin::Bytes::new(size),
        })
    }

    /// A log of our own for guest-physical addresses below `end`, all clear, in a file that cannot be cut short; and
    /// the file, to send.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn memfd(end: u64) -> Result<(Self, OwnedFd), MapError> {
        let size = end.div_ceil(LOG_PAGE).div_ceil(u64::from(u64::BITS)).max(1) * 8;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file =
            memfd_create("outboard-log", flags).map_err(|e| MapError::host("memfd_create", e))?;
        ftruncate(&file, size).map_err(|e| MapError::host("ftruncate", e))?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(|e| MapError::host("fcntl(F_ADD_SEALS)", e))?;
        let ours = file.try_clone().map_err(|e| MapError::Host {
            call: "dup",
            errno: e.raw_os_error().unwrap_or_default(),
        })?;
        Ok((Self::map(ours, 0, size)?, file))
    }

    /// Bytes of the log.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.window.size()
    }

    /// Whether the log has a bit for every page of this guest-physical range.
    #[must_use]
    pub fn covers(&self, guest: u64, len: u64) -> bool {
        match guest.checked_add(len) {
            Some(end) => end.div_ceil(LOG_PAGE) <= self.pages(),
            None => false,
        }
    }

    /// Marks the pages of a guest-physical range. What was written before is seen by whoever takes the marks; what is
    /// written later is written behind them.
    pub fn mark(&self, guest: u64, len: u64) {
        let Some(more) = len.checked_sub(1) else { return };
        let (first, mut last) = (guest / LOG_PAGE, guest.saturating_add(more) / LOG_PAGE);
        let pages = self.pages();
        if last >= pages {
            self.outside.fetch_add(1, Ordering::Relaxed);
            if first >= pages {
                return;
            }
            last = pages - 1;
        }
        fence(Ordering::Release);
        for byte in first / 8..=last / 8 {
            let from = if byte == first / 8 { first % 8 } else { 0 };
            let to = if byte == last / 8 { last % 8 } else { 7 };
            self.or(byte, (0xff << from) & (0xff >> (7 - to)));
        }
        compiler_fence(Ordering::SeqCst);
    }

    /// Takes all marks away and calls `with` for each page that had one, by its guest-physical address, in order. A
    /// page is to be copied after that, not before.
    pub fn take(&self, mut with: impl FnMut(u64)) {
        for byte in 0..self.size() {
            let mut bits = self.swap(byte);
            while bits != 0 {
                let bit = u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                with((byte * 8 + bit) * LOG_PAGE);
            }
        }
    }

    /// Marks so far that had pages for which there is no bit.
    #[must_use]
    pub fn outside(&self) -> u64 {
        self.outside.load(Ordering::Relaxed)
    }

    /// Whether the file was cut short and a mark hit the hole: marks are lost.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.window.is_poisoned()
    }

    fn pages(&self) -> u64 {
        self.size().saturating_mul(8)
    }
}

impl DirtyLog {
    /// A byte of the log.
    #[cfg(not(outboard_loom))]
    fn byte(&self, at: u64) -> Option<&AtomicU8> {
        let byte = self.window.byte(at)?;
        // SAFETY: a byte of our live, writable mapping, borrowed with it; an atomic, which both sides change.
        Some(unsafe { AtomicU8::from_ptr(byte) })
    }

    /// A byte of the log.
    #[cfg(outboard_loom)]
    fn byte(&self, at: u64) -> Option<&AtomicU8> {
        self.twin.byte(at)
    }

    fn or(&self, at: u64, mask: u8) {
        if let Some(byte) = self.byte(at) {
            byte.fetch_or(mask, Ordering::Relaxed);
        }
    }

    fn swap(&self, at: u64) -> u8 {
        let Some(byte) = self.byte(at) else { return 0 };
        if byte.load(Ordering::Relaxed) == 0 {
            return 0;
        }
        let bits = byte.swap(0, Ordering::Relaxed);
        fence(Ordering::Acquire);
        bits
    }
}

impl fmt::Debug for DirtyLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DirtyLog {{ {:#x} bytes, {} outside }}", self.size(), self.outside())
    }
}

#[cfg(test)]
mod tests;
