//! What the messages must mean, seen through real requests of a block device, and the orders of
//! messages that real front-ends use (protocol facts d.1).
//!
//! Invariant: only the first sectors are read here and nothing is written to the disk.

pub(super) mod enabling;
pub(super) mod frontends;
pub(super) mod inflight;
pub(super) mod iommu;
pub(super) mod log;
pub(super) mod memory;
pub(super) mod notify;
pub(super) mod postcopy;
pub(super) mod skip_drain;
pub(super) mod state;
pub(super) mod stopping;
