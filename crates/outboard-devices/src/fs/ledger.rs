//! What the guest has open, noted in a file for the process that follows a killed one.
//!
//! ```text
//!  begin of the notes, 8 bytes │ … │ length, kind, numbers, names │ length, kind, …
//! ```
//! Every note is written before the guest can see what it is about, so that a request that was under way is
//! repeated and not half forgotten. From time to time what still counts is noted anew behind the old notes, the
//! begin is moved there in one write, and the old notes become a hole.
//! Invariant: a note that was cut short is the last one, and is left out.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use tracing::warn;

/// Where the first note may stand.
const HEAD: u64 = 8;
/// New notes, in bytes, after which the old ones are gone through.
const MANY: u64 = 8 << 20;
/// Longest note, in bytes: two names.
const LONGEST: usize = 1024;

/// A note.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Note<'a> {
    /// Nothing before it counts: a guest has mounted, with these options; this is the root's file.
    Mounted {
        options: u64,
        root: u64,
    },
    /// A node was named to the guest so often.
    Found {
        node: u64,
        count: u64,
        file: u64,
        parent: u64,
        name: &'a [u8],
    },
    /// The guest forgot a node so often.
    Forgotten {
        node: u64,
        count: u64,
    },
    Opened {
        handle: u64,
        node: u64,
        flags: u64,
    },
    Closed {
        handle: u64,
    },
    Moved {
        from: (u64, &'a [u8]),
        to: (u64, &'a [u8]),
        exchanged: bool,
    },
    Removed {
        parent: u64,
        name: &'a [u8],
    },
    /// Nothing counts any more.
    Unmounted,
}

impl<'a> Note<'a> {
    fn write(&self, to: &mut Vec<u8>) {
        let none = &[][..];
        let (kind, numbers, names): (u8, &[u64], [&[u8]; 2]) = match *self {
            Self::Mounted { options, root } => (1, &[options, root], [none, none]),
            Self::Found { node, count, file, parent, name } => {
                (2, &[node, count, file, parent], [name, none])
            }
            Self::Forgotten { node, count } => (3, &[node, count], [none, none]),
            Self::Opened { handle, node, flags } => (4, &[handle, node, flags], [none, none]),
            Self::Closed { handle } => (5, &[handle], [none, none]),
            Self::Moved { from, to, exchanged } => {
                (6, &[from.0, to.0, u64::from(exchanged)], [from.1, to.1])
            }
            Self::Removed { parent, name } => (7, &[parent], [name, none]),
            Self::Unmounted => (8, &[], [none, none]),
        };
        let length = 1 + 8 * numbers.len() + names.iter().map(|name| name.len() + 1).sum::<usize>();
        to.extend(u16::try_from(length).unwrap_or(0).to_le_bytes());
        to.push(kind);
        to.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        for name in names {
            to.extend_from_slice(name);
            to.push(0);
        }
    }

    /// The first note and what follows; None: it is cut short, or none.
    fn read(bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (length, rest) = bytes.split_first_chunk()?;
        let (mut body, rest) = rest.split_at_checked(u16::from_le_bytes(*length).into())?;
        let kind = *body.split_off_first()?;
        let mut number = || {
            let (number, rest) = body.split_first_chunk()?;
            body = rest;
            Some(u64::from_le_bytes(*number))
        };
        let count = *[2, 4, 2, 3, 1, 3, 1, 0].get(usize::from(kind.checked_sub(1)?))?;
        let mut numbers = [0; 4];
        for value in numbers.iter_mut().take(count) {
            *value = number()?;
        }
        let [a, b, c, d] = numbers;
        let mut names = body.split(|byte| *byte == 0);
        let (first, second) = (names.next()?, names.next()?);
        let note = match kind {
            1 => Self::Mounted { options: a, root: b },
            2 => Self::Found { node: a, count: b, file: c, parent: d, name: first },
            3 => Self::Forgotten { node: a, count: b },
            4 => Self::Opened { handle: a, node: b, flags: c },
            5 => Self::Closed { handle: a },
            6 => Self::Moved { from: (a, first), to: (b, second), exchanged: c != 0 },
            7 => Self::Removed { parent: a, name: first },
            _ => Self::Unmounted,
        };
        Some((note, rest))
    }
}

/// What counts of all notes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Table {
    /// Options of FUSE, and the root's file; None: nobody has mounted.
    pub(super) mounted: Option<(u64, u64)>,
    pub(super) nodes: BTreeMap<u64, Known>,
    /// Nodes and flags.
    pub(super) opens: BTreeMap<u64, (u64, u64)>,
    /// Who is at which place; there may be one who was there before as well.
    at: BTreeMap<Place, BTreeSet<u64>>,
}

