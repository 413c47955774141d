//! One request: the buffers of a descriptor chain, as cursors (virtio 1.3 §2.6.4).
//!
//! ```text
//!  readable ──▶ header, data …        writable ──▶ data …                 ┆ tail ──▶ status
//!  consumed from the front            consumed from the front             ┆ cut off by reserve_tail
//! ```
//! How the driver cut the bytes into descriptors does not show. Bytes are copied by value; what was read is gone, so
//! that nothing is read twice. A chain is owned and `Send`: it holds the guest memory it points into.

use std::fmt;
use std::io;
use std::os::fd::AsFd;

use outboard_memory::{Buffers, Cursor, Segment, Window, WindowError};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::error::ShortBuffer;

/// Room of the stack buffer that `read_from` goes through, in bytes.
const STAGING: usize = 4096;

/// The [place](Parts::place) of a chain that has none: it is no head, and no id.
pub(crate) const NOWHERE: u32 = u32::MAX;

/// What a chain is made of. Boxed, recycled by its queue.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) buffers: Buffers,
    /// Split: the head. Packed: the buffer id of a chain that is charged.
    pub(crate) head: u16,
    /// Split: where it is put when it is idle. Packed: the buffer id. Of a chain that is charged [`NOWHERE`], so that what
    /// is quick does not have to ask.
    pub(crate) place: u32,
    /// Split, where order was promised: how many were taken before it, modulo 2¹⁶.
    pub(crate) turn: u16,
    /// Whether it is one of those that may keep a long list while idle.
    pub(crate) grown: bool,
    /// Pieces charged to the queue's budget while in flight; 0 for a chain of few.
    pub(crate) charged: usize,
    /// Of an idle chain of a packed ring: the one that is taken after it.
    pub(crate) next: Option<Box<Self>>,
}

impl Parts {
    /// The buffer id became known, of a chain that was charged or not.
    pub(crate) fn is_named(&mut self, id: u16) {
        self.head = id;
        self.place = if self.charged == 0 { u32::from(id) } else { NOWHERE };
    }

    /// What names the chain to the driver.
    #[inline]
    pub(crate) fn name(&self) -> u16 {
        u16::try_from(self.place).unwrap_or(self.head)
    }
}

/// A request taken from a queue. Give it back with [`DeviceQueue::complete`](crate::DeviceQueue::complete): a chain
/// that is only dropped stays in flight until the ring is stopped.
#[must_use = "a dropped chain is never given back to the driver"]
pub struct Chain(pub(crate) Box<Parts>);

impl Chain {
    /// What names the chain to the driver: the descriptor it starts with, or on a packed ring its buffer id.
    #[inline]
    pub fn head(&self) -> u16 {
        self.0.name()
    }

    /// The bytes for the device to read that are left.
    #[inline]
    pub fn readable(&mut self) -> Readable<'_> {
        Readable(self.0.buffers.readable())
    }

    /// The bytes for the device to write that are left, without the tail.
    #[inline]
    pub fn writable(&mut self) -> Writable<'_> {
        let room = self.0.buffers.room();
        Writable { cursor: self.0.buffers.writable(), room }
    }

    /// Both at once.
    #[inline]
    pub fn parts(&mut self) -> (Readable<'_>, Writable<'_>) {
        let room = self.0.buffers.room();
        let (readable, writable) = self.0.buffers.both();
        (Readable(readable), Writable { cursor: writable, room })
    }

    /// Cuts the last `n` writable bytes off, wherever they lie, for [`write_tail`](Self::write_tail): the status byte
    /// of a block request. A second call replaces the first tail, whose bytes are then out of reach.
    ///
    /// # Errors
    /// Fewer than `n` bytes are left; nothing is cut.
    #[inline]
    pub fn reserve_tail(&mut self, n: usize) -> Result<(), ShortBuffer> {
        let needed = n as u64;
        match self.0.buffers.split_tail(needed) {
            Some(()) => Ok(()),
            None => Err(ShortBuffer { needed, left: self.0.buffers.writable().len() }),
        }
    }

    /// Puts every byte out of reach: all cursors are empty from now on, and there is no tail.
    pub fn close(&mut self) {
        self.0.buffers.shrink();
    }

    /// The reserved tail that is left, as a cursor: for data that is written before what stands in front of it.
    #[inline]
    pub fn tail(&mut self) -> Writable<'_> {
        let cursor = self.0.buffers.tail();
        let room = cursor.len();
        Writable { cursor, room }
    }

    /// Writes to the front of the reserved tail.
    ///
    /// # Errors
    /// The tail is shorter; nothing is written.
    #[inline(always)]
    pub fn write_tail(&mut self, bytes: &[u8]) -> Result<(), ShortBuffer> {
        let mut tail = self.0.buffers.tail();
        tail.write_all(bytes).ok_or_else(|| short(tail.segments(), bytes.len()))
    }
}

