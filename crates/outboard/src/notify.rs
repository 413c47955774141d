//! Doorbells: the descriptors by which a driver kicks a ring and a device calls back
//! (vhost-user messages SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR; virtio 1.3 §2.3).
//!
//! The peer chooses the descriptor, so any type is tolerated (rule R20): a kick is drained at most
//! once per wake and without ever blocking, a call that cannot be delivered is counted and
//! forgotten. The flags of a received descriptor are never changed: they belong to the open file
//! description, that is, also to the front-end.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use outboard_protocol::channel::ChannelRequest;
use outboard_protocol::payload::VringState;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::{Errno, ReadWriteFlags, preadv2, write};

use crate::channel::BackendChannel;

/// An eventfd of our own: wakes one thread's event loop.
#[derive(Debug)]
pub(crate) struct Waker(OwnedFd);

impl Waker {
    /// Makes a waker that nobody has woken yet.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Wakes the loop that watches it; a waker that is awake already stays so.
    pub(crate) fn wake(&self) {
        // The only failure of a non-blocking eventfd of our own is a full counter: awake already.
        let _ = write(&self.0, &1u64.to_ne_bytes());
    }

    /// Takes back all wake-ups so far.
    pub(crate) fn drain(&self) {
        drain(self.0.as_fd());
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Empties a doorbell without blocking, whatever it is and whoever else reads from it.
pub(crate) fn drain(fd: BorrowedFd<'_>) {
    // An eventfd gives its counter; a pipe, all that has come since it was last emptied.
    let mut counter = [0u8; 1024];
    // Offset -1: the file's own position, as read(2). A descriptor that cannot promise not to block
    // (EOPNOTSUPP) is left as it is: our loops report edges, so it cannot make us spin.
    let _ = preadv2(fd, &mut [IoSliceMut::new(&mut counter)], u64::MAX, ReadWriteFlags::NOWAIT);
}

/// How the driver tells us of new requests.
#[derive(Clone, Debug)]
pub enum Kick {
    /// By this descriptor.
    Fd(Arc<OwnedFd>),
    /// By messages of the front-end (VRING_KICK).
    Message,
    /// Not at all: the ring is looked at again and again.
    Poll,
}

/// How we tell the driver of finished requests; also how a broken ring is announced.
#[derive(Debug)]
pub struct Call {
    way: Way,
    lost: AtomicU64,
}

/// By which way.
#[derive(Debug)]
enum Way {
    /// A descriptor, and whether writing to it may block.
    Fd(Arc<OwnedFd>, bool),
    /// VRING_CALL or VRING_ERR over the back-end channel.
    Message(BackendChannel, InBand),
}

/// Which message a notification is (vhost-user, "In-band notifications").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InBand {
    /// VRING_CALL of this ring.
    Call(u16),
    /// VRING_ERR of this ring.
    Err(u16),
}

impl Call {
    /// Takes the descriptor that the front-end sent.
    #[must_use]
    pub fn new(fd: Arc<OwnedFd>) -> Self {
        let may_block = !fcntl_getfl(&*fd).is_ok_and(|flags| flags.contains(OFlags::NONBLOCK));
        Self { way: Way::Fd(fd, may_block), lost: AtomicU64::new(0) }
    }

    /// Calls by message.
    pub(crate) fn in_band(channel: BackendChannel, message: InBand) -> Self {
        Self { way: Way::Message(channel, message), lost: AtomicU64::new(0) }
    }

    /// The descriptor, when it is one.
    pub(crate) fn descriptor(&self) -> Option<&OwnedFd> {
        match &self.way {
            Way::Fd(fd, _) => Some(fd),
            Way::Message(..) => None,
        }
    }

    /// Signals once. A signal that cannot be delivered now is counted, never waited for.
    pub fn signal(&self) {
        let delivered = match &self.way {
            Way::Fd(fd, may_block) => (!may_block || writable(fd.as_fd())) && ring_bell(fd),
            Way::Message(channel, message) => {
                let ring = |index| VringState { index: u32::from(index), num: 0 };
                let request = match *message {
                    InBand::Call(index) => ChannelRequest::VringCall(ring(index)),
                    InBand::Err(index) => ChannelRequest::VringErr(ring(index)),
                };
                // Nobody waits for the answer.
                drop(channel.ask(request));
                true
            }
        };
        if !delivered {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Signals that could not be delivered.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

/// Writes one event; whether it was taken.
fn ring_bell(fd: &OwnedFd) -> bool {
    loop {
        match write(fd, &1u64.to_ne_bytes()) {
            Err(Errno::INTR) => {}
            taken => return taken.is_ok(),
        }
    }
}

/// Whether a write of one event would be taken at once.
fn writable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(&fd, PollFlags::OUT)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    match poll(&mut fds, Some(&now)) {
        Ok(_) => fds.iter().any(|fd| fd.revents().contains(PollFlags::OUT)),
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::read;

    #[test]
    fn a60_a_full_blocking_pipe_as_call_fd_never_blocks_and_is_counted() {
        let (_reader, writer) = rustix::pipe::pipe().unwrap();
        let call = Call::new(Arc::new(writer));
        for _ in 0..20_000 {
            call.signal();
        }
        assert!(call.lost() > 0, "a pipe of 64 KiB cannot hold 160,000 bytes");
    }

    #[test]
    fn a60_a_pipe_without_a_reader_is_counted_not_fatal() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        drop(reader);
        let call = Call::new(Arc::new(writer));
        call.signal();
        assert_eq!(call.lost(), 1);
    }

    #[test]
    fn a60_dev_full_as_call_fd_is_counted() {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let call = Call::new(Arc::new(full.into()));
        call.signal();
        assert_eq!(call.lost(), 1);
    }

    #[test]
    fn a60_a_blocking_eventfd_whose_counter_is_full_does_not_block() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let call = Call::new(Arc::new(fd));
        call.signal();
        assert_eq!(call.lost(), 1);
    }

    #[test]
    fn draining_a_blocking_doorbell_that_somebody_else_emptied_does_not_block() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        drain(fd.as_fd());
        write(&fd, &3u64.to_ne_bytes()).unwrap();
        drain(fd.as_fd());
        rustix::fs::fcntl_setfl(&fd, OFlags::NONBLOCK).unwrap();
        assert_eq!(read(&fd, &mut [0u8; 8]), Err(Errno::AGAIN), "the drain took the 3");
    }

    #[test]
    fn d14_the_flags_of_a_received_descriptor_are_left_alone() {
        let fd = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        let before = fcntl_getfl(&*fd).unwrap();
        let call = Call::new(Arc::clone(&fd));
        call.signal();
        drain(fd.as_fd());
        assert_eq!(fcntl_getfl(&*fd).unwrap(), before);
    }
}
