//! A ring that is served through the IOTLB (vhost-user, "IOMMU support", IOTLB_MSG;
//! VIRTIO_F_ACCESS_PLATFORM).
//!
//! ```text
//!  driver: I/O address = guest address + IO        the judge's IOMMU: page ─▶ page, permission
//!  ring ─▶ back-end ─ miss ─▶ channel ─▶ judge ─ update ─▶ main socket ─▶ back-end ─▶ page
//! ```
//! Invariant: no I/O address is an address of the memory table, so that a back-end that does not
//! translate reaches nothing; an update is acknowledged before the miss that it answers is.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use outboard_frontend::USER_OFFSET;
use outboard_protocol::FrontendCode as Code;
use outboard_protocol::features::{ProtocolFeatures as P, virtio};
use outboard_protocol::payload::{Iotlb, read};
use zerocopy::IntoBytes as _;

use crate::judge::case::Case;
use crate::judge::channel::Channel;
use crate::judge::disk::{BASE, DATA, Disk, Done, HEADER, IN, STATUS};
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::message::{self, Msg};
use crate::judge::ring::WRITE;
use crate::judge::session::{PLAIN, Session, USUAL};

/// From a guest address to its I/O address.
const IO: u64 = 0x10_0000_0000;
const PAGE: u64 = 4096;
/// Pages that nothing else uses: 64 KiB like the data.
const OTHER: u64 = BASE + 0x50000;
/// Bytes of the data area.
const ROOM: u64 = 0x10000;
/// IOTLB_MSG of the back-end.
const ASKS: u32 = 1;
const MISS: u8 = 1;
const UPDATE: u8 = 2;
const INVALIDATE: u8 = 3;
const ACCESS_FAILURE: u8 = 4;
/// To read, to write.
const R: u8 = 1;
const W: u8 = 2;
const MARK: u8 = 0x5a;
/// How many times as long a request may take whose misses never end.
const ASKING: u32 = 4;

/// A disk behind the judge's IOMMU.
struct Behind {
    disk: Disk,
    channel: Channel,
    /// Page of I/O addresses: page of guest memory, permission.
    map: BTreeMap<u64, (u64, u8)>,
    /// Pages that were asked for, and for what.
    asked: Vec<(u64, u8)>,
    /// I/O addresses of the failures that it reported.
    failures: Vec<u64>,
}

const fn page(address: u64) -> u64 {
    address & !(PAGE - 1)
}

impl Behind {
    /// Ring 0 laid out in a memory of which every page is mapped, and no entry sent.
    fn open(case: &mut Case<'_>) -> Outcome<Self> {
        Self::open_with(case, 0)
    }

    fn open_with(case: &mut Case<'_>, features: u64) -> Outcome<Self> {
        let capacity = case.capacity()?;
        let (channel, theirs) = Channel::new()?;
        let mut session = Session::hello(case.wire()?, USUAL | P::BACKEND_REQ)?;
        session.needs(P::BACKEND_REQ, "BACKEND_REQ")?;
        session.done(&Msg::bare(Code::SetBackendReqFd).fd(&theirs))?;
        drop(theirs);
        // Some offer the feature only where misses can be told.
        session.offered = session.ask(&message::get_features())?.number()?;
        session.needs_bit(virtio::ACCESS_PLATFORM, "ACCESS_PLATFORM")?;
        session.needs_bit(features, "the ring feature")?;
        session.features = session.offered & (PLAIN | virtio::ACCESS_PLATFORM | features);
        session.done(&message::set_features(session.features))?;
        let mut disk = Disk::prepare(session, capacity)?;
        disk.ring.user = IO;
        let pages = (BASE..BASE + crate::judge::disk::MEMORY).step_by(4096);
        let map = pages.map(|page| (page + IO, (page, R | W))).collect();
        Ok(Self { disk, channel, map, asked: Vec::new(), failures: Vec::new() })
    }

