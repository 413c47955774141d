//! The in-flight region of a split ring (vhost-user, "Inflight I/O tracking"): what it says while a ring
//! runs and when it has stopped, and what a process does with one that another left behind.
//!
//! ```text
//!  area of a ring: features 8 | version 2 | desc_num 2 | last_batch_head 2 | used_idx 2 | entry 16 ...
//!  entry:          inflight 1 | 5 | next 2 | counter 8
//! ```
//! Invariant: a request is told from another by its head alone, so that requests that are answered twice,
//! or not at all, are seen whatever they do.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use outboard_protocol::FrontendCode as Code;
use outboard_protocol::features::ProtocolFeatures as P;
use outboard_protocol::payload::Inflight;
use zerocopy::IntoBytes as _;

use crate::judge::case::Case;
use crate::judge::conformance::optional::inflight;
use crate::judge::disk::{BASE, DATA, Disk, GET_ID, HEADER, IN, STATUS};
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::message::Msg;
use crate::judge::ring::{Ring, WRITE};
use crate::judge::session::{PLAIN, Session, USUAL};

const VERSION: u64 = 8;
const DESC_NUM: u64 = 10;
const LAST_BATCH_HEAD: u64 = 12;
const USED_IDX: u64 = 14;
const HEAD: u64 = 16;

/// A region, kept by the judge as a front-end keeps it.
pub(crate) struct Kept {
    file: OwnedFd,
    area: Inflight,
}

/// One entry of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) marked: u8,
    pub(crate) next: u16,
    pub(crate) counter: u64,
}

impl Kept {
    /// A region for one ring, as the back-end makes it.
    pub(crate) fn ask(session: &mut Session, size: u16) -> Outcome<Self> {
        let (area, mut fds) = inflight(session, 1, size)?;
        let none = || Finding::breaks("GET_INFLIGHT_FD brings no descriptor");
        Ok(Self { file: fds.pop().ok_or_else(none)?, area })
    }

    /// A region of a file of the judge's own.
    pub(crate) const fn own(file: OwnedFd, size: u16) -> Self {
        let mmap_size = Inflight::area_size(size, false);
        let area = Inflight {
            mmap_size,
            mmap_offset: 0,
            num_queues: 1,
            queue_size: size,
            padding: [0; 4],
        };
        Self { file, area }
    }

    pub(crate) fn message(&self) -> Msg<'_> {
        Msg::new(Code::SetInflightFd.id(), self.area.as_bytes().to_vec()).fd(&self.file)
    }

    pub(crate) const fn file(&self) -> &OwnedFd {
        &self.file
    }

    pub(crate) fn read<const N: usize>(&self, at: u64) -> Outcome<[u8; N]> {
        let mut bytes = [0; N];
        rustix::io::pread(&self.file, &mut bytes, self.area.mmap_offset.saturating_add(at))
            .map_err(|errno| Finding::own("read the in-flight region", errno))?;
        Ok(bytes)
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) -> Outcome {
        rustix::io::pwrite(&self.file, bytes, self.area.mmap_offset.saturating_add(at))
            .map(|_| ())
            .map_err(|errno| Finding::own("write the in-flight region", errno))
    }

    pub(crate) fn word(&self, at: u64) -> Outcome<u16> {
        Ok(u16::from_le_bytes(self.read(at)?))
    }

    fn entry(&self, head: u16) -> Outcome<Entry> {
        let at = HEAD + 16 * u64::from(head);
        let [marked] = self.read(at)?;
        let counter = u64::from_le_bytes(self.read(at + 8)?);
        Ok(Entry { marked, next: self.word(at + 6)?, counter })
    }

    /// How many of the first heads are marked.
    pub(crate) fn marks(&self, heads: u16) -> Outcome<u16> {
        let mut count = 0;
        for head in 0..heads {
            count += u16::from(self.entry(head)?.marked != 0);
        }
        Ok(count)
    }

    pub(crate) fn set_entry(&self, head: u16, entry: Entry) -> Outcome {
        let at = HEAD + 16 * u64::from(head);
        self.write(at, &[entry.marked])?;
        self.write(at + 6, &entry.next.to_le_bytes())?;
        self.write(at + 8, &entry.counter.to_le_bytes())
    }

    /// What a process leaves in front of the entries.
    pub(crate) fn set_head(&self, version: u16, entries: u16, last: u16, used: u16) -> Outcome {
        self.write(0, &[0; 8])?;
        for (at, value) in
            [(VERSION, version), (DESC_NUM, entries), (LAST_BATCH_HEAD, last), (USED_IDX, used)]
        {
            self.write(at, &value.to_le_bytes())?;
        }
        Ok(())
    }

    /// All features at once: none is known.
    pub(crate) fn set_features(&self) -> Outcome {
        self.write(0, &[0xff; 8])
    }
}

