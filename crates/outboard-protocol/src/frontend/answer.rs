//! The back-end's answers as values, and the checks they pass first.
//!
//! Invariant: a value of [`Answer`] has the length, the descriptors and the index its request
//! demands; what a value means (is this number of rings enough?) is the caller's to judge.

use crate::decoder::Message;
use crate::features::ProtocolFeatures;
use crate::payload::{
    ConfigHead, CryptoSession, Inflight, MemRegion, ShmemConfig, VRING_NO_FD, VringState,
    decode_inflight, decode_mem_table, read, read_u64,
};
use crate::table::{FrontendCode, MessageInfo, ReplyKind};
use crate::violation::Violation;

/// What the back-end answered to the oldest request that waited.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Answer<Fd> {
    /// An acknowledgement, or the status a message replies with: 0 is success.
    Ack {
        /// The request.
        request: FrontendCode,
        /// 0, or anything else for failure.
        value: u64,
    },
    /// The feature bits offered.
    Features(u64),
    /// The protocol features offered, as far as they are known here.
    ProtocolFeatures(ProtocolFeatures),
    /// Number of rings (DPDK: of pairs).
    QueueNum(u64),
    /// Number of memory slots.
    MaxMemSlots(u64),
    /// The virtio status byte.
    Status(u64),
    /// The log is in use. Its payload means nothing: peers put different things there.
    LogBase,
    /// The ring is stopped.
    VringBase {
        /// Ring, the one asked for.
        index: u32,
        /// Next index.
        base: u32,
    },
    /// Configuration bytes, as many as were asked for; `None`: refused.
    Config {
        /// First byte, the one asked for.
        offset: u32,
        /// The bytes.
        bytes: Option<Vec<u8>>,
    },
    /// The id of a crypto session; negative: refused.
    CryptoSession(i64),
    /// The userfaultfd of postcopy; `None`: refused.
    UserFault(Option<Fd>),
    /// Where the back-end maps the regions of the table, as their user addresses.
    PostcopyTable(Vec<MemRegion>),
    /// The in-flight region; without a descriptor (and with size 0) there is none.
    Inflight(Inflight, Option<Fd>),
    /// The shared object, if there is one.
    SharedObject(Option<Fd>),
    /// The transfer began, through the back-end's own descriptor if there is one; or the word it
    /// was refused with.
    DeviceState(Result<Option<Fd>, u64>),
    /// The shared-memory regions.
    ShmemConfig(Box<ShmemConfig>),
}

impl<Fd> Answer<Fd> {
    /// Whether the request succeeded, for answers that can say so.
    #[must_use]
    pub const fn is_success(&self) -> bool {
        match self {
            Self::Ack { value, .. } => *value == 0,
            Self::Config { bytes, .. } => bytes.is_some(),
            Self::CryptoSession(id) => *id >= 0,
            Self::UserFault(fd) | Self::SharedObject(fd) | Self::Inflight(_, fd) => fd.is_some(),
            Self::DeviceState(outcome) => outcome.is_ok(),
            _ => true,
        }
    }

    /// Checks and decodes the reply to `code`, whose request had the payload `echo`.
    pub(super) fn decode(
        code: FrontendCode,
        row: &'static MessageInfo,
        kind: ReplyKind,
        echo: &[u8],
        reply: Message<Fd>,
    ) -> Result<Self, Violation> {
        let Message { payload, mut fds, misplaced, .. } = reply;
        let count = fds.len() + misplaced;
        let shape = Violation::ReplyShape { message: row.name, size: payload.len(), fds: count };
        let most = usize::from(matches!(
            kind,
            ReplyKind::Fd | ReplyKind::MaybeFd | ReplyKind::Inflight | ReplyKind::DeviceState
        ));
        if misplaced > 0 || fds.len() > most {
            return Err(shape);
        }
        let fd = fds.pop();
        match kind {
            ReplyKind::VringState => base(row, echo, &payload, shape),
            ReplyKind::Config => config(echo, &payload, shape),
            ReplyKind::MemTable if payload.len() == echo.len() => {
                Ok(Self::PostcopyTable(decode_mem_table(&payload).ok_or(shape)?))
            }
            ReplyKind::Log if matches!(payload.len(), 0 | 8 | 16) => Ok(Self::LogBase),
            ReplyKind::Fd if payload.is_empty() => Ok(Self::UserFault(fd)),
            ReplyKind::MaybeFd if payload.is_empty() => Ok(Self::SharedObject(fd)),
            ReplyKind::Inflight => inflight(&payload, fd, shape),
            ReplyKind::CryptoSession if payload.len() == size_of::<CryptoSession>() => {
                let session = read::<CryptoSession>(&payload).ok_or(shape)?;
                Ok(Self::CryptoSession(session.session_id))
            }
            ReplyKind::ShmemConfig if payload.len() == size_of::<ShmemConfig>() => {
                Ok(Self::ShmemConfig(Box::new(read(&payload).ok_or(shape)?)))
            }
            ReplyKind::Ack
            | ReplyKind::AckWheneverAsked
            | ReplyKind::Status
            | ReplyKind::StatusAndFd
            | ReplyKind::U64
            | ReplyKind::DeviceState
                if payload.len() == 8 =>
            {
                let value = read_u64(&payload).ok_or(shape.clone())?;
                if kind == ReplyKind::DeviceState {
                    return device_state(value, fd, shape);
                }
                Ok(Self::number(code, kind, value))
            }
            _ => Err(shape),
        }
    }