    /// The same with an entry for each page that a request uses, and the ring running.
    fn running(case: &mut Case<'_>) -> Outcome<Self> {
        let mut this = Self::open(case)?;
        let (desc, avail, used) = (this.disk.ring.desc, this.disk.ring.avail, this.disk.ring.used);
        for page in [desc, avail, used, HEADER].into_iter().chain((DATA..DATA + ROOM).step_by(4096))
        {
            this.update(page + IO)?;
        }
        this.disk.ring.run(&mut this.disk.session)?;
        Ok(this)
    }

    fn message(&mut self, entry: &Iotlb) -> Outcome<u64> {
        let msg = Msg::new(Code::IotlbMsg.id(), entry.as_bytes().to_vec()).need_reply();
        self.disk.session.ask(&msg)?.number()
    }

    /// Sends the entry of a page.
    fn update(&mut self, iova: u64) -> Outcome {
        let Some(&(to, perm)) = self.map.get(&iova) else { return Ok(()) };
        let uaddr = to + USER_OFFSET;
        let entry = Iotlb { iova, size: PAGE, uaddr, perm, kind: UPDATE, padding: [0; 6] };
        let code = self.message(&entry)?;
        ensure!(code == 0, "an update of the IOTLB is answered with {code}");
        Ok(())
    }

    /// Takes entries away; with the answer nothing uses them any more.
    fn invalidate(&mut self, iova: u64, size: u64) -> Outcome {
        let entry = Iotlb { iova, size, uaddr: 0, perm: 0, kind: INVALIDATE, padding: [0; 6] };
        let code = self.message(&entry)?;
        ensure!(code == 0, "an invalidation of the IOTLB is answered with {code}");
        Ok(())
    }

    /// From now on the pages of the data lie in other memory; nothing is sent.
    fn move_data(&mut self) {
        for at in (0..ROOM).step_by(4096) {
            self.map.insert(DATA + at + IO, (OTHER + at, R | W));
        }
    }

    /// Puts a read of `len` bytes into the ring, at descriptor `first`.
    fn queue(&mut self, first: u16, len: u32) -> Outcome {
        let ring = &mut self.disk.ring;
        let parts = [(HEADER + IO, 16, 0), (DATA + IO, len, WRITE), (STATUS + IO, 1, WRITE)];
        ring.chain(first, &parts)?;
        ring.list(first)?;
        ring.publish()
    }

    /// Answers what the back-end asks within `time`; whether it asked anything.
    fn listen(&mut self, time: Duration) -> Outcome<bool> {
        let Some(asked) = self.channel.next(time)? else { return Ok(false) };
        let entry = read::<Iotlb>(&asked.payload).filter(|_| asked.id() == ASKS);
        let Some(entry) = entry else {
            self.channel.answer(&asked, 0)?;
            return Ok(true);
        };
        let at = page(entry.iova);
        match entry.kind {
            MISS => {
                self.asked.push((at, entry.perm));
                self.update(at)?;
            }
            ACCESS_FAILURE => self.failures.push(entry.iova),
            kind => {
                return Err(Finding::breaks(format!("it sends an IOTLB message of type {kind}")));
            }
        }
        self.channel.answer(&asked, u64::from(!self.map.contains_key(&at)))?;
        Ok(true)
    }

    /// Waits for the next finished request, or `time`, and answers meanwhile. One that goes on asking has some times as
    /// long, and not for ever.
    fn finish(&mut self, time: Duration) -> Outcome<Option<Done>> {
        let (until, last) = (Instant::now() + time, Instant::now() + time * ASKING);
        loop {
            if let Some((_, len)) = self.disk.ring.next_used(Duration::ZERO)? {
                return Ok(Some(Done { status: self.disk.status()?, len }));
            }
            let (asks, now) = (self.listen(Duration::from_millis(1))?, Instant::now());
            if now > last || now > until && !asks {
                return Ok(None);
            }
        }
    }

