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
//! On a split ring the order is kept here: invariant: one turn for each chain in flight, oldest first; `number` says by
//! head how many turns were before it. On a packed ring it stands in the places of the chains: the one whose turn it is
//! began where the next used descriptor goes (`packed/tracked.rs`).

use std::collections::VecDeque;

use crate::chain::Parts;
use crate::error::RingError;

/// What came back to a device's queue before its turn: the chain, and the bytes written.
pub(crate) type Early = Option<(Box<Parts>, u32)>;

/// The chains that a device holds, in the order in which it took them and gives them back.
#[derive(Debug)]
pub(crate) struct Turns {
    turns: VecDeque<(u16, Early)>,
    /// The number of the oldest turn.
    oldest: u16,
    /// By head: the number of its turn. Heads that are not in flight have an old one.
    number: Box<[u16]>,
}

impl Turns {
    pub(crate) fn new(size: u16) -> Self {
        let number = vec![0; usize::from(size)].into();
        Self { turns: VecDeque::new(), oldest: 0, number }
    }

    /// The chain of this head was taken.
    #[cold]
    #[inline(never)]
    pub(crate) fn taken(&mut self, head: u16) {
        // At most 32,768 are in flight.
        let turn = self.oldest.wrapping_add(u16::try_from(self.turns.len()).unwrap_or(u16::MAX));
        if let Some(number) = self.number.get_mut(usize::from(head)) {
            *number = turn;
        }
        self.turns.push_back((head, None));
    }

    /// Whether it is the turn of this head, the usual case: it is over then.
    #[inline]
    pub(crate) fn is_next(&mut self, head: u16) -> bool {
        let next = matches!(self.turns.front(), Some((oldest, None)) if *oldest == head);
        if next {
            self.turns.pop_front();
            self.oldest = self.oldest.wrapping_add(1);
        }
        next
    }

    /// A chain comes back before its turn.
    pub(crate) fn completed(&mut self, parts: Box<Parts>, written: u32) {
        let head = parts.head;
        let number = self.number.get(usize::from(head)).copied().unwrap_or_default();
        let turn = self.turns.get_mut(usize::from(number.wrapping_sub(self.oldest)));
        match turn.filter(|(other, early)| *other == head && early.is_none()) {
            Some((_, early)) => *early = Some((parts, written)),
            None => debug_assert!(false, "head {head} was not taken from this queue"),
        }
    }

    /// The chain whose turn it is, when it has come back.
    pub(crate) fn next(&mut self) -> Early {
        let next = self.turns.front_mut().and_then(|(_, early)| early.take())?;
        self.turns.pop_front();
        self.oldest = self.oldest.wrapping_add(1);
        Some(next)
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
