//! Parts of files in the DAX window (virtio 1.3 §5.11.6.4): SETUPMAPPING and REMOVEMAPPING.
//!
//! Linux names no handle, only the node: the file is opened here. It is opened for writing where that can be had,
//! also when the guest wants to read: once it wants to write it asks for the same mapping again, and that one could not
//! be replaced under the eyes of a guest that reads through it (see `window`).
//!
//! Invariant: what was opened for reading is mapped for reading; only regular files are mapped.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::io::Errno;
use virtiofsd::filesystem::{Context, FileSystem, ZeroCopyWriter};
use virtiofsd::fuse::{RemovemappingIn, RemovemappingOne, SetupmappingFlags, SetupmappingIn};
use virtiofsd::oslib::ReadvFlags;

use super::{Answer, Call, MAP_ALIGNMENT, Server};
use crate::fs::window::{Piece, Window};

/// No handle: the file of the node.
pub(super) const NONE: u64 = u64::MAX;
/// Ranges that one REMOVEMAPPING may name; Linux names up to 256.
const MOST_RANGES: u32 = 4096;

/// A file on its way out of [`FileSystem::read`], which shows it to who moves the bytes.
struct Shown<'a>(&'a mut Option<io::Result<File>>);

impl ZeroCopyWriter for Shown<'_> {
    fn read_from_file_at(
        &mut self,
        file: &File,
        _count: usize,
        _offset: u64,
        _flags: Option<ReadvFlags>,
    ) -> io::Result<usize> {
        *self.0 = Some(file.try_clone());
        Ok(0)
    }
}

impl<F: FileSystem> Server<F> {
    /// The window, if the guest was told of one.
    fn window(&self) -> io::Result<&Arc<Window>> {
        let told = self.options.load(Ordering::Relaxed) & MAP_ALIGNMENT != 0;
        Ok(self.window.as_ref().filter(|_| told).ok_or(Errno::NOSYS)?)
    }

    pub(super) fn setup_mapping(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let window = self.window()?;
        let SetupmappingIn { fh, foffset: offset, len: length, flags, moffset: at } =
            call.take()?;
        let flags = SetupmappingFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        if flags.is_empty() {
            return Err(Errno::INVAL.into());
        }
        window.range(at, length)?;
        let wanted = flags.contains(SetupmappingFlags::WRITE);
        let node = call.header.nodeid;
        let (file, writable) = self.file_to_map(call.context(), node, fh, wanted)?;
        window.set(Piece { at, length, node, file: Arc::new(file), offset, writable })?;
        Ok(Answer::done())
    }

    pub(super) fn remove_mapping(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let window = self.window()?;
        let RemovemappingIn { count } = call.take()?;
        let size = u64::from(count) * size_of::<RemovemappingOne>() as u64;
        if count == 0 || count > MOST_RANGES || size != call.exchange.left() {
            return Err(Errno::INVAL.into());
        }
        let ranges = (0..count).map(|_| {
            let RemovemappingOne { moffset, len } = call.take()?;
            window.range(moffset, len)
        });
        window.clear(ranges.collect::<io::Result<Vec<_>>>()?)?;
        Ok(Answer::done())
    }

    /// The file of a handle or of a node, and whether it can be mapped for writing.
    pub(super) fn file_to_map(
        &self,
        context: Context,
        node: u64,
        handle: u64,
        wanted: bool,
    ) -> io::Result<(File, bool)> {
        let file = match handle {
            NONE => self.opened(context, node, OFlags::RDWR).or_else(|error| match wanted {
                true => Err(error),
                false => self.opened(context, node, OFlags::RDONLY),
            })?,
            handle => self.shown(context, node, handle)?,
        };
        if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::RegularFile {
            return Err(Errno::NODEV.into());
        }
        // What is written only cannot be mapped, as with mmap(2).
        match fcntl_getfl(&file)? & OFlags::RWMODE {
            OFlags::RDWR => Ok((file, true)),
            OFlags::RDONLY if !wanted => Ok((file, false)),
            _ => Err(Errno::ACCESS.into()),
        }
    }

    fn opened(&self, context: Context, node: u64, flags: OFlags) -> io::Result<File> {
        let (handle, _) = self.fs.open(context, node.into(), false, flags.bits())?;
        let handle = handle.ok_or(Errno::BADF)?.into();
        let file = self.shown(context, node, handle);
        self.fs.release(context, node.into(), flags.bits(), handle.into(), false, false, None)?;
        file
    }

    fn shown(&self, context: Context, node: u64, handle: u64) -> io::Result<File> {
        let mut file = None;
        let to = Shown(&mut file);
        self.fs.read(context, node.into(), handle.into(), to, 0, 0, None, 0)?;
        file.unwrap_or_else(|| Err(Errno::BADF.into()))
    }
}
