//! Copies by value between this process and a run of pieces, from the front.
//!
//! The usual request has one piece for one value: that case is inline, what crosses pieces is not. Everything is done
//! whole or not at all.
#![expect(unsafe_code, reason = "copies to and from the pieces")]

use std::fmt;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::slice;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::buffers::{PIECE, SPAN_STEP, Segment, Span};
use crate::copy;
use crate::num::{index, wide};

/// A run of pieces of a request, consumed from the front.
pub struct Cursor<'a> {
    /// The list the span is in; other cursors may be on other spans of it. Only pieces of the span are touched. They lie
    /// in memory that the buffers, which are borrowed, keep mapped.
    list: *mut Segment,
    span: &'a mut Span,
    buffers: PhantomData<&'a mut [Segment]>,
}

// SAFETY: stands for a mutable borrow of pieces, which may be sent.
unsafe impl Send for Cursor<'_> {}

impl<'a> Cursor<'a> {
    /// The pieces of `span` in `list`.
    ///
    /// # Safety
    /// The pieces of the span, `next..end` in bytes, are in the list, borrowed mutably for `'a` by this cursor alone, and lie in
    /// memory that stays mapped.
    #[inline(always)]
    pub(crate) unsafe fn new(list: *mut Segment, span: &'a mut Span) -> Self {
        Self { list, span, buffers: PhantomData }
    }

    /// Bytes left. Adds the pieces up.
    #[inline]
    pub fn len(&self) -> u64 {
        self.segments().iter().map(|piece| wide(piece.len)).sum()
    }

    /// Whether nothing is left.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.segments().iter().all(|piece| piece.len == 0)
    }

    /// The pieces that are left.
    #[inline(always)]
    pub fn segments(&self) -> &[Segment] {
        let Span { next, end } = *self.span;
        let first = self.list.wrapping_byte_add(next as usize);
        // SAFETY: the pieces of the span, which this cursor borrows.
        unsafe { slice::from_raw_parts(first, (end - next) as usize / PIECE) }
    }

    /// Where `len` bytes of the first piece lie, when it has them. They are dropped; read them now.
    #[inline(always)]
    fn spend(&mut self, len: usize) -> Option<*mut u8> {
        let Span { next, end } = *self.span;
        if next >= end {
            return None;
        }
        // SAFETY: `next < end`: a piece of the span, which this cursor borrows.
        let first = unsafe { &mut *self.list.wrapping_byte_add(next as usize) };
        if first.len != len {
            return spend_part(first, len);
        }
        self.span.next = next + SPAN_STEP;
        Some(first.base)
    }

    /// Copies a value out and drops its bytes; `None`, and nothing dropped, when there are too few.
    #[inline(always)]
    pub fn read_obj<T: FromBytes>(&mut self) -> Option<T> {
        let mut value = MaybeUninit::<T>::uninit();
        // SAFETY: `value` has room for its size.
        unsafe { self.copy_to(value.as_mut_ptr().cast::<u8>(), size_of::<T>()) }?;
        // SAFETY: all bytes were written just now, and any bytes are a valid `T`.
        Some(unsafe { value.assume_init() })
    }

    /// Copies bytes out and drops them; `None`, and nothing dropped, when there are too few.
    #[inline]
    pub fn read_exact(&mut self, to: &mut [u8]) -> Option<()> {
        // SAFETY: `to` has room for its length.
        unsafe { self.copy_to(to.as_mut_ptr(), to.len()) }
    }

    /// Copies a value in; `None`, and nothing written, when there is too little room.
    #[inline(always)]
    pub fn write_obj<T: IntoBytes + Immutable + ?Sized>(&mut self, value: &T) -> Option<()> {
        self.write_all(value.as_bytes())
    }

    /// Copies bytes in; `None`, and nothing written, when there is too little room.
    #[inline(always)]
    pub fn write_all(&mut self, from: &[u8]) -> Option<()> {
        let len = from.len();
        if let Some(to) = self.spend(len) {
            // SAFETY: `len` bytes of a piece, which lies in a live mapping.
            unsafe { copy::copy_out(from.as_ptr(), to, len) };
            return Some(());
        }
        // SAFETY: the parts of this cursor.
        unsafe { write_slowly(self.list, self.span, from) }
    }

    /// Copies bytes in, as many as there is room for, and leaves the cursor where it is. Returns how many.
    pub fn place(&mut self, from: &[u8]) -> usize {
        let mut done = 0;
        for piece in self.segments() {
            let rest = from.get(done..).unwrap_or_default();
            let len = rest.len().min(piece.len);
            // SAFETY: `len` bytes of a piece, which lies in a live mapping.
            unsafe { copy::copy_out(rest.as_ptr(), piece.base, len) };
            done += len;
        }
        done
    }

    /// Writes zeros; `None`, and nothing written, when there is too little room.
    pub fn fill_zero(&mut self, count: u64) -> Option<()> {
        self.each_piece(count, |to, len| {
            // SAFETY: `each_piece` hands out pieces of live mappings.
            unsafe { copy::zero(to, len) };
        })
    }

    /// Drops bytes from the front; `None`, and nothing dropped, when there are too few.
    pub fn advance(&mut self, count: u64) -> Option<()> {
        self.each_piece(count, |_, _| ())
    }

    /// Drops everything.
    #[inline(always)]
    pub fn spend_all(&mut self) {
        self.span.next = self.span.end;
    }

    /// Copies `len` bytes to `to` and drops them.
    ///
    /// # Safety
    /// `to` is writable for `len` bytes and is no guest memory.
    #[inline(always)]
    unsafe fn copy_to(&mut self, to: *mut u8, len: usize) -> Option<()> {
        if let Some(from) = self.spend(len) {
            // SAFETY: `len` bytes of a piece, which lies in a live mapping; `to` by the caller's promise.
            unsafe { copy::copy_in(from, to, len) };
            return Some(());
        }
        // SAFETY: the caller's promise, and the parts of this cursor.
        unsafe { read_slowly(self.list, self.span, to, len) }
    }

    /// Takes `count` bytes from the front, piece by piece; `None`, and nothing taken, when there are too few.
    fn each_piece(&mut self, count: u64, mut with: impl FnMut(*mut u8, usize)) -> Option<()> {
        if self.len() < count {
            return None;
        }
        let mut count = count;
        while count > 0
            && let Some(first) = self.segments().first()
        {
            let part = index(count.min(wide(first.len)));
            with(self.spend(part)?, part);
            count -= wide(part);
        }
        Some(())
    }
}

