//! From a byte stream with descriptors to whole messages (vhost-user, "Communication").
//!
//! ```text
//!  receive(bytes, fds) ──▶ [ header │ payload │ head…   ──▶ next_message() ──▶ Message { header, payload, fds }
//!                            ▲ fds are remembered at the stream position of bytes[0]
//! ```
//! Invariant: a message gets exactly the descriptors that came with its first byte; descriptors
//! that came elsewhere are dropped at once and counted, so that no peer piles them up here. Nothing
//! is allocated for bytes that have not come: a header that is out of step is refused before its
//! payload is waited for. A violation is the end: nothing is taken after it, and every later call
//! returns the same.

use std::collections::VecDeque;

use crate::header::{
    FLAG_NEED_REPLY, FLAG_REPLY, HEADER_SIZE, Header, MAX_PAYLOAD, REPLY_FLAGS, VERSION,
    VERSION_MASK,
};
use crate::payload;
use crate::violation::Violation;

/// The flag bits that mean something.
const KNOWN_FLAGS: u32 = VERSION_MASK | FLAG_REPLY | FLAG_NEED_REPLY;

/// What kind of messages a decoder takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expects {
    /// Requests: version 1, reply bit clear.
    Requests,
    /// Replies: flags exactly 5.
    Replies,
    /// Replies on the back-end channel: version 1, reply bit set, need_reply clear. The rest of the
    /// flags is ignored: QEMU sends back what the request had.
    ChannelReplies,
}

/// One whole message as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message<Fd> {
    /// The header.
    pub header: Header,
    /// Exactly `header.size` bytes.
    pub payload: Vec<u8>,
    /// Descriptors that rode with the first byte.
    pub fds: Vec<Fd>,
    /// Descriptors that came behind the first byte; they were dropped.
    pub misplaced: usize,
}

/// Cuts a byte stream into messages, whatever way it was split.
#[derive(Debug)]
pub struct Decoder<Fd> {
    expects: Expects,
    bytes: Vec<u8>,
    /// Bytes at the front of `bytes` that were taken already.
    taken: usize,
    arrived: VecDeque<Arrived<Fd>>,
    closed: Option<Violation>,
}

/// The descriptors that came with one message.
#[derive(Debug)]
struct Arrived<Fd> {
    /// Index in the buffer of the message's first byte.
    at: usize,
    /// Those that came with the first byte.
    fds: Vec<Fd>,
    /// Number of those that came later and were dropped.
    misplaced: usize,
}

impl<Fd> Decoder<Fd> {
    /// A decoder at the start of a stream.
    #[must_use]
    pub const fn new(expects: Expects) -> Self {
        Self { expects, bytes: Vec::new(), taken: 0, arrived: VecDeque::new(), closed: None }
    }

