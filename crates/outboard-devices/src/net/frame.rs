//! A packet behind its header, in memory of our own (virtio 1.3 §5.1.6, `struct virtio_net_hdr_v1`).
//!
//! ```text
//!  0 flags  1 gso_type  2 hdr_len  4 gso_size  6 csum_start  8 csum_offset  10 num_buffers  12 packet …
//! ```
//! Invariant: a header of a driver is believed as far as its features go, and only about bytes that the packet has
//! (case B62).

use super::config::feature;

/// Bytes of a header, and of one before virtio 1 without merged buffers.
pub(super) const HEADER: usize = 12;
pub(super) const OLD_HEADER: usize = 10;
/// The longest packet: 64 KiB and room for what goes before it.
pub const MOST: usize = (64 << 10) + 4096;
/// Bytes of the two addresses and the type of a packet.
pub(super) const ETHERNET: usize = 14;

/// Bit of `flags`: the checksum is to be filled in.
const NEEDS_CSUM: u8 = 1;
/// Bit of `flags`: the checksum was found right.
const DATA_VALID: u8 = 2;
/// Bit of `gso_type`: congestion is told.
const GSO_ECN: u8 = 0x80;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;

/// See the module. Empty until it is filled.
#[derive(Debug)]
pub(super) struct Frame {
    room: Box<[u8]>,
    length: usize,
}

impl Frame {
    pub(super) fn new() -> Self {
        Self::with_room(HEADER + MOST)
    }

    /// With so many bytes for header and packet.
    pub(super) fn with_room(room: usize) -> Self {
        Self { room: vec![0; room].into_boxed_slice(), length: 0 }
    }

    /// Becomes a copy; false: there is no room for it.
    pub(super) fn copy_from(&mut self, other: &Self) -> bool {
        let bytes = other.bytes();
        let room = self.room.get_mut(..bytes.len());
        let fits = room.map(|room| room.copy_from_slice(bytes)).is_some();
        self.length = if fits { bytes.len() } else { 0 };
        fits
    }

    /// Header and packet.
    pub(super) fn bytes(&self) -> &[u8] {
        self.room.get(..self.length).unwrap_or_default()
    }

    /// Without the header.
    pub(super) fn packet(&self) -> &[u8] {
        self.room.get(HEADER..self.length).unwrap_or_default()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.length == 0
    }

    pub(super) fn clear(&mut self) {
        self.length = 0;
    }

    /// All of the room, for a header and a packet; follow it with [`Frame::set_length`].
    pub(super) fn room(&mut self) -> &mut [u8] {
        &mut self.room
    }

    /// So many bytes of the room are header and packet.
    pub(super) fn set_length(&mut self, length: usize) {
        self.length = length.min(self.room.len());
    }

    /// Room for a packet of so many bytes behind an empty header; None: it is longer than any.
    pub(super) fn plain(&mut self, length: usize) -> Option<&mut [u8]> {
        self.length = 0;
        self.room.get_mut(..HEADER)?.fill(0);
        let room = self.room.get_mut(HEADER..HEADER + length)?;
        self.length = HEADER + length;
        Some(room)
    }

    fn word(&self, at: usize) -> usize {
        let bytes = self.room.get(at..at + 2).and_then(|bytes| bytes.first_chunk::<2>());
        usize::from(u16::from_le_bytes(bytes.copied().unwrap_or_default()))
    }

    fn set_word(&mut self, at: usize, value: u16) {
        if let Some(bytes) = self.room.get_mut(at..at + 2) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    }

    /// How many buffers of the driver it lies in.
    pub(super) fn set_buffers(&mut self, buffers: usize) {
        self.set_word(10, u16::try_from(buffers).unwrap_or(u16::MAX));
    }

    /// Whether a packet of a driver with these features can be sent, after what no feature allows was taken out of
    /// its header.
    pub(super) fn is_sendable(&mut self, features: u64) -> bool {
        if self.packet().len() < ETHERNET {
            return false;
        }
        let allowed = if features & feature::CSUM != 0 { NEEDS_CSUM } else { 0 };
        let [flags, gso, ..] = &mut *self.room else { return false };
        *flags &= allowed;
        let (flags, gso) = (*flags, *gso);
        self.set_word(10, 0);
        if flags | gso == 0 {
            // Nothing else means anything then.
            self.room.iter_mut().take(OLD_HEADER).for_each(|byte| *byte = 0);
            return true;
        }
        let needed = match gso & !GSO_ECN {
            0 if gso == 0 => 0,
            GSO_TCPV4 => feature::HOST_TSO4,
            GSO_TCPV6 => feature::HOST_TSO6,
            GSO_UDP_L4 if gso == GSO_UDP_L4 => feature::HOST_USO,
            _ => return false,
        };
        let needed = if gso & GSO_ECN != 0 { needed | feature::HOST_ECN } else { needed };
        if features & needed != needed || (gso != 0 && (flags == 0 || self.word(4) == 0)) {
            return false;
        }
        let length = self.packet().len();
        if self.word(2) > length {
            self.set_word(2, 0);
        }
        flags == 0 || self.word(6) + self.word(8) + 2 <= length
    }