/// A directory's node and a name in it.
type Place = (u64, Vec<u8>);

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) count: u64,
    /// The number of its file.
    pub(super) file: u64,
    pub(super) places: BTreeSet<Place>,
}

impl Table {
    fn take(&mut self, note: Note<'_>) {
        match note {
            Note::Mounted { options, root } => {
                *self = Self { mounted: Some((options, root)), ..Self::default() };
            }
            Note::Found { node, count, file, parent, name } => {
                let known = self.nodes.entry(node).or_default();
                known.count += count;
                known.file = file;
                self.settle(BTreeSet::from([node]), &(parent, name.to_vec()));
            }
            Note::Forgotten { node, count } => {
                if let Some(known) = self.nodes.get_mut(&node) {
                    known.count = known.count.saturating_sub(count);
                }
            }
            Note::Opened { handle, node, flags } => {
                self.opens.insert(handle, (node, flags));
            }
            Note::Closed { handle } => {
                self.opens.remove(&handle);
            }
            Note::Moved { from, to, exchanged } => {
                let (from, to) = ((from.0, from.1.to_vec()), (to.0, to.1.to_vec()));
                let (moved, other) = (self.leave(&from), self.leave(&to));
                self.settle(moved, &to);
                if exchanged {
                    self.settle(other, &from);
                }
            }
            Note::Removed { parent, name } => {
                self.leave(&(parent, name.to_vec()));
            }
            Note::Unmounted => *self = Self::default(),
        }
    }

    /// Nobody is at this place any more. Returns who was.
    fn leave(&mut self, place: &Place) -> BTreeSet<u64> {
        let there = self.at.remove(place).unwrap_or_default();
        for node in &there {
            if let Some(known) = self.nodes.get_mut(node) {
                known.places.remove(place);
            }
        }
        there
    }

    fn settle(&mut self, nodes: BTreeSet<u64>, place: &Place) {
        for node in &nodes {
            if let Some(known) = self.nodes.get_mut(node) {
                known.places.insert(place.clone());
            }
        }
        self.at.entry(place.clone()).or_default().extend(nodes);
    }

    /// Leaves out what nobody knows any more and nothing known lies below.
    fn tidy(&mut self) {
        loop {
            let places = self.nodes.values().flat_map(|known| &known.places);
            let parents: BTreeSet<u64> = places.map(|place| place.0).collect();
            let before = self.nodes.len();
            self.nodes.retain(|node, known| known.count > 0 || parents.contains(node));
            if self.nodes.len() == before {
                break;
            }
        }
        let nodes = &self.nodes;
        self.at.retain(|_, there| {
            there.retain(|node| nodes.contains_key(node));
            !there.is_empty()
        });
    }

    /// All notes in `bytes`, and how many bytes they take.
    fn read(bytes: &[u8]) -> (Self, usize) {
        let (mut table, mut rest) = (Self::default(), bytes);
        while let Some((note, after)) = Note::read(rest) {
            table.take(note);
            rest = after;
        }
        table.tidy();
        (table, bytes.len() - rest.len())
    }

    /// With one more node, wherever it is.
    pub(super) fn with(&mut self, node: u64, known: Known) {
        for place in &known.places {
            self.at.entry(place.clone()).or_default().insert(node);
        }
        self.nodes.insert(node, known);
    }

    fn write(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let Some((options, root)) = self.mounted else { return bytes };
        Note::Mounted { options, root }.write(&mut bytes);
        for (node, known) in &self.nodes {
            let mut count = known.count;
            for (parent, name) in &known.places {
                let file = known.file;
                Note::Found { node: *node, count, file, parent: *parent, name }.write(&mut bytes);
                count = 0;
            }
            // Removed: to be told apart from what was never there.
            if known.places.is_empty() {
                let (parent, name) = (0, &[][..]);
                let file = known.file;
                Note::Found { node: *node, count, file, parent, name }.write(&mut bytes);
                Note::Removed { parent, name }.write(&mut bytes);
            }
        }
        for (handle, (node, flags)) in &self.opens {
            Note::Opened { handle: *handle, node: *node, flags: *flags }.write(&mut bytes);
        }
        bytes
    }
}

