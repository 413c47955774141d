//! Cells of a packed ring that are guest memory: descriptors whose flags are atomic, and event suppression structures
//! (virtio 1.3 §2.8.13, §2.8.14).
//!
//! Invariant: a descriptor's flags are read before the rest of it and written behind it, with the ordering the caller
//! names; the rest is volatile words.
#![expect(unsafe_code, reason = "atomic and volatile access to ring memory")]

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

    /// What descriptor `at` says beside its flags, each byte read once; `None` past the end.
    #[inline(always)]
    pub fn body(&self, at: u16) -> Option<PackedBody> {
        let place = self.place(at)?;
        // SAFETY: inside the ring, mapped and aligned to 16.
        let addr = unsafe { ptr::read_volatile(place.cast::<u64>()) };
        // SAFETY: likewise, aligned to 4.
        let len = unsafe { ptr::read_volatile(place.wrapping_add(LEN).cast::<u32>()) };
        // SAFETY: likewise, aligned to 2.
        let id = unsafe { ptr::read_volatile(place.wrapping_add(ID).cast::<u16>()) };
        Some(PackedBody { addr, len, id })
    }

    /// Writes all of descriptor `at` but its flags; `None` past the end.
    #[inline(always)]
    pub fn set_body(&self, at: u16, body: PackedBody) -> Option<()> {
        let place = self.place(at)?;
        // SAFETY: inside the ring, mapped and aligned to 16.
        unsafe { ptr::write_volatile(place.cast::<u64>(), body.addr) };
        self.set_used(at, body.id, body.len)
    }

    /// Writes the id and the length of descriptor `at`, which is what a device says; `None` past the end.
    #[inline(always)]
    pub fn set_used(&self, at: u16, id: u16, len: u32) -> Option<()> {
        let place = self.place(at)?;
        // SAFETY: inside the ring, mapped and aligned to 4.
        unsafe { ptr::write_volatile(place.wrapping_add(LEN).cast::<u32>(), len) };
        // SAFETY: likewise, aligned to 2.
        unsafe { ptr::write_volatile(place.wrapping_add(ID).cast::<u16>(), id) };
        Some(())
    }
}
