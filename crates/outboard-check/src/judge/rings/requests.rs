//! Requests of block devices: what they must answer (virtio 1.3 §5.2.6; hostile cases B51 to B59).

use outboard_frontend::block::features as blk;
use outboard_protocol::ProtocolFeatures;

use super::start;
use crate::judge::case::Case;
use crate::judge::disk::{DATA, Disk, Done, FLUSH, GET_ID, HEADER, IN, OUT, STATUS};
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::ring::WRITE;

const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Performs a request that must come back.
fn perform(disk: &mut Disk, parts: &[(u64, u32, u16)], what: &str) -> Outcome<Done> {
    disk.perform(parts)?.ok_or_else(|| Finding::hangs(format!("{what} never comes back")))
}

/// A request of `kind` with one sector of writable data.
fn request(disk: &mut Disk, kind: u32, sector: u64, flags: u16, what: &str) -> Outcome<u8> {
    disk.header(kind, sector)?;
    let done = perform(disk, &[(HEADER, 16, 0), (DATA, 512, flags), (STATUS, 1, WRITE)], what)?;
    Ok(done.status)
}

pub(crate) fn unknown(case: &mut Case<'_>) -> Outcome {
    let mut disk = start(case, 0)?;
    for kind in [2, 3, 99, 0x8000_0000, u32::MAX] {
        let what = format!("a request of type {kind:#x}");
        let status = request(&mut disk, kind, 0, WRITE, &what)?;
        ensure!(status == UNSUPP, "{what} is answered with {status}, not UNSUPP");
    }
    disk.serves("after unknown requests")
}

pub(crate) fn past_the_end(case: &mut Case<'_>) -> Outcome {
    let mut disk = start(case, 0)?;
    let end = disk.capacity;
    for sector in [end, end + 1, 1 << 54, (1 << 55) - 1, u64::MAX / 512, u64::MAX] {
        let what = format!("a read at sector {sector:#x} of {end:#x}");
        let status = request(&mut disk, IN, sector, WRITE, &what)?;
        ensure!(status == IOERR, "{what} is answered with {status}, not IOERR");
    }
    Ok(())
}

pub(crate) fn across_the_end(case: &mut Case<'_>) -> Outcome {
    let mut disk = start(case, 0)?;
    let last = disk.capacity.saturating_sub(1);
    disk.header(IN, last)?;
    let parts = [(HEADER, 16, 0), (DATA, 1024, WRITE), (STATUS, 1, WRITE)];
    let done = perform(&mut disk, &parts, "a read across the end")?;
    ensure!(done.status == IOERR, "a read across the end is answered with {}", done.status);
    let status = request(&mut disk, IN, last, WRITE, "a read of the last sector")?;
    ensure!(status == 0, "a read of the last sector is answered with {status}");
    Ok(())
}

pub(crate) fn write_past_the_end(case: &mut Case<'_>) -> Outcome {
    let mut disk = start(case, 0)?;
    let end = disk.capacity;
    for sector in [end, end + 8, 1 << 54, u64::MAX] {
        let what = format!("a write at sector {sector:#x} of {end:#x}");
        let status = request(&mut disk, OUT, sector, 0, &what)?;
        ensure!(status == IOERR, "{what} is answered with {status}, not IOERR");
    }
    Ok(())
}

pub(crate) fn part_of_a_sector(case: &mut Case<'_>) -> Outcome {
    let mut disk = start(case, 0)?;
    for len in [1, 100, 511, 513] {
        disk.header(IN, 0)?;
        let parts = [(HEADER, 16, 0), (DATA, len, WRITE), (STATUS, 1, WRITE)];
        let done = perform(&mut disk, &parts, "a read of a part of a sector")?;
        ensure!(done.status == IOERR, "a read of {len} bytes is answered with {}", done.status);
    }
    Ok(())
}

pub(crate) fn written(case: &mut Case<'_>) -> Outcome {
    let mut disk = start(case, 0)?;
    disk.session.needs_bit(0, "")?;
    if disk.session.offered & blk::RO != 0 {
        return Err(Finding::not_offered("the device is read-only"));
    }
    let sector = disk.capacity.saturating_sub(Disk::sectors(4096));
    ensure!(disk.read(sector, 4096)?.status == 0, "the last sectors cannot be read");
    let old = disk.data(4096)?;
    let new: Vec<_> = old.iter().map(|byte| !byte).collect();
    disk.ring.write(DATA, &new)?;
    let done = disk.write(sector, 4096)?;
    disk.ring.write(DATA, &[0; 4096])?;
    let read = disk.read(sector, 4096)?;
    let got = disk.data(4096)?;
    // First of all everything as it was.
    disk.ring.write(DATA, &old)?;
    disk.write(sector, 4096)?;
    ensure!((done.status, read.status) == (0, 0), "a write fails with {}", done.status);
    ensure!(got == new, "what was written is not what is read");
    ensure!(done.len == 1, "a write was finished with length {}, not 1", done.len);
    Ok(())
}

