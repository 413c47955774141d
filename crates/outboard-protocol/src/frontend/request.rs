//! The requests of a front-end as values, and how they are put on the wire.
//!
//! Invariant: what is encoded here passes the table's length and descriptor checks.

use zerocopy::IntoBytes;

use crate::effect::{Notifier, StateDirection};
use crate::features::ProtocolFeatures;
use crate::payload::{
    CryptoSession, DeviceState, Inflight, Iotlb, Log, MemRegion, SingleRegion, Uuid, VringAddr,
    VringFd, VringState, encode_config, encode_mem_table,
};
use crate::table::{FrontendCode, MessageInfo, ReplyKind};
use crate::violation::Refusal;

/// A request of the front-end.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Request<Fd> {
    /// Which feature bits are offered?
    GetFeatures,
    /// These feature bits are acknowledged.
    SetFeatures(u64),
    /// The session starts.
    SetOwner,
    /// All rings are to be disabled (deprecated).
    ResetOwner,
    /// The memory of the guest.
    SetMemTable(Vec<(MemRegion, Fd)>),
    /// The dirty log and its file.
    SetLogBase(Log, Fd),
    /// An eventfd to signal after logged writes.
    SetLogFd(Fd),
    /// Entries of a ring.
    SetVringNum {
        /// Ring.
        index: u32,
        /// Entries.
        size: u32,
    },
    /// Addresses of a ring.
    SetVringAddr(VringAddr),
    /// Next index of a ring.
    SetVringBase {
        /// Ring.
        index: u32,
        /// 16 bits for a split ring, both halves for a packed one.
        base: u32,
    },
    /// Stop a ring and say where it stands.
    GetVringBase {
        /// Ring.
        index: u32,
    },
    /// As `GetVringBase`, without waiting for requests in flight.
    GetVringBaseSkipDrain {
        /// Ring.
        index: u32,
    },
    /// Start a ring, or kick it through another descriptor.
    SetVringKick {
        /// Ring, at most 255.
        index: u32,
        /// Where kicks come from.
        kick: Notifier<Fd>,
    },
    /// Signal completions here.
    SetVringCall {
        /// Ring, at most 255.
        index: u32,
        /// Where calls go to.
        call: Notifier<Fd>,
    },
    /// Signal a broken ring here.
    SetVringErr {
        /// Ring, at most 255.
        index: u32,
        /// Where errors go to.
        err: Notifier<Fd>,
    },
    /// Which protocol features are offered?
    GetProtocolFeatures,
    /// These protocol features are acknowledged.
    SetProtocolFeatures(ProtocolFeatures),
    /// How many rings are there?
    GetQueueNum,
    /// Enable or disable a ring.
    SetVringEnable {
        /// Ring.
        index: u32,
        /// The flag.
        enabled: bool,
    },
    /// Broadcast a fake RARP with this address.
    SendRarp([u8; 6]),
    /// The guest's MTU in bytes.
    NetSetMtu(u16),
    /// The socket for requests of the back-end.
    SetBackendReqFd(Fd),
    /// Add or remove an IOTLB entry.
    Iotlb(Iotlb),
    /// Byte order of a legacy ring.
    SetVringEndian {
        /// Ring.
        index: u32,
        /// Big-endian.
        big_endian: bool,
    },
    /// Read configuration space.
    GetConfig {
        /// First byte.
        offset: u32,
        /// Bytes, at most 256.
        size: u32,
    },
    /// Write configuration space.
    SetConfig {
        /// First byte.
        offset: u32,
        /// The bytes, at most 256.
        bytes: Vec<u8>,
        /// The write belongs to a migration.
        migration: bool,
    },
    /// Open a crypto session.
    CreateCryptoSession(Box<CryptoSession>),
    /// Close a crypto session.
    CloseCryptoSession(u64),
    /// Postcopy: a userfaultfd is asked for.
    PostcopyAdvise,
    /// Postcopy: the next table is to be registered.
    PostcopyListen,
    /// Postcopy: the memory of the guest, of which the back-end says where it maps it.
    PostcopyMemTable(Vec<(MemRegion, Fd)>),
    /// Postcopy: faults in that memory can be served.
    PostcopyReady,
    /// Postcopy is over.
    PostcopyEnd,
    /// A new in-flight region is asked for.
    GetInflightFd {
        /// Number of rings.
        num_queues: u16,
        /// Ring size.
        queue_size: u16,
    },
    /// An in-flight region is to be used.
    SetInflightFd(Inflight, Fd),
    /// The display socket.
    GpuSetSocket(Fd),
    /// Stop all rings and reset the device.
    ResetDevice,
    /// Kick a ring by message.
    VringKick {
        /// Ring.
        index: u32,
    },
    /// How many memory slots are there?
    GetMaxMemSlots,
    /// One more region.
    AddMemReg(MemRegion, Fd),
    /// One region less.
    RemMemReg(MemRegion),
    /// Write the virtio status byte.
    SetStatus(u8),
    /// Read the virtio status byte.
    GetStatus,
    /// A shared object is asked for.
    GetSharedObject(Uuid),
    /// Save or load device state through this descriptor.
    SetDeviceStateFd(StateDirection, Fd),
    /// Did the transfer succeed?
    CheckDeviceState,
    /// Which shared-memory regions are there?
    GetShmemConfig,
}