/// What an access of `needed` bytes lacks. (Takes the pieces, so that the cursor stays in registers.)
#[cold]
fn short(pieces: &[Segment], needed: usize) -> ShortBuffer {
    ShortBuffer { needed: needed as u64, left: pieces.iter().map(|piece| piece.len() as u64).sum() }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chain")
            .field("head", &self.head())
            .field("buffers", &self.0.buffers)
            .finish()
    }
}

/// The bytes of a request that the driver wrote, taken from the front.
#[derive(Debug)]
pub struct Readable<'a>(Cursor<'a>);

impl Readable<'_> {
    /// Bytes left. Adds the pieces up.
    #[inline]
    pub fn len(&self) -> u64 {
        self.0.len()
    }

    /// Whether nothing is left.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes a value.
    ///
    /// # Errors
    /// Too few bytes are left; none is taken.
    #[inline]
    pub fn read_obj<T: FromBytes>(&mut self) -> Result<T, ShortBuffer> {
        self.0.read_obj().ok_or_else(|| short(self.0.segments(), size_of::<T>()))
    }

    /// Takes bytes.
    ///
    /// # Errors
    /// Too few bytes are left; none is taken.
    #[inline]
    pub fn read_exact(&mut self, to: &mut [u8]) -> Result<(), ShortBuffer> {
        self.0.read_exact(to).ok_or_else(|| short(self.0.segments(), to.len()))
    }

    /// Leaves `n` bytes out.
    ///
    /// # Errors
    /// Fewer are left; none is left out.
    #[inline]
    pub fn skip(&mut self, n: u64) -> Result<(), ShortBuffer> {
        self.0.advance(n).ok_or_else(|| ShortBuffer { needed: n, left: self.0.len() })
    }

    /// Leaves all of it out. Returns the bytes.
    #[inline]
    pub fn skip_to_end(&mut self) -> u64 {
        let bytes = self.len();
        self.0.spend_all();
        bytes
    }

    /// The pieces that are left, for a transfer by the kernel; follow it with [`advance`](Self::advance).
    #[inline]
    pub fn segments(&self) -> &[Segment] {
        self.0.segments()
    }

    /// The kernel took `n` bytes.
    ///
    /// # Errors
    /// Fewer are left; none is dropped.
    #[inline]
    pub fn advance(&mut self, n: u64) -> Result<(), ShortBuffer> {
        self.skip(n)
    }

    /// Writes what is left to `file` at `offset`, in one call, and drops what went. Returns the bytes; go on while
    /// some are left.
    ///
    /// # Errors
    /// What the system says; `EINTR` is tried again.
    pub fn write_to_file_at(&mut self, file: impl AsFd, offset: u64) -> io::Result<usize> {
        self.0.write_to_file_at(file, offset)
    }

    /// Sends what is left over a stream socket, in one call that does not wait, and drops what went. Returns the bytes.
    ///
    /// # Errors
    /// What the system says, [`io::ErrorKind::WouldBlock`] when the socket is full; `EINTR` is tried again.
    pub fn send(&mut self, socket: impl AsFd) -> io::Result<usize> {
        self.0.send(socket, false)
    }

    /// Sends what is left as one message, all of it or nothing; otherwise as [`send`](Self::send).
    ///
    /// # Errors
    /// As [`send`](Self::send); [`io::ErrorKind::InvalidInput`]: it lies in more pieces than the system takes.
    pub fn send_message(&mut self, socket: impl AsFd) -> io::Result<usize> {
        self.0.send(socket, true)
    }

    /// As [`write_to_file_at`](Self::write_to_file_at), behind the end of `file`, wherever that is by now.
    ///
    /// # Errors
    /// What the system says; `EINTR` is tried again.
    pub fn append_to_file(&mut self, file: impl AsFd) -> io::Result<usize> {
        self.0.append_to_file(file)
    }

    /// Copies what is left into `window` at byte `at`, and drops it. Returns the bytes.
    ///
    /// # Errors
    /// The range does not lie inside, the window is read-only, or its file was cut short; nothing is dropped.
    pub fn write_to_window(&mut self, window: &Window, at: u64) -> Result<u64, WindowError> {
        self.0.write_to_window(window, at)
    }
}

/// The bytes of a request that the device is to write, taken from the front.
#[derive(Debug)]
pub struct Writable<'a> {
    cursor: Cursor<'a>,
    room: u64,
}

