//! The buffers of one request: pieces of guest memory, taken from the front as they are read or written.
//!
//! ```text
//!  [0x..a0 +512][0x..00 +4096][0x..80 +1]        next = 1: the first piece is used up, `left` counts the rest
//!                 ▲ next
//! ```
//! A piece is laid out like `struct iovec`, so that the list goes to `preadv` or io_uring as it stands. The list holds
//! the guest memory its pieces point into. What was read is gone from it: nothing is read twice.
#![expect(unsafe_code, reason = "copies to and from the pieces")]

use std::fmt;
use std::mem::MaybeUninit;
use std::sync::Arc;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::copy;
use crate::error::AccessError;
use crate::map::GuestMemory;
use crate::num::{index, wide};

/// The most pieces of one list. A legal chain has at most 32,768 descriptors, each in one region or across the seam of
/// two; what is beyond this bound was made to use up memory.
const LIMIT: usize = 2 * 32_768 + 1024;

/// A piece of guest memory in this process: an address and a length, laid out like `struct iovec`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Segment {
    base: *mut u8,
    len: usize,
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
    /// Address of the first byte. Valid while the [`Segments`] it came from is alive; the guest may change what is
    /// there at any time, so no reference to it may be made.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base
    }

    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "a segment of a list is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    #[inline(always)]
    fn advance(&mut self, n: usize) {
        self.base = self.base.wrapping_add(n);
        self.len -= n;
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}+{:#x}", self.base, self.len)
    }
}

/// A list of pieces of guest memory, owned, consumed from the front.
#[derive(Default)]
pub struct Segments {
    /// Invariant: every piece from `next` on is non-empty and lies in one region of `memory`.
    list: Vec<Segment>,
    /// Pieces used up; `next <= list.len()`.
    next: usize,
    /// Bytes in the pieces from `next` on.
    left: u64,
    memory: Option<Arc<GuestMemory>>,
}

impl Segments {
    /// An empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes left.
    #[inline]
    pub fn len(&self) -> u64 {
        self.left
    }

