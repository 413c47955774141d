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
use super::chains::Chains;
use super::inflight::Inflight;
use super::log::Logging;
use super::walk::Source;
use super::{NO_INTERRUPT, NO_NOTIFY};
use crate::chain::{Chain, Parts};
use crate::error::RingError;
use crate::event::need_event;
use crate::layout::{QueueFeatures, QueueLayout};
use crate::order::Turns;
use crate::walk::Health;

#[derive(Debug)]
pub(crate) struct SplitDevice {
    pub(super) cells: SplitCells,
    pub(super) source: Source,
    pub(super) layout: QueueLayout,
    pub(super) features: QueueFeatures,
    pub(super) health: Health,
    /// Live, and no request is looked at twice.
    pub(super) plain: bool,
    /// How far the available index may be ahead for the quick way: the size of the ring, or 0 while requests are
    /// looked at twice.
    pub(super) limit: u16,
    pub(super) next_avail: u16,
    pub(super) seen_avail: u16,
    pub(super) next_used: u16,
    pub(super) told_used: u16,
    /// Off the quick way, in a batch: where the next used element is written. Behind `next_used` by the chains that it
    /// closes along with its own (`order.rs`).
    pub(super) run: u16,
    /// `next_avail - next_used` with nothing in flight.
    pub(super) lead: u16,
    /// Whether the driver may believe that kicks are wanted.
    pub(super) armed: bool,
    /// Whether the next `publish` has more to do than usual.
    pub(super) unusual: bool,
    /// Whether a call is due whatever the driver asked for: its wish may be older than this queue.
    pub(super) call_is_due: bool,
    /// Whether chains in flight may hold an earlier generation of guest memory.
    pub(super) has_old_chains: bool,
    /// The broken rule, until it is told.
    pub(super) fault: Option<RingError>,
    pub(super) chains: Chains,
    /// Where writes are noted, while they are.
    pub(super) log: Option<Box<Logging>>,
    /// What outlives this process, when there is something.
    pub(super) inflight: Option<Box<Inflight>>,
    /// Whose turn it is, when order was promised.
    pub(super) turns: Option<Box<Turns>>,
}

impl SplitDevice {
    pub(crate) fn new(
        layout: QueueLayout,
        features: QueueFeatures,
        base: u32,
        view: View,
    ) -> Result<Self, RingError> {
        let next_avail = u16::try_from(base).map_err(|_| RingError::Base { base })?;
        let (desc, cells) = SplitCells::resolve(&layout, features, &view)?;
        let used = cells.used_idx.load(Ordering::Acquire);
        let mut this = Self {
            cells,
            source: Source::new(desc, view, layout.size, features.indirect),
            layout,
            features,
            health: Health::Live,
            plain: true,
            limit: layout.size,
            next_avail,
            seen_avail: next_avail,
            next_used: used,
            told_used: used,
            run: used,
            lead: next_avail.wrapping_sub(used),
            armed: true,
            unusual: true,
            call_is_due: true,
            has_old_chains: false,
            fault: None,
            chains: Chains::new(layout.size),
            log: None,
            inflight: None,
            turns: features.in_order.then(|| Box::new(Turns::new(layout.size))),
        };
        this.choose_way();
        Ok(this)
    }

    /// Whether [`pop`](Self::pop) would find something to say.
    #[inline]
    pub(crate) fn has_available(&self) -> bool {
        if self.health != Health::Live {
            return self.fault.is_some();
        }
        self.next_avail != self.seen_avail
            || self.cells.avail_idx.load(Ordering::Acquire) != self.next_avail
    }

