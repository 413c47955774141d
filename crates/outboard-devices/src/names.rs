//! Sockets and links that a device makes in the file system.
//!
//! Invariant: a stale socket is replaced only if nobody answers on it; what was made is removed at the end,
//! unless somebody has put another one there.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A socket or a link in the file system, removed with this unless somebody has put another one there.
#[derive(Debug)]
pub(crate) struct Name {
    path: PathBuf,
    inode: Option<(u64, u64)>,
}

impl Name {
    /// What is at `path` now.
    pub(crate) fn of(path: &Path) -> Self {
        Self { path: path.to_owned(), inode: inode(path) }
    }

    /// Another process's, which is not removed with this.
    #[cfg(any(feature = "console", feature = "vsock"))]
    pub(crate) fn of_another(path: &Path) -> Self {
        Self { path: path.to_owned(), inode: None }
    }

    /// What is there now is this process's.
    #[cfg(any(feature = "console", feature = "vsock"))]
    pub(crate) fn own(&mut self) {
        self.inode = inode(&self.path);
    }

    /// Another process has it from now on.
    #[cfg(any(feature = "console", feature = "vsock"))]
    pub(crate) fn leave(&mut self) {
        self.inode = None;
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        if self.inode.is_some() && self.inode == inode(&self.path) {
            // Gone already is as good.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    path.symlink_metadata().ok().map(|found| (found.dev(), found.ino()))
}

/// Listens on `path`, without waiting.
pub(crate) fn listen(path: &Path) -> io::Result<(UnixListener, Name)> {
    listen_by(path, |path| UnixListener::bind(path))
}

/// As [`listen`], on a socket that `bind` makes.
pub(crate) fn listen_by(
    path: &Path,
    bind: impl Fn(&Path) -> io::Result<UnixListener>,
) -> io::Result<(UnixListener, Name)> {
    let listener = bind(path).or_else(|error| {
        let stale = error.kind() == io::ErrorKind::AddrInUse
            && path.metadata().is_ok_and(|found| found.file_type().is_socket())
            && UnixStream::connect(path)
                .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
        if !stale {
            return Err(error);
        }
        std::fs::remove_file(path)?;
        bind(path)
    })?;
    listener.set_nonblocking(true)?;
    Ok((listener, Name::of(path)))
}
