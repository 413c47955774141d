//! Descriptors of the host that come and go while a worker runs: connections, terminals.
//!
//! One epoll(7) instance inside the worker's event loop: the loop waits for it, and each of its
//! descriptors is reported here when it becomes readable, is hung up or, where that is asked for, becomes writable (edges).
//!
//! Room is asked for by whoever waits for it, for each read of the other side tells of room: a worker that has nothing to
//! send would be woken for nothing.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

/// Events that one look brings.
pub(crate) const BATCH: usize = 32;

/// What of a descriptor is reported; a hang-up always is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// Bytes and ends.
    Bytes,
    /// Room, too.
    Room,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Watches(OwnedFd);

/// What became of a descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
    pub(crate) fn add(&self, fd: impl AsFd, token: u64, ask: Ask) -> io::Result<bool> {
        match epoll::add(&self.0, fd, epoll::EventData::new_u64(token), flags(ask)) {
            Ok(()) => Ok(true),
            Err(Errno::PERM) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Reports `fd`, which was added, under this token and as this asks; what is true of it now is reported again.
    #[cfg(feature = "vsock")]
    pub(crate) fn change(&self, fd: impl AsFd, token: u64, ask: Ask) -> io::Result<()> {
        Ok(epoll::modify(&self.0, fd, epoll::EventData::new_u64(token), flags(ask))?)
    }

    /// What has happened since the last look. Not all of it: look until nothing comes.
    pub(crate) fn look(&self) -> io::Result<impl ExactSizeIterator<Item = Edge> + use<>> {
        let (mut ready, mut edges) = ([MaybeUninit::uninit(); BATCH], [Edge::default(); BATCH]);
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let ready = match epoll::wait(&self.0, ready.as_mut_slice(), Some(&now)) {
            Ok((ready, _)) => ready,
            Err(Errno::INTR) => &mut [],
            Err(error) => return Err(error.into()),
        };
        for (edge, event) in edges.iter_mut().zip(&*ready) {
            *edge = edge_of(event.data.u64(), event.flags);
        }
        Ok(edges.into_iter().take(ready.len()))
    }
}

fn flags(ask: Ask) -> epoll::EventFlags {
    let always = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
    match ask {
        Ask::Bytes => always,
        Ask::Room => always | epoll::EventFlags::OUT,
    }
}

fn edge_of(token: u64, flags: epoll::EventFlags) -> Edge {
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
