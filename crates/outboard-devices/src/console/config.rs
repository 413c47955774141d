//! Feature bits and configuration space of the console, to the byte (virtio 1.3 §5.3.3, §5.3.4).
//!
//! ```text
//!  0 cols  2 rows  4 max_nr_ports  8 emerg_wr                                             12 end
//! ```
//! Invariant: `emerg_wr` is the only field that a driver can write, and it reads as zero.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{Immutable, IntoBytes, KnownLayout, Unaligned};

/// Feature bits of virtio 1.3 §5.3.3, as masks.
pub mod feature {
    /// `cols` and `rows` are valid.
    pub const SIZE: u64 = 1 << 0;
    /// Several ports, and control queues.
    pub const MULTIPORT: u64 = 1 << 1;
    /// Characters can be written to the configuration space.
    pub const EMERG_WRITE: u64 = 1 << 2;

    const NAMES: [(&str, u64); 3] =
        [("SIZE", SIZE), ("MULTIPORT", MULTIPORT), ("EMERG_WRITE", EMERG_WRITE)];

    /// The bit that `name` stands for: `VIRTIO_CONSOLE_F_MULTIPORT`, `multiport`.
    #[must_use]
    pub fn by_name(name: &str) -> Option<u64> {
        crate::features::by_name("VIRTIO_CONSOLE_F_", &NAMES, name)
    }
}

/// Bytes of the configuration space.
pub const CONFIG_SIZE: u32 = 12;
/// Where `emerg_wr` begins.
const EMERGENCY_AT: u32 = 8;

/// Size of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Size {
    /// Characters in a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

impl Default for Size {
    fn default() -> Self {
        Self { columns: 80, rows: 25 }
    }
}

/// `struct virtio_console_config`.
#[derive(IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Layout {
    cols: U16,
    rows: U16,
    max_nr_ports: U32,
    emerg_wr: U32,
}

const _: () = assert!(size_of::<Layout>() == CONFIG_SIZE as usize);

/// Copies the configuration out from `offset`; what lies behind the end reads as zero.
pub(super) fn read(size: Size, ports: u32, offset: u32, to: &mut [u8]) {
    let layout = Layout {
        cols: U16::new(size.columns),
        rows: U16::new(size.rows),
        max_nr_ports: U32::new(ports),
        emerg_wr: U32::ZERO,
    };
    let at = usize::try_from(offset).unwrap_or(usize::MAX);
    let from = layout.as_bytes().get(at..).unwrap_or_default();
    for (index, byte) in to.iter_mut().enumerate() {
        *byte = from.get(index).copied().unwrap_or(0);
    }
}

/// The character that a write of `bytes` at `offset` stands for: the low byte of `emerg_wr`, as a whole or
/// as far as it is written.
pub(super) fn emergency(offset: u32, bytes: &[u8]) -> Option<u8> {
    let fits = offset == EMERGENCY_AT && (1..=4).contains(&bytes.len());
    bytes.first().copied().filter(|_| fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_right_to_the_byte() {
        let mut bytes = [0xee; 14];
        read(Size { columns: 132, rows: 300 }, 5, 0, &mut bytes);
        assert_eq!(bytes, [132, 0, 0x2c, 1, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let mut part = [0xee; 3];
        read(Size::default(), 5, 2, &mut part);
        assert_eq!(part, [25, 0, 5]);
        read(Size::default(), 5, u32::MAX, &mut part);
        assert_eq!(part, [0; 3]);
    }

    #[test]
    fn a69_only_the_emergency_character_can_be_written() {
        assert_eq!(emergency(8, b"x"), Some(b'x'));
        assert_eq!(emergency(8, &[b'x', 0, 0, 0]), Some(b'x'));
        for (offset, bytes) in [(0, &b"x"[..]), (7, b"xy"), (9, b"x"), (8, b""), (8, b"12345")] {
            assert_eq!(emergency(offset, bytes), None, "{offset} {bytes:?}");
        }
    }

    #[test]
    fn feature_names_are_found_however_they_are_spelt() {
        for name in ["VIRTIO_CONSOLE_F_EMERG_WRITE", "emerg-write", "EMERG_WRITE"] {
            assert_eq!(feature::by_name(name), Some(feature::EMERG_WRITE), "{name}");
        }
        assert_eq!(feature::by_name("VIRTIO_NET_F_MQ"), None);
    }
}
