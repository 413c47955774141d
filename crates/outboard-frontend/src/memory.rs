//! The front-end's own guest memory: sealed memory files, mapped here and shared with the back-end, and
//! an allocator over them.
//!
//! Carries out the front-end's half of "Memory regions description" of vhost-user. Invariants: the files
//! can neither shrink nor grow nor be sealed further, so that a back-end cannot make our own accesses
//! fault; the user addresses sent out are made up (they say nothing about our address space) and differ
//! from the guest addresses, so that a mix-up is an error at once; ranges handed out never overlap.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outboard_memory::{AccessError, GuestMemory, MapOptions, Region, RegionSpec, View};
use rustix::fs::{MemfdFlags, SealFlags};

use crate::error::Error;

/// Guest address of the first region of [`SharedMemory::with_size`]: 1 GiB, so that no valid address is
/// small enough to be mistaken for a length or an index.
pub const DEFAULT_GUEST_BASE: u64 = 0x4000_0000;

/// What a guest address is raised by to make the user address that stands for it.
pub const USER_OFFSET: u64 = 0x6000_0000_0000;

/// Guest memory that the front-end owns and shares. Cloning it makes another handle to the same memory.
#[derive(Clone)]
pub struct SharedMemory(Arc<Inner>);

struct Inner {
    memory: Arc<GuestMemory>,
    files: Vec<(RegionSpec, OwnedFd)>,
    free: Mutex<FreeRanges>,
}

impl SharedMemory {
    /// One region of at least `size` bytes at [`DEFAULT_GUEST_BASE`].
    ///
    /// # Errors
    /// [`Error::Memory`] when the host does not give it.
    pub fn with_size(size: u64) -> Result<Self, Error> {
        Self::with_regions(&[(DEFAULT_GUEST_BASE, size)])
    }

    /// Regions of (guest address, size); sizes are rounded up to whole pages. Each is a file of its own.
    ///
    /// # Errors
    /// [`Error::Memory`] when they overlap or the host does not give them.
    pub fn with_regions(regions: &[(u64, u64)]) -> Result<Self, Error> {
        let mut files = Vec::with_capacity(regions.len());
        let mut mapped = Vec::with_capacity(regions.len());
        let mut free = FreeRanges::default();
        for &(guest_addr, size) in regions {
            let (file, size) = sealed_file(size)?;
            let user_addr = guest_addr.wrapping_add(USER_OFFSET);
            let spec = RegionSpec { guest_addr, user_addr, size, offset: 0 };
            let ours = file.try_clone().map_err(|error| Error::memory("dup", error))?;
            let region =
                Region::map(spec, ours, MapOptions { dont_fork: true, ..MapOptions::default() })
                    .map_err(|error| Error::Memory(error.to_string()))?;
            mapped.push(Arc::new(region));
            files.push((spec, file));
            free.give(guest_addr, size);
        }
        let memory =
            GuestMemory::new(1, mapped).map_err(|error| Error::Memory(error.to_string()))?;
        Ok(Self(Arc::new(Inner { memory: Arc::new(memory), files, free: Mutex::new(free) })))
    }

    /// The regions and the descriptors to send for them.
    pub fn regions(&self) -> impl Iterator<Item = (RegionSpec, BorrowedFd<'_>)> {
        self.0.files.iter().map(|(spec, file)| (*spec, file.as_fd()))
    }

    /// A view of the memory, for rings.
    #[must_use]
    pub fn view(&self) -> View {
        View::new(Arc::clone(&self.0.memory))
    }

    /// The user address that the back-end knows a guest address by.
    #[must_use]
    pub const fn user_address(guest: u64) -> u64 {
        guest.wrapping_add(USER_OFFSET)
    }

    /// Takes `len` bytes out of the free memory, at a multiple of `align` (a power of two).
    ///
    /// # Errors
    /// [`Error::Memory`] when no free range is long enough.
    pub fn allocate(&self, len: usize, align: u64) -> Result<Buffer, Error> {
        let bytes = u64::try_from(len).unwrap_or(u64::MAX);
        let guest = self.free().take(bytes.max(1), align.max(1)).ok_or_else(|| {
            Error::Memory(format!("no {len} bytes of shared memory left in one piece"))
        })?;
        Ok(Buffer { memory: self.clone(), guest, len })
    }

    fn free(&self) -> MutexGuard<'_, FreeRanges> {
        self.0.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for SharedMemory {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_list().entries(self.0.files.iter().map(|(spec, _)| spec)).finish()
    }
}

/// A range of shared memory; it is free again when this is dropped. The back-end may change the bytes at
/// any time: they are copied out or in, never borrowed.
pub struct Buffer {
    memory: SharedMemory,
    guest: u64,
    len: usize,
}

impl Buffer {
    /// Guest address of the first byte.
    #[must_use]
    pub const fn guest(&self) -> u64 {
        self.guest
    }

    /// Length in bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The memory it is a part of.
    #[must_use]
    pub const fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// Copies bytes out, from `at` on.
    ///
    /// # Errors
    /// When the range does not lie inside.
    pub fn read(&self, at: usize, to: &mut [u8]) -> Result<(), AccessError> {
        let guest = self.checked(at, to.len())?;
        self.memory.view().read(guest, to)
    }

    /// Copies bytes in, from `at` on.
    ///
    /// # Errors
    /// When the range does not lie inside.
    pub fn write(&self, at: usize, from: &[u8]) -> Result<(), AccessError> {
        let guest = self.checked(at, from.len())?;
        self.memory.view().write(guest, from)
    }