    #[inline(always)]
    pub(crate) fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        let next = self.next_avail;
        if next == self.seen_avail {
            let avail = self.cells.avail_idx.load(Ordering::Acquire);
            if avail == next {
                return Ok(None);
            }
            if avail.wrapping_sub(next) > self.limit {
                return self.refuse(avail);
            }
            self.seen_avail = avail;
        }
        match self.take(next) {
            Some(chain) => Ok(Some(chain)),
            None => self.tell(),
        }
    }

    /// The broken rule, unless it was told before.
    #[cold]
    pub(super) fn tell(&mut self) -> Result<Option<Chain>, RingError> {
        self.fault.take().map_or(Ok(None), Err)
    }

    /// The index is too far ahead, or requests are looked at twice.
    #[cold]
    fn refuse(&mut self, avail: u16) -> Result<Option<Chain>, RingError> {
        if avail.wrapping_sub(self.next_avail) <= self.layout.size {
            return self.pop_tracked();
        }
        self.retire(RingError::AvailIndex { avail, next: self.next_avail, size: self.layout.size });
        self.tell()
    }

    /// Takes the next chain, entry `next`, which the available index covers. None: the driver broke a rule. (Out of line, so that
    /// the walk has the registers for itself.)
    #[inline(always)]
    fn take(&mut self, next: u16) -> Option<Chain> {
        match self.try_take(next) {
            Ok(chain) => {
                self.next_avail = self.next_avail.wrapping_add(1);
                Some(chain)
            }
            Err(error) => {
                self.retire(error);
                None
            }
        }
    }

    #[inline(always)]
    fn try_take(&mut self, next: u16) -> Result<Chain, RingError> {
        let head = self.cells.avail.load(next);
        let Some(mut parts) = self.chains.take(head) else {
            return self.take_rarely(head).map(Chain);
        };
        if self.source.walk_quickly(head, &mut parts.buffers).is_none() {
            parts = self.walk_carefully(head, parts)?;
        }
        Ok(Chain(parts))
    }

    /// Something rare or something wrong: from the start, with care. A chain that the IOTLB cannot translate yet stays
    /// in the ring.
    #[cold]
    #[inline(never)]
    pub(super) fn walk_carefully(
        &mut self,
        head: u16,
        parts: Box<Parts>,
    ) -> Result<Box<Parts>, RingError> {
        let mut parts = parts;
        match self.source.walk_carefully(head, &mut parts.buffers) {
            Ok(pieces) => self.chains.charge(&mut parts, pieces).map(|()| parts),
            Err(error) => {
                if matches!(error, RingError::Untranslated { .. }) {
                    self.chains.leave(head, parts);
                }
                Err(error)
            }
        }
    }

    /// The driver broke a rule, or memory went: the ring takes nothing from now on, for it has no descriptors any more.
    /// What `pop` says next is the cause. Only the first one counts. A chain that was left does not retire the ring.
    #[cold]
    pub(super) fn retire(&mut self, error: RingError) {
        if matches!(error, RingError::Untranslated { .. }) {
            self.fault = Some(error);
            return;
        }
        if self.health != Health::Live {
            self.seen_avail = self.next_avail;
            return;
        }
        self.plain = false;
        self.source.desc = self.source.desc.emptied();
        let lost = self.source.view.poisoned();
        self.health = if lost { Health::Lost } else { Health::Retired };
        self.unusual |= lost;
        self.seen_avail = self.next_avail;
        self.fault = Some(if lost { RingError::MemoryLost } else { error });
    }

    #[inline(always)]
    pub(crate) fn complete(&mut self, chain: Chain, written: u32) {
        let parts = chain.0;
        let head = parts.place;
        match self.chains.place(&parts) {
            Some(slot) => *slot = Some(parts),
            None => return self.complete_tracked(parts, written),
        }
        self.push_used(head, written);
    }

    #[inline(always)]
    pub(super) fn push_used(&mut self, head: u32, written: u32) {
        self.cells.used.store(self.next_used, head, written);
        self.next_used = self.next_used.wrapping_add(1);
    }

    #[inline(always)]
    pub(crate) fn publish(&mut self) -> Result<bool, RingError> {
        if self.unusual {
            return self.publish_unusual();
        }
        let (old, new) = (self.told_used, self.next_used);
        if old == new {
            return Ok(false);
        }
        if self.source.view.poisoned() {
            self.retire(RingError::MemoryLost);
            return self.fault.take().map_or(Ok(false), Err);
        }
        // Release: the elements, and the data they speak of, are there before the index covers them.
        self.cells.used_idx.store(new, Ordering::Release);
        self.told_used = new;
        // The driver arms, then looks at the used index; we move the index, then look whether it is armed.
        fence(Ordering::SeqCst);
        Ok(match &self.cells.events {
            Some(events) => need_event(events.used_event.load(Ordering::Relaxed), new, old),
            None => self.cells.avail_flags.load(Ordering::Relaxed) & NO_INTERRUPT == 0,
        })
    }

    /// The first one, one of a lost ring, one after a change of memory, or one of requests that are looked at twice.
    #[cold]
    fn publish_unusual(&mut self) -> Result<bool, RingError> {
        if self.health == Health::Lost {
            return Ok(false);
        }
        if self.has_old_chains {
            self.chains.recycle(&self.source.view);
            self.has_old_chains = self.in_flight() > 0;
        }
        let (old, new) = (self.told_used, self.next_used);
        let shows = old != new;
        if shows {
            self.before_used_index();
        }
        self.unusual = false;
        let wanted = self.publish();
        if shows {
            self.after_used_index(old, new);
        }
        let due = self.call_is_due && shows;
        self.call_is_due &= !shows;
        self.unusual = self.call_is_due
            || self.has_old_chains
            || self.health == Health::Lost
            || self.is_tracked();
        wanted.map(|wanted| wanted || due)
    }

    #[inline]
    pub(crate) fn arm(&mut self) -> bool {
        if self.plain { self.arm_plainly() } else { self.arm_unusual() }
    }

    #[inline(always)]
    pub(super) fn arm_plainly(&mut self) -> bool {
        if self.source.view.poisoned() {
            // A ring in a hole of its file would read as empty for ever. The next `pop` looks no further, and tells.
            self.retire(RingError::MemoryLost);
            self.seen_avail = self.next_avail.wrapping_add(1);
            return true;
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
        if self.armed && self.plain {
            self.disarm_plainly();
        } else if self.armed {
            self.disarm_unusual();
        }
    }

    #[inline(always)]
    pub(super) fn disarm_plainly(&mut self) {
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
        let (desc, cells) = SplitCells::resolve(&self.layout, self.features, &view)?;
        self.chains.recycle(&view);
        self.has_old_chains |= self.in_flight() > 0;
        self.unusual |= self.has_old_chains;
        self.cells = cells;
        self.source.desc = if self.health == Health::Live { desc } else { desc.emptied() };
        self.source.view = view;
        self.place_log();
        // The wishes stand in the same guest memory, wherever it is mapped now.
        Ok(())
    }

    pub(crate) fn base(&self) -> u32 {
        u32::from(self.next_avail)
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.in_flight() == 0
    }

    pub(crate) fn in_flight(&self) -> u16 {
        self.next_avail.wrapping_sub(self.next_used).wrapping_sub(self.lead)
    }

    pub(crate) fn layout(&self) -> &QueueLayout {
        &self.layout
    }

    pub(crate) fn features(&self) -> QueueFeatures {
        self.features
    }

    pub(crate) fn view(&self) -> &View {
        &self.source.view
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.health != Health::Live
    }
}
