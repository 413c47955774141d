//! The back-end's end of the main socket as a pure state machine.
//!
//! ```text
//!  receive(bytes, fds) ─▶ Decoder ─▶ table: id, feature, size, fds ─▶ handler of the message ─┬─▶ reply (by itself)
//!                                                                                             └─▶ Effect + Ticket
//!  transmit() ◀─ Frame ◀─ reply, ack or error form ◀─ commit or roll back ◀─ answer(Ticket, value)
//! ```
//! Invariants: one request at a time, in order; the state belonging to a request changes when it is
//! answered with success, never before (ring parameters: stored at once, put back on refusal);
//! each request gets exactly the replies the table says; after a fatal violation nothing moves.

mod device;
mod dispatch;
mod memory;
mod negotiate;
mod reply;
mod rings;

use std::collections::VecDeque;
use std::sync::Weak;

use crate::decoder::{Decoder, Expects, Message};
use crate::effect::{Effect, Step};
use crate::features::{ProtocolFeatures, virtio};
use crate::frame::Frame;
use crate::header::Header;
use crate::payload::MemRegion;
use crate::ring::{Given, Ring, RingEvent, RunState};
use crate::table::{FrontendCode, MessageInfo, Negotiated, Side, info};
use crate::ticket::{Reply, Ticket};
use crate::violation::{Refusal, Violation};

/// What a back-end offers on a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Virtio and vhost feature bits. Bit 30 is added when there are protocol features;
    /// ACCESS_PLATFORM is shown only to a front-end that has negotiated BACKEND_REQ and REPLY_ACK.
    pub features: u64,
    /// Protocol features. XEN_MMAP is taken out: its regions are not decoded.
    pub protocol_features: ProtocolFeatures,
    /// Number of rings; KICK, CALL and ERR reach the first 256.
    pub queues: u16,
    /// Largest ring size in entries, 1..=32768.
    pub max_queue_size: u16,
    /// Memory slots, the answer to GET_MAX_MEM_SLOTS.
    pub mem_slots: u64,
    /// Whether GPU_SET_SOCKET is taken.
    pub gpu_socket: bool,
}

/// The state machine. `Fd` is `OwnedFd` in a program and a number in a test.
#[derive(Debug)]
pub struct Backend<Fd> {
    offer: Offer,
    now: Negotiated,
    features_set: bool,
    rings: Vec<Ring>,
    regions: Vec<MemRegion>,
    postcopy: Postcopy,
    /// The table that waits while postcopy is `Mapped`.
    mapped: Vec<MemRegion>,
    decoder: Decoder<Fd>,
    out: VecDeque<Frame<Fd>>,
    pending: Option<Pending>,
}

/// Where postcopy stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Postcopy {
    Off,
    Advised,
    Listening,
    /// The next table is mapped and waits for the word that it may be registered.
    Mapped,
}

/// What is remembered of a request between its effect and its answer.
#[derive(Debug)]
struct Pending {
    head: Head,
    /// Request bytes that the reply repeats.
    echo: Vec<u8>,
    commit: Commit,
    watch: Weak<()>,
}

/// The parts of a request that its reply depends on.
#[derive(Clone, Copy, Debug)]
struct Head {
    header: Header,
    info: &'static MessageInfo,
}

/// The state change that belongs to a request.
#[derive(Debug)]
enum Commit {
    Nothing,
    Features(u64),
    ProtocolFeatures(ProtocolFeatures),
    DisableAll,
    ResetDevice,
    Table(Vec<MemRegion>),
    /// The first half of a table in postcopy, and the second.
    MapTable(Vec<MemRegion>),
    RegisterTable,
    AddRegion(MemRegion),
    RemRegion(MemRegion),
    /// The change is in the record already: this is the old record, for a refusal.
    Stored(u16, Ring),
    /// This is made in the record.
    Ring(u16, RingChange),
    Stop(u16),
    Postcopy(Postcopy),
}

/// A change to a ring's record that is made when its request succeeds.
#[derive(Clone, Copy, Debug)]
enum RingChange {
    Kick(Given),
    InbandKick,
    Call(Given),
    Err(Given),
    Enabled(bool),
    BigEndian(bool),
}

