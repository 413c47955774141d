//! The front-end's end of the channel: it receives requests and answers them.
//!
//! ```text
//!  receive(bytes, fds) ─▶ Decoder ─▶ table: id, feature, size, fds ─▶ values ─▶ ChannelEffect + Ticket
//!  transmit() ◀─ Frame ◀─ in order within one message id ◀─ answer(Ticket, value), in any order
//! ```
//! Invariants: the back-end is not trusted; each request gets exactly the answers the table says;
//! several may be outstanding; answers to one message leave in the order of its requests, because
//! nothing but the message id says what they belong to; a dropped ticket refuses its request.

use std::collections::VecDeque;
use std::sync::Weak;

use zerocopy::IntoBytes;

use crate::channel::ChannelRequest;
use crate::channel::backend::agreed;
use crate::decoder::{Decoder, Expects, Message};
use crate::features::ProtocolFeatures;
use crate::frame::Frame;
use crate::header::Header;
use crate::payload::Uuid;
use crate::table::{ErrorForm, Negotiated, ReplyKind, Side, info};
use crate::ticket::{Ack, Outcome, Reply, SharedObject, Ticket};
use crate::violation::Violation;

/// Most requests that may be outstanding; further ones stay in the socket.
pub const MAX_OUTSTANDING: usize = 256;

/// What [`ChannelFrontend::poll`] found.
#[derive(Debug)]
#[must_use]
pub enum ChannelStep<Fd> {
    /// Something to do; more may come before it is answered.
    Effect(ChannelEffect<Fd>),
    /// The back-end broke a rule. It has been answered as far as an answer was due, the stream is
    /// in step and the channel lives: this is for the log.
    Violation(Violation),
}

/// One thing for the front-end to do.
#[derive(Debug)]
#[must_use = "dropping an effect refuses its request"]
pub enum ChannelEffect<Fd> {
    /// A request that is done or refused; never SHARED_OBJECT_LOOKUP.
    Request {
        /// The request. Its ranges do not wrap and are not empty; ring index, region and host
        /// address are as they came. EXTERNAL_MAP means something only inside one process: refuse it.
        request: ChannelRequest<Fd>,
        /// To be answered.
        ticket: Ticket<Ack>,
    },
    /// SHARED_OBJECT_LOOKUP: a shared object is asked for.
    Lookup {
        /// Its name.
        uuid: Uuid,
        /// To be answered; `None` tells the back-end that there is no such object.
        ticket: Ticket<SharedObject>,
    },
}

/// The state machine. `Fd` is `OwnedFd` in a program and a number in a test.
#[derive(Debug)]
pub struct ChannelFrontend<Fd> {
    now: Negotiated,
    pending: VecDeque<Pending<Fd>>,
    decoder: Decoder<Fd>,
    out: VecDeque<Frame<Fd>>,
}

/// A request that was handed out as an effect, or turned down behind one.
#[derive(Debug)]
struct Pending<Fd> {
    /// Message id.
    request: u32,
    /// Whether it is to be answered at all.
    asked: bool,
    /// What a refusal says.
    refused: u64,
    state: State<Fd>,
}

/// How far a request is.
#[derive(Debug)]
enum State<Fd> {
    /// Somebody holds its ticket.
    Waiting(Weak<()>),
    /// This is the answer.
    Done(u64, Option<Fd>),
}

impl<Fd> ChannelFrontend<Fd> {
    /// The machine at the start of a channel, with what the main socket has negotiated.
    #[must_use]
    pub fn new(negotiated: ProtocolFeatures, features: u64) -> Self {
        Self {
            now: agreed(negotiated, features),
            pending: VecDeque::new(),
            decoder: Decoder::new(Expects::Requests),
            out: VecDeque::new(),
        }
    }

    /// What the main socket has negotiated has changed. Requests that came keep the answers they
    /// were promised.
    pub fn negotiate(&mut self, negotiated: ProtocolFeatures, features: u64) {
        self.now = agreed(negotiated, features);
    }

    /// Takes what one `recvmsg` returned; the descriptors belong to the first of the bytes. What
    /// comes after a fatal violation is dropped.
    pub fn receive(&mut self, bytes: &[u8], fds: Vec<Fd>) {
        self.decoder.receive(bytes, fds);
    }

    /// Bytes that are missing from the request that is coming in, or from its header. 0 while
    /// [`MAX_OUTSTANDING`] requests wait for their answers: leave the socket alone until then.
    #[must_use]
    pub fn wanted(&self) -> usize {
        if self.is_full() { 0 } else { self.decoder.wanted() }
    }

    /// Looks for the next thing to do. `None`: more bytes are wanted, or too many requests are
    /// outstanding. Send what [`transmit`](Self::transmit) returns before reading on: that bounds
    /// what is queued.
    ///
    /// # Errors
    /// The stream is out of step: the channel has to end. Every later call returns the same.
    pub fn poll(&mut self) -> Result<Option<ChannelStep<Fd>>, Violation> {
        self.decoder.check_open()?;
        self.settle();
        if self.is_full() {
            return Ok(None);
        }
        let message = self.decoder.next_message().inspect_err(|_| self.pending.clear())?;
        Ok(message.map(|message| self.handle(message)))
    }

