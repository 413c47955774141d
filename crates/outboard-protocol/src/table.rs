//! The one table of all messages (vhost-user, "Front-end message types" and "Back-end message
//! types", and crosvm's two additions).
//!
//! Invariant: nothing else in this crate knows a message's id, size, descriptor count, reply,
//! feature or legal ring states; decoder checks, gates, replies, error forms, tests, the fuzzers'
//! dictionary and the documentation all ask here.
//!
#![doc = include_str!("../MESSAGES.md")]

mod rows;

pub use rows::{BackendCode, FrontendCode, back_end_table, front_end_table, table};

use crate::features::{ProtocolFeatures, virtio};
use crate::payload::{MAX_CONFIG_SIZE, MAX_REGIONS, TOLERATED_SLOTS};

/// Who sends a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The VMM, on the main socket.
    FrontEnd,
    /// The device, on the socket of SET_BACKEND_REQ_FD.
    BackEnd,
}

/// What a request carries after its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PayloadKind {
    /// Nothing.
    Empty,
    /// A 64-bit number.
    U64,
    /// The `u64` of KICK, CALL and ERR.
    VringFd,
    /// [`crate::payload::VringState`].
    VringState,
    /// [`crate::payload::VringAddr`].
    VringAddr,
    /// A memory table.
    MemTable,
    /// [`crate::payload::SingleRegion`].
    SingleRegion,
    /// [`crate::payload::Log`], or a `u64` from front-ends without LOG_SHMFD.
    Log,
    /// [`crate::payload::Iotlb`].
    Iotlb,
    /// [`crate::payload::ConfigHead`] and bytes.
    Config,
    /// [`crate::payload::CryptoSession`].
    CryptoSession,
    /// [`crate::payload::Inflight`], with or without tail padding.
    Inflight,
    /// [`crate::payload::Uuid`].
    Uuid,
    /// [`crate::payload::Uuid`], or nothing (QEMU forgets the length).
    MaybeUuid,
    /// [`crate::payload::DeviceState`].
    DeviceState,
    /// [`crate::payload::VringArea`].
    VringArea,
    /// [`crate::payload::ShmemMap`].
    ShmemMap,
    /// [`crate::payload::GpuMap`].
    GpuMap,
    /// [`crate::payload::ExternalMap`].
    ExternalMap,
}

/// The payload lengths a request may have, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sizes {
    /// One of these.
    OneOf(&'static [u32]),
    /// Everything from the first to the second number, in steps of the third.
    Steps(u32, u32, u32),
}

impl Sizes {
    /// Whether a payload of `size` bytes is well formed.
    #[must_use]
    pub fn allows(self, size: u32) -> bool {
        match self {
            Self::OneOf(sizes) => sizes.contains(&size),
            Self::Steps(low, high, step) => {
                (low..=high).contains(&size) && (size - low).is_multiple_of(step)
            }
        }
    }

    /// The shortest legal payload.
    #[must_use]
    pub fn smallest(self) -> u32 {
        match self {
            Self::OneOf(sizes) => sizes.iter().copied().min().unwrap_or(0),
            Self::Steps(low, ..) => low,
        }
    }

    /// The longest legal payload.
    #[must_use]
    pub fn largest(self) -> u32 {
        match self {
            Self::OneOf(sizes) => sizes.iter().copied().max().unwrap_or(0),
            Self::Steps(_, high, _) => high,
        }
    }
}

const TABLE_HEAD: u32 = 8;
const SLOT: u32 = 32;
const CONFIG_HEAD: u32 = 12;

impl PayloadKind {
    /// The lengths this payload may have.
    #[must_use]
    pub const fn sizes(self) -> Sizes {
        match self {
            Self::Empty => Sizes::OneOf(&[0]),
            Self::U64 | Self::VringFd | Self::VringState | Self::DeviceState => Sizes::OneOf(&[8]),
            Self::VringAddr | Self::SingleRegion | Self::ShmemMap => Sizes::OneOf(&[40]),
            Self::MemTable => Sizes::Steps(TABLE_HEAD, TABLE_HEAD + SLOT * MAX_SLOTS, SLOT),
            Self::Log => Sizes::OneOf(&[8, 16]),
            Self::Iotlb | Self::ExternalMap => Sizes::OneOf(&[32]),
            Self::Config => Sizes::Steps(CONFIG_HEAD, CONFIG_HEAD + MAX_CONFIG_SIZE, 1),
            Self::CryptoSession => Sizes::OneOf(&[1072]),
            Self::Inflight => Sizes::OneOf(&[20, 24]),
            Self::Uuid => Sizes::OneOf(&[16]),
            Self::MaybeUuid => Sizes::OneOf(&[0, 16]),
            Self::VringArea => Sizes::OneOf(&[24]),
            Self::GpuMap => Sizes::OneOf(&[64]),
        }
    }
}

