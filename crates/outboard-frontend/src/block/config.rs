//! The block device's configuration space (virtio 1.3 §5.2.4), decoded for people and for the driver.
//!
//! Invariant: what a [`BlockConfig`] holds has been checked, so that the driver can divide by the block
//! size and multiply the capacity without looking again; fields whose feature was not offered are `None`.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

/// Bytes of one sector: the unit of every address and length in the protocol, whatever the block size.
pub const SECTOR: u64 = 512;

pub use outboard_protocol::features::block as features;

/// The configuration space as it lies on the wire, up to the write-zeroes fields: 60 bytes.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawConfig {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    cylinders: U16,
    heads: u8,
    sectors: u8,
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
}

/// Bytes of configuration that the driver reads.
pub const CONFIG_SIZE: u32 = 60;
const _: () = assert!(size_of::<RawConfig>() == 60);

/// Cylinders, heads and sectors of an old disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Number of cylinders.
    pub cylinders: u16,
    /// Number of heads.
    pub heads: u8,
    /// Sectors of a track.
    pub sectors: u8,
}

/// Where the device likes its input and output to begin, end and be sized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Logical blocks of one physical block, as a power of two.
    pub physical_block_exp: u8,
    /// First aligned logical block.
    pub alignment_offset: u8,
    /// Smallest good request, in logical blocks.
    pub min_io_blocks: u16,
    /// Best request, in logical blocks; 0 = not said.
    pub opt_io_blocks: u32,
}

/// Limits of the discard command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardLimits {
    /// Most sectors of one segment.
    pub max_sectors: u32,
    /// Most segments of one request.
    pub max_segments: u32,
    /// Granularity, in sectors.
    pub alignment: u32,
}

/// Limits of the write-zeroes command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteZeroesLimits {
    /// Most sectors of one segment.
    pub max_sectors: u32,
    /// Most segments of one request.
    pub max_segments: u32,
    /// Whether the device may really free the range when asked to.
    pub may_unmap: bool,
}

/// A block device's configuration, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockConfig {
    /// Size of the disk in sectors of 512 bytes.
    pub capacity: u64,
    /// Whether the device refuses writes.
    pub read_only: bool,
    /// Whether flush is understood.
    pub flush: bool,
    /// Largest segment in bytes; at least a sector. A device that says less (qemu-storage-daemon says 0)
    /// has no limit.
    pub size_max: Option<u32>,
    /// Most data segments of one request; at least 1.
    pub seg_max: Option<u32>,
    /// Old disk geometry.
    pub geometry: Option<Geometry>,
    /// Logical block size in bytes: a power of two, 512 when the device does not say.
    pub block_size: u32,
    /// Alignment and size hints.
    pub topology: Option<Topology>,
    /// Whether a write cache is on, when the device says so.
    pub writeback: Option<bool>,
    /// Number of request queues; 1 when the device does not say.
    pub num_queues: u16,
    /// Discard, when understood.
    pub discard: Option<DiscardLimits>,
    /// Write zeroes, when understood.
    pub write_zeroes: Option<WriteZeroesLimits>,
}

/// A configuration no block device may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Fewer bytes than the structure has.
    #[error("the block configuration is {got} bytes, {CONFIG_SIZE} are needed")]
    Short {
        /// Bytes that came.
        got: usize,
    },
    /// The capacity in bytes does not fit into 64 bits.
    #[error("a capacity of {0} sectors does not fit into 64 bits of bytes")]
    Capacity(u64),
    /// The block size is no power of two, or below a sector.
    #[error("block size {0} is no power of two of at least 512")]
    BlockSize(u32),
    /// A multi-queue device without a queue.
    #[error("the device offers multi-queue and says it has 0 queues")]
    NoQueues,
}