    /// Answers the request of a ticket; its reply is queued if one is due, behind those of earlier
    /// requests of the same message. A ticket of another machine is dropped here, which refuses it
    /// over there.
    pub fn answer<R: Reply<Fd>>(&mut self, ticket: Ticket<R>, value: R::Value) {
        let is_it = |pending: &&mut Pending<Fd>| match &pending.state {
            State::Waiting(watch) => ticket.is_watched_by(watch),
            State::Done(..) => false,
        };
        let Some(pending) = self.pending.iter_mut().find(is_it) else { return };
        let (code, fd) = match R::outcome(value) {
            Ok(Outcome::Fd(Some(fd))) => (0, Some(fd)),
            Ok(Outcome::Fd(None)) | Err(_) => (pending.refused, None),
            Ok(_) => (0, None),
        };
        pending.state = State::Done(code, fd);
        self.settle();
    }

    /// The next message to send. Tickets that were dropped are noticed here and by
    /// [`poll`](Self::poll).
    pub fn transmit(&mut self) -> Option<Frame<Fd>> {
        self.settle();
        self.out.pop_front()
    }

    /// Requests that were not answered yet.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.pending.len()
    }

    /// Whether no part of a request is waiting: a back-end that leaves now leaves properly.
    #[must_use]
    pub fn at_message_boundary(&self) -> bool {
        self.decoder.buffered() == 0
    }

    fn is_full(&self) -> bool {
        self.pending.len() >= MAX_OUTSTANDING
    }

    /// Checks a request and opens its ticket, or turns it down.
    fn handle(&mut self, message: Message<Fd>) -> ChannelStep<Fd> {
        let header = message.header;
        match self.accept(message) {
            Ok(ChannelRequest::SharedObjectLookup(uuid)) => {
                ChannelStep::Effect(ChannelEffect::Lookup { uuid, ticket: self.open(&header) })
            }
            Ok(request) => {
                ChannelStep::Effect(ChannelEffect::Request { request, ticket: self.open(&header) })
            }
            Err(violation) => {
                self.turn_down(&header);
                ChannelStep::Violation(violation)
            }
        }
    }

    fn accept(&self, message: Message<Fd>) -> Result<ChannelRequest<Fd>, Violation> {
        if let Some(row) = info(Side::BackEnd, message.header.request)
            && !row.needs.is_open(&self.now)
        {
            return Err(Violation::NotNegotiated { message: row.name });
        }
        let request = ChannelRequest::decode(message)?;
        request.check()?;
        Ok(request)
    }

    fn open<R>(&mut self, header: &Header) -> Ticket<R> {
        let (ticket, watch) = Ticket::issue();
        self.file(header, State::Waiting(watch));
        ticket
    }

    /// An answer that says no, behind those that are outstanding.
    fn turn_down(&mut self, header: &Header) {
        let refused = refusal(header.request);
        self.file(header, State::Done(refused, None));
        self.settle();
    }

    fn file(&mut self, header: &Header, state: State<Fd>) {
        let request = header.request;
        let reply_ack = self.now.protocol.contains(ProtocolFeatures::REPLY_ACK);
        let asked = match info(Side::BackEnd, request) {
            Some(row) => {
                row.reply.is_own() || row.acknowledges(header.need_reply(), self.now.protocol)
            }
            None => header.need_reply() && reply_ack,
        };
        self.pending.push_back(Pending { request, asked, refused: refusal(request), state });
    }

    /// Refuses what was forgotten and queues every answer that is next of its message.
    fn settle(&mut self) {
        let mut kept: VecDeque<Pending<Fd>> = VecDeque::with_capacity(self.pending.len());
        for mut pending in self.pending.drain(..) {
            if matches!(&pending.state, State::Waiting(watch) if watch.strong_count() == 0) {
                pending.state = State::Done(pending.refused, None);
            }
            let held = |earlier: &Pending<Fd>| earlier.asked && earlier.request == pending.request;
            match pending.state {
                State::Done(..) if !pending.asked => {}
                State::Done(code, fd) if !kept.iter().any(held) => {
                    let fds = fd.into_iter().collect();
                    self.out.push_back(Frame::reply(pending.request, code.as_bytes(), fds));
                }
                state => kept.push_back(Pending { state, ..pending }),
            }
        }
        self.pending = kept;
    }
}

/// The number that refuses a message.
fn refusal(request: u32) -> u64 {
    match info(Side::BackEnd, request).map(|row| (row.reply, row.error)) {
        Some((ReplyKind::Status | ReplyKind::StatusAndFd, ErrorForm::Status(code))) => code,
        _ => 1,
    }
}