fn locks(file: &File) -> bool {
    flock(file, FlockOperation::NonBlockingLockExclusive).is_ok()
}

/// See the module.
#[derive(Debug)]
pub(super) struct Ledger(Mutex<Notes>);

#[derive(Debug)]
struct Notes {
    file: File,
    begin: u64,
    end: u64,
    /// Bytes that counted when they were gone through last.
    counted: u64,
    /// It is locked; the process that hands over to this one has it until it ends.
    locked: bool,
    /// It failed; nothing is noted any more.
    broken: bool,
}

impl Notes {
    fn add(&mut self, bytes: &[u8]) -> io::Result<()> {
        if !self.locked {
            self.locked = locks(&self.file);
        }
        self.file.write_all_at(bytes, self.end)?;
        self.end += bytes.len() as u64;
        let new = self.end - self.begin - self.counted;
        if new > MANY.max(4 * self.counted) { self.go_through().map(drop) } else { Ok(()) }
    }

    /// Leaves old notes behind.
    fn go_through(&mut self) -> io::Result<Table> {
        let mut bytes = vec![0; usize::try_from(self.end - self.begin).unwrap_or(0)];
        self.file.read_exact_at(&mut bytes, self.begin)?;
        let (table, _) = Table::read(&bytes);
        self.begin_anew(&table)?;
        Ok(table)
    }

    fn begin_anew(&mut self, table: &Table) -> io::Result<()> {
        let bytes = table.write();
        // Behind whatever there is: the process before may have written after we looked.
        let begin = self.end.max(self.file.metadata()?.len());
        self.file.write_all_at(&bytes, begin)?;
        self.file.write_all_at(&begin.to_le_bytes(), 0)?;
        (self.begin, self.end, self.counted) =
            (begin, begin + bytes.len() as u64, bytes.len() as u64);
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // A file system without holes keeps the old notes.
        let _ = fallocate(&self.file, hole, HEAD, begin - HEAD);
        Ok(())
    }
}

impl Ledger {
    /// Goes on with the notes in `file`, which may be empty. Returns what they say; of a process that is still
    /// there they say nothing: what it has is handed over, or none of ours.
    pub(super) fn open(file: File) -> io::Result<(Self, Table)> {
        let length = file.metadata()?.len();
        let locked = locks(&file);
        if !locked {
            let end = length.max(HEAD);
            let notes = Notes { file, begin: HEAD, end, counted: 0, locked, broken: false };
            return Ok((Self(Mutex::new(notes)), Table::default()));
        }
        let mut head = [0; 8];
        let begin = match file.read_exact_at(&mut head, 0) {
            Ok(()) => u64::from_le_bytes(head),
            Err(_) => 0,
        };
        let mut notes = Notes { file, begin: HEAD, end: HEAD, counted: 0, locked, broken: false };
        if begin < HEAD || begin > length {
            notes.file.set_len(0)?;
            notes.file.write_all_at(&HEAD.to_le_bytes(), 0)?;
            return Ok((Self(Mutex::new(notes)), Table::default()));
        }
        let mut bytes = vec![0; usize::try_from(length - begin).unwrap_or(0)];
        notes.file.read_exact_at(&mut bytes, begin)?;
        let (table, whole) = Table::read(&bytes);
        (notes.begin, notes.end) = (begin, begin + whole as u64);
        Ok((Self(Mutex::new(notes)), table))
    }

    /// Only this counts from now on.
    pub(super) fn replace(&self, table: &Table) {
        self.with(|notes| notes.begin_anew(table));
    }

