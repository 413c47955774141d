//! The usual request, gathered in one go: the same as [`Gather`](crate::Gather) and the rules of the queue make of it,
//! in a loop that calls nothing and lives in registers.
//!
//! Usual is a chain of the ring's own table, or one whose head is an indirect table in one region, of buffers in one
//! region each, none empty, for which the list has room. Anything else, good or bad, is left to the careful way; a test
//! holds that both ways agree.
#![expect(unsafe_code, reason = "sets the length of a vector whose room it filled")]

use std::mem::MaybeUninit;

use crate::buffers::{Buffers, Segment, Span};
use crate::cells::{Descriptor, Descriptors};
use crate::map::Entry;
use crate::num::{index, wide};
use crate::table::Table;
use crate::view::View;

/// The most bytes of a request (virtio 1.3 §2.6.4).
const MOST_BYTES: u64 = 1 << 32;

impl View {
    /// Fills `to` with the buffers of the chain of descriptors in `ring` that starts at `head` and has at most `most` of
    /// them. Returns the pieces. `None`: not a usual request, and `to` holds nothing of use.
    #[inline(always)]
    pub fn gather_usual(
        &self,
        ring: &Descriptors,
        head: u16,
        most: u16,
        indirect: bool,
        to: &mut Buffers,
    ) -> Option<usize> {
        to.recycle(self);
        to.list.clear();
        let mut entry = self.last();
        let mut table = ring.table();
        let mut descriptor = table.get(head)?;
        if descriptor.flags & Descriptor::INDIRECT != 0 {
            if !indirect || descriptor.flags & Descriptor::NEXT != 0 || descriptor.len % 16 != 0 {
                return None;
            }
            let count = u16::try_from(descriptor.len / 16).ok().filter(|&count| count <= most)?;
            table = Table::new(
                self.usual_place(&mut entry, descriptor.addr, u64::from(descriptor.len))?,
                count,
            );
            descriptor = table.get(0)?;
        }
        let mut phase = 0;
        let mut bytes = 0;
        let mut used = 0;
        let mut seam = (0, 0);
        let room: &mut [MaybeUninit<Segment>] = to.list.spare_capacity_mut();
        for slot in room {
            let kind = descriptor.flags & (Descriptor::INDIRECT | Descriptor::WRITE);
            if kind != phase {
                if kind != Descriptor::WRITE {
                    return None;
                }
                phase = kind;
                seam = (used, bytes);
            }
            if descriptor.len == 0 {
                return None;
            }
            let len = u64::from(descriptor.len);
            let base = self.usual_place(&mut entry, descriptor.addr, len)?;
            slot.write(Segment { base, len: index(len) });
            used += 1;
            bytes += len;
            if descriptor.flags & Descriptor::NEXT == 0 {
                if phase == 0 {
                    seam = (used, bytes);
                }
                return (used <= usize::from(most) && bytes <= MOST_BYTES)
                    .then(|| finish(to, used, bytes, seam));
            }
            descriptor = table.get(descriptor.next)?;
        }
        None
    }

    /// Where a range of one region lies in this process.
    #[inline(always)]
    fn usual_place(&self, entry: &mut Entry, guest: u64, len: u64) -> Option<*mut u8> {
        if let Some(host) = entry.translate(guest, len) {
            return Some(host);
        }
        *entry = self.search_slot(guest)?;
        entry.translate(guest, len)
    }
}

/// `used` places of the list are filled, with `bytes` in all; `seam` is where the writable ones begin.
#[inline(always)]
fn finish(to: &mut Buffers, used: usize, bytes: u64, seam: (usize, u64)) -> usize {
    debug_assert!(wide(used) <= bytes, "no piece is empty");
    // SAFETY: the first `used` places of the room were written.
    unsafe { to.list.set_len(used) };
    to.readable = Span::new(0, seam.0);
    to.writable = Span::new(seam.0, used);
    to.tail = Span::default();
    to.room = bytes - seam.1;
    used
}
