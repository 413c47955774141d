//! Requests that a killed process may have carried out: doing them again finds what they did.
//!
//! Most are the same twice. For the others: an entry that is to be made and is there was made, one that is to be
//! removed and is not there was removed, one that is to be moved and is at its new place was moved; what was to be
//! appended and stands where the guest thought the end of the file was has been.
//! Invariant: only a request that is marked so by the in-flight region is looked at in this way.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;

use rustix::io::{Errno, ReadWriteFlags, pwritev2};
use virtiofsd::filesystem::{Entry, FileSystem, ZeroCopyReader, ZeroCopyWriter};
use virtiofsd::oslib::{ReadvFlags, WritevFlags};

use super::{Call, Server};

/// Bytes of a file, for a comparison.
struct Copy<'a>(&'a mut Vec<u8>);

impl ZeroCopyWriter for Copy<'_> {
    fn read_from_file_at(
        &mut self,
        file: &File,
        count: usize,
        offset: u64,
        _: Option<ReadvFlags>,
    ) -> io::Result<usize> {
        self.0.resize(count, 0);
        let got = file.read_at(self.0, offset)?;
        self.0.truncate(got);
        Ok(got)
    }
}

/// Bytes for a file, to be appended.
pub(super) struct Bytes<'a>(pub(super) &'a [u8]);

impl ZeroCopyReader for Bytes<'_> {
    fn write_to_file_at(
        &mut self,
        file: &File,
        _: usize,
        offset: u64,
        _: Option<WritevFlags>,
    ) -> io::Result<usize> {
        let flags = ReadWriteFlags::APPEND;
        Ok(pwritev2(file, &[IoSlice::new(self.0)], offset, flags)?)
    }
}

fn is(error: &io::Error, number: Errno) -> bool {
    error.raw_os_error() == Some(number.raw_os_error())
}

impl Call<'_> {
    /// That it is there already, or no more, is what an earlier process did.
    pub(super) fn did(&self, error: &io::Error, number: Errno) -> bool {
        self.repeated && is(error, number)
    }
}

impl<F: FileSystem> Server<F> {
    /// An entry that was made, now or by the process before.
    pub(super) fn made(
        &self,
        call: &Call<'_>,
        name: &CStr,
        outcome: io::Result<Entry>,
    ) -> io::Result<Entry> {
        match outcome {
            Err(error) if call.did(&error, Errno::EXIST) => {
                self.fs.lookup(call.context(), call.header.nodeid.into(), name)
            }
            _ => outcome,
        }
    }

    /// Whether an entry is where it was to be moved.
    pub(super) fn is_at(&self, call: &Call<'_>, parent: u64, name: &CStr) -> bool {
        let found = self.fs.lookup(call.context(), parent.into(), name);
        found.is_ok_and(|entry| {
            self.fs.forget(call.context(), entry.inode.into(), 1);
            true
        })
    }

    /// Whether these bytes are what the file has at `offset`.
    pub(super) fn has(&self, call: &Call<'_>, offset: u64, bytes: &[u8]) -> bool {
        let (context, node) = (call.context(), call.header.nodeid);
        let Ok((Some(handle), _)) = self.fs.open(context, node.into(), false, 0) else {
            return false;
        };
        let handle: u64 = handle.into();
        let mut found = Vec::new();
        let size = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let copy = Copy(&mut found);
        let read =
            self.fs.read(call.context(), node.into(), handle.into(), copy, size, offset, None, 0);
        let closed = (call.context(), node.into(), 0, handle.into());
        let _ = self.fs.release(closed.0, closed.1, closed.2, closed.3, false, false, None);
        read.is_ok() && found == bytes
    }
}
