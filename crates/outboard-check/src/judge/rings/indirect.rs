//! Indirect tables (virtio 1.3 §2.7.5.3; hostile cases B17 to B25).

use outboard_protocol::features::virtio::RING_INDIRECT_DESC;

use super::{broken, broken_with, start, survived};
use crate::judge::case::Case;
use crate::judge::disk::{BASE, DATA, Disk, HEADER, IN, MEMORY, STATUS, TABLES};
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::ring::{Desc, INDIRECT, NEXT, WRITE};

/// The usual three descriptors of a read, as a table at `at`.
fn good_table(disk: &Disk, at: u64) -> Outcome {
    let parts = [
        Desc::new(HEADER, 16, NEXT, 1),
        Desc::new(DATA, 512, NEXT | WRITE, 2),
        Desc::new(STATUS, 1, WRITE, 0),
    ];
    put(disk, at, &parts)
}

fn put(disk: &Disk, at: u64, parts: &[Desc]) -> Outcome {
    let mut place = at;
    for part in parts {
        disk.ring.write(place, &part.bytes())?;
        place += 16;
    }
    Ok(())
}

/// A read through a table at `at` must be served.
fn served_from(case: &mut Case<'_>, at: u64, flags: u16) -> Outcome {
    let mut disk = start(case, RING_INDIRECT_DESC)?;
    disk.header(IN, 0)?;
    good_table(&disk, at)?;
    disk.ring.set(0, Desc::new(at, 48, INDIRECT | flags, 0))?;
    disk.ring.offer(0)?;
    let lost = || Finding::hangs("a request through an indirect table never comes back");
    let done = disk.finish(0)?.ok_or_else(lost)?;
    ensure!(done.status == 0, "a request through an indirect table fails with {}", done.status);
    ensure!(done.len == 513, "its used length is {}, not 513", done.len);
    Ok(())
}

pub(crate) fn served(case: &mut Case<'_>) -> Outcome {
    served_from(case, TABLES, 0)
}

pub(crate) fn odd_address(case: &mut Case<'_>) -> Outcome {
    served_from(case, TABLES + 7, 0)
}

pub(crate) fn write_flag(case: &mut Case<'_>) -> Outcome {
    served_from(case, TABLES, WRITE)
}

pub(crate) fn after_a_direct_one(case: &mut Case<'_>) -> Outcome {
    survived(case, RING_INDIRECT_DESC, |disk| {
        let tail = [Desc::new(DATA, 512, NEXT | WRITE, 1), Desc::new(STATUS, 1, WRITE, 0)];
        put(disk, TABLES, &tail)?;
        disk.ring.set(0, Desc::new(HEADER, 16, NEXT, 1))?;
        disk.ring.set(1, Desc::new(TABLES, 32, INDIRECT, 0))?;
        disk.ring.offer(0)
    })
}

pub(crate) fn nested(case: &mut Case<'_>) -> Outcome {
    broken_with(case, RING_INDIRECT_DESC, |disk| {
        good_table(disk, TABLES + 0x1000)?;
        put(disk, TABLES, &[Desc::new(TABLES + 0x1000, 48, INDIRECT, 0)])?;
        disk.ring.set(0, Desc::new(TABLES, 16, INDIRECT, 0))?;
        disk.ring.offer(0)
    })
}

pub(crate) fn nested_in_itself(case: &mut Case<'_>) -> Outcome {
    broken_with(case, RING_INDIRECT_DESC, |disk| {
        put(disk, TABLES, &[Desc::new(TABLES, 16, INDIRECT, 0)])?;
        disk.ring.set(0, Desc::new(TABLES, 16, INDIRECT, 0))?;
        disk.ring.offer(0)
    })
}

pub(crate) fn with_next(case: &mut Case<'_>) -> Outcome {
    survived(case, RING_INDIRECT_DESC, |disk| {
        good_table(disk, TABLES)?;
        disk.ring.set(0, Desc::new(TABLES, 48, INDIRECT | NEXT, 1))?;
        disk.ring.set(1, Desc::new(STATUS, 1, WRITE, 0))?;
        disk.ring.offer(0)
    })
}

pub(crate) fn odd_length(case: &mut Case<'_>) -> Outcome {
    for len in [0, 1, 15, 17, 47] {
        broken_with(case, RING_INDIRECT_DESC, |disk| {
            good_table(disk, TABLES)?;
            disk.ring.set(0, Desc::new(TABLES, len, INDIRECT, 0))?;
            disk.ring.offer(0)
        })?;
    }
    Ok(())
}

pub(crate) fn endless(case: &mut Case<'_>) -> Outcome {
    for len in [u32::MAX - 15, 0x8000_0000, 0x0100_0000] {
        broken_with(case, RING_INDIRECT_DESC, |disk| {
            put(disk, TABLES, &[Desc::new(HEADER, 16, NEXT, 1), Desc::new(DATA, 1, NEXT, 0)])?;
            disk.ring.set(0, Desc::new(TABLES, len, INDIRECT, 0))?;
            disk.ring.offer(0)
        })?;
    }
    Ok(())
}

pub(crate) fn inner_loop(case: &mut Case<'_>) -> Outcome {
    broken_with(case, RING_INDIRECT_DESC, |disk| {
        put(disk, TABLES, &[Desc::new(HEADER, 16, NEXT, 1), Desc::new(DATA, 8, NEXT | WRITE, 1)])?;
        disk.ring.set(0, Desc::new(TABLES, 32, INDIRECT, 0))?;
        disk.ring.offer(0)
    })
}

pub(crate) fn inner_next_outside(case: &mut Case<'_>) -> Outcome {
    broken_with(case, RING_INDIRECT_DESC, |disk| {
        put(disk, TABLES, &[Desc::new(HEADER, 16, NEXT, 3), Desc::new(STATUS, 1, WRITE, 0)])?;
        disk.ring.set(0, Desc::new(TABLES, 32, INDIRECT, 0))?;
        disk.ring.offer(0)
    })
}

pub(crate) fn outside(case: &mut Case<'_>) -> Outcome {
    for at in [0, BASE + MEMORY - 16, BASE + MEMORY, u64::MAX - 15] {
        broken_with(case, RING_INDIRECT_DESC, |disk| {
            disk.ring.set(0, Desc::new(at, 48, INDIRECT, 0))?;
            disk.ring.offer(0)
        })?;
    }
    Ok(())
}

pub(crate) fn not_negotiated(case: &mut Case<'_>) -> Outcome {
    broken(case, |disk| {
        good_table(disk, TABLES)?;
        disk.ring.set(0, Desc::new(TABLES, 48, INDIRECT, 0))?;
        disk.ring.offer(0)
    })
}

pub(crate) fn longer_than_the_queue(case: &mut Case<'_>) -> Outcome {
    survived(case, RING_INDIRECT_DESC, |disk| {
        let mut parts = vec![Desc::new(HEADER, 16, NEXT, 1)];
        for at in 1..100 {
            parts.push(Desc::new(DATA + 512 * u64::from(at), 512, NEXT | WRITE, at + 1));
        }
        parts.push(Desc::new(STATUS, 1, WRITE, 0));
        put(disk, TABLES, &parts)?;
        disk.ring.set(0, Desc::new(TABLES, 101 * 16, INDIRECT, 0))?;
        disk.ring.offer(0)
    })
}
