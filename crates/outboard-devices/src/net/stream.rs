//! A card's link over a Unix stream socket, as QEMU's `-netdev stream` and passt speak: each packet follows
//! its length, four bytes, big endian.
//!
//! Invariants: nothing here waits; a peer that breaks off or breaks the framing takes the link down, and the
//! next one brings it up; no frame is believed to be longer than [`MOST`].

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use outboard::Error;
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use tracing::{info, warn};

use super::frame::{Frame, MOST};
use super::link::Sent;
use crate::names::{self, Name};
use crate::watches::{Ask, Edge, Watches};

/// Bytes of a length.
const PREFIX: usize = 4;
/// Bytes that are read ahead.
const INPUT: usize = 256 << 10;
/// Bytes that wait for the peer before the guest does.
const OUTPUT: usize = 256 << 10;

/// How a link is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stream {
    /// To who listens on this path: passt, or QEMU's `server=on`.
    Connect(PathBuf),
    /// By who connects to this path; one at a time.
    Listen(PathBuf),
}

/// Bytes in the order in which they came, in one piece.
#[derive(Debug)]
struct Bytes {
    room: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Bytes {
    fn new(room: usize) -> Self {
        Self { room: vec![0; room].into_boxed_slice(), start: 0, end: 0 }
    }

    fn held(&self) -> &[u8] {
        self.room.get(self.start..self.end).unwrap_or_default()
    }

    /// Room for more bytes; what is held moves to the front when less than `least` is left.
    fn room(&mut self, least: usize) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.room.len() - self.end < least {
            self.room.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        self.room.get_mut(self.end..).unwrap_or_default()
    }

    /// So many bytes were put into the room.
    fn grow(&mut self, more: usize) {
        self.end = (self.end + more).min(self.room.len());
    }

    /// Adds bytes; false: there is no room for them.
    fn add(&mut self, bytes: &[u8]) -> bool {
        let Some(room) = self.room(bytes.len()).get_mut(..bytes.len()) else { return false };
        room.copy_from_slice(bytes);
        self.grow(bytes.len());
        true
    }

    fn drop_first(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
    }

    fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Link {
    listener: Option<(UnixListener, Name)>,
    peer: Option<UnixStream>,
    readable: bool,
    writable: bool,
    input: Bytes,
    output: Bytes,
    /// Packets that were longer than the frame that they were to come in.
    pub(super) too_long: u64,
    /// Of its descriptors: the peer's, and one more is the listener's.
    token: u64,
}

impl Link {
    pub(super) fn open(stream: &Stream) -> Result<Self, Error> {
        let mut link = Self {
            listener: None,
            peer: None,
            readable: false,
            writable: false,
            input: Bytes::new(INPUT),
            // One packet more than is waited for.
            output: Bytes::new(OUTPUT + PREFIX + MOST),
            too_long: 0,
            token: 0,
        };
        let failed =
            |path: &Path, error: io::Error| Error::refused(format!("{}: {error}", path.display()));
        match stream {
            Stream::Connect(path) => {
                let peer = UnixStream::connect(path).map_err(|error| failed(path, error))?;
                peer.set_nonblocking(true)?;
                link.peer = Some(peer);
            }
            Stream::Listen(path) => {
                let listener = names::listen(path).map_err(|error| failed(path, error))?;
                link.listener = Some(listener);
            }
        }
        Ok(link)
    }

    /// Has `watches` report what happens, under `token` and the next one.
    pub(super) fn watch(&mut self, watches: &Watches, token: u64) -> io::Result<()> {
        self.token = token;
        if let Some((listener, _)) = &self.listener {
            watches.add(listener, token + 1, Ask::Bytes)?;
        }
        if let Some(peer) = &self.peer {
            watches.add(peer, token, Ask::Room)?;
            (self.readable, self.writable) = (true, true);
        }
        Ok(())
    }

    fn take(&mut self, peer: UnixStream, watches: &Watches) -> io::Result<()> {
        peer.set_nonblocking(true)?;
        watches.add(&peer, self.token, Ask::Room)?;
        self.input.clear();
        self.output.clear();
        (self.readable, self.writable) = (true, true);
        self.peer = Some(peer);
        Ok(())
    }

    /// Whether somebody is at the other end.
    pub(super) fn is_up(&self) -> bool {
        self.peer.is_some()
    }

    /// Whether there may be packets that nothing will announce.
    pub(super) fn is_readable(&self) -> bool {
        self.peer.is_some() && self.readable
    }

    /// Something has happened to a descriptor.
    pub(super) fn edge(&mut self, edge: Edge, watches: &Watches) {
        if edge.token != self.token {
            self.accept(watches);
            return;
        }
        self.readable |= edge.readable;
        self.writable |= edge.writable;
        self.flush();
    }

    fn accept(&mut self, watches: &Watches) {
        loop {
            let Some((listener, _)) = &self.listener else { return };
            let peer = match listener.accept() {
                Ok((peer, _)) => peer,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            // One that has left may not have been noticed yet.
            self.read_ahead();
            if self.peer.is_some() {
                info!("a second peer of a link was turned away");
                continue;
            }
            if let Err(error) = self.take(peer, watches) {
                warn!("a peer of a link cannot be served: {error}");
            }
        }
    }

    /// The next packet, behind an empty header; false: there is none now.
    pub(super) fn receive(&mut self, frame: &mut Frame) -> bool {
        loop {
            if let Some((prefix, rest)) = self.input.held().split_first_chunk::<PREFIX>() {
                let length = usize::try_from(u32::from_be_bytes(*prefix)).unwrap_or(usize::MAX);
                if length > MOST {
                    self.hang_up("a frame that is longer than any packet");
                    return false;
                }
                if let Some(packet) = rest.get(..length) {
                    let room = frame.plain(length);
                    let fits = room.map(|room| room.copy_from_slice(packet)).is_some();
                    self.input.drop_first(PREFIX + length);
                    if fits {
                        return true;
                    }
                    self.too_long += 1;
                    continue;
                }
            }
            if !self.read_ahead() {
                frame.clear();
                return false;
            }
        }
    }

    /// Reads what there is; false: nothing came.
    fn read_ahead(&mut self) -> bool {
        let Some(peer) = self.peer.as_ref().filter(|_| self.readable) else { return false };
        match rustix::io::read(peer, self.input.room(PREFIX + MOST)) {
            Ok(0) => self.hang_up("the peer of the link has left"),
            Ok(got) => {
                self.input.grow(got);
                return true;
            }
            Err(Errno::INTR) => return true,
            Err(Errno::AGAIN) => self.readable = false,
            Err(_) => self.hang_up("the peer of the link is gone"),
        }
        false
    }

    fn hang_up(&mut self, why: &str) {
        info!("link down: {why}");
        self.peer = None;
        self.input.clear();
        self.output.clear();
    }

    /// Whether a packet can be sent now, or dropped because nobody is there.
    pub(super) fn has_room(&mut self) -> bool {
        if self.output.held().len() >= OUTPUT {
            self.flush();
        }
        self.output.held().len() < OUTPUT
    }

    pub(super) fn send(&mut self, packet: &[u8]) -> Sent {
        if self.peer.is_none() {
            return Sent::Down;
        }
        let Ok(length) = u32::try_from(packet.len()) else { return Sent::Refused };
        if !self.output.add(&length.to_be_bytes()) || !self.output.add(packet) {
            // Half a frame would break the stream. It does not come to this: see `has_room`.
            self.hang_up("no room for a packet");
            return Sent::Down;
        }
        Sent::Yes
    }

    pub(super) fn flush(&mut self) {
        while self.writable && !self.output.held().is_empty() {
            let Some(peer) = &self.peer else { return };
            match send(peer.as_fd(), self.output.held(), SendFlags::NOSIGNAL) {
                Ok(put) => self.output.drop_first(put),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.writable = false,
                Err(_) => self.hang_up("the peer of the link takes nothing"),
            }
        }
    }
}
