//! The memory layout as the front-end declared it, for the rules that need no memory: slots,
//! wraps, overlaps and matches (vhost-user, "Memory regions description", "ADD_MEM_REG").
//!
//! Invariant: the regions held never overlap, neither in guest nor in user space, and no range of
//! theirs wraps; their number is bounded by the slots offered or by a table's limit.

use crate::payload::{MAX_REGIONS, MemRegion};
use crate::violation::Violation;

/// Checks one region by itself: not empty, and no range wraps.
pub(crate) fn check_region(message: &'static str, region: &MemRegion) -> Result<(), Violation> {
    let size = region.size;
    if size == 0 {
        return Err(Violation::RegionEmpty { guest_addr: region.guest_addr });
    }
    check_range(message, "guest address", region.guest_addr, size)?;
    check_range(message, "user address", region.user_addr, size)?;
    check_range(message, "file offset", region.offset, size)
}

/// Checks that `start + size` does not wrap.
pub(crate) fn check_range(
    message: &'static str,
    what: &'static str,
    start: u64,
    size: u64,
) -> Result<(), Violation> {
    match start.checked_add(size) {
        Some(_) => Ok(()),
        None => Err(Violation::Wraps { message, what, start, size }),
    }
}

/// Checks a whole table: its size, each region, and that none overlap.
pub(crate) fn check_table(message: &'static str, regions: &[MemRegion]) -> Result<(), Violation> {
    if regions.len() > MAX_REGIONS {
        let (count, max) = (wide(regions.len()), wide(MAX_REGIONS));
        return Err(Violation::Regions { message, count, max });
    }
    let mut seen = regions;
    while let Some((last, before)) = seen.split_last() {
        check_region(message, last)?;
        check_overlap(before, last)?;
        seen = before;
    }
    Ok(())
}

/// Checks that `new` overlaps none of `regions`; all of them passed [`check_region`].
pub(crate) fn check_overlap(regions: &[MemRegion], new: &MemRegion) -> Result<(), Violation> {
    // Ends may not wrap by the time they are compared, but regions before `new` in a table may
    // not have been checked yet: saturate.
    let meet = |a: u64, a_size: u64, b: u64, b_size: u64| {
        a < b.saturating_add(b_size) && b < a.saturating_add(a_size)
    };
    for old in regions {
        if meet(old.guest_addr, old.size, new.guest_addr, new.size) {
            return Err(Violation::RegionOverlap { space: "guest", addr: new.guest_addr });
        }
        if meet(old.user_addr, old.size, new.user_addr, new.size) {
            return Err(Violation::RegionOverlap { space: "user", addr: new.user_addr });
        }
    }
    Ok(())
}

pub(crate) fn wide(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}
