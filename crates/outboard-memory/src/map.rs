//! The table of regions: immutable, with a generation, always behind an `Arc`.
//!
//! A change makes a new table that shares the regions that stay; whoever still uses the old one keeps the old regions
//! mapped. Regions overlap neither in guest-physical nor in front-end addresses. What a device behind an IOMMU may
//! reach ([`Iotlb`](crate::Iotlb)) is such a table too, of parts of regions at I/O addresses.
#![expect(
    unsafe_code,
    reason = "a table of raw pointers is Send and Sync because the regions are; one hint"
)]

use std::fmt;
use std::hint;
use std::sync::Arc;

use crate::error::LayoutError;
use crate::iotlb::Permission;
use crate::num::{index, wide};
use crate::region::{Region, RegionSpec};
use crate::sigbus;

/// Bits of the index of the table of slots.
const SLOT_BITS: u32 = 10;

/// The table of slots: as long as its index can say, so that no look-up asks for its length.
type Table = [Entry; 1 << SLOT_BITS];

/// A table in which no address is anywhere, made on the heap.
fn nowhere() -> Box<Table> {
    let slots = vec![Entry::NONE; 1 << SLOT_BITS];
    // A vector of that length always is one; never made on the stack, which may be a small one.
    Box::try_from(slots).unwrap_or_else(|_| Box::new([Entry::NONE; 1 << SLOT_BITS]))
}

/// Bytes of a slot, and how many bits of a place in the table are inside one.
const ENTRY: usize = size_of::<Entry>();
const ENTRY_BITS: u32 = ENTRY.trailing_zeros();
const _: () = assert!(ENTRY == 1 << ENTRY_BITS && ENTRY_BITS < LEAST_SHIFT);
/// Low bits of an address that never count for its slot.
const LEAST_SHIFT: u32 = 12;

/// What a look-up needs of one region. Its size is a power of two.
#[derive(Clone, Copy, Debug)]
#[repr(align(32))]
pub(crate) struct Entry {
    pub(crate) start: u64,
    pub(crate) size: u64,
    pub(crate) host: *mut u8,
    /// What the device may do with it. Only the careful way asks, and only an IOMMU says anything but "all".
    pub(crate) permission: Permission,
}

// SAFETY: a pointer into a shared mapping, which belongs to no thread; it is used only while the table, which holds
// the region, is alive.
unsafe impl Send for Entry {}
// SAFETY: likewise.
unsafe impl Sync for Entry {}

impl Entry {
    /// No region: holds no address.
    const NONE: Self =
        Self { start: 0, size: 0, host: std::ptr::null_mut(), permission: Permission::BOTH };

    /// The last address.
    fn last(&self) -> u64 {
        self.start + (self.size - 1)
    }

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

impl Entry {
    /// As [`translate`](Self::translate), for the buffer of a descriptor and with one question fewer. `None` also for
    /// what lies 2^63 bytes or more behind the start of a region. `len` has at most 32 bits.
    #[inline(always)]
    pub(crate) fn translate_buffer(&self, guest: u64, len: u64) -> Option<*mut u8> {
        debug_assert!(len >> 32 == 0, "a descriptor says no more");
        let offset = guest.wrapping_sub(self.start);
        // Below 2^63, so that the sum does not wrap. (Asked as a sign, which the subtraction leaves in a flag.)
        if offset.cast_signed() < 0 || offset.wrapping_add(len) > self.size {
            return None;
        }
        Some(self.host.wrapping_add(index(offset)))
    }
}

/// All regions of one guest at one moment.
pub struct GuestMemory {
    generation: u64,
    /// Sorted by guest address.
    regions: Vec<Arc<Region>>,
    /// The same, flat.
    entries: Box<[Entry]>,
    /// For each 2^`shift` bytes of guest-physical space the region that has most of them: one look finds the place of
    /// nearly every buffer, at the same cost for one region and for many.
    slots: Box<Table>,
    /// How far right a guest address is shifted for the place of its slot in the table, in bytes, among other bits.
    shift: u32,
    /// Sorted by user address: (user address, size, guest address).
    by_user: Box<[(u64, u64, u64)]>,
    /// Whether the addresses are those that a device behind an IOMMU uses.
    io: bool,
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
            .map(|r| {
                let permission = Permission::BOTH;
                Entry {
                    start: r.spec().guest_addr,
                    size: r.spec().size,
                    host: r.host(),
                    permission,
                }
            })
            .collect();
        let (slots, shift) = slots(&entries);
        Ok(Self {
            generation,
            regions,
            entries,
            slots,
            shift,
            by_user: by_user.into(),
            io: false,
            #[cfg(outboard_loom)]
            twin: crate::cells::twin::Store::default(),
        })
    }

