//! What is kept of packed rings beside them: the dirty log, the in-flight region (vhost-user, "Inflight I/O tracking",
//! "Packed virtqueues"), the IOTLB.
//!
//! ```text
//!  area of a ring: features 8 | version 2 | desc_num 2 | free_head 2 | old_free_head 2
//!                  | used_idx 2 | old_used_idx 2 | used_wrap_counter 1 | old_used_wrap_counter 1 | 10 | entry 32 ...
//!  entry:          inflight 1 | 1 | next 2 | last 2 | num 2 | counter 8 | id 2 | flags 2 | len 4 | addr 8
//! ```

use outboard_protocol::ProtocolFeatures as P;
use outboard_protocol::features::virtio;

use super::packed::{FRESH, Packed, READ, SIZE, bits};
use crate::judge::case::Case;
use crate::judge::disk::{DATA, HEADER, IN, STATUS};
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::ring::{NEXT, WRITE};
use crate::judge::semantics::inflight::Kept;
use crate::judge::semantics::log::{Pages, switch};

/// Bytes in front of the entries, and of an entry.
const HEAD: u64 = 32;
const ENTRY: u64 = 32;
const VERSION: u64 = 8;
const DESC_NUM: u64 = 10;
const USED_IDX: u64 = 16;
const WRAPS: u64 = 20;

/// Exactly the pages of the buffers are marked, all the way round the ring, and nothing without the feature.
pub(crate) fn log(case: &mut Case<'_>) -> Outcome {
    let mut ring = Packed::prepare(case, 0, P::LOG_SHMFD)?;
    ring.disk.session.needs(P::LOG_SHMFD, "LOG_SHMFD")?;
    ring.disk.session.needs_bit(virtio::LOG_ALL, "LOG_ALL")?;
    ring.run(FRESH)?;
    let pages = Pages::give(&mut ring.disk)?;
    switch(&mut ring.disk, true)?;
    let own = [ring.disk.ring.desc, ring.disk.ring.avail, ring.disk.ring.used];
    for round in 0..SIZE + 1 {
        pages.clear()?;
        ring.reads(round % SIZE, None, "while the log is on")?;
        let all = pages.all()?;
        let lost = [DATA, HEADER].into_iter().find(|page| !all.contains(page));
        ensure!(lost.is_none(), "page {lost:#x?} was written in round {round} and is not marked");
        let more = all.iter().find(|page| ![DATA, HEADER].contains(page) && !own.contains(page));
        ensure!(more.is_none(), "page {more:#x?} is marked, nothing was written");
    }
    switch(&mut ring.disk, false)?;
    pages.clear()?;
    ring.reads(0, None, "after the log was switched off")?;
    let late = pages.all()?;
    ensure!(late.is_empty(), "pages {late:#x?} are marked after the log was switched off");
    Ok(())
}

/// A ring that may have a region, and the region, as the back-end makes it.
fn with_region(case: &mut Case<'_>) -> Outcome<(Packed, Kept)> {
    let mut ring = Packed::prepare(case, 0, P::INFLIGHT_SHMFD)?;
    ring.disk.session.needs(P::INFLIGHT_SHMFD, "INFLIGHT_SHMFD")?;
    let kept = Kept::ask(&mut ring.disk.session, SIZE)?;
    Ok((ring, kept))
}