pub(crate) fn read_only(case: &mut Case<'_>) -> Outcome {
    let mut disk = start(case, 0)?;
    disk.session.needs_bit(blk::RO, "a read-only device")?;
    let status = request(&mut disk, OUT, 0, 0, "a write to a read-only device")?;
    ensure!(status == IOERR, "a write to a read-only device is answered with {status}");
    Ok(())
}

pub(crate) fn flushed(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk_with(blk::FLUSH, ProtocolFeatures::empty())?;
    disk.session.needs_bit(blk::FLUSH, "FLUSH")?;
    for sector in [0, 77, u64::MAX] {
        disk.header(FLUSH, sector)?;
        let parts = [(HEADER, 16, 0), (STATUS, 1, WRITE)];
        let done = perform(&mut disk, &parts, "a flush")?;
        ensure!(done.status == 0, "a flush with sector {sector:#x} fails with {}", done.status);
    }
    Ok(())
}

pub(crate) fn get_id(case: &mut Case<'_>) -> Outcome {
    let mut disk = start(case, 0)?;
    for len in [20, 5, 64] {
        disk.header(GET_ID, 0)?;
        disk.ring.write(DATA, &[0xcc; 128])?;
        let parts = [(HEADER, 16, 0), (DATA, len, WRITE), (STATUS, 1, WRITE)];
        let done = perform(&mut disk, &parts, "a request for the device's id")?;
        let tail = disk.data(128)?.split_off(64);
        ensure!(tail.iter().all(|&byte| byte == 0xcc), "an id was written past its buffer");
        ensure!(done.len <= len + 1, "an id of {len} bytes has used length {}", done.len);
        ensure!(done.status != super::super::disk::UNSET, "a request for an id has no status");
        ensure!(len != 20 || done.status == 0, "a request for the id fails with {}", done.status);
    }
    Ok(())
}

/// DISCARD or WRITE_ZEROES with this body; its status.
fn ranged(disk: &mut Disk, kind: u32, body: &[u8], what: &str) -> Outcome<u8> {
    disk.ring.write(DATA, body)?;
    disk.header(kind, 0)?;
    let len = u32::try_from(body.len()).unwrap_or(0);
    let mut parts = vec![(HEADER, 16, 0)];
    if len > 0 {
        parts.push((DATA, len, 0));
    }
    parts.push((STATUS, 1, WRITE));
    Ok(perform(disk, &parts, what)?.status)
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// What no range command may accept.
fn bad_ranges(case: &mut Case<'_>, feature: u64, name: &str, kind: u32) -> Outcome {
    let mut disk = case.disk_with(feature, ProtocolFeatures::empty())?;
    disk.session.needs_bit(feature, name)?;
    let end = disk.capacity;
    for len in [0, 1, 15, 17] {
        let what = format!("{name} with {len} bytes of segments");
        let status = ranged(&mut disk, kind, &vec![0; len], &what)?;
        ensure!(status == IOERR || status == UNSUPP, "{what} is answered with {status}");
    }
    let ranges = [(end, 1), (end - 1, 2), (u64::MAX, 1), (u64::MAX - 7, u32::MAX), (0, u32::MAX)];
    for (sector, count) in ranges {
        let what = format!("{name} of {count:#x} sectors at {sector:#x}");
        let status = ranged(&mut disk, kind, &segment(sector, count, 0), &what)?;
        ensure!(status == IOERR || status == UNSUPP, "{what} is answered with {status}");
    }
    let what = format!("{name} with unknown flags");
    let status = ranged(&mut disk, kind, &segment(0, 0, 0x80), &what)?;
    ensure!(status == UNSUPP, "{what} is answered with {status}, not UNSUPP");
    disk.serves("after ranges that must be refused")
}

pub(crate) fn bad_discards(case: &mut Case<'_>) -> Outcome {
    bad_ranges(case, blk::DISCARD, "DISCARD", DISCARD)
}

pub(crate) fn bad_zeroes(case: &mut Case<'_>) -> Outcome {
    bad_ranges(case, blk::WRITE_ZEROES, "WRITE_ZEROES", WRITE_ZEROES)
}

pub(crate) fn discard_unmap(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk_with(blk::DISCARD, ProtocolFeatures::empty())?;
    disk.session.needs_bit(blk::DISCARD, "DISCARD")?;
    let what = "a discard with the unmap flag";
    let status = ranged(&mut disk, DISCARD, &segment(0, 0, 1), what)?;
    ensure!(status == UNSUPP, "{what} is answered with {status}, not UNSUPP");
    Ok(())
}
