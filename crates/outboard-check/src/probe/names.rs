//! Names and meanings of feature bits, for people (virtio 1.3 §6 and the device chapters; vhost-user,
//! "Protocol features").
//!
//! Invariant: a bit without an entry is shown by its number; nothing is made up.

use super::DeviceType;

type Entry = (u32, &'static str, &'static str);

fn find(table: &[Entry], bit: u32) -> Option<(&'static str, &'static str)> {
    let entry = table.iter().find(|entry| entry.0 == bit)?;
    Some((entry.1, entry.2))
}

/// A bit that every device type shares.
#[must_use]
pub fn ring_feature(bit: u32) -> Option<(&'static str, &'static str)> {
    find(RING, bit)
}

/// A bit that means something for this type of device only.
#[must_use]
pub fn device_feature(device: DeviceType, bit: u32) -> Option<(&'static str, &'static str)> {
    match device {
        DeviceType::Block => find(BLOCK, bit),
        DeviceType::Net => find(NET, bit),
        DeviceType::Console => find(CONSOLE, bit),
        DeviceType::Vsock => find(VSOCK, bit),
        DeviceType::Fs => find(FS, bit),
    }
}

/// A protocol feature.
#[must_use]
pub fn protocol_feature(bit: u32) -> Option<(&'static str, &'static str)> {
    find(PROTOCOL, bit)
}

const RING: &[Entry] = &[
    (24, "NOTIFY_ON_EMPTY", "calls when a ring runs empty (legacy)"),
    (26, "LOG_ALL", "can log what it writes, for live migration"),
    (27, "ANY_LAYOUT", "requests may be cut anywhere (legacy)"),
    (28, "INDIRECT_DESC", "requests may lie in tables of their own"),
    (29, "EVENT_IDX", "kicks and calls only when they are needed"),
    (30, "PROTOCOL_FEATURES", "speaks of protocol features"),
    (32, "VERSION_1", "virtio 1.0 or newer"),
    (33, "ACCESS_PLATFORM", "works behind an IOMMU"),
    (34, "RING_PACKED", "packed rings"),
    (35, "IN_ORDER", "finishes requests in order"),
    (36, "ORDER_PLATFORM", "needs the platform's memory ordering"),
    (37, "SR_IOV", "single-root I/O virtualisation"),
    (38, "NOTIFICATION_DATA", "kicks carry data"),
    (39, "NOTIF_CONFIG_DATA", "kicks carry data of the device's choice"),
    (40, "RING_RESET", "single queues can be reset"),
    (41, "ADMIN_VQ", "an administration queue"),
];

const BLOCK: &[Entry] = &[
    (0, "BARRIER", "barriers (legacy)"),
    (1, "SIZE_MAX", "says how long a segment may be"),
    (2, "SEG_MAX", "says how many segments a request may have"),
    (4, "GEOMETRY", "says its geometry"),
    (5, "RO", "read-only"),
    (6, "BLK_SIZE", "says its block size"),
    (7, "SCSI", "SCSI commands (legacy)"),
    (9, "FLUSH", "can flush its cache"),
    (10, "TOPOLOGY", "says how it likes its requests aligned"),
    (11, "CONFIG_WCE", "its cache can be switched"),
    (12, "MQ", "several queues"),
    (13, "DISCARD", "can discard"),
    (14, "WRITE_ZEROES", "can write zeroes"),
    (15, "LIFETIME", "says how worn it is"),
    (16, "SECURE_ERASE", "can erase securely"),
    (17, "ZONED", "zoned"),
];

