//! The frame around a device's own value: what is checked before the device is asked.
//!
//! ```text
//!  offset  0      8       12        16           48      50     52       56        64         72      80
//!          magic  format  checksum  device type  queues  flags  version  features  protocol   length  value …
//! ```
//! All numbers are little-endian; the checksum is the CRC-32 of everything else. Invariant: the
//! device sees no byte that the checksum does not cover.

use outboard_protocol::{ProtocolFeatures, virtio};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Saved, StateError, TYPE_SIZE};

/// The first bytes of every device state.
pub const STATE_MAGIC: [u8; 8] = *b"OUTBOARD";
/// The newest format of the frame that this program reads, and the one that it writes.
pub const STATE_FORMAT: u32 = 1;
/// Bytes in front of the device's own value.
pub const STATE_HEADER: usize = size_of::<Header>();

/// The driver had acknowledged features.
const FEATURES_SET: u16 = 1;
/// Feature bits that say how the transport works at the moment, and nothing about the device.
pub(crate) const PASSING: u64 = virtio::LOG_ALL | virtio::PROTOCOL_FEATURES;

/// Protocol features that give the device something of its own; the others say how messages travel,
/// and may differ between two processes.
const LASTING: ProtocolFeatures = ProtocolFeatures::RARP
    .union(ProtocolFeatures::MTU)
    .union(ProtocolFeatures::CROSS_ENDIAN)
    .union(ProtocolFeatures::CRYPTO_SESSION)
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::HOST_NOTIFIER)
    .union(ProtocolFeatures::SHARED_OBJECT)
    .union(ProtocolFeatures::SHMEM);

/// A whole device state: what another process is handed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// Kind of the device, up to 32 bytes.
    pub device_type: String,
    /// Number of its queues.
    pub queues: u16,
    /// Feature bits that the driver had acknowledged, if it had.
    pub features: Option<u64>,
    /// Protocol features that the front-end had acknowledged, as bits.
    pub protocol_features: u64,
    /// Version of the device's own value.
    pub version: u32,
    /// The device's own value.
    pub value: Vec<u8>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    format: U32,
    checksum: U32,
    device_type: [u8; TYPE_SIZE],
    queues: U16,
    flags: U16,
    version: U32,
    features: U64,
    protocol_features: U64,
    length: U64,
}

