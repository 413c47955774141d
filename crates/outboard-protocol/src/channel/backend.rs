//! The back-end's end of the channel: it sends requests and matches the answers with them.
//!
//! ```text
//!  send(ChannelRequest) ─▶ gate ─▶ encode ─▶ Frame ─▶ transmit()
//!                           └▶ a waiting place when an answer will come     ◀─ forget(id)
//!  receive(bytes, fds) ─▶ Decoder ─▶ oldest waiting place of that message ─▶ ChannelAnswer
//! ```
//! Invariants: an answer belongs to the oldest request of its message id that waits, so different
//! messages may be answered out of step; an answer that nobody waits for ends the channel. A request
//! that was forgotten before it was transmitted is never sent; later, its answer is swallowed.

use std::collections::VecDeque;

use crate::channel::ChannelRequest;
use crate::decoder::{Decoder, Expects, Message};
use crate::features::{ProtocolFeatures, virtio};
use crate::frame::Frame;
use crate::payload::read_u64;
use crate::table::{BackendCode, MessageInfo, Negotiated, ReplyKind, Side, info};
use crate::violation::{Refusal, Violation};

/// The name of one request on one channel; a later request has a larger one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

impl RequestId {
    /// The number, counted from 1.
    #[must_use]
    pub const fn number(self) -> u64 {
        self.0
    }
}

/// What [`ChannelBackend::send`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use]
pub struct Sent {
    /// The request's name.
    pub id: RequestId,
    /// Whether an answer will come.
    pub answer: bool,
}

/// The front-end's answer to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct ChannelAnswer<Fd> {
    /// The request.
    pub id: RequestId,
    /// Its message.
    pub request: BackendCode,
    /// Success, for SHARED_OBJECT_LOOKUP with the object's descriptor (a front-end that answers
    /// success without one has lost it: treat that as failure); or the code of the refusal: QEMU
    /// says 1, crosvm a negative `errno` in 64 bits.
    pub result: Result<Option<Fd>, u64>,
}

/// The state machine. `Fd` is `OwnedFd` in a program and a number in a test.
#[derive(Debug)]
pub struct ChannelBackend<Fd> {
    now: Negotiated,
    last: RequestId,
    waiting: VecDeque<Waiting>,
    decoder: Decoder<Fd>,
    out: VecDeque<(RequestId, Frame<Fd>)>,
}

/// A request whose answer has not come.
#[derive(Debug)]
struct Waiting {
    id: RequestId,
    code: BackendCode,
    /// Nobody wants the answer any more.
    forgotten: bool,
}

impl<Fd> ChannelBackend<Fd> {
    /// The machine at the start of a channel, with what the main socket has negotiated.
    #[must_use]
    pub fn new(negotiated: ProtocolFeatures, features: u64) -> Self {
        Self {
            now: agreed(negotiated, features),
            last: RequestId(0),
            waiting: VecDeque::new(),
            decoder: Decoder::new(Expects::ChannelReplies),
            out: VecDeque::new(),
        }
    }

    /// What the main socket has negotiated has changed: SET_FEATURES usually comes after
    /// SET_BACKEND_REQ_FD. Requests that were sent keep the answers they were promised.
    pub fn negotiate(&mut self, negotiated: ProtocolFeatures, features: u64) {
        self.now = agreed(negotiated, features);
    }

    /// Queues a request. An answer is asked for whenever REPLY_ACK was negotiated; some messages
    /// have one in any case.
    ///
    /// # Errors
    /// Its feature was not negotiated, its values are not legal, or the channel is over; nothing is
    /// queued.
    pub fn send(&mut self, request: ChannelRequest<Fd>) -> Result<Sent, Refusal> {
        if let Some(fatal) = self.decoder.closed() {
            return Err(Refusal::because(format_args!("the channel is over: {fatal}")));
        }
        let code = request.code();
        let row = row(code)?;
        if !row.needs.is_open(&self.now) {
            return Err(Refusal::NotNegotiated { message: row.name });
        }
        request.check().map_err(Refusal::because)?;
        let answer = row.reply.is_own() || row.acknowledges(true, self.now.protocol);
        self.last = RequestId(self.last.0.saturating_add(1));
        let id = self.last;
        self.out.push_back((id, request.encode(answer)));
        if answer {
            self.waiting.push_back(Waiting { id, code, forgotten: false });
        }
        Ok(Sent { id, answer })
    }

    /// Whether what was negotiated lets such a request be sent.
    #[must_use]
    pub fn permits(&self, code: BackendCode) -> bool {
        self.decoder.closed().is_none() && row(code).is_ok_and(|row| row.needs.is_open(&self.now))
    }

    /// Queues any bytes at all, with no answer expected: for judges and hostile tests.
    pub fn send_raw(&mut self, frame: Frame<Fd>) {
        self.out.push_back((RequestId(0), frame));
    }

