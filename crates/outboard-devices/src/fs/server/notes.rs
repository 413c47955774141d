//! Notes for the process that follows a killed one ([`super::super::ledger`]), and what that one makes of them.
//!
//! ```text
//!  notes ─▶ each node is looked up again under its parent: the same file? ─▶ each open file can be opened? ─▶ the
//!  library's own state, with the guest's numbers ─▶ it goes on
//! ```
//! Invariants: a node is taken up only if its name leads to the file with the number that was noted; what is not
//! found is ESTALE to the guest, which looks it up anew.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::io;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use rustix::fs::OFlags;
use rustix::io::Errno;
use tracing::{info, warn};
use virtiofsd::filesystem::{Context, Entry, FileSystem, SerializableFileSystem};
use virtiofsd::fuse::{EntryOut, FsOptions, InHeader, ROOT_ID};

use super::super::image::{Image, Node, Open, Place, Source};
use super::super::ledger::{Known, Note, Table};
use super::{Answer, Server};

fn nobody() -> Context {
    Context::from(InHeader::default())
}

/// Flags of open(2) that say what is to happen once.
fn once() -> u32 {
    (OFlags::CREATE | OFlags::EXCL | OFlags::TRUNC).bits()
}

impl<F: FileSystem> Server<F> {
    pub(super) fn note(&self, notes: &[Note<'_>]) {
        if let Some(ledger) = &self.ledger {
            ledger.note(notes);
        }
    }

    pub(super) fn note_mounted(&self, options: u64) {
        if self.ledger.is_none() {
            return;
        }
        self.lost.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let root = self.fs.getattr(nobody(), ROOT_ID.into(), None).map_or(0, |(attr, _)| attr.ino);
        self.note(&[Note::Mounted { options, root }]);
    }

    /// The reply that names an entry to the guest.
    pub(super) fn found(&self, parent: u64, name: &CStr, entry: Entry) -> Answer {
        self.note_found(parent, name, &entry);
        Answer::of(&EntryOut::from(entry))
    }

    pub(super) fn note_found(&self, parent: u64, name: &CStr, entry: &Entry) {
        if self.ledger.is_some() && entry.inode != 0 {
            let (node, file, name) = (entry.inode, entry.attr.ino, name.to_bytes());
            self.note(&[Note::Found { node, count: 1, file, parent, name }]);
        }
    }

    pub(super) fn note_opened(&self, handle: Option<u64>, node: u64, flags: u32) {
        if let Some(handle) = handle {
            self.note(&[Note::Opened { handle, node, flags: u64::from(flags & !once()) }]);
        }
    }

    /// What the guest is told: a node that went with a killed process is stale.
    pub(super) fn told(&self, node: u64, error: io::Error) -> io::Error {
        let is_lost = || self.lost.lock().unwrap_or_else(PoisonError::into_inner).contains(&node);
        match error.raw_os_error() {
            Some(number) if number == Errno::BADF.raw_os_error() && is_lost() => {
                Errno::STALE.into()
            }
            _ => error,
        }
    }

    /// Nodes that are there again: by their old numbers, those of now and the places that led there.
    fn find_again(&self, table: &Table) -> BTreeMap<u64, (u64, (u64, String))> {
        let mut below: BTreeMap<u64, Vec<(u64, &[u8])>> = BTreeMap::new();
        for (node, known) in &table.nodes {
            for (parent, name) in &known.places {
                below.entry(*parent).or_default().push((*node, name));
            }
        }
        let mut found = BTreeMap::new();
        let mut parents = vec![(ROOT_ID, ROOT_ID)];
        while let Some((old, new)) = parents.pop() {
            for (node, name) in below.remove(&old).unwrap_or_default() {
                let Ok(text) = std::str::from_utf8(name) else { continue };
                let Ok(name) = CString::new(name) else { continue };
                if found.contains_key(&node) {
                    continue;
                }
                let Ok(entry) = self.fs.lookup(nobody(), new.into(), &name) else { continue };
                if table.nodes.get(&node).is_some_and(|known| known.file == entry.attr.ino) {
                    found.insert(node, (entry.inode, (old, text.to_owned())));
                    parents.push((node, entry.inode));
                }
            }
        }
        found
    }

    /// Remembers nodes that were not found, for the process after this one as well.
    fn lose<'a>(&self, nodes: impl Iterator<Item = (&'a u64, &'a Known)>) {
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        for (&node, &Known { count, file, .. }) in nodes {
            lost.insert(node);
            let (parent, name) = (0, &[][..]);
            let found = Note::Found { node, count, file, parent, name };
            self.note(&[found, Note::Removed { parent, name }]);
        }
    }

