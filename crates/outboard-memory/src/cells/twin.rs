//! The loom twin of ring memory: every cell is a loom atomic, kept beside the guest memory by guest address, so that
//! two queues on one [`GuestMemory`](crate::GuestMemory) meet in the same cells. All cells start as zero. Make the
//! memory inside the model, so that each execution has its own.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use loom::sync::atomic::{self, AtomicU8, AtomicU16, AtomicU64, Ordering};

use super::{Cells, Descriptor};
use crate::table::Table;

pub mod packed;

thread_local! {
    static FENCES: Cell<bool> = const { Cell::new(true) };
}

/// Loom's fence. Absent while [`without_fences`] runs.
pub fn fence(order: Ordering) {
    if FENCES.get() {
        atomic::fence(order);
    }
}

/// Runs `model` with every [`fence`] taken out: the tests that must fail then show that they can.
pub fn without_fences<R>(model: impl FnOnce() -> R) -> R {
    struct Restore;
    impl Drop for Restore {
        fn drop(&mut self) {
            FENCES.set(true);
        }
    }
    FENCES.set(false);
    let _restore = Restore;
    model()
}

thread_local! {
    static STEPS_LEFT: Cell<Option<u64>> = const { Cell::new(None) };
}

/// What [`dying_after`] ends with.
#[derive(Clone, Copy, Debug)]
pub struct Death;

/// Runs `life` and ends it before its store number `steps` to memory that outlives it, counting from 0. `None`: it died;
/// what it had is leaked, as a killed process leaves it.
pub fn dying_after<R>(steps: u64, life: impl FnOnce() -> R) -> Option<R> {
    STEPS_LEFT.set(Some(steps));
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(life));
    STEPS_LEFT.set(None);
    match outcome {
        Ok(value) => Some(value),
        Err(cause) if cause.is::<Death>() => None,
        Err(cause) => std::panic::resume_unwind(cause),
    }
}

/// A store is about to happen.
pub(crate) fn step() {
    match STEPS_LEFT.get() {
        None => {}
        Some(0) => std::panic::resume_unwind(Box::new(Death)),
        Some(left) => STEPS_LEFT.set(Some(left - 1)),
    }
}

/// The cells of one guest memory.
#[derive(Default)]
pub(crate) struct Store {
    narrow: Mutex<BTreeMap<u64, Arc<AtomicU16>>>,
    wide: Mutex<BTreeMap<u64, Arc<AtomicU64>>>,
}

impl Store {
    fn narrow(&self, guest: u64) -> Arc<AtomicU16> {
        let mut cells = self.narrow.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(cells.entry(guest).or_insert_with(|| Arc::new(AtomicU16::new(0))))
    }

    fn wide(&self, guest: u64) -> Arc<AtomicU64> {
        let mut cells = self.wide.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(cells.entry(guest).or_insert_with(|| Arc::new(AtomicU64::new(0))))
    }
}

/// The bytes of a dirty log, which has few in a model. All are made at once: loom wants the same order every time.
pub(crate) struct Bytes(Vec<AtomicU8>);

impl Bytes {
    pub(crate) fn new(count: u64) -> Self {
        Self((0..count).map(|_| AtomicU8::new(0)).collect())
    }

    /// The byte at `at`.
    pub(crate) fn byte(&self, at: u64) -> Option<&AtomicU8> {
        self.0.get(crate::num::index(at))
    }
}

/// A 16-bit cell shared with the other side.
#[derive(Clone, Debug)]
pub struct Cell16(Arc<AtomicU16>);

impl Cell16 {
    pub(super) fn new(cells: &Cells, offset: u64) -> Self {
        Self(cells.memory.twin.narrow(cells.guest + offset))
    }

    /// The present value.
    pub fn load(&self, order: Ordering) -> u16 {
        self.0.load(order)
    }

    /// Replaces the value.
    pub fn store(&self, value: u16, order: Ordering) {
        step();
        self.0.store(value, order);
    }
}

/// An array of 16-bit elements, indexed modulo its length.
#[derive(Clone, Debug)]
pub struct Ring16(Vec<Arc<AtomicU16>>);

impl Ring16 {
    pub(super) fn new(cells: &Cells, offset: u64, mask: u16) -> Self {
        Self(
            (0..=u64::from(mask))
                .map(|at| cells.memory.twin.narrow(cells.guest + offset + 2 * at))
                .collect(),
        )
    }

    fn cell(&self, at: u16) -> &AtomicU16 {
        &self.0[usize::from(at) % self.0.len()]
    }

    /// Element `at`, modulo the length.
    pub fn load(&self, at: u16) -> u16 {
        self.cell(at).load(Ordering::Relaxed)
    }

    /// Replaces element `at`, modulo the length.
    pub fn store(&self, at: u16, value: u16) {
        step();
        self.cell(at).store(value, Ordering::Relaxed);
    }
}

/// An array of pairs of 32-bit elements, indexed modulo its length.
#[derive(Clone, Debug)]
pub struct Pairs(Vec<Arc<AtomicU64>>);

impl Pairs {
    pub(super) fn new(cells: &Cells, offset: u64, mask: u16) -> Self {
        Self(
            (0..=u64::from(mask))
                .map(|at| cells.memory.twin.wide(cells.guest + offset + 8 * at))
                .collect(),
        )
    }

    fn cell(&self, at: u16) -> &AtomicU64 {
        &self.0[usize::from(at) % self.0.len()]
    }

    /// Pair `at`, modulo the length.
    pub fn load(&self, at: u16) -> (u32, u32) {
        let both = self.cell(at).load(Ordering::Relaxed);
        (low32(both), low32(both >> 32))
    }

    /// Replaces pair `at`, modulo the length.
    pub fn store(&self, at: u16, first: u32, second: u32) {
        step();
        self.cell(at).store(u64::from(first) | u64::from(second) << 32, Ordering::Relaxed);
    }
}

/// A descriptor table.
#[derive(Clone, Debug)]
pub struct Descriptors(Vec<(Arc<AtomicU64>, Arc<AtomicU64>)>);

impl Descriptors {
    pub(super) fn new(cells: &Cells, offset: u64, count: u16) -> Self {
        let word = |at: u64| cells.memory.twin.wide(cells.guest + offset + at);
        Self((0..u64::from(count)).map(|at| (word(16 * at), word(16 * at + 8))).collect())
    }

    /// Descriptor `at`; `None` past the end.
    pub fn get(&self, at: u16) -> Option<Descriptor> {
        let (addr, rest) = self.0.get(usize::from(at))?;
        let rest = rest.load(Ordering::Relaxed);
        let (flags, next) = (low32(rest >> 32) & 0xffff, low32(rest >> 48));
        Some(Descriptor {
            addr: addr.load(Ordering::Relaxed),
            len: low32(rest),
            flags: u16::try_from(flags).unwrap_or_default(),
            next: u16::try_from(next).unwrap_or_default(),
        })
    }

    /// The same table with no descriptor in it.
    pub fn emptied(&self) -> Self {
        Self(Vec::new())
    }

    pub(crate) fn table(&self) -> Table<'_> {
        Table::twin(self)
    }

    /// Replaces descriptor `at`; `None` past the end.
    pub fn set(&self, at: u16, descriptor: Descriptor) -> Option<()> {
        let (first, second) = self.0.get(usize::from(at))?;
        let (addr, rest) = descriptor.to_words();
        first.store(addr, Ordering::Relaxed);
        second.store(rest, Ordering::Relaxed);
        Some(())
    }
}

fn low32(word: u64) -> u32 {
    u32::try_from(word & u64::from(u32::MAX)).unwrap_or_default()
}
