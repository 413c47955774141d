//! Feature bits and configuration space of the block device, to the byte (virtio 1.3 §5.2.3,
//! §5.2.4).
//!
//! ```text
//!  0 capacity  8 size_max  12 seg_max  16 geometry  20 blk_size  24 topology  32 writeback
//!  33 –  34 num_queues  36 discard  48 write zeroes  60 secure erase  72 zoned        96 end
//! ```
//! Invariant: a field whose feature this device never offers reads as zeros, and byte 32 is the
//! only one that a driver can change.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::image::Image;

/// Feature bits of virtio 1.3 §5.2.3, as masks. Not offered: SIZE_MAX (any length is served), GEOMETRY, LIFETIME,
/// SECURE_ERASE and ZONED.
pub mod feature {
    pub use outboard::protocol::features::block::*;

    /// The bit that `name` stands for: `VIRTIO_BLK_F_DISCARD`, `DISCARD`, `discard`.
    #[must_use]
    pub fn by_name(name: &str) -> Option<u64> {
        crate::features::by_name("VIRTIO_BLK_F_", &NAMES, name)
    }
}

/// Bytes of a sector, the unit of all positions and lengths whatever `blk_size` is.
pub const SECTOR: u64 = 512;
/// Bytes of the configuration space.
pub const CONFIG_SIZE: u32 = 96;
/// Most segments of one discard request.
pub(crate) const MAX_DISCARD_SEGMENTS: u32 = 32;
/// Most segments of one write-zeroes request.
pub(crate) const MAX_WRITE_ZEROES_SEGMENTS: u32 = 8;
/// Most sectors of one segment of a discard or write-zeroes request: 2 GiB. It bounds the time of
/// one request.
pub(crate) const MAX_CLEAR_SECTORS: u32 = 1 << 22;
/// Largest `seg_max`: front-ends with rings of 128 are common, and header and status need one
/// descriptor each. A chain longer than its ring is broken, in an indirect table too.
const LARGEST_SEG_MAX: u16 = 128 - 2;
/// Offset of `writeback`.
const WRITEBACK_AT: usize = std::mem::offset_of!(Layout, writeback);

/// `struct virtio_blk_config`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Layout {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    geometry: [u8; 4],
    blk_size: U32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: U16,
    opt_io_size: U32,
    writeback: u8,
    unused0: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
    secure_erase: [u8; 12],
    zoned: [u8; 24],
}

const _: () = assert!(size_of::<Layout>() == CONFIG_SIZE as usize);

/// The configuration space of one disk, apart from `writeback` and the capacity, which change while
/// it runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Config {
    layout: Layout,
    /// The feature bits that go with it.
    pub(crate) features: u64,
}

impl Config {
    /// Describes `image`, behind `queues` queues of at most `queue_size` entries.
    pub(crate) fn new(image: &Image, queues: u16, queue_size: u16) -> Self {
        let geometry = image.geometry();
        let per_physical = geometry.physical_block_size / geometry.block_size;
        let exponent = per_physical.checked_ilog2().unwrap_or(0);
        let mut layout = Layout {
            capacity: U64::new(image.sectors()),
            size_max: U32::ZERO,
            seg_max: U32::new(u32::from(queue_size.saturating_sub(2).clamp(1, LARGEST_SEG_MAX))),
            geometry: [0; 4],
            blk_size: U32::new(geometry.block_size),
            physical_block_exp: u8::try_from(exponent).unwrap_or(0),
            alignment_offset: 0,
            min_io_size: U16::new(u16::try_from(per_physical).unwrap_or(1)),
            opt_io_size: U32::ZERO,
            writeback: 0,
            unused0: 0,
            num_queues: U16::new(queues),
            max_discard_sectors: U32::ZERO,
            max_discard_seg: U32::ZERO,
            discard_sector_alignment: U32::ZERO,
            max_write_zeroes_sectors: U32::ZERO,
            max_write_zeroes_seg: U32::ZERO,
            write_zeroes_may_unmap: 0,
            unused1: [0; 3],
            secure_erase: [0; 12],
            zoned: [0; 24],
        };
        let mut features = feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::FLUSH
            | feature::TOPOLOGY
            | feature::CONFIG_WCE
            | feature::MQ;
        if image.read_only() {
            features |= feature::RO;
        } else {
            features |= feature::DISCARD | feature::WRITE_ZEROES;
            let granularity = u64::from(geometry.physical_block_size) / SECTOR;
            layout.max_discard_sectors = U32::new(MAX_CLEAR_SECTORS);
            layout.max_discard_seg = U32::new(MAX_DISCARD_SEGMENTS);
            layout.discard_sector_alignment = U32::new(u32::try_from(granularity).unwrap_or(1));
            layout.max_write_zeroes_sectors = U32::new(MAX_CLEAR_SECTORS);
            layout.max_write_zeroes_seg = U32::new(MAX_WRITE_ZEROES_SEGMENTS);
            layout.write_zeroes_may_unmap = 1;
        }
        Self { layout, features }
    }

    /// The same for a disk of that many sectors.
    pub(crate) fn with_capacity(mut self, sectors: u64) -> Self {
        self.layout.capacity = U64::new(sectors);
        self
    }

