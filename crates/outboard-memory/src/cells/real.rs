//! Cells that are guest memory.
#![expect(unsafe_code, reason = "atomic and volatile access to ring memory")]

use std::fmt;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{self, AtomicU16, Ordering};

use super::{Cells, Descriptor};
use crate::copy;
use crate::map::GuestMemory;
use crate::table::Table;

pub(super) mod packed;

/// A memory fence, as [`std::sync::atomic::fence`]; under loom, loom's.
#[inline(always)]
pub fn fence(order: Ordering) {
    atomic::fence(order);
}

/// A pointer into a mapping, and what keeps the mapping.
#[derive(Clone)]
struct Held {
    at: *mut u8,
    /// Keeps the mapping behind `at`.
    _memory: Arc<GuestMemory>,
}

// SAFETY: shared memory belongs to no thread; the Arc keeps it mapped; all access is atomic or volatile, by value.
unsafe impl Send for Held {}

impl Held {
    fn new(cells: &Cells, offset: u64) -> Self {
        Self { at: cells.host_at(offset), _memory: Arc::clone(&cells.memory) }
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}", self.at)
    }
}

/// A 16-bit cell shared with the other side. Invariant: aligned, inside a live mapping.
#[derive(Clone, Debug)]
pub struct Cell16(Held);

impl Cell16 {
    pub(super) fn new(cells: &Cells, offset: u64) -> Self {
        Self(Held::new(cells, offset))
    }

    /// The present value.
    #[inline(always)]
    pub fn load(&self, order: Ordering) -> u16 {
        // SAFETY: aligned and mapped by the invariant; an atomic, which both sides may write.
        unsafe { AtomicU16::from_ptr(self.0.at.cast()) }.load(order)
    }

    /// Replaces the value.
    #[inline(always)]
    pub fn store(&self, value: u16, order: Ordering) {
        // SAFETY: as in `load`.
        unsafe { AtomicU16::from_ptr(self.0.at.cast()) }.store(value, order);
    }
}

/// An array of 16-bit elements, indexed modulo its length. Invariant: aligned, `mask + 1` elements in a live mapping.
#[derive(Clone, Debug)]
pub struct Ring16 {
    held: Held,
    mask: u16,
}

impl Ring16 {
    pub(super) fn new(cells: &Cells, offset: u64, mask: u16) -> Self {
        Self { held: Held::new(cells, offset), mask }
    }

    #[inline(always)]
    fn cell(&self, at: u16) -> &AtomicU16 {
        let element = self.held.at.cast::<u16>().wrapping_add(usize::from(at & self.mask));
        // SAFETY: the masked index is inside the array; aligned and mapped by the invariant.
        unsafe { AtomicU16::from_ptr(element) }
    }

    /// Element `at`, modulo the length.
    #[inline(always)]
    pub fn load(&self, at: u16) -> u16 {
        self.cell(at).load(Ordering::Relaxed)
    }

    /// Replaces element `at`, modulo the length.
    #[inline(always)]
    pub fn store(&self, at: u16, value: u16) {
        self.cell(at).store(value, Ordering::Relaxed);
    }
}

/// An array of pairs of 32-bit elements, indexed modulo its length. Invariant: aligned, `mask + 1` pairs in a live mapping.
#[derive(Clone, Debug)]
pub struct Pairs {
    held: Held,
    mask: u16,
}

impl Pairs {
    pub(super) fn new(cells: &Cells, offset: u64, mask: u16) -> Self {
        Self { held: Held::new(cells, offset), mask }
    }

    #[inline(always)]
    fn element(&self, at: u16) -> *mut u32 {
        self.held.at.wrapping_add(usize::from(at & self.mask) * 8).cast()
    }

    /// Pair `at`, modulo the length.
    #[inline(always)]
    pub fn load(&self, at: u16) -> (u32, u32) {
        let element = self.element(at);
        // SAFETY: the masked index is inside the array, which is mapped and aligned to 4.
        let first = unsafe { ptr::read_volatile(element) };
        // SAFETY: likewise, the second half of the pair.
        let second = unsafe { ptr::read_volatile(element.wrapping_add(1)) };
        (first, second)
    }

    /// Replaces pair `at`, modulo the length.
    #[inline(always)]
    pub fn store(&self, at: u16, first: u32, second: u32) {
        let element = self.element(at);
        // SAFETY: the masked index is inside the array, which is mapped and aligned to 4.
        unsafe { ptr::write_volatile(element, first) };
        // SAFETY: likewise, the second half of the pair.
        unsafe { ptr::write_volatile(element.wrapping_add(1), second) };
    }
}

/// A descriptor table. Invariant: `count` descriptors in a live mapping.
#[derive(Clone, Debug)]
pub struct Descriptors {
    held: Held,
    count: u16,
}

impl Descriptors {
    pub(super) fn new(cells: &Cells, offset: u64, count: u16) -> Self {
        Self { held: Held::new(cells, offset), count }
    }

    /// The same table with no descriptor in it.
    pub fn emptied(&self) -> Self {
        Self { count: 0, ..self.clone() }
    }

    /// Descriptor `at`, each of its bytes read once; `None` past the end.
    #[inline(always)]
    pub fn get(&self, at: u16) -> Option<Descriptor> {
        self.table().get(at)
    }

    #[inline(always)]
    pub(crate) fn table(&self) -> Table<'_> {
        Table::new(self.held.at, self.count)
    }

    /// Replaces descriptor `at`; `None` past the end.
    #[inline(always)]
    pub fn set(&self, at: u16, descriptor: Descriptor) -> Option<()> {
        if at >= self.count {
            return None;
        }
        let (addr, rest) = descriptor.to_words();
        // SAFETY: `at < count`, inside the table, which is mapped.
        unsafe { copy::write_pair(self.held.at.wrapping_add(usize::from(at) * 16), addr, rest) };
        Some(())
    }
}
