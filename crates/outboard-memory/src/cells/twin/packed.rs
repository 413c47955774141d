//! The loom twin of a packed ring: a word for the address, one for length and id, one for the flags of each descriptor.

use std::sync::Arc;

use loom::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use super::{low32, step};
use crate::cells::{Cells, PackedBody};

/// A 32-bit cell shared with the other side.
#[derive(Clone, Debug)]
pub struct Cell32(Arc<AtomicU64>);

impl Cell32 {
    pub(in crate::cells) fn new(cells: &Cells, offset: u64) -> Self {
        Self(cells.memory.twin.wide(cells.guest + offset))
    }

    /// The present value.
    pub fn load(&self, order: Ordering) -> u32 {
        low32(self.0.load(order))
    }

    /// Replaces the value.
    pub fn store(&self, value: u32, order: Ordering) {
        step();
        self.0.store(u64::from(value), order);
    }
}

#[derive(Clone, Debug)]
struct Words {
    addr: Arc<AtomicU64>,
    /// Length, and the id above it.
    rest: Arc<AtomicU64>,
    flags: Arc<AtomicU16>,
}

/// A packed descriptor ring.
#[derive(Clone, Debug)]
pub struct PackedRing(Vec<Words>);

impl PackedRing {
    pub(in crate::cells) fn new(cells: &Cells, offset: u64, count: u16) -> Self {
        let (twin, start) = (&cells.memory.twin, cells.guest + offset);
        let places = (0..u64::from(count)).map(|at| start + 16 * at);
        Self(
            places
                .map(|at| Words {
                    addr: twin.wide(at),
                    rest: twin.wide(at + 8),
                    flags: twin.narrow(at + 14),
                })
                .collect(),
        )
    }

    /// The same ring with no descriptor in it.
    #[must_use]
    pub fn emptied(&self) -> Self {
        Self(Vec::new())
    }

    /// Descriptors.
    pub fn count(&self) -> u16 {
        u16::try_from(self.0.len()).unwrap_or(u16::MAX)
    }

    /// The flags of descriptor `at`; `None` past the end.
    pub fn flags(&self, at: u16, order: Ordering) -> Option<u16> {
        Some(self.0.get(usize::from(at))?.flags.load(order))
    }

    /// Replaces the flags of descriptor `at`; `None` past the end.
    pub fn set_flags(&self, at: u16, flags: u16, order: Ordering) -> Option<()> {
        let words = self.0.get(usize::from(at))?;
        step();
        words.flags.store(flags, order);
        Some(())
    }

    /// Descriptor `at`, all of it but its flags read; `None` past the end.
    pub(crate) fn entry(&self, at: u16) -> Option<PackedEntry<'_>> {
        Some(PackedEntry { ring: self, at, body: self.body(at)? })
    }

    /// Writes all of descriptor `at` but its address, the flags last; `None` past the end.
    pub fn put_used(&self, at: u16, id: u16, len: u32, flags: Option<u16>) -> Option<()> {
        self.set_used(at, id, len)?;
        flags.map_or(Some(()), |flags| self.set_flags(at, flags, Ordering::Relaxed))
    }

    /// What descriptor `at` says beside its flags; `None` past the end.
    pub fn body(&self, at: u16) -> Option<PackedBody> {
        let words = self.0.get(usize::from(at))?;
        let addr = words.addr.load(Ordering::Relaxed);
        let rest = words.rest.load(Ordering::Relaxed);
        let id = u16::try_from(low32(rest >> 32)).unwrap_or_default();
        Some(PackedBody { addr, len: low32(rest), id })
    }

    /// Writes all of descriptor `at` but its flags; `None` past the end.
    pub fn set_body(&self, at: u16, body: PackedBody) -> Option<()> {
        let words = self.0.get(usize::from(at))?;
        step();
        words.addr.store(body.addr, Ordering::Relaxed);
        self.set_used(at, body.id, body.len)
    }

    /// Writes the id and the length of descriptor `at`; `None` past the end.
    pub fn set_used(&self, at: u16, id: u16, len: u32) -> Option<()> {
        let words = self.0.get(usize::from(at))?;
        step();
        words.rest.store(u64::from(len) | u64::from(id) << 32, Ordering::Relaxed);
        Some(())
    }
}

/// One descriptor.
#[derive(Clone, Copy)]
pub(crate) struct PackedEntry<'a> {
    ring: &'a PackedRing,
    at: u16,
    body: PackedBody,
}

impl PackedEntry<'_> {
    /// The one behind it; `None` at the end of the ring.
    pub(crate) fn after(self) -> Option<Self> {
        self.ring.entry(self.at + 1)
    }

    /// Guest address of the buffer.
    pub(crate) fn addr(self) -> u64 {
        self.body.addr
    }

    /// Bytes.
    pub(crate) fn len(self) -> u32 {
        self.body.len
    }

    /// Buffer id.
    pub(crate) fn id(self) -> u16 {
        self.body.id
    }

    /// Its flags.
    pub(crate) fn flags(self, order: Ordering) -> u16 {
        self.ring.flags(self.at, order).unwrap_or_default()
    }
}
