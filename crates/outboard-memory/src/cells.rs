//! Ring memory: indices, flags, elements and descriptors, resolved and checked once, then read and written by value.
//!
//! Indices, flags and event fields are atomics with the ordering the caller names; elements and descriptors are
//! volatile words, ordered by the index that publishes them (virtio 1.3 §2.7). A handle keeps its mapping alive.
//! Under `cfg(outboard_loom)` the same types stand on loom's atomics, kept beside the memory (`twin`).

use std::sync::Arc;

use crate::error::AccessError;
use crate::map::GuestMemory;
use crate::num::{index, wide};

#[cfg(not(outboard_loom))]
mod real;
#[cfg(outboard_loom)]
pub mod twin;

#[cfg(not(outboard_loom))]
pub(crate) use real::packed::PackedRun;
#[cfg(not(outboard_loom))]
pub use real::packed::{Cell32, Lap, PackedRing, UsedLap};
#[cfg(not(outboard_loom))]
pub use real::{Cell16, Descriptors, Pairs, Ring16, fence};
#[cfg(outboard_loom)]
pub(crate) use twin::packed::PackedRun;
#[cfg(outboard_loom)]
pub use twin::packed::{Cell32, Lap, PackedRing, UsedLap};
#[cfg(outboard_loom)]
pub use twin::{Cell16, Descriptors, Pairs, Ring16, fence};

/// One descriptor, as it was when it was read (virtio 1.3 §2.7.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest address of the buffer.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// [`NEXT`](Self::NEXT), [`WRITE`](Self::WRITE), [`INDIRECT`](Self::INDIRECT).
    pub flags: u16,
    /// Index of the next descriptor of the chain, with NEXT.
    pub next: u16,
}

impl Descriptor {
    /// Flag: another one follows.
    pub const NEXT: u16 = 1;
    /// Flag: the device writes this buffer.
    pub const WRITE: u16 = 2;
    /// Flag: the buffer is a table of descriptors.
    pub const INDIRECT: u16 = 4;

    /// As two 64-bit words.
    #[inline(always)]
    pub(crate) fn to_words(self) -> (u64, u64) {
        let rest = u64::from(self.len) | u64::from(self.flags) << 32 | u64::from(self.next) << 48;
        (self.addr, rest)
    }
}

/// What a descriptor of a packed ring says beside its flags (virtio 1.3 §2.8.13), as it was when it was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackedBody {
    /// Guest address of the buffer.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// Buffer id.
    pub id: u16,
}

/// A resolved range of ring memory: the place to take typed handles from.
pub struct Cells {
    host: *mut u8,
    guest: u64,
    len: u64,
    memory: Arc<GuestMemory>,
}

impl Cells {
    /// `host` is valid for `len` bytes inside one region of `memory`.
    pub(crate) fn new(host: *mut u8, guest: u64, len: u64, memory: Arc<GuestMemory>) -> Self {
        Self { host, guest, len, memory }
    }

    /// A 16-bit index, flags or event field, `offset` bytes from the start.
    ///
    /// # Errors
    /// Outside the cells, or not aligned to 2.
    pub fn u16_at(&self, offset: u64) -> Result<Cell16, AccessError> {
        self.check(offset, 2, 2)?;
        Ok(Cell16::new(self, offset))
    }

    /// An array of `count` 16-bit elements, a power of two.
    ///
    /// # Errors
    /// Outside the cells, not aligned to 2, or `count` is no power of two.
    pub fn ring16(&self, offset: u64, count: u16) -> Result<Ring16, AccessError> {
        self.check(offset, u64::from(count) * 2, 2)?;
        Ok(Ring16::new(self, offset, power_of_two(count)?))
    }

    /// An array of `count` pairs of 32-bit elements, a power of two: the used ring.
    ///
    /// # Errors
    /// Outside the cells, not aligned to 4, or `count` is no power of two.
    pub fn pairs(&self, offset: u64, count: u16) -> Result<Pairs, AccessError> {
        self.check(offset, u64::from(count) * 8, 4)?;
        Ok(Pairs::new(self, offset, power_of_two(count)?))
    }

    /// A table of `count` descriptors.
    ///
    /// # Errors
    /// Outside the cells, or not aligned to 16.
    pub fn descriptors(&self, offset: u64, count: u16) -> Result<Descriptors, AccessError> {
        self.check(offset, u64::from(count) * 16, 16)?;
        Ok(Descriptors::new(self, offset, count))
    }

    /// A 32-bit field, `offset` bytes from the start: an event suppression structure.
    ///
    /// # Errors
    /// Outside the cells, or not aligned to 4.
    pub fn u32_at(&self, offset: u64) -> Result<Cell32, AccessError> {
        self.check(offset, 4, 4)?;
        Ok(Cell32::new(self, offset))
    }

    /// The descriptor ring of a packed queue, of `count` descriptors.
    ///
    /// # Errors
    /// Outside the cells, or not aligned to 16.
    pub fn packed(&self, offset: u64, count: u16) -> Result<PackedRing, AccessError> {
        self.check(offset, u64::from(count) * 16, 16)?;
        Ok(PackedRing::new(self, offset, count))
    }

    fn check(&self, offset: u64, size: u64, align: u64) -> Result<(), AccessError> {
        let len = self.len;
        if offset.checked_add(size).is_none_or(|end| end > len) {
            return Err(AccessError::OutsideCells { offset, size, len });
        }
        let guest = self.guest.wrapping_add(offset);
        let host = wide(self.host_at(offset).addr());
        if !guest.is_multiple_of(align) || !host.is_multiple_of(align) {
            return Err(AccessError::Misaligned { guest, align });
        }
        Ok(())
    }

    fn host_at(&self, offset: u64) -> *mut u8 {
        self.host.wrapping_add(index(offset))
    }
}

/// The mask of an array of `count` elements.
fn power_of_two(count: u16) -> Result<u16, AccessError> {
    if count.is_power_of_two() { Ok(count - 1) } else { Err(AccessError::NotAPowerOfTwo { count }) }
}
