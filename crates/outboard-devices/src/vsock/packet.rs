//! Packets of the socket device, to the byte (virtio 1.3 §5.10.6).
//!
//! ```text
//!  0 src_cid  8 dst_cid  16 src_port  20 dst_port  24 len  28 type  30 op  32 flags  36 buf_alloc  40 fwd_cnt  44 data
//! ```
//! Invariant: a header is copied out of guest memory once; what it says is a claim until it was checked.

use serde::{Deserialize, Serialize};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a header.
pub const HEADER: usize = 44;

/// The host's own address (§5.10.4).
pub const HOST_CID: u64 = 2;

/// Flags of [`Op::Shutdown`] (§5.10.6.6).
pub mod shut {
    /// The sender receives no more.
    pub const RECEIVE: u32 = 1;
    /// The sender sends no more.
    pub const SEND: u32 = 2;
    /// Neither.
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// Flags of [`Op::Data`] on seqpacket sockets (§5.10.6.7).
pub mod seq {
    /// The last packet of a message.
    pub const END_OF_MESSAGE: u32 = 1;
    /// The message ends a record.
    pub const END_OF_RECORD: u32 = 2;
}

/// What a socket is like: `type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// Bytes in order.
    Stream,
    /// Messages in order.
    Seqpacket,
}

impl Kind {
    /// None: a type that nobody has negotiated.
    #[must_use]
    pub fn of(number: u16) -> Option<Self> {
        match number {
            1 => Some(Self::Stream),
            2 => Some(Self::Seqpacket),
            _ => None,
        }
    }

    fn number(self) -> u16 {
        match self {
            Self::Stream => 1,
            Self::Seqpacket => 2,
        }
    }
}

/// What a packet is for: `op`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// Asks for a connection.
    Request,
    /// Grants it.
    Response,
    /// Refuses it, or ends it at once.
    Reset,
    /// Ends it in an orderly way, in one direction or both.
    Shutdown,
    /// Carries bytes.
    Data,
    /// Tells the sender's credit.
    CreditUpdate,
    /// Asks for it.
    CreditRequest,
}

impl Op {
    const ALL: [Self; 7] = [
        Self::Request,
        Self::Response,
        Self::Reset,
        Self::Shutdown,
        Self::Data,
        Self::CreditUpdate,
        Self::CreditRequest,
    ];

    /// None: no operation.
    #[must_use]
    pub fn of(number: u16) -> Option<Self> {
        Self::ALL.get(usize::from(number).checked_sub(1)?).copied()
    }

    fn number(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }
}

/// One end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Address {
    /// Who.
    pub cid: u64,
    /// Which of its sockets.
    pub port: u32,
}

/// `struct virtio_vsock_hdr`.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct Header {
    src_cid: U64,
    dst_cid: U64,
    src_port: U32,
    dst_port: U32,
    len: U32,
    kind: U16,
    op: U16,
    flags: U32,
    buf_alloc: U32,
    fwd_cnt: U32,
}

const _: () = assert!(size_of::<Header>() == HEADER);

impl Header {
    /// A packet without bytes, flags or credit.
    #[must_use]
    pub fn new(from: Address, to: Address, kind: Kind, op: Op) -> Self {
        Self {
            src_cid: from.cid.into(),
            dst_cid: to.cid.into(),
            src_port: from.port.into(),
            dst_port: to.port.into(),
            kind: kind.number().into(),
            op: op.number().into(),
            ..Self::default()
        }
    }

    /// With so many bytes behind it.
    #[must_use]
    pub fn with_length(mut self, length: u32) -> Self {
        self.len = length.into();
        self
    }

    /// With these flags.
    #[must_use]
    pub fn with_flags(mut self, flags: u32) -> Self {
        self.flags = flags.into();
        self
    }

    /// With the sender's credit.
    #[must_use]
    pub fn with_credit(mut self, told: Told) -> Self {
        (self.buf_alloc, self.fwd_cnt) = (told.room.into(), told.taken.into());
        self
    }

    /// The refusal of a packet like this one.
    #[must_use]
    pub fn refusal(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Op::Reset.number().into(),
            ..Self::default()
        }
    }

    /// Who sends it, as it says.
    #[must_use]
    pub fn source(&self) -> Address {
        Address { cid: self.src_cid.get(), port: self.src_port.get() }
    }

    /// Who is to get it.
    #[must_use]
    pub fn destination(&self) -> Address {
        Address { cid: self.dst_cid.get(), port: self.dst_port.get() }
    }

    /// None: an unknown type.
    #[must_use]
    pub fn kind(&self) -> Option<Kind> {
        Kind::of(self.kind.get())
    }

    /// None: an unknown operation.
    #[must_use]
    pub fn op(&self) -> Option<Op> {
        Op::of(self.op.get())
    }

    /// Bytes behind it, as it says.
    #[must_use]
    pub fn length(&self) -> u32 {
        self.len.get()
    }

    /// Flags, whose meaning is the operation's.
    #[must_use]
    pub fn flags(&self) -> u32 {
        self.flags.get()
    }

    /// The sender's credit, as it says.
    #[must_use]
    pub fn credit(&self) -> Told {
        Told { room: self.buf_alloc.get(), taken: self.fwd_cnt.get() }
    }
}

/// What a peer says of its receive buffer (§5.10.6.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// `buf_alloc`: its size.
    pub room: u32,
    /// `fwd_cnt`: bytes that have left it, counted from the first one, modulo 2^32.
    pub taken: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_right_to_the_byte() {
        let from = Address { cid: 0x0102, port: 0x0304_0506 };
        let to = Address { cid: 3, port: 7 };
        let header = Header::new(from, to, Kind::Seqpacket, Op::Data)
            .with_length(9)
            .with_flags(seq::END_OF_MESSAGE)
            .with_credit(Told { room: 0x10000, taken: 11 });
        let expected = [
            2, 1, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 6, 5, 4, 3, 7, 0, 0, 0, 9, 0, 0, 0, 2,
            0, 5, 0, 1, 0, 0, 0, 0, 0, 1, 0, 11, 0, 0, 0,
        ];
        assert_eq!(header.as_bytes(), expected);
    }

    #[test]
    fn b66_unknown_types_and_operations_are_told_from_known_ones() {
        for number in 0..=u16::MAX {
            assert_eq!(
                Kind::of(number).map(Kind::number),
                (1..=2).contains(&number).then_some(number)
            );
            assert_eq!(Op::of(number).map(Op::number), (1..=7).contains(&number).then_some(number));
        }
    }

    #[test]
    fn b66_a_refusal_goes_back_to_where_the_packet_came_from() {
        let (a, b) = (Address { cid: 3, port: 5 }, Address { cid: 2, port: 8 });
        let refused = Header::new(a, b, Kind::Stream, Op::Data).with_length(7).refusal();
        assert_eq!(refused, Header::new(b, a, Kind::Stream, Op::Reset));
    }
}
