//! One `mmap` of a file, known to the SIGBUS guard while it lives.
#![expect(unsafe_code, reason = "mmap and munmap")]

use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use crate::error::MapError;
use crate::num::index;
use crate::sigbus::{self, Slot};

/// A shared mapping, writable or not. `base` and `len` are multiples of the page size of the file.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    slot: &'static Slot,
}

// SAFETY: a range of shared memory belongs to no thread; every access goes through raw pointers, by value.
unsafe impl Send for Mapping {}
// SAFETY: likewise.
unsafe impl Sync for Mapping {}

/// Bytes of an ordinary page. (rustix would read the auxiliary vector, which does not work under valgrind.)
pub(crate) fn page_size() -> u64 {
    // SAFETY: sysconf reads a constant.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).ok().filter(|size| size.is_power_of_two()).unwrap_or(4096)
}

/// Rounds a file range out to whole pages: (offset to map at, bytes to map, bytes between the two offsets).
/// `None` when the end does not fit. `page` is a power of two (2 MiB or 1 GiB for hugetlbfs).
pub fn rounded(offset: u64, size: u64, page: u64) -> Option<(u64, u64, u64)> {
    let start = offset & !(page - 1);
    let delta = offset - start;
    let len = delta.checked_add(size)?.checked_next_multiple_of(page)?;
    start.checked_add(len)?;
    Some((start, len, delta))
}

impl Mapping {
    /// Maps `len` bytes of `file` at `offset`, both multiples of `page`; never part of a core dump, and not of a
    /// child process either with `dont_fork`.
    pub(crate) fn new(
        file: BorrowedFd<'_>,
        offset: u64,
        len: u64,
        page: u64,
        writable: bool,
        dont_fork: bool,
    ) -> Result<Self, MapError> {
        let (len, page) = (index(len), index(page));
        let prot = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
        let base = unsafe { mmap(ptr::null_mut(), len, prot, flags, file, offset) }
            .map_err(|errno| MapError::host("mmap", errno))?;
        let base = NonNull::new(base.cast::<u8>())
            .ok_or(MapError::host("mmap", rustix::io::Errno::NOMEM))?;
        let slot = sigbus::register(base.as_ptr().addr(), len, page);
        let mapping = Self { base, len, slot };
        mapping.advise(Advice::LinuxDontDump, "madvise(MADV_DONTDUMP)")?;
        if dont_fork {
            mapping.advise(Advice::LinuxDontFork, "madvise(MADV_DONTFORK)")?;
        }
        Ok(mapping)
    }

    fn advise(&self, advice: Advice, call: &'static str) -> Result<(), MapError> {
        // SAFETY: the range is our own mapping; neither advice changes its contents in this process.
        unsafe { madvise(self.base.as_ptr().cast(), self.len, advice) }
            .map_err(|errno| MapError::host(call, errno))
    }

    /// No transparent huge pages; a kernel without them has nothing to be told.
    pub(crate) fn small_pages(&self) -> Result<(), MapError> {
        match self.advise(Advice::LinuxNoHugepage, "madvise(MADV_NOHUGEPAGE)") {
            Err(MapError::Host { errno, .. }) if errno == libc::EINVAL => Ok(()),
            other => other,
        }
    }

    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// As if an access had met a hole.
    pub(crate) fn poison(&self) {
        self.slot.poison();
    }

    /// The first byte.
    pub(crate) fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Whether the file was cut short and an access met the hole.
    pub(crate) fn is_poisoned(&self) -> bool {
        self.slot.is_poisoned()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        sigbus::unregister(self.slot);
        // SAFETY: our own mapping, which nothing points into any more: pointers into it live in values that hold it.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of a whole mapping cannot fail");
    }
}
