//! The dirty log (vhost-user, "Migration", SET_LOG_BASE): which pages are in it, in which log, and when.
//!
//! Invariant: the pages that the judge looks at are written by the back-end alone, in one request at a time.

use std::os::fd::OwnedFd;

use outboard_protocol::FrontendCode as Code;
use outboard_protocol::features::{ProtocolFeatures as P, virtio};
use outboard_protocol::payload::{Log, VringAddr};
use zerocopy::IntoBytes as _;

use crate::judge::case::Case;
use crate::judge::conformance::optional::file;
use crate::judge::disk::{BASE, DATA, Disk, HEADER, IN, MEMORY, STATUS, TABLES};
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::message::{self, Msg};
use crate::judge::ring::{Desc, INDIRECT, NEXT, WRITE};
use crate::judge::session::{PLAIN, USUAL};

/// A page that nothing is read into.
const FREE: u64 = BASE + 0xf0000;
/// Bytes of a log of all shared memory.
const SIZE: u64 = (BASE + MEMORY) / 4096 / 8;

/// A log, and what stands in it.
pub(crate) struct Pages(OwnedFd);

impl Pages {
    /// Gives the back-end a fresh log.
    pub(crate) fn give(disk: &mut Disk) -> Outcome<Self> {
        let log = file(SIZE)?;
        let body = Log { mmap_size: SIZE, mmap_offset: 0 };
        disk.session.ask(&Msg::new(Code::SetLogBase.id(), body.as_bytes().to_vec()).fd(&log))?;
        Ok(Self(log))
    }

    /// The guest addresses of the pages that are marked.
    pub(crate) fn all(&self) -> Outcome<Vec<u64>> {
        let mut bytes = vec![0; usize::try_from(SIZE).unwrap_or(0)];
        rustix::io::pread(&self.0, &mut bytes, 0)
            .map_err(|errno| Finding::own("read the dirty log", errno))?;
        let bits = (0u64..).zip(&bytes).filter(|(_, byte)| **byte != 0);
        let pages = bits.flat_map(|(at, &byte)| {
            (0..8).filter(move |bit| byte >> bit & 1 == 1).map(move |bit| (at * 8 + bit) * 4096)
        });
        Ok(pages.collect())
    }

    pub(crate) fn clear(&self) -> Outcome {
        let zeros = vec![0; usize::try_from(SIZE).unwrap_or(0)];
        rustix::io::pwrite(&self.0, &zeros, 0)
            .map(|_| ())
            .map_err(|errno| Finding::own("clear the dirty log", errno))
    }
}

/// Switches LOG_ALL.
pub(crate) fn switch(disk: &mut Disk, on: bool) -> Outcome {
    let all = if on { virtio::LOG_ALL } else { 0 };
    disk.session.done(&message::set_features(disk.session.features | all))
}

/// A disk that logs, its used ring at this address in the log where it is given.
fn logging(case: &mut Case<'_>, features: u64, used: Option<u64>) -> Outcome<(Disk, Pages)> {
    let capacity = case.capacity()?;
    let session = case.session_with(PLAIN | features, USUAL | P::LOG_SHMFD)?;
    session.needs(P::LOG_SHMFD, "LOG_SHMFD")?;
    session.needs_bit(virtio::LOG_ALL, "LOG_ALL")?;
    let mut disk = Disk::start(session, capacity)?;
    let pages = Pages::give(&mut disk)?;
    switch(&mut disk, true)?;
    // An address even where it has no meaning: some note the used ring whatever the flag says, which
    // does no harm.
    let (flags, log_guest_addr) = used.map_or((0, disk.ring.used), |used| (1, used));
    let addr = VringAddr { flags, log_guest_addr, ..disk.ring.addr() };
    disk.session.done(&message::vring_addr(&addr))?;
    Ok((disk, pages))
}

/// That exactly these pages are marked; the ring's own page may be.
fn marked(disk: &Disk, pages: &Pages, wanted: &[u64], what: &str) -> Outcome {
    let all = pages.all()?;
    let lost = wanted.iter().find(|page| !all.contains(page));
    ensure!(lost.is_none(), "page {:#x} was written and is not marked {what}", lost.unwrap_or(&0));
    let more = all.iter().find(|page| !wanted.contains(page) && **page != disk.ring.used);
    ensure!(more.is_none(), "page {:#x} is marked, nothing was written {what}", more.unwrap_or(&0));
    Ok(())
}

