//! Split rings (virtio 1.3 §2.7): three areas, each written by one side.

pub(crate) mod cells;
pub(crate) mod device;
pub(crate) mod driver;
pub(crate) mod walk;

/// Descriptor flag: another one follows.
pub(crate) const NEXT: u16 = 1;
/// Descriptor flag: the device writes this buffer.
pub(crate) const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub(crate) const INDIRECT: u16 = 4;
/// Available-ring flag: the driver wants no calls.
pub(crate) const NO_INTERRUPT: u16 = 1;
/// Used-ring flag: the device wants no kicks.
pub(crate) const NO_NOTIFY: u16 = 1;
