//! Operations on open directories.
//!
//! Invariant: a directory's entries are given as far as there is room; a node that is named to the guest
//! (READDIRPLUS) has been counted as looked up, and one that found no room has not.

use std::ffi::CStr;
use std::io;
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::io::Errno;
use virtiofsd::filesystem::{DirEntry, DirectoryIterator, Entry, FileSystem};
use virtiofsd::fuse::{Attr, Dirent, EntryOut, FsyncIn, OpenIn, ReadIn, ReleaseIn};
use vm_memory::ByteValued;

use super::files::opened;
use super::{Answer, Call, Server};

/// Most of a directory that one reply has, in bytes.
const MOST: u32 = 128 << 10;

/// What a directory entry takes, filled up to eight bytes.
fn length(name: &CStr, plus: bool) -> usize {
    let entry = (size_of::<Dirent>() + name.count_bytes()).next_multiple_of(8);
    if plus { size_of::<EntryOut>() + entry } else { entry }
}

fn push(to: &mut Vec<u8>, entry: &DirEntry<'_>, looked_up: Option<Entry>) {
    let end = to.len() + length(entry.name, looked_up.is_some());
    if let Some(found) = looked_up {
        to.extend_from_slice(EntryOut::from(found).as_slice());
    }
    let name = entry.name.to_bytes();
    let dirent = Dirent {
        ino: entry.ino,
        off: entry.offset,
        namelen: u32::try_from(name.len()).unwrap_or(u32::MAX),
        type_: entry.type_,
    };
    to.extend_from_slice(dirent.as_slice());
    to.extend_from_slice(name);
    to.resize(end, 0);
}

impl<F: FileSystem> Server<F> {
    pub(super) fn opendir(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let OpenIn { flags, .. } = call.take()?;
        let node = call.header.nodeid.into();
        let (handle, options) = self.fs.opendir(call.context(), node, flags)?;
        let handle = handle.map(Into::into);
        self.note_opened(handle, call.header.nodeid, flags | OFlags::DIRECTORY.bits());
        Ok(Answer::of(&opened(handle, options)))
    }

    pub(super) fn releasedir(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let ReleaseIn { fh, flags, .. } = call.take()?;
        let node = call.header.nodeid.into();
        let done = self.fs.releasedir(call.context(), node, flags, fh.into());
        self.closed(call, fh, done)
    }

    pub(super) fn fsyncdir(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let FsyncIn { fh, fsync_flags, .. } = call.take()?;
        let (node, data_only) = (call.header.nodeid.into(), fsync_flags & 1 != 0);
        self.fs.fsyncdir(call.context(), node, data_only, fh.into())?;
        Ok(Answer::done())
    }

    pub(super) fn readdir(&self, call: &mut Call<'_>, plus: bool) -> io::Result<Answer> {
        let ReadIn { fh, offset, size, .. } = call.take()?;
        if u64::from(size) > call.room() {
            return Err(Errno::INVAL.into());
        }
        let size = size.min(MOST);
        let node = call.header.nodeid.into();
        let mut entries = self.fs.readdir(call.context(), node, fh.into(), size, offset)?;
        let mut bytes = Vec::with_capacity(size as usize);
        while let Some(entry) = entries.next() {
            if bytes.len() + length(entry.name, plus) > size as usize {
                break;
            }
            let found = match plus.then(|| self.look_up(call, &entry)).transpose() {
                Ok(found) => found,
                // It has gone since.
                Err(_) if !bytes.is_empty() => break,
                Err(error) => return Err(error),
            };
            push(&mut bytes, &entry, found);
        }
        Ok(Answer::Bytes(bytes))
    }

    /// The node of a directory entry; none for the directory itself and the one above it.
    fn look_up(&self, call: &Call<'_>, entry: &DirEntry<'_>) -> io::Result<Entry> {
        if !matches!(entry.name.to_bytes(), b"." | b"..") {
            let parent = call.header.nodeid;
            let found = self.fs.lookup(call.context(), parent.into(), entry.name)?;
            self.note_found(parent, entry.name, &found);
            return Ok(found);
        }
        Ok(Entry {
            inode: 0,
            generation: 0,
            attr: Attr { ino: entry.ino, mode: entry.type_ << 12, ..Attr::default() },
            attr_timeout: Duration::ZERO,
            entry_timeout: Duration::ZERO,
        })
    }
}