impl DeviceState {
    /// As bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut device_type = [0; TYPE_SIZE];
        for (to, from) in device_type.iter_mut().zip(self.device_type.bytes()) {
            *to = from;
        }
        let flags = if self.features.is_some() { FEATURES_SET } else { 0 };
        let mut header = Header {
            magic: STATE_MAGIC,
            format: U32::new(STATE_FORMAT),
            checksum: U32::ZERO,
            device_type,
            queues: U16::new(self.queues),
            flags: U16::new(flags),
            version: U32::new(self.version),
            features: U64::new(self.features.unwrap_or(0)),
            protocol_features: U64::new(self.protocol_features),
            length: U64::new(self.value.len() as u64),
        };
        header.checksum = U32::new(checksum(&header, &self.value));
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(&self.value);
        bytes
    }

    /// Reads what [`DeviceState::to_bytes`] wrote; a value of at most `limit` bytes.
    ///
    /// # Errors
    /// It is foreign, of a later format, damaged, too short, too long or too large.
    pub fn parse(bytes: &[u8], limit: u64) -> Result<Self, StateError> {
        let length = Self::value_length(bytes, limit)?;
        let (header, value) =
            Header::read_from_prefix(bytes).map_err(|_| short(bytes, STATE_HEADER as u64))?;
        let whole = STATE_HEADER as u64 + length;
        match (value.len() as u64).cmp(&length) {
            std::cmp::Ordering::Less => return Err(short(bytes, whole)),
            std::cmp::Ordering::Greater => return Err(StateError::Long { whole }),
            std::cmp::Ordering::Equal => {}
        }
        let (found, computed) = (header.checksum.get(), checksum(&header, value));
        if found != computed {
            return Err(StateError::Damaged { found, computed });
        }
        let used = header.device_type.iter().position(|byte| *byte == 0).unwrap_or(TYPE_SIZE);
        let name = header.device_type.get(..used).unwrap_or_default();
        Ok(Self {
            device_type: String::from_utf8_lossy(name).into_owned(),
            queues: header.queues.get(),
            features: (header.flags.get() & FEATURES_SET != 0).then(|| header.features.get()),
            protocol_features: header.protocol_features.get(),
            version: header.version.get(),
            value: value.to_vec(),
        })
    }

    /// How long the value behind these first bytes is: to know before it is read.
    pub(crate) fn value_length(start: &[u8], limit: u64) -> Result<u64, StateError> {
        let mut magic = [0; 8];
        for (to, from) in magic.iter_mut().zip(start) {
            *to = *from;
        }
        if !STATE_MAGIC.starts_with(start.get(..8).unwrap_or(start)) {
            return Err(StateError::Foreign(magic));
        }
        let (header, _) =
            Header::ref_from_prefix(start).map_err(|_| short(start, STATE_HEADER as u64))?;
        let found = header.format.get();
        if found == 0 || found > STATE_FORMAT {
            return Err(StateError::Format { found, newest: STATE_FORMAT });
        }
        let length = header.length.get();
        if length > limit {
            return Err(StateError::TooLarge { length, limit });
        }
        Ok(length)
    }

    /// The value, for the device.
    #[must_use]
    pub fn saved(&self) -> Saved<'_> {
        Saved::new(self.version, &self.value, self.features)
    }

    /// Checks it against a device that offers and negotiated these.
    pub(crate) fn fits(&self, device: &Fit) -> Result<(), StateError> {
        if self.device_type != device.device_type {
            let (found, expected) = (self.device_type.clone(), device.device_type.clone());
            return Err(StateError::DeviceType { found, expected });
        }
        if self.queues != device.queues {
            return Err(StateError::Queues { found: self.queues, expected: device.queues });
        }
        if let Some(features) = self.features.map(|features| features & !PASSING) {
            let missing = features & !device.offered;
            if missing != 0 {
                return Err(StateError::NotOffered { features, missing });
            }
            match device.negotiated.map(|negotiated| negotiated & !PASSING) {
                Some(negotiated) if negotiated != features => {
                    return Err(StateError::Negotiated { features, negotiated });
                }
                _ => {}
            }
        }
        let features = self.protocol_features;
        let missing = features & LASTING.bits() & !device.protocol.bits();
        if missing != 0 {
            return Err(StateError::NotOfferedProtocol { features, missing });
        }
        Ok(())
    }
}

/// What a state has to fit.
#[derive(Debug)]
pub(crate) struct Fit {
    pub(crate) device_type: String,
    pub(crate) queues: u16,
    pub(crate) offered: u64,
    pub(crate) negotiated: Option<u64>,
    pub(crate) protocol: ProtocolFeatures,
}

fn short(bytes: &[u8], whole: u64) -> StateError {
    StateError::Short { found: bytes.len() as u64, whole }
}

/// Of everything but the checksum itself.
fn checksum(header: &Header, value: &[u8]) -> u32 {
    let bytes = header.as_bytes();
    let (before, after) =
        (bytes.get(..12).unwrap_or_default(), bytes.get(16..).unwrap_or_default());
    let crc = [before, after, value].into_iter().fold(u32::MAX, crc32);
    !crc
}

/// CRC-32 as zlib and Ethernet have it, without the inversions at both ends.
fn crc32(crc: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(crc, |crc, byte| {
        let index = usize::from(crc.to_le_bytes()[0] ^ byte);
        CRC_TABLE.get(index).copied().unwrap_or(0) ^ (crc >> 8)
    })
}