const NET: &[Entry] = &[
    (0, "CSUM", "takes packets with partial checksums"),
    (1, "GUEST_CSUM", "gives packets with partial checksums"),
    (2, "CTRL_GUEST_OFFLOADS", "offloads can be switched"),
    (3, "MTU", "says its MTU"),
    (5, "MAC", "says its MAC address"),
    (7, "GUEST_TSO4", "gives large TCP packets (IPv4)"),
    (8, "GUEST_TSO6", "gives large TCP packets (IPv6)"),
    (9, "GUEST_ECN", "gives large TCP packets with ECN"),
    (10, "GUEST_UFO", "gives large UDP packets"),
    (11, "HOST_TSO4", "takes large TCP packets (IPv4)"),
    (12, "HOST_TSO6", "takes large TCP packets (IPv6)"),
    (13, "HOST_ECN", "takes large TCP packets with ECN"),
    (14, "HOST_UFO", "takes large UDP packets"),
    (15, "MRG_RXBUF", "one packet may fill several buffers"),
    (16, "STATUS", "says whether the link is up"),
    (17, "CTRL_VQ", "a control queue"),
    (18, "CTRL_RX", "receive modes can be switched"),
    (19, "CTRL_VLAN", "filters VLANs"),
    (21, "GUEST_ANNOUNCE", "can ask the guest to announce itself"),
    (22, "MQ", "several queue pairs"),
    (23, "CTRL_MAC_ADDR", "its MAC address can be set"),
    (57, "HASH_REPORT", "gives hashes of packets"),
    (60, "RSS", "spreads packets by hash"),
];

const CONSOLE: &[Entry] = &[
    (0, "SIZE", "says its size"),
    (1, "MULTIPORT", "several ports"),
    (2, "EMERG_WRITE", "emergency output"),
];

const VSOCK: &[Entry] = &[
    (0, "STREAM", "stream sockets"),
    (1, "SEQPACKET", "sequential packets"),
    (2, "NO_IMPLIED_STREAM", "stream sockets only if it says so"),
];

const FS: &[Entry] = &[(0, "NOTIFICATION", "a notification queue")];

const PROTOCOL: &[Entry] = &[
    (0, "MQ", "says how many queues it has"),
    (1, "LOG_SHMFD", "live migration: the log is shared memory"),
    (2, "RARP", "announces the guest after migration"),
    (3, "REPLY_ACK", "acknowledges messages"),
    (4, "MTU", "takes the guest's MTU"),
    (5, "BACKEND_REQ", "sends requests of its own"),
    (6, "CROSS_ENDIAN", "legacy guests of the other byte order"),
    (7, "CRYPTO_SESSION", "crypto sessions"),
    (8, "PAGEFAULT", "postcopy migration"),
    (9, "CONFIG", "has a configuration space"),
    (10, "BACKEND_SEND_FD", "sends descriptors of its own"),
    (11, "HOST_NOTIFIER", "gives doorbells to map"),
    (12, "INFLIGHT_SHMFD", "requests survive its death"),
    (13, "RESET_DEVICE", "can be reset as a whole"),
    (14, "INBAND_NOTIFICATIONS", "kicks and calls as messages"),
    (15, "CONFIGURE_MEM_SLOTS", "memory comes and goes in slots"),
    (16, "STATUS", "knows the virtio status"),
    (17, "XEN_MMAP", "Xen guests"),
    (18, "SHARED_OBJECT", "shares objects with other back-ends"),
    (19, "DEVICE_STATE", "its state can be saved and loaded"),
    (20, "GET_VRING_BASE_INFLIGHT", "stops with requests in flight"),
    (21, "GPA_ADDRESSES", "takes guest addresses"),
    (22, "SHMEM", "has shared-memory regions"),
    (23, "GET_VRING_BASE_SKIP_DRAIN", "stops without finishing, when asked"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use outboard_protocol::ProtocolFeatures;

    #[test]
    fn every_protocol_feature_of_the_protocol_crate_has_its_name_here() {
        for (name, flag) in ProtocolFeatures::all().iter_names() {
            let (ours, meaning) = protocol_feature(flag.bits().trailing_zeros()).expect("a name");
            assert!(ours == name || ours.ends_with(name), "{ours} is not {name}");
            assert!(!meaning.is_empty());
        }
    }

    #[test]
    fn tables_are_in_order_and_overlap_nowhere() {
        for table in [RING, BLOCK, NET, CONSOLE, VSOCK, FS, PROTOCOL] {
            assert!(table.is_sorted_by_key(|entry| entry.0));
        }
        for device in [BLOCK, NET, CONSOLE, VSOCK, FS] {
            assert!(device.iter().all(|entry| ring_feature(entry.0).is_none()));
        }
    }
}