/// A read into these parts.
fn read_into(disk: &mut Disk, parts: &[(u64, u32)], when: &str) -> Outcome {
    disk.header(IN, 0)?;
    let mut chain = vec![(HEADER, 16, 0)];
    chain.extend(parts.iter().map(|&(at, len)| (at, len, WRITE)));
    chain.push((STATUS, 1, WRITE));
    let done = disk.perform(&chain)?;
    let done = done.ok_or_else(|| Finding::hangs(format!("a read {when} never comes back")))?;
    ensure!(done.status == 0, "a read {when} fails with {}", done.status);
    Ok(())
}

/// Buffers that begin and end in the middle of a page, and those in a table.
pub(crate) fn every_page(case: &mut Case<'_>) -> Outcome {
    let (mut disk, pages) = logging(case, 0, None)?;
    let far = DATA + 0x8000;
    // From the last byte of one page over three whole ones into the next, then elsewhere.
    read_into(&mut disk, &[(DATA + 0xfff, 0x3200), (far + 0x10, 0x400)], "of many pages")?;
    let many = [0, 0x1000, 0x2000, 0x3000, 0x4000].map(|at| DATA + at);
    let wanted = [many.as_slice(), &[far, HEADER]].concat();
    marked(&disk, &pages, &wanted, "after a read of many pages")
}

/// Buffers of an indirect table.
pub(crate) fn indirect(case: &mut Case<'_>) -> Outcome {
    let (mut disk, pages) = logging(case, virtio::RING_INDIRECT_DESC, None)?;
    disk.session.needs_bit(virtio::RING_INDIRECT_DESC, "INDIRECT_DESC")?;
    disk.header(IN, 0)?;
    let table = [
        Desc::new(HEADER, 16, NEXT, 1),
        Desc::new(DATA + 0x2000, 4096, NEXT | WRITE, 2),
        Desc::new(STATUS, 1, WRITE, 0),
    ];
    for (at, desc) in (0u64..).zip(table) {
        disk.ring.write(TABLES + 16 * at, &desc.bytes())?;
    }
    let done = disk.perform(&[(TABLES, 48, INDIRECT)])?;
    let done = done.ok_or_else(|| Finding::hangs("a read of a table never comes back"))?;
    ensure!(done.status == 0, "a read of a table fails with {}", done.status);
    marked(&disk, &pages, &[DATA + 0x2000, HEADER], "after a read of an indirect table")
}

/// Another log, while the ring runs.
pub(crate) fn swapped(case: &mut Case<'_>) -> Outcome {
    let (mut disk, old) = logging(case, 0, None)?;
    read_into(&mut disk, &[(DATA, 512)], "before the log was replaced")?;
    let new = Pages::give(&mut disk)?;
    old.clear()?;
    read_into(&mut disk, &[(DATA + 0x1000, 512)], "after the log was replaced")?;
    marked(&disk, &new, &[DATA + 0x1000, HEADER], "in a log that replaced another")?;
    let late = old.all()?;
    ensure!(late.is_empty(), "pages {late:#x?} are marked in a log that was replaced");
    Ok(())
}

/// Without LOG_ALL nothing is marked any more; with it again, all is.
pub(crate) fn switched_off(case: &mut Case<'_>) -> Outcome {
    let (mut disk, pages) = logging(case, 0, None)?;
    read_into(&mut disk, &[(DATA, 512)], "while the log is on")?;
    switch(&mut disk, false)?;
    pages.clear()?;
    read_into(&mut disk, &[(DATA, 512)], "after the log was switched off")?;
    let late = pages.all()?;
    ensure!(late.is_empty(), "pages {late:#x?} are marked after the log was switched off");
    switch(&mut disk, true)?;
    read_into(&mut disk, &[(DATA, 512)], "after the log was switched on again")?;
    marked(&disk, &pages, &[DATA, HEADER], "after the log was switched on again")
}

/// The used ring is noted where the front-end wants it, and only where it wants it noted.
pub(crate) fn used_ring(case: &mut Case<'_>) -> Outcome {
    let (mut disk, pages) = logging(case, 0, Some(FREE))?;
    read_into(&mut disk, &[(DATA, 512)], "while the used ring is logged elsewhere")?;
    let all = pages.all()?;
    ensure!(all.contains(&FREE), "the used ring is not marked at its log address");
    ensure!(
        !all.contains(&disk.ring.used),
        "the used ring is marked at its own address, its log address is another"
    );
    Ok(())
}
