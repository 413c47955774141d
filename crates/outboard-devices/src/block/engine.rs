//! How operations reach the image: system calls of our own, or io_uring (design §2, [`Engine`]);
//! `mapped.rs` has copies for files that live in memory.
//!
//! | image | `auto` takes | why (4 KiB, one at a time and in batches of 32) |
//! |---|---|---|
//! | lives in memory: tmpfs, ramfs, hugetlbfs, DAX, `ram:` | mmap | a copy takes 0.1–0.3 µs, `preadv` 1.2–1.8 µs, io_uring 6.8 and 2.8–3.7 µs: the kernel punts such reads to threads |
//! | anything else | io_uring, or system calls where it is refused | the worker goes on while the disk works; what the page cache has is read at once (`RWF_NOWAIT`) |
//! | `null:` | nothing | |
//!
//! An engine moves bytes and says how many; what that means for the request is its job's business.
//! Invariant: a transfer that O_DIRECT does not take as it lies goes through an aligned buffer of
//! bounded size, or, at an unaligned position, through the page cache, which the kernel keeps in
//! step.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::sync::Arc;

use outboard::memory::Segment;
use outboard::{Error, FileId, FileOp, Request, Served, WorkerContext};
use rustix::fs::FallocateFlags;
use rustix::io::retry_on_intr;
use tracing::warn;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::image::{Alignment, Direct, Image};
use super::mapped::MmapEngine;

/// Pages of the buffer for unaligned transfers: 256 KiB.
const BOUNCE_PAGES: usize = 64;
/// How often the page of zeros is repeated in one call: 1 MiB.
const ZERO_PAGES: usize = 256;
/// How many reads go straight to the disk after one that was not in the page cache.
const AFTER_MISS: u32 = 15;
static ZEROS: Page = Page([0; 4096]);

/// An operation on the image; positions and lengths in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Fill what is left of the request's writable bytes.
    Read {
        /// First byte.
        offset: u64,
    },
    /// Store what is left of its readable bytes.
    Write {
        /// First byte.
        offset: u64,
    },
    /// Make finished writes durable.
    Sync,
    /// Change how a range is stored.
    Allocate {
        /// To what.
        how: How,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// Write zeros.
    WriteZeros {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
}

/// How a range is to be stored; fallocate(2), never beyond the end of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// As a hole, which reads as zeros.
    Punch,
    /// As zeros that keep their space.
    Zero,
    /// With space, whatever it holds.
    Reserve,
}

impl How {
    fn flags(self) -> FallocateFlags {
        FallocateFlags::KEEP_SIZE
            | match self {
                Self::Punch => FallocateFlags::PUNCH_HOLE,
                Self::Zero => FallocateFlags::ZERO_RANGE,
                Self::Reserve => FallocateFlags::empty(),
            }
    }
}

/// Carries out operations for one worker.
pub trait Engine {
    /// Carries out `op` now and answers the bytes that it moved, which may be fewer than asked
    /// for; at the end of the file 0.
    ///
    /// # Errors
    /// What the system says; nothing of this call was moved then.
    fn run(&mut self, op: Op, request: &mut Request<'_>) -> io::Result<u64>;

    /// Carries out `op` now if that is better than to start it; None: it is to be started.
    fn now(&mut self, op: Op, request: &mut Request<'_>) -> Option<io::Result<u64>> {
        Some(self.run(op, request))
    }

    /// Starts `op`; [`outboard::Worker::completed`] hears of its end with `token`.
    ///
    /// # Errors
    /// The request: `op` is to be run instead.
    fn start<'a>(
        &mut self,
        op: Op,
        request: Request<'a>,
        token: u64,
    ) -> Result<Served, Request<'a>> {
        let _ = (op, token);
        Err(request)
    }
}

/// Which engine a disk runs on. An image that stores nothing has one of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineKind {
    /// Copies for files that live in memory, io_uring for others where it can be had, system calls
    /// else.
    #[default]
    Auto,
    /// System calls.
    Sync,
    /// io_uring.
    Uring,
    /// Copies from and to the mapped file, of what is in memory; system calls for the rest.
    Mmap,
}

