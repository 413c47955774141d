//! What a worker thread waits for: doorbells, mailboxes, the device's own descriptors and file
//! operations, behind one trait with two forms.
//!
//! [`uring`] is the default: waiting and file operations go to the kernel in one call. [`epoll`]
//! takes over where io_uring is refused (an old kernel, seccomp, `kernel.io_uring_disabled`).
//! Both report *edges*: a descriptor that becomes ready is reported at least once, one that stays
//! ready or hung up does not make the loop spin (rule R20).

pub(crate) mod epoll;
mod landing;
pub(crate) mod shared;
pub(crate) mod uring;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use outboard_queue::Chain;

use crate::request::Outcome;

/// Which event loop workers run on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoopKind {
    /// io_uring, or epoll where it is refused.
    #[default]
    Auto,
    /// io_uring only.
    Uring,
    /// epoll only: no [`crate::Request::submit`].
    Epoll,
}

/// A file that the event loop holds open for operations: see [`crate::WorkerContext::add_file`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId(pub(crate) u32);

/// An operation on a file, carried out by the kernel while the worker goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileOp {
    /// Reads from byte `offset` into the request's remaining writable bytes.
    Read {
        /// From which file.
        file: FileId,
        /// First byte.
        offset: u64,
    },
    /// Writes the request's remaining readable bytes at byte `offset`.
    Write {
        /// To which file.
        file: FileId,
        /// First byte.
        offset: u64,
    },
    /// Makes everything written so far durable (fdatasync).
    Sync {
        /// Of which file.
        file: FileId,
    },
    /// fallocate(2): punches holes, zeroes ranges.
    Allocate {
        /// In which file.
        file: FileId,
        /// FALLOC_FL_… bits.
        mode: i32,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
}

/// One thing that happened.
#[derive(Debug)]
pub(crate) enum Event {
    /// The descriptor watched under this token became ready.
    Ready(u64),
    /// A file operation finished; the request comes back.
    Done { queue: u64, token: u64, chain: Chain, outcome: Outcome },
}

/// Operations that the kernel has not ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Flights {
    pub(crate) all: usize,
    /// Those that may still write to guest memory.
    pub(crate) into_memory: usize,
}

/// Waits for many things at once. Used by one thread only.
pub(crate) trait EventLoop: fmt::Debug {
    /// Reports `token` whenever `fd` becomes readable, and once if it is now. A descriptor that
    /// cannot be waited for (a regular file) is an error and never reported.
    fn watch(&mut self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()>;

    /// Stops reporting `token`. To be called before the descriptor is closed.
    fn unwatch(&mut self, token: u64);

    /// Keeps a file for operations.
    fn add_file(&mut self, file: Arc<File>) -> FileId;

    /// Keeps a file no longer; the kernel does, for operations that it works on.
    fn remove_file(&mut self, file: FileId);

    /// Whether [`EventLoop::submit`] may succeed.
    fn can_submit(&self) -> bool;

    /// Starts an operation of a queue (`of`: its number and a token) and owns the request's memory until the kernel is done with it. `apart`:
    /// a read goes through memory of the loop's own where that can be had, so that none of it comes
    /// into guest memory after [`EventLoop::cancel`].
    ///
    /// # Errors
    /// The request, when the loop has no room or carries no operations.
    fn submit(
        &mut self,
        op: FileOp,
        of: (u64, u64),
        apart: bool,
        chain: Chain,
    ) -> Result<(), Chain>;

    /// Asks the kernel to end the operations of a queue; they end with an event each, soon or late.
    /// What was read apart is dropped.
    fn cancel(&mut self, queue: u64);

    /// The operations of a queue that have not ended.
    fn flying(&self, queue: u64) -> Flights;

    /// Whether a look may bring events: asked every now and then while a thread looks at its rings.
    fn has_news(&mut self) -> bool;

    /// Adds what happened to `events`; waits up to `timeout` for the first event, for ever without
    /// one. `Some(Duration::ZERO)` only looks.
    fn wait(&mut self, timeout: Option<Duration>, events: &mut Vec<Event>) -> io::Result<()>;
}

/// Makes the loop that `kind` asks for. To be called on the thread that will use it.
pub(crate) fn event_loop(kind: LoopKind) -> io::Result<Box<dyn EventLoop>> {
    match kind {
        LoopKind::Uring => Ok(Box::new(uring::UringLoop::new()?)),
        LoopKind::Epoll => Ok(Box::new(epoll::EpollLoop::new()?)),
        LoopKind::Auto => match uring::UringLoop::new() {
            Ok(uring) => Ok(Box::new(uring)),
            Err(error) => {
                tracing::info!("io_uring is refused ({error}): workers run on epoll");
                Ok(Box::new(epoll::EpollLoop::new()?))
            }
        },
    }
}