    /// A read of sector 0 that must work.
    fn read(&mut self, when: &str) -> Outcome {
        self.disk.header(IN, 0)?;
        self.queue(0, 512)?;
        self.disk.ring.kick()?;
        let limit = self.disk.limit;
        let done = self.finish(limit)?.ok_or_else(|| {
            Finding::hangs(format!("a read behind an IOMMU is never finished {when}"))
        })?;
        ensure!(done.status == 0, "a read behind an IOMMU fails with {} {when}", done.status);
        Ok(())
    }

    /// Fills the pages that data go to, and those that they may go to.
    fn mark(&self) -> Outcome {
        let bytes = vec![MARK; usize::try_from(ROOM).unwrap_or(0)];
        self.disk.ring.write(DATA, &bytes)?;
        self.disk.ring.write(OTHER, &bytes)
    }

    /// Whether these 64 KiB are as they were marked.
    fn untouched(&self, at: u64) -> Outcome<bool> {
        let mut bytes = vec![0; usize::try_from(ROOM).unwrap_or(0)];
        self.disk.ring.read(at, &mut bytes)?;
        Ok(bytes.iter().all(|&byte| byte == MARK))
    }

    /// A read whose pages do not permit it: everything that follows within a while.
    fn denied_read(&mut self, time: Duration) -> Outcome<Option<Done>> {
        self.disk.header(IN, 0)?;
        self.mark()?;
        self.queue(0, 512)?;
        self.disk.ring.kick()?;
        let until = Instant::now() + time;
        while Instant::now() < until && self.failures.is_empty() {
            if let Some(done) = self.finish(Duration::from_millis(1))? {
                return Ok(Some(done));
            }
        }
        Ok(None)
    }
}

/// A packed ring that `play` drives at these I/O addresses: what it reads goes where the entries lead.
pub(crate) fn packed(
    case: &mut Case<'_>,
    play: impl FnOnce(Disk, u64) -> Outcome<Disk>,
) -> Outcome {
    let mut behind = Behind::open_with(case, virtio::RING_PACKED)?;
    let (desc, avail, used) =
        (behind.disk.ring.desc, behind.disk.ring.avail, behind.disk.ring.used);
    behind.move_data();
    for at in [desc, avail, used, HEADER, DATA] {
        behind.update(page(at) + IO)?;
    }
    behind.mark()?;
    behind.disk.ring.user = IO;
    behind.disk = play(behind.disk, IO)?;
    ensure!(behind.untouched(DATA)?, "data go to where no entry leads");
    ensure!(!behind.untouched(OTHER)?, "data do not go where the entry leads");
    Ok(())
}

/// A ring whose every address must be asked for.
pub(crate) fn misses(case: &mut Case<'_>) -> Outcome {
    let mut behind = Behind::open(case)?;
    behind.disk.ring.run(&mut behind.disk.session)?;
    behind.read("with an empty IOTLB")?;
    let ring = &behind.disk.ring;
    let used = [
        ("the descriptor table", ring.desc, R),
        ("the available ring", ring.avail, R),
        ("the used ring", ring.used, W),
        ("the header", HEADER, R),
        ("the data", DATA, W),
    ];
    for (what, at, perm) in used {
        let at = page(at) + IO;
        let asked = behind.asked.iter().any(|&(page, perms)| page == at && perms & perm != 0);
        ensure!(asked, "it served a request and never asked where {what} lies");
    }
    let odd = behind.asked.iter().find(|(page, _)| !behind.map.contains_key(page));
    ensure!(odd.is_none(), "it asks for {:#x}, which nobody has named", odd.map_or(0, |odd| odd.0));
    behind.read("with what it asked for before")
}

/// The entry of the moment is used.
pub(crate) fn translated(case: &mut Case<'_>) -> Outcome {
    let mut behind = Behind::running(case)?;
    behind.read("with every entry there")?;
    behind.move_data();
    behind.update(DATA + IO)?;
    behind.mark()?;
    behind.read("after an entry was replaced")?;
    ensure!(behind.untouched(DATA)?, "data go to the page of an entry that was replaced");
    ensure!(!behind.untouched(OTHER)?, "data do not go where the new entry leads");
    Ok(())
}

