//! What can go wrong between the front-end and a back-end, each case with its own name.
//!
//! Invariant: the back-end is not trusted, so everything it does wrong (a wrong reply, silence, a closed
//! socket, a refusal, a ring that makes no sense) is an [`Error`] and never a panic or an endless wait.

use std::time::Duration;

use outboard_memory::AccessError;
use outboard_protocol::{Refusal, Violation};

use crate::block::ConfigError;
use crate::channel::RegionError;
use crate::socket::SocketError;

/// Why a call of the front-end failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket itself: path, connection, descriptors.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The back-end closed the connection while an answer was due.
    #[error("the back-end closed the connection instead of answering {request}")]
    Closed {
        /// What had been asked.
        request: &'static str,
    },
    /// The back-end closed its channel.
    #[error("the back-end closed its channel{}", if *inside { " inside a message" } else { "" })]
    ChannelClosed {
        /// A part of a message had come.
        inside: bool,
    },
    /// The shared-memory regions make no sense, or cannot be used like that.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The back-end did not answer in time.
    #[error("the back-end did not answer {request} within {} ms", after.as_millis())]
    Silent {
        /// What had been asked.
        request: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// The back-end said no.
    #[error("the back-end refused {request} with {code:#x}")]
    Refused {
        /// What had been asked.
        request: &'static str,
        /// The number it answered.
        code: u64,
    },
    /// The back-end refused to read its configuration space.
    #[error("the back-end refused to read {size} bytes of its configuration at offset {offset}")]
    NoConfig {
        /// First byte asked for.
        offset: u32,
        /// Bytes asked for.
        size: u32,
    },
    /// A reply that breaks the protocol; the connection cannot be used any more.
    #[error("the back-end broke the protocol: {0}")]
    Violation(#[from] Violation),
    /// An answer of a kind that does not belong to the question.
    #[error("the answer to {request} is of the wrong kind")]
    WrongAnswer {
        /// What had been asked.
        request: &'static str,
    },
    /// The request may not be sent: its feature was not negotiated, or it cannot be encoded.
    #[error("cannot send the request: {0}")]
    Unsendable(Refusal),
    /// An earlier call failed in a way that left the stream out of step.
    #[error("the connection was given up after an earlier error")]
    GivenUp,
    /// The back-end does not offer something that the caller needs.
    #[error("the back-end does not offer {0}")]
    NotOffered(&'static str),
    /// The call does not fit the state of the device.
    #[error("{0}")]
    State(&'static str),
    /// A queue number, a queue size or a number of queues that cannot be.
    #[error("{0}")]
    Queue(String),
    /// The device put something impossible into a ring.
    #[error("queue {queue}: the device broke the ring: {reason}")]
    Ring {
        /// Number of the queue.
        queue: u16,
        /// What was wrong.
        reason: String,
    },
    /// No request of a queue was finished in time.
    #[error("queue {queue}: {in_flight} requests in flight and none was finished within {} ms", after.as_millis())]
    Stuck {
        /// Number of the queue.
        queue: u16,
        /// Requests under way.
        in_flight: usize,
        /// How long was waited.
        after: Duration,
    },
    /// A completion was published and its call did not come.
    #[error("queue {queue}: a completion lies there and its call did not come within {} ms", after.as_millis())]
    NoCall {
        /// Number of the queue.
        queue: u16,
        /// How long was waited after the completion was seen.
        after: Duration,
    },
    /// The block device finished a request with an error.
    #[error("{operation} at sector {sector} failed: {status}")]
    Request {
        /// What had been asked.
        operation: &'static str,
        /// First sector.
        sector: u64,
        /// What the device answered.
        status: crate::block::Status,
    },
    /// The request cannot be made: too long, past the end, not aligned.
    #[error("{0}")]
    BadRequest(String),
    /// The configuration space makes no sense.
    #[error("bad configuration: {0}")]
    Config(#[from] ConfigError),
    /// A snapshot that cannot be made, or taken up.
    #[error("{0}")]
    Snapshot(String),
    /// Memory to share could not be had.
    #[error("shared memory: {0}")]
    Memory(String),
    /// An access outside of the shared memory.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// A call to our own system failed.
    #[error("{call} failed: {source}")]
    Host {
        /// The system call.
        call: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
}

impl Error {
    pub(crate) fn memory(call: &str, error: std::io::Error) -> Self {
        Self::Memory(format!("{call}: {error}"))
    }

    pub(crate) fn host(call: &'static str, errno: rustix::io::Errno) -> Self {
        Self::Host { call, source: errno.into() }
    }
}