/// Payload and descriptors of a request.
type Parts<Fd> = (Vec<u8>, Vec<Fd>);

impl<Fd> Request<Fd> {
    /// The message this is.
    #[must_use]
    pub const fn code(&self) -> FrontendCode {
        use FrontendCode as C;
        match self {
            Self::GetFeatures => C::GetFeatures,
            Self::SetFeatures(_) => C::SetFeatures,
            Self::SetOwner => C::SetOwner,
            Self::ResetOwner => C::ResetOwner,
            Self::SetMemTable(_) => C::SetMemTable,
            Self::SetLogBase(..) => C::SetLogBase,
            Self::SetLogFd(_) => C::SetLogFd,
            Self::SetVringNum { .. } => C::SetVringNum,
            Self::SetVringAddr(_) => C::SetVringAddr,
            Self::SetVringBase { .. } => C::SetVringBase,
            Self::GetVringBase { .. } => C::GetVringBase,
            Self::GetVringBaseSkipDrain { .. } => C::GetVringBaseSkipDrain,
            Self::SetVringKick { .. } => C::SetVringKick,
            Self::SetVringCall { .. } => C::SetVringCall,
            Self::SetVringErr { .. } => C::SetVringErr,
            Self::GetProtocolFeatures => C::GetProtocolFeatures,
            Self::SetProtocolFeatures(_) => C::SetProtocolFeatures,
            Self::GetQueueNum => C::GetQueueNum,
            Self::SetVringEnable { .. } => C::SetVringEnable,
            Self::SendRarp(_) => C::SendRarp,
            Self::NetSetMtu(_) => C::NetSetMtu,
            Self::SetBackendReqFd(_) => C::SetBackendReqFd,
            Self::Iotlb(_) => C::IotlbMsg,
            Self::SetVringEndian { .. } => C::SetVringEndian,
            Self::GetConfig { .. } => C::GetConfig,
            Self::SetConfig { .. } => C::SetConfig,
            Self::CreateCryptoSession(_) => C::CreateCryptoSession,
            Self::CloseCryptoSession(_) => C::CloseCryptoSession,
            Self::PostcopyAdvise => C::PostcopyAdvise,
            Self::PostcopyListen => C::PostcopyListen,
            Self::PostcopyMemTable(_) | Self::PostcopyReady => C::SetMemTable,
            Self::PostcopyEnd => C::PostcopyEnd,
            Self::GetInflightFd { .. } => C::GetInflightFd,
            Self::SetInflightFd(..) => C::SetInflightFd,
            Self::GpuSetSocket(_) => C::GpuSetSocket,
            Self::ResetDevice => C::ResetDevice,
            Self::VringKick { .. } => C::VringKick,
            Self::GetMaxMemSlots => C::GetMaxMemSlots,
            Self::AddMemReg(..) => C::AddMemReg,
            Self::RemMemReg(_) => C::RemMemReg,
            Self::SetStatus(_) => C::SetStatus,
            Self::GetStatus => C::GetStatus,
            Self::GetSharedObject(_) => C::GetSharedObject,
            Self::SetDeviceStateFd(..) => C::SetDeviceStateFd,
            Self::CheckDeviceState => C::CheckDeviceState,
            Self::GetShmemConfig => C::GetShmemConfig,
        }
    }

    /// How it is answered, with or without being asked for an acknowledgement.
    pub(super) const fn answer_kind(&self, row: &MessageInfo, ack: bool) -> Option<ReplyKind> {
        match self {
            Self::PostcopyMemTable(_) => Some(ReplyKind::MemTable),
            Self::PostcopyReady => None,
            _ if row.reply.is_own() => Some(row.reply),
            _ if ack => Some(ReplyKind::Ack),
            _ => None,
        }
    }

