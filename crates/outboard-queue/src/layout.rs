//! Where a ring lies and what was negotiated for it.

/// A ring as the front-end described it. Addresses are guest-physical, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLayout {
    /// Descriptors.
    pub size: u16,
    /// Descriptor table, aligned to 16.
    pub desc: u64,
    /// Available ring, aligned to 2 (packed: driver event structure, aligned to 4).
    pub avail: u64,
    /// Used ring (packed: device event structure), aligned to 4.
    pub used: u64,
}

impl QueueLayout {
    /// Bytes of a split descriptor table, available ring and used ring, event fields included.
    pub const fn split_sizes(size: u16) -> (u64, u64, u64) {
        let size = size as u64;
        (16 * size, 6 + 2 * size, 6 + 8 * size)
    }

    /// A split ring of `size` descriptors laid out from `start` on, which is rounded up to 16: the layout, and the
    /// first address behind it. `None` when the addresses wrap.
    pub fn split_at(start: u64, size: u16) -> Option<(Self, u64)> {
        let (desc_len, avail_len, used_len) = Self::split_sizes(size);
        let desc = start.checked_next_multiple_of(16)?;
        let avail = desc.checked_add(desc_len)?;
        let used = avail.checked_add(avail_len)?.checked_next_multiple_of(4)?;
        let end = used.checked_add(used_len)?;
        Some((Self { size, desc, avail, used }, end))
    }

    /// Bytes of a packed descriptor ring, driver event structure and device event structure.
    pub const fn packed_sizes(size: u16) -> (u64, u64, u64) {
        (16 * size as u64, 4, 4)
    }

    /// As [`split_at`](Self::split_at), for a packed ring.
    pub fn packed_at(start: u64, size: u16) -> Option<(Self, u64)> {
        let (desc_len, ..) = Self::packed_sizes(size);
        let desc = start.checked_next_multiple_of(16)?;
        let avail = desc.checked_add(desc_len)?;
        let used = avail.checked_add(4)?;
        let end = used.checked_add(4)?;
        Some((Self { size, desc, avail, used }, end))
    }

    /// Bytes of the three parts under these features: descriptors, what the driver writes, what the device writes.
    pub const fn sizes(size: u16, features: QueueFeatures) -> (u64, u64, u64) {
        if features.packed { Self::packed_sizes(size) } else { Self::split_sizes(size) }
    }

    /// A ring laid out from `start` on, of the layout that these features ask for.
    pub fn at(start: u64, size: u16, features: QueueFeatures) -> Option<(Self, u64)> {
        if features.packed { Self::packed_at(start, size) } else { Self::split_at(start, size) }
    }
}

/// The negotiated features that change a ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueFeatures {
    /// `VIRTIO_RING_F_EVENT_IDX`, bit 29.
    pub event_idx: bool,
    /// `VIRTIO_RING_F_INDIRECT_DESC`, bit 28.
    pub indirect: bool,
    /// `VIRTIO_F_RING_PACKED`, bit 34.
    pub packed: bool,
    /// `VIRTIO_F_IN_ORDER`, bit 35.
    pub in_order: bool,
}

impl QueueFeatures {
    /// From the 64 bits of SET_FEATURES.
    pub const fn from_bits(features: u64) -> Self {
        const fn has(features: u64, bit: u32) -> bool {
            features >> bit & 1 == 1
        }
        Self {
            event_idx: has(features, 29),
            indirect: has(features, 28),
            packed: has(features, 34),
            in_order: has(features, 35),
        }
    }

    /// As bits of SET_FEATURES.
    pub const fn bits(self) -> u64 {
        (self.event_idx as u64) << 29
            | (self.indirect as u64) << 28
            | (self.packed as u64) << 34
            | (self.in_order as u64) << 35
    }
}
