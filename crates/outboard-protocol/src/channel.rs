//! The back-end channel: requests of the back-end, on the socket of SET_BACKEND_REQ_FD (vhost-user,
//! "Back-end message types").
//!
//! ```text
//!  device ─▶ ChannelBackend ──── ChannelRequest ────▶ ChannelFrontend ─▶ ChannelEffect + Ticket
//!    ▲ ChannelAnswer ◀┘ ◀──────── u64, descriptor ───────┘ ◀─ answer(Ticket, value)
//! ```
//! [`ChannelBackend`] is the device's end and [`ChannelFrontend`] the VMM's, both without I/O and
//! driven like the machines of the main socket; here are the requests as values and on the wire.
//! Invariant: encoding and decoding are each other's inverse, and both obey the table's lengths and
//! descriptor counts. Which requests are outstanding is the business of the two ends.

mod backend;
mod frontend;

pub use backend::{ChannelAnswer, ChannelBackend, RequestId, Sent};
pub use frontend::{ChannelEffect, ChannelFrontend, ChannelStep, MAX_OUTSTANDING};

use zerocopy::IntoBytes;

use crate::decoder::Message;
use crate::frame::Frame;
use crate::payload::{
    ExternalMap, GpuMap, IOTLB_ACCESS_FAIL, IOTLB_MISS, Iotlb, SHMEM_MAP_RW, ShmemMap, Uuid,
    VringArea, VringFd, VringState, read,
};
use crate::table::{BackendCode, FdRule, Side, info};
use crate::violation::Violation;

/// A request of the back-end to the front-end.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChannelRequest<Fd> {
    /// An IOTLB miss (kind 1) or access failure (kind 4).
    Iotlb(Iotlb),
    /// The configuration space has changed.
    ConfigChange,
    /// A host notifier area, or (without a descriptor) its end.
    HostNotifier(VringArea, Option<Fd>),
    /// A call as a message.
    VringCall(VringState),
    /// A ring broke.
    VringErr(VringState),
    /// A shared object exists now.
    SharedObjectAdd(Uuid),
    /// A shared object is gone.
    SharedObjectRemove(Uuid),
    /// A shared object is asked for.
    SharedObjectLookup(Uuid),
    /// Map a file into a shared-memory region.
    ShmemMap(ShmemMap, Fd),
    /// Take a mapping away.
    ShmemUnmap(ShmemMap),
    /// crosvm: map a GPU allocation.
    GpuMap(GpuMap, Fd),
    /// crosvm: map host memory of the same process.
    ExternalMap(ExternalMap),
}

impl<Fd> ChannelRequest<Fd> {
    /// The message this is.
    #[must_use]
    pub const fn code(&self) -> BackendCode {
        match self {
            Self::Iotlb(_) => BackendCode::IotlbMsg,
            Self::ConfigChange => BackendCode::ConfigChange,
            Self::HostNotifier(..) => BackendCode::VringHostNotifier,
            Self::VringCall(_) => BackendCode::VringCall,
            Self::VringErr(_) => BackendCode::VringErr,
            Self::SharedObjectAdd(_) => BackendCode::SharedObjectAdd,
            Self::SharedObjectRemove(_) => BackendCode::SharedObjectRemove,
            Self::SharedObjectLookup(_) => BackendCode::SharedObjectLookup,
            Self::ShmemMap(..) => BackendCode::ShmemMap,
            Self::ShmemUnmap(_) => BackendCode::ShmemUnmap,
            Self::GpuMap(..) => BackendCode::GpuMap,
            Self::ExternalMap(_) => BackendCode::ExternalMap,
        }
    }

    /// The frame of this request.
    #[must_use]
    pub fn encode(self, need_reply: bool) -> Frame<Fd> {
        let id = self.code().id();
        let (payload, fd) = match self {
            Self::Iotlb(entry) => (entry.as_bytes().to_vec(), None),
            Self::ConfigChange => (Vec::new(), None),
            Self::HostNotifier(area, fd) => (area.as_bytes().to_vec(), fd),
            Self::VringCall(state) | Self::VringErr(state) => (state.as_bytes().to_vec(), None),
            Self::SharedObjectAdd(uuid)
            | Self::SharedObjectRemove(uuid)
            | Self::SharedObjectLookup(uuid) => (uuid.as_bytes().to_vec(), None),
            Self::ShmemMap(map, fd) => (map.as_bytes().to_vec(), Some(fd)),
            Self::ShmemUnmap(map) => (map.as_bytes().to_vec(), None),
            Self::GpuMap(map, fd) => (map.as_bytes().to_vec(), Some(fd)),
            Self::ExternalMap(map) => (map.as_bytes().to_vec(), None),
        };
        Frame::request(id, need_reply, &payload, fd.into_iter().collect())
    }