    /// Sets every byte to `value`.
    ///
    /// # Errors
    /// Never, as the range was checked when it was handed out.
    pub fn fill(&self, value: u8) -> Result<(), AccessError> {
        let piece = [value; 4096];
        let view = self.memory.view();
        let mut at = 0;
        while at < self.len {
            let part = piece.len().min(self.len - at);
            let bytes = piece.get(..part).unwrap_or_default();
            view.write(self.guest.wrapping_add(wide(at)), bytes)?;
            at += part;
        }
        Ok(())
    }

    /// Never gives the range back: for memory that a back-end may still write to.
    pub fn leak(mut self) {
        self.len = 0;
        self.guest = u64::MAX;
    }

    fn checked(&self, at: usize, len: usize) -> Result<u64, AccessError> {
        match at.checked_add(len) {
            Some(end) if end <= self.len => Ok(self.guest.wrapping_add(wide(at))),
            _ => Err(AccessError::Outside { guest: self.guest, len: wide(len) }),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.guest != u64::MAX {
            self.memory.free().give(self.guest, wide(self.len.max(1)));
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "Buffer({:#x}, {} bytes)", self.guest, self.len)
    }
}

/// Free ranges by start; neighbours are merged. First fit.
#[derive(Debug, Default)]
struct FreeRanges(BTreeMap<u64, u64>);

impl FreeRanges {
    fn take(&mut self, len: u64, align: u64) -> Option<u64> {
        let (start, size, at) = self.0.iter().find_map(|(&start, &size)| {
            let at = start.checked_next_multiple_of(align)?;
            let end = at.checked_add(len)?;
            (end <= start.checked_add(size)?).then_some((start, size, at))
        })?;
        self.0.remove(&start);
        if at > start {
            self.0.insert(start, at - start);
        }
        let (end, old_end) = (at + len, start + size);
        if end < old_end {
            self.0.insert(end, old_end - end);
        }
        Some(at)
    }

    fn give(&mut self, start: u64, len: u64) {
        let (mut start, mut len) = (start, len);
        if let Some((&before, &size)) = self.0.range(..start).next_back()
            && before + size == start
        {
            self.0.remove(&before);
            start = before;
            len += size;
        }
        if let Some(size) = self.0.remove(&start.wrapping_add(len)) {
            len += size;
        }
        self.0.insert(start, len);
    }
}

/// A file of at least `size` bytes, and its length in whole pages.
fn sealed_file(size: u64) -> Result<(OwnedFd, u64), Error> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("outboard-frontend", flags)
        .map_err(|errno| Error::memory("memfd_create", errno.into()))?;
    // What such a file is made of is pages; 64 KiB are the largest on the platforms that we run on.
    let stat = rustix::fs::fstat(&file).map_err(|errno| Error::memory("fstat", errno.into()))?;
    let page = u64::try_from(stat.st_blksize).unwrap_or(4096).clamp(4096, 65536);
    let size = size.checked_next_multiple_of(page).unwrap_or(size);
    rustix::fs::ftruncate(&file, size).map_err(|errno| Error::memory("ftruncate", errno.into()))?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals)
        .map_err(|errno| Error::memory("sealing a memfd", errno.into()))?;
    Ok((file, size))
}

pub(crate) fn wide(value: usize) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_aligned_and_merge_when_they_come_back() {
        let mut free = FreeRanges::default();
        free.give(0x1000, 0x1000);
        let a = free.take(10, 16).expect("there is room");
        let b = free.take(100, 256).expect("there is room");
        assert_eq!((a, b), (0x1000, 0x1100));
        assert_eq!(free.take(0x1000, 1), None);
        free.give(a, 10);
        free.give(b, 100);
        assert_eq!(free.0, BTreeMap::from([(0x1000, 0x1000)]));
    }

    #[test]
    fn a_shared_file_cannot_be_cut_short_by_the_other_side() {
        let memory = SharedMemory::with_size(8192).expect("memory");
        let (_, file) = memory.regions().next().expect("one region");
        assert!(rustix::fs::ftruncate(file, 4096).is_err());
        assert!(rustix::fs::ftruncate(file, 1 << 30).is_err());
        assert!(rustix::fs::fcntl_add_seals(file, SealFlags::WRITE).is_err());
    }

    #[test]
    fn bytes_go_in_and_out_and_not_past_the_end() {
        let memory =
            SharedMemory::with_regions(&[(0x1000, 4096), (0x10_0000, 4096)]).expect("memory");
        let buffer = memory.allocate(100, 64).expect("room");
        buffer.fill(7).expect("inside");
        buffer.write(98, &[1, 2]).expect("inside");
        let mut bytes = [0; 3];
        buffer.read(97, &mut bytes).expect("inside");
        assert_eq!(bytes, [7, 1, 2]);
        assert!(buffer.write(98, &[1, 2, 3]).is_err());
        assert!(buffer.read(usize::MAX, &mut bytes).is_err());
    }

    #[test]
    fn memory_is_given_back_unless_it_is_leaked() {
        let memory = SharedMemory::with_size(4096).expect("memory");
        drop(memory.allocate(4096, 4096).expect("all of it"));
        memory.allocate(4096, 4096).expect("all of it again").leak();
        assert!(memory.allocate(1, 1).is_err());
    }
}