impl RingChange {
    fn make(self, ring: &mut Ring) {
        match self {
            Self::Kick(given) => {
                ring.apply(RingEvent::Kicked);
                ring.kick = given;
            }
            Self::InbandKick => {
                ring.apply(RingEvent::Kicked);
            }
            Self::Call(given) => ring.call = given,
            Self::Err(given) => ring.err = given,
            Self::Enabled(enabled) => ring.enabled = enabled,
            Self::BigEndian(big_endian) => ring.big_endian = big_endian,
        }
    }
}

/// A request that passed the table's checks.
#[derive(Debug)]
struct Inbound<Fd> {
    head: Head,
    payload: Vec<u8>,
    fds: Vec<Fd>,
}

impl<Fd> Inbound<Fd> {
    const fn name(&self) -> &'static str {
        self.head.info.name
    }
}

/// What a message's handler says: an effect, or nothing more to do.
type Handled<Fd> = Result<Option<Effect<Fd>>, Violation>;

impl<Fd> Backend<Fd> {
    /// The machine at the start of a connection.
    #[must_use]
    pub fn new(offer: Offer) -> Self {
        let mut offer = offer;
        offer.protocol_features.remove(ProtocolFeatures::XEN_MMAP);
        if !offer.protocol_features.is_empty() {
            offer.features |= virtio::PROTOCOL_FEATURES;
        }
        let now = Negotiated {
            offered: offer.features,
            gpu_socket: offer.gpu_socket,
            ..Negotiated::default()
        };
        Self {
            rings: vec![Ring::default(); usize::from(offer.queues)],
            offer,
            now,
            features_set: false,
            regions: Vec::new(),
            postcopy: Postcopy::Off,
            mapped: Vec::new(),
            decoder: Decoder::new(Expects::Requests),
            out: VecDeque::new(),
            pending: None,
        }
    }

    /// Takes what one `recvmsg` returned, split in whatever way. The descriptors belong to the
    /// first of the bytes; read at most [`wanted`](Self::wanted) bytes at a time to make that true.
    /// What comes after a fatal violation is dropped.
    pub fn receive(&mut self, bytes: &[u8], fds: Vec<Fd>) {
        self.decoder.receive(bytes, fds);
    }

    /// Bytes that are missing from the message that is coming in, or from its header: never 0
    /// while the machine waits for bytes. The kernel glues bytes without descriptors before bytes
    /// with descriptors into one `recvmsg`; a transport that reads no more than this keeps
    /// messages apart, and so gives each its own descriptors.
    #[must_use]
    pub fn wanted(&self) -> usize {
        self.decoder.wanted()
    }

    /// Looks for the next thing to do. `None`: more bytes are wanted, or the ticket of the last
    /// effect is outstanding. Send what [`transmit`](Self::transmit) returns before reading on:
    /// that bounds what is queued.
    ///
    /// # Errors
    /// The stream is out of step, or a request without an error form was turned down: the
    /// connection has to end. Every later call returns the same.
    pub fn poll(&mut self) -> Result<Option<Step<Fd>>, Violation> {
        if !self.settle_forgotten()? {
            return Ok(None);
        }
        loop {
            let Some(message) = self.decoder.next_message()? else { return Ok(None) };
            match self.handle(message)? {
                Ok(Some(effect)) => return Ok(Some(Step::Effect(effect))),
                Ok(None) => {}
                Err(violation) => return Ok(Some(Step::Violation(violation))),
            }
        }
    }

    /// Answers the request of a ticket: its state change is committed or rolled back, and its
    /// reply, acknowledgement or error form is queued. A ticket of another machine is dropped
    /// here, which refuses it over there.
    pub fn answer<R: Reply<Fd>>(&mut self, ticket: Ticket<R>, value: R::Value) {
        let Some(pending) = self.pending.take_if(|p| ticket.is_watched_by(&p.watch)) else {
            return;
        };
        self.finish(pending, R::outcome(value));
    }

    /// The next message to send.
    pub fn transmit(&mut self) -> Option<Frame<Fd>> {
        self.out.pop_front()
    }

