//! A block device as the probes drive it: one request at a time, laid out as the check wants it
//! (virtio 1.3 §5.2.6).
//!
//! ```text
//!  guest memory: | ring 0 | ring 1 | tables | header, status | data ... |
//! ```
//! Invariant: nothing is written to the disk here but by [`Disk::write`], which only checks that put the
//! old bytes back use.

use std::time::Duration;

use outboard_frontend::SharedMemory;
use outboard_frontend::block::SECTOR;

use super::finding::{Finding, Outcome, ensure};
use super::ring::{RING_ROOM, Ring, WRITE};
use super::session::Session;

/// Request types.
pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const FLUSH: u32 = 4;
pub(crate) const GET_ID: u32 = 8;

/// What the status byte is before the device writes it.
pub(crate) const UNSET: u8 = 0xee;
/// First guest address of the shared memory.
pub(crate) const BASE: u64 = outboard_frontend::DEFAULT_GUEST_BASE;
/// Room for indirect tables.
pub(crate) const TABLES: u64 = BASE + 4 * RING_ROOM;
/// The header of the request.
pub(crate) const HEADER: u64 = BASE + 0x20000;
/// The status byte.
pub(crate) const STATUS: u64 = HEADER + 0x800;
/// Room for data: 64 KiB.
pub(crate) const DATA: u64 = BASE + 0x30000;
/// Bytes of shared memory.
pub(crate) const MEMORY: u64 = 0x100000;

/// A finished request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Done {
    pub(crate) status: u8,
    pub(crate) len: u32,
}

/// A session with memory and a ring 0 that runs, and perhaps more.
pub(crate) struct Disk {
    pub(crate) session: Session,
    pub(crate) memory: SharedMemory,
    pub(crate) ring: Ring,
    pub(crate) limit: Duration,
    /// Sectors of the disk.
    pub(crate) capacity: u64,
}

impl Disk {
    /// Memory shared and ring 0 laid out, not configured.
    pub(crate) fn prepare(mut session: Session, capacity: u64) -> Outcome<Self> {
        let memory = memory()?;
        session.share(memory.regions())?;
        let ring = Ring::new(&memory, 0, 16, BASE)?;
        let limit = session.wire.limit;
        Ok(Self { session, memory, ring, limit, capacity })
    }

    /// Ring 0 runs.
    pub(crate) fn start(session: Session, capacity: u64) -> Outcome<Self> {
        let mut disk = Self::prepare(session, capacity)?;
        disk.ring.run(&mut disk.session)?;
        Ok(disk)
    }

    /// Another ring in the same memory.
    pub(crate) fn other_ring(&self, index: u8) -> Outcome<Ring> {
        Ring::new(&self.memory, index, 16, BASE + RING_ROOM * u64::from(index.clamp(1, 3)))
    }

    /// Writes a header and unsets the status.
    pub(crate) fn header(&self, kind: u32, sector: u64) -> Outcome {
        let mut bytes = [0; 16];
        let (low, high) = bytes.split_at_mut(8);
        low[..4].copy_from_slice(&kind.to_le_bytes());
        high.copy_from_slice(&sector.to_le_bytes());
        self.ring.write(HEADER, &bytes)?;
        self.ring.write(STATUS, &[UNSET])
    }

    pub(crate) fn status(&self) -> Outcome<u8> {
        let mut byte = [0];
        self.ring.read(STATUS, &mut byte)?;
        Ok(byte[0])
    }

    /// Puts a chain into the ring at entry 0, offers it and waits for it.
    pub(crate) fn perform(&mut self, parts: &[(u64, u32, u16)]) -> Outcome<Option<Done>> {
        self.ring.chain(0, parts)?;
        self.ring.offer(0)?;
        self.finish(0)
    }

    /// Waits for the request with this head.
    pub(crate) fn finish(&mut self, head: u32) -> Outcome<Option<Done>> {
        let Some((id, len)) = self.ring.next_used(self.limit)? else { return Ok(None) };
        ensure!(id == head, "the used ring names head {id}, {head} was offered");
        Ok(Some(Done { status: self.status()?, len }))
    }

    /// The usual read of `len` bytes at `sector`, into [`DATA`].
    pub(crate) fn read(&mut self, sector: u64, len: u32) -> Outcome<Done> {
        self.header(IN, sector)?;
        let parts = [(HEADER, 16, 0), (DATA, len, WRITE), (STATUS, 1, WRITE)];
        self.perform(&parts)?.ok_or_else(|| {
            Finding::hangs(format!("a read was not finished in {} ms", self.limit.as_millis()))
        })
    }

    /// The usual write of what lies at [`DATA`].
    pub(crate) fn write(&mut self, sector: u64, len: u32) -> Outcome<Done> {
        self.header(OUT, sector)?;
        let parts = [(HEADER, 16, 0), (DATA, len, 0), (STATUS, 1, WRITE)];
        self.perform(&parts)?.ok_or_else(|| {
            Finding::hangs(format!("a write was not finished in {} ms", self.limit.as_millis()))
        })
    }

    /// That a good request is served.
    pub(crate) fn serves(&mut self, when: &str) -> Outcome {
        let done = self.read(0, 512).map_err(|mut finding| {
            finding.why = format!("{} ({when})", finding.why);
            finding
        })?;
        ensure!(done.status == 0, "a read of sector 0 fails with {} {when}", done.status);
        Ok(())
    }

    /// That nothing is served: no used element appears within `time`.
    pub(crate) fn idle(&mut self, time: Duration, when: &str) -> Outcome {
        let used = self.ring.next_used(time)?;
        ensure!(used.is_none(), "it finished a request {when}");
        Ok(())
    }

    /// The data area.
    pub(crate) fn data(&self, len: usize) -> Outcome<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.ring.read(DATA, &mut bytes)?;
        Ok(bytes)
    }

    /// Stops ring 0; its base.
    pub(crate) fn stop(&mut self) -> Outcome<u32> {
        self.session.base(0)
    }

    /// Stops ring 0, sets it up anew and reads: what must work after every broken ring.
    pub(crate) fn revive(&mut self) -> Outcome {
        self.stop()?;
        self.ring.clear()?;
        self.ring.run(&mut self.session)?;
        self.serves("after a stop and a new set-up of the ring")
    }

    /// Sectors that `len` bytes are.
    pub(crate) const fn sectors(len: u64) -> u64 {
        len.div_ceil(SECTOR)
    }
}

/// The shared memory of a probe.
pub(crate) fn memory() -> Outcome<SharedMemory> {
    SharedMemory::with_regions(&[(BASE, MEMORY)])
        .map_err(|error| Finding::own("make shared memory", error))
}
