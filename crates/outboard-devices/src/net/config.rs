//! Feature bits and configuration space of the network card, to the byte (virtio 1.3 §5.1.3, §5.1.4).
//!
//! ```text
//!  0 mac  6 status  8 max_virtqueue_pairs  10 mtu  12 speed  16 duplex  17 – 24 hashes (none)     24 end
//! ```
//! Invariant: a driver can write nothing here; it sets its address over the control queue.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{Immutable, IntoBytes, KnownLayout, Unaligned};

/// Feature bits of virtio 1.3 §5.1.3, as masks.
pub mod feature {
    /// `mtu` is valid.
    pub const MTU: u64 = 1 << 3;
    /// `mac` is valid.
    pub const MAC: u64 = 1 << 5;
    /// Several buffers can hold one packet. Not offered.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// `status` is valid.
    pub const STATUS: u64 = 1 << 16;
    /// The control queue.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// Receive modes.
    pub const CTRL_RX: u64 = 1 << 18;
    /// A filter of VLANs.
    pub const CTRL_VLAN: u64 = 1 << 19;
    /// More receive modes.
    pub const CTRL_RX_EXTRA: u64 = 1 << 20;
    /// The driver announces itself when it is asked to.
    pub const GUEST_ANNOUNCE: u64 = 1 << 21;
    /// Several pairs of queues. Not offered.
    pub const MQ: u64 = 1 << 22;
    /// The driver sets its address.
    pub const CTRL_MAC_ADDR: u64 = 1 << 23;
    /// `speed` and `duplex` are valid.
    pub const SPEED_DUPLEX: u64 = 1 << 63;

    const NAMES: [(&str, u64); 12] = [
        ("MTU", MTU),
        ("MAC", MAC),
        ("MRG_RXBUF", MRG_RXBUF),
        ("STATUS", STATUS),
        ("CTRL_VQ", CTRL_VQ),
        ("CTRL_RX", CTRL_RX),
        ("CTRL_VLAN", CTRL_VLAN),
        ("CTRL_RX_EXTRA", CTRL_RX_EXTRA),
        ("GUEST_ANNOUNCE", GUEST_ANNOUNCE),
        ("MQ", MQ),
        ("CTRL_MAC_ADDR", CTRL_MAC_ADDR),
        ("SPEED_DUPLEX", SPEED_DUPLEX),
    ];

    /// What needs the control queue (§5.1.3.1).
    pub const CONTROL: u64 = CTRL_RX | CTRL_VLAN | CTRL_RX_EXTRA | GUEST_ANNOUNCE | CTRL_MAC_ADDR;

    /// The bit that `name` stands for: `VIRTIO_NET_F_CTRL_VQ`, `ctrl-vq`.
    #[must_use]
    pub fn by_name(name: &str) -> Option<u64> {
        let name = name.to_ascii_uppercase().replace('-', "_");
        let short = name.strip_prefix("VIRTIO_NET_F_").unwrap_or(&name);
        NAMES.iter().find(|(known, _)| *known == short).map(|(_, bit)| *bit)
    }
}

/// Bytes of the configuration space.
pub const CONFIG_SIZE: u32 = 24;
/// Bit of `status`: the link is up.
const LINK_UP: u16 = 1;
/// Bit of `status`: the driver is to announce itself.
const ANNOUNCE: u16 = 2;

/// `struct virtio_net_config`.
#[derive(IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Layout {
    mac: [u8; 6],
    status: U16,
    max_virtqueue_pairs: U16,
    mtu: U16,
    speed: U32,
    duplex: u8,
    hashes: [u8; 7],
}

const _: () = assert!(size_of::<Layout>() == CONFIG_SIZE as usize);

/// What the configuration says of a card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) mac: [u8; 6],
    pub(super) link_up: bool,
    pub(super) announce: bool,
    pub(super) mtu: u16,
}

impl Shown {
    /// Copies the configuration out from `offset`; what lies behind the end reads as zero.
    pub(super) fn read(self, offset: u32, to: &mut [u8]) {
        let status = u16::from(self.link_up) * LINK_UP + u16::from(self.announce) * ANNOUNCE;
        let layout = Layout {
            mac: self.mac,
            status: U16::new(status),
            max_virtqueue_pairs: U16::new(1),
            mtu: U16::new(self.mtu),
            // Unknown (§5.1.4): the link is as fast as the host.
            speed: U32::new(u32::MAX),
            duplex: u8::MAX,
            hashes: [0; 7],
        };
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let from = layout.as_bytes().get(at..).unwrap_or_default();
        for (index, byte) in to.iter_mut().enumerate() {
            *byte = from.get(index).copied().unwrap_or(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_right_to_the_byte() {
        let mac = [2, 3, 4, 5, 6, 7];
        let shown = Shown { mac, link_up: true, announce: true, mtu: 9000 };
        let mut bytes = [0xee; 26];
        shown.read(0, &mut bytes);
        let mut expected = [0; 26];
        expected[..6].copy_from_slice(&mac);
        expected[6] = 3;
        expected[8] = 1;
        expected[10..12].copy_from_slice(&9000_u16.to_le_bytes());
        expected[12..17].fill(0xff);
        assert_eq!(bytes, expected);
        Shown { announce: false, ..shown }.read(6, &mut bytes[..1]);
        assert_eq!(bytes[0], 1);
        shown.read(u32::MAX, &mut bytes);
        assert_eq!(bytes, [0; 26]);
    }

    #[test]
    fn feature_names_are_found_however_they_are_spelt() {
        for name in ["VIRTIO_NET_F_CTRL_VLAN", "ctrl-vlan", "CTRL_VLAN"] {
            assert_eq!(feature::by_name(name), Some(feature::CTRL_VLAN), "{name}");
        }
        assert_eq!(feature::by_name("VIRTIO_BLK_F_RO"), None);
    }
}
