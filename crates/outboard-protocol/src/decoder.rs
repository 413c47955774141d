//! From a byte stream with descriptors to whole messages (vhost-user, "Communication").
//!
//! ```text
//!  receive(bytes, fds) ──▶ [ header │ payload │ head…   ──▶ next_message() ──▶ Message { header, payload, fds }
//!                            ▲ fds are remembered at the stream position of bytes[0]
//! ```
//! Invariant: a message gets exactly the descriptors that came with its first byte; descriptors
//! that came elsewhere are dropped and counted. Nothing is allocated for bytes that have not come:
//! a header that is out of step is refused before its payload is waited for.

use std::collections::VecDeque;

use crate::header::{HEADER_SIZE, Header, MAX_PAYLOAD, REPLY_FLAGS, VERSION};
use crate::payload;
use crate::violation::Violation;

/// What kind of messages a decoder takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expects {
    /// Requests: version 1, reply bit clear.
    Requests,
    /// Replies: flags exactly 5.
    Replies,
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
    /// Descriptors with the index in `bytes` of the byte they came with.
    fds: VecDeque<(usize, Vec<Fd>)>,
}

impl<Fd> Decoder<Fd> {
    /// A decoder at the start of a stream.
    #[must_use]
    pub const fn new(expects: Expects) -> Self {
        Self { expects, bytes: Vec::new(), taken: 0, fds: VecDeque::new() }
    }

    /// Takes what one `recvmsg` returned; the descriptors belong to the first of the bytes.
    pub fn receive(&mut self, bytes: &[u8], fds: Vec<Fd>) {
        self.bytes.drain(..self.taken);
        for (at, _) in &mut self.fds {
            *at = at.saturating_sub(self.taken);
        }
        self.taken = 0;
        if !fds.is_empty() && !bytes.is_empty() {
            self.fds.push_back((self.bytes.len(), fds));
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
            Some(header) => (HEADER_SIZE + to_usize(header.size)).saturating_sub(have),
            None => HEADER_SIZE - have,
        }
    }

    /// The next whole message.
    ///
    /// # Errors
    /// The stream is out of step: wrong version, wrong direction, or a payload no message has.
    pub fn next_message(&mut self) -> Result<Option<Message<Fd>>, Violation> {
        let Some(header) = self.peek() else { return Ok(None) };
        self.check(&header)?;
        let start = self.taken;
        let body = start + HEADER_SIZE;
        let end = body + to_usize(header.size);
        let Some(payload) = self.bytes.get(body..end) else { return Ok(None) };
        let payload = payload.to_vec();
        self.taken = end;
        let (fds, misplaced) = self.take_fds(start, end);
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
            Expects::Requests | Expects::Replies => {}
        }
        if header.size > MAX_PAYLOAD {
            return Err(Violation::TooLong { request, size: header.size, limit: MAX_PAYLOAD });
        }
        Ok(())
    }

    /// Takes the descriptors of the message at `start..end` and drops those behind its first byte.
    fn take_fds(&mut self, start: usize, end: usize) -> (Vec<Fd>, usize) {
        let mut own = Vec::new();
        let mut misplaced = 0;
        while self.fds.front().is_some_and(|(at, _)| *at < end) {
            let Some((at, fds)) = self.fds.pop_front() else { break };
            if at == start && own.is_empty() {
                own = fds;
            } else {
                misplaced += fds.len();
            }
        }
        (own, misplaced)
    }
}

fn to_usize(size: u32) -> usize {
    usize::try_from(size).unwrap_or(usize::MAX)
}
