//! The in-flight region of one split ring: which requests a device holds, in memory that outlives it (vhost-user,
//! "Inflight I/O tracking", "Split virtqueue").
//!
//! ```text
//!  take i:      desc[i].counter := next, desc[i].inflight := 1                ─▶ the device may execute it
//!  complete i:  desc[i].next := last_batch_head, last_batch_head := i         ─▶ used element
//!  publish:     used index ─▶ desc[i].inflight := 0 of the batch ─▶ used_idx := used index
//! ```
//! Killed between two stores, a request is either in flight (its flag is set, and it is not among the last
//! `used index - used_idx` entries of the list) or the driver has its answer. Invariant: what the region says is checked
//! against the size of the ring before it is used, and every walk is bounded by it.

use std::cmp::Reverse;

use crate::error::RingError;
use crate::inflight::InflightArea;

const FEATURES: usize = 0;
const VERSION: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
/// Bytes of the head of an area.
const HEAD: usize = 16;
/// Bytes of an entry, one for each descriptor.
const ENTRY: usize = 16;
/// Offsets in an entry.
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// The version that is carried out.
const ONE: u16 = 1;

/// Where the entry of a head begins.
fn entry(head: u16) -> usize {
    HEAD + ENTRY * usize::from(head)
}

/// What a ring keeps beside its area.
#[derive(Debug)]
pub(crate) struct Inflight {
    area: InflightArea,
    counter: u64,
    last_batch_head: u16,
    /// Completed and not published. Our own copy of the list: the region's is only written.
    batch: Vec<u16>,
    /// Requests that an earlier process held, the oldest one last.
    owed: Vec<u16>,
}

impl Inflight {
    /// Begins to use an area for a ring of `size` descriptors whose used index is `used`. A fresh area is prepared; else
    /// what the last batch left undone is done, and what was in flight is owed. Also returns whether it was fresh.
    ///
    /// # Errors
    /// No device leaves an area like this. Nothing was written.
    pub(crate) fn start(
        area: InflightArea,
        size: u16,
        used: u16,
    ) -> Result<(Self, bool), RingError> {
        let wrong = |field, value: u64| Err(RingError::Inflight { field, value });
        if area.packed {
            return wrong("region of packed rings, for a split one of", size.into());
        }
        if area.entries < size {
            return wrong("number of entries", area.entries.into());
        }
        let mut this = Self {
            area,
            counter: 0,
            last_batch_head: 0,
            batch: Vec::with_capacity(size.into()),
            owed: Vec::new(),
        };
        let shared = &this.area.shared;
        let fresh = match shared.load16(VERSION) {
            Some(0) => true,
            Some(ONE) => false,
            version => return wrong("version", version.unwrap_or(0).into()),
        };
        if fresh {
            this.prepare(size, used);
            return Ok((this, true));
        }
        match (shared.load64(FEATURES), shared.load16(DESC_NUM)) {
            (Some(0), Some(entries)) if entries == this.area.entries => {}
            (Some(0), entries) => return wrong("desc_num", entries.unwrap_or(0).into()),
            (features, _) => return wrong("features", features.unwrap_or(0)),
        }
        this.recover(size, used)?;
        Ok((this, false))
    }

    /// An area of zeros, or of whatever the peer left there: the version comes last.
    fn prepare(&self, size: u16, used: u16) {
        let shared = &self.area.shared;
        for head in 0..size {
            shared.store8(entry(head), 0);
        }
        shared.store64(FEATURES, 0);
        shared.store16(DESC_NUM, self.area.entries);
        shared.store16(LAST_BATCH_HEAD, 0);
        shared.store16(USED_IDX, used);
        shared.store16(VERSION, ONE);
    }

    fn recover(&mut self, size: u16, used: u16) -> Result<(), RingError> {
        let shared = &self.area.shared;
        let is_in_flight = |head| shared.load8(entry(head)).unwrap_or(0) != 0;
        let mut in_flight: Vec<bool> = (0..size).map(is_in_flight).collect();
        let head = shared.load16(LAST_BATCH_HEAD).unwrap_or(0);
        self.last_batch_head = if head < size { head } else { 0 };
        let done = used.wrapping_sub(shared.load16(USED_IDX).unwrap_or(used));
        // With nothing in flight no batch can be half done: this ring was set up anew.
        let done = if in_flight.contains(&true) { done } else { 0 };
        let batch = self.last_batch(head, done, size)?;
        for head in batch {
            shared.store8(entry(head), 0);
            if let Some(flag) = in_flight.get_mut(usize::from(head)) {
                *flag = false;
            }
        }
        shared.store16(USED_IDX, used);
        let mut owed: Vec<(u64, u16)> = (0..size)
            .zip(in_flight)
            .filter(|(_, in_flight)| *in_flight)
            .map(|(head, _)| {
                let counter = shared.load64(entry(head) + COUNTER);
                (counter.unwrap_or(0), head)
            })
            .collect();
        owed.sort_unstable_by_key(|entry| Reverse(*entry));
        self.counter = owed.first().map_or(0, |(newest, _)| newest.wrapping_add(1));
        self.owed = owed.into_iter().map(|(_, head)| head).collect();
        Ok(())
    }

    /// The first `count` entries of the list.
    fn last_batch(&self, first: u16, count: u16, size: u16) -> Result<Vec<u16>, RingError> {
        if count > size {
            return Err(RingError::Inflight { field: "used_idx", value: count.into() });
        }
        let mut batch = Vec::with_capacity(count.into());
        let mut seen = vec![false; size.into()];
        let mut head = first;
        for _ in 0..count {
            match seen.get_mut(usize::from(head)) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err(RingError::Inflight { field: "batch list", value: head.into() }),
            }
            batch.push(head);
            head = self.area.shared.load16(entry(head) + NEXT).unwrap_or(u16::MAX);
        }
        Ok(batch)
    }

    /// Requests that an earlier process held and that were not taken again.
    pub(crate) fn owed(&self) -> u16 {
        u16::try_from(self.owed.len()).unwrap_or(u16::MAX)
    }

    /// The oldest of them.
    pub(crate) fn next_owed(&mut self) -> Option<u16> {
        self.owed.pop()
    }

    /// It could not be taken now.
    pub(crate) fn put_back(&mut self, head: u16) {
        self.owed.push(head);
    }

    /// A request is about to be seen by the device.
    #[inline(always)]
    pub(crate) fn taken(&mut self, head: u16) {
        let entry = entry(head);
        self.area.shared.store64(entry + COUNTER, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.area.shared.store8(entry, 1);
    }

    /// A request was executed and is about to go into the used ring.
    #[inline(always)]
    pub(crate) fn completed(&mut self, head: u16) {
        self.area.shared.store16(entry(head) + NEXT, self.last_batch_head);
        self.area.shared.store16(LAST_BATCH_HEAD, head);
        self.last_batch_head = head;
        self.batch.push(head);
    }

    /// The used index covers what was completed.
    #[inline(always)]
    pub(crate) fn published(&mut self, used: u16) {
        for head in self.batch.drain(..) {
            self.area.shared.store8(entry(head), 0);
        }
        self.area.shared.store16(USED_IDX, used);
    }
}
