//! The chains of a ring, one for each head: idle here, or in flight somewhere else.
//!
//! A chain is made when its head is first used and is used again ever after, so that a request costs no allocation in
//! the long run. What idle chains keep, and what chains in flight may take, is bounded whatever the guest offers.

use outboard_memory::{Buffers, View};

use crate::chain::Parts;
use crate::error::RingError;

/// A chain of more pieces is charged, and its list is kept only within limits.
pub(crate) const FEW_PIECES: u16 = 128;
/// The most pieces of chains in flight that have more than a few: 64 MiB of lists.
const MOST_PIECES: usize = 4 << 20;
/// Idle chains that may keep a long list for the next request.
const MOST_GROWN: usize = 64;

pub(crate) struct Chains {
    /// By head. `None`: in flight, or never made. Empty while the chains are set aside.
    idle: Box<[Option<Box<Parts>>]>,
    /// The same table while every request is looked at twice (see `tracked`): what is quick finds nothing, and the
    /// other way is taken without a question on the quick one.
    aside: Box<[Option<Box<Parts>>]>,
    /// Which were made.
    made: Box<[bool]>,
    /// How many may keep a long list.
    grown: usize,
    /// Pieces of chains in flight that have more than a few.
    charged: usize,
}

impl Chains {
    pub(crate) fn new(size: u16) -> Self {
        let size = usize::from(size);
        let idle = std::iter::repeat_with(|| None).take(size).collect();
        Self { idle, aside: Box::default(), made: vec![false; size].into(), grown: 0, charged: 0 }
    }

    /// Takes the chain of this head out.
    #[inline(always)]
    pub(crate) fn take(&mut self, head: u16, view: &View) -> Result<Box<Parts>, RingError> {
        match self.idle.get_mut(usize::from(head)).and_then(Option::take) {
            Some(parts) => Ok(parts),
            None => self.make(head, view),
        }
    }

    /// Sets the chains aside, or puts them where the quick way finds them.
    pub(crate) fn set_aside(&mut self, aside: bool) {
        let (from, to) = match aside {
            true => (&mut self.idle, &mut self.aside),
            false => (&mut self.aside, &mut self.idle),
        };
        if to.is_empty() {
            *to = std::mem::take(from);
        }
    }

    /// As [`take`](Self::take), of the chains that are set aside.
    pub(crate) fn take_aside(&mut self, head: u16, view: &View) -> Result<Box<Parts>, RingError> {
        match self.aside.get_mut(usize::from(head)).and_then(Option::take) {
            Some(parts) => Ok(parts),
            None => self.make(head, view),
        }
    }

    /// Puts a chain aside that [`place`](Self::place) has no place for. False: no such chain is in flight here.
    pub(crate) fn put_aside(&mut self, head: u16, parts: Box<Parts>) -> bool {
        match self.aside.get_mut(usize::from(head)) {
            Some(slot @ None) => {
                *slot = Some(parts);
                true
            }
            _ => false,
        }
    }

    /// Puts a chain back, wherever chains are, that was not taken after all.
    #[cold]
    pub(crate) fn leave(&mut self, head: u16, parts: Box<Parts>) {
        let table = if self.idle.is_empty() { &mut self.aside } else { &mut self.idle };
        if let Some(slot) = table.get_mut(usize::from(head)) {
            *slot = Some(parts);
        }
    }

    /// The heads whose chains are in flight.
    pub(crate) fn in_flight(&self) -> impl Iterator<Item = u16> {
        let table = if self.idle.is_empty() { &self.aside } else { &self.idle };
        let away = table.iter().zip(&self.made).map(|(slot, made)| *made && slot.is_none());
        (0_u16..).zip(away).filter_map(|(head, away)| away.then_some(head))
    }

    /// The first time; not when the chain is in flight.
    #[cold]
    fn make(&mut self, head: u16, view: &View) -> Result<Box<Parts>, RingError> {
        let size = u16::try_from(self.made.len()).unwrap_or(u16::MAX);
        let made = self.made.get_mut(usize::from(head)).ok_or(RingError::Head { head, size })?;
        if std::mem::replace(made, true) {
            return Err(RingError::HeadInFlight { head });
        }
        Ok(Box::new(Parts { buffers: Buffers::new(view), head, grown: false, charged: 0 }))
    }

    /// Counts the pieces of a chain that was just walked.
    pub(crate) fn charge(&mut self, parts: &mut Parts, pieces: usize) -> Result<(), RingError> {
        if pieces > usize::from(FEW_PIECES) {
            parts.charged = pieces;
            self.charged += pieces;
        }
        if self.charged > MOST_PIECES {
            Err(RingError::Pieces { limit: MOST_PIECES })
        } else {
            Ok(())
        }
    }

    /// The place of the chain of `head`, which is given back. `None`: no such chain is in flight here, or chains are set
    /// aside.
    #[inline(always)]
    pub(crate) fn place(
        &mut self,
        head: u16,
        parts: &mut Box<Parts>,
    ) -> Option<&mut Option<Box<Parts>>> {
        if parts.charged != 0 {
            self.discharge(parts);
        }
        self.idle.get_mut(usize::from(head)).filter(|slot| slot.is_none())
    }

    /// A chain with a long list goes idle: it keeps the list, or not.
    #[inline(never)]
    fn discharge(&mut self, parts: &mut Parts) {
        self.charged = self.charged.saturating_sub(std::mem::take(&mut parts.charged));
        if !parts.grown && self.grown < MOST_GROWN {
            self.grown += 1;
            parts.grown = true;
        }
        if !parts.grown {
            parts.buffers.shrink();
        }
    }

    /// Lets go of guest memory that is not the one of `view`.
    pub(crate) fn recycle(&mut self, view: &View) {
        for parts in self.idle.iter_mut().chain(&mut self.aside).flatten() {
            parts.buffers.recycle(view);
        }
    }
}

impl std::fmt::Debug for Chains {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chains")
            .field("grown", &self.grown)
            .field("charged", &self.charged)
            .finish()
    }
}

#[cfg(test)]
mod tests;
