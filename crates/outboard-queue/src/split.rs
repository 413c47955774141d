//! Split rings (virtio 1.3 §2.7): three areas, each written by one side.

pub(crate) mod cells;
pub(crate) mod chains;
pub(crate) mod device;
pub(crate) mod driver;
pub(crate) mod inflight;
pub(crate) mod log;
mod tracked;
pub(crate) mod walk;

/// Available-ring flag: the driver wants no calls.
pub(crate) const NO_INTERRUPT: u16 = 1;
/// Used-ring flag: the device wants no kicks.
pub(crate) const NO_NOTIFY: u16 = 1;
