//! The in-flight region of one packed ring: what a device holds, in memory that outlives it (vhost-user, "Inflight I/O
//! tracking", "Packed virtqueues").
//!
//! ```text
//!  take:     copies of its descriptors ─▶ free entries, counter, inflight := 1 ─▶ free head moves: it may be executed
//!  publish:  entries become free, used index moves ─▶ used descriptors, the flags of the first one last
//!            ─▶ inflight := 0 of the batch ─▶ old_… := what there is now
//! ```
//! Requests are copied because the ring does not keep them: used descriptors are written over them. For the same reason
//! nothing is written to the ring before the used index here has moved: a process that follows undoes what a killed one
//! had written behind a first descriptor that was not shown.
//!
//! Free head and old free head are one word, so are used and old used index with their wrap counters: each pair changes
//! at once. Invariant: what the region says is checked against the number of its entries before it is used, every walk
//! is bounded by it, and links are followed in a copy of ours.

use std::cmp::Reverse;
use std::sync::atomic::Ordering;

use outboard_memory::{PackedBody, PackedRing, fence};

use super::STATE;
use super::device::available;
use super::place::Place;
use super::walk::Piece;
use crate::error::RingError;
use crate::inflight::InflightArea;

const FEATURES: usize = 0;
/// Version, number of entries, free head, old free head.
const HEADS: usize = 8;
/// Used index, old used index, and the wrap counters of both in a byte each.
const USED: usize = 16;
/// Bytes of the head of an area, and of an entry.
const HEAD: usize = 32;
const ENTRY: usize = 32;
/// Offsets in an entry: inflight u8, next, last and num u16 from 2 on; id, flags u16 and len u32; address.
const NEXT: usize = 2;
const COUNTER: usize = 8;
const BODY: usize = 16;
const ADDR: usize = 24;

/// The version that is carried out.
const ONE: u16 = 1;

/// Where an entry begins.
fn entry(at: u16) -> usize {
    HEAD + ENTRY * usize::from(at)
}

fn halves(word: u64) -> [u16; 4] {
    let [a, b, c, d, e, f, g, h] = word.to_le_bytes();
    [[a, b], [c, d], [e, f], [g, h]].map(u16::from_le_bytes)
}

fn word([a, b, c, d]: [u16; 4]) -> u64 {
    u64::from(a) | u64::from(b) << 16 | u64::from(c) << 32 | u64::from(d) << 48
}

fn used_word(now: Place, old: Place) -> u64 {
    word([now.at, old.at, u16::from(now.wrap) | u16::from(old.wrap) << 8, 0])
}

/// A chain that was given back and not shown.
#[derive(Clone, Copy, Debug)]
struct Done {
    /// Its first entry.
    first: u16,
    /// Its used descriptor.
    at: u16,
    id: u16,
    written: u32,
    flags: u16,
}

/// A chain that an earlier process held.
#[derive(Clone, Copy, Debug)]
struct Owed {
    first: u16,
    last: u16,
    count: u16,
}

/// What a ring keeps beside its area.
#[derive(Debug)]
pub(super) struct Inflight {
    area: InflightArea,
    counter: u64,
    /// The first free entry.
    free: u16,
    /// Links of entries. Our own copy: the region's is only written.
    next: Box<[u16]>,
    /// First and last entry of each chain in flight, by buffer id.
    chains: Box<[(u16, u16)]>,
    batch: Vec<Done>,
    /// What the region has as old used index.
    shown: Place,
    /// The oldest one last.
    owed: Vec<Owed>,
}

/// Where a ring goes on behind what an earlier process has left.
#[derive(Clone, Copy, Debug)]
pub(super) struct Resumed {
    pub(super) used: Place,
    /// Descriptors of what is owed.
    pub(super) held: u16,
}