/// A session that may have a region, and sectors.
pub(crate) fn session(case: &mut Case<'_>) -> Outcome<(Session, u64)> {
    let capacity = case.capacity()?;
    let session = case.session_with(PLAIN, USUAL | P::INFLIGHT_SHMFD)?;
    session.needs(P::INFLIGHT_SHMFD, "INFLIGHT_SHMFD")?;
    Ok((session, capacity))
}

/// A disk with a region of its own making, its ring not started.
fn prepared(case: &mut Case<'_>) -> Outcome<(Disk, Kept)> {
    let (mut session, capacity) = session(case)?;
    let kept = Kept::ask(&mut session, SIZE)?;
    Ok((Disk::prepare(session, capacity)?, kept))
}

/// Entries of the rings here.
const SIZE: u16 = 16;

/// A disk whose ring runs with a region.
fn running(case: &mut Case<'_>) -> Outcome<(Disk, Kept)> {
    let (mut disk, kept) = prepared(case)?;
    disk.session.done(&kept.message())?;
    disk.ring.run(&mut disk.session)?;
    Ok((disk, kept))
}

/// Lays out a request at descriptor `head`: a header, a status and a page of its own.
pub(crate) fn lay_out(ring: &Ring, head: u16, kind: u32) -> Outcome {
    let number = u64::from(head / 3);
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    let at = HEADER + 16 * number;
    ring.write(at, &header)?;
    let len = if kind == IN { 4096 } else { 20 };
    let status = STATUS + number;
    ring.write(status, &[0xee])?;
    ring.chain(head, &[(at, 16, 0), (DATA + 4096 * number, len, WRITE), (status, 1, WRITE)])
}

/// One read at each of these heads, each after the one before has come back.
fn one_by_one(disk: &mut Disk, heads: &[u16]) -> Outcome {
    for &head in heads {
        lay_out(&disk.ring, head, IN)?;
        disk.ring.offer(head)?;
        let none = || Finding::hangs("a ring with an in-flight region serves nothing");
        let (id, _) = disk.ring.next_used(disk.limit)?.ok_or_else(none)?;
        ensure!(id == u32::from(head), "the used ring names head {id}, {head} was offered");
    }
    Ok(())
}

/// The next process finds the region described.
pub(crate) fn described(case: &mut Case<'_>) -> Outcome {
    let (mut disk, kept) = running(case)?;
    one_by_one(&mut disk, &[0])?;
    disk.stop()?;
    let (version, entries) = (kept.word(VERSION)?, kept.word(DESC_NUM)?);
    ensure!(version == 1, "the in-flight region of a ring that ran has version {version}");
    ensure!(entries == SIZE, "desc_num is {entries} in the region of a ring of {SIZE}");
    let features = u64::from_le_bytes(kept.read(0)?);
    ensure!(features == 0, "the in-flight region has features {features:#x}: none is known");
    Ok(())
}

/// Nothing is in flight in a ring that was stopped.
pub(crate) fn cleared(case: &mut Case<'_>) -> Outcome {
    let (mut disk, kept) = running(case)?;
    for _ in 0..4 {
        one_by_one(&mut disk, &[0, 6, 3, 12, 9])?;
    }
    disk.stop()?;
    for head in 0..SIZE {
        let marked = kept.entry(head)?.marked;
        ensure!(marked == 0, "head {head} came back and is still marked as in flight");
    }
    let (noted, used) = (kept.word(USED_IDX)?, disk.ring.used_index()?);
    ensure!(noted == used, "used_idx of the region is {noted}, the used index {used}");
    Ok(())
}

/// The order in which requests were taken can be told afterwards.
pub(crate) fn counted(case: &mut Case<'_>) -> Outcome {
    let (mut disk, kept) = running(case)?;
    let heads = [6, 0, 9, 3];
    one_by_one(&mut disk, &heads)?;
    disk.stop()?;
    let counters: Result<Vec<_>, _> =
        heads.iter().map(|&head| Ok(kept.entry(head)?.counter)).collect();
    let counters = counters?;
    let rise = counters.is_sorted_by(|one, next| one < next);
    ensure!(rise, "requests taken one after the other have the counters {counters:?}");
    Ok(())
}

