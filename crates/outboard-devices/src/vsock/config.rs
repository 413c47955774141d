//! Feature bits and configuration space of the socket device, to the byte (virtio 1.3 §5.10.3, §5.10.4).
//!
//! ```text
//!  0 guest_cid                                                                             8 end
//! ```

/// Feature bits of virtio 1.3 §5.10.3, as masks.
pub mod feature {
    /// Streams.
    pub const STREAM: u64 = 1 << 0;
    /// Messages.
    pub const SEQPACKET: u64 = 1 << 1;
    /// Streams only if [`STREAM`] says so.
    pub const NO_IMPLIED_STREAM: u64 = 1 << 2;

    const NAMES: [(&str, u64); 3] =
        [("STREAM", STREAM), ("SEQPACKET", SEQPACKET), ("NO_IMPLIED_STREAM", NO_IMPLIED_STREAM)];

    /// The bit that `name` stands for: `VIRTIO_VSOCK_F_SEQPACKET`, `seqpacket`.
    #[must_use]
    pub fn by_name(name: &str) -> Option<u64> {
        crate::features::by_name("VIRTIO_VSOCK_F_", &NAMES, name)
    }
}

/// Bytes of the configuration space.
pub const CONFIG_SIZE: u32 = 8;

/// Whether a guest may have this address: the others are reserved (§5.10.4).
#[must_use]
pub fn is_guest_cid(cid: u64) -> bool {
    (3..u64::from(u32::MAX)).contains(&cid)
}

/// Copies the configuration out from `offset`; what lies behind the end reads as zero.
pub(super) fn read(cid: u64, offset: u32, to: &mut [u8]) {
    let bytes = cid.to_le_bytes();
    let at = usize::try_from(offset).unwrap_or(usize::MAX);
    let from = bytes.get(at..).unwrap_or_default();
    for (index, byte) in to.iter_mut().enumerate() {
        *byte = from.get(index).copied().unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_right_to_the_byte() {
        let mut bytes = [0xee; 10];
        read(0x0304_0506, 0, &mut bytes);
        assert_eq!(bytes, [6, 5, 4, 3, 0, 0, 0, 0, 0, 0]);
        read(0x0304_0506, 3, &mut bytes);
        assert_eq!(bytes[..2], [3, 0]);
    }

    #[test]
    fn reserved_addresses_are_no_guests() {
        for cid in [0, 1, 2, 0xffff_ffff, 0x1_0000_0000, u64::MAX] {
            assert!(!is_guest_cid(cid), "{cid}");
        }
        assert!(is_guest_cid(3) && is_guest_cid(0xffff_fffe));
    }

    #[test]
    fn feature_names_are_found_however_they_are_spelt() {
        for name in ["VIRTIO_VSOCK_F_SEQPACKET", "seqpacket", "SEQPACKET"] {
            assert_eq!(feature::by_name(name), Some(feature::SEQPACKET), "{name}");
        }
        assert_eq!(feature::by_name("VIRTIO_NET_F_MQ"), None);
    }
}
