//! The device side of a packed ring whose requests are looked at twice: their writes are noted in a dirty log
//! (vhost-user, "Migration").
//!
//! What goes through the ring itself is noted where the ring lies, whatever address the front-end gave for it: there is
//! only one that is right, and QEMU gives the one of the event structure where DPDK gives the one of the ring.
//! Invariant: while there is a log the chains are set aside, so that the quick walk finds none, and every publication is an unusual one.

use outboard_memory::{Buffers, GuestMemory, View};

use super::STATE;
use super::device::PackedDevice;
use super::place::descriptors;
use crate::chain::Parts;
use crate::layout::QueueLayout;
use crate::order::Early;
use crate::split::log::{Logging, RingLog};
use crate::walk::Health;

/// A packed ring that notes its writes.
#[derive(Debug)]
pub(super) struct PackedLog {
    notes: Logging,
    /// The guest-physical address of the device's event structure, when the ring is noted.
    event: Option<u64>,
    size: u16,
}

/// Where a ring lies in guest-physical memory: its descriptors, the device's event structure.
fn places(layout: &QueueLayout, view: &View) -> (u64, u64) {
    let (desc, _, event) = QueueLayout::packed_sizes(layout.size);
    let place = |guest, len| view.physical(guest, len).unwrap_or(guest);
    (place(layout.desc, desc), place(layout.used, event))
}

impl PackedLog {
    fn new(log: RingLog, layout: &QueueLayout, view: &View) -> Self {
        let size = layout.size;
        let mut this = Self { notes: Logging::new(log, size), event: None, size };
        this.place(layout, view);
        this
    }

    /// Goes on in another log.
    fn go_on(&mut self, log: RingLog, layout: &QueueLayout, view: &View) {
        self.notes.go_on(log);
        self.place(layout, view);
    }

    /// The ring lies there now.
    fn place(&mut self, layout: &QueueLayout, view: &View) {
        let (ring, event) = places(layout, view);
        self.event = self.notes.notes_used().then_some(event);
        self.notes.move_used(ring);
    }

    /// A chain is about to be seen by the device.
    pub(super) fn taken(&mut self, id: u16, buffers: &Buffers) {
        self.notes.taken(id, buffers);
    }

    fn taken_blindly(&mut self, id: u16, memory: &GuestMemory) {
        self.notes.taken_blindly(id, memory);
    }

    /// `count` descriptors from `start` on are written, round the end of the ring.
    fn mark_descriptors(&self, start: u16, count: u16) {
        let before_the_end = count.min(self.size.saturating_sub(start));
        self.notes.mark_used(16 * u64::from(start), 16 * u64::from(before_the_end));
        self.notes.mark_used(0, 16 * u64::from(count - before_the_end));
    }

    fn mark_wish(&self) {
        if let Some(event) = self.event {
            self.notes.mark_at(event, 4);
        }
    }

    /// A batch of writes is noted.
    pub(super) fn notify(&self) {
        self.notes.notify();
    }
}

impl PackedDevice {
    pub(super) fn is_tracked(&self) -> bool {
        self.log.is_some() | self.inflight.is_some()
    }

    /// Takes the quick way, or this one.
    pub(super) fn choose_way(&mut self) {
        let tracked = self.is_tracked();
        self.chains.set_aside(tracked);
        self.plain = self.health == Health::Live && !tracked && self.early.is_none();
        self.unusual |= tracked;
    }

    /// The ring may lie elsewhere now.
    pub(super) fn place_log(&mut self) {
        if let Some(log) = &mut self.log {
            log.place(&self.layout, &self.source.view);
        }
    }

    pub(crate) fn set_log(&mut self, log: Option<RingLog>) {
        self.choose_log(log);
        self.choose_way();
    }

