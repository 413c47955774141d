//! Packed rings (virtio 1.3 §2.8; hostile cases B39 to B45), where they are offered: a ring of five descriptors, which no
//! split ring can have, written by hand.
//!
//! ```text
//!  page 0: (addr u64, len u32, id u16, flags u16) × 5     page 1: event structure of the driver     page 2: of the device
//! ```
//! Invariant: the flags of a chain's first descriptor are written last; of what the back-end wrote the flags are read
//! first.

use std::time::{Duration, Instant};

use outboard_protocol::ProtocolFeatures;
use outboard_protocol::features::virtio::{RING_EVENT_IDX, RING_INDIRECT_DESC, RING_PACKED};

use crate::judge::case::Case;
use crate::judge::disk::{BASE, DATA, Disk, HEADER, IN, MEMORY, STATUS, TABLES};
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::message;
use crate::judge::ring::{Desc, INDIRECT, NEXT, WRITE};

/// Descriptor flags: the wrap counter of who wrote it, and its inverse or the same.
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// Descriptors.
pub(super) const SIZE: u16 = 5;
/// Index 0 and wrap counter 1, of both sides.
pub(super) const FRESH: u32 = 0x8000_8000;
/// The usual read.
pub(super) const READ: [(u64, u32, u16); 3] =
    [(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)];

/// An index of the ring, and the wrap counter there.
pub(super) type Place = (u16, bool);

const fn further((at, wrap): Place, count: u16) -> Place {
    if at + count >= SIZE { (at + count - SIZE, !wrap) } else { (at + count, wrap) }
}

pub(super) const fn bits((at, wrap): Place) -> u16 {
    at | (wrap as u16) << 15
}

/// A disk whose ring 0 is packed.
pub(super) struct Packed {
    pub(super) disk: Disk,
    pub(super) at: Place,
    pub(super) used: Place,
}

impl Packed {
    fn start(case: &mut Case<'_>, features: u64) -> Outcome<Self> {
        let mut this = Self::prepare(case, features, ProtocolFeatures::empty())?;
        this.run(FRESH)?;
        Ok(this)
    }

    /// The same, with more protocol features and not started yet.
    pub(super) fn prepare(
        case: &mut Case<'_>,
        features: u64,
        protocol: ProtocolFeatures,
    ) -> Outcome<Self> {
        let features = RING_PACKED | features;
        let disk = case.unstarted_disk(features, protocol)?;
        disk.session.needs_bit(RING_PACKED, "packed rings")?;
        disk.session.needs_bit(features, "the ring feature")?;
        let mut this = Self { disk, at: (0, true), used: (0, true) };
        this.disk.ring.size = SIZE;
        Ok(this)
    }

    /// Starts the ring where it is.
    pub(super) fn run(&mut self, base: u32) -> Outcome {
        let (ring, session) = (&self.disk.ring, &mut self.disk.session);
        ring.configure(session)?;
        session.done(&message::vring_base(0, base))?;
        ring.start(session)?;
        ring.enable(session, true)
    }

    pub(super) fn available(&self) -> u16 {
        if self.at.1 { AVAIL } else { USED }
    }

    /// Writes descriptors from the next place on, the flags of the first one last, and kicks.
    pub(super) fn offer(&mut self, id: u16, parts: &[(u64, u32, u16)]) -> Outcome {
        let mut first = None;
        for (number, &(addr, len, flags)) in parts.iter().enumerate() {
            let more = if number + 1 < parts.len() { NEXT } else { 0 };
            let flags = flags | more | self.available();
            let place = self.disk.ring.desc + 16 * u64::from(self.at.0);
            // The buffer id stands where a split descriptor has its flags, the flags where it has `next`.
            let bytes = Desc::new(addr, len, id, 0).bytes();
            let (body, _) = bytes.split_at(14);
            self.disk.ring.write(place, body)?;
            match first {
                None => first = Some((place + 14, flags)),
                Some(_) => self.disk.ring.store(place + 14, flags)?,
            }
            self.at = further(self.at, 1);
        }
        if let Some((place, flags)) = first {
            self.disk.ring.store(place, flags)?;
        }
        self.disk.ring.kick()
    }