    /// Open files that can be opened again.
    fn open_again(&self, table: &Table, now: impl Fn(u64) -> Option<u64>) -> Vec<Open> {
        let opens = table.opens.iter().filter_map(|(handle, (node, flags))| {
            let flags = u32::try_from(*flags).ok()?;
            let there = now(*node)?;
            let (opened, _) = self.fs.open(nobody(), there.into(), false, flags).ok()?;
            let opened = opened?;
            // It only was a try: the library opens it when it takes its state.
            self.fs.release(nobody(), there.into(), flags, opened, false, false, None).ok()?;
            let source = Source::Flags { flags: flags.cast_signed() };
            Some(Open { id: *handle, node: *node, source })
        });
        opens.collect()
    }
}

impl<F: FileSystem + SerializableFileSystem> Server<F> {
    /// The library's state.
    pub(super) fn image(&self) -> io::Result<Image> {
        self.fs.prepare_serialization(std::sync::Arc::default());
        let file = memory_file()?;
        self.fs.serialize(file.try_clone()?)?;
        let mut bytes = Vec::new();
        io::Seek::rewind(&mut &file)?;
        io::Read::read_to_end(&mut &file, &mut bytes)?;
        Image::read(&bytes)
    }

    /// Gives the library a state.
    pub(super) fn apply(&self, state: &[u8]) -> io::Result<()> {
        let file = memory_file()?;
        io::Write::write_all(&mut &file, state)?;
        io::Seek::rewind(&mut &file)?;
        self.fs.deserialize_and_apply(file)
    }

    /// Notes a state that was taken.
    pub(super) fn note_all(&self, options: u64, state: &[u8]) {
        let Some(ledger) = &self.ledger else { return };
        let attributes = |node: u64| self.fs.getattr(nobody(), node.into(), None);
        let file = |node| attributes(node).map_or(0, |(attr, _)| attr.ino);
        let mut table = Table::default();
        table.mounted = Some((options, file(ROOT_ID)));
        if let Ok(image) = Image::read(state) {
            for node in &image.nodes {
                if let Place::Path { parent, name } = &node.place {
                    let places = [(*parent, name.clone().into_bytes())].into();
                    table.with(node.id, Known { count: node.count, file: file(node.id), places });
                }
            }
            for Open { id, node, source: Source::Flags { flags } } in image.opens {
                table.opens.insert(id, (node, flags.cast_unsigned().into()));
            }
        }
        ledger.replace(&table);
    }

    /// With what a killed process has noted, as far as it is still there.
    pub(in crate::fs) fn taking_up(self, table: &Table) -> Self {
        if let Err(error) = self.take_up(table) {
            warn!("what the guest had open before is lost: {error}");
        }
        self
    }

    /// On failure nobody has mounted.
    fn take_up(&self, table: &Table) -> io::Result<()> {
        let Some((options, root)) = table.mounted else { return Ok(()) };
        self.fs.init(FsOptions::from_bits_truncate(options))?;
        let there = self.fs.getattr(nobody(), ROOT_ID.into(), None)?.0.ino;
        if there != root {
            self.fs.destroy();
            return Err(io::Error::other("the notes are of another directory"));
        }
        let found = self.find_again(table);
        let now = |node| match node {
            ROOT_ID => Some(ROOT_ID),
            _ => found.get(&node).map(|(now, _)| *now),
        };
        let opens = self.open_again(table, now);
        let mut image = self.image()?;
        image.nodes = nodes(table, &found);
        image.next_node = table.nodes.keys().max().map_or(ROOT_ID, |most| *most) + 1;
        image.next_open = table.opens.keys().max().map_or(0, |most| *most + 1);
        image.opens = opens;
        let (kept, held) = (image.nodes.len() - 1, image.opens.len());
        let state = image.write()?;
        if let Err(error) = self.apply(&state) {
            self.fs.destroy();
            return Err(error);
        }
        self.options.store(options, Ordering::Relaxed);
        self.returns.store(true, Ordering::Relaxed);
        self.note_all(options, &state);
        self.lose(table.nodes.iter().filter(|(node, _)| !found.contains_key(*node)));
        let (nodes, files) = (table.nodes.len(), table.opens.len());
        info!("taken up: {kept} of {nodes} nodes and {held} of {files} open files");
        Ok(())
    }
}

/// Nodes for the library, which counts those that lie below one as well.
fn nodes(table: &Table, found: &BTreeMap<u64, (u64, (u64, String))>) -> Vec<Node> {
    let mut below: BTreeMap<u64, u64> = BTreeMap::new();
    for (_, (parent, _)) in found.values() {
        *below.entry(*parent).or_default() += 1;
    }
    let below = |node| below.get(&node).copied().unwrap_or(0);
    let root = Node { id: ROOT_ID, count: 2 + below(ROOT_ID), place: Place::Root, verify: None };
    let others = found.iter().map(|(id, (_, (parent, name)))| {
        let known = table.nodes.get(id).map_or(0, |known| known.count);
        let place = Place::Path { parent: *parent, name: name.clone() };
        Node { id: *id, count: known + below(*id), place, verify: None }
    });
    std::iter::once(root).chain(others).collect()
}

/// A file without a name, for a state on its way.
fn memory_file() -> io::Result<std::fs::File> {
    Ok(rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC)?.into())
}
