//! The table of regions: immutable, with a generation, always behind an `Arc`.
//!
//! A change makes a new table that shares the regions that stay; whoever still uses the old one keeps the old regions
//! mapped. Regions overlap neither in guest-physical nor in front-end addresses.
#![expect(unsafe_code, reason = "a table of raw pointers is Send and Sync because the regions are")]

use std::fmt;
use std::sync::Arc;

use crate::error::LayoutError;
use crate::num::index;
use crate::region::{Region, RegionSpec};
use crate::sigbus;

/// Bits of the index of the table of slots.
const SLOT_BITS: u32 = 10;

/// What a look-up needs of one region.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) start: u64,
    pub(crate) size: u64,
    pub(crate) host: *mut u8,
}

// SAFETY: a pointer into a shared mapping, which belongs to no thread; it is used only while the table, which holds
// the region, is alive.
unsafe impl Send for Entry {}
// SAFETY: likewise.
unsafe impl Sync for Entry {}

impl Entry {
    /// An entry that holds no address.
    pub(crate) const NONE: Self = Self { start: 0, size: 0, host: std::ptr::null_mut() };

    /// Bytes from `guest` to the end of the region, when it lies inside.
    #[inline(always)]
    pub(crate) fn rest(&self, guest: u64) -> Option<u64> {
        let offset = guest.wrapping_sub(self.start);
        if offset < self.size { Some(self.size - offset) } else { None }
    }

    /// Where the whole range lies in this process.
    #[inline(always)]
    pub(crate) fn translate(&self, guest: u64, len: u64) -> Option<*mut u8> {
        let offset = guest.wrapping_sub(self.start);
        if offset < self.size && len <= self.size - offset {
            Some(self.host.wrapping_add(index(offset)))
        } else {
            None
        }
    }
}

/// All regions of one guest at one moment.
pub struct GuestMemory {
    generation: u64,
    /// Sorted by guest address.
    regions: Vec<Arc<Region>>,
    /// The same, flat.
    entries: Box<[Entry]>,
    /// For each 2^`shift` bytes of guest-physical space the first region that ends behind their start.
    slots: Box<[u16]>,
    shift: u32,
    /// Sorted by user address: (user address, size, guest address).
    by_user: Box<[(u64, u64, u64)]>,
    #[cfg(outboard_loom)]
    pub(crate) twin: crate::cells::twin::Store,
}

impl GuestMemory {
    /// A table of these regions, in any order; none is legal.
    ///
    /// # Errors
    /// Two regions overlap, in guest or in user addresses.
    pub fn new(generation: u64, mut regions: Vec<Arc<Region>>) -> Result<Self, LayoutError> {
        regions.sort_by_key(|region| region.spec().guest_addr);
        check_overlap("guest", regions.iter().map(|r| (r.spec().guest_addr, r.spec().size)))?;
        let mut by_user: Vec<_> = regions
            .iter()
            .map(|r| (r.spec().user_addr, r.spec().size, r.spec().guest_addr))
            .collect();
        by_user.sort_unstable();
        check_overlap("user", by_user.iter().map(|&(user, size, _)| (user, size)))?;
        let entries: Box<[_]> = regions
            .iter()
            .map(|r| Entry { start: r.spec().guest_addr, size: r.spec().size, host: r.host() })
            .collect();
        let (slots, shift) = slots(&entries);
        Ok(Self {
            generation,
            regions,
            entries,
            slots,
            shift,
            by_user: by_user.into(),
            #[cfg(outboard_loom)]
            twin: crate::cells::twin::Store::default(),
        })
    }

    /// Which of the tables of this guest it is; grows with every change.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The regions, by guest address.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// The next generation, with one more region.
    ///
    /// # Errors
    /// It overlaps one that is there.
    pub fn with_region(&self, region: Region) -> Result<Self, LayoutError> {
        let mut regions = self.regions.clone();
        regions.push(Arc::new(region));
        Self::new(self.generation.wrapping_add(1), regions)
    }

