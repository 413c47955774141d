//! Requests: header and segments parsed and checked, before anything is done (virtio 1.3 §5.2.6).
//!
//! ```text
//!  readable:  header 16 │ data of OUT, segments of DISCARD and WRITE_ZEROES
//!  writable:  data of IN and GET_ID                                        │ status 1
//! ```
//! How the bytes are cut into descriptors does not matter. Invariants: every field is copied out of
//! guest memory once; what passes the checks lies inside the disk, in whole sectors, and no sum in
//! here can wrap.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::config::{
    MAX_CLEAR_SECTORS, MAX_DISCARD_SEGMENTS, MAX_WRITE_ZEROES_SEGMENTS, SECTOR, feature,
};

/// VIRTIO_BLK_T_…
pub(crate) mod kind {
    pub(crate) const IN: u32 = 0;
    pub(crate) const OUT: u32 = 1;
    pub(crate) const FLUSH: u32 = 4;
    pub(crate) const GET_ID: u32 = 8;
    pub(crate) const DISCARD: u32 = 11;
    pub(crate) const WRITE_ZEROES: u32 = 13;
}

/// Bit 0 of a segment's flags: the space may be freed.
const UNMAP: u32 = 1;

/// What the status byte tells the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    /// VIRTIO_BLK_S_OK.
    Ok = 0,
    /// VIRTIO_BLK_S_IOERR.
    IoError = 1,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported = 2,
}

/// `struct virtio_blk_req` up to the data.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Header {
    pub(crate) kind: U32,
    pub(crate) ioprio: U32,
    pub(crate) sector: U64,
}

/// `struct virtio_blk_discard_write_zeroes`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Segment {
    pub(crate) sector: U64,
    pub(crate) sectors: U32,
    pub(crate) flags: U32,
}

/// Bytes of a [`Segment`].
const SEGMENT: u64 = size_of::<Segment>() as u64;

/// A request that passed the checks. Positions and lengths are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Fill the writable bytes from `offset` on.
    Read { offset: u64 },
    /// Store the readable bytes from `offset` on.
    Write { offset: u64 },
    /// Make finished writes durable.
    Flush,
    /// The serial number.
    GetId,
    /// Discard what `segments` segments in the readable bytes say.
    Discard { segments: u32 },
    /// Zero what they say.
    WriteZeroes { segments: u32 },
}

/// A part of the disk to be discarded or zeroed, in bytes; inside the disk and not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) offset: u64,
    pub(crate) length: u64,
    /// The space may be freed.
    pub(crate) unmap: bool,
}

/// What requests are checked against.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// Of the disk, in sectors.
    pub(crate) capacity: u64,
    pub(crate) read_only: bool,
    /// Bytes that a discard must be a multiple of to have an effect below.
    pub(crate) granularity: u64,
}

impl Rules {
    /// Checks a header in front of `readable` and `writable` bytes of data, under the `features`
    /// that the driver acknowledged.
    #[inline]
    pub(crate) fn check(
        &self,
        header: &Header,
        readable: u64,
        writable: u64,
        features: u64,
    ) -> Result<Command, Status> {
        let sector = header.sector.get();
        match header.kind.get() {
            kind::IN => {
                let (offset, _) = self.range(sector, sectors(writable)?)?;
                Ok(Command::Read { offset })
            }
            kind::OUT => {
                self.check_writable()?;
                let (offset, _) = self.range(sector, sectors(readable)?)?;
                Ok(Command::Write { offset })
            }
            kind::FLUSH => Ok(Command::Flush),
            kind::GET_ID => Ok(Command::GetId),
            kind::DISCARD => {
                self.check_clearing(features, feature::DISCARD)?;
                Ok(Command::Discard { segments: segments(readable, MAX_DISCARD_SEGMENTS)? })
            }
            kind::WRITE_ZEROES => {
                self.check_clearing(features, feature::WRITE_ZEROES)?;
                let segments = segments(readable, MAX_WRITE_ZEROES_SEGMENTS)?;
                Ok(Command::WriteZeroes { segments })
            }
            _ => Err(Status::Unsupported),
        }
    }

