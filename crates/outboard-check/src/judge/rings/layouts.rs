//! Requests cut into descriptors in every way: a device must not assume a layout (virtio 1.3 §2.7.4;
//! hostile cases B47 to B50).

use super::{start, survived};
use crate::judge::case::Case;
use crate::judge::disk::{DATA, Disk, Done, HEADER, IN, STATUS, UNSET};
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::ring::WRITE;

/// Performs a read of one sector, laid out like this, and compares it with the usual layout.
fn laid_out(disk: &mut Disk, parts: &[(u64, u32, u16)], what: &str) -> Outcome<Done> {
    disk.serves("in the usual layout")?;
    let expected = disk.data(512)?;
    disk.ring.write(DATA, &[0xa5; 1024])?;
    disk.header(IN, 0)?;
    let done = disk.perform(parts)?;
    let done = done.ok_or_else(|| Finding::hangs(format!("{what} never comes back")))?;
    ensure!(done.len == 513, "{what}: used length {}, not 513", done.len);
    ensure!(disk.data(512)? == expected, "{what}: other bytes than in the usual layout");
    Ok(done)
}

pub(crate) fn header_split(case: &mut Case<'_>) -> Outcome {
    let mut disk = start(case, 0)?;
    for at in 1..16 {
        let cut = u64::from(at);
        let parts =
            [(HEADER, at, 0), (HEADER + cut, 16 - at, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)];
        let what = format!("a header cut after {at} bytes");
        let done = laid_out(&mut disk, &parts, &what)?;
        ensure!(done.status == 0, "{what}: status {}", done.status);
    }
    Ok(())
}

pub(crate) fn header_in_crumbs(case: &mut Case<'_>) -> Outcome {
    let mut disk = start(case, 0)?;
    let mut parts: Vec<_> = (0..12).map(|at| (HEADER + at, 1, 0)).collect();
    parts.extend([(HEADER + 12, 4, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    let done = laid_out(&mut disk, &parts, "a header in 13 pieces")?;
    ensure!(done.status == 0, "a header in 13 pieces: status {}", done.status);
    Ok(())
}

pub(crate) fn status_with_data(case: &mut Case<'_>) -> Outcome {
    let mut disk = start(case, 0)?;
    let parts = [(HEADER, 16, 0), (DATA, 513, WRITE)];
    laid_out(&mut disk, &parts, "a status behind the data in one descriptor")?;
    let status = disk.data(513)?.last().copied().unwrap_or(UNSET);
    ensure!(status == 0, "a status behind the data in one descriptor is {status}");
    Ok(())
}

pub(crate) fn data_split(case: &mut Case<'_>) -> Outcome {
    let mut disk = start(case, 0)?;
    for cuts in [&[1, 511][..], &[511, 1], &[100, 200, 212], &[1, 1, 1, 509]] {
        let mut parts = vec![(HEADER, 16, 0)];
        let mut at = DATA;
        for &len in cuts {
            parts.push((at, len, WRITE));
            at += u64::from(len);
        }
        parts.push((STATUS, 1, WRITE));
        let what = format!("data cut into {cuts:?}");
        let done = laid_out(&mut disk, &parts, &what)?;
        ensure!(done.status == 0, "{what}: status {}", done.status);
    }
    Ok(())
}

pub(crate) fn data_unaligned(case: &mut Case<'_>) -> Outcome {
    let mut disk = start(case, 0)?;
    disk.serves("into an aligned buffer")?;
    let expected = disk.data(512)?;
    for shift in [1, 3, 511] {
        disk.header(IN, 0)?;
        let parts = [(HEADER, 16, 0), (DATA + shift, 512, WRITE), (STATUS, 1, WRITE)];
        let lost = || Finding::hangs("a read into an unaligned buffer never comes back");
        let done = disk.perform(&parts)?.ok_or_else(lost)?;
        ensure!(done.status == 0, "a read into a buffer at +{shift} fails with {}", done.status);
        let mut got = [0; 512];
        disk.ring.read(DATA + shift, &mut got)?;
        ensure!(got == *expected, "a read into a buffer at +{shift} brings other bytes");
    }
    Ok(())
}

pub(crate) fn no_status(case: &mut Case<'_>) -> Outcome {
    let shapes: [&[(u64, u32, u16)]; 4] = [
        &[(HEADER, 16, 0)],
        &[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, 0)],
        &[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 0, WRITE)],
        &[(STATUS, 1, WRITE)],
    ];
    for parts in shapes {
        survived(case, 0, |disk| {
            disk.ring.chain(0, parts)?;
            disk.ring.offer(0)
        })?;
    }
    Ok(())
}

pub(crate) fn short_header(case: &mut Case<'_>) -> Outcome {
    for len in [0, 1, 8, 15] {
        survived(case, 0, |disk| {
            disk.ring.chain(0, &[(HEADER, len, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)])?;
            disk.ring.offer(0)?;
            disk.ring.next_used(case_wait())?;
            ensure!(disk.status()? != 0, "a header of {len} bytes was taken for a whole one");
            Ok(())
        })?;
    }
    Ok(())
}

/// How long a request that may never come back is waited for.
const fn case_wait() -> std::time::Duration {
    std::time::Duration::from_millis(20)
}
