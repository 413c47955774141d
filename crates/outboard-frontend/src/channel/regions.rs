//! The shared-memory regions of one device and what the back-end has mapped into them: SHMEM_MAP and
//! SHMEM_UNMAP (vhost-user, "Back-end message types").
//!
//! Invariants: the back-end is not trusted: a mapping lies page-aligned and whole inside its region and
//! overlaps no other; only a whole mapping is taken away; what is mapped for reading cannot be written,
//! and bytes are copied, never borrowed, since the back-end changes them at any time. A mapping may end behind its file,
//! which may grow into it (a file system maps so); what lies behind the file's last page is not there.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outboard_memory::{MapError, Window, WindowError, page_size};
use outboard_protocol::payload::{ExternalMap, GpuMap, SHMEM_MAP_RW, ShmemConfig, ShmemMap};

/// The handle type of [`GpuMap`] that is a file one can map without a GPU driver: shared memory.
pub const GPU_HANDLE_SHM: u32 = 4;

/// Why a mapping, or an access through one, is not possible.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegionError {
    /// The list of regions contradicts itself.
    #[error("the device says {count} shared-memory regions and lists {listed}")]
    Count {
        /// Regions announced.
        count: u32,
        /// Regions with a size.
        listed: usize,
    },
    /// No such region.
    #[error("the device has no shared-memory region {region}")]
    Unknown {
        /// Region id.
        region: u8,
    },
    /// An address or a length in the middle of a page.
    #[error("{what} {value:#x} is no multiple of the page size {page:#x}")]
    Unaligned {
        /// Which number.
        what: &'static str,
        /// The number.
        value: u64,
        /// Bytes of a page.
        page: u64,
    },
    /// Past the end of the region.
    #[error("{len:#x} bytes at {offset:#x} are outside region {region} of {size:#x} bytes")]
    Outside {
        /// Region id.
        region: u8,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Bytes in the region.
        size: u64,
    },
    /// Something is mapped there.
    #[error("{len:#x} bytes at {offset:#x} of region {region} overlap the mapping at {other:#x}")]
    Overlap {
        /// Region id.
        region: u8,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// First byte of the mapping that is there.
        other: u64,
    },
    /// Nothing is mapped there, or not exactly this.
    #[error("region {region} has no mapping of {len:#x} bytes at {offset:#x}")]
    NotMapped {
        /// Region id.
        region: u8,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The host does not map it.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The access failed inside a mapping.
    #[error(transparent)]
    Window(#[from] WindowError),
    /// A GPU allocation that needs a driver.
    #[error("a GPU allocation of handle type {handle_type} cannot be mapped here")]
    GpuHandle {
        /// The type.
        handle_type: u32,
    },
    /// Host addresses of another process mean nothing.
    #[error("host address {ptr:#x} belongs to another process")]
    Foreign {
        /// The address.
        ptr: u64,
    },
    /// Host memory that is not there (any more), or is to be written.
    #[error("host address {ptr:#x} cannot be used")]
    Host {
        /// The address.
        ptr: u64,
    },
}

/// The regions of one device. Cloning it makes another handle to the same regions.
#[derive(Clone, Debug, Default)]
pub struct SharedRegions(Arc<Mutex<BTreeMap<u8, Region>>>);

#[derive(Debug)]
struct Region {
    size: u64,
    /// By first byte.
    mappings: BTreeMap<u64, Mapping>,
}

/// What is behind a part of a region.
#[derive(Debug)]
enum Mapping {
    File {
        window: Window,
        file: OwnedFd,
        /// Where the window begins in the file.
        at: u64,
    },
    /// Memory of this very process (EXTERNAL_MAP).
    Own { ptr: u64, size: u64 },
}

/// One mapping as a caller sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// First byte in the region.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Whether it may be written.
    pub writable: bool,
}

impl SharedRegions {
    /// The regions that the device has, with nothing mapped.
    ///
    /// # Errors
    /// The list contradicts itself, or a size is no multiple of the page size.
    pub fn new(config: &ShmemConfig) -> Result<Self, RegionError> {
        let mut regions = BTreeMap::new();
        for (id, &size) in (0..=u8::MAX).zip(&config.sizes) {
            if size != 0 {
                aligned("region size", size)?;
                regions.insert(id, Region { size, mappings: BTreeMap::new() });
            }
        }
        if u32::try_from(regions.len()) != Ok(config.count) {
            return Err(RegionError::Count { count: config.count, listed: regions.len() });
        }
        Ok(Self(Arc::new(Mutex::new(regions))))
    }