    /// Checks a segment of a discard; None when nothing is to be done.
    pub(crate) fn check_discard(&self, segment: &Segment) -> Result<Option<Range>, Status> {
        // §5.2.6.2: unmap is not for discards, and unknown flags are not supported.
        if segment.flags.get() != 0 {
            return Err(Status::Unsupported);
        }
        let (offset, length) = self.clear_range(segment)?;
        // A discard is a hint: the whole blocks inside the range are enough.
        let end = offset.saturating_add(length);
        let first = offset.checked_next_multiple_of(self.granularity).unwrap_or(u64::MAX);
        let end = end - end.checked_rem(self.granularity).unwrap_or(0);
        let length = end.saturating_sub(first);
        Ok((length > 0).then_some(Range { offset: first, length, unmap: true }))
    }

    /// Checks a segment of a write-zeroes; None when nothing is to be done.
    pub(crate) fn check_write_zeroes(
        &self,
        segment: &Segment,
        features: u64,
    ) -> Result<Option<Range>, Status> {
        let flags = segment.flags.get();
        let unmap = flags & UNMAP != 0;
        if flags & !UNMAP != 0 || (unmap && features & feature::DISCARD == 0) {
            return Err(Status::Unsupported);
        }
        let (offset, length) = self.clear_range(segment)?;
        Ok((length > 0).then_some(Range { offset, length, unmap }))
    }

    fn clear_range(&self, segment: &Segment) -> Result<(u64, u64), Status> {
        let sectors = segment.sectors.get();
        if sectors > MAX_CLEAR_SECTORS {
            return Err(Status::IoError);
        }
        self.range(segment.sector.get(), u64::from(sectors))
    }

    /// The bytes of `sectors` sectors from `sector` on, which must lie inside the disk.
    fn range(&self, sector: u64, sectors: u64) -> Result<(u64, u64), Status> {
        let end = sector.checked_add(sectors).ok_or(Status::IoError)?;
        if end > self.capacity {
            return Err(Status::IoError);
        }
        let bytes = |sectors: u64| sectors.checked_mul(SECTOR).ok_or(Status::IoError);
        Ok((bytes(sector)?, bytes(sectors)?))
    }

    fn check_writable(&self) -> Result<(), Status> {
        if self.read_only { Err(Status::IoError) } else { Ok(()) }
    }

    fn check_clearing(&self, features: u64, needed: u64) -> Result<(), Status> {
        self.check_writable()?;
        if features & needed == 0 { Err(Status::Unsupported) } else { Ok(()) }
    }
}

/// Data comes in whole sectors.
fn sectors(bytes: u64) -> Result<u64, Status> {
    if bytes.is_multiple_of(SECTOR) { Ok(bytes / SECTOR) } else { Err(Status::IoError) }
}

