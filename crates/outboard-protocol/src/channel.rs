//! Requests of the back-end, as values and on the wire (vhost-user, "Back-end message types").
//!
//! Invariant: encoding and decoding are each other's inverse, and both obey the table's lengths and
//! descriptor counts. Which requests are outstanding is the business of the two ends.

use zerocopy::IntoBytes;

use crate::decoder::Message;
use crate::frame::Frame;
use crate::payload::{
    ExternalMap, GpuMap, Iotlb, ShmemMap, Uuid, VringArea, VringFd, VringState, read,
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
