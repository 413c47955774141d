//! The front-end's end of the main socket as a pure state machine.
//!
//! ```text
//!  send(Request) ─▶ gate ─▶ encode ─▶ Frame ─▶ transmit()
//!                     └▶ a waiting place when an answer will come
//!  receive(bytes, fds) ─▶ Decoder ─▶ first waiting place: same id? right shape? ─▶ Answer
//! ```
//! Invariants: the back-end is not trusted: a reply must have flags 5, the id of the oldest request
//! that waits, and the shape the table gives it, else the connection is over. Answers come in the
//! order of the requests. Requests with a reply of their own never ask for an acknowledgement too.

mod answer;
mod request;

pub use answer::Answer;
pub use request::Request;

use std::collections::VecDeque;

use crate::decoder::{Decoder, Expects, Message};
use crate::features::ProtocolFeatures;
use crate::frame::Frame;
use crate::table::{FrontendCode, MessageInfo, Negotiated, ReplyKind, Side, info};
use crate::violation::{Refusal, Violation};

/// Whether an answer to a request will come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use]
pub enum Expect {
    /// None.
    Nothing,
    /// An acknowledgement: [`Answer::Ack`].
    Ack,
    /// The message's own reply.
    Reply,
}

/// The state machine. `Fd` is `OwnedFd` in a program and a number in a test.
#[derive(Debug)]
pub struct Frontend<Fd> {
    now: Negotiated,
    protocol_offered: ProtocolFeatures,
    waiting: VecDeque<Waiting>,
    decoder: Decoder<Fd>,
    out: VecDeque<Frame<Fd>>,
}

/// A request whose answer has not come.
#[derive(Debug)]
struct Waiting {
    code: FrontendCode,
    /// How it is answered.
    kind: ReplyKind,
    /// Its payload, where the answer must match it.
    echo: Vec<u8>,
    /// What was negotiated before, if the request changed that and may be refused.
    before: Option<Negotiated>,
}

impl<Fd> Default for Frontend<Fd> {
    fn default() -> Self {
        Self::new()
    }
}

impl<Fd> Frontend<Fd> {
    /// The machine at the start of a connection.
    #[must_use]
    pub fn new() -> Self {
        Self {
            now: Negotiated { gpu_socket: true, ..Negotiated::default() },
            protocol_offered: ProtocolFeatures::empty(),
            waiting: VecDeque::new(),
            decoder: Decoder::new(Expects::Replies),
            out: VecDeque::new(),
        }
    }

    /// Queues a request. An acknowledgement is asked for whenever that was negotiated and the
    /// message has no reply of its own.
    ///
    /// # Errors
    /// Its feature was not negotiated, or it cannot be put on the wire; nothing is queued.
    pub fn send(&mut self, request: Request<Fd>) -> Result<Expect, Refusal> {
        self.queue(request, true)
    }

    /// Queues a request without asking for an acknowledgement.
    ///
    /// # Errors
    /// As for [`send`](Self::send).
    pub fn send_without_ack(&mut self, request: Request<Fd>) -> Result<Expect, Refusal> {
        self.queue(request, false)
    }

    /// Queues any bytes at all, with no answer expected: for judges and hostile tests.
    pub fn send_raw(&mut self, frame: Frame<Fd>) {
        self.out.push_back(frame);
    }

    /// The next message to send.
    pub fn transmit(&mut self) -> Option<Frame<Fd>> {
        self.out.pop_front()
    }

    /// Takes what one `recvmsg` returned; the descriptors belong to the first of the bytes. What
    /// comes after a violation is dropped.
    pub fn receive(&mut self, bytes: &[u8], fds: Vec<Fd>) {
        self.decoder.receive(bytes, fds);
    }

    /// Bytes that are missing from the reply that is coming in, or from its header. A transport
    /// that reads no more at once gives each reply its own descriptors.
    #[must_use]
    pub fn wanted(&self) -> usize {
        self.decoder.wanted()
    }

