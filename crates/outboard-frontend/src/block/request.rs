//! One block request as it lies in guest memory (virtio 1.3 §5.2.6): a 16-byte header that the device
//! reads, data, and one status byte that it writes.
//!
//! Invariant: each request under way has a slot of its own, one cache line, so that two requests never
//! share a header or a status:
//! ```text
//!  0         16          32      52       63  64
//!  | header  | discard   | id    |        |st|
//! ```

/// Bytes of one slot.
pub(super) const SLOT_SIZE: usize = 64;
/// A slot in pairs of 32-bit words, which is how it is written and read.
pub(super) const SLOT_PAIRS: u16 = 8;
/// Offset of the discard or write-zeroes segment in a slot.
pub(super) const SEGMENT_AT: u64 = 16;
/// Offset of the device's id string in a slot.
pub(super) const ID_AT: u64 = 32;
/// Length of the id string.
pub(super) const ID_SIZE: u32 = 20;
/// Offset of the status byte in a slot: the last of the last pair.
pub(super) const STATUS_AT: u64 = 63;
/// The last pair before the device writes its status: a value that no device may write.
pub(super) const STATUS_UNSET: (u32, u32) = (0, 0xff00_0000);

const HEADER_SIZE: u32 = 16;
const SEGMENT_SIZE: u32 = 16;

/// What a request asks the device to do. Sectors are 512 bytes; data ranges are guest addresses and
/// lengths in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation<'a> {
    /// Fill the ranges with what the disk holds from `sector` on.
    Read {
        /// First sector.
        sector: u64,
        /// Where the data goes.
        data: &'a [(u64, u32)],
    },
    /// Write the ranges to the disk from `sector` on.
    Write {
        /// First sector.
        sector: u64,
        /// Where the data lies.
        data: &'a [(u64, u32)],
    },
    /// Make everything that was finished before durable.
    Flush,
    /// The contents of these sectors are not needed any more.
    Discard {
        /// First sector.
        sector: u64,
        /// Number of sectors.
        sectors: u32,
    },
    /// These sectors shall read as zeros.
    WriteZeroes {
        /// First sector.
        sector: u64,
        /// Number of sectors.
        sectors: u32,
        /// The device may free the space.
        unmap: bool,
    },
    /// The device's id string, 20 bytes.
    GetId,
}

impl Operation<'_> {
    /// The operation in a word.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Read { .. } => "read",
            Self::Write { .. } => "write",
            Self::Flush => "flush",
            Self::Discard { .. } => "discard",
            Self::WriteZeroes { .. } => "write zeroes",
            Self::GetId => "get id",
        }
    }

    /// First sector, 0 where there is none.
    #[must_use]
    pub const fn sector(&self) -> u64 {
        match self {
            Self::Read { sector, .. }
            | Self::Write { sector, .. }
            | Self::Discard { sector, .. }
            | Self::WriteZeroes { sector, .. } => *sector,
            Self::Flush | Self::GetId => 0,
        }
    }

    /// The 16 bytes of the header: type, priority, sector.
    pub(super) const fn header(&self) -> [(u32, u32); 2] {
        let (kind, sector) = match *self {
            Self::Read { sector, .. } => (0, sector),
            Self::Write { sector, .. } => (1, sector),
            Self::Flush => (4, 0),
            Self::GetId => (8, 0),
            Self::Discard { .. } => (11, 0),
            Self::WriteZeroes { .. } => (13, 0),
        };
        [(kind, 0), halves(sector)]
    }

    /// The 16 bytes of a discard or write-zeroes segment: sector, number of sectors, flags.
    pub(super) const fn segment(&self) -> Option<[(u32, u32); 2]> {
        match *self {
            Self::Discard { sector, sectors } => Some([halves(sector), (sectors, 0)]),
            Self::WriteZeroes { sector, sectors, unmap } => {
                Some([halves(sector), (sectors, if unmap { 1 } else { 0 })])
            }
            _ => None,
        }
    }

    /// Bytes that the device may write, the status included.
    pub(super) fn room(&self) -> u64 {
        match *self {
            Self::Read { data, .. } => data.iter().map(|&(_, len)| u64::from(len)).sum::<u64>() + 1,
            Self::GetId => u64::from(ID_SIZE) + 1,
            _ => 1,
        }
    }

    /// The descriptor chain of the request in the slot at `slot`: what the device reads, then what it
    /// writes.
    pub(super) fn chain(
        &self,
        slot: u64,
        readable: &mut Vec<(u64, u32)>,
        writable: &mut Vec<(u64, u32)>,
    ) {
        readable.clear();
        writable.clear();
        readable.push((slot, HEADER_SIZE));
        match *self {
            Self::Read { data, .. } => writable.extend_from_slice(data),
            Self::Write { data, .. } => readable.extend_from_slice(data),
            Self::Flush => {}
            Self::Discard { .. } | Self::WriteZeroes { .. } => {
                readable.push((slot.wrapping_add(SEGMENT_AT), SEGMENT_SIZE));
            }
            Self::GetId => writable.push((slot.wrapping_add(ID_AT), ID_SIZE)),
        }
        writable.push((slot.wrapping_add(STATUS_AT), 1));
    }
}

