//! The usual request, gathered in one go: the same as [`Gather`](crate::Gather) and the rules of the queue make of it,
//! in a loop that calls nothing and lives in registers.
//!
//! Usual is a chain of the ring's own table, or one whose head is an indirect table in one region, of buffers in one
//! region each, for which the list has room. Anything else, good or bad, is left to the careful way; a test
//! holds that both ways agree.
#![expect(unsafe_code, reason = "tells the list how much of its room was filled")]

use std::ptr;

use crate::buffers::{Buffers, Segment};
use crate::cells::{Descriptor, Descriptors};
use crate::map::Slots;
use crate::num::index;
use crate::table::Table;
use crate::view::View;

/// The most bytes of a request (virtio 1.3 §2.6.4).
const MOST_BYTES: u64 = 1 << 32;

const NEXT: u16 = Descriptor::NEXT;
const WRITE: u16 = Descriptor::WRITE;
const INDIRECT: u16 = Descriptor::INDIRECT;

/// What is legal in a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Most descriptors of a chain.
    pub most: u16,
    /// Whether there may be an indirect table.
    pub indirect: bool,
}

impl View {
    /// Fills `to` with the buffers of the chain of descriptors in `ring` that starts at `head`. Returns the
    /// pieces. `None`: not a usual request; what `to` holds is of no use.
    #[inline(always)]
    pub fn gather_usual(
        &self,
        ring: &Descriptors,
        head: u16,
        rules: &Rules,
        to: &mut Buffers,
    ) -> Option<usize> {
        to.recycle(self);
        let slots = self.memory().slots();
        let mut table = ring.table();
        let mut at = head;
        let mut inside = false;
        let room = to.room_for_pieces();
        let start = room.as_ptr().addr();
        // A round for each table.
        'table: loop {
            let mut entry = table.entry(at)?;
            // WRITE once the writable buffers have begun, at `seam`.
            let mut phase = 0;
            let mut seam = (0, 0);
            let mut bytes = 0_u64;
            for slot in room.iter_mut() {
                let used = (ptr::from_ref(slot).addr() - start) / size_of::<Segment>();
                let flags = entry.flags();
                let len = u64::from(entry.len());
                let addr = entry.addr();
                if flags & (INDIRECT | WRITE) != phase {
                    if flags & INDIRECT != 0 {
                        if used != 0 || inside {
                            return None;
                        }
                        table = usual_table(rules, slots, flags, addr, len)?;
                        (at, inside) = (0, true);
                        continue 'table;
                    }
                    if phase != 0 {
                        return None;
                    }
                    phase = WRITE;
                    seam = (used, bytes);
                }
                let base = slots.find(addr)?.translate(addr, len)?;
                slot.write(Segment { base, len: index(len) });
                bytes += len;
                if flags & NEXT == 0 {
                    let used = used + 1;
                    if used > usize::from(rules.most) || bytes > MOST_BYTES {
                        return None;
                    }
                    let (readable, readable_bytes) = if phase == 0 { (used, bytes) } else { seam };
                    // SAFETY: `used` places of the room were written, `readable` is at most that.
                    unsafe { to.set(readable, used, bytes - readable_bytes) };
                    return Some(used);
                }
                entry = table.entry(entry.next())?;
            }
            return None;
        }
    }
}

/// The indirect table of a descriptor with these flags, when it lies in one region.
#[inline(always)]
fn usual_table<'a>(
    rules: &Rules,
    slots: Slots<'_>,
    flags: u16,
    addr: u64,
    len: u64,
) -> Option<Table<'a>> {
    if !rules.indirect || flags & NEXT != 0 || !len.is_multiple_of(16) {
        return None;
    }
    let count = u16::try_from(len / 16).ok().filter(|&count| count <= rules.most)?;
    Some(Table::new(slots.find(addr)?.translate(addr, len)?, count))
}
