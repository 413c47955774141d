//! Guest memory added, removed and swapped under load (vhost-user, ADD_MEM_REG, REM_MEM_REG,
//! SET_MEM_TABLE).
//!
//! As a VMM plugs memory in and out: a new region is shared, the load's data moves there, the region
//! that it left is taken away. Regions come back at the same guest address with another file behind it.
//! ```text
//!  home 0: the device's own memory (rings, always there)
//!  home 1: file a at address A     home 2: file b at address A     home 3: file c at address B
//! ```
//! Invariant: no request has its data in memory that is taken away; bytes that reach the wrong file are
//! found by the load's checks, because every request's data is another.

use std::ffi::OsString;

use outboard_frontend::{SharedMemory, Sharing};

use super::report::{Part, number};
use super::subject::{Site, Way, homes, part};
use super::{Options, Progress, SoakError};

/// Guest addresses of the homes: far from the device's own memory.
const PLACES: [u64; 3] = [0x10_0000_0000, 0x10_0000_0000, 0x20_0000_0000];
/// Bytes of a home: room for the data of every request, and pages that are not used.
const SIZE: u64 = 1 << 20;

pub(super) fn parts(
    command: &[OsString],
    options: &Options,
    progress: &Progress<'_>,
) -> Result<Vec<Part>, SoakError> {
    let homes = homes(&PLACES, SIZE)?;
    let mut parts = Vec::new();
    for sharing in [Sharing::Slots, Sharing::Table] {
        let what = match sharing {
            Sharing::Slots => "memory added, used and removed",
            Sharing::Table => "memory tables swapped",
        };
        for mut way in [Way::asleep(32), Way::polling(32)] {
            way.wanted.sharing = sharing;
            let work = |site: &mut Site<'_>| swaps(site, &homes, sharing);
            parts.push(part(what, way, command, options, &homes, progress, work)?);
        }
    }
    Ok(parts)
}

fn swaps(site: &mut Site<'_>, homes: &[SharedMemory], sharing: Sharing) -> Result<(), SoakError> {
    let mut here = 0;
    let mut reused = 0u64;
    while site.more() {
        // Any home but this one; 0 is always shared.
        let next = (here + 1 + site.random.below(homes.len())) % (homes.len() + 1);
        let clash = here != 0 && next != 0 && place(here) == place(next);
        if clash {
            // The same address: the old one goes first, or with the table that has the new one.
            site.live.move_to(0)?;
            if sharing == Sharing::Slots {
                leave(site, homes, sharing, here)?;
            }
            reused += 1;
            here = 0;
        }
        let shared = [here, next];
        match sharing {
            Sharing::Slots if next != 0 => add(site, homes, next)?,
            Sharing::Table => table(site, homes, &shared)?,
            Sharing::Slots => {}
        }
        site.live.move_to(next)?;
        site.live.progress(8)?;
        if here != 0 {
            leave_for(site, homes, sharing, here, next)?;
        }
        here = next;
        site.done();
        site.live.progress(8)?;
    }
    site.live.move_to(0)?;
    if here != 0 {
        leave(site, homes, sharing, here)?;
    }
    site.part.figure("times at the address of the one before", number(reused), "");
    Ok(())
}

fn place(home: usize) -> Option<u64> {
    PLACES.get(home.checked_sub(1)?).copied()
}

/// Takes `home` away; the data is at home 0.
fn leave(
    site: &mut Site<'_>,
    homes: &[SharedMemory],
    sharing: Sharing,
    home: usize,
) -> Result<(), SoakError> {
    leave_for(site, homes, sharing, home, 0)
}

/// Takes `home` away; the data is at `next`.
fn leave_for(
    site: &mut Site<'_>,
    homes: &[SharedMemory],
    sharing: Sharing,
    home: usize,
    next: usize,
) -> Result<(), SoakError> {
    if sharing == Sharing::Table {
        return table(site, homes, &[next]);
    }
    let regions = home.checked_sub(1).and_then(|at| homes.get(at)).into_iter();
    for (spec, _) in regions.flat_map(SharedMemory::regions) {
        site.connection().remove_mem_region(spec)?;
    }
    Ok(())
}

fn add(site: &mut Site<'_>, homes: &[SharedMemory], home: usize) -> Result<(), SoakError> {
    let regions = home.checked_sub(1).and_then(|at| homes.get(at)).into_iter();
    for (spec, file) in regions.flat_map(SharedMemory::regions) {
        site.connection().add_mem_region(spec, file)?;
    }
    Ok(())
}

/// Shares the device's own memory and these homes, now the one first, now the others.
fn table(site: &mut Site<'_>, homes: &[SharedMemory], which: &[usize]) -> Result<(), SoakError> {
    let own = site.device.memory().clone();
    let mut all = vec![&own];
    let mut which = which.to_vec();
    which.dedup();
    all.extend(which.iter().filter_map(|home| homes.get(home.checked_sub(1)?)));
    if site.random.below(2) == 0 {
        all.reverse();
    }
    let regions = all.iter().flat_map(|memory| memory.regions());
    Ok(site.device.vmm().connection().set_mem_table(regions)?)
}
