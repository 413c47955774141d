//! The device side of a packed ring (virtio 1.3 §2.8).
//!
//! ```text
//!                ┌ completed, not told ┐                  ┌───── held ─────┐
//!  ring  … told ─┤ first │      │      ├─ next_used … ────┤xxxxxx│xxxxxxxxx├─ next_avail ─▶ available, or not yet
//!                └ flags come last ────┘
//! ```
//! The order of things that both sides may not see differently:
//! * `pop`: the flags of a chain's first descriptor are loaded with Acquire, then everything else of the chain.
//! * `publish`: a batch is written whole but for the flags of its first descriptor, which come last, with Release: the
//!   driver sees all of it or nothing. Then a full fence, then the look at what the driver wants.
//! * `arm`: the wish for a kick, then a full fence, then the last look at the next descriptor. The driver does the
//!   mirror of each (loom tests).
//!
//! Invariant: the descriptors between `next_used` and `next_avail` are ours, `left` is how many are not; only ours are
//! written. Chains may come back in any order: a used descriptor is written where the oldest held one was.

use std::sync::atomic::Ordering;

use outboard_memory::{Descriptor, Lap, PackedRing, PackedTaken, UsedLap, View, fence};

use super::cells::PackedCells;
use super::chains::PackedChains;
use super::inflight::Inflight;
use super::place::{DESC, DISABLE, ENABLE, Place, descriptors, event_word, is_enabled, wants};
use super::tracked::PackedLog;
use super::walk::Source;
use super::{AVAIL, STATE, USED};
use crate::budget::FEW_PIECES;
use crate::chain::{Chain, Parts};
use crate::error::RingError;
use crate::layout::{QueueFeatures, QueueLayout};
use crate::order::Waiting;
use crate::walk::Health;

#[derive(Debug)]
pub(crate) struct PackedDevice {
    pub(super) source: Source,
    pub(super) cells: PackedCells,
    pub(super) layout: QueueLayout,
    pub(super) features: QueueFeatures,
    pub(super) health: Health,
    /// Live, no request is looked at twice, and none waits for its turn.
    pub(super) plain: bool,
    /// Where the next available chain is. Nowhere when the ring takes nothing any more.
    next_avail: Lap,
    /// Where the next used descriptor goes; the first one of the batch is marked.
    pub(super) next_used: UsedLap,
    /// Descriptors that were not taken, or were given back and shown; in bytes of the ring, as lengths of a [`Lap`] are.
    pub(super) left: u32,
    /// Descriptors of an earlier process that were not taken again, in bytes.
    pub(super) owed: u32,
    /// Descriptors between the first one that was completed and not told, and `next_used`, in bytes. 0: none.
    pub(super) batch: u32,
    /// The flags that the first one gets.
    pub(super) first: u16,
    /// On a ring that is not a plain one: the chains of the batch so far are closed by one used descriptor, the first one
    /// (`order.rs`).
    pub(super) run: bool,
    /// Whether the driver may believe that kicks are wanted.
    armed: bool,
    /// Whether the next `publish` has more to do than usual.
    pub(super) unusual: bool,
    /// Whether a call is due whatever the driver asked for: its wish may be older than this queue.
    call_is_due: bool,
    /// Whether chains in flight may hold an earlier generation of guest memory.
    has_old_chains: bool,
    /// The broken rule, until it is told.
    pub(super) fault: Option<RingError>,
    pub(super) chains: PackedChains,
    /// Where writes are noted, while they are.
    pub(super) log: Option<Box<PackedLog>>,
    /// Where requests are kept track of, when they are.
    pub(super) inflight: Option<Box<Inflight>>,
    /// Nobody had used a descriptor of the ring when the queue was made.
    pub(super) is_anew: bool,
    /// Where the next chain of an earlier process began.
    pub(super) owed_at: Place,
    /// By the place of their first descriptor: chains that came back before their turn, when order was promised.
    pub(super) early: Option<Box<Waiting>>,
}

