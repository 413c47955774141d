//! The area of one ring in an in-flight region, of either layout (vhost-user, "Inflight I/O tracking"). What is noted
//! there, and how it is taken up: `split/inflight.rs`, `packed/inflight.rs`.
//!
//! Invariant: areas lie where libvhost-user and DPDK have them, so that another implementation finds what ours left.

use std::sync::Arc;

use outboard_memory::{SharedArea, Window};

/// The area of one ring in an in-flight region.
#[derive(Clone, Debug)]
pub struct InflightArea {
    pub(crate) shared: SharedArea,
    pub(crate) entries: u16,
    pub(crate) packed: bool,
}

impl InflightArea {
    /// Bytes of the area of a split ring of `entries` descriptors.
    #[must_use]
    pub const fn size(entries: u16) -> u64 {
        (16 * entries as u64 + 16).next_multiple_of(64)
    }

    /// Bytes of the area of a packed ring of `entries` descriptors.
    #[must_use]
    pub const fn packed_size(entries: u16) -> u64 {
        (32 * entries as u64 + 29).next_multiple_of(64)
    }

    /// The area of a split ring that begins `offset` bytes into a region made for rings of `entries` descriptors. `None`
    /// when it does not lie inside, or is not aligned to 8.
    #[must_use]
    pub fn new(region: &Arc<Window>, offset: u64, entries: u16) -> Option<Self> {
        let shared = SharedArea::new(region, offset, Self::size(entries))?;
        Some(Self { shared, entries, packed: false })
    }

    /// The same of a packed ring.
    #[must_use]
    pub fn packed(region: &Arc<Window>, offset: u64, entries: u16) -> Option<Self> {
        let shared = SharedArea::new(region, offset, Self::packed_size(entries))?;
        Some(Self { shared, entries, packed: true })
    }

    /// Whether the file was cut short: what was noted is lost.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.shared.is_poisoned()
    }
}
