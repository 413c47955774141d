//! The dirty log switched on, swapped and off under load (vhost-user, "Migration").
//!
//! ```text
//!  on ─▶ copy both ─▶ requests to A ─▶ then to B ─▶ swap, copy what was noted: A is copied
//!                                                     requests to B ─▶ (stop) ─▶ off, copy: B is copied
//! ```
//! The load reads, so that only the device writes where its data is: now in one region, now in another, so
//! that nothing writes again what was noted before. Each tenth time the ring is stopped at the end, as in a
//! migration. Invariant: a page that the device changed and did not note makes the copy differ, because
//! every request brings other bytes.

use std::ffi::OsString;

use outboard_frontend::{SharedMemory, Sharing};

use super::report::{Part, number};
use super::subject::{Site, Way, homes, part};
use super::{Options, Progress, SoakError};

/// Guest addresses of the regions that the data is read into: below all other memory, so that every log
/// covers them.
const PLACES: [u64; 2] = [0x1000_0000, 0x1800_0000];
const SIZE: usize = 1 << 20;
const PAGE: usize = 4096;

pub(super) fn parts(
    command: &[OsString],
    options: &Options,
    progress: &Progress<'_>,
) -> Result<Vec<Part>, SoakError> {
    let homes = homes(&PLACES, 1 << 20)?;
    let mut parts = Vec::new();
    for mut way in [Way::asleep(1), Way::asleep(32)] {
        way.wanted = way.wanted.with_log();
        // Memory that was added stays over a stop; a table would be sent again without it.
        way.wanted.sharing = Sharing::Slots;
        way.read_percent = 100;
        let work = |site: &mut Site<'_>| toggles(site, &homes);
        let what = "dirty log on, swapped, off";
        parts.push(part(what, way, command, options, &homes, progress, work)?);
    }
    Ok(parts)
}

/// What a migration has copied of one region.
struct Copy<'a> {
    from: &'a SharedMemory,
    at: u64,
    bytes: Vec<u8>,
    noted: u64,
}

impl Copy<'_> {
    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), SoakError> {
        self.from.view().read(at, to).map_err(outboard_frontend::Error::from)?;
        Ok(())
    }

    /// Everything.
    fn all(&mut self) -> Result<(), SoakError> {
        let mut bytes = std::mem::take(&mut self.bytes);
        self.read(self.at, &mut bytes)?;
        self.bytes = bytes;
        Ok(())
    }

    /// These pages, as far as they are here.
    fn pages(&mut self, pages: &[u64]) -> Result<(), SoakError> {
        for &page in pages {
            let at = page.checked_sub(self.at).and_then(|at| usize::try_from(at).ok());
            let Some(range) = at.map(|at| at..at + PAGE).filter(|range| range.end <= SIZE) else {
                continue;
            };
            let mut bytes = [0; PAGE];
            self.read(page, &mut bytes)?;
            if let Some(to) = self.bytes.get_mut(range) {
                to.copy_from_slice(&bytes);
            }
            self.noted += 1;
        }
        Ok(())
    }

    /// How many pages are not what the memory is.
    fn missed(&self) -> Result<u64, SoakError> {
        let mut now = vec![0; SIZE];
        self.read(self.at, &mut now)?;
        let pairs = now.chunks(PAGE).zip(self.bytes.chunks(PAGE));
        Ok(pairs.map(|(now, copy)| u64::from(now != copy)).sum())
    }
}

fn toggles(site: &mut Site<'_>, homes: &[SharedMemory]) -> Result<(), SoakError> {
    for (spec, file) in homes.iter().flat_map(SharedMemory::regions) {
        site.connection().add_mem_region(spec, file)?;
    }
    let copies = homes.iter().zip(PLACES);
    let mut copies: Vec<_> =
        copies.map(|(from, at)| Copy { from, at, bytes: vec![0; SIZE], noted: 0 }).collect();
    let [one, two] = copies.as_mut_slice() else {
        return Err(SoakError::Wrong("two regions are needed".to_owned()));
    };
    let (mut stops, mut missed, mut silent) = (0u64, 0u64, 0u64);
    site.live.move_to(1)?;
    while site.more() {
        let odd = site.part.count % 2 == 1;
        let (left, next, home) =
            if odd { (&mut *two, &mut *one, 1) } else { (&mut *one, &mut *two, 2) };
        let before = left.noted;
        site.device.vmm().start_log()?;
        left.all()?;
        next.all()?;
        site.live.progress(2)?;
        site.moment(50);
        site.live.move_to(home)?;
        let swapped = site.device.vmm().swap_log()?;
        left.pages(&swapped)?;
        next.pages(&swapped)?;
        // Nothing has its data there any more: what was not noted until now never will be.
        missed += left.missed()?;
        silent += u64::from(left.noted == before);
        site.live.progress(2)?;
        let stop = site.part.count % 10 == 9;
        if stop {
            site.device.sleep()?;
        }
        let rest = site.device.vmm().stop_log()?;
        next.pages(&rest)?;
        if stop {
            stops += 1;
            missed += next.missed()?;
            site.device.wake()?;
        }
        site.done();
        site.live.progress(1)?;
    }
    site.live.move_to(0)?;
    for (spec, _) in homes.iter().flat_map(SharedMemory::regions) {
        site.connection().remove_mem_region(spec)?;
    }
    site.part.bounded("pages missed", number(missed), "", 0.0);
    site.part.bounded("times that nothing was noted", number(silent), "", 0.0);
    site.part.figure("times with the ring stopped at the end", number(stops), "");
    site.part.figure("pages noted", number(one.noted + two.noted), "");
    Ok(())
}