    /// Adds notes, before the guest sees what they are about.
    pub(super) fn note(&self, notes: &[Note<'_>]) {
        let mut bytes = Vec::with_capacity(LONGEST);
        for note in notes {
            note.write(&mut bytes);
        }
        self.with(|notes| notes.add(&bytes));
    }

    fn with(&self, what: impl FnOnce(&mut Notes) -> io::Result<()>) {
        let mut notes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if notes.broken {
            return;
        }
        if let Err(error) = what(&mut notes) {
            notes.broken = true;
            let void = notes.file.set_len(0);
            warn!("what the guest has open is not noted any more: {error} {void:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(node: u64, parent: u64, name: &[u8]) -> Note<'_> {
        Note::Found { node, count: 1, file: 100 + node, parent, name }
    }

    fn notes() -> Vec<Note<'static>> {
        vec![
            Note::Mounted { options: 7, root: 9 },
            found(2, 1, b"folder"),
            found(3, 2, b"a"),
            found(4, 2, b"b"),
            found(3, 1, b"link"),
            Note::Opened { handle: 0, node: 3, flags: 2 },
            Note::Opened { handle: 1, node: 4, flags: 0 },
            Note::Closed { handle: 1 },
            Note::Moved { from: (2, b"a"), to: (2, b"b"), exchanged: true },
            Note::Forgotten { node: 2, count: 1 },
            Note::Removed { parent: 1, name: b"link" },
        ]
    }

    fn table(notes: &[Note<'_>]) -> Table {
        let mut table = Table::default();
        notes.iter().for_each(|note| table.take(note.clone()));
        table.tidy();
        table
    }

    #[test]
    fn notes_are_read_as_they_were_written_and_one_that_is_cut_short_is_left_out() {
        let all = notes();
        let mut bytes = Vec::new();
        let mut ends = vec![0];
        for note in &all {
            note.write(&mut bytes);
            ends.push(bytes.len());
        }
        for end in 0..=bytes.len() {
            let whole = ends.iter().filter(|at| **at <= end).count() - 1;
            let (read, used) = Table::read(&bytes[..end]);
            assert_eq!((read, used), (table(&all[..whole]), ends[whole]), "{end} bytes");
        }
        for kind in [0, 9, 255] {
            bytes[2] = kind;
            assert_eq!(Table::read(&bytes), (Table::default(), 0));
        }
    }

    #[test]
    fn what_counts_is_where_it_was_moved_and_a_parent_is_kept_for_what_lies_below() {
        let table = table(&notes());
        let places = |node| table.nodes[&node].places.iter().cloned().collect::<Vec<_>>();
        assert_eq!(places(3), [(2, b"b".to_vec())]);
        assert_eq!(places(4), [(2, b"a".to_vec())]);
        assert_eq!((table.nodes[&2].count, table.nodes[&3].count), (0, 2));
        assert_eq!(table.opens.into_iter().collect::<Vec<_>>(), [(0, (3, 2))]);
    }

    #[test]
    fn notes_begin_anew_behind_the_old_ones_and_go_on() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("notes");
        let open = || {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(false);
            Ledger::open(options.open(&path).expect("a file")).expect("notes")
        };
        let (ledger, nothing) = open();
        assert_eq!(nothing, Table::default());
        ledger.note(&notes());
        drop(ledger);
        let (ledger, first) = open();
        assert_eq!(first, table(&notes()));
        ledger.replace(&first);
        ledger.note(&[found(5, 1, b"more")]);
        let (_, other) = open();
        assert_eq!(other, Table::default(), "somebody has it");
        drop(ledger);
        let (ledger, second) = open();
        let both = [notes(), vec![found(5, 1, b"more")]].concat();
        assert_eq!(second, table(&both));
        ledger.note(&[Note::Unmounted]);
        drop(ledger);
        assert_eq!(open().1, Table::default());
    }

    #[test]
    fn many_notes_take_little_room() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("notes");
        let file = File::options().read(true).write(true).create_new(true).open(path);
        let file = file.expect("a file");
        let (ledger, _) = Ledger::open(file.try_clone().expect("again")).expect("notes");
        ledger.note(&[Note::Mounted { options: 1, root: 1 }]);
        let name = [b'x'; 200];
        for node in 2..80_000 {
            ledger.note(&[found(node, 1, &name), Note::Forgotten { node, count: 1 }]);
        }
        let notes = ledger.0.lock().expect("sound");
        assert!(notes.end > 2 * MANY, "{}", notes.end);
        assert!(notes.end - notes.begin <= MANY + 4096, "{} {}", notes.begin, notes.end);
    }
}
