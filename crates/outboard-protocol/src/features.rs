//! Feature bits: the protocol features of messages 15 and 16, and the virtio and vhost bits that
//! the transport itself must know (vhost-user, "Protocol features"; virtio 1.3 §6), and those of the
//! disk, which front-ends and devices have in common.
//!
//! Invariant: a bit has one meaning. Bit 21 is GPA_ADDRESSES and nothing else, although old
//! rust-vmm releases meant SHMEM by it.

use bitflags::bitflags;

bitflags! {
    /// Protocol features, negotiated with GET_PROTOCOL_FEATURES and SET_PROTOCOL_FEATURES.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct ProtocolFeatures: u64 {
        /// GET_QUEUE_NUM.
        const MQ = 1 << 0;
        /// SET_LOG_BASE carries a descriptor.
        const LOG_SHMFD = 1 << 1;
        /// SEND_RARP.
        const RARP = 1 << 2;
        /// Any message may ask for an answer.
        const REPLY_ACK = 1 << 3;
        /// NET_SET_MTU.
        const MTU = 1 << 4;
        /// SET_BACKEND_REQ_FD and all requests of the back-end.
        const BACKEND_REQ = 1 << 5;
        /// SET_VRING_ENDIAN.
        const CROSS_ENDIAN = 1 << 6;
        /// Crypto sessions.
        const CRYPTO_SESSION = 1 << 7;
        /// Postcopy; dead together with CONFIGURE_MEM_SLOTS.
        const PAGEFAULT = 1 << 8;
        /// GET_CONFIG, SET_CONFIG and the notice of change.
        const CONFIG = 1 << 9;
        /// Descriptors on the back-end channel.
        const BACKEND_SEND_FD = 1 << 10;
        /// Host notifier regions.
        const HOST_NOTIFIER = 1 << 11;
        /// The in-flight region.
        const INFLIGHT_SHMFD = 1 << 12;
        /// RESET_DEVICE.
        const RESET_DEVICE = 1 << 13;
        /// Kicks, calls and errors as messages; needs BACKEND_REQ and REPLY_ACK.
        const INBAND_NOTIFICATIONS = 1 << 14;
        /// Memory slots; forbids postcopy.
        const CONFIGURE_MEM_SLOTS = 1 << 15;
        /// SET_STATUS and GET_STATUS.
        const STATUS = 1 << 16;
        /// Memory regions of 40 bytes with Xen fields. Never offered by this crate.
        const XEN_MMAP = 1 << 17;
        /// Shared objects (dma-buf) by UUID.
        const SHARED_OBJECT = 1 << 18;
        /// Transfer of device state.
        const DEVICE_STATE = 1 << 19;
        /// Requests may stay in flight across GET_VRING_BASE; needs INFLIGHT_SHMFD.
        const GET_VRING_BASE_INFLIGHT = 1 << 20;
        /// Ring and region addresses are guest-physical.
        const GPA_ADDRESSES = 1 << 21;
        /// Shared-memory regions.
        const SHMEM = 1 << 22;
        /// GET_VRING_BASE_SKIP_DRAIN; needs GET_VRING_BASE_INFLIGHT and INFLIGHT_SHMFD.
        const SKIP_DRAIN = 1 << 23;
    }
}

impl ProtocolFeatures {
    /// The feature that `name` stands for: `VHOST_USER_PROTOCOL_F_MQ`, `MQ`, `mq`.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        let name = name.to_ascii_uppercase().replace('-', "_");
        Self::from_name(name.strip_prefix("VHOST_USER_PROTOCOL_F_").unwrap_or(&name))
    }
}

/// Virtio and vhost feature bits as masks of the 64-bit feature word.
pub mod virtio {
    /// VIRTIO_NET_F_MTU (a net device's bit 3).
    pub const NET_MTU: u64 = 1 << 3;
    /// VIRTIO_F_NOTIFY_ON_EMPTY (legacy).
    pub const NOTIFY_ON_EMPTY: u64 = 1 << 24;
    /// VHOST_F_LOG_ALL: log every write to guest memory; may toggle while rings run.
    pub const LOG_ALL: u64 = 1 << 26;
    /// VIRTIO_F_ANY_LAYOUT (legacy).
    pub const ANY_LAYOUT: u64 = 1 << 27;
    /// VIRTIO_RING_F_INDIRECT_DESC.
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    /// VIRTIO_RING_F_EVENT_IDX.
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    /// VHOST_USER_F_PROTOCOL_FEATURES: messages 15 and 16 exist; rings start disabled.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// VIRTIO_F_VERSION_1.
    pub const VERSION_1: u64 = 1 << 32;
    /// VIRTIO_F_ACCESS_PLATFORM: every address is an IOVA.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    /// VIRTIO_F_RING_PACKED.
    pub const RING_PACKED: u64 = 1 << 34;
    /// VIRTIO_F_IN_ORDER.
    pub const IN_ORDER: u64 = 1 << 35;
    /// VIRTIO_F_ORDER_PLATFORM.
    pub const ORDER_PLATFORM: u64 = 1 << 36;
    /// VIRTIO_F_SR_IOV: the VMM's transport, not ours.
    pub const SR_IOV: u64 = 1 << 37;
    /// VIRTIO_F_NOTIFICATION_DATA.
    pub const NOTIFICATION_DATA: u64 = 1 << 38;
    /// VIRTIO_F_NOTIF_CONFIG_DATA.
    pub const NOTIF_CONFIG_DATA: u64 = 1 << 39;
    /// VIRTIO_F_RING_RESET: single rings stop and start while others run.
    pub const RING_RESET: u64 = 1 << 40;
    /// VIRTIO_F_ADMIN_VQ.
    pub const ADMIN_VQ: u64 = 1 << 41;

