//! Virtqueues (virtio 1.3 §2.6 to §2.8), split and packed, device side and driver side, over memory that the other side
//! may change at any time.
//!
//! ```text
//!  driver                     guest memory                      device
//!  DriverQueue::add ─▶ desc, avail.ring
//!            publish ─▶ avail.idx ──────────────────────▶ DeviceQueue::pop ─▶ Chain (owned, Send)
//!                 └ kick wanted? ◀── used.flags, avail_event ◀── arm           │ readable(), writable(), tail
//!  pop_used ◀────────── used.idx ◀──────────────────────── publish ◀── complete┘
//!                        └ avail.flags, used_event ──▶ call wanted?
//! ```
//! Of a packed ring the same calls write descriptors where the picture has rings and indices, see `packed/device.rs`.
//!
//! Invariants:
//! * Each shared field is read once into a private copy, and the copy is checked; used-ring fields are never read back.
//! * A chain is walked whole before the device sees it: at most `size` descriptors, one level of indirection, 2³² bytes.
//! * A head in flight cannot be taken again. The first broken rule retires the ring: it is told once, then the ring is
//!   empty for ever.
//! * In steady state a request costs no allocation, no lock, no look-up of ring memory.
#![forbid(unsafe_code)]

mod budget;
mod chain;
mod device;
mod driver;
mod error;
mod event;
mod inflight;
mod layout;
mod order;
mod packed;
mod split;
mod walk;

pub use chain::{Chain, Readable, Writable};
pub use device::DeviceQueue;
pub use driver::DriverQueue;
pub use error::{QueueFull, RingError, ShortBuffer};
pub use event::need_event;
pub use inflight::InflightArea;
pub use layout::{QueueFeatures, QueueLayout};
pub use split::log::RingLog;
