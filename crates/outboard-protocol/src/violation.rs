//! What goes wrong: a [`Violation`] is a rule that the peer broke, a [`Refusal`] is something
//! legal that is declined. Failures of our own host are neither and live in the handler.
//!
//! Invariant: only [`Violation::is_fatal`] ones end a connection; the others were answered (where
//! an answer was due) and the stream is in step.

use thiserror::Error;

/// A rule of the protocol that the peer broke, with the numbers.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Violation {
    /// Fatal: the stream is not this protocol.
    #[error("message {request} has version {version}, only 1 exists")]
    Version {
        /// Message id.
        request: u32,
        /// Version bits.
        version: u32,
    },
    /// Fatal: a reply where a request is due.
    #[error("message {request} has the reply bit where a request is due")]
    ReplyInRequest {
        /// Message id.
        request: u32,
    },
    /// Fatal: a payload no message has.
    #[error("message {request} announces {size} bytes, more than {limit}")]
    TooLong {
        /// Message id.
        request: u32,
        /// Announced bytes.
        size: u32,
        /// Most bytes accepted.
        limit: u32,
    },
    /// Fatal: in-band notifications cannot work without their two companions.
    #[error(
        "protocol features {features:#x} hold INBAND_NOTIFICATIONS without BACKEND_REQ and REPLY_ACK"
    )]
    InbandAlone {
        /// The refused set.
        features: u64,
    },
    /// Fatal: the request was turned down, but its reply has no form for that.
    #[error("{message} has no error reply: {reason}")]
    NoErrorForm {
        /// Message name.
        message: &'static str,
        /// Why it was turned down.
        reason: String,
    },
    /// Fatal, in the front-end: a reply with other flags than version 1 and reply.
    #[error("reply to {request} has flags {flags:#x}, not 0x5")]
    ReplyFlags {
        /// Message id.
        request: u32,
        /// The flags.
        flags: u32,
    },
    /// Fatal, in the front-end: an answer nobody waits for.
    #[error("reply to {request} was not asked for")]
    ReplyUnasked {
        /// Message id.
        request: u32,
    },
    /// Fatal, in the front-end: an answer to another request.
    #[error("reply to {got} where {message} ({expected}) is to be answered")]
    ReplyOrder {
        /// Name of the request that waits.
        message: &'static str,
        /// Its id.
        expected: u32,
        /// Id in the reply.
        got: u32,
    },
    /// Fatal, in the front-end: an answer of the wrong shape.
    #[error("reply to {message} has {size} bytes and {fds} descriptors")]
    ReplyShape {
        /// Message name.
        message: &'static str,
        /// Payload bytes.
        size: usize,
        /// Descriptors.
        fds: usize,
    },
    /// Fatal, in the front-end: an answer with contents that contradict the request.
    #[error("reply to {message} says {what} {got:#x} where {expected:#x} was asked for")]
    ReplyContents {
        /// Message name.
        message: &'static str,
        /// Field.
        what: &'static str,
        /// Value in the request.
        expected: u64,
        /// Value in the reply.
        got: u64,
    },
    /// No such message.
    #[error("message {request} is unknown")]
    UnknownRequest {
        /// Message id.
        request: u32,
    },
    /// Its feature was not offered or not acknowledged.
    #[error("{message} came without its feature")]
    NotNegotiated {
        /// Message name.
        message: &'static str,
    },
    /// Payload length.
    #[error("{message} has {size} bytes of payload, which it cannot have")]
    Size {
        /// Message name.
        message: &'static str,
        /// Payload bytes.
        size: usize,
    },
    /// Descriptor count.
    #[error("{message} came with {got} descriptors, which it cannot have here")]
    FdCount {
        /// Message name.
        message: &'static str,
        /// Descriptors.
        got: usize,
    },
    /// Descriptors that did not ride with the first byte.
    #[error("message {request} had {count} descriptors behind its first byte")]
    FdsMisplaced {
        /// Message id.
        request: u32,
        /// Descriptors.
        count: usize,
    },
    /// No such ring.
    #[error("{message} names ring {index:#x} of {queues}")]
    RingIndex {
        /// Message name.
        message: &'static str,
        /// Index as received.
        index: u64,
        /// Rings there are.
        queues: usize,
    },
    /// The ring has a worker.
    #[error("{message} came while ring {index} is live")]
    RingLive {
        /// Message name.
        message: &'static str,
        /// Ring.
        index: u16,
    },
    /// Some ring has a worker.
    #[error("{message} came while rings are live")]
    RingsLive {
        /// Message name.
        message: &'static str,
    },
    /// Size of a ring.
    #[error(
        "ring {index} cannot have {size} entries (at most {max}, a power of two unless packed)"
    )]
    RingSize {
        /// Ring.
        index: u16,
        /// Entries.
        size: u32,
        /// Most entries.
        max: u16,
    },
    /// Alignment of a ring's part.
    #[error("ring {index}: {part} at {addr:#x} is not aligned to {align}")]
    RingAlignment {
        /// Ring.
        index: u16,
        /// Which part.
        part: &'static str,
        /// Its address.
        addr: u64,
        /// Bytes.
        align: u64,
    },
    /// Flags of SET_VRING_ADDR.
    #[error("ring {index} has unknown address flags {flags:#x}")]
    RingFlags {
        /// Ring.
        index: u16,
        /// The flags.
        flags: u32,
    },
    /// Base of a split ring.
    #[error("ring {index} is split, its base {base:#x} has more than 16 bits")]
    RingBase {
        /// Ring.
        index: u16,
        /// The base.
        base: u32,
    },
    /// A number that has to be 0 or 1, or otherwise small.
    #[error("{message} has {what} {value:#x}, which is not a legal value")]
    Value {
        /// Message name.
        message: &'static str,
        /// Field.
        what: &'static str,
        /// The value.
        value: u64,
    },
    /// Feature bits nobody offered.
    #[error("{message} acknowledges {bits:#x}, which was not offered")]
    Unoffered {
        /// Message name.
        message: &'static str,
        /// The surplus bits.
        bits: u64,
    },
    /// Feature bits that a started ring depends on.
    #[error("SET_FEATURES changes {bits:#x} while rings are live")]
    FeaturesLive {
        /// The bits.
        bits: u64,
    },
    /// A protocol feature without one it depends on.
    #[error("protocol features {features:#x} lack {missing:#x}")]
    Dependency {
        /// The refused set.
        features: u64,
        /// What it lacks.
        missing: u64,
    },
    /// More regions than can be.
    #[error("{message} brings the regions to {count}, more than {max}")]
    Regions {
        /// Message name.
        message: &'static str,
        /// Regions.
        count: u64,
        /// Most regions.
        max: u64,
    },
    /// A region without bytes.
    #[error("region at guest address {guest_addr:#x} is empty")]
    RegionEmpty {
        /// Guest address.
        guest_addr: u64,
    },
    /// A range whose end is beyond 2^64.
    #[error("{message}: {what} {start:#x} + {size:#x} wraps")]
    Wraps {
        /// Message name.
        message: &'static str,
        /// Address space.
        what: &'static str,
        /// First byte.
        start: u64,
        /// Bytes.
        size: u64,
    },
    /// Two regions on one place.
    #[error("regions overlap in {space} space at {addr:#x}")]
    RegionOverlap {
        /// Address space.
        space: &'static str,
        /// Start of the region that came second.
        addr: u64,
    },
    /// A region that is not there.
    #[error("no region at guest {guest_addr:#x}, user {user_addr:#x}, {size:#x} bytes")]
    RegionUnknown {
        /// Guest address.
        guest_addr: u64,
        /// User address.
        user_addr: u64,
        /// Bytes.
        size: u64,
    },
    /// Configuration bytes outside the space, or another count than announced.
    #[error("{message}: {size} bytes at {offset} with {payload} in the message")]
    ConfigRange {
        /// Message name.
        message: &'static str,
        /// Offset.
        offset: u32,
        /// Announced bytes.
        size: u32,
        /// Bytes in the message.
        payload: usize,
    },
    /// A shared area smaller than what it must hold.
    #[error("{message}: {have} bytes where {need} are needed")]
    TooSmall {
        /// Message name.
        message: &'static str,
        /// Bytes there are.
        have: u64,
        /// Bytes needed.
        need: u64,
    },
    /// A postcopy message out of its order.
    #[error("{message} came out of the order ADVISE, LISTEN, END")]
    PostcopyOrder {
        /// Message name.
        message: &'static str,
    },
}

