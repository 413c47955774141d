//! What a request makes the host do: one [`Effect`] for each message that the state machine cannot
//! carry out by itself.
//!
//! Invariant: an effect holds values that were checked as far as they can be without looking at
//! memory or descriptors, and everything that is needed to carry it out, descriptors included; the
//! machine keeps none. Each holds one [`Ticket`].

use crate::features::ProtocolFeatures;
use crate::payload::{CryptoSession, Inflight, Iotlb, Log, MemRegion, Uuid};
use crate::ticket::{
    Ack, Base, Bases, ConfigBytes, InflightArea, SessionId, SharedObject, ShmemSizes, StateChannel,
    Status, Ticket, UserFault,
};
use crate::violation::Violation;

/// What [`Backend::poll`](crate::Backend::poll) found.
#[derive(Debug)]
#[must_use]
pub enum Step<Fd> {
    /// Something to do; nothing further comes until its ticket is answered.
    Effect(Effect<Fd>),
    /// The peer broke a rule. It has been answered as far as an answer was due, the stream is in
    /// step and the connection lives: this is for the log.
    Violation(Violation),
}

/// How a ring is kicked, or how it calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notifier<Fd> {
    /// Through this descriptor.
    Fd(Fd),
    /// Not at all: the other side polls (bit 8 of the message).
    Poll,
}

/// Direction of a transfer of device state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateDirection {
    /// The device writes its state and closes the descriptor.
    Save,
    /// The device reads its state to the end.
    Load,
}

