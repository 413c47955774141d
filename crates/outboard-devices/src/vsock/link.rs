//! The host's socket of one connection, and what the guest sent that it has not taken yet.
//!
//! ```text
//!  guest ─▶ straight into the socket, while nothing waits ─▶ host
//!       └─▶ waiting: no more than the credit that the guest was given ─┘
//! ```
//! Invariants: nothing here waits; bytes that a host will never read count as taken, so that the guest is not
//! held up by who has left; a message goes as a whole or not at all.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use outboard::Readable;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown, sockopt};
use serde::{Deserialize, Serialize};

use super::packet::Kind;
use super::stage::ROOM;
use crate::watches::{Ask, Edge};

/// Bytes of a copy.
const PIECE: usize = 4096;

/// What one look at the socket brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Got {
    /// So many bytes, or a message of so many.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// The host sends no more.
    End,
    /// The connection is to end: it failed, or a message has no room.
    Failed,
}

/// The connection is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failed;

/// A link in a state, beside its socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedLink {
    waiting: Vec<u8>,
    messages: Vec<u32>,
    part: u32,
    shut: bool,
    closed: bool,
}

impl SavedLink {
    /// Whether it can be one of this kind, with so many bytes of the guest that were not taken.
    pub(super) fn is_sound(&self, kind: Kind, untaken: u32) -> bool {
        let waiting = self.waiting.len() as u64;
        let messages = self.messages.iter().map(|length| u64::from(*length)).sum::<u64>();
        waiting <= u64::from(untaken)
            && match kind {
                Kind::Stream => self.messages.is_empty() && self.part == 0,
                Kind::Seqpacket => {
                    messages + u64::from(self.part) == waiting && !self.messages.contains(&0)
                }
            }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Link {
    socket: OwnedFd,
    kind: Kind,
    readable: bool,
    writable: bool,
    /// What its socket is watched for.
    asks: Ask,
    /// An end follows what can be read; nobody is there.
    ended: bool,
    hung_up: bool,
    waiting: VecDeque<u8>,
    /// Lengths of the whole messages that wait, and what waits of one that is not whole.
    messages: VecDeque<u32>,
    part: u32,
    /// The guest sends no more: the host is told after what waits.
    shut: bool,
    /// The host takes nothing more, or was told that nothing comes.
    closed: bool,
}

impl Link {
    pub(super) fn new(socket: OwnedFd, kind: Kind) -> Self {
        if kind == Kind::Seqpacket {
            // A message goes at once; what the system does not grant makes long ones fail.
            let _ = sockopt::set_socket_send_buffer_size(&socket, ROOM);
        }
        Self {
            socket,
            kind,
            readable: true,
            writable: true,
            asks: Ask::Bytes,
            ended: false,
            hung_up: false,
            waiting: VecDeque::new(),
            messages: VecDeque::new(),
            part: 0,
            shut: false,
            closed: false,
        }
    }

    /// Goes on where another process was; `socket` is to be watched anew.
    pub(super) fn restored(socket: OwnedFd, kind: Kind, saved: SavedLink) -> Self {
        let SavedLink { waiting, messages, part, shut, closed } = saved;
        // What waits goes when there is room, which is there or comes.
        let writable = waiting.is_empty();
        Self {
            writable,
            asks: if writable { Ask::Bytes } else { Ask::Room },
            waiting: waiting.into(),
            messages: messages.into(),
            part,
            shut,
            closed,
            ..Self::new(socket, kind)
        }
    }

    /// As it stands, for another process.
    pub(super) fn save(&self) -> SavedLink {
        SavedLink {
            waiting: self.waiting.iter().copied().collect(),
            messages: self.messages.iter().copied().collect(),
            part: self.part,
            shut: self.shut,
            closed: self.closed,
        }
    }

    /// Something has happened to the socket.
    pub(super) fn edge(&mut self, edge: Edge) {
        self.readable |= edge.readable;
        self.writable |= edge.writable;
        self.ended |= edge.ended;
        self.hung_up |= edge.hung_up;
    }

    /// What its socket is watched for: for room only while bytes wait for it.
    pub(super) fn asks(&self) -> Ask {
        self.asks
    }

    /// What it is to be watched for from now on, if that is something else.
    pub(super) fn asks_anew(&mut self) -> Option<Ask> {
        let asks = if self.writable { Ask::Bytes } else { Ask::Room };
        (std::mem::replace(&mut self.asks, asks) != asks).then_some(asks)
    }

    /// Whether a read may bring something.
    pub(super) fn is_readable(&self) -> bool {
        self.readable
    }

    /// Whether nobody is at the other end.
    pub(super) fn is_hung_up(&self) -> bool {
        self.hung_up
    }

    /// Whether bytes of the guest wait for a host that may take them.
    pub(super) fn is_draining(&self) -> bool {
        !self.waiting.is_empty() && !self.closed
    }

    /// Takes the first `length` bytes of `from`, which has them; returns how many bytes, of these and of earlier
    /// ones, have left for the host.
    pub(super) fn put(
        &mut self,
        mut from: Readable<'_>,
        length: u32,
        whole: bool,
    ) -> Result<u32, Failed> {
        if self.closed {
            return Ok(length);
        }
        let mut left = length;
        let direct = self.waiting.is_empty() && self.writable && from.len() == u64::from(length);
        if direct && (whole || self.kind == Kind::Stream) {
            let sent = match self.kind {
                Kind::Stream => from.send(&self.socket),
                Kind::Seqpacket => from.send_message(&self.socket),
            };
            match sent {
                Ok(sent) => left -= u32::try_from(sent).unwrap_or(left).min(left),
                // Too many pieces: it goes through a copy.
                Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => {}
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::AGAIN) => {}
                    Some(Errno::MSGSIZE) => return Err(Failed),
                    _ => return Ok(self.close(length)),
                },
            }
            self.writable &= left == 0;
            if left == 0 {
                return Ok(length);
            }
        }
        self.keep(from, left)?;
        if self.kind == Kind::Seqpacket {
            self.part += left;
            // A message of no bytes would look like an end.
            if whole && self.part > 0 {
                self.messages.push_back(std::mem::take(&mut self.part));
            }
        }
        Ok(length - left + self.flush()?)
    }

