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
    /// Most descriptors of an indirect table.
    pub most: u16,
    /// Whether there may be an indirect table.
    pub indirect: bool,
}

/// The descriptors of a request, one after the other. A place is that of the piece of a descriptor in the list, in bytes.
/// Each of its reads is called once for a descriptor.
pub(crate) trait Steps {
    /// Flags that must be clear, beside [`WRITE`] where the device does not write.
    const WRONG: u16;

    /// Guest address of the buffer of the present one.
    ///
    /// # Safety
    /// Its piece is at `at`, below the limit of the room that [`fill`] was given.
    unsafe fn addr(&self, at: usize) -> u64;

    /// Bytes of the buffer of the present one.
    ///
    /// # Safety
    /// As for [`addr`](Self::addr).
    unsafe fn len(&self, at: usize) -> u32;

    /// Whether the one at `next` follows the present one, which has these flags.
    fn goes_on(&self, flags: u16, next: usize) -> bool;

    /// Goes to the one at `at`. Returns its flags; `None`: there is no such descriptor.
    ///
    /// # Safety
    /// `at` is below the limit of the room that [`fill`] was given.
    unsafe fn step(&mut self, at: usize) -> Option<u16>;

    /// The writable ones begin. Takes and gives the flags of the present one, as they are to be looked at from now on.
    fn turn(&mut self, flags: u16) -> u16;
}

/// What the pieces of a request are made of.
struct Filling<'a, S> {
    slots: Slots<'a>,
    room: Room<'a>,
    steps: S,
    /// The present descriptor's flags, and the place of its piece. Invariant: below the limit of the room.
    flags: u16,
    at: usize,
}

/// Where a run of descriptors of one direction ends.
enum End {
    /// With the request.
    Request,
    /// With a descriptor whose flags are not those of this direction.
    Run,
}

impl<S: Steps> Filling<'_, S> {
    /// One piece for each descriptor, from the present one on, of one direction. Returns the bytes of their buffers, the place
    /// behind the last piece in `at`. `None`: something is not usual.
    #[inline(always)]
    fn run(&mut self) -> Option<(u64, End)> {
        let mut bytes = 0;
        loop {
            // SAFETY: the invariant of `at`.
            let len = u64::from(unsafe { self.steps.len(self.at) });
            // SAFETY: likewise.
            let addr = unsafe { self.steps.addr(self.at) };
            let base = self.slots.find(addr).translate_buffer(addr, len)?;
            // SAFETY: likewise.
            unsafe { self.room.put(self.at, Segment { base, len: index(len) }) };
            bytes += len;
            self.at += PIECE;
            if !self.steps.goes_on(self.flags, self.at) {
                return Some((bytes, End::Request));
            }
            if self.at >= self.room.limit() {
                return None;
            }
            // SAFETY: below the limit, as was asked just now.
            self.flags = unsafe { self.steps.step(self.at) }?;
            if self.flags & (S::WRONG | WRITE) != 0 {
                return Some((bytes, End::Run));
            }
        }
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
    #[expect(clippy::cast_possible_truncation, reason = "at most 65,535 pieces, see `Buffers`")]
    pub(crate) fn pieces(&self) -> u16 {
        (self.used / PIECE) as u16
    }

    /// Bytes of the list.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "at most 65,535 pieces, see `Buffers`")]
    pub(crate) fn bytes(&self) -> u32 {
        self.used as u32
    }

    /// Where the last piece is.
    #[inline(always)]
    pub(crate) fn last(&self) -> usize {
        self.used - PIECE
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
///
/// # Safety
/// The steps may be taken as far as the limit of the room reaches.
#[inline(always)]
pub(crate) unsafe fn fill<S: Steps>(
    slots: Slots<'_>,
    steps: S,
    flags: u16,
    room: Room<'_>,
) -> Option<Filled> {
    if room.limit() == 0 {
        return None;
    }
    let mut filling = Filling { slots, room, steps, flags, at: 0 };
    let mut bytes = 0;
    if flags & (S::WRONG | WRITE) == 0 {
        let end;
        (bytes, end) = filling.run()?;
        if let End::Request = end {
            return few(bytes).then_some(Filled {
                readable: filling.at,
                used: filling.at,
                room: 0,
            });
        }
    }
    let readable = filling.at;
    filling.flags = filling.steps.turn(filling.flags);
    if filling.flags & (S::WRONG | WRITE) != 0 {
        return None;
    }
    let (room, end) = filling.run()?;
    let usual = matches!(end, End::Request) && few(bytes + room);
    usual.then_some(Filled { readable, used: filling.at, room })
}

/// Whether a request may have so many bytes (virtio 1.3 §2.6.4). One that has all of 2^32 is left to the careful way.
#[inline(always)]
fn few(bytes: u64) -> bool {
    bytes >> 32 == 0
}

/// A walk along `next`. What it gives as flags has WRITE turned round where it has to be set.
struct Linked<'a> {
    table: Table<'a>,
    entry: Entry<'a>,
    wanted: u16,
}

impl Steps for Linked<'_> {
    const WRONG: u16 = INDIRECT;

    #[inline(always)]
    unsafe fn addr(&self, _: usize) -> u64 {
        self.entry.addr()
    }

    #[inline(always)]
    unsafe fn len(&self, _: usize) -> u32 {
        self.entry.len()
    }

    #[inline(always)]
    fn goes_on(&self, flags: u16, _: usize) -> bool {
        flags & NEXT != 0
    }

    #[inline(always)]
    unsafe fn step(&mut self, _: usize) -> Option<u16> {
        self.entry = self.table.entry(self.entry.next())?;
        Some(self.entry.flags() ^ self.wanted)
    }

    #[inline(always)]
    fn turn(&mut self, flags: u16) -> u16 {
        self.wanted = WRITE;
        flags ^ WRITE
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
        let room = to.room_for_pieces();
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
        // SAFETY: these steps look for themselves where they are.
        let filled = unsafe { fill(slots, Linked { table, entry, wanted: 0 }, flags, room) }?;
        let pieces = usize::from(filled.pieces());
        filled.tell(to);
        Some(pieces)
    }
}

/// The indirect table of a descriptor, when it lies in one region.
#[inline(always)]
fn usual_table<'a>(rules: &Rules, slots: Slots<'_>, addr: u64, len: u32) -> Option<Table<'a>> {
    let count = len / 16;
    if !rules.indirect || !len.is_multiple_of(16) || count > u32::from(rules.most) {
        return None;
    }
    let host = slots.find(addr).translate(addr, u64::from(len))?;
    #[expect(clippy::cast_possible_truncation, reason = "at most as many as `Rules::most` says")]
    let count = count as u16;
    Some(Table::new(host, count))
}