    /// The payload and the descriptors; refused when the table does not know their lengths.
    pub(super) fn encode(self, row: &MessageInfo) -> Result<Parts<Fd>, Refusal> {
        let message = row.name;
        let (payload, fds) = match self {
            Self::SetVringKick { index, kick: notifier }
            | Self::SetVringCall { index, call: notifier }
            | Self::SetVringErr { index, err: notifier } => vring_fd(message, index, notifier)?,
            Self::SetMemTable(regions) | Self::PostcopyMemTable(regions) => {
                let (regions, fds): (Vec<_>, Vec<_>) = regions.into_iter().unzip();
                (encode_mem_table(&regions), fds)
            }
            Self::SetLogBase(log, fd) => (log.as_bytes().to_vec(), vec![fd]),
            Self::SetInflightFd(inflight, fd) => (inflight.as_bytes().to_vec(), vec![fd]),
            Self::AddMemReg(region, fd) => {
                (SingleRegion { padding: 0, region }.as_bytes().to_vec(), vec![fd])
            }
            Self::SetDeviceStateFd(direction, fd) => {
                let direction = u32::from(direction == StateDirection::Load);
                (DeviceState { direction, phase: 0 }.as_bytes().to_vec(), vec![fd])
            }
            Self::SetLogFd(fd) | Self::SetBackendReqFd(fd) | Self::GpuSetSocket(fd) => {
                (Vec::new(), vec![fd])
            }
            plain => (plain.bytes(), Vec::new()),
        };
        let size = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        if !row.payload.sizes().allows(size) {
            let value = u64::from(size);
            return Err(Refusal::Unencodable { message, what: "payload length", value });
        }
        Ok((payload, fds))
    }

    /// The payload of a request that carries no descriptor.
    fn bytes(self) -> Vec<u8> {
        match self {
            Self::SetFeatures(word) | Self::CloseCryptoSession(word) => word.as_bytes().to_vec(),
            Self::SetProtocolFeatures(features) => features.bits().as_bytes().to_vec(),
            Self::SetVringNum { index, size: num } | Self::SetVringBase { index, base: num } => {
                state(index, num)
            }
            Self::GetVringBase { index }
            | Self::GetVringBaseSkipDrain { index }
            | Self::VringKick { index } => state(index, 0),
            Self::SetVringEnable { index, enabled: flag }
            | Self::SetVringEndian { index, big_endian: flag } => state(index, u32::from(flag)),
            Self::SetVringAddr(addr) => addr.as_bytes().to_vec(),
            Self::SendRarp(mac) => [mac.as_slice(), &[0, 0]].concat(),
            Self::NetSetMtu(mtu) => u64::from(mtu).as_bytes().to_vec(),
            Self::SetStatus(status) => u64::from(status).as_bytes().to_vec(),
            Self::Iotlb(entry) => entry.as_bytes().to_vec(),
            Self::GetConfig { offset, size } => {
                // More than any message holds is refused by its length; do not allocate for it.
                let size = usize::try_from(size.min(4096)).unwrap_or(4096);
                encode_config(offset, 0, &vec![0; size])
            }
            Self::SetConfig { offset, bytes, migration } => {
                encode_config(offset, u32::from(migration), &bytes)
            }
            Self::PostcopyReady => vec![0; 8],
            Self::CreateCryptoSession(session) => session.as_bytes().to_vec(),
            Self::GetInflightFd { num_queues, queue_size } => {
                Inflight { num_queues, queue_size, ..Inflight::default() }.as_bytes().to_vec()
            }
            Self::RemMemReg(region) => SingleRegion { padding: 0, region }.as_bytes().to_vec(),
            Self::GetSharedObject(uuid) => uuid.as_bytes().to_vec(),
            _ => Vec::new(),
        }
    }
}

fn state(index: u32, num: u32) -> Vec<u8> {
    VringState { index, num }.as_bytes().to_vec()
}

fn vring_fd<Fd>(
    message: &'static str,
    index: u32,
    notifier: Notifier<Fd>,
) -> Result<Parts<Fd>, Refusal> {
    let Ok(narrow) = u8::try_from(index) else {
        let value = u64::from(index);
        return Err(Refusal::Unencodable { message, what: "ring index", value });
    };
    let fds = match notifier {
        Notifier::Fd(fd) => vec![fd],
        Notifier::Poll => Vec::new(),
    };
    Ok((VringFd::new(narrow, !fds.is_empty()).0.as_bytes().to_vec(), fds))
}