/// Where the first `len` bytes of a piece of another length lie, when it has them. They are dropped. (Out of line, so
/// that the usual case is one comparison.)
#[cold]
#[inline(never)]
fn spend_part(piece: &mut Segment, len: usize) -> Option<*mut u8> {
    let base = piece.base;
    (piece.len > len).then(|| {
        piece.advance(len);
        base
    })
}

/// A write across pieces. (The parts of the cursor go one by one, so that the caller's stays in registers.)
///
/// # Safety
/// As for `Cursor::new`.
#[inline(never)]
unsafe fn write_slowly(list: *mut Segment, span: &mut Span, from: &[u8]) -> Option<()> {
    // SAFETY: the caller's promise.
    let mut cursor = unsafe { Cursor::new(list, span) };
    let mut from_at = from.as_ptr();
    cursor.each_piece(wide(from.len()), |to, len| {
        // SAFETY: `each_piece` hands out `from.len()` bytes in all, each piece in a live mapping; `from_at` moves along
        // by the same lengths.
        unsafe { copy::copy_out(from_at, to, len) };
        from_at = from_at.wrapping_add(len);
    })
}

/// A read across pieces.
///
/// # Safety
/// `to` is writable for `len` bytes and is no guest memory; and as for `Cursor::new`.
#[inline(never)]
unsafe fn read_slowly(list: *mut Segment, span: &mut Span, to: *mut u8, len: usize) -> Option<()> {
    // SAFETY: the caller's promise.
    let mut cursor = unsafe { Cursor::new(list, span) };
    let mut to = to;
    cursor.each_piece(wide(len), |from, len| {
        // SAFETY: `each_piece` hands out `len` bytes in all, each piece in a live mapping; `to` moves along.
        unsafe { copy::copy_in(from, to, len) };
        to = to.wrapping_add(len);
    })
}

impl fmt::Debug for Cursor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.segments()).finish()
    }
}
