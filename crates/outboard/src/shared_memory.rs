//! Shared-memory regions of a device: memory of the host that the guest sees (vhost-user,
//! SHMEM_MAP and SHMEM_UNMAP; virtio 1.3 §2.10; contract §3).
//!
//! One [`SharedMemoryMapper`] per region. The channel's table knows every mapping that the
//! front-end was asked for: overlaps and unknown offsets are refused here, before anything is sent. An entry
//! goes only when its unmap was acknowledged, so a failed unmap can be tried again. The front-end
//! drops all mappings on a reset and when it leaves, and so does the table.

use std::os::fd::OwnedFd;

use outboard_protocol::BackendCode;
use outboard_protocol::channel::ChannelRequest;
use outboard_protocol::payload::{ExternalMap, GpuMap, SHMEM_MAP_RW, ShmemMap};

use crate::channel::{BackendChannel, ChannelError};
use crate::reactor::block_on;

/// Mappings are made of pages.
const PAGE: u64 = 4096;

/// A shared-memory region, as its device declares it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedMemoryRegion {
    /// Its number, as virtio's transport names it.
    pub id: u8,
    /// Bytes, a multiple of 4096.
    pub size: u64,
}

/// What can be mapped into a region.
#[derive(Debug)]
pub enum MappingSource {
    /// A range of a file or of shared memory.
    Descriptor {
        /// The file; readable, and writable for [`Access::ReadWrite`].
        fd: OwnedFd,
        /// First byte.
        offset: u64,
        /// Bytes.
        size: u64,
    },
    /// An allocation of a Vulkan driver (crosvm's GPU_MAP).
    Vulkan {
        /// The exported handle.
        fd: OwnedFd,
        /// VkExternalMemoryHandleTypeFlagBits.
        handle_type: u32,
        /// Memory type index.
        memory_index: u32,
        /// VkPhysicalDeviceIDProperties::deviceUUID.
        device: [u8; 16],
        /// VkPhysicalDeviceIDProperties::driverUUID.
        driver: [u8; 16],
        /// Bytes.
        size: u64,
    },
    /// Memory of this process, for a front-end in the same process (crosvm's EXTERNAL_MAP).
    External {
        /// Its address.
        pointer: u64,
        /// Bytes.
        size: u64,
    },
}

impl MappingSource {
    fn size(&self) -> u64 {
        match self {
            Self::Descriptor { size, .. }
            | Self::Vulkan { size, .. }
            | Self::External { size, .. } => *size,
        }
    }
}

/// What the guest may do with a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read.
    Read,
    /// Read and write.
    ReadWrite,
}

/// Why a mapping could not be made or removed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MappingError {
    /// Not whole pages, or nothing.
    #[error("mapping of {size:#x} bytes at {offset:#x} is not made of whole pages")]
    Alignment {
        /// Where.
        offset: u64,
        /// Bytes.
        size: u64,
    },
    /// Not inside the region.
    #[error("mapping of {size:#x} bytes at {offset:#x} is outside of region {id} of {region:#x}")]
    OutOfRange {
        /// The region.
        id: u8,
        /// Its size.
        region: u64,
        /// Where.
        offset: u64,
        /// Bytes.
        size: u64,
    },
    /// Something is mapped there.
    #[error("mapping at {offset:#x} overlaps the one at {other:#x}")]
    Overlap {
        /// Where.
        offset: u64,
        /// What is there.
        other: u64,
    },
    /// Nothing is mapped there.
    #[error("nothing is mapped at {0:#x}")]
    Unknown(u64),
    /// The front-end declined, or cannot be asked.
    #[error("{0}")]
    Channel(#[from] ChannelError),
}

/// Maps memory of the host into one region.
#[derive(Clone, Debug)]
pub struct SharedMemoryMapper {
    region: SharedMemoryRegion,
    /// It holds the table: what becomes of the front-end becomes of the mappings.
    channel: BackendChannel,
}

impl SharedMemoryMapper {
    /// A mapper for `region`, over `channel`.
    #[must_use]
    pub fn new(region: SharedMemoryRegion, channel: BackendChannel) -> Self {
        Self { region, channel }
    }

    fn remove(&self, offset: u64) {
        self.channel.mappings(|all| all.remove(&(self.region.id, offset)));
    }

    /// Whether there is a front-end that maps (SHMEM was negotiated, and a channel is open).
    #[must_use]
    pub fn is_available(&self) -> bool {
        self.channel.permits(BackendCode::ShmemMap)
    }

    /// Whether just this is mapped: a process that took over finds what the one before it had mapped.
    #[must_use]
    pub fn holds(&self, offset: u64, size: u64) -> bool {
        self.channel.mappings(|all| all.get(&(self.region.id, offset)) == Some(&size))
    }

