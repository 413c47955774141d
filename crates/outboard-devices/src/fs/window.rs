//! The DAX window: parts of files that the guest sees as memory (virtio 1.3 §5.11.6.4), in the device's
//! shared-memory region 0, through SHMEM_MAP and SHMEM_UNMAP of the front-end.
//!
//! ```text
//!  SETUPMAPPING ─▶ cut out what is there ─▶ SHMEM_UNMAP ─▶ its rests, the new piece ─▶ SHMEM_MAP ─▶ table
//! ```
//! A mapping over others replaces them, whole or in part, but not in one step: vhost-user has none for it. So a
//! mapping that is asked for again with no more than it has stays as it is.
//!
//! Invariants: nothing lies outside of the window, nor overlaps; a piece is in the table until the front-end has
//! given it up. Who waits for the front-end holds `turn` alone, which the session's thread never takes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outboard::{
    Access, BackendChannel, ChannelError, Error, MappingError, MappingSource, SharedMemoryMapper,
    SharedMemoryRegion,
};
use rustix::fs::fstat;
use rustix::io::Errno;
use tracing::warn;

/// The window's number among the device's regions (VIRTIO_FS_SHMCAP_ID_CACHE).
const REGION: u8 = 0;
/// What Linux maps at once, in bytes; windows are made of so many.
pub(super) const UNIT: u64 = 2 << 20;
/// Pieces that a window may have beside those that Linux makes.
const FEW: u64 = 512;
/// Largest window, in bytes.
pub(super) const MOST_WINDOW: u64 = 1 << 40;

/// A part of a file at a place in the window.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    /// First byte in the window.
    pub(super) at: u64,
    /// Bytes.
    pub(super) length: u64,
    /// What the guest calls the file.
    pub(super) node: u64,
    pub(super) file: Arc<File>,
    /// First byte in the file.
    pub(super) offset: u64,
    pub(super) writable: bool,
}

impl Piece {
    /// What of it lies in `part`, if anything does.
    fn cut(&self, part: Range<u64>) -> Option<Self> {
        let (start, end) = (part.start.max(self.at), part.end.min(self.at + self.length));
        let length = end.checked_sub(start).filter(|length| *length > 0)?;
        let offset = self.offset + (start - self.at);
        Some(Self { at: start, length, offset, ..self.clone() })
    }

    /// Whether it shows all that `wanted` does.
    fn serves(&self, wanted: &Self) -> bool {
        let place = |piece: &Self| (piece.at, piece.length, piece.offset);
        let file = |piece: &Self| fstat(&*piece.file).map(|stat| (stat.st_dev, stat.st_ino)).ok();
        place(self) == place(wanted)
            && self.writable >= wanted.writable
            && file(self).is_some_and(|own| file(wanted) == Some(own))
    }
}

/// What the front-end knows of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// Nothing yet.
    Nothing,
    /// It has mapped it.
    Mapped,
    /// It was asked, and did not say in time.
    Perhaps,
}

#[derive(Debug, Default)]
struct Table {
    /// By first byte.
    pieces: BTreeMap<u64, (Piece, Known)>,
    /// Counts how often the front-end dropped all.
    epoch: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Window {
    size: u64,
    most: u64,
    pub(super) channel: BackendChannel,
    mapper: SharedMemoryMapper,
    turn: Mutex<()>,
    table: Mutex<Table>,
    /// Pieces of a restored state were not asked for yet.
    owes: AtomicBool,
}

impl Window {
    pub(super) fn new(size: u64) -> Result<Self, Error> {
        if size == 0 || !size.is_multiple_of(UNIT) || size > MOST_WINDOW {
            let why = format!("a window of {size} bytes: it has units of 2 MiB, up to a TiB");
            return Err(Error::refused(why));
        }
        let channel = BackendChannel::new();
        let region = SharedMemoryRegion { id: REGION, size };
        Ok(Self {
            size,
            most: Self::most(size),
            mapper: SharedMemoryMapper::new(region, channel.clone()),
            channel,
            turn: Mutex::default(),
            table: Mutex::default(),
            owes: AtomicBool::new(false),
        })
    }

    /// Pieces that a window of this size may have, each with a descriptor.
    pub(super) fn most(size: u64) -> u64 {
        size / UNIT + FEW
    }

    pub(super) fn region(&self) -> SharedMemoryRegion {
        SharedMemoryRegion { id: REGION, size: self.size }
    }

