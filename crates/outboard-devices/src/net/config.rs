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
    /// Checksums can be left to the device.
    pub const CSUM: u64 = 1;
    /// Checksums can be left to the driver.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// The driver says which offloads it understands as it goes.
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    /// `mtu` is valid.
    pub const MTU: u64 = 1 << 3;
    /// `mac` is valid.
    pub const MAC: u64 = 1 << 5;
    /// The driver takes TCP over IPv4 in pieces larger than the link's.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// The same over IPv6.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// The same with congestion told.
    pub const GUEST_ECN: u64 = 1 << 9;
    /// The device cuts TCP over IPv4 into the link's pieces.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// The same over IPv6.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// The same with congestion told.
    pub const HOST_ECN: u64 = 1 << 13;
    /// Several buffers can hold one packet.
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
    /// Several pairs of queues.
    pub const MQ: u64 = 1 << 22;
    /// The driver sets its address.
    pub const CTRL_MAC_ADDR: u64 = 1 << 23;
    /// The driver takes UDP over IPv4 in pieces larger than the link's.
    pub const GUEST_USO4: u64 = 1 << 54;
    /// The same over IPv6.
    pub const GUEST_USO6: u64 = 1 << 55;
    /// The device cuts UDP into the link's pieces.
    pub const HOST_USO: u64 = 1 << 56;
    /// `speed` and `duplex` are valid.
    pub const SPEED_DUPLEX: u64 = 1 << 63;

    const NAMES: [(&str, u64); 24] = [
        ("CSUM", CSUM),
        ("GUEST_CSUM", GUEST_CSUM),
        ("CTRL_GUEST_OFFLOADS", CTRL_GUEST_OFFLOADS),
        ("GUEST_TSO4", GUEST_TSO4),
        ("GUEST_TSO6", GUEST_TSO6),
        ("GUEST_ECN", GUEST_ECN),
        ("HOST_TSO4", HOST_TSO4),
        ("HOST_TSO6", HOST_TSO6),
        ("HOST_ECN", HOST_ECN),
        ("GUEST_USO4", GUEST_USO4),
        ("GUEST_USO6", GUEST_USO6),
        ("HOST_USO", HOST_USO),
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

    /// What every card has that needs the control queue.
    pub const CONTROL: u64 = CTRL_RX | CTRL_VLAN | CTRL_RX_EXTRA | GUEST_ANNOUNCE | CTRL_MAC_ADDR;
    /// What the driver understands: the offloads that it can turn on and off.
    pub const GUEST: u64 = GUEST_CSUM | GUEST_TSO | GUEST_USO4 | GUEST_USO6;
    const GUEST_TSO: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN;
    /// What the device does for it.
    pub const HOST: u64 = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | HOST_USO;
    /// The part of both that came with Linux 6.2.
    pub const USO: u64 = GUEST_USO4 | GUEST_USO6 | HOST_USO;

    /// `hidden`, and what must not be offered without it (§5.1.3.1).
    #[must_use]
    pub fn with_dependants(hidden: u64) -> u64 {
        let needs = [
            (CTRL_VQ, CONTROL | MQ | CTRL_GUEST_OFFLOADS),
            (CSUM, HOST & !CSUM),
            (GUEST_CSUM, GUEST & !GUEST_CSUM),
        ];
        let mut all = hidden;
        for (bit, dependants) in needs {
            all |= if hidden & bit != 0 { dependants } else { 0 };
        }
        // Congestion is told of TCP alone.
        for (tso, ecn) in [(HOST_TSO4 | HOST_TSO6, HOST_ECN), (GUEST_TSO4 | GUEST_TSO6, GUEST_ECN)]
        {
            all |= if all & tso == tso { ecn } else { 0 };
        }
        all
    }

    /// The bit that `name` stands for: `VIRTIO_NET_F_CTRL_VQ`, `ctrl-vq`.
    #[must_use]
    pub fn by_name(name: &str) -> Option<u64> {
        crate::features::by_name("VIRTIO_NET_F_", &NAMES, name)
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
    pub(super) pairs: u16,
}

impl Shown {
    /// Copies the configuration out from `offset`; what lies behind the end reads as zero.
    pub(super) fn read(self, offset: u32, to: &mut [u8]) {
        let status = u16::from(self.link_up) * LINK_UP + u16::from(self.announce) * ANNOUNCE;
        let layout = Layout {
            mac: self.mac,
            status: U16::new(status),
            max_virtqueue_pairs: U16::new(self.pairs),
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
        let shown = Shown { mac, link_up: true, announce: true, mtu: 9000, pairs: 1 };
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