    /// Waits for the next used descriptor, which stands for `count`: its id and length.
    pub(super) fn next_used(&mut self, count: u16, time: Duration) -> Outcome<Option<(u16, u32)>> {
        let place = self.disk.ring.desc + 16 * u64::from(self.used.0);
        let used = if self.used.1 { AVAIL | USED } else { 0 };
        let until = Instant::now() + time;
        while self.disk.ring.load(place + 14)? & (AVAIL | USED) != used {
            if Instant::now() >= until {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        let mut len = [0; 4];
        self.disk.ring.read(place + 8, &mut len)?;
        let id = self.disk.ring.load(place + 12)?;
        self.used = further(self.used, count);
        Ok(Some((id, u32::from_le_bytes(len))))
    }

    /// The usual read, under this id, and in a table when `at` says where that lies.
    pub(super) fn reads(&mut self, id: u16, table: Option<u64>, when: &str) -> Outcome {
        self.disk.header(IN, 0)?;
        let count = if let Some(table) = table {
            put(&self.disk, table, &READ)?;
            self.offer(id, &[(table, 48, INDIRECT)])?;
            1
        } else {
            self.offer(id, &READ)?;
            3
        };
        let place = self.used.0;
        let used = self.next_used(count, self.disk.limit)?;
        let (told, len) =
            used.ok_or_else(|| Finding::hangs(format!("descriptor {place} is not used {when}")))?;
        ensure!(told == id, "id {told} is used {when}, {id} was offered");
        ensure!(len == 513, "the used length is {len} {when}, not 513");
        let status = self.disk.status()?;
        ensure!(status == 0, "a read fails with {status} {when}");
        Ok(())
    }

    /// Stops the ring: where it goes on.
    pub(super) fn stop(&mut self) -> Outcome<u32> {
        self.disk.session.base(0)
    }
}

/// Writes an indirect table.
fn put(disk: &Disk, at: u64, parts: &[(u64, u32, u16)]) -> Outcome {
    let mut place = at;
    for &(addr, len, flags) in parts {
        disk.ring.write(place, &Desc::new(addr, len, 0, flags).bytes())?;
        place += 16;
    }
    Ok(())
}

/// Plays a ring that breaks a rule: nothing of it is performed, and the device serves again, on this connection or at
/// least on the next.
fn broken(
    case: &mut Case<'_>,
    features: u64,
    spoil: impl FnOnce(&mut Packed) -> Outcome,
) -> Outcome {
    let mut ring = Packed::start(case, features)?;
    ring.reads(0, None, "before anything was broken")?;
    ring.disk.header(IN, 0)?;
    spoil(&mut ring)?;
    ring.next_used(1, case.quiet)?;
    case.digests();
    ensure!(ring.disk.status()? != 0, "it reported success for a request that broke a rule");
    case.lives()?;
    case.rests("after a broken ring")?;
    if ring.stop().is_ok() && ring.disk.ring.clear().is_ok() {
        (ring.at, ring.used) = ((0, true), (0, true));
        if ring.run(FRESH).is_ok() && ring.reads(0, None, "after a broken ring").is_ok() {
            return Ok(());
        }
    }
    drop(ring);
    case.lives()?;
    let mut ring = Packed::start(case, features)?;
    ring.reads(0, None, "on a new connection after a broken ring")
}

pub(crate) fn served(case: &mut Case<'_>) -> Outcome {
    let mut ring = Packed::start(case, 0)?;
    // Three of five descriptors at a time: chains go round the end at each place there is.
    for round in 0..4 * SIZE {
        ring.reads(round % SIZE, None, &format!("in round {round}"))?;
    }
    Ok(())
}

pub(crate) fn together(case: &mut Case<'_>) -> Outcome {
    let mut ring = Packed::start(case, 0)?;
    for round in 0..2 * SIZE {
        let empty = [(HEADER, 16, 0), (STATUS, 1, WRITE)];
        ring.disk.header(super::super::disk::GET_ID, 0)?;
        ring.offer(3, &empty)?;
        ring.offer(1, &empty)?;
        let mut ids = [0; 2];
        for id in &mut ids {
            let used = ring.next_used(2, ring.disk.limit)?;
            let lost = || Finding::hangs(format!("one of two requests is lost in round {round}"));
            *id = used.ok_or_else(lost)?.0;
        }
        ids.sort_unstable();
        ensure!(ids == [1, 3], "ids {ids:?} are used, 1 and 3 were offered");
    }
    Ok(())
}

pub(crate) fn indirect(case: &mut Case<'_>) -> Outcome {
    let mut ring = Packed::start(case, RING_INDIRECT_DESC)?;
    for round in 0..2 * SIZE + 1 {
        ring.reads(round % SIZE, Some(TABLES), &format!("through a table, in round {round}"))?;
    }
    Ok(())
}

/// Both halves of the base: the ring goes on where it was, in the lap where it was.
pub(crate) fn base(case: &mut Case<'_>) -> Outcome {
    let mut ring = Packed::start(case, 0)?;
    for round in 0..2 * SIZE {
        ring.reads(0, None, &format!("before stop {round}"))?;
        let base = ring.stop()?;
        let right = u32::from(bits(ring.at)) | u32::from(bits(ring.used)) << 16;
        ensure!(base == right, "the base is {base:#x}, the ring stands at {right:#x}");
        ring.run(base)?;
    }
    Ok(())
}

pub(crate) fn odd_events(case: &mut Case<'_>) -> Outcome {
    for features in [0, RING_EVENT_IDX] {
        let mut ring = Packed::start(case, features)?;
        for (place, flags) in [(0x7fff_u16, 2_u16), (SIZE, 2), (0, 3), (0xffff, 0xffff)] {
            let event = ring.disk.ring.avail;
            ring.disk.ring.store(event, place)?;
            ring.disk.ring.store(event + 2, flags)?;
            let when = format!("with events of flags {flags:#x} at {place:#x}");
            ring.reads(0, None, &when)?;
        }
    }
    Ok(())
}

pub(crate) fn id_outside(case: &mut Case<'_>) -> Outcome {
    broken(case, 0, |ring| ring.offer(SIZE, &READ))
}

pub(crate) fn not_available(case: &mut Case<'_>) -> Outcome {
    broken(case, 0, |ring| {
        // Its second descriptor is one of the lap before.
        ring.offer(0, &[(HEADER, 16, NEXT)])
    })
}

pub(crate) fn round_and_round(case: &mut Case<'_>) -> Outcome {
    broken(case, 0, |ring| {
        // Written backwards, for each makes the one before it whole: five with a successor, and no end.
        let chain = [(HEADER, 16, NEXT); SIZE as usize];
        ring.offer(0, &chain)
    })
}

pub(crate) fn data_outside(case: &mut Case<'_>) -> Outcome {
    broken(case, 0, |ring| {
        ring.offer(0, &[(HEADER, 16, 0), (BASE + MEMORY, 512, WRITE), (STATUS, 1, WRITE)])
    })
}

pub(crate) fn table_with_next(case: &mut Case<'_>) -> Outcome {
    broken(case, RING_INDIRECT_DESC, |ring| {
        put(&ring.disk, TABLES, &READ)?;
        ring.offer(0, &[(TABLES, 48, INDIRECT), (STATUS, 1, WRITE)])
    })
}

pub(crate) fn table_of_nothing(case: &mut Case<'_>) -> Outcome {
    broken(case, RING_INDIRECT_DESC, |ring| ring.offer(0, &[(TABLES, 0, INDIRECT)]))
}
