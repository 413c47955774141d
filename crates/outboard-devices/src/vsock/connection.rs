//! One connection as its peer sees it: a state machine without sockets, buffers or time (virtio 1.3 §5.10.6).
//!
//! ```text
//!  ask ─▶ Asking ──Response──▶ Open ──Shutdown of both, everything taken──▶ Over: a Reset is owed
//!  asked ─▶ Asked ──accept──────▶ │ ──Reset heard───────────────────────▶ Over: nothing is owed
//!              └───abort──────────┴─ anything that cannot be ───────────▶ Over: a Reset is owed
//! ```
//! Invariants: what is owed is a set of facts, not a list: a peer that asks for ever makes nothing grow; a peer
//! that breaks the rules loses this connection and nothing else; bytes come before the end that follows them.

use serde::{Deserialize, Serialize};

use super::credit::Credit;
use super::packet::{Header, Op, shut};

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// We have asked the peer, or are about to.
    Asking,
    /// The peer has asked us.
    Asked,
    /// Bytes may go.
    Open,
    /// It is over, as soon as nothing is owed.
    Over,
}

/// What a packet meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Nothing that its owner has to act on.
    Nothing,
    /// The peer has accepted.
    Opened,
    /// So many bytes follow, which the owner takes into its buffer.
    Data(u32),
    /// The peer sends or receives no more: look at [`Connection::peer_sends`] and
    /// [`Connection::peer_receives`].
    Shut,
    /// The peer has ended it.
    Reset,
    /// The peer has broken the rules: it is over.
    Broken,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    phase: Phase,
    credit: Credit,
    /// The first word (Request, Response), the last one (Reset), or credit is to be said.
    owes: Option<Op>,
    owes_credit: bool,
    /// Credit was asked for and has not come.
    asked_credit: bool,
    /// Bits of [`shut`]: what the peer has said, what it was told, and what it is to be told after the bytes.
    heard: u32,
    said: u32,
    wanted: u32,
}

impl Connection {
    fn new(phase: Phase, owes: Option<Op>, room: u32) -> Self {
        Self {
            phase,
            credit: Credit::new(room),
            owes,
            owes_credit: false,
            asked_credit: false,
            heard: 0,
            said: 0,
            wanted: 0,
        }
    }

    /// One that we ask for, with a buffer of `room` bytes.
    #[must_use]
    pub fn ask(room: u32) -> Self {
        Self::new(Phase::Asking, Some(Op::Request), room)
    }

    /// One that the peer asks for with this packet.
    #[must_use]
    pub fn asked(room: u32, request: &Header) -> Self {
        let mut connection = Self::new(Phase::Asked, None, room);
        // Nothing was sent, so that only a count of zero can be true; what else it says is checked later.
        if connection.credit.hear(request.credit()).is_err() {
            connection.abort();
        }
        connection
    }

