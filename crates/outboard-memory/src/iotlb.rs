//! The IOTLB: what a device behind an IOMMU may reach (vhost-user, "IOMMU support"; VIRTIO_F_ACCESS_PLATFORM).
//!
//! ```text
//!  IOTLB_MSG update ─▶ span: I/O address, size ─▶ part of a region, permission ┐
//!            invalidate ─▶ spans cut away                                      ├─▶ view(): a GuestMemory of I/O addresses
//!                                                                              ┘   (immutable, a generation like any other)
//! ```
//! Invariants: spans never overlap; there are at most [`IOTLB_ENTRIES`], whatever the front-end sends: the oldest go
//! when there are more. A change that takes something away says so: whoever uses the generation before it must be done
//! with it before the change is acknowledged. What a request was given at its pop is a part of every later generation
//! until then, so that an invalidation of what is not in the table has nothing to wait for.
//!
//! Neighbours that lie next to each other in the same region with the same permission become one span: a guest that
//! maps page by page what is contiguous below costs one entry, and rings longer than a page are found whole.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::error::IotlbError;
use crate::map::{Entry, GuestMemory};
use crate::num::index;
use crate::region::Region;

/// The most entries that are kept.
pub const IOTLB_ENTRIES: usize = 4096;
/// How many of the oldest go at once when there are more: one wait for requests in flight pays for many misses.
const EVICTED: usize = IOTLB_ENTRIES / 8;

/// What a device may do with memory: read, write or both.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Permission(u8);

impl Permission {
    /// To read.
    pub const READ: Self = Self(1);
    /// To write.
    pub const WRITE: Self = Self(2);
    /// To read and to write.
    pub const BOTH: Self = Self(3);

    /// From the bits of the wire: 1 to read, 2 to write.
    #[must_use]
    pub const fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            1..=3 => Some(Self(bits)),
            _ => None,
        }
    }

    /// As the bits of the wire.
    #[must_use]
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// Whether it permits all of `access`.
    #[must_use]
    #[inline(always)]
    pub const fn allows(self, access: Self) -> bool {
        self.0 & access.0 == access.0
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            1 => "read",
            2 => "write",
            _ => "read and write",
        })
    }
}

impl fmt::Debug for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "to {self}")
    }
}

/// A part of a region; its I/O address is its key.
#[derive(Clone, Debug)]
struct Span {
    size: u64,
    region: Arc<Region>,
    /// In the region.
    offset: u64,
    permission: Permission,
    age: u64,
}

impl Span {
    /// Whether both lie in the same region, `distance` bytes apart.
    fn follows(&self, before: &Self, distance: u64) -> bool {
        Arc::ptr_eq(&self.region, &before.region)
            && before.offset.checked_add(distance) == Some(self.offset)
    }

    /// The part from `by` on.
    fn after(&self, by: u64) -> Self {
        Self { size: self.size - by, offset: self.offset + by, ..self.clone() }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Iotlb {
    spans: BTreeMap<u64, Span>,
    clock: u64,
}

impl Iotlb {
    /// Without entries.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Entries that are kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Puts an entry in: `size` bytes at `iova` lie at front-end address `user` of `memory`. It replaces what overlaps
    /// it. True: something that was there is not there any more, so what is in flight has to be finished before the
    /// change is acknowledged.
    ///
    /// # Errors
    /// The range is none, or leads out of guest memory; nothing has changed.
    pub fn update(
        &mut self,
        memory: &GuestMemory,
        iova: u64,
        size: u64,
        user: u64,
        permission: Permission,
    ) -> Result<bool, IotlbError> {
        if size == 0 || iova.checked_add(size).is_none() {
            return Err(IotlbError::Range { iova, size });
        }
        let outside = IotlbError::Outside { user, size };
        let (region, offset) = memory.region_of_user(user, size).ok_or(outside)?;
        self.clock += 1;
        let span = Span { size, region: Arc::clone(region), offset, permission, age: self.clock };
        let mut drain = false;
        self.cut(iova, size, |at, old| {
            let same = if at >= iova {
                old.follows(&span, at - iova)
            } else {
                span.follows(old, iova - at)
            };
            drain |= !same || !permission.allows(old.permission);
        });
        self.insert(iova, span);
        Ok(self.evict() | drain)
    }

    /// Takes every entry of a range away; those that reach out of it are cut. True: there was one.
    pub fn invalidate(&mut self, iova: u64, size: u64) -> bool {
        let mut any = false;
        self.cut(iova, size, |_, _| any = true);
        // What is left of an entry that was cut in the middle are two.
        self.evict();
        any
    }

    /// Takes everything away. True: there was something.
    pub fn clear(&mut self) -> bool {
        let any = !self.is_empty();
        self.spans.clear();
        any
    }

    /// The table as guest memory of I/O addresses. `memory` is the one of the updates, or a later one that has all of
    /// its regions.
    #[must_use]
    pub fn view(&self, generation: u64, memory: &GuestMemory) -> GuestMemory {
        let entries = self.spans.iter().map(|(&start, span)| Entry {
            start,
            size: span.size,
            host: span.region.host().wrapping_add(index(span.offset)),
            permission: span.permission,
        });
        memory.behind_iommu(generation, entries.collect())
    }

    /// Cuts a range out of the table; `lost` hears of every entry that it met, as it was.
    fn cut(&mut self, iova: u64, size: u64, mut lost: impl FnMut(u64, &Span)) {
        let end = iova.saturating_add(size);
        let before = self.spans.range(..iova).next_back();
        let from = before.filter(|(at, span)| *at + span.size > iova).map_or(iova, |(at, _)| *at);
        let met: Vec<u64> = self.spans.range(from..end).map(|(at, _)| *at).collect();
        for at in met {
            let Some(span) = self.spans.remove(&at) else { continue };
            lost(at, &span);
            let last = at + span.size;
            if last > end {
                self.spans.insert(end, span.after(end - at));
            }
            if at < iova {
                self.spans.insert(at, Span { size: iova - at, ..span });
            }
        }
    }

    /// Puts a span where nothing is, as one with neighbours that it goes on.
    fn insert(&mut self, iova: u64, span: Span) {
        let (mut iova, mut span) = (iova, span);
        let joins = |low: &Span, high: &Span| {
            high.follows(low, low.size) && low.permission == high.permission
        };
        let end = iova + span.size;
        if let Some(after) = self.spans.get(&end)
            && joins(&span, after)
        {
            span.size += after.size;
            self.spans.remove(&end);
        }
        if let Some((&at, before)) = self.spans.range(..iova).next_back()
            && at + before.size == iova
            && joins(before, &span)
        {
            span = Span { size: before.size + span.size, age: span.age, ..before.clone() };
            iova = at;
        }
        self.spans.insert(iova, span);
    }

    /// Lets the oldest go when there are too many.
    fn evict(&mut self) -> bool {
        if self.spans.len() <= IOTLB_ENTRIES {
            return false;
        }
        let mut ages: Vec<(u64, u64)> =
            self.spans.iter().map(|(at, span)| (span.age, *at)).collect();
        ages.sort_unstable();
        for (_, at) in ages.into_iter().take(EVICTED) {
            self.spans.remove(&at);
        }
        true
    }
}

#[cfg(test)]
mod tests;
