//! A connection without any rules: bytes and descriptors out, frames in, every wait bounded.
//!
//! Invariant: a closed connection is no error of the judge's. It is noted at the write and reported at
//! the next read, so that a check can say what it was after.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use outboard_protocol::header::{HEADER_SIZE, Header, REPLY_FLAGS};
use outboard_protocol::payload::{read, read_u64};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType,
};

use super::finding::{Finding, Outcome, ensure};
use super::message::{Msg, name_of};

/// Most descriptors that the kernel lets one message carry (SCM_MAX_FD).
pub(crate) const MOST_FDS: usize = 253;
/// Longest payload of a reply that any message has, with room to spare.
const LONGEST_REPLY: u32 = 4096;

/// An answer as it came.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) header: Header,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

impl Reply {
    /// The answer's number.
    pub(crate) fn number(&self) -> Outcome<u64> {
        let name = name_of(self.header.request);
        let size = self.payload.len();
        ensure!(size == 8, "the answer to {name} has {size} bytes, a u64 has 8");
        Ok(read_u64(&self.payload).unwrap_or(0))
    }
}

/// What came within the wait.
#[derive(Debug)]
pub(crate) enum Came {
    /// A whole message.
    Reply(Reply),
    /// Nothing, or not all of it.
    Nothing,
    /// The end of the stream.
    Closed,
}

/// One connection to the back-end.
#[derive(Debug)]
pub(crate) struct Wire {
    fd: OwnedFd,
    /// Longest wait for one answer.
    pub(crate) limit: Duration,
    incoming: Vec<u8>,
    fds: Vec<OwnedFd>,
    closed: bool,
    /// The first answer whose flags were not exactly those of a reply: its id and flags.
    pub(crate) odd_flags: Option<(u32, u32)>,
}

impl Wire {
    pub(crate) fn connect(path: &Path, limit: Duration) -> Result<Self, Errno> {
        let address = SocketAddrUnix::new(path)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let until = Instant::now() + limit;
        loop {
            match rustix::net::connect(&fd, &address) {
                Ok(()) => break,
                Err(Errno::AGAIN) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(Self {
            fd,
            limit,
            incoming: Vec::new(),
            fds: Vec::new(),
            closed: false,
            odd_flags: None,
        })
    }

    /// Whether the other end was seen to have closed it.
    pub(crate) const fn closed(&self) -> bool {
        self.closed
    }

    /// The process that listens at the other end.
    pub(crate) fn peer_pid(&self) -> Option<u32> {
        let credentials = rustix::net::sockopt::socket_peercred(&self.fd).ok()?;
        u32::try_from(credentials.pid.as_raw_nonzero().get()).ok()
    }

    pub(crate) fn send(&mut self, msg: &Msg<'_>) -> Outcome {
        self.bytes(&msg.bytes(), &msg.fds)
    }

    /// Sends raw bytes; the descriptors ride with the first of them. A back-end that does not read for
    /// the whole limit hangs.
    pub(crate) fn bytes(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Outcome {
        let (mut rest, mut fds) = (bytes, fds);
        let until = Instant::now() + self.limit;
        while !rest.is_empty() && !self.closed {
            match self.write_once(rest, fds) {
                Ok(count) => {
                    rest = rest.get(count..).unwrap_or_default();
                    fds = &[];
                }
                Err(Errno::PIPE | Errno::CONNRESET) => self.closed = true,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(Finding::hangs("it stopped reading its socket"));
                    }
                    wait(self.fd.as_fd(), PollFlags::OUT, left);
                }
                Err(errno) => return Err(Finding::own("send", errno)),
            }
        }
        Ok(())
    }

    /// Sends what goes without waiting; how many bytes went.
    pub(crate) fn send_some(&mut self, bytes: &[u8]) -> usize {
        match self.write_once(bytes, &[]) {
            Ok(count) => count,
            Err(Errno::PIPE | Errno::CONNRESET) => {
                self.closed = true;
                0
            }
            Err(_) => 0,
        }
    }

    fn write_once(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::TOOBIG);
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        rustix::net::sendmsg(&self.fd, &[IoSlice::new(bytes)], &mut control, flags)
    }

