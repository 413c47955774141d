//! Outboard: write a virtio device that runs outside the VMM, over the vhost-user protocol.
//!
//! A device author writes a [`Worker`], which serves requests, and, for a device with features or a
//! configuration space, a [`Model`]; [`WorkerDevice`] makes a whole device of them and [`Server`]
//! puts it on a socket. [`VhostUserDevice`] is the full contract underneath,
//! [`DeviceRequestHandler`] what carries out the protocol on it.
//!
//! ```no_run
//! use std::fs::File;
//! use outboard::{Error, QueueSpec, Request, Served, Server, Worker, WorkerDevice};
//!
//! struct Entropy(File);
//!
//! impl Worker for Entropy {
//!     fn serve(&mut self, mut request: Request<'_>) -> Result<Served, Error> {
//!         let written = request.writable().read_from(&mut self.0, 64 << 10)?;
//!         Ok(request.done(written))
//!     }
//! }
//!
//! let queues = [QueueSpec::new("requests", 256)];
//! let device = WorkerDevice::plain(&queues, |_| Ok(Entropy(File::open("/dev/urandom")?)))?;
//! Server::listen("/run/rng.sock")?.serve(device)?;
//! # Ok::<(), Error>(())
//! ```
//!
//! # Who owns what
//! A [`Queue`] is owned by one place: the handler while its ring is stopped, a worker thread while
//! it is started. Nothing is locked, allocated or translated per request; changes reach a running
//! queue through its mailbox. `ARCHITECTURE.md` has the whole map.
//!
//! # Platform
//! Linux on 64-bit little-endian machines.

mod async_worker;
mod channel;
mod connection;
mod device;
mod error;
mod events;
mod handler;
mod hooks;
mod inspect;
mod mailbox;
mod notify;
mod poller;
mod queue;
mod reactor;
mod request;
mod server;
mod serving;
mod shared_memory;
mod shared_thread;
mod snapshot;
mod take_over;
mod thread;
mod worker;
mod worker_device;

pub use async_worker::{AsyncWorker, Requests};
pub use channel::{Answer, BackendChannel, ChannelError};
pub use device::{ConfigWrite, VhostUserDevice};
pub use error::{Error, HostError};
pub use events::{FileId, FileOp, LoopKind};
pub use handler::{ByHand, DeviceRequestHandler, Ended, HandlerOptions};
pub use hooks::{Heirloom, Hooks};
pub use inspect::{Counter, Fact, Inspect};
pub use notify::{Call, Kick};
pub use outboard_memory as memory;
pub use outboard_protocol as protocol;
pub use outboard_queue::{Readable, ShortBuffer, Writable};
pub use queue::gather::{Gather, Gathered};
pub use queue::{Changed, Queue, QueueSpec, WhenDisabled};
pub use request::{Deferred, Held, Outcome, Request, Served};
pub use server::{Gate, Server, StopHandle, inherited_descriptor};
pub use shared_memory::{
    Access, MappingError, MappingSource, SharedMemoryMapper, SharedMemoryRegion,
};
pub use shared_thread::{SharedOptions, SharedThread};
pub use snapshot::{
    DeviceState, STATE_FORMAT, STATE_HEADER, STATE_MAGIC, Saved, Snapshot, StateError,
};
#[cfg(fuzzing)]
#[doc(hidden)]
pub use take_over::letter_again;
pub use worker::{MakeWorker, Model, Plain, Worker, WorkerContext};
pub use worker_device::{WorkerDevice, WorkerOptions};
