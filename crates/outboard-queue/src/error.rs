//! The rules of a ring that the other side can break, and what a buffer can lack.

use outboard_memory::AccessError;

/// A broken rule of a ring. From [`DeviceQueue::new`](crate::DeviceQueue::new) it says that the ring cannot start;
/// later it comes once and the ring is retired. Where a packed chain is named before its buffer id is known, its head
/// is the index of its first descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// A ring has 1 to 32,768 descriptors, a split one a power of two.
    #[error("ring size {size} is not from 1 to 32768, or a split ring's and no power of two")]
    Size {
        /// Descriptors asked for.
        size: u16,
    },
    /// A split ring's base is an index of 16 bits.
    #[error("base {base:#x} of a split ring has more than 16 bits")]
    Base {
        /// What was asked for.
        base: u32,
    },
    /// A packed ring's base has an index of the ring in each half, the used one not behind by more than the ring.
    #[error("base {base:#x} is none of a packed ring of {size}")]
    PackedBase {
        /// What was asked for.
        base: u32,
        /// Descriptors in the ring.
        size: u16,
    },
    /// A part of the ring is not in guest memory, not in one region, or not aligned.
    #[error("{part}: {source}")]
    Placement {
        /// `descriptor table`, `available ring`, `used ring`; packed: `descriptor ring`, `driver event structure` or
        /// `device event structure`.
        part: &'static str,
        /// What is wrong.
        source: AccessError,
    },
    /// More is available than the ring can hold.
    #[error("available index {avail} is {} ahead of {next} in a ring of {size}", avail.wrapping_sub(*next))]
    AvailIndex {
        /// The index the driver wrote.
        avail: u16,
        /// The next one to take.
        next: u16,
        /// Descriptors in the ring.
        size: u16,
    },
    /// A head that is no descriptor of the ring; packed: a buffer id that is none.
    #[error("available head {head} in a ring of {size}")]
    Head {
        /// The head.
        head: u16,
        /// Descriptors in the ring.
        size: u16,
    },
    /// A head (packed: a buffer id) offered again before it was used.
    #[error("head {head} is available again while in flight")]
    HeadInFlight {
        /// The head.
        head: u16,
    },
    /// A descriptor leads to one that is not in its table.
    #[error("next descriptor {index} is outside the table")]
    Next {
        /// Where it leads.
        index: u16,
    },
    /// A chain longer than the ring, which may be a loop; packed: longer than the part of it that the driver has.
    #[error("chain of head {head} is longer than {size} descriptors")]
    ChainLength {
        /// The head.
        head: u16,
        /// Descriptors allowed.
        size: u16,
    },
    /// A packed chain that leads to a descriptor which is not available.
    #[error("chain at {head} leads to descriptor {index}, which is not available")]
    NotAvailable {
        /// Its first descriptor.
        head: u16,
        /// The descriptor.
        index: u16,
    },
    /// A chain of more than 2³² bytes.
    #[error("chain of head {head} has {bytes:#x} bytes, more than 2^32")]
    ChainBytes {
        /// The head.
        head: u16,
        /// Bytes.
        bytes: u64,
    },
    /// Chains in flight that fall into more pieces than any driver makes.
    #[error("chains in flight fall into more than {limit} pieces")]
    Pieces {
        /// The most that is accepted.
        limit: usize,
    },
    /// A readable descriptor behind a writable one.
    #[error("readable descriptor {index} behind a writable one in the chain of head {head}")]
    Order {
        /// The head.
        head: u16,
        /// The descriptor.
        index: u16,
    },
    /// An indirect table without `VIRTIO_RING_F_INDIRECT_DESC`.
    #[error("indirect descriptor {index} without the feature")]
    IndirectNotNegotiated {
        /// The descriptor.
        index: u16,
    },
    /// An indirect table inside an indirect table.
    #[error("indirect descriptor {index} inside an indirect table")]
    IndirectNested {
        /// The descriptor in the inner table.
        index: u16,
    },
    /// INDIRECT and NEXT in one descriptor.
    #[error("indirect descriptor {index} has a next descriptor")]
    IndirectNext {
        /// The descriptor.
        index: u16,
    },
    /// An indirect table that is empty, no whole number of descriptors, or longer than the ring.
    #[error("indirect table of {len} bytes in a ring of {size}")]
    IndirectLength {
        /// Bytes.
        len: u32,
        /// Descriptors in the ring.
        size: u16,
    },
    /// A buffer or an indirect table that is not in guest memory.
    #[error("chain of head {head}: {source}")]
    Buffer {
        /// The head.
        head: u16,
        /// What is wrong.
        source: AccessError,
    },
    /// A buffer or an indirect table for which the IOTLB has no entry ([`AccessError::Miss`]), or none that permits the
    /// access ([`AccessError::Denied`]). No rule is broken yet: the chain was not taken and the ring goes on, in a
    /// generation of guest memory that has the entry. Until then it is said again by every look at the ring.
    #[error("chain of head {head}: {source}")]
    Untranslated {
        /// The head.
        head: u16,
        /// What is wanted.
        source: AccessError,
    },
    /// An in-flight region that no device leaves behind, or one of another version or for other rings.
    #[error("in-flight region with {field} {value}")]
    Inflight {
        /// What is wrong.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The file behind guest memory was cut short and an access met the hole.
    #[error("a file of guest memory was cut short")]
    MemoryLost,
    /// The device used more than was available (driver side).
    #[error("used index {used} is {} ahead of {next} with {in_flight} in flight", used.wrapping_sub(*next))]
    UsedIndex {
        /// The index the device wrote.
        used: u16,
        /// The next one to take.
        next: u16,
        /// Chains the device holds.
        in_flight: u16,
    },
    /// The device used a chain that it was not given (driver side).
    #[error("used head {id} is not in flight")]
    UsedHead {
        /// What the device wrote.
        id: u32,
    },
}

/// A request has fewer bytes than a read or write needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{needed} bytes needed, {left} left in the request")]
pub struct ShortBuffer {
    /// Bytes asked for.
    pub needed: u64,
    /// Bytes there.
    pub left: u64,
}

/// The ring (or the indirect table) has no room for a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{needed} descriptors needed, {free} free")]
pub struct QueueFull {
    /// Descriptors the chain needs.
    pub needed: usize,
    /// Descriptors there are.
    pub free: usize,
}
