//! The usual request of a packed ring, gathered in one go (virtio 1.3 §2.8): the counterpart of `usual`.
//!
//! Usual is a chain of the ring's own descriptors that does not go round its end, or one indirect table in one region, of buffers in one region each,
//! for which the list has room. Anything else, good or bad, is left to the careful way; a test holds that both agree.

#![expect(unsafe_code, reason = "walks whose bounds were asked for all at once")]

use crate::buffers::{Buffers, Room};
use crate::cells::{Descriptor, Lap, PackedRun};
use crate::map::Slots;
use crate::num::index;
use crate::table::Run;
use crate::usual::{INDIRECT, Steps, WRITE, fill};
use crate::view::View;

const NEXT: u16 = Descriptor::NEXT;
/// Flag: equal to the driver's wrap counter when it is available.
const AVAIL: u16 = 1 << 7;
/// Flag: the other way round when it is available.
const USED: u16 = 1 << 15;

/// A request that was gathered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedTaken {
    /// Its buffer id, whatever the driver wrote.
    pub id: u16,
    /// Bytes of the ring that it takes, 16 a descriptor.
    pub bytes: u32,
}

/// A walk along the ring, up to its end; beyond it the careful way goes. The flags it gives are those of the descriptor, but
/// turned round where they have to be set: what is not available has AVAIL or USED, and WRITE is wrong in either phase.
struct Chain<'a> {
    run: PackedRun<'a>,
    wanted: u16,
}

impl Steps for Chain<'_> {
    const WRONG: u16 = INDIRECT | AVAIL | USED;

    #[inline(always)]
    unsafe fn addr(&self, at: usize) -> u64 {
        // SAFETY: the caller's promise; the room ends where the run does.
        unsafe { self.run.addr(at) }
    }

    #[inline(always)]
    unsafe fn len(&self, at: usize) -> u32 {
        // SAFETY: likewise.
        unsafe { self.run.len(at) }
    }

    #[inline(always)]
    fn goes_on(&self, flags: u16, _: usize) -> bool {
        flags & NEXT != 0
    }

    #[inline(always)]
    unsafe fn step(&mut self, at: usize) -> Option<u16> {
        // The head was loaded with Acquire; what follows it was there before (§2.8.21.1).
        // SAFETY: likewise.
        Some(unsafe { self.run.flags(at) } ^ self.wanted)
    }

    #[inline(always)]
    fn turn(&mut self, flags: u16) -> u16 {
        self.wanted ^= WRITE;
        flags ^ WRITE
    }
}

/// A walk along an indirect table. Of its flags only WRITE counts, and the careful way has a word on INDIRECT (§2.8.7).
struct Listed<'a> {
    run: Run<'a>,
    wanted: u16,
}

impl Steps for Listed<'_> {
    const WRONG: u16 = INDIRECT;

    #[inline(always)]
    unsafe fn addr(&self, at: usize) -> u64 {
        // SAFETY: the caller's promise; the room ends where the table does.
        unsafe { self.run.addr(at) }
    }

    #[inline(always)]
    unsafe fn len(&self, at: usize) -> u32 {
        // SAFETY: likewise.
        unsafe { self.run.len(at) }
    }

    #[inline(always)]
    fn goes_on(&self, _: u16, next: usize) -> bool {
        next < self.run.bytes()
    }

    #[inline(always)]
    unsafe fn step(&mut self, at: usize) -> Option<u16> {
        // A packed descriptor has its flags where a split one has `next` (§2.8.13).
        // SAFETY: likewise.
        Some(unsafe { self.run.packed_flags(at) } ^ self.wanted)
    }

    #[inline(always)]
    fn turn(&mut self, flags: u16) -> u16 {
        self.wanted = WRITE;
        flags ^ WRITE
    }
}

impl View {
    /// Fills `to` with the buffers of the chain that starts at `lap`, where a [look](Lap::look) found `flags`; it may take
    /// `left` bytes of the ring. Only if `indirect` it may be a table. `None`: not a usual request; what `to` holds is of no
    /// use.
    #[inline(always)]
    pub fn gather_packed(
        &self,
        lap: &Lap,
        flags: u16,
        left: u32,
        indirect: &bool,
        to: &mut Buffers,
    ) -> Option<PackedTaken> {
        to.recycle(self);
        let slots = self.memory().slots();
        let run = lap.run();
        let room = to.room_for_pieces();
        if flags & INDIRECT == 0 {
            let room = room.up_to(run.bytes()).up_to(left as usize);
            let chain = Chain { run, wanted: lap.state() };
            // SAFETY: the room was cut to the length of the run.
            let filled = unsafe { fill(slots, chain, flags, room) }?;
            // SAFETY: what was filled last was its last descriptor.
            let id = unsafe { run.id(filled.last()) };
            let bytes = filled.bytes();
            filled.tell(to);
            return Some(PackedTaken { id, bytes });
        }
        if flags & NEXT != 0 || left == 0 || !*indirect {
            return None;
        }
        // SAFETY: a run is never empty.
        let addr = unsafe { run.addr(0) };
        // SAFETY: likewise.
        let len = unsafe { run.len(0) };
        let table = usual_run(slots, addr, u64::from(len), &room)?;
        // SAFETY: not empty.
        let flags = unsafe { table.packed_flags(0) };
        let room = room.up_to(table.bytes());
        // SAFETY: the room was cut to the length of the table.
        let filled = unsafe { fill(slots, Listed { run: table, wanted: 0 }, flags, room) }?;
        filled.tell(to);
        // SAFETY: a run is never empty.
        Some(PackedTaken { id: unsafe { run.id(0) }, bytes: 16 })
    }
}

/// The indirect table of a descriptor, when it lies in one region, is not empty and the list has room for it.
#[inline(always)]
fn usual_run<'a>(slots: Slots<'a>, addr: u64, len: u64, room: &Room<'_>) -> Option<Run<'a>> {
    let bytes = index(len);
    // Less than nothing is more than the room, too.
    if bytes.wrapping_sub(1) >= room.limit() || !bytes.is_multiple_of(16) {
        return None;
    }
    let host = slots.find(addr).translate_buffer(addr, len)?;
    Some(Run::new(host, bytes))
}