    /// The next answer. `None`: more bytes are wanted.
    ///
    /// # Errors
    /// The back-end broke a rule: the connection has to end. Every later call returns the same.
    pub fn poll(&mut self) -> Result<Option<Answer<Fd>>, Violation> {
        let Some(message) = self.decoder.next_message()? else { return Ok(None) };
        self.take(message).map(Some).map_err(|violation| self.decoder.close(violation))
    }

    /// Requests whose answers have not come.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.waiting.len()
    }

    /// Whether no part of a reply is waiting.
    #[must_use]
    pub fn at_message_boundary(&self) -> bool {
        self.decoder.buffered() == 0
    }

    /// What has been offered and acknowledged. Feature bits and protocol features are the ones
    /// sent last and not refused.
    #[must_use]
    pub const fn negotiated(&self) -> &Negotiated {
        &self.now
    }

    /// The protocol features the back-end offered; empty before the answer has come.
    #[must_use]
    pub const fn offered_protocol_features(&self) -> ProtocolFeatures {
        self.protocol_offered
    }

    fn queue(&mut self, request: Request<Fd>, ack: bool) -> Result<Expect, Refusal> {
        let code = request.code();
        let row = row(code)?;
        if !row.needs.is_open(&self.now) {
            return Err(Refusal::NotNegotiated { message: row.name });
        }
        self.check_offered(&request, row)?;
        let before = self.now;
        self.adopt(&request);
        // Both sets must agree on REPLY_ACK while SET_PROTOCOL_FEATURES changes it.
        let protocol = before.protocol & self.now.protocol;
        let ack = ack && !row.reply.is_own() && row.acknowledges(true, protocol);
        let kind = request.answer_kind(row, ack);
        let (payload, fds) = match request.encode(row) {
            Ok(parts) => parts,
            Err(refusal) => {
                self.now = before;
                return Err(refusal);
            }
        };
        let asks = kind == Some(ReplyKind::Ack);
        self.out.push_back(Frame::request(row.id, asks, &payload, fds));
        let Some(kind) = kind else { return Ok(Expect::Nothing) };
        let before = (before != self.now).then_some(before);
        self.waiting.push_back(Waiting { code, kind, echo: payload, before });
        Ok(if kind.is_own() { Expect::Reply } else { Expect::Ack })
    }

    fn check_offered(&self, request: &Request<Fd>, row: &MessageInfo) -> Result<(), Refusal> {
        let bits = match request {
            Request::SetFeatures(features) => features & !self.now.offered,
            Request::SetProtocolFeatures(features) => (*features - self.protocol_offered).bits(),
            _ => 0,
        };
        if bits == 0 { Ok(()) } else { Err(Refusal::Unoffered { message: row.name, bits }) }
    }

    fn adopt(&mut self, request: &Request<Fd>) {
        match request {
            Request::SetFeatures(features) => self.now.acked = *features,
            Request::SetProtocolFeatures(features) => self.now.protocol = *features,
            Request::ResetDevice => self.now.acked = 0,
            _ => {}
        }
    }

    /// Matches a reply with the oldest request that waits.
    fn take(&mut self, message: Message<Fd>) -> Result<Answer<Fd>, Violation> {
        let got = message.header.request;
        let Some(waiting) = self.waiting.pop_front() else {
            return Err(Violation::ReplyUnasked { request: got });
        };
        let Some(row) = info(Side::FrontEnd, waiting.code.id()) else {
            return Err(Violation::ReplyUnasked { request: got });
        };
        if got != row.id {
            return Err(Violation::ReplyOrder { message: row.name, expected: row.id, got });
        }
        let answer = Answer::decode(waiting.code, row, waiting.kind, &waiting.echo, message)?;
        match &answer {
            Answer::Features(features) => self.now.offered = *features,
            Answer::ProtocolFeatures(features) => self.protocol_offered = *features,
            Answer::Ack { value, .. } if *value != 0 => {
                if let Some(before) = waiting.before {
                    self.now = Negotiated { offered: self.now.offered, ..before };
                }
            }
            _ => {}
        }
        Ok(answer)
    }
}

fn row(code: FrontendCode) -> Result<&'static MessageInfo, Refusal> {
    // Every code has a row: both come from the same lines. The error cannot happen.
    info(Side::FrontEnd, code.id()).ok_or(Refusal::Unsupported)
}
