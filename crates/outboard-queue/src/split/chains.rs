//! The chains of a ring, one for each head: idle here, or in flight somewhere else.
//!
//! A chain is made when its head is first used and is used again ever after, so that a request costs no allocation in
//! the long run. What idle chains keep, and what chains in flight may take, is bounded whatever the guest offers.

use outboard_memory::{Buffers, View};

use crate::budget::{Budget, FEW_PIECES};
use crate::chain::Parts;
use crate::error::RingError;

pub(crate) struct Chains {
    /// By head. `None`: in flight, or never made. Empty while the chains are set aside.
    idle: Box<[Option<Box<Parts>>]>,
    /// The same table while every request is looked at twice (see `tracked`), and where order was promised: what is quick
    /// finds nothing, and the other way is taken without a question on the quick one.
    aside: Box<[Option<Box<Parts>>]>,
    /// Which were made.
    made: Box<[bool]>,
    budget: Budget,
}

impl Chains {
    pub(crate) fn new(size: u16) -> Self {
        let size = usize::from(size);
        let idle = std::iter::repeat_with(|| None).take(size).collect();
        Self {
            idle,
            aside: Box::default(),
            made: vec![false; size].into(),
            budget: Budget::default(),
        }
    }

    /// Takes the chain of this head out. `None`: it is set aside, in flight, or was never made.
    #[inline(always)]
    pub(crate) fn take(&mut self, head: u16) -> Option<Box<Parts>> {
        self.idle.get_mut(usize::from(head)).and_then(Option::take)
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

    /// As [`take`](Self::take), of the chains that are set aside, or were not made yet.
    #[inline(always)]
    pub(crate) fn take_aside(&mut self, head: u16, view: &View) -> Result<Box<Parts>, RingError> {
        match self.aside.get_mut(usize::from(head)).and_then(Option::take) {
            Some(parts) => Ok(parts),
            None => self.make(head, view),
        }
    }

    /// Puts a chain back, wherever chains are, that [`place`](Self::place) has no place for. False: no such chain is in
    /// flight here.
    #[inline(always)]
    pub(crate) fn put_back(&mut self, mut parts: Box<Parts>) -> bool {
        if parts.charged != 0 {
            self.budget.discharge(&mut parts);
        }
        let table = if self.idle.is_empty() { &mut self.aside } else { &mut self.idle };
        match table.get_mut(usize::from(parts.head)) {
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
    #[inline(never)]
    fn make(&mut self, head: u16, view: &View) -> Result<Box<Parts>, RingError> {
        let size = u16::try_from(self.made.len()).unwrap_or(u16::MAX);
        let made = self.made.get_mut(usize::from(head)).ok_or(RingError::Head { head, size })?;
        if std::mem::replace(made, true) {
            return Err(RingError::HeadInFlight { head });
        }
        Ok(Box::new(Parts {
            buffers: Buffers::for_requests(view, size.min(FEW_PIECES)),
            head,
            place: head.into(),
            turn: 0,
            grown: false,
            charged: 0,
            next: None,
        }))
    }

    /// Counts the pieces of a chain that was just walked.
    pub(crate) fn charge(&mut self, parts: &mut Parts, pieces: usize) -> Result<(), RingError> {
        self.budget.charge(parts, pieces)
    }

    /// The place of a chain that is given back. `None`: it is charged, no such chain is in flight here, or chains are
    /// set aside.
    #[inline(always)]
    pub(crate) fn place(&mut self, parts: &Parts) -> Option<&mut Option<Box<Parts>>> {
        self.idle.get_mut(parts.place as usize).filter(|slot| slot.is_none())
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
        self.budget.fmt(f)
    }
}

#[cfg(test)]
mod tests;