/// The list of what was finished last.
pub(crate) fn listed(case: &mut Case<'_>) -> Outcome {
    let (mut disk, kept) = running(case)?;
    one_by_one(&mut disk, &[6, 9, 3])?;
    disk.stop()?;
    let last = kept.word(LAST_BATCH_HEAD)?;
    ensure!(last == 3, "last_batch_head is {last}, head 3 came back last");
    let before = kept.entry(3)?.next;
    ensure!(before == 9, "head 3 came back after head 9, its next is {before}");
    Ok(())
}

/// What a process left: the heads that it had taken and not finished, oldest first, of a ring of which the
/// fifth was used last and the eighth taken.
fn left_behind(disk: &mut Disk, kept: &Kept, owed: &[u16], counter: u64) -> Outcome {
    kept.set_head(1, SIZE, 0, 5)?;
    for (&head, counter) in owed.iter().zip(counter..) {
        kept.set_entry(head, Entry { marked: 1, next: 0, counter })?;
    }
    let taken = 5 + u16::try_from(owed.len()).unwrap_or(0);
    begin(disk, kept, owed, taken)
}

/// The ring as the dead process left it, one more request in it, and the back-end goes on.
fn begin(disk: &mut Disk, kept: &Kept, owed: &[u16], taken: u16) -> Outcome {
    let ring = &mut disk.ring;
    // The last heads that were taken are not those that are owed: requests come back in any order.
    ring.begin_at(4, 5)?;
    let first = owed.first().copied().unwrap_or(0);
    let rest = owed.get(1..).unwrap_or_default();
    for head in std::iter::once(first).chain([12]).chain(rest.iter().copied()) {
        lay_out(ring, head, GET_ID)?;
        ring.list(head)?;
    }
    ensure_taken(ring, taken)?;
    lay_out(ring, 9, GET_ID)?;
    ring.list(9)?;
    let next = std::mem::replace(&mut ring.next_avail, 5);
    disk.session.done(&kept.message())?;
    // As QEMU does when it has lost a back-end: the base is the used index.
    ring.configure(&mut disk.session)?;
    ring.next_avail = next;
    ring.publish()?;
    ring.start(&mut disk.session)?;
    ring.enable(&mut disk.session, true)?;
    ring.kick()
}

/// That the judge has laid the ring out as it says.
fn ensure_taken(ring: &Ring, taken: u16) -> Outcome {
    match ring.next_avail == taken {
        true => Ok(()),
        false => Err(Finding::own("lay out a ring", format!("{} of {taken}", ring.next_avail))),
    }
}

/// The heads that come back, until nothing more comes.
pub(crate) fn answered(case: &Case<'_>, disk: &mut Disk, count: usize) -> Outcome<Vec<u32>> {
    let mut heads = Vec::new();
    while heads.len() < count {
        match disk.ring.next_used(disk.limit)? {
            Some((id, _)) => heads.push(id),
            None => {
                let came = heads.len();
                let why = format!("{came} of {count} requests came back: heads {heads:?}");
                return Err(Finding::hangs(why));
            }
        }
    }
    while let Some((id, _)) = disk.ring.next_used(case.quiet)? {
        heads.push(id);
    }
    Ok(heads)
}

/// What is marked is answered, once.
pub(crate) fn resubmitted(case: &mut Case<'_>) -> Outcome {
    let (mut disk, kept) = prepared(case)?;
    left_behind(&mut disk, &kept, &[0, 6, 3], 1000)?;
    let mut heads = answered(case, &mut disk, 4)?;
    heads.sort_unstable();
    ensure!(
        heads == [0, 3, 6, 9],
        "heads 0, 3 and 6 were in flight and 9 is new, and there came back {heads:?}"
    );
    disk.stop()?;
    let marked = kept.entry(0)?.marked | kept.entry(3)?.marked | kept.entry(6)?.marked;
    ensure!(marked == 0, "requests of an earlier process came back and are still marked");
    Ok(())
}

