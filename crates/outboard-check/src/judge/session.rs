//! A negotiated connection, and the three questions of nearly every check: is it done, is it refused,
//! is it still alive?
//!
//! Invariant: what is asked for is legal unless the check makes it illegal on purpose; acknowledgements
//! are awaited when REPLY_ACK was negotiated, and GET_FEATURES is the barrier when it was not.

use std::os::fd::BorrowedFd;

use outboard_memory::RegionSpec;
use outboard_protocol::FrontendCode as Code;
use outboard_protocol::features::{ProtocolFeatures, virtio};
use outboard_protocol::payload::MemRegion;

use super::finding::{Finding, Outcome, ensure};
use super::message::{self, Msg};
use super::wire::{Came, Reply, Wire};

/// Feature bits that the judge acknowledges by itself: what every driver needs, and nothing whose
/// absence a check would notice.
pub(crate) const PLAIN: u64 = virtio::VERSION_1 | virtio::PROTOCOL_FEATURES;
/// Protocol features that the judge acknowledges by itself.
pub(crate) const USUAL: ProtocolFeatures =
    ProtocolFeatures::MQ.union(ProtocolFeatures::REPLY_ACK).union(ProtocolFeatures::CONFIG);

/// How a request that should be refused was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// With a non-zero acknowledgement.
    Nak,
    /// By closing the connection.
    Close,
}

/// A connection that has negotiated.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) wire: Wire,
    /// Feature bits offered.
    pub(crate) offered: u64,
    /// Feature bits acknowledged.
    pub(crate) features: u64,
    pub(crate) protocol: ProtocolFeatures,
}

impl Session {
    /// Negotiates in the usual order: owner, features, protocol features, then the features. Only what
    /// is offered of the two sets is acknowledged.
    pub(crate) fn open(wire: Wire, features: u64, protocol: ProtocolFeatures) -> Outcome<Self> {
        let mut session = Self::hello(wire, protocol)?;
        session.features = session.offered & features;
        session.done(&message::set_features(session.features))?;
        Ok(session)
    }

    /// The first half of it: everything up to the protocol features.
    pub(crate) fn hello(mut wire: Wire, protocol: ProtocolFeatures) -> Outcome<Self> {
        wire.send(&Msg::bare(Code::SetOwner))?;
        let offered = wire.ask(&message::get_features())?.number()?;
        let mut all = ProtocolFeatures::empty();
        if offered & virtio::PROTOCOL_FEATURES != 0 {
            let bits = wire.ask(&Msg::bare(Code::GetProtocolFeatures))?.number()?;
            all = ProtocolFeatures::from_bits_retain(bits);
            let chosen = all & protocol;
            wire.send(&Msg::u64(Code::SetProtocolFeatures, chosen.bits()))?;
        }
        let protocol = all & protocol;
        Ok(Self { wire, offered, features: 0, protocol })
    }

    /// Whether acknowledgements can be had.
    pub(crate) const fn acks(&self) -> bool {
        self.protocol.contains(ProtocolFeatures::REPLY_ACK)
    }

    /// Sends a request that must succeed.
    pub(crate) fn done(&mut self, msg: &Msg<'_>) -> Outcome {
        match self.acknowledged(msg)? {
            Some(0) | None => Ok(()),
            Some(code) => Err(Finding::breaks(format!("it refused {} with {code}", msg.name()))),
        }
    }

    /// Sends a request and awaits its acknowledgement; `None` without REPLY_ACK.
    pub(crate) fn acknowledged(&mut self, msg: &Msg<'_>) -> Outcome<Option<u64>> {
        if self.acks() {
            let code = self.wire.ask(&msg.clone().need_reply())?.number()?;
            return Ok(Some(code));
        }
        self.wire.send(msg)?;
        self.alive()?;
        Ok(None)
    }

    /// Sends a request that must be refused in either way.
    pub(crate) fn refused(&mut self, msg: &Msg<'_>, what: &str) -> Outcome<Refused> {
        self.wire.send(&msg.clone().need_reply())?;
        self.refusal(msg.id, what)
    }

