//! The device side of a split ring.
//!
//! ```text
//!        next_avail ─▶┌ taken ┐┌ seen, not taken ┐◀─ seen_avail        told_used ─▶┌ completed, not told ┐◀─ next_used
//!  avail ring  ………………│xxxxxxx││     │     │     │…………   used ring ………………………………│      │      │      │…………
//! ```
//! The order of things that both sides may not see differently:
//! * `pop`: the available index is loaded with Acquire, then the entries it covers.
//! * `publish`: elements, then the used index with Release, then a full fence, then the look at what the driver wants.
//! * `arm`: the wish for a kick, then a full fence, then the last look at the available index. The driver does the
//!   mirror of each, so that of two sides that pass each other at least one sees the other (loom tests).

use std::sync::atomic::Ordering;

use outboard_memory::{View, fence};

use super::cells::SplitCells;
use super::walk::Walk;
use super::{NO_INTERRUPT, NO_NOTIFY};
use crate::chain::{Buffers, Chain};
use crate::error::RingError;
use crate::event::need_event;
use crate::layout::{QueueFeatures, QueueLayout};

/// A chain of so many pieces is charged, and its lists are kept only within limits.
const FEW_PIECES: usize = 64;
/// The most pieces of chains in flight that have more than a few: 64 MiB of lists.
const MOST_PIECES: usize = 4 << 20;
/// Lists of more than a few pieces that the pool keeps for the next such chain.
const MOST_GROWN: usize = 64;

/// How much of the ring still works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Health {
    Live,
    /// The driver broke a rule: nothing more is taken; what is in flight can still be given back.
    Retired,
    /// Guest memory is gone: nothing is given back either.
    Lost,
}

#[derive(Debug)]
pub(crate) struct SplitDevice {
    cells: SplitCells,
    view: View,
    layout: QueueLayout,
    features: QueueFeatures,
    health: Health,
    next_avail: u16,
    seen_avail: u16,
    next_used: u16,
    told_used: u16,
    in_flight: u16,
    /// Which heads are in flight.
    heads: Box<[bool]>,
    /// Spent chains, for the next ones.
    pool: Pool,
    /// Whether the driver may believe that kicks are wanted.
    armed: bool,
    /// Whether a call is due whatever the driver asked for: its wish may be older than this queue.
    call_is_due: bool,
}

impl SplitDevice {
    pub(crate) fn new(
        layout: QueueLayout,
        features: QueueFeatures,
        base: u32,
        view: View,
    ) -> Result<Self, RingError> {
        let next_avail = u16::try_from(base).map_err(|_| RingError::Base { base })?;
        let cells = SplitCells::resolve(&layout, features, &view)?;
        let used = cells.used_idx.load(Ordering::Acquire);
        Ok(Self {
            cells,
            view,
            layout,
            features,
            health: Health::Live,
            next_avail,
            seen_avail: next_avail,
            next_used: used,
            told_used: used,
            in_flight: 0,
            heads: vec![false; usize::from(layout.size)].into(),
            pool: Pool::default(),
            armed: true,
            call_is_due: true,
        })
    }