    /// Whether no part of a message is waiting: a peer that leaves now leaves properly.
    #[must_use]
    pub fn at_message_boundary(&self) -> bool {
        self.decoder.buffered() == 0
    }

    /// Whether a ticket is outstanding.
    #[must_use]
    pub const fn is_waiting_for_answer(&self) -> bool {
        self.pending.is_some()
    }

    /// What is offered, after the additions of [`Backend::new`].
    #[must_use]
    pub const fn offer(&self) -> &Offer {
        &self.offer
    }

    /// One ring's record.
    #[must_use]
    pub fn ring(&self, index: u16) -> Option<&Ring> {
        self.rings.get(usize::from(index))
    }

    /// All rings' records.
    #[must_use]
    pub fn rings(&self) -> &[Ring] {
        &self.rings
    }

    /// The regions that were accepted, in the order they came.
    #[must_use]
    pub fn regions(&self) -> &[MemRegion] {
        &self.regions
    }

    /// The feature bits acknowledged last, bit 30 included.
    #[must_use]
    pub const fn acked_features(&self) -> u64 {
        self.now.acked
    }

    /// Whether SET_FEATURES has succeeded: before it no ring may start.
    #[must_use]
    pub const fn features_set(&self) -> bool {
        self.features_set
    }

    /// The protocol features acknowledged last.
    #[must_use]
    pub const fn acked_protocol_features(&self) -> ProtocolFeatures {
        self.now.protocol
    }

    /// Everything that is offered and acknowledged.
    #[must_use]
    pub const fn negotiated(&self) -> &Negotiated {
        &self.now
    }

    /// Tells what really happened to a ring. `false`: there is no such ring, or this cannot happen
    /// in its state; nothing has changed.
    pub fn ring_event(&mut self, index: u16, event: RingEvent) -> bool {
        self.rings.get_mut(usize::from(index)).is_some_and(|ring| ring.apply(event))
    }

    /// The host stopped a ring by itself and wants to start it again where it stood: the ring waits
    /// for its start as after a kick. `false`: there is no such ring, or it is not stopped.
    pub fn resume(&mut self, index: u16, kick: Given, base: u32) -> bool {
        let Some(ring) = self.rings.get_mut(usize::from(index)) else { return false };
        if ring.run != RunState::Stopped || !ring.apply(RingEvent::Kicked) {
            return false;
        }
        (ring.kick, ring.base) = (kick, base);
        true
    }

    /// Looks after a ticket that was dropped. `true`: none is outstanding (any more).
    fn settle_forgotten(&mut self) -> Result<bool, Violation> {
        let Some(pending) = self.pending.take_if(|p| p.watch.strong_count() == 0) else {
            self.decoder.check_open()?;
            return Ok(self.pending.is_none());
        };
        self.finish(pending, Err(Refusal::Forgotten));
        self.decoder.check_open()?;
        Ok(true)
    }

    /// Checks a message against the table and hands it to its handler. The outer error is fatal,
    /// the inner one was answered.
    fn handle(&mut self, message: Message<Fd>) -> Result<Handled<Fd>, Violation> {
        let header = message.header;
        let row = info(Side::FrontEnd, header.request);
        match self.dispatch(message) {
            Ok(effect) => Ok(Ok(effect)),
            Err(violation) if violation.is_fatal() => Err(self.close(violation)),
            Err(violation) => {
                self.turn_down(header, row, &violation)?;
                Ok(Err(violation))
            }
        }
    }

    fn close(&mut self, violation: Violation) -> Violation {
        self.pending = None;
        self.decoder.close(violation)
    }

    /// Opens a ticket for a request.
    fn ticket<R>(&mut self, inbound: &Inbound<Fd>, commit: Commit) -> Ticket<R> {
        let (ticket, watch) = Ticket::issue();
        let echo = inbound.payload.clone();
        self.pending = Some(Pending { head: inbound.head, echo, commit, watch });
        ticket
    }
}

/// The code of a row; `None` only for ids outside the table.
const fn code_of(header: &Header) -> Option<FrontendCode> {
    FrontendCode::from_id(header.request)
}