/// [`MAX_REGIONS`] at wire width.
const MAX_SLOTS: u32 = 32;
const _: () = assert!(MAX_SLOTS as usize == MAX_REGIONS && TOLERATED_SLOTS <= MAX_REGIONS);

/// How many descriptors come with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FdRule {
    /// None.
    None,
    /// Exactly one.
    One,
    /// None, or one that is closed unseen.
    OneIgnored,
    /// One, or none when bit 8 of the payload is set.
    VringFd,
    /// One for each region of the memory table.
    PerRegion,
}

impl FdRule {
    /// Whether `count` can be right at all; [`FdRule::VringFd`] and [`FdRule::PerRegion`] need a
    /// second look at the payload.
    #[must_use]
    pub const fn may_be(self, count: usize) -> bool {
        match self {
            Self::None => count == 0,
            Self::One => count == 1,
            Self::OneIgnored | Self::VringFd => count <= 1,
            Self::PerRegion => count <= MAX_REGIONS,
        }
    }
}

/// How a request is answered when it succeeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReplyKind {
    /// A `u64` 0, if REPLY_ACK was negotiated and the request asks for it.
    Ack,
    /// A `u64` 0 whenever the request asks for it, whatever was negotiated.
    AckWheneverAsked,
    /// A `u64` with a value.
    U64,
    /// A `u64`, 0 for success.
    Status,
    /// A `u64` 0 with a descriptor.
    StatusAndFd,
    /// Ring index and base.
    VringState,
    /// The memory table again, with the back-end's addresses: SET_MEM_TABLE in postcopy.
    MemTable,
    /// The log description again.
    Log,
    /// The configuration bytes under the request's own head.
    Config,
    /// The session with its id.
    CryptoSession,
    /// Nothing but a descriptor.
    Fd,
    /// Nothing but a descriptor, or not even that.
    MaybeFd,
    /// An in-flight description and its descriptor.
    Inflight,
    /// A `u64` of [`crate::ticket::StateChannel`]'s kind, and perhaps a descriptor.
    DeviceState,
    /// [`crate::payload::ShmemConfig`].
    ShmemConfig,
}

impl ReplyKind {
    /// Whether a request of this kind is answered without being asked to.
    #[must_use]
    pub const fn is_own(self) -> bool {
        !matches!(self, Self::Ack | Self::AckWheneverAsked)
    }
}

/// How a request that succeeds in nothing is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorForm {
    /// The acknowledgement is not zero, if one was asked for.
    Nak,
    /// The reply is empty.
    Empty,
    /// The reply is this `u64`.
    Status(u64),
    /// The reply is an in-flight description of zeros.
    NoInflight,
    /// The reply is a session with a negative id.
    NoSession,
    /// There is none: a non-zero `u64` if an acknowledgement was asked for, else the connection
    /// ends, because the peer waits for an answer that cannot be given.
    None,
}

/// What must have been offered or negotiated before a request is legal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gate {
    /// Protocol features that must be acknowledged, all of them.
    pub protocol: ProtocolFeatures,
    /// Protocol features that must not be acknowledged.
    pub without: ProtocolFeatures,
    /// Feature bits that must be offered.
    pub offered: u64,
    /// Feature bits that must be acknowledged.
    pub acked: u64,
    /// Protocol features are as good as long as no feature bits are acknowledged: QEMU's network cards enable
    /// their rings before SET_FEATURES.
    pub early: bool,
    /// The device has a display socket.
    pub gpu_socket: bool,
}