impl EngineKind {
    pub(crate) fn make(
        self,
        image: &Arc<Image>,
        context: &mut WorkerContext<'_>,
    ) -> Result<Box<dyn Engine>, Error> {
        let chosen = self.choose(image, context)?;
        image.reached_by(if image.stores_nothing() { "null" } else { chosen.name() });
        if image.stores_nothing() {
            return Ok(Box::new(NullEngine));
        }
        let sync = SyncEngine::new(Arc::clone(image));
        Ok(match (chosen, image.map()) {
            (Self::Mmap, Ok(map)) => {
                context.inspect().show("image/write-waits", map.waits());
                Box::new(MmapEngine::new(sync, Arc::clone(map)))
            }
            (Self::Uring, _) => {
                let file = context.add_file(Arc::clone(image.file()));
                Box::new(UringEngine { sync, file, skip: 0 })
            }
            _ => Box::new(sync),
        })
    }

    /// What `auto` means here, or whether what was asked for can be had.
    fn choose(self, image: &Image, context: &WorkerContext<'_>) -> Result<Self, Error> {
        let refused = |engine: &str, why: &dyn std::fmt::Display| {
            Err(Error::refused(format!("engine {engine} is not to be had: {why}")))
        };
        match self {
            _ if image.stores_nothing() => Ok(Self::Sync),
            Self::Auto if image.in_memory() => Ok(match image.map() {
                Ok(_) => Self::Mmap,
                Err(why) => {
                    warn!("image {} is not mapped: {why}", image.path().display());
                    Self::Sync
                }
            }),
            Self::Auto if context.can_submit() => Ok(Self::Uring),
            Self::Auto => Ok(Self::Sync),
            Self::Uring if !context.can_submit() => refused("uring", &"io_uring is refused"),
            Self::Mmap => match image.map() {
                Ok(_) => Ok(self),
                Err(why) => refused("mmap", why),
            },
            Self::Uring | Self::Sync => Ok(self),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Sync => "sync",
            Self::Uring => "uring",
            Self::Mmap => "mmap",
        }
    }
}

/// Of a disk that stores nothing: what is written is forgotten, what is read stays as the driver's
/// buffers were.
struct NullEngine;

impl Engine for NullEngine {
    fn run(&mut self, op: Op, request: &mut Request<'_>) -> io::Result<u64> {
        match op {
            Op::Read { .. } => Ok(request.writable().advance_to_end()),
            Op::Write { .. } => Ok(request.readable().skip_to_end()),
            Op::WriteZeros { length, .. } => Ok(length),
            Op::Sync | Op::Allocate { .. } => Ok(0),
        }
    }
}

/// System calls on the worker's thread.
pub struct SyncEngine {
    image: Arc<Image>,
    /// Made at the first unaligned transfer.
    bounce: Vec<Page>,
}

/// Memory that suits every disk's O_DIRECT.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

impl SyncEngine {
    /// An engine on `image`.
    #[must_use]
    pub fn new(image: Arc<Image>) -> Self {
        Self { image, bounce: Vec::new() }
    }

    pub(crate) fn image(&self) -> &Image {
        &self.image
    }

    fn read(&mut self, offset: u64, request: &mut Request<'_>) -> io::Result<u64> {
        let mut to = request.writable();
        let Some(direct) = self.image.direct() else {
            return Ok(to.read_from_file_at(self.image.file(), offset)? as u64);
        };
        match route(direct, offset, to.len(), to.segments()) {
            Route::Direct => Ok(to.read_from_file_at(self.image.file(), offset)? as u64),
            Route::Buffered => Ok(to.read_from_file_at(&direct.buffered, offset)? as u64),
            Route::Bounce => {
                let part = bounce(&mut self.bounce, to.len());
                let file = self.image.file();
                let got = retry_on_intr(|| rustix::io::pread(file, &mut *part, offset))?;
                let got = part.get(..got).unwrap_or_default();
                to.write_all(got).map_err(io::Error::other)?;
                Ok(got.len() as u64)
            }
        }
    }