const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0u32;
    while byte < 256 {
        let (mut entry, mut bit) = (byte, 0);
        while bit < 8 {
            entry = if entry & 1 == 1 { 0xedb8_8320 ^ (entry >> 1) } else { entry >> 1 };
            bit += 1;
        }
        table[byte as usize] = entry;
        byte += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> DeviceState {
        DeviceState {
            device_type: "echo".to_owned(),
            queues: 3,
            features: Some(virtio::VERSION_1 | virtio::LOG_ALL),
            protocol_features: 0x8209,
            version: 7,
            value: b"the value".to_vec(),
        }
    }

    fn fit() -> Fit {
        Fit {
            device_type: "echo".to_owned(),
            queues: 3,
            offered: virtio::VERSION_1 | 3,
            negotiated: None,
            protocol: ProtocolFeatures::CONFIG,
        }
    }

    fn refused(bytes: &[u8]) -> String {
        DeviceState::parse(bytes, 1 << 20).expect_err("refused").to_string()
    }

    #[test]
    fn the_checksum_is_the_one_of_zlib() {
        assert_eq!(!crc32(u32::MAX, b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn a_state_comes_back_as_it_was() {
        for features in [None, Some(0), Some(u64::MAX)] {
            let state = DeviceState { features, ..state() };
            assert_eq!(DeviceState::parse(&state.to_bytes(), 9).expect("whole"), state);
        }
        assert_eq!(STATE_HEADER, 80);
    }

    #[test]
    fn a_state_cut_at_any_byte_or_with_more_behind_it_is_refused() {
        let bytes = state().to_bytes();
        for end in 0..bytes.len() {
            assert!(refused(&bytes[..end]).contains(&format!("after {end} bytes of ")), "{end}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert_eq!(refused(&longer), "device state goes on after its 89 bytes");
    }

    #[test]
    fn a_state_with_any_bit_flipped_is_refused() {
        let bytes = state().to_bytes();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(DeviceState::parse(&flipped, 1 << 20).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn foreign_newer_and_huge_states_are_refused_with_their_numbers() {
        assert_eq!(
            refused(b"QEVM\0\0\0\x03 and more"),
            "no device state of ours: it begins with [51, 45, 56, 4d, 00, 00, 00, 03]"
        );
        assert!(refused(&[0xff; 4096]).starts_with("no device state of ours"));
        let mut bytes = state().to_bytes();
        bytes[8] = 2;
        assert_eq!(refused(&bytes), "device state of format 2, this program knows up to 1");
        let error = DeviceState::parse(&state().to_bytes(), 8).expect_err("refused");
        assert_eq!(error.to_string(), "device state with a value of 9 bytes, the limit is 8");
    }

    #[test]
    fn what_does_not_fit_the_device_is_refused_with_both_sides() {
        let says =
            |state: &DeviceState, fit: &Fit| state.fits(fit).expect_err("refused").to_string();
        state().fits(&fit()).expect("fits: LOG_ALL is no matter of the device");
        let other = Fit { device_type: "disk".to_owned(), ..fit() };
        let text = says(&state(), &other);
        assert_eq!(text, "state of a device of type \"echo\", this one is \"disk\"");
        let text = says(&state(), &Fit { queues: 16, ..fit() });
        assert_eq!(text, "state of a device with 3 queues, this one has 16");
        let features = Some(virtio::VERSION_1 | 6);
        let text = says(&DeviceState { features, ..state() }, &fit());
        assert_eq!(text, "state with features 0x100000006: 0x4 of them are not offered here");
        let negotiated = Some(virtio::VERSION_1 | virtio::PROTOCOL_FEATURES | 1);
        let text = says(&state(), &Fit { negotiated, ..fit() });
        assert_eq!(text, "state with features 0x100000000, 0x100000001 were negotiated");
        let text = says(&state(), &Fit { protocol: ProtocolFeatures::MQ, ..fit() });
        let expected = "state with protocol features 0x8209: 0x200 of them are not offered here";
        assert_eq!(text, expected);
        let before = DeviceState { features: None, ..state() };
        before.fits(&Fit { negotiated, ..fit() }).expect("a driver that had not come that far");
    }
}
