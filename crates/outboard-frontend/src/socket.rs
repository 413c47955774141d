//! One vhost-user socket as the front-end uses it: bytes and descriptors over a Unix stream socket,
//! every call bounded by a deadline.
//!
//! Carries out the transport part of the vhost-user specification ("Communication"): descriptors ride
//! with the first byte of a message, a message may arrive in pieces. Invariants: a write is whole or an
//! error; every received descriptor is close-on-exec and owned from the first moment; a lost descriptor
//! (`MSG_CTRUNC`) is an error; nothing waits longer than its deadline, whatever the other side does.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

/// Most descriptors that one read from the back-end may bring; more is [`SocketError::DescriptorsLost`].
///
/// No reply carries more than one and no back-end message more than eight.
pub const MAX_RECEIVED_FDS: usize = 8;

/// Most descriptors that one message to the back-end may carry (the memory table of 32 regions).
pub const MAX_SENT_FDS: usize = 32;

/// Why the socket could not carry a message.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The path does not fit into a socket address (108 bytes with the closing zero).
    #[error("socket path {} is {} bytes long, the limit is 107", path.display(), path.as_os_str().len())]
    PathTooLong {
        /// The path as given.
        path: PathBuf,
    },
    /// Nothing could be connected to at this path.
    #[error("cannot connect to {}: {source}", path.display())]
    Connect {
        /// The path as given.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The descriptor handed in is no Unix stream socket.
    #[error("the descriptor is not a connected unix stream socket: {0}")]
    NotASocket(&'static str),
    /// The other side closed the connection.
    #[error("the back-end closed the connection")]
    Closed,
    /// The deadline passed.
    #[error("the deadline passed")]
    TimedOut,
    /// More descriptors came than the control buffer holds, so at least one was lost.
    #[error("the back-end sent more than {MAX_RECEIVED_FDS} descriptors at once")]
    DescriptorsLost,
    /// More descriptors than one message may carry.
    #[error("{0} descriptors in one message, the limit is {MAX_SENT_FDS}")]
    TooManyDescriptors(usize),
    /// Any other failure of the system call.
    #[error("{call} failed: {source}")]
    Io {
        /// The system call.
        call: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
}

impl SocketError {
    fn io(call: &'static str, errno: Errno) -> Self {
        match errno {
            Errno::PIPE | Errno::CONNRESET => Self::Closed,
            other => Self::Io { call, source: other.into() },
        }
    }
}

/// What one read from the socket brought.
#[derive(Debug)]
pub struct Received {
    /// How many bytes were put into the buffer; at least one.
    pub bytes: usize,
    /// The descriptors that came with the first of them.
    pub fds: Vec<OwnedFd>,
}

/// A connected vhost-user socket. See the module's text for what it promises.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
}

impl Socket {
    /// Connects to the listening socket at `path`; a full backlog is waited for until `deadline`.
    ///
    /// # Errors
    /// [`SocketError::PathTooLong`], [`SocketError::Connect`] or [`SocketError::TimedOut`].
    pub fn connect(path: &Path, deadline: Instant) -> Result<Self, SocketError> {
        let address = SocketAddrUnix::new(path)
            .map_err(|_| SocketError::PathTooLong { path: path.to_path_buf() })?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|errno| SocketError::io("socket", errno))?;
        loop {
            match rustix::net::connect(&fd, &address) {
                Ok(()) => return Ok(Self { fd }),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if Instant::now() >= deadline {
                        return Err(SocketError::TimedOut);
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(errno) => {
                    return Err(SocketError::Connect {
                        path: path.to_path_buf(),
                        source: errno.into(),
                    });
                }
            }
        }
    }

    /// Takes over a connected Unix stream socket. Its blocking mode is left as it is.
    ///
    /// # Errors
    /// [`SocketError::NotASocket`] when the descriptor is anything else, a listening socket included.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, SocketError> {
        let kind = rustix::net::sockopt::socket_type(&fd)
            .map_err(|_| SocketError::NotASocket("it is no socket"))?;
        if kind != SocketType::STREAM {
            return Err(SocketError::NotASocket("it is no stream socket"));
        }
        match rustix::net::sockopt::socket_domain(&fd) {
            Ok(AddressFamily::UNIX) => {}
            _ => return Err(SocketError::NotASocket("it is no unix socket")),
        }
        if rustix::net::sockopt::socket_acceptconn(&fd).unwrap_or(false) {
            return Err(SocketError::NotASocket("it is a listening socket"));
        }
        Ok(Self { fd })
    }

    /// The process id of the back-end, as the kernel noted it when the connection was made.
    ///
    /// With a listening socket this is the process that called `listen`, which the worker threads of
    /// every known back-end belong to. `None` when it lives in another pid namespace.
    #[must_use]
    pub fn peer_pid(&self) -> Option<u32> {
        let credentials = rustix::net::sockopt::socket_peercred(&self.fd).ok()?;
        u32::try_from(credentials.pid.as_raw_nonzero().get()).ok()
    }

    /// Writes all of `bytes`; `fds` ride with the first of them.
    ///
    /// # Errors
    /// [`SocketError::Closed`], [`SocketError::TimedOut`], [`SocketError::TooManyDescriptors`] or
    /// [`SocketError::Io`]. After an error the stream is out of step and must be given up.
    pub fn send(
        &self,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<(), SocketError> {
        if fds.len() > MAX_SENT_FDS {
            return Err(SocketError::TooManyDescriptors(fds.len()));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SENT_FDS))];
        let mut rest = bytes;
        let mut fds = fds;
        while !rest.is_empty() {
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(SocketError::TooManyDescriptors(fds.len()));
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::sendmsg(&self.fd, &[IoSlice::new(rest)], &mut control, flags) {
                Ok(count) => {
                    rest = rest.get(count..).unwrap_or_default();
                    fds = &[];
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, deadline)?,
                Err(errno) => return Err(SocketError::io("sendmsg", errno)),
            }
        }
        Ok(())
    }

    /// Reads what is there, waiting until `deadline` for the first byte.
    ///
    /// # Errors
    /// [`SocketError::Closed`] at the end of the stream, [`SocketError::TimedOut`],
    /// [`SocketError::DescriptorsLost`] or [`SocketError::Io`].
    pub fn receive(&self, buffer: &mut [u8], deadline: Instant) -> Result<Received, SocketError> {
        loop {
            if let Some(received) = self.try_receive(buffer)? {
                return Ok(received);
            }
            self.wait(PollFlags::IN, deadline)?;
        }
    }

    /// Reads what is there without waiting; `None` when nothing is.
    ///
    /// # Errors
    /// As [`Self::receive`], except for the deadline.
    pub fn try_receive(&self, buffer: &mut [u8]) -> Result<Option<Received>, SocketError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_RECEIVED_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let message = loop {
            let mut into = [IoSliceMut::new(buffer)];
            match rustix::net::recvmsg(&self.fd, &mut into, &mut control, flags) {
                Ok(message) => break message,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(SocketError::io("recvmsg", errno)),
            }
        };
        let mut fds = Vec::new();
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = part {
                fds.extend(rights);
            }
        }
        if message.flags.contains(ReturnFlags::CTRUNC) {
            return Err(SocketError::DescriptorsLost);
        }
        if message.bytes == 0 {
            return Err(SocketError::Closed);
        }
        Ok(Some(Received { bytes: message.bytes, fds }))
    }

    fn wait(&self, what: PollFlags, deadline: Instant) -> Result<(), SocketError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(SocketError::TimedOut);
        }
        wait_fd(self.fd.as_fd(), what, left).map_err(|errno| SocketError::io("poll", errno))?;
        Ok(())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Waits until `fd` is ready for `what`, is closed, or `timeout` passes; true when it is ready. An
/// interrupted wait answers false early: every caller looks at its own deadline again.
pub(crate) fn wait_fd(
    fd: BorrowedFd<'_>,
    what: PollFlags,
    timeout: Duration,
) -> Result<bool, Errno> {
    let timeout = Timespec::try_from(timeout).ok();
    let mut set = [PollFd::from_borrowed_fd(fd, what)];
    match rustix::event::poll(&mut set, timeout.as_ref()) {
        Ok(count) => Ok(count > 0),
        Err(Errno::INTR) => Ok(false),
        Err(errno) => Err(errno),
    }
}