impl Gate {
    /// Always open.
    pub const OPEN: Self = Self {
        protocol: ProtocolFeatures::empty(),
        without: ProtocolFeatures::empty(),
        offered: 0,
        acked: 0,
        early: false,
        gpu_socket: false,
    };
    /// Needs feature bit 30 offered (it need not be acknowledged).
    const PROTOCOL_OFFERED: Self = Self { offered: virtio::PROTOCOL_FEATURES, ..Self::OPEN };
    /// Needs feature bit 30 acknowledged, or protocol features before any acknowledgement.
    const PROTOCOL_ACKED: Self =
        Self { acked: virtio::PROTOCOL_FEATURES, early: true, ..Self::OPEN };
    /// Needs an IOMMU.
    const IOMMU: Self = Self { acked: virtio::ACCESS_PLATFORM, ..Self::OPEN };
    /// Needs a device that logs.
    const LOG: Self = Self { offered: virtio::LOG_ALL, ..Self::OPEN };
    /// Needs a display.
    const GPU: Self = Self { gpu_socket: true, ..Self::OPEN };
    /// Needs MTU, and a net device that knows about it.
    const MTU: Self = Self { offered: virtio::NET_MTU, ..Self::protocol(ProtocolFeatures::MTU) };
    /// Needs PAGEFAULT; dead with memory slots.
    const POSTCOPY: Self = Self {
        without: ProtocolFeatures::CONFIGURE_MEM_SLOTS,
        ..Self::protocol(ProtocolFeatures::PAGEFAULT)
    };

    /// Needs all of these protocol features.
    const fn protocol(features: ProtocolFeatures) -> Self {
        Self { protocol: features, ..Self::OPEN }
    }

    /// Whether a request behind this gate may be sent now.
    #[must_use]
    pub const fn is_open(&self, now: &Negotiated) -> bool {
        now.protocol.contains(self.protocol)
            && !now.protocol.intersects(self.without)
            && now.offered & self.offered == self.offered
            && (now.acked & self.acked == self.acked
                || (self.early && now.acked == 0 && !now.protocol.is_empty()))
            && (now.gpu_socket || !self.gpu_socket)
    }
}

/// What has been offered and acknowledged on a connection so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Negotiated {
    /// Feature bits offered by the back-end.
    pub offered: u64,
    /// Feature bits acknowledged by the front-end.
    pub acked: u64,
    /// Protocol features acknowledged by the front-end.
    pub protocol: ProtocolFeatures,
    /// Whether the device takes a display socket.
    pub gpu_socket: bool,
}

/// In which states of the rings a request is legal. A ring is live while a worker holds its queue:
/// running, parked or broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RingRule {
    /// In all.
    Any,
    /// The named ring must not be live.
    RingStopped,
    /// The named ring must not be live, unless nothing but the log flag and address change.
    SameWhileLive,
    /// No ring may be live.
    AllStopped,
    /// No region of memory may be mapped, and postcopy must be announced.
    NoMemory,
    /// While rings are live only LOG_ALL and PROTOCOL_FEATURES may change.
    LogToggleWhileLive,
}

/// One row of the table: everything that is known about one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageInfo {
    /// Who sends it.
    pub side: Side,
    /// Its number.
    pub id: u32,
    /// Its name in the specification, without the prefix.
    pub name: &'static str,
    /// What it carries.
    pub payload: PayloadKind,
    /// How many descriptors come with it.
    pub fds: FdRule,
    /// How success is answered.
    pub reply: ReplyKind,
    /// How failure is answered.
    pub error: ErrorForm,
    /// What it needs.
    pub needs: Gate,
    /// When it is legal.
    pub rings: RingRule,
}

impl MessageInfo {
    /// Whether an acknowledgement is due for a request with this need_reply bit.
    #[must_use]
    pub const fn acknowledges(&self, need_reply: bool, protocol: ProtocolFeatures) -> bool {
        let agreed = protocol.contains(ProtocolFeatures::REPLY_ACK)
            || matches!(self.reply, ReplyKind::AckWheneverAsked);
        need_reply && agreed
    }
}

/// The row of a message; `None` for an unknown id.
#[must_use]
pub fn info(side: Side, id: u32) -> Option<&'static MessageInfo> {
    let rows = match side {
        Side::FrontEnd => front_end_table(),
        Side::BackEnd => back_end_table(),
    };
    rows.iter().find(|row| row.id == id)
}