/// Entries that permit less than a request needs.
pub(crate) fn permission(case: &mut Case<'_>) -> Outcome {
    let mut behind = Behind::running(case)?;
    behind.map.insert(DATA + IO, (DATA, R));
    behind.update(DATA + IO)?;
    let done = behind.denied_read(case.quiet * 4)?;
    std::thread::sleep(case.quiet / 4);
    ensure!(behind.untouched(DATA)?, "it writes to a page whose entry is to be read only");
    ensure!(
        done.is_none_or(|done| done.status != 0),
        "a read succeeds into a page that may not be written"
    );
    drop(behind);
    let mut behind = Behind::running(case)?;
    behind.map.insert(HEADER + IO, (HEADER, W));
    behind.update(HEADER + IO)?;
    let done = behind.denied_read(case.quiet * 4)?;
    ensure!(
        done.is_none_or(|done| done.status != 0) && behind.untouched(DATA)?,
        "it performs a request whose header it may not read"
    );
    Ok(())
}

/// What may not be done is told.
pub(crate) fn access_failure(case: &mut Case<'_>) -> Outcome {
    let mut behind = Behind::running(case)?;
    behind.map.insert(DATA + IO, (DATA, R));
    behind.update(DATA + IO)?;
    let limit = behind.disk.limit;
    behind.denied_read(limit)?;
    let told = behind.failures.iter().any(|&iova| page(iova) == DATA + IO);
    ensure!(told, "no access failure is sent for a write to a page that is to be read only");
    Ok(())
}

/// What was taken away is asked for again.
pub(crate) fn invalidated(case: &mut Case<'_>) -> Outcome {
    let mut behind = Behind::running(case)?;
    behind.read("with every entry there")?;
    behind.invalidate(DATA + IO, ROOM)?;
    behind.move_data();
    behind.mark()?;
    behind.read("after an invalidation")?;
    ensure!(behind.untouched(DATA)?, "data go to a page that was invalidated");
    let asked = behind.asked.iter().any(|&(page, _)| page == DATA + IO);
    ensure!(asked, "it does not ask for an entry that was invalidated");
    Ok(())
}

/// After the answer the page belongs to somebody else.
pub(crate) fn invalidation_waits(case: &mut Case<'_>) -> Outcome {
    for round in 0..if case.quick { 4 } else { 20 } {
        let mut behind = Behind::running(case)?;
        behind.disk.header(IN, 0)?;
        for first in 0..5 {
            behind.queue(first * 3, 0x10000)?;
        }
        behind.disk.ring.kick()?;
        // The invalidation may come before the kick is heard: every other time it waits for a request.
        let mut left = 5;
        if round % 2 == 1 && behind.finish(case.limit)?.is_some() {
            left -= 1;
        }
        behind.invalidate(DATA + IO, ROOM)?;
        behind.move_data();
        behind.mark()?;
        for _ in 0..left {
            let none = || Finding::hangs("a request is never finished after an invalidation");
            behind.finish(case.limit)?.ok_or_else(none)?;
        }
        ensure!(behind.untouched(DATA)?, "a page is written after the answer to its invalidation");
    }
    Ok(())
}

/// The ring's own pages are translated like all others.
pub(crate) fn ring_follows(case: &mut Case<'_>) -> Outcome {
    let mut behind = Behind::running(case)?;
    behind.read("with every entry there")?;
    let (old, new) = (behind.disk.ring.used, OTHER);
    let mut bytes = [0; 4096];
    behind.disk.ring.read(old, &mut bytes)?;
    behind.disk.ring.write(new, &bytes)?;
    behind.map.insert(old + IO, (new, R | W));
    behind.invalidate(old + IO, PAGE)?;
    let before = behind.disk.ring.load(old + 2)?;
    behind.disk.ring.used = new;
    behind.read("after its used ring was moved by the IOMMU")?;
    let after = behind.disk.ring.load(old + 2)?;
    ensure!(after == before, "it writes to the page where its used ring was");
    Ok(())
}
