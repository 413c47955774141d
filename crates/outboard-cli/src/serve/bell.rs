//! A bell: rung from anywhere, a signal handler too, and waited for beside other descriptors.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// Rings.
#[derive(Clone)]
pub(crate) struct Bell(Arc<UnixStream>);

/// Hears it.
pub(crate) struct Ear(UnixStream);

/// A bell and who hears it.
pub(crate) fn bell() -> io::Result<(Bell, Ear)> {
    let (bell, ear) = UnixStream::pair()?;
    bell.set_nonblocking(true)?;
    Ok((Bell(Arc::new(bell)), Ear(ear)))
}

impl Bell {
    /// Rings once; a bell that was rung and not heard rings on.
    pub(crate) fn ring(&self) {
        // Full or closed: rung already, or nobody is there to hear it.
        let _ = rustix::io::write(&*self.0, &[0]);
    }

    /// A descriptor that rings when a byte is written to it.
    pub(crate) fn descriptor(&self) -> io::Result<OwnedFd> {
        Ok(self.0.try_clone()?.into())
    }
}

impl AsFd for Ear {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