    #[inline]
    pub(crate) fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        if self.next_avail == self.seen_avail && !self.look()? {
            return Ok(None);
        }
        match self.take() {
            Ok(chain) => Ok(Some(chain)),
            Err(error) => Err(self.retire(error)),
        }
    }

    /// Looks at the available index. False: nothing there.
    fn look(&mut self) -> Result<bool, RingError> {
        if self.health != Health::Live {
            return Ok(false);
        }
        let avail = self.cells.avail_idx.load(Ordering::Acquire);
        if self.view.memory().poisoned() {
            return Err(self.retire(RingError::MemoryLost));
        }
        let (next, size) = (self.next_avail, self.layout.size);
        if avail.wrapping_sub(next) > size {
            return Err(self.retire(RingError::AvailIndex { avail, next, size }));
        }
        self.seen_avail = avail;
        Ok(avail != next)
    }

    /// Takes the next chain, which the available index covers.
    #[inline]
    fn take(&mut self) -> Result<Chain, RingError> {
        let size = self.layout.size;
        let head = self.cells.avail.load(self.next_avail);
        let taken = self.heads.get_mut(usize::from(head)).ok_or(RingError::Head { head, size })?;
        if std::mem::replace(taken, true) {
            return Err(RingError::HeadInFlight { head });
        }
        let mut buffers = self.pool.get();
        let walk =
            Walk { cells: &self.cells, view: &self.view, size, indirect: self.features.indirect };
        walk.run(head, &mut buffers)?;
        self.pool.charge(&mut buffers)?;
        buffers.head = head;
        buffers.room = buffers.writable.len();
        self.next_avail = self.next_avail.wrapping_add(1);
        self.in_flight += 1;
        Ok(Chain(buffers))
    }

    /// The driver broke a rule, or memory went: the ring takes nothing from now on. What `pop` says is the cause.
    #[cold]
    fn retire(&mut self, error: RingError) -> RingError {
        let lost = self.view.memory().poisoned();
        self.health = if lost { Health::Lost } else { Health::Retired };
        self.seen_avail = self.next_avail;
        if lost { RingError::MemoryLost } else { error }
    }

    #[inline]
    pub(crate) fn complete(&mut self, chain: Chain, written: u32) {
        let buffers = chain.0;
        let head = buffers.head;
        if let Some(taken) = self.heads.get_mut(usize::from(head))
            && std::mem::replace(taken, false)
        {
            self.cells.used.store(self.next_used, u32::from(head), written);
            self.next_used = self.next_used.wrapping_add(1);
            self.in_flight -= 1;
        } else {
            debug_assert!(false, "head {head} was not taken from this queue");
        }
        self.pool.put(buffers, &self.view);
    }

    #[inline]
    pub(crate) fn publish(&mut self) -> Result<bool, RingError> {
        let (old, new) = (self.told_used, self.next_used);
        if old == new || self.health == Health::Lost {
            return Ok(false);
        }
        if self.view.memory().poisoned() {
            return Err(self.retire(RingError::MemoryLost));
        }
        // Release: the elements, and the data they speak of, are there before the index covers them.
        self.cells.used_idx.store(new, Ordering::Release);
        self.told_used = new;
        // The driver arms, then looks at the used index; we move the index, then look whether it is armed.
        fence(Ordering::SeqCst);
        let wanted = match &self.cells.events {
            Some(events) => need_event(events.used_event.load(Ordering::Relaxed), new, old),
            None => self.cells.avail_flags.load(Ordering::Relaxed) & NO_INTERRUPT == 0,
        };
        Ok(std::mem::replace(&mut self.call_is_due, false) || wanted)
    }

    #[inline]
    pub(crate) fn arm(&mut self) -> bool {
        if self.health != Health::Live {
            return false;
        }
        match &self.cells.events {
            Some(events) => {
                events.avail_event.store(self.next_avail, Ordering::Relaxed);
            }
            None => {
                self.cells.used_flags.store(0, Ordering::Relaxed);
            }
        }
        self.armed = true;
        // The driver moves the available index, then looks whether we are armed; we arm, then look at the index.
        fence(Ordering::SeqCst);
        self.cells.avail_idx.load(Ordering::Relaxed) != self.next_avail
    }

    #[inline]
    pub(crate) fn disarm(&mut self) {
        if !self.armed || self.health != Health::Live {
            return;
        }
        self.armed = false;
        match &self.cells.events {
            // Just passed: the driver comes by again after 65,535 more requests, and kicks once.
            Some(events) => {
                events.avail_event.store(self.next_avail.wrapping_sub(1), Ordering::Relaxed);
            }
            None => {
                self.cells.used_flags.store(NO_NOTIFY, Ordering::Relaxed);
            }
        }
    }

    pub(crate) fn set_memory(&mut self, view: View) -> Result<(), RingError> {
        self.cells = SplitCells::resolve(&self.layout, self.features, &view)?;
        self.pool.recycle(&view);
        self.view = view;
        // The wishes stand in the same guest memory, wherever it is mapped now.
        Ok(())
    }

    pub(crate) fn base(&self) -> u32 {
        u32::from(self.next_avail)
    }

    pub(crate) fn in_flight(&self) -> u16 {
        self.in_flight
    }

    pub(crate) fn layout(&self) -> &QueueLayout {
        &self.layout
    }

    pub(crate) fn features(&self) -> QueueFeatures {
        self.features
    }

    pub(crate) fn view(&self) -> &View {
        &self.view
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.health != Health::Live
    }
}

/// Spent chains, whose lists are used again. What it keeps is bounded whatever the guest offers.
#[derive(Default)]
struct Pool {
    #[expect(
        clippy::vec_box,
        reason = "a chain is one pointer: its box moves in and out as it stands"
    )]
    spare: Vec<Box<Buffers>>,
    /// How many of the spare ones have grown lists.
    grown: usize,
    /// Pieces of chains in flight that have more than a few.
    charged: usize,
}

impl Pool {
    #[inline]
    fn get(&mut self) -> Box<Buffers> {
        let Some(buffers) = self.spare.pop() else { return Box::default() };
        self.grown -= usize::from(buffers.grown);
        buffers
    }

    /// Counts the pieces of a chain that was just walked.
    #[inline]
    fn charge(&mut self, buffers: &mut Buffers) -> Result<(), RingError> {
        let pieces = buffers.readable.segments().len() + buffers.writable.segments().len();
        if pieces > FEW_PIECES {
            buffers.grown = true;
            buffers.charged = pieces;
            self.charged += pieces;
            if self.charged > MOST_PIECES {
                return Err(RingError::Pieces { limit: MOST_PIECES });
            }
        }
        Ok(())
    }

    #[inline]
    fn put(&mut self, mut buffers: Box<Buffers>, view: &View) {
        if buffers.grown {
            self.charged -= std::mem::take(&mut buffers.charged);
            if self.grown == MOST_GROWN {
                return;
            }
            self.grown += 1;
        }
        let memory = view.memory();
        buffers.readable.recycle(memory);
        buffers.writable.recycle(memory);
        buffers.tail.recycle(memory);
        self.spare.push(buffers);
    }

    /// Lets go of guest memory that is not the one of `view`.
    fn recycle(&mut self, view: &View) {
        for buffers in &mut self.spare {
            buffers.readable.recycle(view.memory());
            buffers.writable.recycle(view.memory());
            buffers.tail.recycle(view.memory());
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("spare", &self.spare.len())
            .field("charged", &self.charged)
            .finish()
    }
}
