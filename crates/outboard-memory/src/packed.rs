//! The usual request of a packed ring, gathered in one go (virtio 1.3 §2.8): the counterpart of `usual`.
//!
//! Usual is a chain of the ring's own descriptors, or one indirect table in one region, of buffers in one region each,
//! for which the list has room. Anything else, good or bad, is left to the careful way; a test holds that both agree.
#![expect(unsafe_code, reason = "tells the list how much of its room was filled")]

use std::mem::MaybeUninit;
use std::sync::atomic::Ordering;

use crate::buffers::{Buffers, Segment};
use crate::cells::{Descriptor, PackedRing};
use crate::map::Slots;
use crate::num::index;
use crate::table::Table;
use crate::usual::Rules;
use crate::view::View;

/// The most bytes of a request (virtio 1.3 §2.6.4).
const MOST_BYTES: u64 = 1 << 32;

const NEXT: u16 = Descriptor::NEXT;
const WRITE: u16 = Descriptor::WRITE;
const INDIRECT: u16 = Descriptor::INDIRECT;
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

/// The pieces of a request, filled from the front.
struct Filling<'a> {
    slots: Slots<'a>,
    room: &'a mut [MaybeUninit<Segment>],
    used: usize,
    bytes: u64,
    /// WRITE once the writable buffers have begun, at `seam`.
    phase: u16,
    seam: (usize, u64),
}

impl Filling<'_> {
    /// One more buffer. `None`: it is not usual.
    #[inline(always)]
    fn push(&mut self, addr: u64, len: u32, flags: u16) -> Option<()> {
        if flags & (INDIRECT | WRITE) != self.phase {
            if flags & INDIRECT != 0 || self.phase != 0 {
                return None;
            }
            self.phase = WRITE;
            self.seam = (self.used, self.bytes);
        }
        let len = u64::from(len);
        let base = self.slots.find(addr)?.translate(addr, len)?;
        self.room.get_mut(self.used)?.write(Segment { base, len: index(len) });
        self.used += 1;
        self.bytes += len;
        Some(())
    }

    /// Pieces, readable pieces, bytes of room. `None`: too many bytes.
    #[inline(always)]
    fn finish(self) -> Option<(usize, usize, u64)> {
        if self.bytes > MOST_BYTES {
            return None;
        }
        let (readable, bytes) = if self.phase == 0 { (self.used, self.bytes) } else { self.seam };
        Some((self.used, readable, self.bytes - bytes))
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
        rules: Rules,
        to: &mut Buffers,
    ) -> Option<PackedTaken> {
        to.recycle(self);
        let mut filling = Filling {
            slots: self.memory().slots(),
            room: to.room_for_pieces(),
            used: 0,
            bytes: 0,
            phase: 0,
            seam: (0, 0),
        };
        let taken = if flags & INDIRECT == 0 {
            chain(ring, head, flags, &mut filling)?
        } else {
            let body = ring.body(head)?;
            table(body.addr, body.len, flags, rules, &mut filling)?;
            PackedTaken { id: body.id, count: 1 }
        };
        let (used, readable, room) = filling.finish()?;
        if used > usize::from(rules.most) {
            return None;
        }
        // SAFETY: `used` places of the room were written, `readable` is at most that.
        unsafe { to.set(readable, used, room) };
        Some(taken)
    }
}

/// A chain of descriptors of the ring, one behind the other.
#[inline(always)]
fn chain(
    ring: &PackedRing,
    head: u16,
    flags: u16,
    filling: &mut Filling<'_>,
) -> Option<PackedTaken> {
    let (mut at, mut flags) = (head, flags);
    let mut available = flags & (AVAIL | USED);
    loop {
        let body = ring.body(at)?;
        filling.push(body.addr, body.len, flags)?;
        if flags & NEXT == 0 {
            let count = u16::try_from(filling.used).ok()?;
            return Some(PackedTaken { id: body.id, count });
        }
        at += 1;
        if at == ring.count() {
            at = 0;
            available ^= AVAIL | USED;
        }
        // The head was loaded with Acquire; what follows it was there before (§2.8.21.1).
        flags = ring.flags(at, Ordering::Relaxed)?;
        if flags & (AVAIL | USED) != available {
            return None;
        }
    }
}

/// The buffers of an indirect table, when it lies in one region. Of its flags only WRITE counts (§2.8.7).
#[inline(always)]
fn table(addr: u64, len: u32, flags: u16, rules: Rules, filling: &mut Filling<'_>) -> Option<()> {
    let len = u64::from(len);
    if !rules.indirect || flags & NEXT != 0 || len == 0 || !len.is_multiple_of(16) {
        return None;
    }
    let count = u16::try_from(len / 16).ok().filter(|&count| count <= rules.most)?;
    let table = Table::new(filling.slots.find(addr)?.translate(addr, len)?, count);
    for at in 0..count {
        let entry = table.entry(at)?;
        // A packed descriptor has its flags where a split one has `next` (§2.8.13).
        filling.push(entry.addr(), entry.len(), entry.next())?;
    }
    Some(())
}