impl Writable<'_> {
    /// Bytes of room left. Adds the pieces up.
    #[inline]
    pub fn len(&self) -> u64 {
        self.cursor.len()
    }

    /// Whether no room is left.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.cursor.is_empty()
    }

    /// Bytes of room at first (the tail does not count).
    #[inline]
    pub fn room(&self) -> u64 {
        self.room
    }

    /// Bytes written so far (the tail does not count).
    #[inline]
    pub fn written(&self) -> u64 {
        self.room - self.cursor.len()
    }

    /// Writes a value.
    ///
    /// # Errors
    /// Too little room; nothing is written.
    #[inline]
    pub fn write_obj<T: IntoBytes + Immutable + ?Sized>(
        &mut self,
        value: &T,
    ) -> Result<(), ShortBuffer> {
        self.write_all(value.as_bytes())
    }

    /// Writes bytes.
    ///
    /// # Errors
    /// Too little room; nothing is written.
    #[inline]
    pub fn write_all(&mut self, from: &[u8]) -> Result<(), ShortBuffer> {
        self.cursor.write_all(from).ok_or_else(|| short(self.cursor.segments(), from.len()))
    }

    /// Writes bytes, as many as there is room for, and leaves the room as it is, as the kernel does: follow it with
    /// [`advance`](Self::advance). Returns how many.
    pub fn place(&mut self, from: &[u8]) -> usize {
        self.cursor.place(from)
    }

    /// Writes `n` zero bytes.
    ///
    /// # Errors
    /// Too little room; nothing is written.
    pub fn fill_zero(&mut self, n: u64) -> Result<(), ShortBuffer> {
        self.cursor.fill_zero(n).ok_or_else(|| ShortBuffer { needed: n, left: self.cursor.len() })
    }

    /// The pieces that are left, for a transfer by the kernel; follow it with [`advance`](Self::advance).
    #[inline]
    pub fn segments(&self) -> &[Segment] {
        self.cursor.segments()
    }

    /// The kernel wrote `n` bytes.
    ///
    /// # Errors
    /// There is less room; nothing is dropped.
    #[inline]
    pub fn advance(&mut self, n: u64) -> Result<(), ShortBuffer> {
        self.cursor.advance(n).ok_or_else(|| ShortBuffer { needed: n, left: self.cursor.len() })
    }

    /// Takes all that is left for written. Returns the bytes.
    #[inline]
    pub fn advance_to_end(&mut self) -> u64 {
        let bytes = self.len();
        self.cursor.spend_all();
        bytes
    }

    /// Fills the room from `file` at `offset`, in one call. Returns the bytes; 0 is the end of the file.
    ///
    /// # Errors
    /// What the system says; `EINTR` is tried again.
    pub fn read_from_file_at(&mut self, file: impl AsFd, offset: u64) -> io::Result<usize> {
        self.cursor.read_from_file_at(file, offset)
    }

    /// As [`read_from_file_at`](Self::read_from_file_at), but only what the page cache holds.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when the disk would have to be asked, [`io::ErrorKind::Unsupported`] when the file
    /// system cannot tell.
    pub fn read_cached_at(&mut self, file: impl AsFd, offset: u64) -> io::Result<usize> {
        self.cursor.read_cached_at(file, offset)
    }

    /// Fills the room from byte `at` of `window` on. Returns the bytes.
    ///
    /// # Errors
    /// The range does not lie inside, or its file was cut short; no room is used up.
    pub fn read_from_window(&mut self, window: &Window, at: u64) -> Result<u64, WindowError> {
        self.cursor.read_from_window(window, at)
    }

    /// Fills the room from `source` until it is full, `max` bytes were written or the source ends, through a bounded
    /// buffer of our own. Returns the bytes.
    ///
    /// # Errors
    /// What the source says, when nothing was written yet.
    pub fn read_from(&mut self, source: &mut impl io::Read, max: u32) -> io::Result<u32> {
        let mut staging = [0; STAGING];
        let mut done = 0_u32;
        while done < max {
            let part = usize::try_from(u64::from(max - done).min(self.len()))
                .unwrap_or(STAGING)
                .min(STAGING);
            let Some(room) = staging.get_mut(..part).filter(|room| !room.is_empty()) else { break };
            let got = match source.read(room) {
                Ok(0) => break,
                Ok(got) => got.min(part),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) if done > 0 => break,
                Err(error) => return Err(error),
            };
            let written = staging.get(..got).map(|bytes| self.write_all(bytes));
            debug_assert!(matches!(written, Some(Ok(()))), "the part is no larger than the room");
            done += u32::try_from(got).unwrap_or(max - done);
        }
        Ok(done)
    }
}
