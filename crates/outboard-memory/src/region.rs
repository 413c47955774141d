//! One region of guest memory: a part of a file, at a guest-physical address and at an address of the front-end.
//!
//! Checked before anything is mapped: that the descriptor is a regular file, that it is long enough (a mapping past
//! the end of a file is a SIGBUS in waiting) and that no sum wraps.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, MemfdFlags, fstat, fstatfs, ftruncate, memfd_create};

use crate::error::MapError;
use crate::mapping::{Mapping, rounded};
use crate::num::index;
use crate::sigbus::install_sigbus_guard;

/// Where a region lies. All in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// Guest-physical address of the first byte.
    pub guest_addr: u64,
    /// Address of the first byte in the front-end's process.
    pub user_addr: u64,
    /// Length.
    pub size: u64,
    /// Offset of the first byte in the file.
    pub offset: u64,
}

/// How regions are mapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MapOptions {
    /// Child processes do not get the mapping (`MADV_DONTFORK`).
    pub dont_fork: bool,
    /// The descriptor is kept, for another process to map the same ([`Region::file`]).
    pub keep_file: bool,
}

/// A mapped region. The mapping goes with the last value that refers to it.
pub struct Region {
    spec: RegionSpec,
    mapping: Mapping,
    /// From the start of the mapping to the first byte of the region.
    delta: usize,
    file: Option<OwnedFd>,
}

impl Region {
    /// Maps a region and, unless told otherwise, closes the descriptor. The offset may be any number: the mapping starts at the page it is in
    /// (a huge page for hugetlbfs), the region exactly at it.
    ///
    /// # Errors
    /// Empty, wrapping, no regular file, file too short, or a call that the system refused. Nothing stays mapped.
    pub fn map(spec: RegionSpec, file: OwnedFd, options: MapOptions) -> Result<Self, MapError> {
        guard()?;
        check_ranges(&spec)?;
        check_file(spec.offset, spec.size, &file)?;
        let page = page_size(&file)?;
        let Some((start, len, delta)) = rounded(spec.offset, spec.size, page) else {
            return Err(MapError::Wraps {
                what: "file offset",
                start: spec.offset,
                size: spec.size,
            });
        };
        let mapping = Mapping::new(file.as_fd(), start, len, page, true, options.dont_fork)?;
        let kept = options.keep_file.then_some(file);
        Ok(Self { spec, mapping, delta: index(delta), file: kept })
    }

    /// Memory of our own to share with a back-end: a sealed-length memfd, mapped, and its descriptor to send. The
    /// user address is the address of the mapping in this process, the offset 0.
    ///
    /// # Errors
    /// As for [`Region::map`].
    pub fn memfd(guest_addr: u64, size: u64) -> Result<(Self, OwnedFd), MapError> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file =
            memfd_create("outboard-guest", flags).map_err(|e| MapError::host("memfd_create", e))?;
        ftruncate(&file, size).map_err(|e| MapError::host("ftruncate", e))?;
        let other = file.try_clone().map_err(|e| MapError::Host {
            call: "dup",
            errno: e.raw_os_error().unwrap_or_default(),
        })?;
        let spec = RegionSpec { guest_addr, user_addr: 0, size, offset: 0 };
        let mut region = Self::map(spec, other, MapOptions::default())?;
        region.spec.user_addr = crate::num::wide(region.host().addr());
        Ok((region, file))
    }

    /// Where it lies.
    pub fn spec(&self) -> &RegionSpec {
        &self.spec
    }

    /// The file, when it was kept.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    /// The whole mapping, which begins at a page: address and bytes.
    pub(crate) fn mapped(&self) -> (usize, usize) {
        (self.mapping.base().addr(), self.mapping.len())
    }

    /// No huge pages: what comes page by page is mapped page by page.
    pub(crate) fn small_pages(&self) -> Result<(), MapError> {
        self.mapping.small_pages()
    }

    /// As if an access had met a hole.
    pub(crate) fn poison(&self) {
        self.mapping.poison();
    }

    /// Whether an access met a hole in the file.
    pub fn is_poisoned(&self) -> bool {
        self.mapping.is_poisoned()
    }

    /// The first byte, in this process. A number to compare or to hand to the kernel: the guest may write at any
    /// time, so no reference to it may be made.
    pub fn host(&self) -> *mut u8 {
        self.mapping.base().wrapping_add(self.delta)
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RegionSpec { guest_addr, user_addr, size, offset } = self.spec;
        write!(
            f,
            "Region {{ guest {guest_addr:#x}, user {user_addr:#x}, size {size:#x}, offset {offset:#x} }}"
        )
    }
}

/// No mapping is made without the guard.
pub(crate) fn guard() -> Result<(), MapError> {
    install_sigbus_guard().map_err(|e| MapError::Host {
        call: "sigaction",
        errno: e.raw_os_error().unwrap_or_default(),
    })
}

fn check_ranges(spec: &RegionSpec) -> Result<(), MapError> {
    let &RegionSpec { guest_addr, user_addr, size, offset } = spec;
    if size == 0 {
        return Err(MapError::Empty { guest_addr });
    }
    for (what, start, limit) in [
        ("guest address", guest_addr, u64::MAX),
        ("user address", user_addr, u64::MAX),
        ("file offset", offset, i64::MAX.unsigned_abs()),
    ] {
        if start.checked_add(size).is_none_or(|end| end > limit) {
            return Err(MapError::Wraps { what, start, size });
        }
    }
    Ok(())
}

/// Whether a descriptor is a file that holds this range; `offset + size` does not wrap.
pub(crate) fn check_file(offset: u64, size: u64, file: &OwnedFd) -> Result<(), MapError> {
    let stat = fstat(file).map_err(|e| MapError::host("fstat", e))?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => None,
        FileType::Directory => Some("a directory"),
        FileType::Fifo => Some("a pipe"),
        FileType::Socket => Some("a socket"),
        FileType::CharacterDevice => Some("a character device"),
        FileType::BlockDevice => Some("a block device"),
        FileType::Symlink => Some("a symbolic link"),
        _ => Some("something without a file type"),
    };
    if let Some(kind) = kind {
        return Err(MapError::NotAFile { kind });
    }
    let have = u64::try_from(stat.st_size).unwrap_or(0);
    let needed = offset.saturating_add(size);
    if have < needed {
        return Err(MapError::FileTooShort { size: have, needed });
    }
    Ok(())
}

/// The unit a mapping of this file is made of.
pub(crate) fn page_size(file: &OwnedFd) -> Result<u64, MapError> {
    let base = crate::mapping::page_size();
    let stat = fstatfs(file).map_err(|e| MapError::host("fstatfs", e))?;
    if stat.f_type != libc::HUGETLBFS_MAGIC {
        return Ok(base);
    }
    Ok(u64::try_from(stat.f_bsize)
        .ok()
        .filter(|page| page.is_power_of_two())
        .map_or(base, |page| page.max(base)))
}