    /// As [`Self::add_mapping`], for a thread that may wait: not for the session's own.
    ///
    /// # Errors
    /// As [`Self::add_mapping`].
    pub fn add_mapping_and_wait(
        &self,
        source: MappingSource,
        offset: u64,
        access: Access,
    ) -> Result<(), MappingError> {
        block_on(self.add_mapping(source, offset, access)).unwrap_or_else(|_| closed())
    }

    /// As [`Self::remove_mapping`], for a thread that may wait: not for the session's own.
    ///
    /// # Errors
    /// As [`Self::remove_mapping`].
    pub fn remove_mapping_and_wait(&self, offset: u64) -> Result<(), MappingError> {
        block_on(self.remove_mapping(offset)).unwrap_or_else(|_| closed())
    }

    /// Strikes the mapping at `offset` off without asking: for when the front-end has said that it has no such one.
    pub fn forget_mapping(&self, offset: u64) {
        self.remove(offset);
    }

    /// While the front-end owes an answer that is late, it is asked nothing: else a queue of requests would
    /// wait as often.
    fn not_overdue(&self) -> Result<(), MappingError> {
        if self.channel.is_overdue() { Err(ChannelError::Late.into()) } else { Ok(()) }
    }

    /// Maps `source` at byte `offset` of the region; resolves when the front-end has done so.
    ///
    /// # Errors
    /// The range is not whole pages, outside the region or taken; the front-end declined. When it is late
    /// ([`ChannelError::Late`]) it may have mapped or may yet: the range stays taken until it is removed.
    pub async fn add_mapping(
        &self,
        source: MappingSource,
        offset: u64,
        access: Access,
    ) -> Result<(), MappingError> {
        let size = source.size();
        self.not_overdue()?;
        self.claim(offset, size)?;
        let request = self.request(source, offset, access);
        match self.channel.ask(request).await {
            Ok(_) => Ok(()),
            Err(ChannelError::Late) => Err(ChannelError::Late.into()),
            Err(error) => {
                self.remove(offset);
                Err(error.into())
            }
        }
    }

    /// Removes the mapping at `offset`, whole.
    ///
    /// # Errors
    /// Nothing is mapped there; the front-end declined, and the mapping stands.
    pub async fn remove_mapping(&self, offset: u64) -> Result<(), MappingError> {
        let id = self.region.id;
        let size = self.channel.mappings(|all| all.get(&(id, offset)).copied());
        let length = size.ok_or(MappingError::Unknown(offset))?;
        self.not_overdue()?;
        let map = ShmemMap { shmid: id, shm_offset: offset, len: length, ..ShmemMap::default() };
        let request = ChannelRequest::ShmemUnmap(map);
        self.channel.ask(request).await?;
        self.remove(offset);
        Ok(())
    }

    /// Checks a range and enters it, so that a second one cannot take it meanwhile.
    fn claim(&self, offset: u64, size: u64) -> Result<(), MappingError> {
        if size == 0 || !offset.is_multiple_of(PAGE) || !size.is_multiple_of(PAGE) {
            return Err(MappingError::Alignment { offset, size });
        }
        let SharedMemoryRegion { id, size: region } = self.region;
        let end = offset.checked_add(size).filter(|end| *end <= region);
        let end = end.ok_or(MappingError::OutOfRange { id, region, offset, size })?;
        self.channel.mappings(|all| {
            let before = all.range((id, 0)..(id, end)).next_back();
            if let Some((&(_, other), &length)) = before
                && other + length > offset
            {
                return Err(MappingError::Overlap { offset, other });
            }
            all.insert((id, offset), size);
            Ok(())
        })
    }

    fn request(
        &self,
        source: MappingSource,
        shm_offset: u64,
        access: Access,
    ) -> ChannelRequest<OwnedFd> {
        let shmid = self.region.id;
        match source {
            MappingSource::Descriptor { fd, offset: fd_offset, size: len } => {
                let flags = if access == Access::ReadWrite { SHMEM_MAP_RW } else { 0 };
                let map =
                    ShmemMap { shmid, fd_offset, shm_offset, len, flags, ..ShmemMap::default() };
                ChannelRequest::ShmemMap(map, fd)
            }
            MappingSource::Vulkan { fd, handle_type, memory_index, device, driver, size: len } => {
                let map = GpuMap {
                    shmid,
                    shm_offset,
                    len,
                    memory_idx: memory_index,
                    handle_type,
                    device_uuid: device,
                    driver_uuid: driver,
                    ..GpuMap::default()
                };
                ChannelRequest::GpuMap(map, fd)
            }
            MappingSource::External { pointer: ptr, size: len } => {
                let map = ExternalMap { shmid, shm_offset, len, ptr, ..ExternalMap::default() };
                ChannelRequest::ExternalMap(map)
            }
        }
    }
}

/// A thread that cannot wait has no answer.
fn closed() -> Result<(), MappingError> {
    Err(ChannelError::Closed.into())
}
