//! The device side of a split ring whose requests are looked at twice: their writes are noted in a dirty log, or they
//! themselves in an in-flight region. Also what becomes of chains where order was promised.
//!
//! The quick way asks no question about it: it finds that the available index is too far ahead of a limit of 0 and that
//! there is no place to put a chain back to, and comes here instead. Invariant: `is_tracked()` exactly when the limit
//! is 0; then, and where order was promised, the chains are set aside.

use outboard_memory::Buffers;

use super::device::SplitDevice;
use super::inflight::Inflight;
use super::log::{Logging, RingLog};
use crate::chain::{Chain, Parts};
use crate::error::RingError;
use crate::inflight::InflightArea;
use crate::layout::QueueLayout;
use crate::walk::Health;

impl SplitDevice {
    pub(super) fn is_tracked(&self) -> bool {
        self.log.is_some() || self.inflight.is_some()
    }

    /// Takes the quick way, or this one.
    pub(super) fn choose_way(&mut self) {
        let tracked = self.is_tracked();
        self.limit = if tracked { 0 } else { self.layout.size };
        self.plain = self.health == Health::Live && !tracked;
        self.chains.set_aside(tracked || self.features.in_order);
        self.unusual |= tracked;
        if self.health == Health::Live {
            // Each look of this way is at the index: what was seen and not taken is seen again.
            self.seen_avail = self.next_avail;
        }
    }

    /// Behind an IOMMU the front-end gives an I/O address for the used ring, which is where the ring lies: it is noted
    /// where that is in guest-physical memory.
    pub(super) fn place_log(&mut self) {
        if !self.source.view.memory().is_behind_iommu() {
            return;
        }
        let (_, _, len) = QueueLayout::split_sizes(self.layout.size);
        let place = self.source.view.physical(self.layout.used, len);
        if let (Some(log), Some(place)) = (&mut self.log, place) {
            log.move_used(place);
        }
    }

    pub(crate) fn set_log(&mut self, log: Option<RingLog>) {
        self.choose_log(log);
        self.place_log();
    }

    fn choose_log(&mut self, log: Option<RingLog>) {
        let Some(log) = log else {
            self.log = None;
            self.choose_way();
            return;
        };
        if let Some(logging) = &mut self.log {
            logging.go_on(log);
            return;
        }
        let mut logging = Box::new(Logging::new(log, self.layout.size));
        let mut buffers = Buffers::new(&self.source.view);
        for head in self.chains.in_flight() {
            // Taken before there was a log. The driver leaves the descriptors of what is in flight alone; one that does
            // not gets marks for other pages.
            match self.source.walk_carefully(head, &mut buffers) {
                Ok(_) => logging.taken(head, &buffers),
                Err(_) => logging.taken_blindly(head, self.source.view.memory()),
            }
        }
        self.log = Some(logging);
        self.choose_way();
    }

    /// Takes the next chain; one is there.
    pub(super) fn pop_tracked(&mut self) -> Result<Option<Chain>, RingError> {
        if self.health != Health::Live {
            return self.tell();
        }
        match self.take_tracked() {
            Ok(parts) => {
                self.next_avail = self.next_avail.wrapping_add(1);
                self.seen_avail = self.next_avail;
                Ok(Some(Chain(parts)))
            }
            Err(error) => {
                self.retire(error);
                self.tell()
            }
        }
    }

    fn take_tracked(&mut self) -> Result<Box<Parts>, RingError> {
        let head = self.cells.avail.load(self.next_avail);
        let parts = self.take_noted(head)?;
        if let Some(inflight) = &mut self.inflight {
            inflight.taken(head);
        }
        Ok(parts)
    }

    #[inline(always)]
    fn take_noted(&mut self, head: u16) -> Result<Box<Parts>, RingError> {
        let parts = self.take_aside(head)?;
        if let Some(log) = &mut self.log {
            log.taken(head, &parts.buffers);
        }
        Ok(parts)
    }

    #[inline(always)]
    fn take_aside(&mut self, head: u16) -> Result<Box<Parts>, RingError> {
        let mut parts = self.chains.take_aside(head, &self.source.view)?;
        if self.source.walk_quickly(head, &mut parts.buffers).is_none() {
            parts = self.walk_carefully(head, parts)?;
        }
        if let Some(turns) = &mut self.turns {
            parts.turn = turns.taken();
        }
        Ok(parts)
    }