    /// The bits that a device can offer, by the end of their names.
    const NAMES: [(&str, u64); 15] = [
        ("NOTIFY_ON_EMPTY", NOTIFY_ON_EMPTY),
        ("LOG_ALL", LOG_ALL),
        ("ANY_LAYOUT", ANY_LAYOUT),
        ("INDIRECT_DESC", RING_INDIRECT_DESC),
        ("EVENT_IDX", RING_EVENT_IDX),
        ("PROTOCOL_FEATURES", PROTOCOL_FEATURES),
        ("VERSION_1", VERSION_1),
        ("ACCESS_PLATFORM", ACCESS_PLATFORM),
        ("PACKED", RING_PACKED),
        ("IN_ORDER", IN_ORDER),
        ("ORDER_PLATFORM", ORDER_PLATFORM),
        ("NOTIFICATION_DATA", NOTIFICATION_DATA),
        ("NOTIF_CONFIG_DATA", NOTIF_CONFIG_DATA),
        ("RING_RESET", RING_RESET),
        ("ADMIN_VQ", ADMIN_VQ),
    ];

    /// The bit that `name` stands for: `VIRTIO_RING_F_EVENT_IDX`, `RING_EVENT_IDX`, `event-idx`.
    #[must_use]
    pub fn by_name(name: &str) -> Option<u64> {
        let name = name.to_ascii_uppercase().replace('-', "_");
        let prefixes = ["VIRTIO_RING_F_", "VIRTIO_F_", "VHOST_USER_F_", "VHOST_F_"];
        let short = prefixes.iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or(&name);
        let is = |known: &str| short == known || short.strip_prefix("RING_") == Some(known);
        NAMES.iter().find(|(known, _)| is(known)).map(|(_, bit)| *bit)
    }
}

/// Feature bits of the block device (virtio 1.3 §5.2.3), as masks.
pub mod block {
    /// The largest segment is limited (`size_max`).
    pub const SIZE_MAX: u64 = 1 << 1;
    /// The number of segments of a request is limited (`seg_max`).
    pub const SEG_MAX: u64 = 1 << 2;
    /// The geometry field is valid.
    pub const GEOMETRY: u64 = 1 << 4;
    /// The device is read-only.
    pub const RO: u64 = 1 << 5;
    /// The block size field is valid.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// The flush command is understood.
    pub const FLUSH: u64 = 1 << 9;
    /// The topology fields are valid.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// The driver can switch the write cache.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// More than one queue.
    pub const MQ: u64 = 1 << 12;
    /// The discard command is understood.
    pub const DISCARD: u64 = 1 << 13;
    /// The write-zeroes command is understood.
    pub const WRITE_ZEROES: u64 = 1 << 14;
    /// The lifetime command is understood.
    pub const LIFETIME: u64 = 1 << 15;
    /// The secure-erase command is understood.
    pub const SECURE_ERASE: u64 = 1 << 16;
    /// The device is zoned.
    pub const ZONED: u64 = 1 << 17;

    /// Their names.
    pub const NAMES: [(&str, u64); 14] = [
        ("SIZE_MAX", SIZE_MAX),
        ("SEG_MAX", SEG_MAX),
        ("GEOMETRY", GEOMETRY),
        ("RO", RO),
        ("BLK_SIZE", BLK_SIZE),
        ("FLUSH", FLUSH),
        ("TOPOLOGY", TOPOLOGY),
        ("CONFIG_WCE", CONFIG_WCE),
        ("MQ", MQ),
        ("DISCARD", DISCARD),
        ("WRITE_ZEROES", WRITE_ZEROES),
        ("LIFETIME", LIFETIME),
        ("SECURE_ERASE", SECURE_ERASE),
        ("ZONED", ZONED),
    ];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn feature_names_are_found_however_they_are_spelt() {
        for name in ["VIRTIO_RING_F_EVENT_IDX", "RING_EVENT_IDX", "event-idx", "event_idx"] {
            assert_eq!(virtio::by_name(name), Some(virtio::RING_EVENT_IDX), "{name}");
        }
        for name in ["VIRTIO_F_RING_PACKED", "RING_PACKED", "packed"] {
            assert_eq!(virtio::by_name(name), Some(virtio::RING_PACKED), "{name}");
        }
        assert_eq!(virtio::by_name("VIRTIO_F_RING_RESET"), Some(virtio::RING_RESET));
        let bit_30 = virtio::by_name("VHOST_USER_F_PROTOCOL_FEATURES");
        assert_eq!(bit_30, Some(virtio::PROTOCOL_FEATURES));
        for name in ["VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS", "configure-mem-slots"] {
            let found = ProtocolFeatures::by_name(name);
            assert_eq!(found, Some(ProtocolFeatures::CONFIGURE_MEM_SLOTS), "{name}");
        }
        assert_eq!(virtio::by_name("RESET"), None);
        assert_eq!(virtio::by_name(""), None);
        assert_eq!(ProtocolFeatures::by_name("VIRTIO_BLK_F_MQ"), None);
    }
}
