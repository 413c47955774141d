//! The usual request of a packed ring, gathered in one go (virtio 1.3 §2.8): the counterpart of `usual`.
//!
//! Usual is a chain of the ring's own descriptors that does not go round its end, or one indirect table in one region, of buffers in one region each,
//! for which the list has room. Anything else, good or bad, is left to the careful way; a test holds that both agree.

use std::sync::atomic::Ordering;

use crate::buffers::Buffers;
use crate::cells::{Descriptor, PackedEntry, PackedRing};
use crate::table::Run;
use crate::usual::{INDIRECT, Rules, Steps, WRITE, fill, usual_table};
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
    /// Descriptors of the ring that it takes.
    pub count: u16,
}

/// A walk along the ring, up to its end; beyond it the careful way goes. The flags it gives are those of the descriptor, but
/// turned round where they have to be set: what is not available has AVAIL or USED, and WRITE is wrong in either phase.
struct Chain<'a> {
    entry: PackedEntry<'a>,
    wanted: u16,
}

impl Steps for Chain<'_> {
    const WRONG: u16 = INDIRECT | AVAIL | USED;

    #[inline(always)]
    fn addr(&self) -> u64 {
        self.entry.addr()
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        self.entry.len()
    }

    #[inline(always)]
    fn goes_on(&self, flags: u16) -> bool {
        flags & NEXT != 0
    }

    #[inline(always)]
    fn step(&mut self) -> Option<u16> {
        self.entry = self.entry.after()?;
        // The head was loaded with Acquire; what follows it was there before (§2.8.21.1).
        Some(self.entry.flags(Ordering::Relaxed) ^ self.wanted)
    }

    #[inline(always)]
    fn turn(&mut self, flags: u16) -> u16 {
        self.wanted ^= WRITE;
        flags ^ WRITE
    }

    #[inline(always)]
    fn may_write(flags: u16) -> bool {
        flags & (Self::WRONG | WRITE) == 0
    }
}

/// A walk along an indirect table. Of its flags only WRITE counts, and the careful way has a word on INDIRECT (§2.8.7).
struct Listed<'a>(Run<'a>);

impl Steps for Listed<'_> {
    const WRONG: u16 = INDIRECT;

    #[inline(always)]
    fn addr(&self) -> u64 {
        self.0.entry().addr()
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        self.0.entry().len()
    }

    #[inline(always)]
    fn goes_on(&self, _: u16) -> bool {
        self.0.left() > 1
    }

    #[inline(always)]
    fn step(&mut self) -> Option<u16> {
        self.0 = self.0.after()?;
        // A packed descriptor has its flags where a split one has `next` (§2.8.13).
        Some(self.0.entry().next())
    }
}

impl View {
    /// Fills `to` with the buffers of the chain in `ring` that starts at `head`, which is available and has `flags`.
    /// [`Rules::most`] bounds its pieces. `None`: not a usual request; what `to` holds is of no use.
    #[inline(always)]
    pub fn gather_packed(
        &self,
        ring: &PackedRing,
        (head, flags): (u16, u16),
        rules: &Rules,
        to: &mut Buffers,
    ) -> Option<PackedTaken> {
        to.recycle(self);
        let slots = self.memory().slots();
        let entry = ring.entry(head)?;
        if flags & INDIRECT == 0 {
            let room = to.room_for_pieces(rules.most);
            let available = flags & (AVAIL | USED);
            let mut chain = Chain { entry, wanted: available };
            let filled = fill(slots, &mut chain, flags ^ available, room)?;
            let taken = PackedTaken { id: chain.entry.id(), count: filled.pieces() };
            filled.tell(to);
            return Some(taken);
        }
        if flags & NEXT != 0 {
            return None;
        }
        let table = usual_table(rules, slots, entry.addr(), entry.len())?;
        let run = table.run()?;
        let flags = run.entry().next();
        let filled = fill(slots, &mut Listed(run), flags, to.room_for_pieces(rules.most))?;
        filled.tell(to);
        Some(PackedTaken { id: entry.id(), count: 1 })
    }
}
