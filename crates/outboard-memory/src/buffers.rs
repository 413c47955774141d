//! The buffers of one request: pieces of guest memory, taken from the front as they are read or written.
//!
//! ```text
//!  list  [header 16][data 4096][data 512][status 1]
//!        └ readable ┘└───── writable ────┘└ tail ─┘     a span each: next piece, end
//! ```
//! A piece is laid out like `struct iovec`, so that a span goes to `preadv` or io_uring as it stands. The list holds
//! the guest memory its pieces point into. What was read is gone from its span: nothing is read twice.
#![expect(unsafe_code, reason = "the room of a vector; pieces that may be sent to other threads")]

use std::fmt;
use std::marker::PhantomData;
use std::slice;
use std::sync::Arc;

use crate::cursor::Cursor;
use crate::map::GuestMemory;
use crate::num::{index, wide};
use crate::view::View;

/// The most pieces of one request. A legal chain has at most 32,768 descriptors, each in one region or across the seam
/// of two; what is beyond this bound was made to use up memory.
pub(crate) const MOST_PIECES: usize = 2 * 32_768 + 1024;

/// A piece of guest memory in this process: an address and a length, laid out like `struct iovec`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Segment {
    pub(crate) base: *mut u8,
    pub(crate) len: usize,
}

const _: () = assert!(size_of::<Segment>() == size_of::<libc::iovec>());
const _: () =
    assert!(std::mem::offset_of!(Segment, base) == std::mem::offset_of!(libc::iovec, iov_base));
const _: () =
    assert!(std::mem::offset_of!(Segment, len) == std::mem::offset_of!(libc::iovec, iov_len));

// SAFETY: an address and a length; only the owner of the guest memory behind it can use it, by unsafe code.
unsafe impl Send for Segment {}
// SAFETY: likewise.
unsafe impl Sync for Segment {}

impl Segment {
    /// Address of the first byte. Valid while the [`Buffers`] it came from are alive; the guest may change what is
    /// there at any time, so no reference to it may be made.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base
    }

    /// Bytes, possibly 0.
    #[expect(clippy::len_without_is_empty, reason = "a length of 0 is nothing special")]
    pub fn len(&self) -> usize {
        self.len
    }

    #[inline(always)]
    pub(crate) fn advance(&mut self, n: usize) {
        self.base = self.base.wrapping_add(n);
        self.len -= n;
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}+{:#x}", self.base, self.len)
    }
}

/// A run of pieces: those from `next` to `end` of the list are left; both in bytes of the list. Invariant, for each span of
/// [`Buffers`], at all times that anything but this crate's filling of them can see: `next <= end`, `end` is inside the
/// list, and both are whole pieces.
#[derive(Clone, Copy, Default)]
pub(crate) struct Span {
    pub(crate) next: u32,
    pub(crate) end: u32,
}

/// Bytes of a piece in the list.
pub(crate) const PIECE: usize = size_of::<Segment>();
/// The same, as a step of a span.
pub(crate) const SPAN_STEP: u32 = 16;
const _: () = assert!(PIECE == 16);

impl Span {
    /// Pieces `next..end`; a list has at most [`MOST_PIECES`], and a tail of no more.
    #[inline(always)]
    pub(crate) fn new(next: usize, end: usize) -> Self {
        Self::of_bytes(next * PIECE, end * PIECE)
    }

    /// The same, said in bytes of the list.
    #[inline(always)]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "places in a list of at most 2 * MOST_PIECES pieces, which is 2 MiB"
    )]
    fn of_bytes(next: usize, end: usize) -> Self {
        Self { next: next as u32, end: end as u32 }
    }

    #[inline(always)]
    pub(crate) fn end(self) -> usize {
        self.end as usize / PIECE
    }

    #[inline(always)]
    fn next(self) -> usize {
        self.next as usize / PIECE
    }
}

/// The room of a list for pieces, by their places in bytes. What is in it is of no use before [`Buffers::set`].
#[derive(Clone, Copy)]
pub(crate) struct Room<'a> {
    first: *mut Segment,
    /// Bytes that may be filled: whole pieces, inside the allocation.
    limit: usize,
    list: PhantomData<&'a mut Vec<Segment>>,
}

