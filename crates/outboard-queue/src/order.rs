//! In-order use (VIRTIO_F_IN_ORDER; virtio 1.3, "In-order use of descriptors" of split and of packed rings): chains
//! are given back in the order in which they were made available.
//!
//! ```text
//!  device   popped 1 2 3 4 ─▶ completed 3 1 4 2 ─▶ used 1 ┆ ┆ 2 3 4       3 and 4 wait for those before them
//!  driver   used descriptor "3" where 1 is due ─▶ 1 2 3: a batch may be closed by its last chain alone
//! ```
//! Devices may complete in any order: what has come too early waits and counts as in flight. So a request that is never
//! completed holds up all that follow, and one that takes long does for as long: only a device that asks for the feature
//! offers it. A chain of which the driver knows everything, for it has bytes to read only, is skipped when another one is
//! given back in its batch: one used element, where the first one's would be, closes them all. What has bytes to write gets
//! an element of its own, or is the last one of a run, for its length is told. (A packed ring does so with what its batch
//! begins with, and not with an in-flight region.)
//!
//! On a split ring chains are numbered as they are taken; invariant: all before `next` were given back, none behind. On a packed ring it stands in the places of the chains: the one whose turn it is began where the next
//! used descriptor goes (`packed/tracked.rs`).

use std::collections::VecDeque;

use crate::chain::Parts;
use crate::error::RingError;

/// What came back to a device's queue before its turn: the chain, and the bytes written.
pub(crate) type Early = Option<(Box<Parts>, u32)>;

/// What came back before its turn, by the place where its turn is known by.
#[derive(Debug)]
pub(crate) struct Waiting {
    chains: Box<[Early]>,
    count: u16,
}

impl Waiting {
    pub(crate) fn new(size: u16) -> Self {
        Self { chains: std::iter::repeat_with(|| None).take(size.into()).collect(), count: 0 }
    }

    /// A chain comes back before its turn, which is at `place`.
    pub(crate) fn keep(&mut self, place: u16, parts: Box<Parts>, written: u32) {
        match self.chains.get_mut(usize::from(place)) {
            Some(early @ None) => {
                *early = Some((parts, written));
                self.count += 1;
            }
            _ => debug_assert!(false, "{} was not taken from this queue", parts.name()),
        }
    }

    /// Whether any wait at all: nearly never.
    #[inline(always)]
    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The chain at `place`, when it has come back.
    pub(crate) fn take(&mut self, place: u16) -> Early {
        let early = self.chains.get_mut(usize::from(place))?.take()?;
        self.count -= 1;
        Some(early)
    }
}

/// Whose turn it is on a split ring: the chain that so many were taken before.
#[derive(Debug)]
pub(crate) struct Turns {
    taken: u16,
    next: u16,
    waiting: Waiting,
}

impl Turns {
    pub(crate) fn new(size: u16) -> Self {
        Self { taken: 0, next: 0, waiting: Waiting::new(size) }
    }

    /// The turn of a chain that is taken.
    #[inline(always)]
    pub(crate) fn taken(&mut self) -> u16 {
        let turn = self.taken;
        self.taken = turn.wrapping_add(1);
        turn
    }

    /// Whether it is this one's turn, the usual case: it is over then.
    #[inline(always)]
    pub(crate) fn is_next(&mut self, turn: u16) -> bool {
        let is_next = self.next == turn;
        self.next = self.next.wrapping_add(u16::from(is_next));
        is_next
    }

    /// A chain comes back before its turn.
    #[cold]
    pub(crate) fn keep(&mut self, parts: Box<Parts>, written: u32) {
        self.waiting.keep(self.place(parts.turn), parts, written);
    }

    /// The chain whose turn it is, when it has come back; its turn is over then.
    #[inline(always)]
    pub(crate) fn next(&mut self) -> Early {
        if self.waiting.is_empty() { None } else { self.next_waiting() }
    }

    #[cold]
    fn next_waiting(&mut self) -> Early {
        let early = self.waiting.take(self.place(self.next))?;
        self.next = self.next.wrapping_add(1);
        Some(early)
    }

    /// No two chains in flight have the same: there are as many places, and as a power of two they divide the numbers.
    fn place(&self, turn: u16) -> u16 {
        turn % u16::try_from(self.waiting.chains.len()).unwrap_or(u16::MAX).max(1)
    }
}

/// What a driver that was promised order has offered, oldest first: head or buffer id, and room.
#[derive(Debug, Default)]
pub(crate) struct Offered {
    chains: VecDeque<(u16, u32)>,
    /// Of the batch that is being taken: chains before its last one, and the bytes written to that.
    batch: Option<(usize, u32)>,
}

impl Offered {
    pub(crate) fn push(&mut self, id: u16, writable: &[(u64, u32)]) {
        let room = writable.iter().fold(0_u32, |sum, &(_, len)| sum.saturating_add(len));
        self.chains.push_back((id, room));
    }

    /// Whether chains of a batch are left that the device has closed.
    pub(crate) fn is_open(&self) -> bool {
        self.batch.is_some()
    }

    /// The device says that it is done with everything up to `last`, which has to be one of the `most` oldest chains.
    pub(crate) fn open(&mut self, last: u32, written: u32, most: u16) -> Result<(), RingError> {
        let mut oldest = self.chains.iter().take(usize::from(most));
        let before = oldest.position(|&(id, _)| u32::from(id) == last);
        let before = before.ok_or(RingError::UsedHead { id: last })?;
        self.batch = Some((before, written));
        Ok(())
    }

    /// The next chain of the batch, and the bytes that were written to it: to one that the device has skipped, all it
    /// had room for.
    pub(crate) fn next(&mut self) -> Option<(u16, u32)> {
        let (before, written) = self.batch.take()?;
        let (id, room) = self.chains.pop_front()?;
        if before == 0 {
            return Some((id, written));
        }
        self.batch = Some((before - 1, written));
        Some((id, room))
    }
}