    fn write(&mut self, offset: u64, request: &mut Request<'_>) -> io::Result<u64> {
        let mut from = request.readable();
        let Some(direct) = self.image.direct() else {
            return Ok(from.write_to_file_at(self.image.file(), offset)? as u64);
        };
        match route(direct, offset, from.len(), from.segments()) {
            Route::Direct => Ok(from.write_to_file_at(self.image.file(), offset)? as u64),
            Route::Buffered => Ok(from.write_to_file_at(&direct.buffered, offset)? as u64),
            Route::Bounce => {
                let part = bounce(&mut self.bounce, from.len());
                from.read_exact(part).map_err(io::Error::other)?;
                write_whole(self.image.file(), direct, part, offset)?;
                Ok(part.len() as u64)
            }
        }
    }

    /// Zeros for the front of a range.
    fn write_zeros(&self, offset: u64, length: u64) -> io::Result<u64> {
        let page = ZEROS.as_bytes();
        let whole = usize::try_from(length / page.len() as u64).unwrap_or(usize::MAX);
        let rest = page.get(..usize::try_from(length).unwrap_or(usize::MAX)).unwrap_or(page);
        let pages = [IoSlice::new(page); ZERO_PAGES];
        let one = [IoSlice::new(rest)];
        let slices = pages.get(..whole.min(ZERO_PAGES)).filter(|s| !s.is_empty()).unwrap_or(&one);
        let length = slices.iter().map(|slice| slice.len() as u64).sum();
        let file = match self.image.direct() {
            Some(direct) if !aligned(direct.alignment.offset, offset, length) => &direct.buffered,
            _ => &**self.image.file(),
        };
        Ok(retry_on_intr(|| rustix::io::pwritev(file, slices, offset))? as u64)
    }
}

impl Engine for SyncEngine {
    fn run(&mut self, op: Op, request: &mut Request<'_>) -> io::Result<u64> {
        let file = self.image.file();
        match op {
            Op::Read { offset } => self.read(offset, request),
            Op::Write { offset } => self.write(offset, request),
            Op::Sync => {
                retry_on_intr(|| rustix::fs::fdatasync(file))?;
                Ok(0)
            }
            Op::Allocate { how, offset, length } => {
                retry_on_intr(|| rustix::fs::fallocate(file, how.flags(), offset, length))?;
                Ok(0)
            }
            Op::WriteZeros { offset, length } => self.write_zeros(offset, length),
        }
    }
}

/// Operations that the kernel carries out while the worker goes on; what it cannot do that way, and
/// reads that need no disk, are left to system calls.
struct UringEngine {
    sync: SyncEngine,
    file: FileId,
    /// Reads that are started without a look into the page cache.
    skip: u32,
}

impl UringEngine {
    fn file_op(&self, op: Op, request: &mut Request<'_>) -> Option<FileOp> {
        let file = self.file;
        let direct = self.sync.image.direct();
        let straight = |offset, length, pieces: &[Segment]| {
            direct
                .is_none_or(|direct| matches!(route(direct, offset, length, pieces), Route::Direct))
        };
        match op {
            Op::Read { offset } => {
                let to = request.writable();
                straight(offset, to.len(), to.segments()).then_some(FileOp::Read { file, offset })
            }
            Op::Write { offset } => {
                let from = request.readable();
                straight(offset, from.len(), from.segments())
                    .then_some(FileOp::Write { file, offset })
            }
            Op::Sync => Some(FileOp::Sync { file }),
            Op::Allocate { how, offset, length } => {
                let mode = how.flags().bits().cast_signed();
                Some(FileOp::Allocate { file, mode, offset, length })
            }
            Op::WriteZeros { .. } => None,
        }
    }

    /// Reads what the page cache holds. After a miss the next reads do not look.
    fn cached(&mut self, offset: u64, request: &mut Request<'_>) -> Option<io::Result<u64>> {
        let image = &self.sync.image;
        if image.direct().is_some() {
            return None;
        }
        if let Some(skip) = self.skip.checked_sub(1) {
            self.skip = skip;
            return None;
        }
        match request.writable().read_cached_at(image.file(), offset) {
            Ok(got) => Some(Ok(got as u64)),
            Err(error) => {
                let waits = error.kind() == io::ErrorKind::WouldBlock;
                self.skip = if waits { AFTER_MISS } else { u32::MAX };
                None
            }
        }
    }
}