    /// The back-end sees the end behind what was sent; its answers can still be read.
    pub(crate) fn say_no_more(&self) {
        // A connection that has ended already needs no end.
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Write);
    }

    /// Waits for the next message.
    pub(crate) fn receive(&mut self, patience: Duration) -> Outcome<Came> {
        let until = Instant::now() + patience;
        loop {
            if let Some(reply) = self.take()? {
                return Ok(Came::Reply(reply));
            }
            let mut buffer = [0; 4096];
            match self.read_once(&mut buffer) {
                Ok(0) | Err(Errno::CONNRESET | Errno::PIPE) => {
                    self.closed = true;
                    return Ok(Came::Closed);
                }
                Ok(count) => self.incoming.extend(buffer.iter().take(count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Ok(Came::Nothing);
                    }
                    wait(self.fd.as_fd(), PollFlags::IN, left);
                }
                Err(errno) => return Err(Finding::own("receive", errno)),
            }
        }
    }

    fn read_once(&mut self, buffer: &mut [u8]) -> Result<usize, Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let mut into = [IoSliceMut::new(buffer)];
        let message = rustix::net::recvmsg(&self.fd, &mut into, &mut control, flags)?;
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = part {
                self.fds.extend(rights);
            }
        }
        Ok(message.bytes)
    }

    /// The first whole message of what came in.
    fn take(&mut self) -> Outcome<Option<Reply>> {
        let Some(header) = read::<Header>(&self.incoming) else { return Ok(None) };
        let name = name_of(header.request);
        ensure!(
            header.size <= LONGEST_REPLY,
            "the answer to {name} announces {} bytes, no reply is that long",
            header.size
        );
        let end = HEADER_SIZE + usize::try_from(header.size).unwrap_or(0);
        let Some(payload) = self.incoming.get(HEADER_SIZE..end) else { return Ok(None) };
        let payload = payload.to_vec();
        self.incoming.drain(..end);
        Ok(Some(Reply { header, payload, fds: std::mem::take(&mut self.fds) }))
    }

    /// The answer to a request that must be answered, under the same id. Wrong flags are only noted: one
    /// check is about them, and the others have other things to say.
    pub(crate) fn answer(&mut self, id: u32) -> Outcome<Reply> {
        let name = name_of(id);
        let limit = self.limit;
        match self.receive(limit)? {
            Came::Closed => Err(Finding::breaks(format!(
                "it closed the connection instead of answering {name}"
            ))),
            Came::Nothing => {
                let ms = limit.as_millis();
                Err(Finding::hangs(format!("it did not answer {name} within {ms} ms")))
            }
            Came::Reply(reply) => {
                let got = reply.header;
                ensure!(
                    got.request == id,
                    "it answered {} where {name} was to be answered",
                    name_of(got.request)
                );
                if got.flags != REPLY_FLAGS {
                    self.odd_flags.get_or_insert((id, got.flags));
                }
                Ok(reply)
            }
        }
    }

    /// Sends and waits for the answer.
    pub(crate) fn ask(&mut self, msg: &Msg<'_>) -> Outcome<Reply> {
        self.send(msg)?;
        self.answer(msg.id)
    }

    /// That nothing comes for a while; a closed connection is silent, too.
    pub(crate) fn silent(&mut self, time: Duration, after: &str) -> Outcome {
        if let Came::Reply(reply) = self.receive(time)? {
            let name = name_of(reply.header.request);
            return Err(Finding::breaks(format!("it sent an answer to {name} {after}")));
        }
        Ok(())
    }
}

impl Drop for Wire {
    /// Ends the connection at once, even where a process that is just being started still holds a copy of
    /// the descriptor.
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
    }
}

/// Waits until `fd` is ready or the time is over; whether it is ready.
pub(crate) fn wait(fd: BorrowedFd<'_>, what: PollFlags, time: Duration) -> bool {
    let timeout = Timespec::try_from(time).ok();
    let mut set = [PollFd::from_borrowed_fd(fd, what)];
    matches!(rustix::event::poll(&mut set, timeout.as_ref()), Ok(1..))
}