/// Segments come whole, at least one and at most `most`.
fn segments(bytes: u64, most: u32) -> Result<u32, Status> {
    let count = u32::try_from(bytes / SEGMENT).unwrap_or(u32::MAX);
    let whole = bytes.is_multiple_of(SEGMENT);
    if whole && (1..=most).contains(&count) { Ok(count) } else { Err(Status::IoError) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Status::{IoError, Unsupported};

    const ALL: u64 = u64::MAX;
    const DISK: Rules = Rules { capacity: 1000, read_only: false, granularity: 1 };

    fn header(kind: u32, sector: u64) -> Header {
        Header { kind: U32::new(kind), ioprio: U32::new(0xdead), sector: U64::new(sector) }
    }

    fn segment(sector: u64, sectors: u32, flags: u32) -> Segment {
        Segment { sector: U64::new(sector), sectors: U32::new(sectors), flags: U32::new(flags) }
    }

    // R15: the device's arithmetic is checked, on private copies.
    #[test]
    fn b52_b53_reads_and_writes_stay_inside_the_disk_in_whole_sectors() {
        let table = [
            (0, 0, Ok(0)),
            (0, 512, Ok(0)),
            (999, 512, Ok(999 * 512)),
            (1000, 0, Ok(512_000)),
            (0, 512_000, Ok(0)),
            (0, 512_512, Err(IoError)),
            (999, 1024, Err(IoError)),
            (1000, 512, Err(IoError)),
            (1001, 0, Err(IoError)),
            ((1 << 55) - 1, 512, Err(IoError)),
            (1 << 55, 512, Err(IoError)),
            (u64::MAX, 512, Err(IoError)),
            (u64::MAX, 0, Err(IoError)),
            (0, 1, Err(IoError)),
            (0, 511, Err(IoError)),
            (0, 513, Err(IoError)),
            (0, u64::MAX, Err(IoError)),
        ];
        for (sector, bytes, expected) in table {
            let read = DISK.check(&header(kind::IN, sector), 0, bytes, 0);
            let wanted = expected.map(|offset| Command::Read { offset });
            assert_eq!(read, wanted, "read of {bytes} at {sector}");
            let write = DISK.check(&header(kind::OUT, sector), bytes, 0, 0);
            let wanted = expected.map(|offset| Command::Write { offset });
            assert_eq!(write, wanted, "write of {bytes} at {sector}");
        }
    }

    #[test]
    fn a_disk_of_the_largest_size_still_does_not_wrap() {
        let disk = Rules { capacity: u64::MAX, ..DISK };
        let largest = u64::MAX / 512;
        let check = |sector| disk.check(&header(kind::IN, sector), 0, 512, 0);
        assert_eq!(check(largest), Ok(Command::Read { offset: largest * 512 }));
        assert_eq!(check(largest + 1), Err(IoError));
        assert_eq!(check(u64::MAX), Err(IoError));
    }

    #[test]
    fn b51_unknown_kinds_are_not_supported_whatever_comes_with_them() {
        for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 16, 18, 20, 22, 24, 26, 0x8000_0000, u32::MAX] {
            for (readable, writable) in [(0, 0), (512, 0), (0, 512), (16, 20)] {
                let answer = DISK.check(&header(kind, u64::MAX), readable, writable, ALL);
                assert_eq!(answer, Err(Unsupported), "kind {kind}");
            }
        }
    }

    #[test]
    fn b59_a_flush_takes_no_notice_of_what_comes_with_it() {
        let answer = DISK.check(&header(kind::FLUSH, u64::MAX), 77, 78, 0);
        assert_eq!(answer, Ok(Command::Flush));
    }

    #[test]
    fn b57_a_read_only_disk_refuses_everything_that_writes() {
        let disk = Rules { read_only: true, ..DISK };
        for (kind, readable) in [(kind::OUT, 512), (kind::DISCARD, 16), (kind::WRITE_ZEROES, 16)] {
            for features in [0, ALL] {
                assert_eq!(disk.check(&header(kind, 0), readable, 0, features), Err(IoError));
            }
        }
        assert!(disk.check(&header(kind::IN, 0), 0, 512, 0).is_ok());
        assert_eq!(disk.check(&header(kind::FLUSH, 0), 0, 0, 0), Ok(Command::Flush));
    }

    #[test]
    fn b54_segments_come_whole_and_not_too_many() {
        let table = [
            (0, Err(IoError), Err(IoError)),
            (1, Err(IoError), Err(IoError)),
            (15, Err(IoError), Err(IoError)),
            (16, Ok(1), Ok(1)),
            (17, Err(IoError), Err(IoError)),
            (128, Ok(8), Ok(8)),
            (144, Ok(9), Err(IoError)),
            (512, Ok(32), Err(IoError)),
            (528, Err(IoError), Err(IoError)),
            (16 << 20, Err(IoError), Err(IoError)),
            (!15, Err(IoError), Err(IoError)),
        ];
        for (bytes, discard, zeroes) in table {
            let check = |kind| DISK.check(&header(kind, 5), bytes, 0, ALL);
            let discard = discard.map(|segments| Command::Discard { segments });
            assert_eq!(check(kind::DISCARD), discard, "{bytes} bytes");
            let zeroes = zeroes.map(|segments| Command::WriteZeroes { segments });
            assert_eq!(check(kind::WRITE_ZEROES), zeroes, "{bytes} bytes");
        }
    }

    #[test]
    fn commands_that_were_not_negotiated_are_not_supported() {
        let discard = DISK.check(&header(kind::DISCARD, 0), 16, 0, !feature::DISCARD);
        assert_eq!(discard, Err(Unsupported));
        let zeroes = DISK.check(&header(kind::WRITE_ZEROES, 0), 16, 0, !feature::WRITE_ZEROES);
        assert_eq!(zeroes, Err(Unsupported));
    }

    #[test]
    fn b54_ranges_to_clear_stay_inside_the_disk_and_the_limit() {
        let big = Rules { capacity: 1 << 40, ..DISK };
        let table = [
            (0, 1, Ok(Some((0, 512)))),
            (999, 1, Ok(Some((999 * 512, 512)))),
            (0, 1000, Ok(Some((0, 512_000)))),
            (1000, 0, Ok(None)),
            (0, 0, Ok(None)),
            (1001, 0, Err(IoError)),
            (0, 1001, Err(IoError)),
            (1000, 1, Err(IoError)),
            (u64::MAX, 1, Err(IoError)),
            (u64::MAX, u32::MAX, Err(IoError)),
        ];
        for (sector, sectors, expected) in table {
            let bytes = |range: Option<Range>| range.map(|range| (range.offset, range.length));
            let raw = segment(sector, sectors, 0);
            assert_eq!(DISK.check_discard(&raw).map(bytes), expected, "{sector} + {sectors}");
            let zeroes = DISK.check_write_zeroes(&raw, ALL).map(bytes);
            assert_eq!(zeroes, expected, "{sector} + {sectors}");
        }
        let limit = segment(0, MAX_CLEAR_SECTORS, 0);
        assert!(big.check_discard(&limit).is_ok() && big.check_write_zeroes(&limit, ALL).is_ok());
        let above = segment(0, MAX_CLEAR_SECTORS + 1, 0);
        assert_eq!(big.check_discard(&above), Err(IoError));
        assert_eq!(big.check_write_zeroes(&above, ALL), Err(IoError));
    }

    #[test]
    fn b54_b55_flags_are_supported_only_where_they_have_a_meaning() {
        for flags in [1, 2, 3, 0x8000_0000, u32::MAX] {
            assert_eq!(DISK.check_discard(&segment(0, 1, flags)), Err(Unsupported));
        }
        for flags in [2, 3, 0x8000_0000, u32::MAX] {
            assert_eq!(DISK.check_write_zeroes(&segment(0, 1, flags), ALL), Err(Unsupported));
        }
        let unmap = segment(0, 1, UNMAP);
        assert!(DISK.check_write_zeroes(&unmap, ALL).is_ok_and(|r| r.is_some_and(|r| r.unmap)));
        assert_eq!(DISK.check_write_zeroes(&unmap, !feature::DISCARD), Err(Unsupported));
        let plain = DISK.check_write_zeroes(&segment(0, 1, 0), !feature::DISCARD);
        assert!(plain.is_ok_and(|range| range.is_some_and(|range| !range.unmap)));
    }

    #[test]
    fn a_discard_on_larger_blocks_is_rounded_to_those_inside() {
        let disk = Rules { granularity: 4096, ..DISK };
        let table = [
            (0, 8, Some((0, 4096))),
            (1, 8, None),
            (1, 15, Some((4096, 4096))),
            (7, 2, None),
            (8, 17, Some((4096, 8192))),
            (1, 3, None),
        ];
        for (sector, sectors, expected) in table {
            let range = disk.check_discard(&segment(sector, sectors, 0)).expect("in range");
            let range = range.map(|range| (range.offset, range.length));
            assert_eq!(range, expected, "{sector} + {sectors}");
        }
    }
}