impl Room<'_> {
    /// Bytes that may be filled.
    #[inline(always)]
    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// The same room up to `limit`, a multiple of 16, at most.
    #[inline(always)]
    pub(crate) fn up_to(self, limit: usize) -> Self {
        Self { limit: self.limit.min(limit), ..self }
    }

    /// The piece at `at`.
    ///
    /// # Safety
    /// `at` is a multiple of 16, below [`limit`](Self::limit).
    #[inline(always)]
    pub(crate) unsafe fn put(&self, at: usize, piece: Segment) {
        let place = self.first.wrapping_byte_add(at);
        // SAFETY: a whole piece of the allocation of the list, which is borrowed, by the caller's promise.
        unsafe { place.write(piece) };
    }
}

/// What one request reads, what it writes, and the tail of what it writes. Filled by
/// [`View::gather`](crate::View::gather), used again for request after request.
pub struct Buffers {
    /// Invariant: the pieces of a span lie in regions of `memory`. A request that was gathered quickly leaves the vector's
    /// length as it was: what counts is what the spans name, all of it written and inside the allocation.
    pub(crate) list: Vec<Segment>,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) readable: Span,
    pub(crate) writable: Span,
    pub(crate) tail: Span,
    /// Writable bytes at first, without the tail.
    pub(crate) room: u64,
    /// Bytes of the list that a quick gathering may fill: whole pieces, inside the allocation, at most `most`.
    limit: u32,
    /// The most pieces of a quick gathering.
    most: u16,
    /// The copy of an indirect table that lies across regions.
    pub(crate) scratch: Vec<u8>,
}

impl Buffers {
    /// No buffers, in the memory of this view, for requests of any number of pieces.
    pub fn new(view: &View) -> Self {
        Self::for_requests(view, u16::MAX)
    }

    /// No buffers, in the memory of this view. Requests of more than `most` pieces are not gathered quickly.
    pub fn for_requests(view: &View, most: u16) -> Self {
        Self {
            list: Vec::new(),
            memory: Arc::clone(view.memory()),
            readable: Span::default(),
            writable: Span::default(),
            tail: Span::default(),
            room: 0,
            limit: 0,
            most,
            scratch: Vec::new(),
        }
    }

    /// The list may have grown.
    pub(crate) fn measure(&mut self) {
        let pieces = u16::try_from(self.list.capacity()).unwrap_or(u16::MAX).min(self.most);
        self.limit = u32::from(pieces) * SPAN_STEP;
    }