/// The places of a base: available, used. A used half of 0 says nothing (DPDK, and whoever knows one half only): with
/// requests in flight it could be meant only together with an in-flight region, which knows better.
fn places(base: u32, size: u16) -> Option<(Place, Place)> {
    let [a, b, c, d] = base.to_le_bytes();
    let avail = Place::from_bits(u16::from_le_bytes([a, b]), size)?;
    match u16::from_le_bytes([c, d]) {
        0 => Some((avail, avail)),
        used => Some((avail, Place::from_bits(used, size)?)),
    }
}

/// The state of a descriptor that is available at this place.
pub(super) const fn available(place: Place) -> u16 {
    if place.wrap { AVAIL } else { USED }
}

/// The state of a descriptor that is used at this place.
const fn used(place: Place) -> u16 {
    if place.wrap { STATE } else { 0 }
}

/// Index 0 and wrap counter 1, for both sides (virtio 1.3 §2.8.1).
const FRESH: u32 = 0x8000_8000;

/// Whether nobody went round this ring yet. A front-end that knows split rings only (User-mode Linux) says 0 where a
/// fresh ring begins; so does one that went round the ring an odd number of times, but then some descriptor was used in
/// the lap before, or is available in the one that begins, and both have USED.
fn is_unused(ring: &PackedRing) -> bool {
    (0..ring.count())
        .filter_map(|at| ring.flags(at, Ordering::Acquire))
        .all(|flags| flags & USED == 0)
}

impl PackedDevice {
    pub(crate) fn new(
        layout: QueueLayout,
        features: QueueFeatures,
        base: u32,
        view: View,
    ) -> Result<Self, RingError> {
        let size = layout.size;
        let cells = PackedCells::resolve(&layout, &view)?;
        let ring = cells.ring.clone();
        let wrong = RingError::PackedBase { base, size };
        let is_anew = is_unused(&ring);
        let base = if base == 0 && is_anew { FRESH } else { base };
        let (next_avail, next_used) = places(base, size).ok_or(wrong)?;
        let held = next_avail.since(next_used, size).ok_or(wrong)?;
        let indirect = features.indirect;
        let avail_lap = Lap::new(&ring, next_avail.at, available(next_avail)).ok_or(wrong)?;
        let used_lap = UsedLap::new(&ring, next_used.at, used(next_used)).ok_or(wrong)?;
        Ok(Self {
            source: Source { ring, view, size, indirect },
            cells,
            layout,
            features,
            health: Health::Live,
            plain: !features.in_order,
            next_avail: avail_lap,
            next_used: used_lap,
            left: 16 * u32::from(size - held),
            owed: 16 * u32::from(held),
            batch: 0,
            first: 0,
            run: false,
            armed: true,
            unusual: true,
            call_is_due: true,
            has_old_chains: false,
            fault: None,
            chains: PackedChains::new(size),
            log: None,
            inflight: None,
            is_anew,
            owed_at: next_used,
            early: features.in_order.then(|| Box::new(Waiting::new(size))),
        })
    }

    /// Where the next available chain is.
    fn avail_place(&self) -> Place {
        let lap = &self.next_avail;
        Place { at: descriptors(lap.size() - lap.left()), wrap: lap.state() == AVAIL }
    }

    /// Where the next used descriptor goes.
    pub(super) fn used_place(&self) -> Place {
        let lap = self.next_used.lap();
        Place { at: descriptors(lap.size() - lap.left()), wrap: lap.state() == STATE }
    }

    /// Whether [`pop`](Self::pop) would find something to say.
    #[inline]
    pub(crate) fn has_available(&self) -> bool {
        let found = self.next_avail.look(Ordering::Acquire).is_some();
        found && (self.health == Health::Live || self.fault.is_some())
    }