/// What the next process finds of a ring that was stopped: nothing in flight, and the place where it goes on.
pub(crate) fn inflight(case: &mut Case<'_>) -> Outcome {
    let (mut ring, kept) = with_region(case)?;
    ring.disk.session.done(&kept.message())?;
    ring.run(FRESH)?;
    for round in 0..SIZE + 2 {
        ring.reads(round % SIZE, None, "with an in-flight region")?;
    }
    ring.stop()?;
    let (version, entries) = (kept.word(VERSION)?, kept.word(DESC_NUM)?);
    ensure!(version == 1, "the in-flight region of a packed ring that ran has version {version}");
    ensure!(entries == SIZE, "desc_num is {entries} in the region of a packed ring of {SIZE}");
    for entry in 0..u64::from(SIZE) {
        let [marked] = kept.read(HEAD + ENTRY * entry)?;
        ensure!(marked == 0, "entry {entry} is marked as in flight, all came back");
    }
    let [wrap, old_wrap] = kept.read(WRAPS)?;
    let noted = kept.word(USED_IDX)? | u16::from(wrap & 1) << 15;
    let old = kept.word(USED_IDX + 2)? | u16::from(old_wrap & 1) << 15;
    let used = bits(ring.used);
    ensure!(noted == used, "used_idx of the region is {noted:#x}, the ring is at {used:#x}");
    ensure!(old == used, "old_used_idx of the region is {old:#x}, the ring is at {used:#x}");
    Ok(())
}

/// A request that another process had taken comes back, by its copy in the region, and the ring goes on.
pub(crate) fn resubmitted(case: &mut Case<'_>) -> Outcome {
    const ID: u16 = 4;
    let (mut ring, kept) = with_region(case)?;
    ring.disk.header(IN, 0)?;
    for (entry, (addr, len, flags)) in (0..).zip(READ) {
        let more = if entry < 2 { NEXT } else { 0 };
        let flags = flags | more | ring.available();
        let at = HEAD + ENTRY * u64::from(entry);
        let chain = if entry == 0 { [1, 1, 2, 3] } else { [0, entry + 1, 0, 0] };
        let words = chain.into_iter().chain([7, 0, 0, 0, ID, flags]);
        let head: Vec<u8> = words.flat_map(u16::to_le_bytes).collect();
        kept.write(at, &head)?;
        kept.write(at + 20, &len.to_le_bytes())?;
        kept.write(at + 24, &addr.to_le_bytes())?;
    }
    for entry in 3..SIZE {
        kept.write(HEAD + ENTRY * u64::from(entry) + 2, &(entry + 1).to_le_bytes())?;
    }
    let words = [1, SIZE, 3, 3, 0, 0, 0x0101];
    let head: Vec<u8> = words.into_iter().flat_map(u16::to_le_bytes).collect();
    kept.write(VERSION, &head)?;
    ring.disk.session.done(&kept.message())?;
    // The ring itself has nothing of it any more: it was taken.
    ring.at = (3, true);
    ring.run(u32::from(bits(ring.at)) | u32::from(bits(ring.used)) << 16)?;
    ring.disk.ring.kick()?;
    let none = || Finding::hangs("what another process had taken never comes back");
    let (id, len) = ring.next_used(3, ring.disk.limit)?.ok_or_else(none)?;
    ensure!(id == ID && len == 513, "id {id} is used with {len} bytes, {ID} was in flight");
    let status = ring.disk.status()?;
    ensure!(status == 0, "what another process had taken fails with {status}");
    ensure!(ring.next_used(3, case.quiet)?.is_none(), "it comes back twice");
    ring.reads(2, None, "behind what another process had taken")
}

/// Data of a packed ring behind an IOMMU go where the entry of the moment leads.
pub(crate) fn iotlb(case: &mut Case<'_>) -> Outcome {
    crate::judge::semantics::iommu::packed(case, |disk, io| {
        let mut ring = Packed { disk, at: (0, true), used: (0, true) };
        ring.disk.ring.size = SIZE;
        ring.run(FRESH)?;
        for round in 0..2 {
            ring.disk.header(IN, 0)?;
            let parts = [(HEADER + io, 16, 0), (DATA + io, 512, WRITE), (STATUS + io, 1, WRITE)];
            ring.offer(1, &parts)?;
            let none = || Finding::hangs(format!("nothing is used behind an IOMMU, round {round}"));
            let (id, len) = ring.next_used(3, ring.disk.limit)?.ok_or_else(none)?;
            ensure!(id == 1 && len == 513, "id {id} is used with {len} bytes behind an IOMMU");
            let status = ring.disk.status()?;
            ensure!(status == 0, "a read behind an IOMMU fails with {status}");
        }
        Ok(ring.disk)
    })
}