    /// Copies bytes out; what lies behind the end reads as zero.
    pub(crate) fn read(&self, writeback: bool, offset: u32, to: &mut [u8]) {
        let layout = Layout { writeback: u8::from(writeback), ..self.layout };
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let from = layout.as_bytes().get(at..).unwrap_or_default();
        for (index, byte) in to.iter_mut().enumerate() {
            *byte = from.get(index).copied().unwrap_or(0);
        }
    }

    /// What a write of `bytes` at `offset` makes of `writeback`; bytes that stay what they are may
    /// be written.
    ///
    /// # Errors
    /// The number of the first byte that cannot become what was written.
    pub(crate) fn write(&self, writeback: bool, offset: u32, bytes: &[u8]) -> Result<bool, usize> {
        let layout = Layout { writeback: u8::from(writeback), ..self.layout };
        let mut writeback = writeback;
        let mut at = usize::try_from(offset).unwrap_or(usize::MAX);
        for &byte in bytes {
            match (at, byte) {
                (WRITEBACK_AT, 0 | 1) => writeback = byte == 1,
                _ if layout.as_bytes().get(at) == Some(&byte) => {}
                _ => return Err(at),
            }
            at = at.saturating_add(1);
        }
        Ok(writeback)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::image::Geometry;

    fn image(read_only: bool) -> Image {
        let geometry = Geometry { size: 1 << 20, block_size: 512, physical_block_size: 4096 };
        Image::for_tests(geometry, read_only)
    }

    fn bytes(config: &Config, writeback: bool) -> [u8; 96] {
        let mut bytes = [0xee; 96];
        config.read(writeback, 0, &mut bytes);
        bytes
    }

    #[test]
    fn the_configuration_of_a_writable_disk_is_right_to_the_byte() {
        let config = Config::new(&image(false), 4, 1024);
        let mut expected = [0; 96];
        expected[0..8].copy_from_slice(&2048_u64.to_le_bytes());
        expected[12..16].copy_from_slice(&126_u32.to_le_bytes());
        expected[20..24].copy_from_slice(&512_u32.to_le_bytes());
        expected[24] = 3;
        expected[26..28].copy_from_slice(&8_u16.to_le_bytes());
        expected[32] = 1;
        expected[34..36].copy_from_slice(&4_u16.to_le_bytes());
        expected[36..40].copy_from_slice(&(1_u32 << 22).to_le_bytes());
        expected[40..44].copy_from_slice(&32_u32.to_le_bytes());
        expected[44..48].copy_from_slice(&8_u32.to_le_bytes());
        expected[48..52].copy_from_slice(&(1_u32 << 22).to_le_bytes());
        expected[52..56].copy_from_slice(&8_u32.to_le_bytes());
        expected[56] = 1;
        assert_eq!(bytes(&config, true), expected);
        assert_eq!(config.features, 0x7e44);
    }

    #[test]
    fn a_read_only_disk_says_so_and_offers_nothing_that_writes() {
        let config = Config::new(&image(true), 1, 64);
        assert_eq!(config.features, 0x1e64);
        let bytes = bytes(&config, false);
        assert_eq!(bytes[12..16], 62_u32.to_le_bytes());
        assert_eq!(bytes[32..34], [0, 0]);
        assert_eq!(bytes[36..], [0; 60]);
    }

    #[test]
    fn bytes_behind_the_configuration_read_as_zero() {
        let config = Config::new(&image(false), 1, 64);
        let mut bytes = [0xee; 8];
        config.read(true, 54, &mut bytes);
        assert_eq!(bytes, [0, 0, 1, 0, 0, 0, 0, 0]);
        bytes = [0xee; 8];
        config.read(true, 93, &mut bytes);
        assert_eq!(bytes, [0; 8]);
        config.read(true, u32::MAX, &mut bytes);
        assert_eq!(bytes, [0; 8]);
    }

    #[test]
    fn a69_only_the_cache_mode_can_be_written() {
        let config = Config::new(&image(false), 1, 64);
        assert_eq!(config.write(true, 32, &[0]), Ok(false));
        assert_eq!(config.write(false, 32, &[1]), Ok(true));
        assert_eq!(config.write(false, 32, &[2]), Err(32));
        assert_eq!(config.write(true, 32, &[]), Ok(true));
        // Straddling its neighbours, which keep their values (num_queues is 1) …
        assert_eq!(config.write(true, 31, &[0, 0, 0, 1, 0]), Ok(false));
        // … or do not.
        assert_eq!(config.write(true, 31, &[0, 0, 0, 2, 0]), Err(34));
        assert_eq!(config.write(true, 0, &[1]), Err(0));
        assert_eq!(config.write(true, 95, &[0, 0]), Err(96));
        assert_eq!(config.write(true, 0xffff_ff00, &[0]), Err(0xffff_ff00));
        let mut whole = bytes(&config, true);
        whole[32] = 0;
        assert_eq!(config.write(true, 0, &whole), Ok(false));
    }

    #[test]
    fn feature_names_are_found_however_they_are_spelt() {
        for name in ["VIRTIO_BLK_F_WRITE_ZEROES", "write_zeroes", "write-zeroes", "WRITE_ZEROES"] {
            assert_eq!(feature::by_name(name), Some(feature::WRITE_ZEROES), "{name}");
        }
        assert_eq!(feature::by_name("VIRTIO_NET_F_MQ"), None);
        assert_eq!(feature::by_name(""), None);
    }
}