    fn keep(&mut self, mut from: Readable<'_>, length: u32) -> Result<(), Failed> {
        let mut left = usize::try_from(length).unwrap_or(usize::MAX);
        let mut piece = [0; PIECE];
        while left > 0 {
            let bytes = piece.get_mut(..left.min(PIECE)).unwrap_or_default();
            from.read_exact(bytes).map_err(|_| Failed)?;
            self.waiting.extend(&*bytes);
            left -= bytes.len();
        }
        Ok(())
    }

    /// The host takes nothing more: what waits, and `more`, is as good as taken.
    fn close(&mut self, more: u32) -> u32 {
        let lost = u32::try_from(self.waiting.len()).unwrap_or(u32::MAX);
        self.closed = true;
        self.waiting = VecDeque::new();
        self.messages = VecDeque::new();
        lost.saturating_add(more)
    }

    /// Whether the host has said that it takes nothing more.
    pub(super) fn is_closed(&self) -> bool {
        self.closed && !self.shut
    }

    /// Hands the host what waits for it, as far as it takes it. Returns the bytes.
    pub(super) fn flush(&mut self) -> Result<u32, Failed> {
        let mut done = 0_u32;
        while self.writable && !self.waiting.is_empty() {
            let next = match self.kind {
                Kind::Stream => self.waiting.as_slices().0,
                Kind::Seqpacket => {
                    let Some(length) = self.messages.front() else { break };
                    let length = usize::try_from(*length).unwrap_or(usize::MAX);
                    self.waiting.make_contiguous().get(..length).unwrap_or_default()
                }
            };
            match send(&self.socket, next, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(sent) => {
                    self.waiting.drain(..sent.min(self.waiting.len()));
                    self.messages.pop_front();
                    done += u32::try_from(sent).unwrap_or(0);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::MSGSIZE) => return Err(Failed),
                Err(_) => return Ok(self.close(done)),
            }
        }
        if self.shut && self.waiting.is_empty() && !self.closed {
            self.closed = true;
            // It may be gone already.
            let _ = shutdown(&self.socket, Shutdown::Write);
        }
        Ok(done)
    }

    /// The guest sends no more. What there is of a message that will never be whole counts as taken.
    pub(super) fn end(&mut self) -> Result<u32, Failed> {
        self.shut = true;
        let part = std::mem::take(&mut self.part);
        let whole = self.waiting.len().saturating_sub(usize::try_from(part).unwrap_or(usize::MAX));
        self.waiting.truncate(whole);
        Ok(self.flush()?.saturating_add(part))
    }

    /// The guest receives no more.
    pub(super) fn end_reading(&mut self) {
        let _ = shutdown(&self.socket, Shutdown::Read);
    }

    /// Reads what there is, up to the room.
    pub(super) fn read(&mut self, to: &mut [u8]) -> Got {
        if !self.readable {
            return Got::Nothing;
        }
        let room = to.len();
        let flags = match self.kind {
            Kind::Stream => RecvFlags::DONTWAIT,
            Kind::Seqpacket => RecvFlags::DONTWAIT | RecvFlags::TRUNC,
        };
        let got = loop {
            match recv(&self.socket, &mut *to, flags) {
                Err(Errno::INTR) => {}
                // A message of no bytes, which looks like an end.
                Ok((_, 0)) if self.kind == Kind::Seqpacket && !self.ended => {}
                Ok((_, got)) => break Ok(got),
                Err(error) => break Err(error),
            }
        };
        match got {
            Ok(0) => {
                self.readable = false;
                Got::End
            }
            Ok(got) if got > room => Got::Failed,
            Ok(got) => {
                // Less than there was room for: it is empty, or an end follows.
                self.readable = got == room || self.ended || self.kind == Kind::Seqpacket;
                Got::Bytes(got)
            }
            Err(Errno::AGAIN) => {
                self.readable = false;
                Got::Nothing
            }
            Err(_) => Got::Failed,
        }
    }

    /// Sends a few bytes of ours ahead of everything else; there is room for them.
    pub(super) fn greet(&mut self, bytes: &[u8]) -> Result<(), Failed> {
        match send(&self.socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(sent) if sent == bytes.len() => Ok(()),
            _ => Err(Failed),
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