    /// Ids and sizes (in bytes) of the regions.
    #[must_use]
    pub fn sizes(&self) -> Vec<(u8, u64)> {
        self.lock().iter().map(|(id, region)| (*id, region.size)).collect()
    }

    /// What is mapped into a region, in order.
    #[must_use]
    pub fn mappings(&self, region: u8) -> Vec<Mapped> {
        let regions = self.lock();
        let Some(region) = regions.get(&region) else { return Vec::new() };
        let seen = |(&offset, mapping): (&u64, &Mapping)| Mapped {
            offset,
            len: mapping.size(),
            writable: mapping.is_writable(),
        };
        region.mappings.iter().map(seen).collect()
    }

    /// Carries out SHMEM_MAP.
    ///
    /// # Errors
    /// The range is not free, or the file cannot be mapped like that; nothing has changed.
    pub fn map(&self, request: &ShmemMap, file: OwnedFd) -> Result<(), RegionError> {
        aligned("file offset", request.fd_offset)?;
        self.insert(request.shmid, request.shm_offset, request.len, || {
            let writable = request.flags & SHMEM_MAP_RW != 0;
            Mapping::file(file, request.fd_offset, request.len, writable)
        })
    }

    /// Carries out crosvm's GPU_MAP as far as that is possible without a GPU driver: allocations that are
    /// shared memory ([`GPU_HANDLE_SHM`]).
    ///
    /// # Errors
    /// As [`Self::map`], or the allocation is of another type.
    pub fn map_gpu(&self, request: &GpuMap, file: OwnedFd) -> Result<(), RegionError> {
        let handle_type = request.handle_type;
        if handle_type != GPU_HANDLE_SHM {
            return Err(RegionError::GpuHandle { handle_type });
        }
        self.insert(request.shmid, request.shm_offset, request.len, || {
            Mapping::file(file, 0, request.len, true)
        })
    }

    /// Carries out crosvm's EXTERNAL_MAP for a back-end inside this process. The bytes can be read, through
    /// the kernel, so that an address which means nothing is an error and no fault; they cannot be written.
    ///
    /// # Errors
    /// The range is not free, or there is no memory at the address; nothing has changed.
    pub fn map_own(&self, request: &ExternalMap) -> Result<(), RegionError> {
        let &ExternalMap { ptr, len: size, .. } = request;
        self.insert(request.shmid, request.shm_offset, size, || {
            read_own(ptr, &mut [0])?;
            read_own(ptr.saturating_add(size - 1), &mut [0])?;
            Ok(Mapping::Own { ptr, size })
        })
    }

    /// Carries out SHMEM_UNMAP: takes one whole mapping away.
    ///
    /// # Errors
    /// Nothing is mapped at exactly this range; nothing has changed.
    pub fn unmap(&self, request: &ShmemMap) -> Result<(), RegionError> {
        let &ShmemMap { shmid, shm_offset: offset, len, .. } = request;
        let mut regions = self.lock();
        let region = regions.get_mut(&shmid).ok_or(RegionError::Unknown { region: shmid })?;
        if region.mappings.get(&offset).is_none_or(|mapping| mapping.size() != len) {
            return Err(RegionError::NotMapped { region: shmid, offset, len });
        }
        region.mappings.remove(&offset);
        Ok(())
    }

    /// Takes every mapping away, as a reset or the end of the channel does.
    pub fn clear(&self) {
        for region in self.lock().values_mut() {
            region.mappings.clear();
        }
    }

    /// Copies bytes out of a region, through as many adjacent mappings as they lie in.
    ///
    /// # Errors
    /// Not all of the range is mapped, or a file behind it was cut short.
    pub fn read(&self, region: u8, offset: u64, to: &mut [u8]) -> Result<(), RegionError> {
        let regions = self.lock();
        let mut rest = to;
        let mut offset = offset;
        while !rest.is_empty() {
            let (mapping, at, part) = find(&regions, region, offset, rest.len())?;
            let (now, later) = rest.split_at_mut(part);
            match mapping {
                Mapping::File { window, .. } => window.read(at, now)?,
                Mapping::Own { ptr, .. } => read_own(ptr.saturating_add(at), now)?,
            }
            (rest, offset) = (later, offset.saturating_add(crate::memory::wide(part)));
        }
        Ok(())
    }