    /// Whether the front-end maps.
    pub(super) fn is_available(&self) -> bool {
        self.mapper.is_available()
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A range of the window in whole pages.
    pub(super) fn range(&self, at: u64, length: u64) -> io::Result<Range<u64>> {
        let page = rustix::param::page_size() as u64;
        let end = at.checked_add(length).filter(|end| *end <= self.size && length > 0);
        let end = end.ok_or(Errno::INVAL)?;
        if !at.is_multiple_of(page) || !length.is_multiple_of(page) {
            return Err(Errno::INVAL.into());
        }
        Ok(at..end)
    }

    /// Maps a piece, in place of what is there.
    pub(super) fn set(&self, piece: Piece) -> io::Result<()> {
        let range = self.checked(&piece)?;
        let _turn = self.turn();
        let table = self.table();
        if table
            .pieces
            .get(&piece.at)
            .is_some_and(|(there, known)| *known == Known::Mapped && there.serves(&piece))
        {
            return Ok(());
        }
        // What is in the way may become two.
        if table.pieces.len() as u64 + 2 > self.most {
            return Err(Errno::NFILE.into());
        }
        let epoch = table.epoch;
        drop(table);
        self.cut_out(range, epoch)?;
        self.map(piece, epoch)
    }

    fn checked(&self, piece: &Piece) -> io::Result<Range<u64>> {
        let range = self.range(piece.at, piece.length)?;
        let page = rustix::param::page_size() as u64;
        let end = piece.offset.checked_add(piece.length);
        if !piece.offset.is_multiple_of(page) || end.is_none_or(|end| end > i64::MAX as u64) {
            return Err(Errno::INVAL.into());
        }
        Ok(range)
    }

    /// Unmaps ranges, as far as anything is mapped there.
    pub(super) fn clear(&self, ranges: impl IntoIterator<Item = Range<u64>>) -> io::Result<()> {
        let _turn = self.turn();
        let epoch = self.table().epoch;
        ranges.into_iter().try_for_each(|range| self.cut_out(range, epoch))
    }

    /// Gives all back: the guest begins anew, or ends.
    pub(super) fn clear_all(&self) {
        if self.table().pieces.is_empty() {
            return;
        }
        if let Err(error) = self.clear(std::iter::once(0..self.size)) {
            warn!("the window is not given back whole: {error}");
        }
    }

    /// The front-end has dropped all that was mapped.
    pub(super) fn is_gone(&self) {
        let mut table = self.table();
        table.pieces.clear();
        table.epoch += 1;
    }

    /// Unmaps what lies in a range, and maps again what of it reaches out.
    fn cut_out(&self, range: Range<u64>, epoch: u64) -> io::Result<()> {
        while let Some((piece, known)) = self.in_the_way(&range) {
            if known != Known::Nothing {
                self.unmap(piece.at)?;
            }
            self.table().pieces.remove(&piece.at);
            for rest in [0..range.start, range.end..self.size] {
                if let Some(rest) = piece.cut(rest) {
                    self.map(rest, epoch)?;
                }
            }
        }
        Ok(())
    }

    /// The last piece that reaches into a range.
    fn in_the_way(&self, range: &Range<u64>) -> Option<(Piece, Known)> {
        let table = self.table();
        let mut before = table.pieces.range(..range.end).rev();
        before
            .next()
            .map(|(_, entry)| entry.clone())
            .filter(|(piece, _)| piece.cut(range.clone()).is_some())
    }

    fn unmap(&self, at: u64) -> io::Result<()> {
        match self.mapper.remove_mapping_and_wait(at) {
            Ok(()) | Err(MappingError::Unknown(_)) => Ok(()),
            // It has no such mapping: it has begun anew and said nothing.
            Err(MappingError::Channel(ChannelError::Failed(_))) => {
                self.mapper.forget_mapping(at);
                Ok(())
            }
            Err(error) => Err(failed(&error)),
        }
    }

    fn map(&self, piece: Piece, epoch: u64) -> io::Result<()> {
        let asked = self.ask(&piece);
        let known = if asked.is_ok() { Known::Mapped } else { Known::Perhaps };
        let mut table = self.table();
        if table.epoch == epoch && (asked.is_ok() || self.mapper.holds(piece.at, piece.length)) {
            table.pieces.insert(piece.at, (piece, known));
        }
        asked
    }

    fn ask(&self, piece: &Piece) -> io::Result<()> {
        let Piece { at, length: size, offset, .. } = *piece;
        let access = if piece.writable { Access::ReadWrite } else { Access::Read };
        let fd = piece.file.try_clone()?.into();
        let source = MappingSource::Descriptor { fd, offset, size };
        self.mapper.add_mapping_and_wait(source, at, access).map_err(|error| failed(&error))
    }

    /// What is mapped, for the next process.
    pub(super) fn pieces(&self) -> Vec<Piece> {
        self.table().pieces.values().map(|(piece, _)| piece.clone()).collect()
    }

    /// Takes the pieces of another process; they are asked for when a ring starts ([`Self::ring_starts`]), by when
    /// the front-end has opened its channel.
    pub(super) fn restore(&self, pieces: Vec<Piece>) -> io::Result<()> {
        let mut table = Table { epoch: self.table().epoch + 1, ..Table::default() };
        for piece in pieces {
            let range = self.checked(&piece)?;
            if table.pieces.values().any(|(other, _)| other.cut(range.clone()).is_some()) {
                return Err(Errno::INVAL.into());
            }
            table.pieces.insert(piece.at, (piece, Known::Nothing));
        }
        self.owes.store(!table.pieces.is_empty(), Ordering::Release);
        *self.table() = table;
        Ok(())
    }

    /// Has what was restored mapped, on a thread of its own: this one brings the front-end's answers.
    pub(super) fn ring_starts(self: &Arc<Self>) {
        if !self.owes.swap(false, Ordering::AcqRel) {
            return;
        }
        let window = Arc::clone(self);
        let thread = std::thread::Builder::new().name("window".to_owned());
        if let Err(error) = thread.spawn(move || while window.map_next() {}) {
            warn!("the window is not mapped again: {error}");
        }
    }

    /// Maps a piece that was not asked for yet. Whether there was one.
    fn map_next(&self) -> bool {
        let _turn = self.turn();
        let mut table = self.table();
        let next = table.pieces.values_mut().find(|(_, known)| *known == Known::Nothing);
        let Some((piece, known)) = next else { return false };
        *known = Known::Mapped;
        let (piece, epoch) = (piece.clone(), table.epoch);
        drop(table);
        if self.mapper.holds(piece.at, piece.length) {
            return true;
        }
        self.table().pieces.remove(&piece.at);
        let (at, length) = (piece.at, piece.length);
        if let Err(error) = self.map(piece, epoch) {
            warn!("window: {length:#x} bytes at {at:#x} are not there again: {error}");
        }
        true
    }
}

/// What the guest is told when the front-end did not do it.
fn failed(error: &MappingError) -> io::Error {
    warn!("window: {error}");
    Errno::IO.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(at: u64, length: u64) -> Piece {
        let file = Arc::new(File::open("/dev/null").expect("a file"));
        Piece { at, length, node: 7, file, offset: 0x1000, writable: false }
    }

    #[test]
    fn a_piece_is_cut_where_a_range_meets_it() {
        let place = |piece: Option<Piece>| piece.map(|p| (p.at, p.length, p.offset));
        let whole = piece(0x4000, 0x3000);
        assert_eq!(place(whole.cut(0..0x4000)), None);
        assert_eq!(place(whole.cut(0x7000..0x9000)), None);
        assert_eq!(place(whole.cut(0..0x5000)), Some((0x4000, 0x1000, 0x1000)));
        assert_eq!(place(whole.cut(0x5000..0x6000)), Some((0x5000, 0x1000, 0x2000)));
        assert_eq!(place(whole.cut(0x6000..u64::MAX)), Some((0x6000, 0x1000, 0x3000)));
    }

    #[test]
    fn pieces_of_a_state_lie_in_the_window_and_beside_each_other() {
        let window = Window::new(UNIT).expect("a window");
        let page = rustix::param::page_size() as u64;
        let beyond = piece(UNIT - page, 2 * page);
        let odd = piece(1, page);
        for bad in [vec![beyond], vec![odd], vec![piece(0, 2 * page), piece(page, page)]] {
            assert!(window.restore(bad).is_err());
            assert!(window.pieces().is_empty(), "nothing of it is taken");
        }
        window.restore(vec![piece(0, page), piece(page, page)]).expect("sound");
        assert_eq!(window.pieces().len(), 2);
        window.is_gone();
        assert!(window.pieces().is_empty());
    }

    #[test]
    fn a_window_has_units_of_two_mebibytes() {
        for bad in [0, 1, UNIT - 4096, UNIT + 4096, MOST_WINDOW + UNIT, u64::MAX] {
            assert!(Window::new(bad).is_err(), "{bad:#x}");
        }
        assert_eq!(Window::most(UNIT), 1 + FEW);
        assert_eq!(Window::most(8 << 30), 4096 + FEW);
    }
}