    fn choose_log(&mut self, log: Option<RingLog>) {
        let Some(log) = log else {
            self.log = None;
            return;
        };
        if let Some(present) = &mut self.log {
            present.go_on(log, &self.layout, &self.source.view);
            return;
        }
        let mut present = Box::new(PackedLog::new(log, &self.layout, &self.source.view));
        let mut buffers = Buffers::new(&self.source.view);
        for (id, start) in self.chains.each_in_flight() {
            // Taken before there was a log. Its descriptors are still there unless what came back earlier was written
            // over them; a driver that changes them gets marks for other pages.
            match self.walk_held((id, start), &mut buffers) {
                Some(walked) if walked == id => present.taken(id, &buffers),
                _ => present.taken_blindly(id, self.source.view.memory()),
            }
        }
        self.log = Some(present);
    }

    /// Walks a chain in flight whose first descriptor was at `start` once more, if it is still there. Returns its id.
    fn walk_held(&self, (id, start): (u16, u16), to: &mut Buffers) -> Option<u16> {
        if let Some(inflight) = &self.inflight {
            let walked = self.source.walk_again(&inflight.pieces(id), to).ok()?;
            return Some(walked.taken.id);
        }
        let size = self.layout.size;
        let used = self.used_place().at;
        let ahead = match start.checked_sub(used) {
            Some(ahead) => ahead,
            None => size - (used - start),
        };
        if ahead >= size - descriptors(self.left + self.batch) {
            return None;
        }
        let flags = self.source.ring.flags(start, std::sync::atomic::Ordering::Relaxed)?;
        let walked = self.source.walk_carefully((start, flags), size, to, None).ok()?;
        Some(walked.taken.id)
    }

    /// A chain comes back to a ring that is not a plain one: it is given back now, or when its turn has come, which is
    /// when the next used descriptor goes where its first one was.
    #[inline(never)]
    pub(super) fn complete_in_turn(&mut self, parts: Box<Parts>, written: u32) {
        let Some(early) = &mut self.early else { return self.give_back::<false>(parts, written) };
        if !self.chains.began_at(parts.name(), self.next_used.lap().left()) {
            let start = self.chains.start(parts.name());
            return early.keep(start.unwrap_or(u16::MAX), parts, written);
        }
        self.give_back::<false>(parts, written);
        while let Some((parts, written)) = self.next_early() {
            self.give_back::<false>(parts, written);
        }
    }

    /// The chain whose turn it is, when it has come back.
    #[inline(always)]
    fn next_early(&mut self) -> Early {
        let early = self.early.as_mut().filter(|early| !early.is_empty())?;
        let lap = self.next_used.lap();
        early.take(descriptors(lap.size() - lap.left()))
    }

    /// The chain of `id` is given back by a ring that is looked at twice. What goes through an in-flight region is written
    /// to the ring when it is shown.
    #[cold]
    #[inline(never)]
    pub(super) fn complete_tracked(&mut self, id: u16, written: u32, flags: u16) {
        let at = self.used_place().at;
        if let Some(log) = &mut self.log {
            log.notes.completed(id);
            log.mark_descriptors(at, 1);
        }
        match &mut self.inflight {
            Some(inflight) => inflight.completed(id, written, (at, flags)),
            None => self.put_in_run(id, written, flags),
        }
    }

    /// Writes the used descriptor of a chain that is given back.
    #[inline(always)]
    pub(super) fn put_in_run(&mut self, id: u16, written: u32, flags: u16) {
        if self.run {
            // It closes all of the batch so far, with the state that goes with the place of the first one.
            self.next_used.put_marked(id, written);
            self.first = self.first & STATE | flags & !STATE;
        } else {
            self.next_used.put_used(id, written);
            self.next_used.put_flags(flags);
        }
    }

    /// Whether the used descriptor of a chain may be left out, when the next one comes in the same batch: order was
    /// promised, the driver knows what it is not told, and no process that follows has to undo it.
    pub(super) fn may_skip(&self, parts: &Parts, written: u32) -> bool {
        let says_nothing = written == 0 && parts.buffers.takes_nothing();
        says_nothing && self.early.is_some() && self.inflight.is_none()
    }

    /// The batch of `count` descriptors from `start` on is about to be shown, or was.
    pub(super) fn mark_batch(&self, start: u16, count: u16) {
        if let Some(log) = self.log.as_ref().filter(|_| count > 0) {
            log.mark_descriptors(start, count);
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
            log.mark_wish();
        }
    }
}
