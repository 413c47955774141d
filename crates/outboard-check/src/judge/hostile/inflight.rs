//! In-flight regions that no device leaves behind (hostile cases A76, A77): whatever one says, the process
//! lives and serves the next front-end.

use crate::judge::case::Case;
use crate::judge::conformance::optional::file;
use crate::judge::disk::Disk;
use crate::judge::finding::{Finding, Outcome};
use crate::judge::semantics::inflight::{Entry, Kept, session};

/// Entries of the ring.
const SIZE: u16 = 16;

/// A way to spoil a region: version, desc_num, last_batch_head, used_idx; heads with marks, next and counter.
struct Wrong {
    head: [u16; 4],
    entries: &'static [(u16, Entry)],
    odd_features: bool,
}

const fn head(version: u16, entries: u16, last: u16, used: u16) -> Wrong {
    Wrong { head: [version, entries, last, used], entries: &[], odd_features: false }
}

const fn marked(marked: u8, next: u16, counter: u64) -> Entry {
    Entry { marked, next, counter }
}

/// The used index of the ring is 0.
const ALL: &[Wrong] = &[
    head(2, SIZE, 0, 0),
    head(0xffff, 0xffff, 0xffff, 0xffff),
    head(1, 0, 0, 0),
    head(1, SIZE * 2, 0, 0),
    head(1, 0xffff, 0, 0),
    Wrong { odd_features: true, ..head(1, SIZE, 0, 0) },
    // One more used than the region knows, and the list begins outside.
    Wrong { entries: &[(0, marked(1, 0, 1))], ..head(1, SIZE, 0xffff, 0xffff) },
    Wrong { entries: &[(0, marked(1, 0xfff0, 1))], ..head(1, SIZE, 0, 0xfffd) },
    // A list that leads in a circle.
    Wrong { entries: &[(3, marked(1, 3, 1))], ..head(1, SIZE, 3, 0xfff8) },
    // More used than the ring has entries.
    Wrong { entries: &[(0, marked(1, 0, 1))], ..head(1, SIZE, 0, 100) },
    // Marks and counters that no device writes; heads that were never offered.
    Wrong {
        entries: &[
            (0, marked(0xff, 0xffff, u64::MAX)),
            (1, marked(0x80, 7, u64::MAX)),
            (15, marked(2, 15, 0)),
        ],
        ..head(1, SIZE, 15, 0)
    },
];

/// What the region says is out of range.
pub(crate) fn contents(case: &mut Case<'_>) -> Outcome {
    for wrong in ALL {
        let (mut session, capacity) = session(case)?;
        let kept = Kept::ask(&mut session, SIZE)?;
        let [version, entries, last, used] = wrong.head;
        kept.set_head(version, entries, last, used)?;
        for &(head, entry) in wrong.entries {
            kept.set_entry(head, entry)?;
        }
        if wrong.odd_features {
            kept.set_features()?;
        }
        let mut disk = Disk::prepare(session, capacity)?;
        play(case, &mut disk, &kept)?;
    }
    case.disk()?.serves("after in-flight regions that no device leaves behind")
}

/// Every head at once, of a ring in which nothing was offered.
pub(crate) fn all_marked(case: &mut Case<'_>) -> Outcome {
    let (mut session, capacity) = session(case)?;
    let kept = Kept::ask(&mut session, SIZE)?;
    kept.set_head(1, SIZE, 0, 0)?;
    for head in 0..SIZE {
        kept.set_entry(head, marked(1, head, u64::from(SIZE - head)))?;
    }
    let mut disk = Disk::prepare(session, capacity)?;
    // They lead nowhere, or to each other.
    for head in 0..SIZE {
        let to = (head + 1) % SIZE;
        disk.ring.set(head, crate::judge::ring::Desc::new(u64::MAX - 8, 0xffff, 1, to))?;
    }
    play(case, &mut disk, &kept)?;
    drop(disk);
    case.disk()?.serves("after an in-flight region in which all is marked")
}

/// The file of the region shrinks under a ring that runs.
pub(crate) fn cut(case: &mut Case<'_>) -> Outcome {
    let (session, capacity) = session(case)?;
    let kept = Kept::own(file(0x1000)?, SIZE);
    let mut disk = Disk::prepare(session, capacity)?;
    disk.session.done(&kept.message())?;
    disk.ring.run(&mut disk.session)?;
    disk.serves("with an in-flight region of the front-end's")?;
    rustix::fs::ftruncate(kept.file(), 0).map_err(|errno| Finding::own("cut a file", errno))?;
    for _ in 0..3 {
        // Served, or given up.
        if disk.read(0, 512).is_err() {
            break;
        }
    }
    drop(disk);
    case.lives()?;
    case.disk()?.serves("after an in-flight region that was cut short")
}

/// A ring with such a region: refused, broken or served.
fn play(case: &mut Case<'_>, disk: &mut Disk, kept: &Kept) -> Outcome {
    super::answered_or_closed(&mut disk.session, &kept.message(), "an odd in-flight region")?;
    if disk.ring.run(&mut disk.session).is_ok() {
        let first = disk.limit / 10;
        disk.ring.offer(0)?;
        disk.ring.next_used(first.min(case.quiet))?;
    }
    case.lives()?;
    case.rests("with an in-flight region that no device leaves behind")
}
