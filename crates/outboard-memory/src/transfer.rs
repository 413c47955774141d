//! Vectored transfers between a file and guest memory: one `preadv` or `pwritev`, no copy in between.
//!
//! The kernel reports a hole in guest memory as `EFAULT`; there is no signal then. A transfer may be short: the caller
//! goes on with what is left, or takes 0 as the end of the file.
#![expect(unsafe_code, reason = "rustix takes slices of guest memory, which must not exist")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use crate::cursor::Cursor;

/// Most pieces the kernel takes at once.
const IOV_MAX: usize = 1024;

impl Cursor<'_> {
    /// Fills the front of what is left from `file` at `offset` and drops what was filled. Returns the bytes; 0 at the end
    /// of the file or when nothing is left.
    ///
    /// # Errors
    /// What the system says, `EINTR` excepted: that is tried again. Nothing is dropped then.
    pub fn read_from_file_at(&mut self, file: impl AsFd, offset: u64) -> io::Result<usize> {
        self.transfer(file, offset, libc::preadv)
    }

    /// As [`read_from_file_at`](Self::read_from_file_at), but only what the page cache holds: nothing is waited for.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when the disk would have to be asked, [`io::ErrorKind::Unsupported`] when the file
    /// system cannot tell.
    pub fn read_cached_at(&mut self, file: impl AsFd, offset: u64) -> io::Result<usize> {
        self.transfer(file, offset, preadv_nowait)
    }

    /// Writes the front of what is left to `file` at `offset` and drops what was written. Returns the bytes.
    ///
    /// # Errors
    /// What the system says, `EINTR` excepted: that is tried again. Nothing is dropped then.
    pub fn write_to_file_at(&mut self, file: impl AsFd, offset: u64) -> io::Result<usize> {
        self.transfer(file, offset, libc::pwritev)
    }

    /// Sends what is left over `socket` without waiting, as one message if it has messages, and drops what went.
    /// Returns the bytes.
    ///
    /// # Errors
    /// What the system says, `EINTR` excepted: that is tried again. Nothing is dropped then. More pieces than the
    /// kernel takes at once are cut off a stream and are [`io::ErrorKind::InvalidInput`] for messages.
    pub fn send(&mut self, socket: impl AsFd, whole: bool) -> io::Result<usize> {
        if whole && self.segments().len() > IOV_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.transfer(socket, 0, send_nowait)
    }

    /// Writes the front of what is left behind the end of `file`, wherever that is by now, and drops what was written.
    /// Returns the bytes.
    ///
    /// # Errors
    /// As for [`write_to_file_at`](Self::write_to_file_at).
    pub fn append_to_file(&mut self, file: impl AsFd) -> io::Result<usize> {
        self.transfer(file, 0, pwritev_append)
    }

    fn transfer(
        &mut self,
        file: impl AsFd,
        offset: u64,
        call: unsafe extern "C" fn(
            libc::c_int,
            *const libc::iovec,
            libc::c_int,
            libc::off_t,
        ) -> libc::ssize_t,
    ) -> io::Result<usize> {
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let pieces = self.segments();
        if pieces.is_empty() {
            return Ok(0);
        }
        let count = libc::c_int::try_from(pieces.len().min(IOV_MAX)).unwrap_or(1);
        let pieces = pieces.as_ptr().cast::<libc::iovec>();
        let raw = file.as_fd().as_raw_fd();
        loop {
            // SAFETY: `count` pieces laid out like iovecs, each in guest memory that the borrowed buffers keep mapped; the
            // kernel may write there, as the guest may at any time.
            let moved = unsafe { call(raw, pieces, count, offset) };
            match usize::try_from(moved) {
                Ok(moved) => {
                    let dropped = self.advance(crate::num::wide(moved));
                    debug_assert!(dropped.is_some(), "the kernel moved more than it was given");
                    return Ok(moved);
                }
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }
}

/// `preadv` that fails with `EAGAIN` instead of waiting.
///
/// # Safety
/// As for `preadv`.
unsafe extern "C" fn preadv_nowait(
    fd: libc::c_int,
    pieces: *const libc::iovec,
    count: libc::c_int,
    offset: libc::off_t,
) -> libc::ssize_t {
    // SAFETY: the caller's promise.
    unsafe { libc::preadv2(fd, pieces, count, offset, libc::RWF_NOWAIT) }
}

/// `sendmsg` with the parameters of `pwritev`; the offset is of no use to a socket.
///
/// # Safety
/// As for `pwritev`.
unsafe extern "C" fn send_nowait(
    fd: libc::c_int,
    pieces: *const libc::iovec,
    count: libc::c_int,
    _offset: libc::off_t,
) -> libc::ssize_t {
    // SAFETY: all zeros are a message without address, pieces and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.cast_mut();
    message.msg_iovlen = usize::try_from(count).unwrap_or(0) as _;
    // SAFETY: the caller's promise; the kernel only reads the pieces of a message that is sent.
    unsafe { libc::sendmsg(fd, &raw const message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) }
}

/// `pwritev` that leaves the offset aside and appends.
///
/// # Safety
/// As for `pwritev`.
unsafe extern "C" fn pwritev_append(
    fd: libc::c_int,
    pieces: *const libc::iovec,
    count: libc::c_int,
    offset: libc::off_t,
) -> libc::ssize_t {
    // SAFETY: the caller's promise.
    unsafe { libc::pwritev2(fd, pieces, count, offset, libc::RWF_APPEND) }
}