    /// The next generation, without the region of this guest address, user address and size (the offset is ignored).
    ///
    /// # Errors
    /// There is none.
    pub fn without_region(&self, spec: &RegionSpec) -> Result<Self, LayoutError> {
        let &RegionSpec { guest_addr, user_addr, size, offset: _ } = spec;
        let same = |have: &RegionSpec| {
            (have.guest_addr, have.user_addr, have.size) == (guest_addr, user_addr, size)
        };
        let mut regions = self.regions.clone();
        regions.retain(|region| !same(region.spec()));
        if regions.len() == self.regions.len() {
            return Err(LayoutError::Unknown { guest_addr, user_addr, size });
        }
        Self::new(self.generation.wrapping_add(1), regions)
    }

    /// The guest-physical address of a range of front-end addresses, when the whole range lies in one region.
    pub fn user_to_guest(&self, addr: u64, len: u64) -> Option<u64> {
        let after = self.by_user.partition_point(|&(user, _, _)| user <= addr);
        let &(user, size, guest) = self.by_user.get(after.checked_sub(1)?)?;
        let offset = addr - user;
        (offset < size && len <= size - offset).then(|| guest + offset)
    }

    /// Whether the file of some region was cut short and an access hit the hole. What was read there is zeros, what
    /// was written is lost; nothing that came of it may be told to the guest.
    #[inline]
    pub fn poisoned(&self) -> bool {
        sigbus::any_poisoned() && self.regions.iter().any(|region| region.is_poisoned())
    }

    /// The region that holds `guest`; one without addresses when none does.
    pub(crate) fn entry(&self, guest: u64) -> Entry {
        if let Some(entry) = self.slot(guest)
            && entry.rest(guest).is_some()
        {
            return *entry;
        }
        let after = self.entries.partition_point(|entry| entry.start <= guest);
        let entry = after.checked_sub(1).and_then(|at| self.entries.get(at));
        entry.filter(|entry| entry.rest(guest).is_some()).copied().unwrap_or(Entry::NONE)
    }

    /// The only region that `guest` can be in, or the first of several.
    #[inline(always)]
    pub(crate) fn slot(&self, guest: u64) -> Option<&Entry> {
        let at = *self.slots.get(index(guest >> self.shift))?;
        self.entries.get(usize::from(at))
    }

    /// The first region, which a fresh view starts with.
    pub(crate) fn first(&self) -> Entry {
        self.entries.first().copied().unwrap_or(Entry::NONE)
    }
}

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestMemory")
            .field("generation", &self.generation)
            .field("regions", &self.regions)
            .finish()
    }
}

/// A table from the high bits of an address to the region it may be in, and how many low bits it leaves out.
fn slots(entries: &[Entry]) -> (Box<[u16]>, u32) {
    let last = entries.last().map_or(0, |entry| entry.start + (entry.size - 1));
    let shift = (u64::BITS - last.leading_zeros()).saturating_sub(SLOT_BITS).max(12);
    let mut at = 0;
    let slots = (0..=last >> shift).map(|slot| {
        let start = slot << shift;
        while entries
            .get(usize::from(at))
            .is_some_and(|entry| entry.start + (entry.size - 1) < start)
        {
            at += 1;
        }
        at
    });
    (slots.collect(), shift)
}

/// `ranges` sorted by start; their ends fit 64 bits.
fn check_overlap(
    space: &'static str,
    ranges: impl Iterator<Item = (u64, u64)>,
) -> Result<(), LayoutError> {
    let mut before: Option<(u64, u64)> = None;
    for (start, size) in ranges {
        if let Some((first, end)) = before
            && start < end
        {
            return Err(LayoutError::Overlap { space, first, second: start });
        }
        before = Some((start, start.saturating_add(size)));
    }
    Ok(())
}
