//! A back-end by script, in a thread at the other end of a socket pair.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use outboard_frontend::{Connection, Socket};
use outboard_protocol::Frame;
use outboard_protocol::header::{HEADER_SIZE, Header};
use outboard_protocol::payload;

/// How long the front-end waits where an answer comes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// How long it waits where the test is about none.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(1);
/// Message 1.
pub(crate) const GET_FEATURES: u32 = 1;
/// A modern device with protocol features.
pub(crate) const FEATURES: u64 = 1 << 32 | 1 << 30;
/// MQ, REPLY_ACK, CONFIG.
pub(crate) const PROTOCOL: u64 = 1 << 0 | 1 << 3 | 1 << 9;

/// The back-end's end.
pub(crate) struct Peer {
    stream: UnixStream,
    /// The payload of the request at hand.
    pub(crate) body: Vec<u8>,
    /// The descriptors of the request at hand.
    pub(crate) fds: Vec<OwnedFd>,
}

/// A thread that plays a peer.
pub(crate) struct Playing {
    thread: JoinHandle<()>,
    stream: UnixStream,
}

impl Playing {
    /// Waits until the peer has seen the end of the connection.
    pub(crate) fn join(self) -> std::thread::Result<()> {
        self.thread.join()
    }

    /// Sends a reply to GET_FEATURES that nobody asked for.
    pub(crate) fn unasked(&self) {
        let reply = Frame::<()>::reply(GET_FEATURES, &[0; 8], Vec::new()).bytes;
        send(&self.stream, &reply, &[]);
    }
}

/// A connection to a peer that calls `script` for each request until that answers false.
pub(crate) fn connect(
    timeout: Duration,
    mut script: impl FnMut(&mut Peer, Header) -> bool + Send + 'static,
) -> (Connection, Playing) {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let stream = theirs.try_clone().expect("a descriptor");
    let thread = std::thread::spawn(move || {
        let mut peer = Peer { stream: theirs, body: Vec::new(), fds: Vec::new() };
        while let Some(header) = peer.next() {
            if !script(&mut peer, header) {
                break;
            }
        }
        // Stays open until the front-end goes: silence is not a closed socket.
        let _ = peer.stream.read_to_end(&mut Vec::new());
    });
    let connection = Connection::from_fd(ours.into(), timeout).expect("a socket");
    (connection, Playing { thread, stream })
}

impl Peer {
    /// The next request; `None` at the end of the connection.
    fn next(&mut self) -> Option<Header> {
        let socket = Socket::from_fd(self.stream.try_clone().ok()?.into()).ok()?;
        let mut header = [0; HEADER_SIZE];
        let deadline = Instant::now() + Duration::from_secs(30);
        let first = socket.receive(&mut header, deadline).ok()?;
        self.fds = first.fds;
        self.stream.read_exact(&mut header[first.bytes..]).ok()?;
        let header: Header = payload::read(&header)?;
        self.body = vec![0; header.size as usize];
        self.stream.read_exact(&mut self.body).ok()?;
        Some(header)
    }

    /// Sends any bytes and descriptors.
    pub(crate) fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        send(&self.stream, bytes, fds);
    }

    /// As `send`; false when the front-end has gone.
    pub(crate) fn try_send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        try_send(&self.stream, bytes, fds)
    }

    /// What an honest device answers.
    pub(crate) fn sane(&self, header: Header) -> u64 {
        match header.request {
            GET_FEATURES => FEATURES,
            15 => PROTOCOL,
            17 => 1,
            _ => 0,
        }
    }

    /// Answers with a number, where an answer is due.
    pub(crate) fn reply(&mut self, header: Header, value: u64) -> bool {
        if header.need_reply() || matches!(header.request, GET_FEATURES | 15 | 17 | 36) {
            let reply = Frame::<()>::reply(header.request, &value.to_ne_bytes(), Vec::new());
            return self.try_send(&reply.bytes, &[]);
        }
        true
    }

    /// Closes the connection.
    pub(crate) fn close(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    assert!(try_send(stream, bytes, fds), "the front-end has gone");
}

fn try_send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
    if bytes.is_empty() {
        return true;
    }
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(fds)));
    }
    let iov = [std::io::IoSlice::new(bytes)];
    let flags = rustix::net::SendFlags::NOSIGNAL;
    rustix::net::sendmsg(stream.as_fd(), &iov, &mut control, flags).is_ok()
}
