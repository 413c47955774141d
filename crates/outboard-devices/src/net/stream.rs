//! A card's link over a Unix stream socket, as QEMU's `-netdev stream` and passt speak: each packet follows
//! its length, four bytes, big endian.
//!
//! Invariants: nothing here waits; a peer that breaks off or breaks the framing takes the link down, and the
//! next one brings it up; no frame is believed to be longer than [`MOST`].

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use outboard::Error;
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use tracing::{info, warn};

use crate::names::{self, Name};
use crate::watches::{Edge, Watches};

/// The longest packet, as QEMU has it: 64 KiB and room for what goes before it.
pub const MOST: usize = (64 << 10) + 4096;
/// Bytes of a length.
const PREFIX: usize = 4;
/// Bytes that one read takes.
const CHUNK: usize = 64 << 10;
/// Bytes that wait for the peer before the guest does.
const OUTPUT: usize = 256 << 10;

/// Tokens of its descriptors.
pub(super) const PEER: u64 = 0;
pub(super) const LISTENER: u64 = 1;

/// How a link is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stream {
    /// To who listens on this path: passt, or QEMU's `server=on`.
    Connect(PathBuf),
    /// By who connects to this path; one at a time.
    Listen(PathBuf),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Link {
    listener: Option<(UnixListener, Name)>,
    peer: Option<UnixStream>,
    readable: bool,
    writable: bool,
    input: VecDeque<u8>,
    output: VecDeque<u8>,
}

impl Link {
    pub(super) fn open(stream: &Stream, watches: &Watches) -> Result<Self, Error> {
        let mut link = Self {
            listener: None,
            peer: None,
            readable: false,
            writable: false,
            input: VecDeque::new(),
            output: VecDeque::new(),
        };
        let failed =
            |path: &Path, error: io::Error| Error::refused(format!("{}: {error}", path.display()));
        match stream {
            Stream::Connect(path) => {
                let peer = UnixStream::connect(path).map_err(|error| failed(path, error))?;
                link.take(peer, watches)?;
            }
            Stream::Listen(path) => {
                let (listener, name) = names::listen(path).map_err(|error| failed(path, error))?;
                watches.add(&listener, LISTENER)?;
                link.listener = Some((listener, name));
            }
        }
        Ok(link)
    }

    fn take(&mut self, peer: UnixStream, watches: &Watches) -> io::Result<()> {
        peer.set_nonblocking(true)?;
        watches.add(&peer, PEER)?;
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

    /// Something has happened to a descriptor.
    pub(super) fn edge(&mut self, edge: Edge, watches: &Watches) {
        if edge.token == LISTENER {
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

    /// The length of the packet that is next, once all of it is there.
    pub(super) fn next(&mut self) -> Option<usize> {
        loop {
            if let Some(length) = self.prefix() {
                if length > MOST {
                    self.hang_up("a frame that is longer than any packet");
                    return None;
                }
                if self.input.len() >= PREFIX + length {
                    return Some(length);
                }
            }
            if !self.read_ahead() {
                return None;
            }
        }
    }

    fn prefix(&self) -> Option<usize> {
        let mut bytes = self.input.iter();
        let prefix = [*bytes.next()?, *bytes.next()?, *bytes.next()?, *bytes.next()?];
        Some(usize::try_from(u32::from_be_bytes(prefix)).unwrap_or(usize::MAX))
    }

    /// Takes the next packet into `packet`, in place of what it holds. To be called after [`Link::next`].
    pub(super) fn receive(&mut self, length: usize, packet: &mut Vec<u8>) {
        packet.clear();
        packet.extend(self.input.drain(..(PREFIX + length).min(self.input.len())).skip(PREFIX));
    }

    /// Reads what there is, up to a chunk; false: nothing came.
    fn read_ahead(&mut self) -> bool {
        let Some(peer) = self.peer.as_ref().filter(|_| self.readable) else { return false };
        let mut bytes = [0; CHUNK];
        match rustix::io::read(peer, &mut bytes) {
            Ok(0) => self.hang_up("the peer of the link has left"),
            Ok(got) => {
                self.input.extend(bytes.get(..got).unwrap_or_default());
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
        if self.output.len() >= OUTPUT {
            self.flush();
        }
        self.output.len() < OUTPUT
    }

    /// Sends a packet; false: nobody is there, or it is none.
    pub(super) fn send(&mut self, packet: &[u8]) -> bool {
        let Ok(length) = u32::try_from(packet.len()) else { return false };
        if self.peer.is_none() || packet.len() > MOST {
            return false;
        }
        self.output.extend(length.to_be_bytes());
        self.output.extend(packet);
        self.flush();
        true
    }

    pub(super) fn flush(&mut self) {
        while self.writable && !self.output.is_empty() {
            let Some(peer) = &self.peer else { return };
            let (front, _) = self.output.as_slices();
            match send(peer.as_fd(), front, SendFlags::NOSIGNAL) {
                Ok(put) => drop(self.output.drain(..put)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.writable = false,
                Err(_) => self.hang_up("the peer of the link takes nothing"),
            }
        }
    }
}
