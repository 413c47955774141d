//! Errors of our own side. What a peer did wrong is a `Violation` or a `Refusal` of
//! `outboard-protocol`; the three families are never mixed (design §3.4).

use std::io;
use std::path::PathBuf;

use outboard_memory::{LayoutError, MapError};
use outboard_protocol::Violation;
use outboard_queue::{RingError, ShortBuffer};
use thiserror::Error as ThisError;

/// What a device reports: its own failure, or that it declines.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum Error {
    /// The system failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The device declines; the text says why.
    #[error("{0}")]
    Refused(String),
    /// Somebody else still holds what the device needs; the text says what. A start is tried again
    /// ([`HandlerOptions::claim_patience`](crate::HandlerOptions::claim_patience)).
    #[error("{0}")]
    Busy(String),
    /// The driver's buffers are too short for the request.
    #[error("{0}")]
    Short(#[from] ShortBuffer),
    /// The handler or the server failed.
    #[error("{0}")]
    Host(#[from] HostError),
}

impl Error {
    /// Declines, with a reason in one lower-case clause.
    #[must_use]
    pub fn refused(why: impl Into<String>) -> Self {
        Self::Refused(why.into())
    }

    /// Somebody else holds it still, in one lower-case clause.
    #[must_use]
    pub fn busy(what: impl Into<String>) -> Self {
        Self::Busy(what.into())
    }
}

impl From<rustix::io::Errno> for Error {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// Our side failed.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum HostError {
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What we were doing.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The peer's stream is out of step.
    #[error("connection closed: {0}")]
    Violation(#[from] Violation),
    /// The front-end left in the middle of a message.
    #[error("front-end left inside a message")]
    PartialMessage,
    /// Descriptors were lost on the way (MSG_CTRUNC).
    #[error("descriptors of a message were cut off: is the limit of open files reached?")]
    Truncated,
    /// A worker thread is gone.
    #[error("worker of queue {0} is gone")]
    WorkerGone(u16),
    /// A queue that never started was asked to stop.
    #[error("queue {0} is not started")]
    NotStarted(u16),
    /// A queue has no such number.
    #[error("queue {index} of {queues}")]
    NoSuchQueue {
        /// The number asked for.
        index: u16,
        /// How many there are.
        queues: usize,
    },
    /// Requests did not finish in time.
    #[error("queue {index} did not drain within {seconds} s")]
    DrainDeadline {
        /// Which queue.
        index: u16,
        /// The bound.
        seconds: u64,
    },
    /// A queue did not take a change in time.
    #[error("queue {index} did not take a change within {seconds} s")]
    ChangeDeadline {
        /// Which queue.
        index: u16,
        /// The bound.
        seconds: u64,
    },
    /// Guest memory cannot be mapped.
    #[error("guest memory: {0}")]
    Map(#[from] MapError),
    /// Guest memory cannot be laid out.
    #[error("guest memory: {0}")]
    Layout(#[from] LayoutError),
    /// A ring cannot start.
    #[error("ring: {0}")]
    Ring(#[from] RingError),
    /// The device failed or declined.
    #[error("device: {0}")]
    Device(String),
    /// A device cannot be taken over.
    #[error("take-over: {0}")]
    TakeOver(String),
    /// The socket path cannot be used.
    #[error("socket {path}: {why}", path = path.display())]
    Socket {
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// An inherited descriptor cannot be used.
    #[error("descriptor {fd}: {why}")]
    Inherited {
        /// Its number.
        fd: i32,
        /// What is wrong with it.
        why: String,
    },
}

impl HostError {
    /// For `map_err`: names what was being done.
    pub(crate) fn io(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

impl From<Error> for HostError {
    fn from(error: Error) -> Self {
        match error {
            Error::Host(host) => host,
            other => Self::Device(other.to_string()),
        }
    }
}
