//! The VMM's side of vhost-user: connect to a device, negotiate, share memory, drive its queues.
//!
//! ```text
//!  BlockDevice ─▶ BlockQueue ─▶ Virtqueue ─▶ rings in SharedMemory, kick and call eventfds
//!       └───────▶ Vmm (life-cycle) ─▶ Connection (typed calls, deadline) ─▶ Socket (bytes, descriptors)
//!              └▶ Channel (the back-end's own requests) └▶ outboard_protocol::Frontend (rules)
//! ```
//! Usable by a VMM, by a test or a bench, and by a program that wants a disk without a VMM. Invariant: the
//! back-end is not trusted. Wrong replies, silence, refusals, closed sockets and broken rings become
//! [`Error`]s with names; nothing waits without a bound.
//!
//! ```no_run
//! use outboard_frontend::block::{BlockDevice, BlockOptions};
//!
//! # fn main() -> Result<(), outboard_frontend::Error> {
//! let mut disk = BlockDevice::connect("/run/disk.sock", BlockOptions::default())?;
//! println!("{} bytes", disk.config().bytes());
//! let mut sector = [0; 512];
//! disk.read(0, &mut sector)?;
//! # Ok(())
//! # }
//! ```

pub mod block;
pub mod channel;
mod connection;
mod error;
mod memory;
mod snapshot;
mod socket;
pub mod transcript;
mod virtqueue;
mod vmm;

pub use channel::{
    Channel, ChannelEvent, ChannelSetup, ChannelThread, SharedObjects, SharedRegions,
};
pub use connection::{Connection, DEFAULT_TIMEOUT};
pub use error::Error;
pub use memory::{Buffer, DEFAULT_GUEST_BASE, SharedMemory, USER_OFFSET};
pub use snapshot::VmmSnapshot;
pub use socket::{MAX_RECEIVED_FDS, MAX_SENT_FDS, Received, Socket, SocketError};
pub use virtqueue::{RingHandle, Virtqueue, wait_any};
pub use vmm::{Iommu, QueueSetup, Sharing, Vmm, Wanted};