    /// The next message to send.
    pub fn transmit(&mut self) -> Option<Frame<Fd>> {
        self.out.pop_front().map(|(_, frame)| frame)
    }

    /// Requests that were not transmitted yet.
    #[must_use]
    pub fn unsent(&self) -> usize {
        self.out.len()
    }

    /// Takes what one `recvmsg` returned; the descriptors belong to the first of the bytes. What
    /// comes after a violation is dropped.
    pub fn receive(&mut self, bytes: &[u8], fds: Vec<Fd>) {
        self.decoder.receive(bytes, fds);
    }

    /// Bytes that are missing from the answer that is coming in, or from its header. A transport
    /// that reads no more at once gives each answer its own descriptors.
    #[must_use]
    pub fn wanted(&self) -> usize {
        self.decoder.wanted()
    }

    /// The next answer to a request that was not forgotten. `None`: more bytes are wanted.
    ///
    /// # Errors
    /// The front-end broke a rule: the channel has to end. Every later call returns the same.
    pub fn poll(&mut self) -> Result<Option<ChannelAnswer<Fd>>, Violation> {
        self.answer().inspect_err(|violation| {
            self.decoder.close(violation.clone());
            self.out.clear();
        })
    }

    fn answer(&mut self) -> Result<Option<ChannelAnswer<Fd>>, Violation> {
        while let Some(message) = self.decoder.next_message()? {
            if let Some(answer) = self.take(message)? {
                return Ok(Some(answer));
            }
        }
        Ok(None)
    }

    /// Nobody waits for the answer any more: a deadline has passed. `true`: the request had not
    /// been transmitted and never will be. `false`: it may be carried out, now or later, and its
    /// answer is swallowed when it comes.
    pub fn forget(&mut self, id: RequestId) -> bool {
        let queued = self.out.len();
        self.out.retain(|(other, _)| *other != id);
        let unsent = self.out.len() < queued;
        if unsent {
            self.waiting.retain(|waiting| waiting.id != id);
        } else if let Some(waiting) = self.waiting.iter_mut().find(|waiting| waiting.id == id) {
            waiting.forgotten = true;
        }
        unsent
    }

    /// Requests whose answers are still waited for.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.waiting.iter().filter(|waiting| !waiting.forgotten).count()
    }

    /// Answers that the front-end owes, those to forgotten requests included. A host bounds this
    /// number: it grows for as long as requests are sent to a front-end that is silent.
    #[must_use]
    pub fn owed(&self) -> usize {
        self.waiting.len()
    }

    /// Whether no part of an answer is waiting.
    #[must_use]
    pub fn at_message_boundary(&self) -> bool {
        self.decoder.buffered() == 0
    }

    /// Matches an answer with the oldest request of its message; `None` when that was forgotten.
    fn take(&mut self, message: Message<Fd>) -> Result<Option<ChannelAnswer<Fd>>, Violation> {
        let request = message.header.request;
        let unasked = Violation::ReplyUnasked { request };
        let row = info(Side::BackEnd, request).ok_or(unasked.clone())?;
        let found = self.waiting.iter().position(|waiting| waiting.code.id() == request);
        let waiting = found.and_then(|at| self.waiting.remove(at)).ok_or(unasked)?;
        if self.out.iter().any(|(id, _)| *id == waiting.id) {
            // The request has not left yet: this answers nothing.
            return Err(Violation::ReplyUnasked { request });
        }
        let result = decode(row, message)?;
        let Waiting { id, code, forgotten } = waiting;
        Ok((!forgotten).then_some(ChannelAnswer { id, request: code, result }))
    }
}

/// Checks the shape of an answer.
fn decode<Fd>(
    row: &'static MessageInfo,
    message: Message<Fd>,
) -> Result<Result<Option<Fd>, u64>, Violation> {
    let Message { payload, mut fds, misplaced, .. } = message;
    let count = fds.len() + misplaced;
    let shape = Violation::ReplyShape { message: row.name, size: payload.len(), fds: count };
    let most = usize::from(row.reply == ReplyKind::StatusAndFd);
    if payload.len() != size_of::<u64>() || misplaced > 0 || fds.len() > most {
        return Err(shape);
    }
    match read_u64(&payload).ok_or(shape)? {
        0 => Ok(Ok(fds.pop())),
        code => Ok(Err(code)),
    }
}

/// What a channel's gates look at. Both ends offered what they acknowledged.
pub(super) fn agreed(protocol: ProtocolFeatures, features: u64) -> Negotiated {
    let acked = features & !virtio::PROTOCOL_FEATURES;
    Negotiated { offered: acked, acked, protocol, gpu_socket: false }
}

fn row(code: BackendCode) -> Result<&'static MessageInfo, Refusal> {
    // Every code has a row: both come from the same lines. The error cannot happen.
    info(Side::BackEnd, code.id()).ok_or(Refusal::Unsupported)
}