/// In the order in which they were taken first.
pub(crate) fn in_order(case: &mut Case<'_>) -> Outcome {
    let (mut disk, kept) = prepared(case)?;
    left_behind(&mut disk, &kept, &[6, 0], 7)?;
    let heads = answered(case, &mut disk, 3)?;
    ensure!(
        heads == [6, 0, 9],
        "heads 6 and 0 were taken in this order and 9 is new, and they came back as {heads:?}"
    );
    Ok(())
}

/// A process that died between the used index and the marks.
pub(crate) fn last_batch(case: &mut Case<'_>) -> Outcome {
    let (mut disk, kept) = prepared(case)?;
    // Two more are used than the region knows: 3, and before it 0. Only 6 is in flight.
    kept.set_head(1, SIZE, 3, 3)?;
    let mark = |head, next, counter| kept.set_entry(head, Entry { marked: 1, next, counter });
    mark(0, 15, 20)?;
    mark(3, 0, 21)?;
    mark(6, 0, 22)?;
    lay_out(&disk.ring, 0, GET_ID)?;
    lay_out(&disk.ring, 3, GET_ID)?;
    begin(&mut disk, &kept, &[6], 6)?;
    let mut heads = answered(case, &mut disk, 2)?;
    heads.sort_unstable();
    ensure!(
        heads == [6, 9],
        "head 6 was in flight, 0 and 3 had been used, 9 is new, and there came back {heads:?}"
    );
    Ok(())
}

/// Killed at work, again and again: each request comes back once.
pub(crate) fn killed(case: &mut Case<'_>) -> Outcome {
    const COUNT: u16 = 42;
    let (mut session, capacity) = session(case)?;
    case.needs_restarts()?;
    let kept = Kept::ask(&mut session, 128)?;
    let memory = crate::judge::disk::memory()?;
    let ring = Ring::new(&memory, 0, 128, BASE)?;
    let limit = session.wire.limit;
    let mut disk = Disk { session, memory, ring, limit, capacity };
    let mut random = crate::judge::storm::Random::new(case.seed);
    for round in 0..if case.quick { 4 } else { 20 } {
        go_on(&mut disk, &kept)?;
        let from = disk.ring.used_index()?;
        for number in 0..COUNT {
            lay_out(&disk.ring, number * 3, IN)?;
            disk.ring.list(number * 3)?;
        }
        disk.ring.publish()?;
        disk.ring.kick()?;
        match round % 2 {
            0 => first_answer(&disk, from)?,
            _ => std::thread::sleep(Duration::from_micros(u64::from(random.byte()) * 4)),
        }
        case.restart()?;
        disk.session = self::session(case)?.0;
        go_on(&mut disk, &kept)?;
        let mut heads = answered(case, &mut disk, usize::from(COUNT))?;
        heads.sort_unstable();
        let all: Vec<u32> = (0..COUNT).map(|number| u32::from(number) * 3).collect();
        let (twice, lost) = compare(&heads, &all);
        ensure!(
            heads == all,
            "killed with {COUNT} requests: heads {twice:?} came back twice, {lost:?} not at all"
        );
        disk.stop()?;
    }
    Ok(())
}

/// Waits until something was used since `from`: then there may be more under way.
fn first_answer(disk: &Disk, from: u16) -> Outcome {
    let until = Instant::now() + disk.limit;
    while disk.ring.used_index()? == from && Instant::now() < until {
        std::thread::yield_now();
    }
    Ok(())
}

/// Which came more than once, and which did not come.
fn compare(heads: &[u32], all: &[u32]) -> (Vec<u32>, Vec<u32>) {
    let times = |head: u32| heads.iter().filter(|&&one| one == head).count();
    let with = |wanted: fn(usize) -> bool| -> Vec<u32> {
        all.iter().copied().filter(|&head| wanted(times(head))).collect()
    };
    (with(|times| times > 1), with(|times| times == 0))
}

/// Sets the ring up with the region, at the used index as it stands.
pub(crate) fn go_on(disk: &mut Disk, kept: &Kept) -> Outcome {
    let memory = disk.memory.clone();
    disk.session.share(memory.regions())?;
    disk.session.done(&kept.message())?;
    let used = disk.ring.used_index()?;
    let next = std::mem::replace(&mut disk.ring.next_avail, used);
    disk.ring.configure(&mut disk.session)?;
    disk.ring.next_avail = next;
    disk.ring.start(&mut disk.session)?;
    disk.ring.enable(&mut disk.session, true)?;
    disk.ring.kick()
}
