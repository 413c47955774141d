//! Copies by value between this process and a run of pieces, from the front.
//!
//! The usual request has one piece for one value: that case is inline, what crosses pieces is not. Everything is done
//! whole or not at all.
#![expect(unsafe_code, reason = "copies to and from the pieces")]

use std::fmt;
use std::mem::MaybeUninit;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::buffers::{Segment, Span};
use crate::copy;
use crate::num::{index, wide};

/// A run of pieces of a request, consumed from the front.
pub struct Cursor<'a> {
    /// The list the span is in. Its pieces lie in memory that the buffers, which are borrowed, keep mapped.
    list: &'a mut [Segment],
    span: &'a mut Span,
    /// Pieces of the whole list that are not in `list`.
    before: u32,
}

impl<'a> Cursor<'a> {
    /// The pieces of `span`, which counts from `before` pieces in front of `list`.
    #[inline(always)]
    pub(crate) fn new(list: &'a mut [Segment], span: &'a mut Span, before: u32) -> Self {
        Self { list, span, before }
    }

    /// Bytes left. Adds the pieces up.
    #[inline]
    pub fn len(&self) -> u64 {
        self.segments().iter().map(|piece| wide(piece.len)).sum()
    }

    /// Whether nothing is left.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.span.next >= self.span.end
    }

    /// The pieces that are left.
    #[inline(always)]
    pub fn segments(&self) -> &[Segment] {
        let Span { next, end } = *self.span;
        let range = next.wrapping_sub(self.before) as usize..end.wrapping_sub(self.before) as usize;
        self.list.get(range).unwrap_or_default()
    }

    /// The first piece that is left.
    #[inline(always)]
    fn first(&mut self) -> Option<&mut Segment> {
        let Span { next, end } = *self.span;
        if next < end { self.list.get_mut(next.wrapping_sub(self.before) as usize) } else { None }
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
        if let Some(first) = self.first()
            && first.len >= from.len()
        {
            // SAFETY: the piece has `from.len()` bytes in a live mapping.
            unsafe { copy::copy_out(from.as_ptr(), first.base, from.len()) };
            first.advance(from.len());
            self.span.next += u32::from(first.len == 0);
            return Some(());
        }
        write_slowly(self.list, self.span, self.before, from)
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

    /// Copies `len` bytes to `to` and drops them.
    ///
    /// # Safety
    /// `to` is writable for `len` bytes and is no guest memory.
    #[inline(always)]
    unsafe fn copy_to(&mut self, to: *mut u8, len: usize) -> Option<()> {
        if let Some(first) = self.first()
            && first.len >= len
        {
            // SAFETY: the piece has `len` bytes in a live mapping; `to` by the caller's promise.
            unsafe { copy::copy_in(first.base, to, len) };
            first.advance(len);
            self.span.next += u32::from(first.len == 0);
            return Some(());
        }
        // SAFETY: the caller's promise.
        unsafe { read_slowly(self.list, self.span, self.before, to, len) }
    }

    /// Takes `count` bytes from the front, piece by piece; `None`, and nothing taken, when there are too few.
    fn each_piece(&mut self, count: u64, mut with: impl FnMut(*mut u8, usize)) -> Option<()> {
        if self.len() < count {
            return None;
        }
        let mut count = count;
        while count > 0
            && let Some(first) = self.first()
        {
            let part = index(count.min(wide(first.len)));
            with(first.base, part);
            first.advance(part);
            self.span.next += u32::from(first.len == 0);
            count -= wide(part);
        }
        Some(())
    }
}

/// A write across pieces. (The parts of the cursor go one by one, so that the caller's stays in registers.)
#[inline(never)]
fn write_slowly(list: &mut [Segment], span: &mut Span, before: u32, from: &[u8]) -> Option<()> {
    let mut cursor = Cursor::new(list, span, before);
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
/// `to` is writable for `len` bytes and is no guest memory.
#[inline(never)]
unsafe fn read_slowly(
    list: &mut [Segment],
    span: &mut Span,
    before: u32,
    to: *mut u8,
    len: usize,
) -> Option<()> {
    let mut cursor = Cursor::new(list, span, before);
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