impl Inflight {
    /// Begins to use an area for a ring whose next used descriptor is at `used`. `anew`: nobody has used a descriptor of
    /// it yet. A fresh area is prepared; else what the last batch left undone is done or undone, and what was in flight
    /// is owed.
    ///
    /// # Errors
    /// No device leaves an area like this. Nothing was written.
    pub(super) fn start(
        area: InflightArea,
        ring: &PackedRing,
        used: Place,
        anew: bool,
    ) -> Result<(Self, Option<Resumed>), RingError> {
        let wrong = |field, value: u64| Err(RingError::Inflight { field, value });
        let (size, entries) = (ring.count(), area.entries);
        if !area.packed {
            return wrong("region of split rings, for a packed one of", size.into());
        }
        if entries < size {
            return wrong("number of entries", entries.into());
        }
        let mut this = Self {
            area,
            counter: 0,
            free: 0,
            next: (1..=entries).collect(),
            chains: vec![(0, 0); size.into()].into(),
            batch: Vec::with_capacity(size.into()),
            shown: used,
            owed: Vec::new(),
        };
        let shared = &this.area.shared;
        let heads = halves(shared.load64(HEADS).unwrap_or(0));
        match heads {
            [0, ..] => {
                this.prepare();
                return Ok((this, None));
            }
            [ONE, found, ..] if found == entries => {}
            [ONE, found, ..] => return wrong("desc_num", found.into()),
            [version, ..] => return wrong("version", version.into()),
        }
        match shared.load64(FEATURES) {
            Some(0) => {}
            features => return wrong("features", features.unwrap_or(0)),
        }
        let resumed = this.recover(ring, heads)?;
        // A ring that was set up anew while nothing was in flight begins where the front-end says.
        let fresh = Place { at: 0, wrap: true };
        if anew && resumed.held == 0 && resumed.used != fresh {
            this.shown = used;
            this.prepare();
            return Ok((this, None));
        }
        Ok((this, Some(resumed)))
    }

    /// An area of zeros, or of whatever the peer left there: the version comes last.
    fn prepare(&mut self) {
        let shared = &self.area.shared;
        shared.store16(HEADS, 0);
        for (at, next) in (0..).zip(1..=self.area.entries) {
            shared.store64(entry(at), word([0, next, 0, 0]));
        }
        self.next = (1..=self.area.entries).collect();
        self.free = 0;
        shared.store64(FEATURES, 0);
        shared.store64(USED, used_word(self.shown, self.shown));
        self.store_heads(0);
    }

    fn store_heads(&self, old: u16) {
        let heads = [ONE, self.area.entries, self.free, old];
        self.area.shared.store64(HEADS, word(heads));
    }