    /// Waits for the refusal of what was sent.
    pub(crate) fn refusal(&mut self, id: u32, what: &str) -> Outcome<Refused> {
        if !self.acks() {
            // It may close; if it does not, it must still answer.
            self.wire.send(&message::get_features())?;
            return match self.wire.receive(self.wire.limit)? {
                Came::Nothing => Err(Finding::hangs(format!("it is silent after {what}"))),
                Came::Closed => Ok(Refused::Close),
                Came::Reply(_) => Err(Finding::not_offered("without REPLY_ACK no refusal is seen")),
            };
        }
        match self.wire.receive(self.wire.limit)? {
            Came::Closed => Ok(Refused::Close),
            Came::Nothing => Err(Finding::hangs(format!("it is silent after {what}"))),
            Came::Reply(reply) => {
                ensure!(
                    reply.header.request == id,
                    "it answered {} after {what}",
                    message::name_of(reply.header.request)
                );
                ensure!(reply.number()? != 0, "it said yes to {what}");
                Ok(Refused::Nak)
            }
        }
    }

    /// Sends a well-formed request that must be refused. "If back-end detects some error such as incompatible
    /// features, it may also close the connection" (Starting and stopping rings): whether it lives on.
    pub(crate) fn turned_down(&mut self, msg: &Msg<'_>, what: &str) -> Outcome<bool> {
        if self.refused(msg, what)? == Refused::Close {
            return Ok(false);
        }
        self.wire.send(&message::get_features())?;
        match self.wire.receive(self.wire.limit)? {
            Came::Closed => Ok(false),
            Came::Nothing => Err(Finding::hangs(format!("it is silent after {what}"))),
            Came::Reply(reply) => {
                let id = reply.header.request;
                let name = message::name_of(id);
                ensure!(id == 1, "it answered {name} where GET_FEATURES was to be answered");
                self.unchanged(reply.number()?)?;
                Ok(true)
            }
        }
    }

    /// That the connection answers, and offers what it offered.
    pub(crate) fn alive(&mut self) -> Outcome {
        let now = self.wire.ask(&message::get_features())?.number()?;
        self.unchanged(now)
    }

    /// That these are the features that were offered. Only ACCESS_PLATFORM may come and go: it is of use where
    /// there is a channel for the misses (IOTLB_MSG of the back-end).
    fn unchanged(&self, now: u64) -> Outcome {
        let before = self.offered;
        let same = (now ^ before) & !virtio::ACCESS_PLATFORM == 0;
        ensure!(same, "GET_FEATURES changed from {before:#x} to {now:#x}");
        Ok(())
    }

    /// Sends a request with an answer of its own.
    pub(crate) fn ask(&mut self, msg: &Msg<'_>) -> Outcome<Reply> {
        self.wire.ask(msg)
    }

    /// Stops a ring; its base.
    pub(crate) fn base(&mut self, index: u32) -> Outcome<u32> {
        let reply = self.ask(&message::get_base(index))?;
        ensure!(
            reply.payload.len() == 8,
            "the answer to GET_VRING_BASE has {} bytes, a vring state has 8",
            reply.payload.len()
        );
        let (low, high) = reply.payload.split_at_checked(4).unwrap_or_default();
        let word = |bytes: &[u8]| bytes.try_into().map_or(u32::MAX, u32::from_ne_bytes);
        ensure!(
            word(low) == index,
            "GET_VRING_BASE of ring {index} was answered for ring {}",
            word(low)
        );
        Ok(word(high))
    }

    /// Shares memory with SET_MEM_TABLE.
    pub(crate) fn share<'f>(
        &mut self,
        regions: impl Iterator<Item = (RegionSpec, BorrowedFd<'f>)>,
    ) -> Outcome {
        let table: Vec<(MemRegion, BorrowedFd<'f>)> =
            regions.map(|(spec, fd)| (message::region(&spec), fd)).collect();
        self.done(&message::mem_table(&table))
    }

    /// That a protocol feature was negotiated.
    pub(crate) fn needs(&self, feature: ProtocolFeatures, name: &str) -> Outcome {
        if self.protocol.contains(feature) {
            return Ok(());
        }
        Err(Finding::not_offered(format!("it does not offer {name}")))
    }

    /// That a feature bit is offered.
    pub(crate) fn needs_bit(&self, bit: u64, name: &str) -> Outcome {
        if self.offered & bit == bit {
            return Ok(());
        }
        Err(Finding::not_offered(format!("it does not offer {name}")))
    }

    /// That acknowledgements can be had.
    pub(crate) fn needs_acks(&self) -> Outcome {
        self.needs(ProtocolFeatures::REPLY_ACK, "REPLY_ACK")
    }
}