    /// Whether a driver that has agreed to these offloads of the feature bits understands the packet.
    pub(super) fn is_understood(&self, offloads: u64) -> bool {
        let [flags, gso, ..] = &*self.room else { return false };
        if flags | gso == 0 {
            return true;
        }
        let ecn = if gso & GSO_ECN != 0 { feature::GUEST_ECN } else { 0 };
        let marked = flags & (NEEDS_CSUM | DATA_VALID) != 0;
        let csum = if marked { feature::GUEST_CSUM } else { 0 };
        let cut = match gso & !GSO_ECN {
            0 => 0,
            GSO_TCPV4 => feature::GUEST_TSO4,
            GSO_TCPV6 => feature::GUEST_TSO6,
            GSO_UDP_L4 => feature::GUEST_USO4 | feature::GUEST_USO6,
            _ => return false,
        };
        let (needed, any) = (ecn | csum, cut);
        offloads & needed == needed && (any == 0 || offloads & any != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A packet of 100 bytes behind this header.
    fn frame(header: [u8; HEADER]) -> Frame {
        let mut frame = Frame::new();
        frame.plain(100).expect("it fits").fill(7);
        frame.room[..HEADER].copy_from_slice(&header);
        frame
    }

    const ALL: u64 = feature::CSUM
        | feature::HOST_TSO4
        | feature::HOST_TSO6
        | feature::HOST_ECN
        | feature::HOST_USO;

    /// B62: kinds that nobody agreed on, sizes of nothing, checksums outside of the packet.
    #[test]
    fn b62_a_header_is_believed_about_bytes_that_the_packet_has() {
        let right = [1, 1, 54, 0, 50, 0, 34, 0, 16, 0, 9, 9];
        for (change, features, sendable) in [
            (&[][..], ALL, true),
            (&[], ALL & !feature::HOST_TSO4, false),
            (&[], ALL & !feature::CSUM, false),
            (&[(1, 4)], ALL & !feature::HOST_TSO6, false),
            (&[(1, 4)], ALL, true),
            (&[(1, 5)], ALL, true),
            (&[(1, 0x85)], ALL, false),
            (&[(1, 0x81)], ALL, true),
            (&[(1, 0x81)], ALL & !feature::HOST_ECN, false),
            (&[(1, 0x80)], ALL, false),
            (&[(1, 3)], ALL, false),
            (&[(1, 2)], ALL, false),
            (&[(0, 0)], ALL, false),
            (&[(4, 0)], ALL, false),
            (&[(6, 82)], ALL, true),
            (&[(6, 83)], ALL, false),
            (&[(6, 255), (7, 255), (8, 255), (9, 255)], ALL, false),
            (&[(0, 0), (1, 0), (6, 255), (7, 255)], ALL, true),
            (&[(1, 0), (7, 255)], 0, true),
        ] {
            let mut header = right;
            change.iter().for_each(|(at, byte): &(usize, u8)| header[*at] = *byte);
            let mut frame = frame(header);
            assert_eq!(frame.is_sendable(features), sendable, "{header:?} with {features:#x}");
        }
    }

    #[test]
    fn b62_what_no_feature_allows_is_taken_out() {
        let mut lying = frame([0xfe, 0, 0xff, 0xff, 1, 1, 1, 1, 1, 1, 1, 1]);
        assert!(lying.is_sendable(ALL));
        assert_eq!(lying.bytes()[..HEADER], [0; HEADER]);
        let mut long = frame([0xff, 0, 101, 0, 0, 0, 34, 0, 16, 0, 1, 1]);
        assert!(long.is_sendable(ALL));
        assert_eq!(long.bytes()[..HEADER], [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0]);
    }

    #[test]
    fn a_driver_gets_no_offload_that_it_has_not_agreed_to() {
        let tso = frame([1, 1, 54, 0, 50, 0, 34, 0, 16, 0, 0, 0]);
        assert!(tso.is_understood(feature::GUEST_CSUM | feature::GUEST_TSO4));
        assert!(!tso.is_understood(feature::GUEST_CSUM | feature::GUEST_TSO6));
        assert!(!tso.is_understood(feature::GUEST_TSO4));
        let valid = frame([2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert!(valid.is_understood(feature::GUEST_CSUM) && !valid.is_understood(0));
        assert!(frame([0; HEADER]).is_understood(0));
    }
}