    fn recover(&mut self, ring: &PackedRing, heads: [u16; 4]) -> Result<Resumed, RingError> {
        let (size, entries) = (ring.count(), self.area.entries);
        let shared = &self.area.shared;
        let [now, old, wraps, _] = halves(shared.load64(USED).unwrap_or(0));
        let place = |at: u16, wrap: u16| match at < size {
            true => Ok(Place { at, wrap: wrap & 1 != 0 }),
            false => Err(RingError::Inflight { field: "used_idx", value: at.into() }),
        };
        let (now, old) = (place(now, wraps)?, place(old, wraps >> 8)?);
        // What the first descriptor of a batch says tells whether the driver was shown it.
        let first = ring.flags(old.at, Ordering::Acquire).unwrap_or(0);
        let shown = now == old || first & STATE != available(old);
        let [.., free, old_free] = heads;
        let (used, free) = if shown && now != old { (now, free) } else { (old, old_free) };

        let mut words: Vec<[u16; 4]> = Vec::with_capacity(entries.into());
        words.extend((0..entries).map(|at| halves(shared.load64(entry(at)).unwrap_or(0))));
        let links: Vec<u16> = words.iter().map(|[_, next, ..]| *next).collect();
        let mut taken = vec![false; entries.into()];
        let mut at = free;
        while let Some(taken) = taken.get_mut(usize::from(at)) {
            if std::mem::replace(taken, true) {
                return Err(RingError::Inflight { field: "free list", value: at.into() });
            }
            at = links.get(usize::from(at)).copied().unwrap_or(entries);
        }
        let is_free = taken.clone();
        let mut owed: Vec<(u64, Owed)> = Vec::new();
        let mut held = 0_u32;
        for (at, [in_flight, _, last, num]) in (0..).zip(&words) {
            if in_flight & 0xff == 0 || is_free.get(usize::from(at)) != Some(&false) {
                continue;
            }
            let chain = Owed { first: at, last: *last, count: *num };
            check_chain(chain, size, &links, &mut taken)?;
            held += u32::from(chain.count);
            owed.push((shared.load64(entry(at) + COUNTER).unwrap_or(0), chain));
        }
        let held = u16::try_from(held).ok().filter(|held| *held <= size);
        let held = held.ok_or(RingError::Inflight { field: "num", value: size.into() })?;

        // Checked: from here on it is written.
        if now != old && !shown {
            withdraw(ring, old, now);
        }
        for (at, _) in (0..).zip(&is_free).filter(|(_, free)| **free) {
            shared.store8(entry(at), 0);
        }
        (self.free, self.shown) = (free, used);
        self.next = links.into();
        self.store_heads(free);
        shared.store64(USED, used_word(used, used));
        owed.sort_unstable_by_key(|(counter, chain)| Reverse((*counter, chain.first)));
        self.counter = owed.first().map_or(0, |(newest, _)| newest.wrapping_add(1));
        self.owed = owed.into_iter().map(|(_, chain)| chain).collect();
        Ok(Resumed { used, held })
    }

    /// Chains that an earlier process held and that were not taken again.
    pub(super) fn owed(&self) -> u16 {
        u16::try_from(self.owed.len()).unwrap_or(u16::MAX)
    }

    /// The descriptors of the oldest of them.
    pub(super) fn next_owed(&self) -> Option<Vec<Piece>> {
        let Owed { first, count, .. } = *self.owed.last()?;
        let mut at = first;
        let mut pieces = Vec::with_capacity(count.into());
        for _ in 0..count {
            pieces.push(self.piece(at));
            at = self.next.get(usize::from(at)).copied().unwrap_or(u16::MAX);
        }
        Some(pieces)
    }

    /// The oldest one is in flight again, under this id.
    pub(super) fn took_owed(&mut self, id: u16) {
        if let (Some(owed), Some(chain)) = (self.owed.pop(), self.chains.get_mut(usize::from(id))) {
            *chain = (owed.first, owed.last);
        }
    }

    /// The descriptors of the chain in flight under this id.
    pub(super) fn pieces(&self, id: u16) -> Vec<Piece> {
        let Some((first, last)) = self.chains.get(usize::from(id)) else { return Vec::new() };
        let mut at = *first;
        let mut pieces = vec![self.piece(at)];
        while at != *last && pieces.len() < self.chains.len() {
            at = self.next.get(usize::from(at)).copied().unwrap_or(u16::MAX);
            pieces.push(self.piece(at));
        }
        pieces
    }

    fn piece(&self, index: u16) -> Piece {
        let shared = &self.area.shared;
        let body = shared.load64(entry(index) + BODY).unwrap_or(0);
        let [id, flags, low, high] = halves(body);
        let addr = shared.load64(entry(index) + ADDR).unwrap_or(0);
        let len = u32::from(low) | u32::from(high) << 16;
        Piece { index, flags, body: PackedBody { addr, len, id } }
    }

