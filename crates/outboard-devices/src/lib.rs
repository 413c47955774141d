//! Ready virtio devices for vhost-user: one folder and one cargo feature each.
//!
//! Invariant: a device uses [`outboard`] and nothing of its insides; what a driver wrote is copied
//! out of guest memory once and checked before it is used.
#![forbid(unsafe_code)]

#[cfg(feature = "block")]
pub mod block;
#[cfg(feature = "console")]
pub mod console;
#[cfg(feature = "fs")]
pub mod fs;
#[cfg(feature = "net")]
pub mod net;
#[cfg(feature = "rng")]
pub mod rng;
#[cfg(feature = "vsock")]
pub mod vsock;

#[cfg(any(feature = "console", feature = "net", feature = "vsock"))]
mod bell;
#[cfg(any(feature = "block", feature = "console", feature = "net", feature = "vsock"))]
mod features;
#[cfg(any(feature = "console", feature = "net", feature = "vsock"))]
mod names;
#[cfg(any(feature = "net", feature = "rng", feature = "vsock"))]
mod timer;
#[cfg(any(feature = "console", feature = "net", feature = "vsock"))]
mod watches;