/// Low and high half, in the order they have in memory.
const fn halves(value: u64) -> (u32, u32) {
    let bytes = value.to_le_bytes();
    let [a, b, c, d, e, f, g, h] = bytes;
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}

/// How the device finished a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// It failed.
    IoError,
    /// The device does not do this.
    Unsupported,
}

impl Status {
    /// The status out of a slot's last pair.
    pub(super) const fn from_pair((_, high): (u32, u32)) -> Result<Self, u8> {
        let [.., byte] = high.to_le_bytes();
        match byte {
            0 => Ok(Self::Ok),
            1 => Ok(Self::IoError),
            2 => Ok(Self::Unsupported),
            other => Err(other),
        }
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Self::Ok => "done",
            Self::IoError => "i/o error",
            Self::Unsupported => "not supported by the device",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Ranges = Vec<(u64, u32)>;

    fn chain(operation: Operation<'_>) -> (Ranges, Ranges) {
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        operation.chain(0x1000, &mut readable, &mut writable);
        (readable, writable)
    }

    #[test]
    fn data_of_a_read_is_writable_and_the_status_comes_last() {
        let (readable, writable) = chain(Operation::Read { sector: 7, data: &[(0x9000, 4096)] });
        assert_eq!(readable, [(0x1000, 16)]);
        assert_eq!(writable, [(0x9000, 4096), (0x103f, 1)]);
        let header = Operation::Read { sector: 0x1_0000_0007, data: &[] }.header();
        assert_eq!(header, [(0, 0), (7, 1)]);
    }

    #[test]
    fn a_discard_carries_its_range_and_no_sector_in_the_header() {
        let operation = Operation::Discard { sector: 0x0102, sectors: 8 };
        assert_eq!(chain(operation).0, [(0x1000, 16), (0x1010, 16)]);
        assert_eq!(operation.header(), [(11, 0), (0, 0)]);
        assert_eq!(operation.segment(), Some([(0x0102, 0), (8, 0)]));
        let zeroes = Operation::WriteZeroes { sector: 1, sectors: 2, unmap: true };
        assert_eq!(zeroes.segment(), Some([(1, 0), (2, 1)]));
    }

    #[test]
    fn a_status_that_does_not_exist_is_no_status() {
        assert_eq!(Status::from_pair((9, 0x0200_0000)), Ok(Status::Unsupported));
        assert_eq!(Status::from_pair((0, 0x03ff_ffff)), Err(3));
        assert_eq!(Status::from_pair(STATUS_UNSET), Err(0xff));
    }
}
