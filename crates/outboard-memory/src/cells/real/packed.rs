//! Cells of a packed ring that are guest memory: descriptors whose flags are atomic, and event suppression structures
//! (virtio 1.3 §2.8.13, §2.8.14).
//!
//! Invariant: a descriptor's flags are read before the rest of it and written behind it, with the ordering the caller
//! names; the rest is volatile words.
#![expect(unsafe_code, reason = "atomic and volatile access to ring memory")]

use std::marker::PhantomData;
use std::ptr;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use super::Held;
use crate::cells::{Cells, PackedBody};

/// Offsets in a descriptor.
const LEN: usize = 8;
const ID: usize = 12;
const FLAGS: usize = 14;

/// A 32-bit cell shared with the other side. Invariant: aligned, inside a live mapping.
#[derive(Clone, Debug)]
pub struct Cell32(Held);

impl Cell32 {
    pub(in crate::cells) fn new(cells: &Cells, offset: u64) -> Self {
        Self(Held::new(cells, offset))
    }

    /// The present value.
    #[inline(always)]
    pub fn load(&self, order: Ordering) -> u32 {
        // SAFETY: aligned and mapped by the invariant; an atomic, which both sides may write.
        unsafe { AtomicU32::from_ptr(self.0.at.cast()) }.load(order)
    }

    /// Replaces the value.
    #[inline(always)]
    pub fn store(&self, value: u32, order: Ordering) {
        // SAFETY: as in `load`.
        unsafe { AtomicU32::from_ptr(self.0.at.cast()) }.store(value, order);
    }
}

/// A packed descriptor ring. Invariant: `count` descriptors in a live mapping, aligned to 16.
#[derive(Clone, Debug)]
pub struct PackedRing {
    held: Held,
    count: u16,
}

impl PackedRing {
    pub(in crate::cells) fn new(cells: &Cells, offset: u64, count: u16) -> Self {
        Self { held: Held::new(cells, offset), count }
    }

    /// The same ring with no descriptor in it.
    #[must_use]
    pub fn emptied(&self) -> Self {
        Self { count: 0, ..self.clone() }
    }

    /// Descriptors.
    #[inline(always)]
    pub fn count(&self) -> u16 {
        self.count
    }

    #[inline(always)]
    fn place(&self, at: u16) -> Option<*mut u8> {
        if at < self.count { Some(self.held.at.wrapping_add(usize::from(at) * 16)) } else { None }
    }

    /// The flags of descriptor `at`; `None` past the end.
    #[inline(always)]
    pub fn flags(&self, at: u16, order: Ordering) -> Option<u16> {
        let place = self.place(at)?.wrapping_add(FLAGS);
        // SAFETY: inside the ring, mapped and aligned to 2; an atomic, which both sides may write.
        Some(unsafe { AtomicU16::from_ptr(place.cast()) }.load(order))
    }

    /// Replaces the flags of descriptor `at`; `None` past the end.
    #[inline(always)]
    pub fn set_flags(&self, at: u16, flags: u16, order: Ordering) -> Option<()> {
        let place = self.place(at)?.wrapping_add(FLAGS);
        // SAFETY: as in `flags`.
        unsafe { AtomicU16::from_ptr(place.cast()) }.store(flags, order);
        Some(())
    }

    /// Descriptor `at`, not read yet; `None` past the end.
    #[inline(always)]
    pub(crate) fn entry(&self, at: u16) -> Option<PackedEntry<'_>> {
        let host = self.place(at)?;
        Some(PackedEntry { host, behind: self.count - at, ring: PhantomData })
    }

    /// Writes all of descriptor `at` but its address, which is what a device says, the flags last. With `None` they are left
    /// as they are. `None` past the end.
    #[inline(always)]
    pub fn put_used(&self, at: u16, id: u16, len: u32, flags: Option<u16>) -> Option<()> {
        let place = self.place(at)?;
        // SAFETY: inside the ring, mapped and aligned to 16.
        unsafe { put_used(place, id, len) };
        if let Some(flags) = flags {
            // SAFETY: as in `flags`.
            unsafe { AtomicU16::from_ptr(place.wrapping_add(FLAGS).cast()) }
                .store(flags, Ordering::Relaxed);
        }
        Some(())
    }

    /// What descriptor `at` says beside its flags, each byte read once; `None` past the end.
    #[inline(always)]
    pub fn body(&self, at: u16) -> Option<PackedBody> {
        let entry = self.entry(at)?;
        Some(PackedBody { addr: entry.addr(), len: entry.len(), id: entry.id() })
    }

    /// Writes all of descriptor `at` but its flags; `None` past the end.
    #[inline(always)]
    pub fn set_body(&self, at: u16, body: PackedBody) -> Option<()> {
        let place = self.place(at)?;
        // SAFETY: inside the ring, mapped and aligned to 16.
        unsafe { ptr::write_volatile(place.cast::<u64>(), body.addr) };
        self.set_used(at, body.id, body.len)
    }

    /// Writes the id and the length of descriptor `at`; `None` past the end.
    #[inline(always)]
    pub fn set_used(&self, at: u16, id: u16, len: u32) -> Option<()> {
        self.put_used(at, id, len, None)
    }
}

/// Writes the id and the length of the descriptor at `place`.
///
/// # Safety
/// A descriptor of a ring.
#[inline(always)]
unsafe fn put_used(place: *mut u8, id: u16, len: u32) {
    // SAFETY: inside the ring, mapped and aligned to 4.
    unsafe { ptr::write_volatile(place.wrapping_add(LEN).cast::<u32>(), len) };
    // SAFETY: likewise, aligned to 2.
    unsafe { ptr::write_volatile(place.wrapping_add(ID).cast::<u16>(), id) };
}

/// One descriptor, by value: a pointer and a bound, which stay in registers. Each call reads guest memory: call each once, so
/// that what was checked is what is used. Invariant: `behind` descriptors of the ring begin here, at least one.
#[derive(Clone, Copy)]
pub(crate) struct PackedEntry<'a> {
    host: *mut u8,
    behind: u16,
    ring: PhantomData<&'a PackedRing>,
}

impl PackedEntry<'_> {
    /// The one behind it; `None` at the end of the ring.
    #[inline(always)]
    pub(crate) fn after(self) -> Option<Self> {
        match self.behind - 1 {
            0 => None,
            behind => Some(Self { host: self.host.wrapping_add(16), behind, ring: PhantomData }),
        }
    }

    /// Guest address of the buffer.
    #[inline(always)]
    pub(crate) fn addr(self) -> u64 {
        // SAFETY: inside the ring, mapped and aligned to 16.
        unsafe { ptr::read_volatile(self.host.cast::<u64>()) }
    }

    /// Bytes.
    #[inline(always)]
    pub(crate) fn len(self) -> u32 {
        // SAFETY: inside the ring, mapped and aligned to 4.
        unsafe { ptr::read_volatile(self.host.wrapping_add(LEN).cast::<u32>()) }
    }

    /// Buffer id.
    #[inline(always)]
    pub(crate) fn id(self) -> u16 {
        // SAFETY: inside the ring, mapped and aligned to 2.
        unsafe { ptr::read_volatile(self.host.wrapping_add(ID).cast::<u16>()) }
    }

    /// Its flags.
    #[inline(always)]
    pub(crate) fn flags(self, order: Ordering) -> u16 {
        // SAFETY: inside the ring, mapped and aligned to 2; an atomic, which both sides may write.
        unsafe { AtomicU16::from_ptr(self.host.wrapping_add(FLAGS).cast()) }.load(order)
    }
}