    /// Whether the values can mean anything at all: both ends ask, before sending and after
    /// receiving. Ring index, region and host address are for the front-end's host to judge.
    ///
    /// # Errors
    /// A range is empty or wraps, a kind or a permission does not exist, or a descriptor is there
    /// although (or is missing unless) bit 8 says so.
    pub fn check(&self) -> Result<(), Violation> {
        let message = info(Side::BackEnd, self.code().id()).map_or("", |row| row.name);
        match self {
            Self::Iotlb(entry) => check_iotlb(message, entry),
            Self::HostNotifier(area, fd) => {
                if VringFd(area.vring).has_fd() != fd.is_some() {
                    let got = usize::from(fd.is_some());
                    return Err(Violation::FdCount { message, got });
                }
                match fd {
                    Some(_) => range(message, "file offset", area.offset, area.size),
                    None => Ok(()),
                }
            }
            Self::ShmemMap(map, _) => {
                range(message, "file offset", map.fd_offset, map.len)?;
                range(message, "region offset", map.shm_offset, map.len)?;
                flags(message, map.flags)
            }
            Self::ShmemUnmap(map) => range(message, "region offset", map.shm_offset, map.len),
            Self::GpuMap(map, _) => range(message, "region offset", map.shm_offset, map.len),
            Self::ExternalMap(map) => {
                range(message, "region offset", map.shm_offset, map.len)?;
                range(message, "host address", map.ptr, map.len)
            }
            Self::ConfigChange
            | Self::VringCall(_)
            | Self::VringErr(_)
            | Self::SharedObjectAdd(_)
            | Self::SharedObjectRemove(_)
            | Self::SharedObjectLookup(_) => Ok(()),
        }
    }

    /// Decodes a request of the back-end.
    ///
    /// # Errors
    /// The id is unknown, or length or descriptor count are not those of the table. The stream is
    /// in step all the same.
    pub fn decode(message: Message<Fd>) -> Result<Self, Violation> {
        let Message { header, payload, mut fds, misplaced } = message;
        let request = header.request;
        let (Some(row), Some(code)) = (info(Side::BackEnd, request), BackendCode::from_id(request))
        else {
            return Err(Violation::UnknownRequest { request });
        };
        if misplaced > 0 {
            return Err(Violation::FdsMisplaced { request, count: misplaced });
        }
        let size = Violation::Size { message: row.name, size: payload.len() };
        if !row.payload.sizes().allows(header.size) {
            return Err(size);
        }
        let count = Violation::FdCount { message: row.name, got: fds.len() };
        if !row.fds.may_be(fds.len()) {
            return Err(count);
        }
        let fd = fds.pop();
        if row.fds == FdRule::VringFd {
            let area: VringArea = read(&payload).ok_or(size)?;
            return match VringFd(area.vring).has_fd() == fd.is_some() {
                true => Ok(Self::HostNotifier(area, fd)),
                false => Err(count),
            };
        }
        Self::build(code, &payload, fd).ok_or(size)
    }

    fn build(code: BackendCode, payload: &[u8], fd: Option<Fd>) -> Option<Self> {
        Some(match code {
            BackendCode::IotlbMsg => Self::Iotlb(read(payload)?),
            BackendCode::ConfigChange => Self::ConfigChange,
            BackendCode::VringHostNotifier => Self::HostNotifier(read(payload)?, fd),
            BackendCode::VringCall => Self::VringCall(read(payload)?),
            BackendCode::VringErr => Self::VringErr(read(payload)?),
            BackendCode::SharedObjectAdd => Self::SharedObjectAdd(read(payload)?),
            BackendCode::SharedObjectRemove => Self::SharedObjectRemove(read(payload)?),
            BackendCode::SharedObjectLookup => Self::SharedObjectLookup(read(payload)?),
            BackendCode::ShmemMap => Self::ShmemMap(read(payload)?, fd?),
            BackendCode::ShmemUnmap => Self::ShmemUnmap(read(payload)?),
            BackendCode::GpuMap => Self::GpuMap(read(payload)?, fd?),
            BackendCode::ExternalMap => Self::ExternalMap(read(payload)?),
        })
    }
}

/// A range must have bytes and an end.
fn range(
    message: &'static str,
    what: &'static str,
    start: u64,
    size: u64,
) -> Result<(), Violation> {
    if size == 0 {
        return Err(Violation::Value { message, what: "length", value: 0 });
    }
    match start.checked_add(size) {
        Some(_) => Ok(()),
        None => Err(Violation::Wraps { message, what, start, size }),
    }
}

/// Bit 0 is all there is: a mapping with a bit that nobody knows is not half understood.
fn flags(message: &'static str, flags: u64) -> Result<(), Violation> {
    match flags & !SHMEM_MAP_RW {
        0 => Ok(()),
        value => Err(Violation::Value { message, what: "flags", value }),
    }
}

fn check_iotlb(message: &'static str, entry: &Iotlb) -> Result<(), Violation> {
    if !matches!(entry.kind, IOTLB_MISS | IOTLB_ACCESS_FAIL) {
        return Err(Violation::Value { message, what: "type", value: entry.kind.into() });
    }
    if !matches!(entry.perm, 1..=3) {
        return Err(Violation::Value { message, what: "permission", value: entry.perm.into() });
    }
    // A miss names a place, not always a length.
    match entry.size {
        0 => Ok(()),
        size => range(message, "address", entry.iova, size),
    }
}
