//! Cells of a packed ring that are guest memory: descriptors whose flags are atomic, and event suppression structures
//! (virtio 1.3 §2.8.13, §2.8.14).
//!
//! Invariant: a descriptor's flags are read before the rest of it and written behind it, with the ordering the caller
//! names; the rest is volatile words.
#![expect(unsafe_code, reason = "atomic and volatile access to ring memory")]

use std::marker::PhantomData;
use std::ptr;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::Held;
use crate::cells::{Cells, PackedBody};

/// Bytes of a descriptor, and offsets in it.
const SIZE: usize = 16;
const BYTES: u32 = 16;
/// The flags AVAIL and USED.
const STATE: u16 = 1 << 7 | 1 << 15;
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
        let run = PackedRun { host: self.place(at)?, bytes: SIZE, ring: PhantomData };
        // SAFETY: a run is never empty.
        let addr = unsafe { run.addr(0) };
        // SAFETY: likewise.
        let len = unsafe { run.len(0) };
        // SAFETY: likewise.
        let id = unsafe { run.id(0) };
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

/// A descriptor that is always available and never usual, in memory of our own: see [`Lap::nowhere`].
const fn nothing(state: u64) -> [AtomicU64; 2] {
    [AtomicU64::new(0), AtomicU64::new((state | INDIRECT_NEXT) << 48)]
}

/// One for each lap.
static NOWHERE: [[AtomicU64; 2]; 2] = [nothing(1 << 7), nothing(1 << 15)];
/// INDIRECT and NEXT: what no descriptor may have.
const INDIRECT_NEXT: u64 = 4 | 1;

/// A place in a packed ring that goes round it, and the two flags that say whose a descriptor is there (virtio 1.3 §2.8.1).
/// Lengths are bytes of the ring, 16 a descriptor. Invariant: `left` bytes, at least one descriptor, are from `next` to the
/// end of the ring; nowhere, `next` is one of `NOWHERE`.
#[derive(Debug)]
pub struct Lap {
    held: Held,
    next: *mut u8,
    left: u32,
    size: u32,
    state: u16,
}

// SAFETY: pointers into shared memory, which belongs to no thread and which `held` keeps mapped, or to a static.
// All access is atomic or volatile, by value.
unsafe impl Send for Lap {}

impl Lap {
    /// Descriptor `at` of the ring; `None` past the end.
    pub fn new(ring: &PackedRing, at: u16, state: u16) -> Option<Self> {
        let next = ring.place(at)?;
        let size = u32::from(ring.count) * BYTES;
        let left = size - u32::from(at) * BYTES;
        Some(Self { held: ring.held.clone(), next, left, size, state })
    }

    /// The same place of no ring: a descriptor in memory of our own that is available for ever, and that nobody may take,
    /// for it has INDIRECT and NEXT. So whoever looks need not ask whether there is a ring.
    #[must_use]
    pub fn nowhere(&self) -> Self {
        let [odd, even] = &NOWHERE;
        let next = if self.state == 1 << 7 { odd } else { even };
        let next = next.as_ptr().cast_mut().cast();
        Self { held: self.held.clone(), next, ..*self }
    }

    /// Bytes up to the end of the ring.
    #[inline(always)]
    pub fn left(&self) -> u32 {
        self.left
    }

    /// Bytes of the ring.
    #[inline(always)]
    pub fn size(&self) -> u32 {
        self.size
    }

    /// What AVAIL and USED have to be here.
    #[inline(always)]
    pub fn state(&self) -> u16 {
        self.state
    }

    /// The flags of the descriptor here but AVAIL and USED, when these two are right.
    #[inline(always)]
    pub fn look(&self, order: Ordering) -> Option<u16> {
        // SAFETY: a descriptor, mapped and aligned to 2; an atomic, which both sides may write.
        let flags = unsafe { AtomicU16::from_ptr(self.next.wrapping_add(FLAGS).cast()) };
        let flags = flags.load(order) ^ self.state;
        (flags & STATE == 0).then_some(flags)
    }

    /// The descriptors from here to the end.
    #[inline(always)]
    pub(crate) fn run(&self) -> PackedRun<'_> {
        PackedRun { host: self.next, bytes: self.left as usize, ring: PhantomData }
    }

    /// Goes on by so many bytes, whole descriptors and at most one ring.
    #[inline(always)]
    pub fn advance(&mut self, bytes: u32) {
        debug_assert!(
            bytes <= self.size && bytes.is_multiple_of(BYTES),
            "descriptors of this ring"
        );
        match self.left.checked_sub(bytes) {
            None | Some(0) => self.wrap(bytes),
            Some(left) => {
                self.left = left;
                self.next = self.next.wrapping_add(bytes as usize);
            }
        }
    }

    /// Round the end of the ring.
    #[inline(never)]
    fn wrap(&mut self, bytes: u32) {
        let over = (bytes - self.left) % self.size / BYTES * BYTES;
        self.left = self.size - over;
        self.next = self.held.at.wrapping_add(over as usize);
        self.state ^= STATE;
    }
}

