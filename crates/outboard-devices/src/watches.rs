//! Descriptors of the host that come and go while a worker runs: connections, terminals.
//!
//! One epoll(7) instance inside the worker's event loop: the loop waits for it, and each of its
//! descriptors is reported here when it becomes readable, writable or is hung up (edges).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

/// Events that one look brings.
pub(crate) const BATCH: usize = 32;

/// See the module.
#[derive(Debug)]
pub(crate) struct Watches(OwnedFd);

/// What became of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Edge {
    pub(crate) token: u64,
    /// Bytes or an end can be read.
    pub(crate) readable: bool,
    /// There is room again, or the other side is gone.
    pub(crate) writable: bool,
    /// The other side sends no more: an end follows what can be read.
    pub(crate) ended: bool,
    /// The other side is gone.
    pub(crate) hung_up: bool,
}

impl Watches {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Reports `fd` under `token` until it is closed: keep no duplicates. False: it cannot be waited
    /// for and is always ready (a regular file).
    pub(crate) fn add(&self, fd: impl AsFd, token: u64) -> io::Result<bool> {
        match epoll::add(&self.0, fd, epoll::EventData::new_u64(token), flags()) {
            Ok(()) => Ok(true),
            Err(Errno::PERM) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Reports `fd`, which was added, under another token; what is true of it now is reported again.
    #[cfg(feature = "vsock")]
    pub(crate) fn rename(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        Ok(epoll::modify(&self.0, fd, epoll::EventData::new_u64(token), flags())?)
    }

    /// What has happened since the last look. Not all of it: look until nothing comes.
    pub(crate) fn look(&self) -> io::Result<Vec<Edge>> {
        let mut ready = Vec::with_capacity(BATCH);
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        match epoll::wait(&self.0, rustix::buffer::spare_capacity(&mut ready), Some(&now)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(ready.iter().map(|event| edge(event.data.u64(), event.flags)).collect())
    }
}

fn flags() -> epoll::EventFlags {
    epoll::EventFlags::IN
        | epoll::EventFlags::OUT
        | epoll::EventFlags::RDHUP
        | epoll::EventFlags::ET
}

fn edge(token: u64, flags: epoll::EventFlags) -> Edge {
    let gone = epoll::EventFlags::HUP | epoll::EventFlags::ERR;
    let hung_up = flags.intersects(gone);
    let ended = hung_up || flags.contains(epoll::EventFlags::RDHUP);
    let readable = ended || flags.contains(epoll::EventFlags::IN);
    let writable = hung_up || flags.contains(epoll::EventFlags::OUT);
    Edge { token, readable, writable, ended, hung_up }
}

impl AsFd for Watches {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