impl BlockConfig {
    /// Decodes the configuration of a device that offers `features`.
    ///
    /// # Errors
    /// A [`ConfigError`] when a field holds a value that the driver could not work with.
    pub fn parse(bytes: &[u8], features: u64) -> Result<Self, ConfigError> {
        let (raw, _) = RawConfig::read_from_prefix(bytes)
            .map_err(|_| ConfigError::Short { got: bytes.len() })?;
        let has = |bit: u64| features & bit != 0;
        let capacity = raw.capacity.get();
        if capacity.checked_mul(SECTOR).is_none() {
            return Err(ConfigError::Capacity(capacity));
        }
        let block_size = if has(features::BLK_SIZE) { raw.blk_size.get() } else { 512 };
        if block_size < 512 || !block_size.is_power_of_two() {
            return Err(ConfigError::BlockSize(block_size));
        }
        let num_queues = if has(features::MQ) { raw.num_queues.get() } else { 1 };
        if num_queues == 0 {
            return Err(ConfigError::NoQueues);
        }
        Ok(Self {
            capacity,
            read_only: has(features::RO),
            flush: has(features::FLUSH),
            size_max: has(features::SIZE_MAX)
                .then_some(raw.size_max.get())
                .filter(|&max| max >= 512),
            seg_max: has(features::SEG_MAX).then(|| raw.seg_max.get().max(1)),
            geometry: has(features::GEOMETRY).then(|| raw.geometry()),
            block_size,
            topology: has(features::TOPOLOGY).then(|| raw.topology()),
            writeback: has(features::CONFIG_WCE).then_some(raw.writeback != 0),
            num_queues,
            discard: has(features::DISCARD).then(|| raw.discard()),
            write_zeroes: has(features::WRITE_ZEROES).then(|| raw.write_zeroes()),
        })
    }

    /// Size of the disk in bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.capacity.saturating_mul(SECTOR)
    }
}

impl RawConfig {
    fn geometry(&self) -> Geometry {
        Geometry { cylinders: self.cylinders.get(), heads: self.heads, sectors: self.sectors }
    }

    fn topology(&self) -> Topology {
        Topology {
            physical_block_exp: self.physical_block_exp,
            alignment_offset: self.alignment_offset,
            min_io_blocks: self.min_io_size.get(),
            opt_io_blocks: self.opt_io_size.get(),
        }
    }

    fn discard(&self) -> DiscardLimits {
        DiscardLimits {
            max_sectors: self.max_discard_sectors.get(),
            max_segments: self.max_discard_seg.get(),
            alignment: self.discard_sector_alignment.get(),
        }
    }

    fn write_zeroes(&self) -> WriteZeroesLimits {
        WriteZeroesLimits {
            max_sectors: self.max_write_zeroes_sectors.get(),
            max_segments: self.max_write_zeroes_seg.get(),
            may_unmap: self.write_zeroes_may_unmap != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(capacity: u64, blk_size: u32, queues: u16) -> Vec<u8> {
        let mut bytes = vec![0; 60];
        bytes[0..8].copy_from_slice(&capacity.to_le_bytes());
        bytes[12..16].copy_from_slice(&126u32.to_le_bytes());
        bytes[20..24].copy_from_slice(&blk_size.to_le_bytes());
        bytes[34..36].copy_from_slice(&queues.to_le_bytes());
        bytes
    }

    #[test]
    fn fields_without_their_feature_are_not_looked_at() {
        let config =
            BlockConfig::parse(&bytes(8, 3, 0), 0).expect("nothing offered, nothing wrong");
        assert_eq!((config.block_size, config.num_queues, config.seg_max), (512, 1, None));
        assert_eq!(config.bytes(), 4096);
    }

    #[test]
    fn a_capacity_that_overflows_in_bytes_is_refused() {
        assert_eq!(
            BlockConfig::parse(&bytes(1 << 60, 512, 1), 0),
            Err(ConfigError::Capacity(1 << 60))
        );
    }

    #[test]
    fn a_block_size_one_cannot_divide_by_is_refused() {
        for size in [0, 1, 511, 513, 4095] {
            assert_eq!(
                BlockConfig::parse(&bytes(8, size, 1), features::BLK_SIZE),
                Err(ConfigError::BlockSize(size))
            );
        }
    }

    #[test]
    fn no_queues_and_short_bytes_are_refused() {
        assert_eq!(BlockConfig::parse(&bytes(8, 512, 0), features::MQ), Err(ConfigError::NoQueues));
        assert_eq!(BlockConfig::parse(&[0; 59], 0), Err(ConfigError::Short { got: 59 }));
    }

    #[test]
    fn a_segment_size_below_a_sector_is_no_limit() {
        let mut raw = bytes(8, 512, 1);
        let config = BlockConfig::parse(&raw, features::SIZE_MAX).expect("it is legal");
        assert_eq!(config.size_max, None);
        raw[8..12].copy_from_slice(&4096u32.to_le_bytes());
        let config = BlockConfig::parse(&raw, features::SIZE_MAX).expect("it is legal");
        assert_eq!(config.size_max, Some(4096));
    }

    #[test]
    fn a_segment_limit_of_zero_still_lets_one_segment_through() {
        let mut raw = bytes(8, 512, 1);
        raw[12..16].fill(0);
        let config = BlockConfig::parse(&raw, features::SEG_MAX).expect("it is legal");
        assert_eq!(config.seg_max, Some(1));
    }
}