/// A [`Lap`] of the side that gives descriptors back. Invariant: it is not nowhere, and `marked` is a descriptor of the ring.
#[derive(Debug)]
pub struct UsedLap {
    lap: Lap,
    marked: *mut u8,
}

// SAFETY: as for the lap.
unsafe impl Send for UsedLap {}

impl UsedLap {
    /// As [`Lap::new`]; `state` is that of a used descriptor.
    pub fn new(ring: &PackedRing, at: u16, state: u16) -> Option<Self> {
        let lap = Lap::new(ring, at, state)?;
        let marked = lap.next;
        Some(Self { lap, marked })
    }

    /// The place.
    #[inline(always)]
    pub fn lap(&self) -> &Lap {
        &self.lap
    }

    /// As [`Lap::advance`].
    #[inline(always)]
    pub fn advance(&mut self, bytes: u32) {
        self.lap.advance(bytes);
    }

    /// Writes all of the descriptor here but its address. The flags are left out of one that is remembered.
    #[inline(always)]
    pub fn put(&mut self, id: u16, len: u32, flags: u16, remembered: bool) {
        let next = self.lap.next;
        // SAFETY: a descriptor of the ring.
        unsafe { put_used(next, id, len) };
        if remembered {
            self.marked = next;
        } else {
            // SAFETY: a descriptor of the ring, mapped and aligned to 2; an atomic, which both sides may write.
            unsafe { AtomicU16::from_ptr(next.wrapping_add(FLAGS).cast()) }
                .store(flags, Ordering::Relaxed);
        }
    }

    /// Writes all of the descriptor here but its address and flags, which is what a device says.
    #[inline(always)]
    pub fn put_used(&self, id: u16, len: u32) {
        // SAFETY: a descriptor of the ring.
        unsafe { put_used(self.lap.next, id, len) };
    }

    /// Writes the flags of the descriptor here, without an order.
    #[inline(always)]
    pub fn put_flags(&self, flags: u16) {
        // SAFETY: a descriptor of the ring, mapped and aligned to 2; an atomic, which both sides may write.
        unsafe { AtomicU16::from_ptr(self.lap.next.wrapping_add(FLAGS).cast()) }
            .store(flags, Ordering::Relaxed);
    }

    /// Remembers the descriptor here.
    #[inline(always)]
    pub fn mark(&mut self) {
        self.marked = self.lap.next;
    }

    /// As [`put_used`](Self::put_used), to the descriptor that was remembered last.
    #[inline(always)]
    pub fn put_marked(&self, id: u16, len: u32) {
        // SAFETY: a descriptor of the ring.
        unsafe { put_used(self.marked, id, len) };
    }

    /// Writes the flags of the descriptor that was remembered last, behind all writes so far.
    #[inline(always)]
    pub fn show_marked(&self, flags: u16) {
        // SAFETY: as in `put_flags`.
        unsafe { AtomicU16::from_ptr(self.marked.wrapping_add(FLAGS).cast()) }
            .store(flags, Ordering::Release);
    }
}

/// Descriptors one behind the other up to the end of the ring, by their distance from the first one in bytes. Invariant: `bytes`,
/// whole descriptors and at least one, begin at `host`. Each read reads guest memory: do each once, so that what was
/// checked is what is used.
#[derive(Clone, Copy)]
pub(crate) struct PackedRun<'a> {
    host: *mut u8,
    bytes: usize,
    ring: PhantomData<&'a PackedRing>,
}

impl PackedRun<'_> {
    /// Bytes of all of them.
    #[inline(always)]
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Guest address of the buffer of the one at `at`.
    ///
    /// # Safety
    /// `at` is a multiple of 16, below [`bytes`](Self::bytes).
    #[inline(always)]
    pub(crate) unsafe fn addr(&self, at: usize) -> u64 {
        // SAFETY: inside the ring, by the caller's promise; mapped and aligned to 16.
        unsafe { ptr::read_volatile(self.host.wrapping_add(at).cast::<u64>()) }
    }

    /// Bytes of the buffer.
    ///
    /// # Safety
    /// As for [`addr`](Self::addr).
    #[inline(always)]
    pub(crate) unsafe fn len(&self, at: usize) -> u32 {
        // SAFETY: inside the ring, by the caller's promise; mapped and aligned to 4.
        unsafe { ptr::read_volatile(self.host.wrapping_add(at + LEN).cast::<u32>()) }
    }

    /// Buffer id.
    ///
    /// # Safety
    /// As for [`addr`](Self::addr).
    #[inline(always)]
    pub(crate) unsafe fn id(&self, at: usize) -> u16 {
        // SAFETY: inside the ring, by the caller's promise; mapped and aligned to 2.
        unsafe { ptr::read_volatile(self.host.wrapping_add(at + ID).cast::<u16>()) }
    }

    /// Flags, without an order.
    ///
    /// # Safety
    /// As for [`addr`](Self::addr).
    #[inline(always)]
    pub(crate) unsafe fn flags(&self, at: usize) -> u16 {
        // SAFETY: inside the ring, by the caller's promise; mapped and aligned to 2.
        let flags = unsafe { AtomicU16::from_ptr(self.host.wrapping_add(at + FLAGS).cast()) };
        flags.load(Ordering::Relaxed)
    }
}