    /// Takes a chain that is set aside for its turn, or was never made.
    #[inline(never)]
    pub(super) fn take_rarely(&mut self, head: u16) -> Result<Box<Parts>, RingError> {
        self.take_aside(head)
    }

    /// Keeps track of requests in `area` from now on, and takes up what an earlier process left there: its requests are
    /// owed, and the available index to go on from follows from them.
    pub(crate) fn set_inflight(&mut self, area: InflightArea) -> Result<(), RingError> {
        let (inflight, fresh) = Inflight::start(area, self.layout.size, self.next_used)?;
        if !fresh {
            // This overrides the base. What is owed is neither in flight here nor to be taken from the ring.
            self.next_avail = self.next_used.wrapping_add(inflight.owed());
            self.seen_avail = self.next_avail;
            self.lead = inflight.owed();
        }
        self.inflight = Some(Box::new(inflight));
        self.choose_way();
        Ok(())
    }

    /// Requests of an earlier process that were not taken again.
    pub(crate) fn owed(&self) -> u16 {
        self.inflight.as_ref().map_or(0, |inflight| inflight.owed())
    }

    /// The oldest request of an earlier process.
    pub(crate) fn pop_owed(&mut self) -> Result<Option<Chain>, RingError> {
        if self.health != Health::Live {
            return self.tell();
        }
        let owed = self.inflight.as_mut().and_then(|inflight| inflight.next_owed());
        let Some(head) = owed else { return Ok(None) };
        match self.take_noted(head) {
            Ok(parts) => {
                self.lead = self.lead.wrapping_sub(1);
                Ok(Some(Chain(parts)))
            }
            Err(error) => {
                if let Some(inflight) = &mut self.inflight {
                    inflight.put_back(head);
                }
                self.retire(error);
                self.tell()
            }
        }
    }

    /// Gives a chain back that the quick way has no place for, and what has waited for it; or has it wait itself.
    #[inline(never)]
    pub(super) fn complete_tracked(&mut self, parts: Box<Parts>, written: u32) {
        let Some(turns) = &mut self.turns else { return self.give_back(parts, written) };
        if !turns.is_next(parts.turn) {
            return turns.keep(parts, written);
        }
        self.give_back(parts, written);
        while let Some((parts, written)) = self.turns.as_mut().and_then(|turns| turns.next()) {
            self.give_back(parts, written);
        }
    }

    #[inline(always)]
    fn give_back(&mut self, parts: Box<Parts>, written: u32) {
        let head = parts.head;
        let in_order = self.features.in_order;
        let skips = in_order && written == 0 && parts.buffers.takes_nothing();
        if !self.chains.put_back(parts) {
            debug_assert!(false, "head {head} was not taken from this queue");
            return;
        }
        if !in_order || self.next_used == self.told_used {
            self.run = self.next_used;
        }
        if let Some(log) = &mut self.log {
            log.completed(head);
            log.mark_elements(self.run, self.run.wrapping_add(1));
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.completed(head);
        }
        // The element of a run of chains: the next one writes over it when it skips this one.
        self.cells.used.store(self.run, u32::from(head), written);
        self.next_used = self.next_used.wrapping_add(1);
        if !skips {
            self.run = self.next_used;
        }
    }

    /// The used index is about to cover what was completed.
    pub(super) fn before_used_index(&mut self) {
        if let Some(log) = &self.log {
            log.mark_index();
        }
    }

    /// The used index covers elements `old..new`, unless memory is gone.
    pub(super) fn after_used_index(&mut self, old: u16, new: u16) {
        if let Some(inflight) = &mut self.inflight
            && self.told_used == new
        {
            inflight.published(new);
        }
        if let Some(log) = &self.log {
            log.mark_elements(old, new);
            log.mark_index();
            log.notify();
        }
    }

    #[cold]
    pub(super) fn arm_unusual(&mut self) -> bool {
        if self.health != Health::Live {
            return self.fault.is_some();
        }
        self.mark_wish();
        let works = self.arm_plainly();
        self.mark_wish();
        works
    }

    #[cold]
    pub(super) fn disarm_unusual(&mut self) {
        if self.health != Health::Live {
            return;
        }
        self.mark_wish();
        self.disarm_plainly();
        self.mark_wish();
    }

    fn mark_wish(&self) {
        if let Some(log) = &self.log {
            log.mark_wish(self.features.event_idx);
        }
    }
}
