//! Packed rings (virtio 1.3 §2.8): one ring of descriptors that both sides write, and an event suppression structure
//! for each side.

pub(crate) mod cells;
mod chains;
pub(crate) mod device;
pub(crate) mod driver;
mod inflight;
mod kept;
pub(crate) mod place;
mod tracked;
mod walk;

/// Descriptor flag: equal to the driver's wrap counter when it is available, to the device's when it is used.
pub(crate) const AVAIL: u16 = 1 << 7;
/// Descriptor flag: the driver's wrap counter inverted when it is available, the device's when it is used.
pub(crate) const USED: u16 = 1 << 15;
/// Both.
pub(crate) const STATE: u16 = AVAIL | USED;