    fn number(code: FrontendCode, kind: ReplyKind, value: u64) -> Self {
        match code {
            _ if kind != ReplyKind::U64 => Self::Ack { request: code, value },
            FrontendCode::GetFeatures => Self::Features(value),
            FrontendCode::GetProtocolFeatures => {
                Self::ProtocolFeatures(ProtocolFeatures::from_bits_truncate(value))
            }
            FrontendCode::GetQueueNum => Self::QueueNum(value),
            FrontendCode::GetMaxMemSlots => Self::MaxMemSlots(value),
            _ => Self::Status(value),
        }
    }
}

fn base<Fd>(
    row: &'static MessageInfo,
    echo: &[u8],
    payload: &[u8],
    shape: Violation,
) -> Result<Answer<Fd>, Violation> {
    if payload.len() != size_of::<VringState>() {
        return Err(shape);
    }
    let asked: VringState = read(echo).unwrap_or_default();
    let VringState { index, num } = read(payload).ok_or(shape)?;
    if index != asked.index {
        return Err(Violation::ReplyContents {
            message: row.name,
            what: "ring",
            expected: u64::from(asked.index),
            got: u64::from(index),
        });
    }
    Ok(Answer::VringBase { index, base: num })
}

/// A reply of the request's length is good. An empty one, and a head without bytes, say no.
/// The head is not compared: some back-ends change its fields.
fn config<Fd>(echo: &[u8], payload: &[u8], shape: Violation) -> Result<Answer<Fd>, Violation> {
    let offset = read::<ConfigHead>(echo).unwrap_or_default().offset;
    let head = size_of::<ConfigHead>();
    match payload.get(head..) {
        Some(bytes) if payload.len() == echo.len() && !bytes.is_empty() => {
            Ok(Answer::Config { offset, bytes: Some(bytes.to_vec()) })
        }
        _ if payload.is_empty() || payload.len() == head => {
            Ok(Answer::Config { offset, bytes: None })
        }
        _ => Err(shape),
    }
}

fn inflight<Fd>(payload: &[u8], fd: Option<Fd>, shape: Violation) -> Result<Answer<Fd>, Violation> {
    if !matches!(payload.len(), 20 | 24) {
        return Err(shape);
    }
    let inflight = decode_inflight(payload).ok_or(shape.clone())?;
    if (inflight.mmap_size == 0) != fd.is_none() {
        return Err(shape);
    }
    Ok(Answer::Inflight(inflight, fd))
}

/// Bits 0–7 are the error, bit 8 says that no descriptor comes; never an error with a descriptor.
fn device_state<Fd>(value: u64, fd: Option<Fd>, shape: Violation) -> Result<Answer<Fd>, Violation> {
    let error = value & 0xff != 0;
    let none = value & VRING_NO_FD != 0;
    match (error, fd) {
        (true, None) => Ok(Answer::DeviceState(Err(value))),
        (false, None) if none => Ok(Answer::DeviceState(Ok(None))),
        (false, Some(fd)) if !none => Ok(Answer::DeviceState(Ok(Some(fd)))),
        _ => Err(shape),
    }
}