    /// Copies bytes into a region.
    ///
    /// # Errors
    /// Not all of the range is mapped for writing, or a file behind it was cut short. What lies before the
    /// place of the error has been written.
    pub fn write(&self, region: u8, offset: u64, from: &[u8]) -> Result<(), RegionError> {
        let regions = self.lock();
        let mut rest = from;
        let mut offset = offset;
        while !rest.is_empty() {
            let (mapping, at, part) = find(&regions, region, offset, rest.len())?;
            let (now, later) = rest.split_at(part);
            match mapping {
                Mapping::File { window, .. } => window.write(at, now)?,
                Mapping::Own { ptr, .. } => return Err(RegionError::Host { ptr: *ptr }),
            }
            (rest, offset) = (later, offset.saturating_add(crate::memory::wide(part)));
        }
        Ok(())
    }

    fn insert(
        &self,
        id: u8,
        offset: u64,
        len: u64,
        make: impl FnOnce() -> Result<Mapping, RegionError>,
    ) -> Result<(), RegionError> {
        let mut regions = self.lock();
        let region = regions.get_mut(&id).ok_or(RegionError::Unknown { region: id })?;
        aligned("region offset", offset)?;
        aligned("length", len)?;
        let size = region.size;
        let outside = RegionError::Outside { region: id, offset, len, size };
        let end = offset.checked_add(len).filter(|end| *end <= size && len > 0).ok_or(outside)?;
        // The only one that can reach in is the last one that begins before the end.
        if let Some((&other, before)) = region.mappings.range(..end).next_back()
            && other.saturating_add(before.size()) > offset
        {
            return Err(RegionError::Overlap { region: id, offset, len, other });
        }
        region.mappings.insert(offset, make()?);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u8, Region>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Mapping {
    fn file(file: OwnedFd, at: u64, size: u64, writable: bool) -> Result<Self, RegionError> {
        let errno = |error: std::io::Error| error.raw_os_error().unwrap_or_default();
        let failed = |error| MapError::Host { call: "dup", errno: errno(error) };
        let other = file.try_clone().map_err(failed)?;
        Ok(Self::File { window: Window::map_beyond(other, at, size, writable)?, file, at })
    }

    /// Bytes of it that have a file behind them, to the end of the page in which that ends.
    fn present(&self) -> u64 {
        match self {
            Self::File { window, file, at } => {
                let length = rustix::fs::fstat(file).map_or(0, |stat| stat.st_size);
                let length = u64::try_from(length).unwrap_or(0).next_multiple_of(page_size());
                length.saturating_sub(*at).min(window.size())
            }
            Self::Own { size, .. } => *size,
        }
    }

    const fn size(&self) -> u64 {
        match self {
            Self::File { window, .. } => window.size(),
            Self::Own { size, .. } => *size,
        }
    }

    const fn is_writable(&self) -> bool {
        matches!(self, Self::File { window, .. } if window.is_writable())
    }
}

/// The mapping that `offset` lies in, the place in it, and how many of `len` bytes it has from there.
fn find(
    regions: &BTreeMap<u8, Region>,
    id: u8,
    offset: u64,
    len: usize,
) -> Result<(&Mapping, u64, usize), RegionError> {
    let region = regions.get(&id).ok_or(RegionError::Unknown { region: id })?;
    let wanted = crate::memory::wide(len);
    let hole = RegionError::NotMapped { region: id, offset, len: wanted };
    let (start, mapping) = region.mappings.range(..=offset).next_back().ok_or(hole.clone())?;
    let at = offset - start;
    let left = mapping.present().checked_sub(at).filter(|left| *left > 0).ok_or(hole)?;
    Ok((mapping, at, usize::try_from(left).map_or(len, |left| left.min(len))))
}

fn aligned(what: &'static str, value: u64) -> Result<(), RegionError> {
    let page = page_size();
    if value.is_multiple_of(page) {
        return Ok(());
    }
    Err(RegionError::Unaligned { what, value, page })
}

/// Reads memory of this process by a number.
fn read_own(ptr: u64, to: &mut [u8]) -> Result<(), RegionError> {
    let unusable = |_| RegionError::Host { ptr };
    File::open("/proc/self/mem").map_err(unusable)?.read_exact_at(to, ptr).map_err(unusable)
}