    /// Takes what one `recvmsg` returned; the descriptors belong to the first of the bytes. What
    /// comes after a violation is dropped.
    pub fn receive(&mut self, bytes: &[u8], fds: Vec<Fd>) {
        if self.closed.is_some() {
            return;
        }
        self.bytes.drain(..self.taken);
        for arrived in &mut self.arrived {
            arrived.at = arrived.at.saturating_sub(self.taken);
        }
        self.taken = 0;
        if !fds.is_empty() && !bytes.is_empty() {
            self.file(fds);
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// Bytes that came and were not taken yet.
    #[must_use]
    pub fn buffered(&self) -> usize {
        self.bytes.len() - self.taken
    }

    /// Bytes that are missing from the message (or header) that is coming in. A transport that
    /// never reads more than this gives each message exactly its own descriptors: the kernel
    /// glues plain bytes before bytes with descriptors into one `recvmsg`.
    #[must_use]
    pub fn wanted(&self) -> usize {
        let have = self.buffered();
        match self.peek() {
            Some(header) => {
                (HEADER_SIZE + to_usize(header.size.min(MAX_PAYLOAD))).saturating_sub(have)
            }
            None => HEADER_SIZE - have,
        }
    }

    /// The violation that ended the stream.
    #[must_use]
    pub const fn closed(&self) -> Option<&Violation> {
        self.closed.as_ref()
    }

    /// Ends the stream because of what a message says. Returns the violation that ended it, which
    /// is the first one.
    pub fn close(&mut self, violation: Violation) -> Violation {
        self.closed.get_or_insert(violation).clone()
    }

    /// Nothing, or the violation that ended the stream.
    ///
    /// # Errors
    /// That violation.
    pub fn check_open(&self) -> Result<(), Violation> {
        self.closed.clone().map_or(Ok(()), Err)
    }

    /// The next whole message.
    ///
    /// # Errors
    /// The stream is out of step: wrong version, wrong direction, or a payload no message has; or
    /// it was ended before.
    pub fn next_message(&mut self) -> Result<Option<Message<Fd>>, Violation> {
        self.check_open()?;
        let Some(header) = self.peek() else { return Ok(None) };
        if let Err(violation) = self.check(&header) {
            return Err(self.close(violation));
        }
        let start = self.taken;
        let body = start + HEADER_SIZE;
        let end = body + to_usize(header.size);
        let Some(payload) = self.bytes.get(body..end) else { return Ok(None) };
        let payload = payload.to_vec();
        self.taken = end;
        let (fds, misplaced) = self.take_fds(start);
        Ok(Some(Message { header, payload, fds, misplaced }))
    }

    fn peek(&self) -> Option<Header> {
        payload::read(self.bytes.get(self.taken..)?)
    }

    fn check(&self, header: &Header) -> Result<(), Violation> {
        let request = header.request;
        match self.expects {
            Expects::Requests if header.version() != VERSION => {
                return Err(Violation::Version { request, version: header.version() });
            }
            Expects::Requests if header.is_reply() => {
                return Err(Violation::ReplyInRequest { request });
            }
            Expects::Replies if header.flags != REPLY_FLAGS => {
                return Err(Violation::ReplyFlags { request, flags: header.flags });
            }
            Expects::ChannelReplies if header.flags & KNOWN_FLAGS != REPLY_FLAGS => {
                return Err(Violation::ReplyFlags { request, flags: header.flags });
            }
            Expects::Requests | Expects::Replies | Expects::ChannelReplies => {}
        }
        if header.size > MAX_PAYLOAD {
            return Err(Violation::TooLong { request, size: header.size, limit: MAX_PAYLOAD });
        }
        Ok(())
    }

    /// Files descriptors that come with the next byte: they stay only if a message begins there.
    fn file(&mut self, fds: Vec<Fd>) {
        let next = self.bytes.len();
        let mut at = self.taken;
        while let Some(header) = self.bytes.get(at..).and_then(payload::read::<Header>) {
            let end = (at + HEADER_SIZE).saturating_add(to_usize(header.size));
            if end > next {
                break;
            }
            at = end;
        }
        if at == next {
            self.arrived.push_back(Arrived { at, fds, misplaced: 0 });
            return;
        }
        match self.arrived.back_mut() {
            Some(arrived) if arrived.at == at => arrived.misplaced += fds.len(),
            _ => {
                let misplaced = fds.len();
                self.arrived.push_back(Arrived { at, fds: Vec::new(), misplaced });
            }
        }
    }

    /// Takes the descriptors of the message at `start`.
    fn take_fds(&mut self, start: usize) -> (Vec<Fd>, usize) {
        match self.arrived.pop_front() {
            Some(arrived) if arrived.at == start => (arrived.fds, arrived.misplaced),
            Some(later) => {
                self.arrived.push_front(later);
                (Vec::new(), 0)
            }
            None => (Vec::new(), 0),
        }
    }
}

fn to_usize(size: u32) -> usize {
    usize::try_from(size).unwrap_or(usize::MAX)
}
