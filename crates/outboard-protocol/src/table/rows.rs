//! The rows of the message table, as data.
//!
//! Invariant: rows stand in the order of their ids; [`table`] is the front-end's rows followed by
//! the back-end's, one array, and the two code enums are generated from the same lines.

use super::{ErrorForm, FdRule, Gate, MessageInfo, PayloadKind, ReplyKind, RingRule, Side};
use crate::features::ProtocolFeatures as P;

macro_rules! messages {
    ($($(#[$meta:meta])* $code:ident $side:ident {
        $($variant:ident = $id:literal $name:literal
            $payload:ident $fds:ident $reply:ident $error:expr, $gate:expr, $rings:ident;)*
    })*) => {
        const TABLE: &[MessageInfo] = &[$($(MessageInfo {
            side: Side::$side,
            id: $id,
            name: $name,
            payload: PayloadKind::$payload,
            fds: FdRule::$fds,
            reply: ReplyKind::$reply,
            error: $error,
            needs: $gate,
            rings: RingRule::$rings,
        },)*)*];
        $(
            $(#[$meta])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
            #[repr(u32)]
            pub enum $code { $(#[doc = $name] $variant = $id,)* }

            impl $code {
                /// Every code, in the order of the ids.
                pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

                /// The number on the wire.
                #[must_use]
                pub const fn id(self) -> u32 {
                    match self { $(Self::$variant => $id,)* }
                }

                /// The code with this number.
                #[must_use]
                pub const fn from_id(id: u32) -> Option<Self> {
                    match id { $($id => Some(Self::$variant),)* _ => None }
                }
            }
        )*
    };
}

const fn p(features: P) -> Gate {
    Gate::protocol(features)
}

const NAK: ErrorForm = ErrorForm::Nak;
const EMPTY: ErrorForm = ErrorForm::Empty;
const ONE: ErrorForm = ErrorForm::Status(1);
const NONE: ErrorForm = ErrorForm::None;
const OPEN: Gate = Gate::OPEN;

messages! {
    /// Requests of the front-end, on the main socket.
    FrontendCode FrontEnd {
        GetFeatures = 1 "GET_FEATURES" Empty None U64 NONE, OPEN, Any;
        SetFeatures = 2 "SET_FEATURES" U64 None Ack NAK, OPEN, LogToggleWhileLive;
        SetOwner = 3 "SET_OWNER" Empty None Ack NAK, OPEN, Any;
        ResetOwner = 4 "RESET_OWNER" Empty None Ack NAK, OPEN, Any;
        SetMemTable = 5 "SET_MEM_TABLE" MemTable PerRegion Ack NAK, OPEN, Any;
        SetLogBase = 6 "SET_LOG_BASE" Log One Log ONE, p(P::LOG_SHMFD), Any;
        SetLogFd = 7 "SET_LOG_FD" Empty One Ack NAK, Gate::LOG, Any;
        SetVringNum = 8 "SET_VRING_NUM" VringState None Ack NAK, OPEN, RingStopped;
        SetVringAddr = 9 "SET_VRING_ADDR" VringAddr None Ack NAK, OPEN, SameWhileLive;
        SetVringBase = 10 "SET_VRING_BASE" VringState None Ack NAK, OPEN, RingStopped;
        GetVringBase = 11 "GET_VRING_BASE" VringState None VringState NONE, OPEN, Any;
        SetVringKick = 12 "SET_VRING_KICK" VringFd VringFd Ack NAK, OPEN, Any;
        SetVringCall = 13 "SET_VRING_CALL" VringFd VringFd Ack NAK, OPEN, Any;
        SetVringErr = 14 "SET_VRING_ERR" VringFd VringFd Ack NAK, OPEN, Any;
        GetProtocolFeatures = 15 "GET_PROTOCOL_FEATURES" Empty None U64 NONE, Gate::PROTOCOL_OFFERED, Any;
        SetProtocolFeatures = 16 "SET_PROTOCOL_FEATURES" U64 None Ack NAK, Gate::PROTOCOL_OFFERED, Any;
        GetQueueNum = 17 "GET_QUEUE_NUM" Empty None U64 NONE, p(P::MQ), Any;
        SetVringEnable = 18 "SET_VRING_ENABLE" VringState None Ack NAK, Gate::PROTOCOL_ACKED, Any;
        SendRarp = 19 "SEND_RARP" U64 None Ack NAK, p(P::RARP), Any;
        NetSetMtu = 20 "NET_SET_MTU" U64 None Ack NAK, Gate::MTU, Any;
        SetBackendReqFd = 21 "SET_BACKEND_REQ_FD" Empty One Ack NAK, p(P::BACKEND_REQ), Any;
        IotlbMsg = 22 "IOTLB_MSG" Iotlb None Status ONE, Gate::IOMMU, Any;
        SetVringEndian = 23 "SET_VRING_ENDIAN" VringState None Ack NAK, p(P::CROSS_ENDIAN), RingStopped;
        GetConfig = 24 "GET_CONFIG" Config None Config EMPTY, p(P::CONFIG), Any;
        SetConfig = 25 "SET_CONFIG" Config None Ack NAK, p(P::CONFIG), Any;
        CreateCryptoSession = 26 "CREATE_CRYPTO_SESSION" CryptoSession None CryptoSession ErrorForm::NoSession, p(P::CRYPTO_SESSION), Any;
        CloseCryptoSession = 27 "CLOSE_CRYPTO_SESSION" U64 None Ack NAK, p(P::CRYPTO_SESSION), Any;
        PostcopyAdvise = 28 "POSTCOPY_ADVISE" Empty None Fd EMPTY, Gate::POSTCOPY, Any;
        PostcopyListen = 29 "POSTCOPY_LISTEN" Empty None AckWheneverAsked NAK, Gate::POSTCOPY, NoMemory;
        PostcopyEnd = 30 "POSTCOPY_END" Empty None Status ONE, Gate::POSTCOPY, Any;
        GetInflightFd = 31 "GET_INFLIGHT_FD" Inflight None Inflight ErrorForm::NoInflight, p(P::INFLIGHT_SHMFD), AllStopped;
        SetInflightFd = 32 "SET_INFLIGHT_FD" Inflight One Ack NAK, p(P::INFLIGHT_SHMFD), AllStopped;
        GpuSetSocket = 33 "GPU_SET_SOCKET" Empty One Ack NAK, Gate::GPU, Any;
        ResetDevice = 34 "RESET_DEVICE" Empty None Ack NAK, p(P::RESET_DEVICE), Any;
        VringKick = 35 "VRING_KICK" VringState None Ack NAK, p(P::INBAND_NOTIFICATIONS), Any;
        GetMaxMemSlots = 36 "GET_MAX_MEM_SLOTS" Empty None U64 NONE, p(P::CONFIGURE_MEM_SLOTS), Any;
        AddMemReg = 37 "ADD_MEM_REG" SingleRegion One Ack NAK, p(P::CONFIGURE_MEM_SLOTS), Any;
        RemMemReg = 38 "REM_MEM_REG" SingleRegion OneIgnored Ack NAK, p(P::CONFIGURE_MEM_SLOTS), Any;
        SetStatus = 39 "SET_STATUS" U64 None Ack NAK, p(P::STATUS), Any;
        GetStatus = 40 "GET_STATUS" Empty None U64 NONE, p(P::STATUS), Any;
        GetSharedObject = 41 "GET_SHARED_OBJECT" MaybeUuid None MaybeFd EMPTY, p(P::SHARED_OBJECT), Any;
        SetDeviceStateFd = 42 "SET_DEVICE_STATE_FD" DeviceState One DeviceState ErrorForm::Status(0x101), p(P::DEVICE_STATE), AllStopped;
        CheckDeviceState = 43 "CHECK_DEVICE_STATE" Empty None Status ONE, p(P::DEVICE_STATE), Any;
        GetShmemConfig = 44 "GET_SHMEM_CONFIG" Empty None ShmemConfig NONE, p(P::SHMEM), Any;
        GetVringBaseSkipDrain = 45 "GET_VRING_BASE_SKIP_DRAIN" VringState None VringState NONE, p(P::SKIP_DRAIN.union(P::GET_VRING_BASE_INFLIGHT).union(P::INFLIGHT_SHMFD)), Any;
    }
    /// Requests of the back-end, on the socket of SET_BACKEND_REQ_FD.
    BackendCode BackEnd {
        IotlbMsg = 1 "IOTLB_MSG" Iotlb None Ack NAK, Gate::IOMMU, Any;
        ConfigChange = 2 "CONFIG_CHANGE_MSG" Empty None Ack NAK, p(P::CONFIG), Any;
        VringHostNotifier = 3 "VRING_HOST_NOTIFIER_MSG" VringArea VringFd Ack NAK, p(P::HOST_NOTIFIER.union(P::BACKEND_SEND_FD)), Any;
        VringCall = 4 "VRING_CALL" VringState None Ack NAK, p(P::INBAND_NOTIFICATIONS), Any;
        VringErr = 5 "VRING_ERR" VringState None Ack NAK, p(P::INBAND_NOTIFICATIONS), Any;
        SharedObjectAdd = 6 "SHARED_OBJECT_ADD" Uuid None Ack NAK, p(P::SHARED_OBJECT), Any;
        SharedObjectRemove = 7 "SHARED_OBJECT_REMOVE" Uuid None Ack NAK, p(P::SHARED_OBJECT), Any;
        SharedObjectLookup = 8 "SHARED_OBJECT_LOOKUP" Uuid None StatusAndFd ONE, p(P::SHARED_OBJECT), Any;
        ShmemMap = 9 "SHMEM_MAP" ShmemMap One Ack NAK, p(P::SHMEM), Any;
        ShmemUnmap = 10 "SHMEM_UNMAP" ShmemMap None Ack NAK, p(P::SHMEM), Any;
        GpuMap = 1006 "GPU_MAP" GpuMap One Status ONE, OPEN, Any;
        ExternalMap = 1007 "EXTERNAL_MAP" ExternalMap None Status ONE, OPEN, Any;
    }
}

/// Every message there is: the front-end's, then the back-end's.
#[must_use]
pub const fn table() -> &'static [MessageInfo] {
    TABLE
}

/// The messages of the front-end.
#[must_use]
pub fn front_end_table() -> &'static [MessageInfo] {
    TABLE.split_at_checked(FrontendCode::ALL.len()).map_or(TABLE, |(front, _)| front)
}

/// The messages of the back-end.
#[must_use]
pub fn back_end_table() -> &'static [MessageInfo] {
    TABLE.split_at_checked(FrontendCode::ALL.len()).map_or(&[], |(_, back)| back)
}
