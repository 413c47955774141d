//! The chains of a packed ring: idle in a stack, or in flight by buffer id.
//!
//! The id of a chain is known when all of it was read (virtio 1.3 §2.8.6), so any idle chain serves any id; the one
//! used last is taken first. There are as many as ever were in flight at once.

use outboard_memory::{Buffers, View};

use crate::budget::Budget;
use crate::chain::Parts;
use crate::error::RingError;

/// Descriptors of the ring that a chain in flight takes.
#[derive(Clone, Copy, Default)]
pub(super) struct Held {
    /// 0: no chain of this id is in flight.
    count: u16,
    /// The index of the first one.
    start: u16,
}

pub(super) struct PackedChains {
    #[expect(clippy::vec_box, reason = "a chain in flight is its box, handed out and back")]
    idle: Vec<Box<Parts>>,
    made: usize,
    /// By buffer id.
    held: Box<[Held]>,
    pub(super) budget: Budget,
}

impl PackedChains {
    pub(super) fn new(size: u16) -> Self {
        let held = vec![Held::default(); usize::from(size)].into();
        Self { idle: Vec::new(), made: 0, held, budget: Budget::default() }
    }

    /// An idle chain.
    #[inline(always)]
    pub(super) fn take(&mut self, view: &View) -> Box<Parts> {
        match self.idle.pop() {
            Some(parts) => parts,
            None => self.make(view),
        }
    }

    #[cold]
    #[inline(never)]
    fn make(&mut self, view: &View) -> Box<Parts> {
        self.made += 1;
        Box::new(Parts { buffers: Buffers::new(view), head: 0, place: 0, grown: false, charged: 0 })
    }

    /// A chain is idle again, or was not taken after all.
    #[inline(always)]
    pub(super) fn put(&mut self, parts: Box<Parts>) {
        self.idle.push(parts);
    }

    /// A chain of `count` descriptors, the first at `start`, is in flight under this id.
    #[inline(always)]
    pub(super) fn hold(&mut self, id: u16, count: u16, start: u16) -> Result<(), RingError> {
        match self.held.get_mut(usize::from(id)) {
            Some(held) if held.count == 0 => {
                *held = Held { count, start };
                Ok(())
            }
            held => Err(wrong_id(id, held.is_some(), self.held.len())),
        }
    }

    /// The chain of this id is given back: the descriptors it took. 0: none is in flight.
    #[inline(always)]
    pub(super) fn release(&mut self, id: u16) -> u16 {
        self.held.get_mut(usize::from(id)).map_or(0, |held| std::mem::take(&mut held.count))
    }

    /// The first descriptor of a chain in flight.
    pub(super) fn start(&self, id: u16) -> Option<u16> {
        let held = self.held.get(usize::from(id)).filter(|held| held.count > 0)?;
        Some(held.start)
    }

    /// Chains in flight.
    pub(super) fn in_flight(&self) -> u16 {
        u16::try_from(self.made - self.idle.len()).unwrap_or(u16::MAX)
    }

    /// Id and first descriptor of each chain in flight.
    pub(super) fn each_in_flight(&self) -> impl Iterator<Item = (u16, u16)> {
        let held = (0_u16..).zip(&self.held);
        held.filter(|(_, held)| held.count > 0).map(|(id, held)| (id, held.start))
    }

    /// Lets go of guest memory that is not the one of `view`.
    pub(super) fn recycle(&mut self, view: &View) {
        for parts in &mut self.idle {
            parts.buffers.recycle(view);
        }
    }
}

/// No such id in this ring, or one in flight.
#[cold]
fn wrong_id(id: u16, inside: bool, size: usize) -> RingError {
    let size = u16::try_from(size).unwrap_or(u16::MAX);
    if inside { RingError::HeadInFlight { head: id } } else { RingError::Head { head: id, size } }
}

impl std::fmt::Debug for PackedChains {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PackedChains")
            .field("in_flight", &self.in_flight())
            .field("budget", &self.budget)
            .finish()
    }
}