    /// A chain of these descriptors is about to be seen by the device, under this id.
    ///
    /// # Errors
    /// There is no room for it: never, for a ring that is no larger than its area.
    pub(super) fn taken(&mut self, id: u16, pieces: &[Piece]) -> Result<(), RingError> {
        let shared = &self.area.shared;
        let first = self.free;
        let (mut at, mut last) = (first, first);
        for piece in pieces {
            let Some(next) = self.next.get(usize::from(at)) else {
                return Err(RingError::Inflight { field: "free head", value: at.into() });
            };
            let PackedBody { addr, len, id } = piece.body;
            shared.store64(entry(at) + ADDR, addr);
            let rest = u64::from(id) | u64::from(piece.flags) << 16 | u64::from(len) << 32;
            shared.store64(entry(at) + BODY, rest);
            (last, at) = (at, *next);
        }
        let count = u16::try_from(pieces.len()).unwrap_or(u16::MAX);
        let link = self.next.get(usize::from(first)).copied().unwrap_or(0);
        shared.store64(entry(first) + COUNTER, self.counter);
        shared.store64(entry(first), word([1, link, last, count]));
        self.counter = self.counter.wrapping_add(1);
        self.free = at;
        self.store_heads(at);
        if let Some(chain) = self.chains.get_mut(usize::from(id)) {
            *chain = (first, last);
        }
        Ok(())
    }

    /// The chain of this id was executed; its used descriptor is to be that at `at`.
    pub(super) fn completed(&mut self, id: u16, written: u32, (at, flags): (u16, u16)) {
        let first = self.chains.get(usize::from(id)).map_or(0, |chain| chain.0);
        self.batch.push(Done { first, at, id, written, flags });
    }

    /// The batch is about to be shown, up to `now`: everything but the flags of its first descriptor is written.
    pub(super) fn about_to_show(&mut self, ring: &PackedRing, now: Place) {
        if self.batch.is_empty() {
            return;
        }
        let old = self.free;
        for done in &self.batch {
            let (first, last) =
                self.chains.get(usize::from(done.id)).copied().unwrap_or((done.first, done.first));
            self.area.shared.store16(entry(last) + NEXT, self.free);
            if let Some(next) = self.next.get_mut(usize::from(last)) {
                *next = self.free;
            }
            self.free = first;
        }
        self.store_heads(old);
        self.area.shared.store64(USED, used_word(now, self.shown));
        // The ring is written after that, whatever a compiler likes better.
        fence(Ordering::SeqCst);
        for (number, Done { at, id, written, flags, .. }) in self.batch.iter().enumerate() {
            let flags = (number > 0).then_some(*flags);
            let _ = ring.put_used(*at, *id, *written, flags);
        }
    }

    /// The driver was shown the batch, up to `now`.
    pub(super) fn has_shown(&mut self, now: Place) {
        if self.batch.is_empty() {
            return;
        }
        for done in self.batch.drain(..) {
            self.area.shared.store8(entry(done.first), 0);
        }
        self.shown = now;
        self.store_heads(self.free);
        self.area.shared.store64(USED, used_word(now, now));
    }
}

/// A chain's entries are linked up to its last one and belong to no other.
fn check_chain(
    Owed { first, last, count }: Owed,
    size: u16,
    links: &[u16],
    taken: &mut [bool],
) -> Result<(), RingError> {
    if count == 0 || count > size {
        return Err(RingError::Inflight { field: "num", value: count.into() });
    }
    let mut at = first;
    for number in 1..=count {
        match taken.get_mut(usize::from(at)) {
            Some(taken) if !*taken => *taken = true,
            _ => return Err(RingError::Inflight { field: "next", value: at.into() }),
        }
        if (number == count) != (at == last) {
            return Err(RingError::Inflight { field: "last", value: last.into() });
        }
        at = links.get(usize::from(at)).copied().unwrap_or(u16::MAX);
    }
    Ok(())
}

/// Takes used descriptors back that a killed process had written behind a first one that it has not shown: the driver
/// would find them behind another one.
fn withdraw(ring: &PackedRing, old: Place, now: Place) {
    let mut at = old;
    at.advance(1, ring.count());
    while at != now {
        let _ = ring.set_flags(at.at, available(at), Ordering::Release);
        at.advance(1, ring.count());
    }
}
