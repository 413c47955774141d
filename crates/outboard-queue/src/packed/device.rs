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

use outboard_memory::{Descriptor, PackedRing, PackedTaken, Rules, View, fence};

use super::cells::PackedCells;
use super::chains::PackedChains;
use super::inflight::Inflight;
use super::place::{DESC, DISABLE, ENABLE, Place, event_word, wants};
use super::tracked::PackedLog;
use super::walk::Source;
use super::{AVAIL, STATE, USED};
use crate::budget::FEW_PIECES;
use crate::chain::{Chain, Parts};
use crate::error::RingError;
use crate::layout::{QueueFeatures, QueueLayout};
use crate::order::Early;
use crate::walk::Health;

#[derive(Debug)]
pub(crate) struct PackedDevice {
    pub(super) source: Source,
    /// For the quick walk: no long chains, which are accounted for; none at all while requests are looked at twice.
    pub(super) rules: Rules,
    pub(super) cells: PackedCells,
    pub(super) layout: QueueLayout,
    pub(super) features: QueueFeatures,
    pub(super) health: Health,
    /// Live, no request is looked at twice, and none waits for its turn.
    pub(super) plain: bool,
    /// Where the next available chain is.
    next_avail: Place,
    /// The state of a descriptor that is available there.
    available: u16,
    /// Where the next used descriptor goes.
    pub(super) next_used: Place,
    /// The state of a descriptor that is used there.
    used: u16,
    /// Descriptors that were not taken, or were given back and shown.
    pub(super) left: u16,
    /// Descriptors between the first one that was completed and not told, and `next_used`. 0: none.
    pub(super) batch: u16,
    /// That first one, and the flags it gets.
    first: (u16, u16),
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
    pub(super) early: Option<Box<[Early]>>,
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
        Ok(Self {
            source: Source { ring, view, size, indirect },
            rules: Rules { most: size.min(FEW_PIECES), indirect },
            cells,
            layout,
            features,
            health: Health::Live,
            plain: !features.in_order,
            next_avail,
            available: available(next_avail),
            next_used,
            used: used(next_used),
            left: size - held,
            batch: 0,
            first: (0, 0),
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
            early: features.in_order.then(|| (0..size).map(|_| None).collect()),
        })
    }

    /// The flags of the next descriptor, when it is available. `Some(None)`: there is no ring any more.
    #[inline(always)]
    fn look(&self, order: Ordering) -> Option<Option<u16>> {
        let Some(flags) = self.source.ring.flags(self.next_avail.at, order) else {
            return Some(None);
        };
        (flags & STATE == self.available).then_some(Some(flags))
    }

    /// Whether [`pop`](Self::pop) would find something to say.
    #[inline]
    pub(crate) fn has_available(&self) -> bool {
        match self.look(Ordering::Acquire) {
            None => false,
            Some(None) => self.fault.is_some(),
            Some(Some(_)) => true,
        }
    }

    /// The next chain. None: there is none, or something to [`tell`](Self::tell). (A pointer, so that nothing of it goes
    /// through memory on the way to the caller.)
    #[inline(always)]
    pub(crate) fn pop(&mut self) -> Option<Chain> {
        match self.look(Ordering::Acquire)? {
            Some(flags) => self.take(flags),
            None => None,
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

    /// Takes the next chain, whose first descriptor has these flags. None: the driver broke a rule. (Out of line, so that
    /// the walk has the registers for itself.)
    #[inline(never)]
    fn take(&mut self, flags: u16) -> Option<Chain> {
        let Source { ring, view, .. } = &self.source;
        let mut parts = self.chains.take(view);
        let head = self.next_avail.at;
        let taken = view.gather_packed(ring, (head, flags), &self.rules, &mut parts.buffers);
        match taken {
            Some(taken) if taken.count <= self.left => self.keep(taken, parts),
            _ => self.take_carefully(flags, parts),
        }
    }

    /// The chain was walked and is in flight now, unless its id cannot be.
    #[inline(always)]
    fn keep(&mut self, taken: PackedTaken, mut parts: Box<Parts>) -> Option<Chain> {
        let PackedTaken { id, count } = taken;
        if let Err(error) = self.chains.hold(id, count, self.next_avail.at) {
            return self.refuse(parts, error);
        }
        parts.head = id;
        self.left -= count;
        if self.next_avail.advance(count, self.layout.size) {
            self.available ^= STATE;
        }
        Some(Chain(parts))
    }

    /// Something rare or something wrong, or a request that is looked at twice: from the start, with care. A chain that
    /// the IOTLB cannot translate yet stays in the ring.
    #[cold]
    #[inline(never)]
    fn take_carefully(&mut self, flags: u16, mut parts: Box<Parts>) -> Option<Chain> {
        let head = (self.next_avail.at, flags);
        let mut seen = self.inflight.is_some().then(Vec::new);
        let (left, buffers) = (self.left, &mut parts.buffers);
        let walked = self.source.walk_carefully(head, left, buffers, seen.as_mut());
        let walked = walked.and_then(|walked| {
            self.chains.budget.charge(&mut parts, walked.pieces).map(|()| walked)
        });
        match walked {
            Ok(walked) => {
                let chain = self.keep(walked.taken, parts)?;
                if let Some(log) = &mut self.log {
                    log.taken(walked.taken.id, &chain.0.buffers);
                }
                self.note_taken(chain, &seen.unwrap_or_default())
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
        } else if parts.buffers.pieces() > usize::from(FEW_PIECES) {
            parts.buffers.shrink();
        }
        self.chains.put(parts);
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
        self.source.ring = self.source.ring.emptied();
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
    pub(super) fn give_back<const PLAIN: bool>(&mut self, mut parts: Box<Parts>, written: u32) {
        let id = parts.head;
        let count = self.chains.release(id);
        if count == 0 {
            debug_assert!(false, "id {id} was not taken from this queue");
            return;
        }
        if parts.charged != 0 {
            self.chains.budget.discharge(&mut parts);
        }
        self.chains.put(parts);
        let flags = if written > 0 { self.used | Descriptor::WRITE } else { self.used };
        let at = self.next_used.at;
        // The flags of the first one of a batch come last.
        if self.batch == 0 {
            self.first = (at, flags);
        }
        if PLAIN {
            let later = if self.batch == 0 { None } else { Some(flags) };
            let _ = self.cells.ring.put_used(at, id, written, later);
        } else {
            self.complete_unusually(id, written, flags);
        }
        self.batch += count;
        if self.next_used.advance(count, self.layout.size) {
            self.used ^= STATE;
        }
    }

    #[inline(always)]
    pub(crate) fn publish(&mut self) -> Result<bool, RingError> {
        let wanted = self.show();
        self.tell(wanted)
    }

    /// Shows the batch. Whether the driver wants to be called; when guest memory is gone there is something to
    /// [`tell`](Self::tell).
    #[inline(always)]
    fn show(&mut self) -> bool {
        let count = self.batch;
        if self.unusual {
            return self.show_unusually();
        }
        if count == 0 {
            return false;
        }
        if self.source.view.poisoned() {
            self.retire(RingError::MemoryLost);
            return false;
        }
        // Release: the rest of the batch, and the data it speaks of, are there before the driver finds the first one.
        let (at, flags) = self.first;
        let _ = self.cells.ring.set_flags(at, flags, Ordering::Release);
        self.batch = 0;
        self.left += count;
        // The driver arms, then looks at the next descriptor; we write it, then look whether the driver is armed.
        fence(Ordering::SeqCst);
        let event = self.cells.driver_event.load(Ordering::Relaxed);
        wants(event, self.features.event_idx, self.next_used, count, self.layout.size)
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
            self.has_old_chains = self.in_flight() > 0;
        }
        let ((start, _), count) = (self.first, self.batch);
        let shows = count > 0;
        self.mark_batch(start, count);
        if let Some(inflight) = &mut self.inflight {
            inflight.about_to_show(&self.cells.ring, self.next_used);
        }
        self.unusual = false;
        let wanted = self.show();
        if let Some(inflight) = self.inflight.as_mut().filter(|_| self.batch == 0) {
            inflight.has_shown(self.next_used);
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
        let wish = event_word(self.next_avail.bits(), flags);
        self.cells.device_event.store(wish, Ordering::Relaxed);
        self.armed = true;
        // The driver makes a descriptor available, then looks whether we are armed; we arm, then look at it.
        fence(Ordering::SeqCst);
        matches!(self.look(Ordering::Relaxed), Some(Some(_)))
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
        self.has_old_chains |= self.in_flight() > 0;
        self.unusual |= self.has_old_chains;
        let live = self.health == Health::Live;
        self.source.ring = if live { cells.ring.clone() } else { cells.ring.emptied() };
        self.cells = cells;
        self.source.view = view;
        self.place_log();
        Ok(())
    }

    /// Goes on with the next used descriptor at `used` and `held` descriptors in flight, whatever the base was.
    pub(super) fn go_on_at(&mut self, used: Place, held: u16) {
        let size = self.layout.size;
        (self.next_used, self.used) = (used, self::used(used));
        self.owed_at = used;
        self.next_avail = used;
        self.next_avail.advance(held, size);
        self.available = available(self.next_avail);
        self.left = size - held;
    }

    pub(crate) fn base(&self) -> u32 {
        let told = self.next_used.back(self.batch, self.layout.size);
        u32::from(self.next_avail.bits()) | u32::from(told.bits()) << 16
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
