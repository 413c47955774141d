//! The loom twin of a packed ring: a word for the address, one for length and id, one for the flags of each descriptor.
#![expect(unsafe_code, reason = "the same signatures as the real ones")]

use std::sync::Arc;

use loom::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use super::{low32, step};
use crate::cells::{Cells, PackedBody};

/// The flags AVAIL and USED.
const STATE: u16 = 1 << 7 | 1 << 15;

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

/// A place in a packed ring that goes round it, and the two flags that say whose a descriptor is there.
#[derive(Clone, Debug)]
pub struct Lap {
    ring: PackedRing,
    at: u16,
    state: u16,
    nowhere: bool,
}

impl Lap {
    /// Descriptor `at` of the ring; `None` past the end.
    pub fn new(ring: &PackedRing, at: u16, state: u16) -> Option<Self> {
        (at < ring.count()).then(|| Self { ring: ring.clone(), at, state, nowhere: false })
    }

    /// The same place of no ring: see the real one.
    #[must_use]
    pub fn nowhere(&self) -> Self {
        Self { nowhere: true, ..self.clone() }
    }

    /// Bytes up to the end of the ring.
    pub fn left(&self) -> u32 {
        self.size() - u32::from(self.at) * 16
    }

    /// Bytes of the ring.
    pub fn size(&self) -> u32 {
        u32::from(self.ring.count()) * 16
    }

    /// What AVAIL and USED have to be here.
    pub fn state(&self) -> u16 {
        self.state
    }

    /// The flags of the descriptor here but AVAIL and USED, when these two are right.
    pub fn look(&self, order: Ordering) -> Option<u16> {
        if self.nowhere {
            return Some(4 | 1);
        }
        let flags = self.ring.flags(self.at, order)? ^ self.state;
        (flags & STATE == 0).then_some(flags)
    }

    /// The descriptors from here to the end.
    pub(crate) fn run(&self) -> PackedRun<'_> {
        PackedRun { ring: &self.ring, first: self.at }
    }

    /// Goes on by so many bytes, whole descriptors and at most one ring.
    pub fn advance(&mut self, bytes: u32) {
        let at = self.at + u16::try_from(bytes / 16).unwrap_or(u16::MAX);
        self.at = at % self.ring.count();
        if at != self.at {
            self.state ^= STATE;
        }
    }
}

/// A [`Lap`] of the side that gives descriptors back.
#[derive(Debug)]
pub struct UsedLap {
    lap: Lap,
    marked: u16,
}

impl UsedLap {
    /// As [`Lap::new`]; `state` is that of a used descriptor.
    pub fn new(ring: &PackedRing, at: u16, state: u16) -> Option<Self> {
        Some(Self { lap: Lap::new(ring, at, state)?, marked: at })
    }

    /// The place.
    pub fn lap(&self) -> &Lap {
        &self.lap
    }

    /// As [`Lap::advance`].
    pub fn advance(&mut self, bytes: u32) {
        self.lap.advance(bytes);
    }

    /// Writes all of the descriptor here but its address. The flags are left out of one that is remembered.
    pub fn put(&mut self, id: u16, len: u32, flags: u16, remembered: bool) {
        self.put_used(id, len);
        if remembered {
            self.mark();
        } else {
            self.put_flags(flags);
        }
    }

    /// Writes all of the descriptor here but its address and flags, which is what a device says.
    pub fn put_used(&self, id: u16, len: u32) {
        let _ = self.lap.ring.set_used(self.lap.at, id, len);
    }

    /// Writes the flags of the descriptor here, without an order.
    pub fn put_flags(&self, flags: u16) {
        let _ = self.lap.ring.set_flags(self.lap.at, flags, Ordering::Relaxed);
    }

    /// Remembers the descriptor here.
    pub fn mark(&mut self) {
        self.marked = self.lap.at;
    }

    /// As [`put_used`](Self::put_used), to the descriptor that was remembered last.
    pub fn put_marked(&self, id: u16, len: u32) {
        let _ = self.lap.ring.set_used(self.marked, id, len);
    }

    /// Writes the flags of the descriptor that was remembered last, behind all writes so far.
    pub fn show_marked(&self, flags: u16) {
        let _ = self.lap.ring.set_flags(self.marked, flags, Ordering::Release);
    }
}

/// Descriptors one behind the other up to the end of the ring, by their distance from the first one in bytes.
#[derive(Clone, Copy)]
pub(crate) struct PackedRun<'a> {
    ring: &'a PackedRing,
    first: u16,
}

impl PackedRun<'_> {
    fn place(&self, at: usize) -> u16 {
        self.first + u16::try_from(at / 16).unwrap_or(u16::MAX)
    }

    fn body(&self, at: usize) -> PackedBody {
        self.ring.body(self.place(at)).unwrap_or_default()
    }

    /// Bytes of all of them.
    pub(crate) fn bytes(&self) -> usize {
        usize::from(self.ring.count() - self.first) * 16
    }

    /// Guest address of the buffer of the one at `at`.
    ///
    /// # Safety
    /// None: the twin looks where it is. (So are the other three.)
    pub(crate) unsafe fn addr(&self, at: usize) -> u64 {
        self.body(at).addr
    }

    /// Bytes of the buffer.
    ///
    /// # Safety
    /// None.
    pub(crate) unsafe fn len(&self, at: usize) -> u32 {
        self.body(at).len
    }

    /// Buffer id.
    ///
    /// # Safety
    /// None.
    pub(crate) unsafe fn id(&self, at: usize) -> u16 {
        self.body(at).id
    }

    /// Flags, without an order.
    ///
    /// # Safety
    /// None.
    pub(crate) unsafe fn flags(&self, at: usize) -> u16 {
        self.ring.flags(self.place(at), Ordering::Relaxed).unwrap_or_default()
    }
}
