//! What can be wrong with a region, with a table of regions, and with an address.

use std::io;

use crate::iotlb::Permission;

/// Why a region could not be mapped. Nothing stays mapped and the descriptor is closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// The region holds no byte.
    #[error("region at guest address {guest_addr:#x} has size 0")]
    Empty {
        /// Guest-physical address of the region.
        guest_addr: u64,
    },
    /// A window without bytes.
    #[error("mapping has no bytes")]
    NoBytes,
    /// Start plus size does not fit 64 bits (or, for the file, 63).
    #[error("region {what} {start:#x} plus size {size:#x} wraps")]
    Wraps {
        /// Which of the three addresses: `guest address`, `user address` or `file offset`.
        what: &'static str,
        /// Where the range starts.
        start: u64,
        /// Bytes in the range.
        size: u64,
    },
    /// Only regular files (memfd, tmpfs, hugetlbfs, disk files) are mapped: their length can be checked.
    #[error("region descriptor is no regular file but {kind}")]
    NotAFile {
        /// What it is, in words.
        kind: &'static str,
    },
    /// The file ends before the region does.
    #[error("region ends at file offset {needed:#x}, the file at {size:#x}")]
    FileTooShort {
        /// Length of the file in bytes.
        size: u64,
        /// Length it must have.
        needed: u64,
    },
    /// The system refused a call.
    #[error("{call} of a guest memory region: {}", io::Error::from_raw_os_error(*errno))]
    Host {
        /// The call.
        call: &'static str,
        /// The error number.
        errno: i32,
    },
}

impl MapError {
    pub(crate) fn host(call: &'static str, errno: rustix::io::Errno) -> Self {
        Self::Host { call, errno: errno.raw_os_error() }
    }
}

/// Why regions do not form one guest memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// Two regions share addresses.
    #[error("regions at {first:#x} and {second:#x} overlap in {space} space")]
    Overlap {
        /// `guest` or `user`.
        space: &'static str,
        /// Start of the lower region.
        first: u64,
        /// Start of the region that begins before the lower one ends.
        second: u64,
    },
    /// No region has this guest address, user address and size.
    #[error(
        "no region at guest address {guest_addr:#x} and user address {user_addr:#x} of size {size:#x}"
    )]
    Unknown {
        /// Guest-physical address asked for.
        guest_addr: u64,
        /// Address in the front-end asked for.
        user_addr: u64,
        /// Bytes asked for.
        size: u64,
    },
}

/// Why a guest range cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AccessError {
    /// Part of the range, or all of it, is in no region (or, for cells, not in one region), or the range wraps.
    #[error("guest range {guest:#x} + {len:#x} is not in guest memory")]
    Outside {
        /// Guest-physical start.
        guest: u64,
        /// Bytes.
        len: u64,
    },
    /// The bytes are there, at an address of this process that the access cannot use.
    #[error("guest address {guest:#x} is not aligned to {align}")]
    Misaligned {
        /// Guest-physical address.
        guest: u64,
        /// Alignment the access needs, in bytes.
        align: u64,
    },
    /// An element or cell outside the range that was resolved.
    #[error("offset {offset:#x} + {size:#x} is outside cells of {len:#x} bytes")]
    OutsideCells {
        /// First byte, from the start of the cells.
        offset: u64,
        /// Bytes.
        size: u64,
        /// Bytes in the cells.
        len: u64,
    },
    /// A split ring has a power of two of elements.
    #[error("{count} ring elements are no power of two")]
    NotAPowerOfTwo {
        /// Elements asked for.
        count: u16,
    },
    /// The IOTLB has no entry for this address: the front-end can be asked for one.
    #[error("no entry for I/O address {iova:#x} (+ {len:#x}, to {access})")]
    Miss {
        /// The first I/O address without an entry.
        iova: u64,
        /// Bytes of the access from there on.
        len: u64,
        /// What was wanted.
        access: Permission,
    },
    /// The IOTLB's entry for this address does not permit the access.
    #[error("I/O address {iova:#x} (+ {len:#x}) is not there to {access}")]
    Denied {
        /// The first I/O address that does not permit it.
        iova: u64,
        /// Bytes of the access from there on.
        len: u64,
        /// What was wanted.
        access: Permission,
    },
    /// The pages of a ring lie behind an IOMMU next to each other, but not in the memory below.
    #[error("I/O range {iova:#x} + {len:#x} is in pieces")]
    Scattered {
        /// Start.
        iova: u64,
        /// Bytes.
        len: u64,
    },
    /// A chain fell apart into more pieces than any legal chain has.
    #[error("more than {limit} segments in one list")]
    TooManySegments {
        /// The most that is accepted.
        limit: usize,
    },
    /// The host has no memory for the list of a chain's pieces.
    #[error("no memory for the list of segments")]
    NoMemory,
}

/// Why bytes of a window cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WindowError {
    /// The range does not lie inside.
    #[error("{len:#x} bytes at {at:#x} are outside a window of {size:#x} bytes")]
    Outside {
        /// First byte, from the start of the window.
        at: u64,
        /// Bytes.
        len: u64,
        /// Bytes in the window.
        size: u64,
    },
    /// The window was mapped for reading.
    #[error("the window is read-only")]
    ReadOnly,
    /// The file was cut short; what was read is zeros, what was written is lost.
    #[error("the file under the window was cut short")]
    Poisoned,
}

/// Why an entry of the IOTLB was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IotlbError {
    /// It holds no byte, or its end does not fit 64 bits.
    #[error("I/O range {iova:#x} + {size:#x} is empty or wraps")]
    Range {
        /// Start.
        iova: u64,
        /// Bytes.
        size: u64,
    },
    /// The memory it leads to is not in one region.
    #[error("user range {user:#x} + {size:#x} is in no region of guest memory")]
    Outside {
        /// Start, in front-end addresses.
        user: u64,
        /// Bytes.
        size: u64,
    },
}