macro_rules! effects {
    ($($(#[$meta:meta])* $name:ident $message:literal
        { $($(#[$fmeta:meta])* $field:ident: $ty:ty,)* } -> $reply:ty;)*) => {
        /// One thing for the host to do.
        #[derive(Debug)]
        #[must_use = "dropping an effect refuses its request"]
        #[non_exhaustive]
        pub enum Effect<Fd> {
            $($(#[$meta])* $name {
                $($(#[$fmeta])* $field: $ty,)*
                /// To be answered.
                ticket: Ticket<$reply>,
            },)*
        }

        impl<Fd> Effect<Fd> {
            /// The name of the effect, that of its message where there is only one.
            #[must_use]
            pub const fn name(&self) -> &'static str {
                match self { $(Self::$name { .. } => $message,)* }
            }
        }
    };
}

effects! {
    /// The driver's features, a subset of those offered; they replace the earlier ones.
    SetFeatures "SET_FEATURES" {
        /// Acknowledged bits.
        features: u64,
        /// Bit 30 is absent: all rings become enabled with the answer.
        enable_all: bool,
    } -> Ack;
    /// The protocol features, dependencies checked.
    SetProtocolFeatures "SET_PROTOCOL_FEATURES" {
        /// Acknowledged bits.
        features: ProtocolFeatures,
    } -> Ack;
    /// All rings become disabled with the answer; nothing else changes.
    ResetOwner "RESET_OWNER" {} -> Ack;
    /// Stop all rings and reset the device. With the answer all rings are stopped and disabled
    /// and the features are 0; memory, protocol features and channel stay.
    ResetDevice "RESET_DEVICE" {} -> Ack;
    /// A new memory table in place of the old one; it may be empty.
    SetMemTable "SET_MEM_TABLE" {
        /// Regions that overlap in neither space, with their files.
        regions: Vec<(MemRegion, Fd)>,
    } -> Ack;
    /// One more region.
    AddMemRegion "ADD_MEM_REG" {
        /// The region; it overlaps none that is there.
        region: MemRegion,
        /// Its file.
        fd: Fd,
    } -> Ack;
    /// One region less.
    RemMemRegion "REM_MEM_REG" {
        /// A region that is there (the offset is the one it was added with).
        region: MemRegion,
    } -> Ack;
    /// NUM, ADDR or BASE stands in the ring's record. A remembered kick may be startable now.
    /// A live ring gets this too: then nothing but the log flag and address of its addresses has
    /// changed. A refusal puts the old record back.
    RingConfigured "RING_CONFIGURED" {
        /// Ring.
        index: u16,
    } -> Ack;
    /// The ring is to start (as soon as it can), or to be kicked through another descriptor.
    SetVringKick "SET_VRING_KICK" {
        /// Ring.
        index: u16,
        /// Where kicks come from.
        kick: Notifier<Fd>,
    } -> Ack;
    /// Completions are to be signalled here; in use before the answer.
    SetVringCall "SET_VRING_CALL" {
        /// Ring.
        index: u16,
        /// Where calls go to.
        call: Notifier<Fd>,
    } -> Ack;
    /// A broken ring is to be signalled here.
    SetVringErr "SET_VRING_ERR" {
        /// Ring.
        index: u16,
        /// Where errors go to.
        err: Notifier<Fd>,
    } -> Ack;
    /// The enable flag of a ring; visible to the worker before the answer.
    SetVringEnable "SET_VRING_ENABLE" {
        /// Ring.
        index: u16,
        /// The flag.
        enabled: bool,
    } -> Ack;
    /// Stop the ring and say where it stands. The answer commits the stop; on a ring that never
    /// ran it is the base last set ([`Ring::base`](crate::Ring::base)).
    GetVringBase "GET_VRING_BASE" {
        /// Ring.
        index: u16,
        /// Leave requests in the in-flight region instead of finishing them.
        skip_drain: bool,
    } -> Base;
    /// Bytes of configuration space.
    ReadConfig "GET_CONFIG" {
        /// First byte.
        offset: u32,
        /// Number of bytes, at least one; `offset + size` is at most 256.
        size: u32,
    } -> ConfigBytes;
    /// Bytes of configuration space are written.
    WriteConfig "SET_CONFIG" {
        /// First byte.
        offset: u32,
        /// The bytes, at least one.
        bytes: Vec<u8>,
        /// Written by a migration, not by the guest: read-only fields may change.
        migration: bool,
    } -> Ack;
    /// The back-end channel; it replaces an earlier one.
    SetBackendReqFd "SET_BACKEND_REQ_FD" {
        /// A socket, to be checked.
        channel: Fd,
    } -> Ack;
    /// The dirty log; it replaces an earlier one.
    SetLogBase "SET_LOG_BASE" {
        /// Size and offset; the size is not 0 and the end does not wrap.
        log: Log,
        /// Its file.
        fd: Fd,
    } -> Ack;
    /// An eventfd to signal after logged writes.
    SetLogFd "SET_LOG_FD" {
        /// The eventfd.
        fd: Fd,
    } -> Ack;
    /// A new in-flight region is asked for.
    GetInflightFd "GET_INFLIGHT_FD" {
        /// Number of rings, at least 1 and at most as many as there are.
        num_queues: u16,
        /// Ring size, at least 1 and at most the largest.
        queue_size: u16,
    } -> InflightArea;
    /// An in-flight region to use from now on.
    SetInflightFd "SET_INFLIGHT_FD" {
        /// Its description; large enough for its rings.
        inflight: Inflight,
        /// Its file.
        fd: Fd,
    } -> Ack;
    /// Device state is to be saved to or loaded from a descriptor; no ring is live.
    SetDeviceStateFd "SET_DEVICE_STATE_FD" {
        /// Save or load.
        direction: StateDirection,
        /// The front-end's descriptor.
        fd: Fd,
    } -> StateChannel;
    /// The outcome of the transfer is asked for.
    CheckDeviceState "CHECK_DEVICE_STATE" {} -> Ack;
    /// An IOTLB entry is added (kind 2) or removed (kind 3).
    Iotlb "IOTLB_MSG" {
        /// The entry; its ranges do not wrap.
        message: Iotlb,
    } -> Ack;
    /// The virtio status byte is written; 0 resets.
    SetStatus "SET_STATUS" {
        /// The byte.
        status: u8,
    } -> Ack;
    /// The virtio status byte is read.
    GetStatus "GET_STATUS" {} -> Status;
    /// A fake RARP is to be broadcast.
    SendRarp "SEND_RARP" {
        /// The guest's address.
        mac: [u8; 6],
    } -> Ack;
    /// The guest's MTU.
    NetSetMtu "NET_SET_MTU" {
        /// Bytes.
        mtu: u16,
    } -> Ack;
    /// Byte order of a legacy ring; the answer commits it.
    SetVringEndian "SET_VRING_ENDIAN" {
        /// Ring.
        index: u16,
        /// Big-endian.
        big_endian: bool,
    } -> Ack;
    /// A crypto session is opened.
    CreateCryptoSession "CREATE_CRYPTO_SESSION" {
        /// Parameters; its key lengths fit their fields.
        session: Box<CryptoSession>,
    } -> SessionId;
    /// A crypto session is closed.
    CloseCryptoSession "CLOSE_CRYPTO_SESSION" {
        /// Its id.
        id: u64,
    } -> Ack;
    /// Postcopy begins: a userfaultfd is asked for.
    PostcopyAdvise "POSTCOPY_ADVISE" {} -> UserFault;
    /// Postcopy: the next memory table is to be registered.
    PostcopyListen "POSTCOPY_LISTEN" {} -> Ack;
    /// Postcopy: map these regions, touch nothing of them, and say where they are.
    PostcopyMap "SET_MEM_TABLE" {
        /// Regions and their files.
        regions: Vec<(MemRegion, Fd)>,
    } -> Bases;
    /// Postcopy: faults in the mapped regions can be served now: register them, then use them.
    PostcopyRegister "SET_MEM_TABLE" {} -> Ack;
    /// Postcopy is over.
    PostcopyEnd "POSTCOPY_END" {} -> Ack;
    /// The display channel.
    GpuSetSocket "GPU_SET_SOCKET" {
        /// A socket, to be checked.
        socket: Fd,
    } -> Ack;
    /// A kick as a message; it starts a stopped ring first.
    VringKick "VRING_KICK" {
        /// Ring.
        index: u16,
    } -> Ack;
    /// A shared object is asked for.
    GetSharedObject "GET_SHARED_OBJECT" {
        /// Its name.
        uuid: Uuid,
    } -> SharedObject;
    /// The shared-memory regions are asked for.
    GetShmemConfig "GET_SHMEM_CONFIG" {} -> ShmemSizes;
}