    /// The next chain.
    #[inline(always)]
    pub(crate) fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        let Some(flags) = self.next_avail.look(Ordering::Acquire) else { return Ok(None) };
        match self.take(flags) {
            Some(chain) => Ok(Some(chain)),
            None => self.tell(None),
        }
    }

    /// The broken rule, unless it was told before.
    #[inline(always)]
    pub(crate) fn tell<T>(&mut self, otherwise: T) -> Result<T, RingError> {
        if self.fault.is_some() { self.told(otherwise) } else { Ok(otherwise) }
    }

    #[cold]
    #[inline(never)]
    fn told<T>(&mut self, otherwise: T) -> Result<T, RingError> {
        self.fault.take().map_or(Ok(otherwise), Err)
    }

    /// Takes the next chain, whose first descriptor has these flags beside its state.
    #[inline(always)]
    fn take(&mut self, flags: u16) -> Option<Chain> {
        let Some(mut parts) = self.chains.take() else { return self.take_rarely(flags) };
        let Source { view, indirect, .. } = &self.source;
        let (lap, left) = (&self.next_avail, self.left);
        let Some(taken) = view.gather_packed(lap, flags, left, indirect, &mut parts.buffers) else {
            return self.take_carefully(flags, parts);
        };
        parts.place = taken.id.into();
        match self.keep(taken) {
            Ok(()) => Some(Chain(parts)),
            Err(error) => self.refuse(parts, error),
        }
    }

    /// A chain was walked and is in flight now, unless its id cannot be.
    #[inline(always)]
    fn keep(&mut self, PackedTaken { id, bytes }: PackedTaken) -> Result<(), RingError> {
        self.chains.hold(id, bytes, self.next_avail.left())?;
        self.left -= bytes;
        self.next_avail.advance(bytes);
        Ok(())
    }

    /// There is no idle chain for the quick way, or no ring any more.
    #[cold]
    #[inline(never)]
    fn take_rarely(&mut self, flags: u16) -> Option<Chain> {
        let parts = self.chains.take_any(&self.source.view);
        self.take_carefully(flags, parts)
    }

    /// Something rare or something wrong, or a request that is looked at twice: from the start, with care. A chain that
    /// the IOTLB cannot translate yet stays in the ring. Nothing is taken from a ring that is none any more.
    #[cold]
    #[inline(never)]
    fn take_carefully(&mut self, flags: u16, mut parts: Box<Parts>) -> Option<Chain> {
        if self.health != Health::Live {
            self.chains.put_any(parts);
            return None;
        }
        let head = (self.avail_place().at, flags | self.next_avail.state());
        let mut seen = self.inflight.is_some().then(Vec::new);
        let (left, buffers) = (descriptors(self.left), &mut parts.buffers);
        let walked = self.source.walk_carefully(head, left, buffers, seen.as_mut());
        let walked = walked.and_then(|walked| {
            self.chains.budget.charge(&mut parts, walked.pieces).map(|()| walked)
        });
        match walked {
            Ok(walked) => {
                parts.is_named(walked.taken.id);
                if let Err(error) = self.keep(walked.taken) {
                    return self.refuse(parts, error);
                }
                if let Some(log) = &mut self.log {
                    log.taken(walked.taken.id, &parts.buffers);
                }
                self.note_taken(Chain(parts), &seen.unwrap_or_default())
            }
            Err(error) => self.refuse(parts, error),
        }
    }

    /// The chain is not taken.
    #[cold]
    #[inline(never)]
    pub(super) fn refuse(&mut self, mut parts: Box<Parts>, error: RingError) -> Option<Chain> {
        if parts.charged != 0 {
            self.chains.budget.discharge(&mut parts);
        } else if parts.buffers.has_more_than(FEW_PIECES.into()) {
            parts.buffers.shrink();
        }
        self.chains.put_any(parts);
        self.retire(error);
        None
    }

    /// The driver broke a rule, or memory went: the ring takes nothing from now on, for it has no descriptors any more.
    /// What `pop` says next is the cause. Only the first one counts. A chain that was left does not retire the ring.
    #[cold]
    fn retire(&mut self, error: RingError) {
        if matches!(error, RingError::Untranslated { .. }) {
            self.fault = Some(error);
            return;
        }
        if self.health != Health::Live {
            return;
        }
        self.plain = false;
        let lost = self.source.view.poisoned();
        self.health = if lost { Health::Lost } else { Health::Retired };
        self.unusual |= lost;
        self.fault = Some(if lost { RingError::MemoryLost } else { error });
        self.next_avail = self.next_avail.nowhere();
    }

    #[inline(always)]
    pub(crate) fn complete(&mut self, chain: Chain, written: u32) {
        if self.plain {
            self.give_back::<true>(chain.0, written);
        } else {
            self.complete_in_turn(chain.0, written);
        }
    }

    #[inline(always)]
    pub(super) fn give_back<const PLAIN: bool>(&mut self, parts: Box<Parts>, written: u32) {
        let place = parts.place;
        let bytes = self.chains.release(place);
        if bytes == 0 {
            return self.give_back_charged(parts, written);
        }
        #[expect(clippy::cast_possible_truncation, reason = "a chain of this id was in flight")]
        let id = place as u16;
        let skips = !PLAIN && self.may_skip(&parts, written);
        if PLAIN {
            self.chains.put(parts);
        } else {
            self.chains.put_any(parts);
        }
        let used = self.next_used.lap().state();
        let flags = if written > 0 { used | Descriptor::WRITE } else { used };
        let is_first = self.batch == 0;
        if PLAIN {
            self.next_used.put(id, written, flags, is_first);
        } else if is_first {
            self.next_used.mark();
        }
        // The flags of the first one of a batch come last.
        if is_first {
            self.first = flags;
            self.batch = bytes;
        } else {
            self.batch += bytes;
        }
        if !PLAIN {
            self.run |= is_first;
            if self.is_tracked() {
                self.complete_tracked(id, written, flags);
            } else {
                self.put_in_run(id, written, flags);
            }
            self.run &= skips;
        }
        self.next_used.advance(bytes);
    }

    /// A chain without a place comes back: it is charged, or not of this queue.
    #[cold]
    #[inline(never)]
    fn give_back_charged(&mut self, mut parts: Box<Parts>, written: u32) {
        if parts.charged == 0 {
            debug_assert!(false, "id {} was not taken from this queue", parts.place);
            return;
        }
        self.chains.budget.discharge(&mut parts);
        if self.plain {
            self.give_back::<true>(parts, written);
        } else {
            self.give_back::<false>(parts, written);
        }
    }

    #[inline(always)]
    pub(crate) fn publish(&mut self) -> Result<bool, RingError> {
        if self.unusual {
            let wanted = self.show_unusually();
            return self.tell(wanted);
        }
        if self.source.view.poisoned() {
            // With nothing to show there is nothing to lose: the next look tells.
            return self.lose();
        }
        Ok(self.show())
    }

    /// Guest memory is gone before the batch could be shown.
    #[cold]
    #[inline(never)]
    fn lose(&mut self) -> Result<bool, RingError> {
        if self.batch == 0 {
            return Ok(false);
        }
        self.retire(RingError::MemoryLost);
        self.tell(false)
    }

    /// Shows the batch. Whether the driver wants to be called.
    #[inline(always)]
    fn show(&mut self) -> bool {
        let bytes = self.batch;
        if bytes == 0 {
            return false;
        }
        // Release: the rest of the batch, and the data it speaks of, are there before the driver finds the first one.
        self.next_used.show_marked(self.first);
        self.batch = 0;
        self.left += bytes;
        // The driver arms, then looks at the next descriptor; we write it, then look whether the driver is armed.
        fence(Ordering::SeqCst);
        let event = self.cells.driver_event.load(Ordering::Relaxed);
        is_enabled(event) || self.wants(event, bytes)
    }

    fn wants(&self, event: u32, bytes: u32) -> bool {
        let (events, size) = (self.features.event_idx, self.layout.size);
        wants(event, events, self.used_place(), descriptors(bytes), size)
    }

    /// The first one, one of a lost ring, one after a change of memory, or one of requests that are looked at twice.
    #[cold]
    #[inline(never)]
    fn show_unusually(&mut self) -> bool {
        if self.health == Health::Lost {
            return false;
        }
        if self.has_old_chains {
            self.chains.recycle(&self.source.view);
            self.has_old_chains = !self.is_idle();
        }
        let (used, count) = (self.used_place(), descriptors(self.batch));
        let start = used.back(count, self.layout.size).at;
        let shows = count > 0;
        self.mark_batch(start, count);
        if let Some(inflight) = &mut self.inflight {
            inflight.about_to_show(&self.cells.ring, used);
        }
        let lost = shows && self.source.view.poisoned();
        if lost {
            self.retire(RingError::MemoryLost);
        }
        let wanted = !lost && self.show();
        if let Some(inflight) = self.inflight.as_mut().filter(|_| self.batch == 0) {
            inflight.has_shown(used);
        }
        self.mark_batch(start, count);
        let due = self.call_is_due && shows && self.health != Health::Lost;
        self.call_is_due &= !shows;
        self.unusual = self.call_is_due
            || self.has_old_chains
            || self.health == Health::Lost
            || self.is_tracked();
        if let Some(log) = self.log.as_ref().filter(|_| shows) {
            log.notify();
        }
        wanted || due
    }

    #[inline]
    pub(crate) fn arm(&mut self) -> bool {
        if self.plain { self.arm_plainly() } else { self.arm_unusual() }
    }

    #[inline(always)]
    pub(super) fn arm_plainly(&mut self) -> bool {
        if self.source.view.poisoned() {
            // A ring in a hole of its file would read as empty for ever. The next `pop` tells.
            self.retire(RingError::MemoryLost);
            return true;
        }
        let flags = if self.features.event_idx { DESC } else { ENABLE };
        let wish = event_word(self.avail_place().bits(), flags);
        self.cells.device_event.store(wish, Ordering::Relaxed);
        self.armed = true;
        // The driver makes a descriptor available, then looks whether we are armed; we arm, then look at it.
        fence(Ordering::SeqCst);
        self.next_avail.look(Ordering::Relaxed).is_some()
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
        self.cells.device_event.store(event_word(0, DISABLE), Ordering::Relaxed);
    }

    pub(crate) fn set_memory(&mut self, view: View) -> Result<(), RingError> {
        let cells = PackedCells::resolve(&self.layout, &view)?;
        self.chains.recycle(&view);
        self.has_old_chains |= !self.is_idle();
        self.unusual |= self.has_old_chains;
        self.source.ring = cells.ring.clone();
        self.cells = cells;
        self.source.view = view;
        self.place_laps(self.avail_place(), self.used_place())?;
        self.place_log();
        Ok(())
    }

    /// The two places in the ring where it lies now.
    fn place_laps(&mut self, next_avail: Place, next_used: Place) -> Result<(), RingError> {
        let (ring, size) = (&self.cells.ring, self.layout.size);
        let wrong = RingError::PackedBase { base: self.base(), size };
        // What was completed and not told begins there.
        let told = next_used.back(descriptors(self.batch), size);
        let avail = Lap::new(ring, next_avail.at, available(next_avail)).ok_or(wrong)?;
        let mut used = UsedLap::new(ring, told.at, self::used(told)).ok_or(wrong)?;
        used.mark();
        used.advance(self.batch);
        self.next_avail = if self.health == Health::Live { avail } else { avail.nowhere() };
        self.next_used = used;
        Ok(())
    }

    /// Goes on with the next used descriptor at `used` and `held` descriptors in flight, whatever the base was.
    pub(super) fn go_on_at(&mut self, used: Place, held: u16) -> Result<(), RingError> {
        let size = self.layout.size;
        self.owed_at = used;
        let mut avail = used;
        avail.advance(held, size);
        self.left = 16 * u32::from(size - held);
        self.owed = 16 * u32::from(held);
        self.place_laps(avail, used)
    }

    pub(crate) fn base(&self) -> u32 {
        let told = self.used_place().back(descriptors(self.batch), self.layout.size);
        u32::from(self.avail_place().bits()) | u32::from(told.bits()) << 16
    }

    /// Every descriptor is the driver's, was given back, or is of a request of an earlier process.
    pub(crate) fn is_idle(&self) -> bool {
        self.left + self.batch + self.owed == self.next_avail.size()
    }

    pub(crate) fn in_flight(&self) -> u16 {
        self.chains.in_flight()
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