    /// Whether nothing is left.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.left == 0
    }

    /// The pieces that are left.
    #[inline]
    pub fn segments(&self) -> &[Segment] {
        self.list.get(self.next..).unwrap_or_default()
    }

    /// Empties the list; keeps its room and its hold on guest memory for the next request.
    #[inline]
    pub fn clear(&mut self) {
        self.list.clear();
        self.next = 0;
        self.left = 0;
    }

    /// Empties the list and lets go of guest memory that is not `present`.
    #[inline]
    pub fn recycle(&mut self, present: &Arc<GuestMemory>) {
        self.clear();
        if self.memory.as_ref().is_some_and(|held| !Arc::ptr_eq(held, present)) {
            self.memory = None;
        }
    }

    /// Room for pieces, to see what a list costs to keep.
    #[inline]
    pub fn capacity(&self) -> usize {
        self.list.capacity()
    }

    /// Makes the list hold `memory`, which is free when it does already.
    #[inline(always)]
    pub(crate) fn attach(&mut self, memory: &Arc<GuestMemory>) -> Result<(), AccessError> {
        match &self.memory {
            Some(held) if Arc::ptr_eq(held, memory) => Ok(()),
            _ => self.replace(memory),
        }
    }

    #[cold]
    fn replace(&mut self, memory: &Arc<GuestMemory>) -> Result<(), AccessError> {
        if !self.segments().is_empty() {
            return Err(AccessError::MixedGenerations);
        }
        self.clear();
        self.memory = Some(Arc::clone(memory));
        Ok(())
    }

    /// Appends a piece of the attached memory: `len > 0` bytes inside one region.
    #[inline(always)]
    pub(crate) fn push(&mut self, base: *mut u8, len: usize) {
        self.list.push(Segment { base, len });
        self.left += wide(len);
    }

    /// The same for pieces whose number the guest or the front-end chooses.
    pub(crate) fn push_bounded(&mut self, base: *mut u8, len: usize) -> Result<(), AccessError> {
        if self.list.len() >= LIMIT {
            return Err(AccessError::TooManySegments { limit: LIMIT });
        }
        self.push(base, len);
        Ok(())
    }

    /// Copies a value out and drops its bytes from the list; `None`, and nothing dropped, when there are too few.
    #[inline]
    pub fn read_obj<T: FromBytes>(&mut self) -> Option<T> {
        let mut value = MaybeUninit::<T>::uninit();
        let size = size_of::<T>();
        // SAFETY: `value` has room for `size` bytes.
        unsafe { self.copy_to(value.as_mut_ptr().cast::<u8>(), size) }?;
        // SAFETY: all bytes were written just now, and any bytes are a valid `T`.
        Some(unsafe { value.assume_init() })
    }

    /// Copies bytes out and drops them from the list; `None`, and nothing dropped, when there are too few.
    #[inline]
    pub fn read_exact(&mut self, to: &mut [u8]) -> Option<()> {
        // SAFETY: `to` has room for its length.
        unsafe { self.copy_to(to.as_mut_ptr(), to.len()) }
    }

    /// Copies a value in; `None`, and nothing written, when there is too little room.
    #[inline]
    pub fn write_obj<T: IntoBytes + Immutable + ?Sized>(&mut self, value: &T) -> Option<()> {
        self.write_all(value.as_bytes())
    }

    /// Copies bytes in; `None`, and nothing written, when there is too little room.
    #[inline]
    pub fn write_all(&mut self, from: &[u8]) -> Option<()> {
        let mut from_at = from.as_ptr();
        self.each_piece(wide(from.len()), |to, len| {
            // SAFETY: `each_piece` hands out `from.len()` bytes in all, each piece in a live mapping; `from_at` moves
            // along by the same lengths.
            unsafe { copy::copy_out(from_at, to, len) };
            from_at = from_at.wrapping_add(len);
        })
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

    /// Moves the last `count` bytes to `tail`, wherever they lie; `None`, and nothing moved, when there are too few.
    /// `tail` loses what it held.
    #[inline]
    pub fn split_tail(&mut self, count: u64, tail: &mut Self) -> Option<()> {
        let keep = self.left.checked_sub(count)?;
        let memory = self.memory.as_ref()?;
        tail.clear();
        tail.attach(memory).ok()?;
        if let Some(last) = self.list.last_mut()
            && wide(last.len) > count
        {
            let count = index(count);
            last.len -= count;
            tail.push(last.base.wrapping_add(last.len), count);
            self.left = keep;
            return Some(());
        }
        self.split_tail_slowly(count, tail);
        self.left = keep;
        Some(())
    }

    /// The tail takes whole pieces. There are `count` bytes.
    fn split_tail_slowly(&mut self, count: u64, tail: &mut Self) {
        let mut left = count;
        let mut cut = self.list.len();
        while left > 0
            && let Some(piece) = cut.checked_sub(1).and_then(|at| self.list.get_mut(at))
        {
            cut -= 1;
            let here = wide(piece.len);
            if here > left {
                let part = index(left);
                piece.len -= part;
                tail.push(piece.base.wrapping_add(piece.len), part);
                cut += 1;
                break;
            }
            left -= here;
            tail.push(piece.base, piece.len);
        }
        tail.list.reverse();
        self.list.truncate(cut);
    }

    /// Copies `len` bytes to `to` and drops them.
    ///
    /// # Safety
    /// `to` is writable for `len` bytes and is no guest memory.
    #[inline(always)]
    unsafe fn copy_to(&mut self, to: *mut u8, len: usize) -> Option<()> {
        if let Some(first) = self.list.get_mut(self.next)
            && first.len >= len
        {
            // SAFETY: the piece has `len` bytes in a live mapping; `to` by the caller's promise.
            unsafe { copy::copy_in(first.base, to, len) };
            first.advance(len);
            self.next += usize::from(first.len == 0);
            self.left -= wide(len);
            return Some(());
        }
        // SAFETY: the caller's promise.
        unsafe { self.copy_to_slowly(to, len) }
    }

    /// The same across pieces.
    ///
    /// # Safety
    /// As for `copy_to`.
    #[inline(never)]
    unsafe fn copy_to_slowly(&mut self, to: *mut u8, len: usize) -> Option<()> {
        let mut to = to;
        self.each_piece(wide(len), |from, len| {
            // SAFETY: `each_piece` hands out `len` bytes in all, each piece in a live mapping; `to` moves along.
            unsafe { copy::copy_in(from, to, len) };
            to = to.wrapping_add(len);
        })
    }

    /// Takes `count` bytes from the front, piece by piece; `None`, and nothing taken, when there are too few.
    #[inline]
    fn each_piece(&mut self, count: u64, mut with: impl FnMut(*mut u8, usize)) -> Option<()> {
        let keep = self.left.checked_sub(count)?;
        let mut count = count;
        while count > 0
            && let Some(first) = self.list.get_mut(self.next)
        {
            let part = index(count.min(wide(first.len)));
            with(first.base, part);
            first.advance(part);
            self.next += usize::from(first.len == 0);
            count -= wide(part);
        }
        self.left = keep;
        Some(())
    }

    /// Bytes were transferred by the kernel: drops them. `count` is at most what is left.
    pub(crate) fn transferred(&mut self, count: usize) {
        let moved = self.advance(wide(count));
        debug_assert!(moved.is_some(), "the kernel moved more than it was given");
    }
}

impl fmt::Debug for Segments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.segments()).finish()
    }
}