    /// What a device behind an IOMMU reaches: these parts of the regions of `self`, sorted by I/O address. There are no
    /// slots, so that every request goes the careful way, which asks for permissions.
    pub(crate) fn behind_iommu(&self, generation: u64, entries: Box<[Entry]>) -> Self {
        Self {
            generation,
            regions: self.regions.clone(),
            entries,
            slots: nowhere(),
            shift: 0,
            by_user: Box::default(),
            io: true,
            #[cfg(outboard_loom)]
            twin: crate::cells::twin::Store::default(),
        }
    }

    /// Whether its addresses are those of a device behind an IOMMU.
    pub fn is_behind_iommu(&self) -> bool {
        self.io
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

    /// The address in this table of a range of front-end addresses, when the whole range lies in one region. Behind an
    /// IOMMU the front-end speaks of I/O addresses, as the guest does: they are returned as they are.
    pub fn user_to_guest(&self, addr: u64, len: u64) -> Option<u64> {
        if self.io {
            return addr.checked_add(len).map(|_| addr);
        }
        let after = self.by_user.partition_point(|&(user, _, _)| user <= addr);
        let &(user, size, guest) = self.by_user.get(after.checked_sub(1)?)?;
        let offset = addr - user;
        (offset < size && len <= size - offset).then(|| guest + offset)
    }

    /// The guest-physical address of a byte of this process that lies in one of the regions: what the dirty log knows a
    /// buffer by, however its address was translated.
    pub fn host_to_guest(&self, host: *const u8) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = wide(host.addr().wrapping_sub(region.host().addr()));
            (offset < region.spec().size).then(|| region.spec().guest_addr + offset)
        })
    }

    /// The region that holds a whole range of front-end addresses, and where in it the range begins.
    pub(crate) fn region_of_user(&self, addr: u64, len: u64) -> Option<(&Arc<Region>, u64)> {
        let guest = if self.io { None } else { self.user_to_guest(addr, len) }?;
        let (at, entry) = self.entry(guest)?;
        Some((self.regions.get(at)?, guest - entry.start))
    }

    /// Whether the file of some region was cut short and an access hit the hole. What was read there is zeros, what
    /// was written is lost; nothing that came of it may be told to the guest.
    pub fn poisoned(&self) -> bool {
        sigbus::any_poisoned() && self.regions.iter().any(|region| region.is_poisoned())
    }

    /// The region that holds `guest`, and its place in the order of guest addresses.
    pub(crate) fn entry(&self, guest: u64) -> Option<(usize, &Entry)> {
        let at = self.entries.partition_point(|entry| entry.start <= guest).checked_sub(1)?;
        let entry = self.entries.get(at)?;
        entry.rest(guest).map(|_| (at, entry))
    }

    /// A region by its place.
    pub(crate) fn entry_at(&self, at: usize) -> Option<&Entry> {
        self.entries.get(at)
    }

    /// The table of slots.
    #[inline(always)]
    pub(crate) fn slots(&self) -> Slots<'_> {
        Slots { slots: &self.slots, shift: self.shift }
    }
}

/// From the high bits of an address to the region it is most probably in.
#[derive(Clone, Copy)]
pub(crate) struct Slots<'a> {
    slots: &'a Table,
    shift: u32,
}

impl Slots<'_> {
    /// The region that most probably holds `guest`.
    #[inline(always)]
    pub(crate) fn find(&self, guest: u64) -> &Entry {
        // SAFETY: `slots` makes it at most 63. (Said here so that the shift is one instruction.)
        unsafe { hint::assert_unchecked(self.shift < u64::BITS) };
        // An address beyond the last region meets the slot of another one, whose region does not hold it. The shift leaves
        // the place in bytes, so that it needs no multiplication.
        let place = index(guest >> self.shift) & (size_of::<Table>() - ENTRY);
        // SAFETY: a multiple of the size of an entry, below that of the table.
        unsafe { &*self.slots.as_ptr().wrapping_byte_add(place) }
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

/// A table from the high bits of an address to the region it is most probably in, and how far right an address is
/// shifted for the place in it.
fn slots(entries: &[Entry]) -> (Box<Table>, u32) {
    let Some(last) = entries.last().map(Entry::last) else { return (nowhere(), 0) };
    let shift = (u64::BITS - last.leading_zeros()).saturating_sub(SLOT_BITS).max(LEAST_SHIFT);
    let mut slots = nowhere();
    for (slot, place) in (0..=last >> shift).zip(slots.iter_mut()) {
        let (start, end) = (slot << shift, (slot << shift) + ((1 << shift) - 1));
        let from = entries.partition_point(|entry| entry.last() < start);
        let here = entries.iter().skip(from).take_while(|entry| entry.start <= end);
        let share = |entry: &&Entry| entry.last().min(end) - entry.start.max(start);
        if let Some(most) = here.max_by_key(share) {
            *place = *most;
        }
    }
    (slots, shift - ENTRY_BITS)
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