impl Violation {
    /// Whether the connection has to end.
    #[must_use]
    pub const fn is_fatal(&self) -> bool {
        matches!(
            self,
            Self::Version { .. }
                | Self::ReplyInRequest { .. }
                | Self::TooLong { .. }
                | Self::InbandAlone { .. }
                | Self::NoErrorForm { .. }
                | Self::ReplyFlags { .. }
                | Self::ReplyUnasked { .. }
                | Self::ReplyOrder { .. }
                | Self::ReplyShape { .. }
                | Self::ReplyContents { .. }
        )
    }
}

/// Something legal that is declined: the peer gets the error form of its message.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The ticket was dropped unanswered.
    #[error("the request was forgotten")]
    Forgotten,
    /// The device does not do this.
    #[error("not supported by this device")]
    Unsupported,
    /// In the front-end: the request's feature was not negotiated.
    #[error("{message} needs a feature that was not negotiated")]
    NotNegotiated {
        /// Message name.
        message: &'static str,
    },
    /// In the front-end: the request cannot be put on the wire.
    #[error("{message} cannot carry {what} {value}")]
    Unencodable {
        /// Message name.
        message: &'static str,
        /// Field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// In the front-end: feature bits the back-end did not offer.
    #[error("{message} acknowledges {bits:#x}, which was not offered")]
    Unoffered {
        /// Message name.
        message: &'static str,
        /// The surplus bits.
        bits: u64,
    },
    /// The device or the host declined, in words.
    #[error("{0}")]
    Because(String),
}

impl Refusal {
    /// A refusal in words: one lower-case clause.
    #[must_use]
    pub fn because(reason: impl std::fmt::Display) -> Self {
        Self::Because(reason.to_string())
    }
}