    /// Room for as many pieces as the list has place for, and as may be gathered quickly.
    #[inline(always)]
    pub(crate) fn room_for_pieces(&mut self) -> Room<'_> {
        let limit = self.limit as usize;
        Room { first: self.list.as_mut_ptr(), limit, list: PhantomData }
    }

    /// The first `used` bytes of the list are the request: `readable` of them, then the writable pieces, which have `room`
    /// bytes.
    ///
    /// # Safety
    /// The places were written through [`Room`], both are whole pieces, and `readable <= used`.
    #[inline(always)]
    pub(crate) unsafe fn set(&mut self, readable: usize, used: usize, room: u64) {
        self.readable = Span::of_bytes(0, readable);
        self.writable = Span::of_bytes(readable, used);
        self.tail = Span::default();
        self.room = room;
    }

    /// The bytes to read that are left.
    #[inline(always)]
    pub fn readable(&mut self) -> Cursor<'_> {
        // SAFETY: the invariant of spans.
        unsafe { Cursor::new(self.list.as_mut_ptr(), &mut self.readable) }
    }

    /// The room to write that is left, without the tail.
    #[inline(always)]
    pub fn writable(&mut self) -> Cursor<'_> {
        // SAFETY: the invariant of spans.
        unsafe { Cursor::new(self.list.as_mut_ptr(), &mut self.writable) }
    }

    /// The tail that is left.
    #[inline(always)]
    pub fn tail(&mut self) -> Cursor<'_> {
        // SAFETY: the invariant of spans.
        unsafe { Cursor::new(self.list.as_mut_ptr(), &mut self.tail) }
    }

    /// Both at once.
    pub fn both(&mut self) -> (Cursor<'_>, Cursor<'_>) {
        let list = self.list.as_mut_ptr();
        // SAFETY: the invariant of spans; the two have no piece in common.
        let readable = unsafe { Cursor::new(list, &mut self.readable) };
        // SAFETY: likewise.
        let writable = unsafe { Cursor::new(list, &mut self.writable) };
        (readable, writable)
    }

    /// Appends the guest-physical ranges of the room that is left to `to`, a range for each piece. A piece that is in
    /// no region, which cannot be, is left out.
    pub fn writable_ranges(&self, to: &mut Vec<(u64, u64)>) {
        to.extend(
            self.pieces_of(self.writable).iter().filter_map(|piece| {
                Some((self.memory.host_to_guest(piece.base)?, wide(piece.len)))
            }),
        );
    }

    /// Pieces in all.
    #[inline]
    pub fn pieces(&self) -> usize {
        self.readable.end().max(self.writable.end()).max(self.tail.end())
    }

    /// Whether the list has grown beyond this many pieces, be they of use or not.
    #[inline]
    pub fn has_more_than(&self, pieces: usize) -> bool {
        self.list.capacity() > pieces
    }

    /// Whether there are bytes to read and never were any to write: that nothing was written says nothing then. False, too,
    /// of buffers that were [shrunk](Self::shrink).
    pub fn takes_nothing(&self) -> bool {
        self.room == 0 && self.tail.end == 0 && self.readable.end > 0
    }

    fn pieces_of(&self, span: Span) -> &[Segment] {
        let Span { next, end } = span;
        let first = self.list.as_ptr().wrapping_byte_add(next as usize);
        // SAFETY: the invariant of spans; the pieces are borrowed with `self`.
        unsafe { slice::from_raw_parts(first, (end - next) as usize / PIECE) }
    }

    /// Bytes of room at first, without the tail.
    #[inline(always)]
    pub fn room(&self) -> u64 {
        self.room
    }

    /// Moves the last `count` bytes of the room to the tail, in place of what that held. `None`, and nothing moved,
    /// when there are fewer.
    #[inline(always)]
    pub fn split_tail(&mut self, count: u64) -> Option<()> {
        let Span { next, end } = self.writable;
        let last = self.list.as_ptr().wrapping_byte_add(end as usize).wrapping_sub(1);
        // SAFETY: `next < end`, so that a piece of the list ends there.
        if next < end && wide(unsafe { (*last).len }) == count {
            // The usual case: the last descriptor is the status.
            self.tail = Span { next: end - SPAN_STEP, end };
            self.writable.end = end - SPAN_STEP;
        } else {
            self.split_tail_slowly(count)?;
        }
        self.room -= count;
        Some(())
    }

    /// The tail begins inside a piece or holds several: it gets pieces of its own behind all others.
    #[inline(never)]
    fn split_tail_slowly(&mut self, count: u64) -> Option<()> {
        if self.writable().len() < count {
            return None;
        }
        let filled = self.pieces();
        // SAFETY: the spans name pieces of the list, and no piece in front of one of these was left unwritten.
        unsafe { self.list.set_len(filled) };
        let end = self.writable.end();
        let mut first = end;
        let mut over = count;
        // `over` bytes are still to come from in front of `first`.
        while over > 0
            && let Some(piece) = first.checked_sub(1).and_then(|at| self.list.get(at))
        {
            first -= 1;
            if wide(piece.len) > over {
                break;
            }
            over -= wide(piece.len);
        }
        let next = self.list.len();
        let mut whole = first;
        if over > 0
            && let Some(piece) = self.list.get_mut(first)
        {
            let part = index(over);
            piece.len -= part;
            let cut = Segment { base: piece.base.wrapping_add(piece.len), len: part };
            self.list.push(cut);
            whole += 1;
        }
        self.list.extend_from_within(whole..end);
        self.writable = Span::new(self.writable.next(), whole);
        self.tail = Span::new(next, self.list.len());
        Some(())
    }

    /// Forgets what is left and frees the room for pieces that a long request took.
    pub fn shrink(&mut self) {
        (self.readable, self.writable, self.tail) = Default::default();
        (self.list, self.scratch) = Default::default();
        self.room = 0;
        self.measure();
    }

    /// Lets go of guest memory that is not the one of `view`, and of the buffers with it.
    #[inline(always)]
    pub fn recycle(&mut self, view: &View) {
        if !Arc::ptr_eq(&self.memory, view.memory()) {
            self.replace(view);
        }
    }

    #[cold]
    fn replace(&mut self, view: &View) {
        *self = Self::for_requests(view, self.most);
    }
}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pieces = |span| self.pieces_of(span);
        f.debug_struct("Buffers")
            .field("readable", &pieces(self.readable))
            .field("writable", &pieces(self.writable))
            .field("tail", &pieces(self.tail))
            .finish()
    }
}
