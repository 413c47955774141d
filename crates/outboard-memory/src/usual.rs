//! The usual request, gathered in one go: the same as [`Gather`](crate::Gather) and the rules of the queue make of it,
//! in two loops, for what is readable and for what is writable, that call nothing and live in registers.
//!
//! Usual is a chain of the ring's own table, or one whose head is an indirect table in one region, of buffers in one
//! region each, for which the list has room. Anything else, good or bad, is left to the careful way; a test
//! holds that both ways agree. The usual request of a packed ring is the same with other [`Steps`] (`packed`).
#![expect(unsafe_code, reason = "tells the list how much of its room was filled")]

use crate::buffers::{Buffers, PIECE, Room, Segment};
use crate::cells::{Descriptor, Descriptors};
use crate::map::Slots;
use crate::num::index;
use crate::table::{Entry, Table};
use crate::view::View;

const NEXT: u16 = Descriptor::NEXT;
pub(crate) const WRITE: u16 = Descriptor::WRITE;
pub(crate) const INDIRECT: u16 = Descriptor::INDIRECT;

/// What is legal in a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Most descriptors of a chain.
    pub most: u16,
    /// Whether there may be an indirect table.
    pub indirect: bool,
}

/// The descriptors of a request, one after the other. Each of its reads is called once for a descriptor.
pub(crate) trait Steps {
    /// Flags that must be clear, beside [`WRITE`] where the device does not write.
    const WRONG: u16;

    /// Guest address of the buffer.
    fn addr(&self) -> u64;

    /// Bytes of the buffer.
    fn len(&self) -> u32;

    /// Whether another one follows the present one, which has these flags.
    fn goes_on(&self, flags: u16) -> bool;

    /// Goes to the next one. Returns its flags; `None`: there is no such descriptor.
    fn step(&mut self) -> Option<u16>;

    /// The writable ones begin. Takes and gives the flags of the present one, as they are to be looked at from now on.
    #[inline(always)]
    fn turn(&mut self, flags: u16) -> u16 {
        flags
    }

    /// Whether these flags, looked at after the [`turn`](Self::turn), are those of a writable one.
    #[inline(always)]
    fn may_write(flags: u16) -> bool {
        (flags ^ WRITE) & (Self::WRONG | WRITE) == 0
    }
}

/// What the pieces of a request are made of.
struct Filling<'a> {
    slots: Slots<'a>,
    room: Room<'a>,
    bytes: u64,
}

impl Filling<'_> {
    /// One more buffer. `None`: it is not usual.
    #[inline(always)]
    fn push(&mut self, steps: &impl Steps) -> Option<()> {
        let len = u64::from(steps.len());
        let addr = steps.addr();
        let base = self.slots.find(addr).translate(addr, len)?;
        self.room.push(Segment { base, len: index(len) })?;
        self.bytes += len;
        Some(())
    }
}

/// The pieces of a request in its list.
pub(crate) struct Filled {
    /// Bytes of the list, whole pieces: those of readable ones, and of all.
    readable: usize,
    used: usize,
    /// Bytes of guest memory that may be written.
    room: u64,
}

impl Filled {
    /// Pieces.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "at most as many as `Rules::most` says")]
    pub(crate) fn pieces(&self) -> u16 {
        (self.used / PIECE) as u16
    }

    /// Tells the list.
    #[inline(always)]
    pub(crate) fn tell(self, to: &mut Buffers) {
        // SAFETY: made by `fill` of the room of this list, which wrote `used` bytes of it; `readable` is what it had
        // written earlier.
        unsafe { to.set(self.readable, self.used, self.room) };
    }
}

/// Fills `room`, from the present descriptor of `steps` on, which has `flags`. `None`: not usual.
#[inline(always)]
pub(crate) fn fill<S: Steps>(
    slots: Slots<'_>,
    steps: &mut S,
    flags: u16,
    room: Room<'_>,
) -> Option<Filled> {
    let wrong = S::WRONG | WRITE;
    let mut filling = Filling { slots, room, bytes: 0 };
    let mut flags = flags;
    while flags & wrong == 0 {
        filling.push(steps)?;
        if !steps.goes_on(flags) {
            let used = filling.room.used();
            return few(filling.bytes).then_some(Filled { readable: used, used, room: 0 });
        }
        flags = steps.step()?;
    }
    let (readable, bytes) = (filling.room.used(), filling.bytes);
    filling.bytes = 0;
    flags = steps.turn(flags);
    loop {
        if !S::may_write(flags) {
            return None;
        }
        filling.push(steps)?;
        if !steps.goes_on(flags) {
            break;
        }
        flags = steps.step()?;
    }
    let room = filling.bytes;
    few(bytes + room).then_some(Filled { readable, used: filling.room.used(), room })
}

/// Whether a request may have so many bytes (virtio 1.3 §2.6.4).
#[inline(always)]
fn few(bytes: u64) -> bool {
    bytes <= 1 << 32
}

/// A walk along `next`.
struct Linked<'a> {
    table: Table<'a>,
    entry: Entry<'a>,
}

impl Steps for Linked<'_> {
    const WRONG: u16 = INDIRECT;

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
        self.entry = self.table.entry(self.entry.next())?;
        Some(self.entry.flags())
    }
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
        let mut entry = table.entry(head)?;
        let mut flags = entry.flags();
        if flags & INDIRECT != 0 {
            if flags & NEXT != 0 {
                return None;
            }
            table = usual_table(rules, slots, entry.addr(), entry.len())?;
            entry = table.entry(0)?;
            flags = entry.flags();
        }
        let room = to.room_for_pieces(rules.most);
        let filled = fill(slots, &mut Linked { table, entry }, flags, room)?;
        filled.tell(to);
        Some(to.pieces())
    }
}

/// The indirect table of a descriptor, when it lies in one region.
#[inline(always)]
pub(crate) fn usual_table<'a>(
    rules: &Rules,
    slots: Slots<'_>,
    addr: u64,
    len: u32,
) -> Option<Table<'a>> {
    let count = len / 16;
    if !rules.indirect || !len.is_multiple_of(16) || count > u32::from(rules.most) {
        return None;
    }
    let host = slots.find(addr).translate(addr, u64::from(len))?;
    #[expect(clippy::cast_possible_truncation, reason = "at most as many as `Rules::most` says")]
    let count = count as u16;
    Some(Table::new(host, count))
}