    /// Where it stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether it is over and nothing is to be said of it.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.phase == Phase::Over && self.owes.is_none()
    }

    /// Whether one that was kept by somebody else can be one.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.credit.is_sound()
    }

    /// Bytes of the peer that have not been taken.
    #[must_use]
    pub fn untaken(&self) -> u32 {
        self.credit.waiting()
    }

    /// Whether the peer may still send.
    #[must_use]
    pub fn peer_sends(&self) -> bool {
        self.heard & shut::SEND == 0
    }

    /// Whether the peer still receives.
    #[must_use]
    pub fn peer_receives(&self) -> bool {
        self.heard & shut::RECEIVE == 0
    }

    /// Whether the peer was told that both directions have ended: its Reset is what is missing.
    #[must_use]
    pub fn is_closing(&self) -> bool {
        self.phase == Phase::Open && self.said == shut::BOTH
    }

    /// Bytes that may be sent now; none unless it is open and the peer receives.
    #[must_use]
    pub fn may_send(&self) -> u32 {
        if self.phase == Phase::Open && self.peer_receives() { self.credit.may_send() } else { 0 }
    }

    /// Room of the peer's whole buffer: no message can be longer.
    #[must_use]
    pub fn peer_room(&self) -> u32 {
        self.credit.peer_room()
    }

    /// Grants what the peer has asked for.
    pub fn accept(&mut self) {
        if self.phase == Phase::Asked {
            (self.phase, self.owes) = (Phase::Open, Some(Op::Response));
        }
    }

    /// Ends it at once; the peer is told, unless it has never heard of it.
    pub fn abort(&mut self) {
        let unheard = self.phase == Phase::Asking && self.owes == Some(Op::Request);
        if self.phase != Phase::Over {
            self.phase = Phase::Over;
            self.owes = (!unheard).then_some(Op::Reset);
        }
    }

    /// We send or receive no more ([`shut`]); the peer is told when all bytes have been sent.
    pub fn shut(&mut self, flags: u32) {
        self.wanted |= flags & shut::BOTH;
    }

    /// So many bytes of the peer have left our buffer.
    pub fn took(&mut self, count: u32) {
        self.credit.took(count);
        self.finish();
    }

    /// The peer neither sends nor receives, and everything it sent was taken: §5.10.6.6 has a Reset for that.
    fn finish(&mut self) {
        if self.phase == Phase::Open && self.heard == shut::BOTH && self.credit.waiting() == 0 {
            self.abort();
        }
    }

    /// The peer says something.
    pub fn hear(&mut self, op: Op, header: &Header) -> Heard {
        if self.phase == Phase::Over {
            if op == Op::Reset {
                self.owes = None;
                return Heard::Reset;
            }
            return Heard::Nothing;
        }
        if op == Op::Reset {
            (self.phase, self.owes) = (Phase::Over, None);
            return Heard::Reset;
        }
        let before = self.credit.may_send();
        if self.credit.hear(header.credit()).is_err() {
            return self.broken();
        }
        if self.credit.may_send() > before {
            self.asked_credit = false;
        }
        match (self.phase, op) {
            (Phase::Asking, Op::Response) if self.owes.is_none() => {
                self.phase = Phase::Open;
                Heard::Opened
            }
            (Phase::Open, Op::Data) => self.hear_data(header.length()),
            (Phase::Open, Op::Shutdown) => {
                self.heard |= header.flags() & shut::BOTH;
                self.finish();
                Heard::Shut
            }
            (Phase::Open | Phase::Asked, Op::CreditUpdate) => Heard::Nothing,
            (Phase::Open, Op::CreditRequest) => {
                self.owes_credit = true;
                Heard::Nothing
            }
            _ => self.broken(),
        }
    }

    fn hear_data(&mut self, length: u32) -> Heard {
        if !self.peer_sends() || self.credit.received(length).is_err() {
            return self.broken();
        }
        if (self.wanted | self.said) & shut::RECEIVE != 0 {
            // It was under way when nobody wanted it any more.
            self.credit.took(length);
            return Heard::Nothing;
        }
        Heard::Data(length)
    }

    fn broken(&mut self) -> Heard {
        // It has been heard of, whatever was said.
        (self.phase, self.owes) = (Phase::Over, Some(Op::Reset));
        Heard::Broken
    }

    /// What is to be said next; `has_bytes`: its owner has bytes for the peer.
    #[must_use]
    pub fn next(&self, has_bytes: bool) -> Option<Op> {
        if self.owes.is_some() || self.phase != Phase::Open {
            return self.owes;
        }
        let has_bytes = has_bytes && self.peer_receives();
        if has_bytes && self.credit.may_send() > 0 {
            return Some(Op::Data);
        }
        if self.owes_credit || self.credit.should_tell() {
            return Some(Op::CreditUpdate);
        }
        if has_bytes {
            return (!self.asked_credit).then_some(Op::CreditRequest);
        }
        (self.wanted & !self.said != 0).then_some(Op::Shutdown)
    }

    /// What [`Connection::next`] has named is said with this header, which lacks flags and credit; with as many
    /// bytes as it says.
    pub fn say(&mut self, op: Op, header: Header) -> Header {
        match op {
            Op::Request | Op::Response | Op::Reset => self.owes = None,
            Op::Shutdown => self.said |= self.wanted,
            Op::Data => self.credit.sent(header.length()),
            Op::CreditUpdate => {}
            Op::CreditRequest => self.asked_credit = true,
        }
        if op == Op::Reset {
            return header;
        }
        self.owes_credit = false;
        let header = header.with_credit(self.credit.tell());
        if op == Op::Shutdown { header.with_flags(self.said) } else { header }
    }
}