impl Engine for UringEngine {
    fn run(&mut self, op: Op, request: &mut Request<'_>) -> io::Result<u64> {
        self.sync.run(op, request)
    }

    fn now(&mut self, op: Op, request: &mut Request<'_>) -> Option<io::Result<u64>> {
        match op {
            Op::Read { offset } => self.cached(offset, request),
            _ => None,
        }
    }

    fn start<'a>(
        &mut self,
        op: Op,
        mut request: Request<'a>,
        token: u64,
    ) -> Result<Served, Request<'a>> {
        match self.file_op(op, &mut request) {
            Some(op) => request.submit(op, token),
            None => Err(request),
        }
    }
}

/// How a transfer goes to an image with O_DIRECT.
#[derive(Debug, PartialEq, Eq)]
enum Route {
    /// As it lies.
    Direct,
    /// Through an aligned buffer: the guest's memory is not aligned.
    Bounce,
    /// Through the page cache: the position is not aligned.
    Buffered,
}

fn route(direct: &Direct, offset: u64, length: u64, pieces: &[Segment]) -> Route {
    let Alignment { memory, offset: unit } = direct.alignment;
    if !aligned(unit, offset, length) {
        return Route::Buffered;
    }
    let suits = |piece: &Segment| aligned(memory, piece.as_ptr().addr() as u64, piece.len() as u64);
    // The kernel also wants each piece's length to be whole units of the file.
    let whole = |piece: &Segment| aligned(unit, 0, piece.len() as u64);
    if pieces.iter().all(|piece| suits(piece) && whole(piece)) {
        Route::Direct
    } else {
        Route::Bounce
    }
}

/// Whether `start` and `length` are multiples of `unit`, a power of two.
fn aligned(unit: u32, start: u64, length: u64) -> bool {
    (start | length) & (u64::from(unit) - 1) == 0
}

/// An aligned buffer for the front of `length` bytes.
fn bounce(pages: &mut Vec<Page>, length: u64) -> &mut [u8] {
    if pages.is_empty() {
        pages.resize(BOUNCE_PAGES, Page::new_zeroed());
    }
    let room = pages.as_mut_slice().as_mut_bytes();
    let part = room.len().min(usize::try_from(length).unwrap_or(usize::MAX));
    room.get_mut(..part).unwrap_or_default()
}

/// Writes a buffer whose bytes have left the request, so that a short transfer must go on here.
fn write_whole(file: &File, direct: &Direct, bytes: &[u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
        let at = offset.saturating_add(done as u64);
        let suits = aligned(direct.alignment.offset, at, 0);
        let file = if suits { file.as_fd() } else { direct.buffered.as_fd() };
        match retry_on_intr(|| rustix::io::pwrite(file, rest, at))? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => done += written,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alignment_looks_at_both_ends() {
        assert!(aligned(512, 0, 0) && aligned(512, 1024, 512) && aligned(1, 3, 7));
        assert!(!aligned(512, 1, 511) && !aligned(4096, 4096, 512) && !aligned(4096, 512, 4096));
    }

    #[test]
    fn direct_access_gets_whole_blocks_and_the_page_cache_the_rest() {
        let direct = Direct {
            alignment: Alignment { memory: 512, offset: 4096 },
            buffered: File::open("/dev/null").expect("a file"),
        };
        for (offset, length, expected) in [
            (0, 4096, Route::Direct),
            (8192, 0, Route::Direct),
            (512, 4096, Route::Buffered),
            (4096, 512, Route::Buffered),
            (4096, 4096 + 512, Route::Buffered),
        ] {
            assert_eq!(route(&direct, offset, length, &[]), expected, "{length} at {offset}");
        }
    }

    #[test]
    fn the_bounce_buffer_is_aligned_and_bounded() {
        let mut pages = Vec::new();
        let part = bounce(&mut pages, u64::MAX);
        assert_eq!(part.len(), 256 << 10);
        assert_eq!(part.as_ptr().addr() % 4096, 0);
        assert_eq!(bounce(&mut pages, 512).len(), 512);
    }
}
