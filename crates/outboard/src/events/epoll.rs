//! The event loop on epoll(7): for kernels and sandboxes that refuse io_uring.
//!
//! Edge-triggered, so that a descriptor which stays ready is reported once per change. It carries
//! no file operations: workers serve them with system calls of their own.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use outboard_queue::Chain;
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::io::Errno;

use super::{Event, EventLoop, FileId, FileOp, Flights};

const BATCH: usize = 64;

/// See the module.
pub(crate) struct EpollLoop {
    epoll: OwnedFd,
    /// A duplicate keeps each watched descriptor's number ours until it is unwatched, whatever its
    /// owner closes meanwhile.
    watched: Vec<(u64, OwnedFd)>,
    ready: Vec<epoll::Event>,
}

impl std::fmt::Debug for EpollLoop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EpollLoop").field("watched", &self.watched.len()).finish_non_exhaustive()
    }
}

impl EpollLoop {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            watched: Vec::new(),
            ready: Vec::with_capacity(BATCH),
        })
    }
}

impl EventLoop for EpollLoop {
    fn watch(&mut self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        let fd = fd.try_clone_to_owned()?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&self.epoll, &fd, epoll::EventData::new_u64(token), flags)?;
        self.watched.push((token, fd));
        Ok(())
    }

    fn unwatch(&mut self, token: u64) {
        self.watched.retain(|(watched, fd)| {
            if *watched == token {
                // It was added by `watch`, so the only failure would be our own mistake.
                let _ = epoll::delete(&self.epoll, fd.as_fd());
            }
            *watched != token
        });
    }

    /// None is ever used.
    fn add_file(&mut self, _: Arc<File>) -> FileId {
        FileId(0)
    }

    fn remove_file(&mut self, _: FileId) {}

    fn can_submit(&self) -> bool {
        false
    }

    fn submit(&mut self, _: FileOp, _: (u64, u64), _: bool, chain: Chain) -> Result<(), Chain> {
        Err(chain)
    }

    fn cancel(&mut self, _: u64) {}

    fn flying(&self, _: u64) -> Flights {
        Flights::default()
    }

    fn has_news(&mut self) -> bool {
        let mut fds = [PollFd::new(&self.epoll, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready != 0)
    }

    fn wait(&mut self, timeout: Option<Duration>, events: &mut Vec<Event>) -> io::Result<()> {
        self.ready.clear();
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let room = rustix::buffer::spare_capacity(&mut self.ready);
        match epoll::wait(&self.epoll, room, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        events.extend(self.ready.iter().map(|event| Event::Ready(event.data.u64())));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notify::Waker;

    #[test]
    fn news_show_without_a_wait_and_are_over_once_they_were_taken() {
        let mut events = EpollLoop::new().unwrap();
        let waker = Waker::new().unwrap();
        events.watch(waker.as_fd(), 7).unwrap();
        for _ in 0..3 {
            assert!(!events.has_news());
            waker.wake();
            assert!(events.has_news());
            let mut happened = Vec::new();
            events.wait(None, &mut happened).unwrap();
            assert!(matches!(happened[..], [Event::Ready(7)]));
            waker.drain();
        }
    }
}
