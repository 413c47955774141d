//! Files without a name: removed while the guest has them open, and so in no state that knows files by their paths.
//!
//! ```text
//!  lost in the library's state ─▶ the number of its file ─▶ our descriptors of files without links ─▶ its handle
//! ```
//! A process that follows on the same machine opens it by its handle (open_by_handle_at(2), for root), which works
//! as long as somebody has it open: until the end of the take-over or migration that is this process.
//! Invariant: a file that cannot be told for certain stays lost.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, Dir, Mode, OFlags, Stat, openat, statat};
use tracing::debug;
use virtiofsd::filesystem::{Context, FileSystem};
use virtiofsd::fuse::{Attr, InHeader};
use virtiofsd::passthrough::file_handle::{FileHandle, SerializableFileHandle};

use super::image::{Handle, Image, Place};

/// Where our own descriptors are found, and the share's root.
#[derive(Debug)]
pub(super) struct Places {
    /// /proc/self/fd.
    pub(super) descriptors: File,
    pub(super) root: String,
}

/// A file of ours that has no link.
struct Nameless {
    found: Stat,
    handle: Handle,
}

impl Nameless {
    /// Whether it is the file of these attributes, on this mount.
    fn is(&self, attr: &Attr, mount: u64) -> bool {
        let Stat { st_ino, st_mode, st_ctime, .. } = self.found;
        self.handle.mount == mount
            && (st_ino, st_mode) == (attr.ino, attr.mode)
            && u64::try_from(st_ctime).is_ok_and(|ctime| ctime == attr.ctime)
    }
}

fn handle_of(file: &OwnedFd) -> io::Result<Handle> {
    let handle = SerializableFileHandle::from(FileHandle::from_fd_fail_hard(file)?);
    Ok(Handle {
        mount: handle.mount_id(),
        kind: handle.handle_type(),
        bytes: handle.as_bytes().to_vec(),
    })
}

impl Places {
    /// All files without a link that this process has open.
    fn nameless(&self) -> io::Result<Vec<Nameless>> {
        let folder = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let list = openat(&self.descriptors, ".", folder, Mode::empty())?;
        let mut all = Vec::new();
        for entry in Dir::new(list)? {
            let entry = entry?;
            let name = entry.file_name();
            if !name.to_bytes().iter().all(u8::is_ascii_digit) {
                continue;
            }
            // It may be closed by now.
            let Ok(found) = statat(&self.descriptors, name, AtFlags::empty()) else { continue };
            if found.st_nlink > 0 {
                continue;
            }
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            let file = openat(&self.descriptors, name, flags, Mode::empty())?;
            match handle_of(&file) {
                Ok(handle) => all.push(Nameless { found, handle }),
                Err(error) => debug!("a file without a name has no handle: {error}"),
            }
        }
        Ok(all)
    }

    /// The mount of the share's root.
    fn root_mount(&self) -> io::Result<u64> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(self.root.as_str(), flags, Mode::empty())?;
        handle_of(&root).map(|handle| handle.mount)
    }

    /// Gives nodes of `image` that are lost the handles of our files without a name, and leaves out those that
    /// nobody has open: a guest may not have forgotten yet what it has removed.
    pub(super) fn find(&self, fs: &impl FileSystem, image: &mut Image) -> io::Result<()> {
        if !image.nodes.iter().any(|node| node.place == Place::Lost) {
            return Ok(());
        }
        let (files, mount) = (self.nameless()?, self.root_mount()?);
        let open: BTreeSet<u64> = image.opens.iter().map(|open| open.node).collect();
        let mut used = false;
        image.nodes.retain_mut(|node| {
            if node.place != Place::Lost {
                return true;
            }
            let found = fs.getattr(Context::from(InHeader::default()), node.id.into(), None);
            match found {
                Ok((attr, _)) if open.contains(&node.id) => {
                    if let Some(file) = files.iter().find(|file| file.is(&attr, mount)) {
                        node.place = Place::Handle { handle: file.handle.clone() };
                        used = true;
                    }
                    true
                }
                Ok((attr, _)) => attr.nlink > 0,
                Err(_) => open.contains(&node.id),
            }
        });
        if used && !image.mounts.iter().any(|(known, _)| *known == mount) {
            image.mounts.push((mount, ".".to_owned()));
        }
        Ok(())
    }
}
