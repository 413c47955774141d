//! Guest memory as vhost-user shares it: files mapped into this process, an immutable table of them with a
//! generation, translation of ranges, and access by value.
//!
//! ```text
//!  SET_MEM_TABLE fds ─▶ Region::map ─▶ GuestMemory (Arc, generation) ─▶ View (one owner, last-hit cache)
//!                         │ fstat first                                    ├─▶ Cells: ring indices and elements, resolved once
//!                         └ SIGBUS guard: hole ─▶ zero page + poisoned     └─▶ Buffers: what one request reads and writes, kept alive by Arc
//!  IOTLB_MSG ─▶ Iotlb (parts of regions at I/O addresses, permissions) ─▶ GuestMemory of a device behind an IOMMU
//! ```
//!
//! Invariants, which everything above this crate leans on:
//! * Guest bytes are never borrowed. They are copied out once, or in once; the guest may change them at any time.
//! * A pointer into guest memory never outlives the mapping: whatever holds one holds the [`GuestMemory`] too.
//! * Ranges are translated, not first bytes (`addr + len` is checked against the end of the region).
//! * A file cut short under us costs the request that touched the hole, not the process.
//!
//! This crate holds the unsafe code of the data path; its public API is safe. Targets: 64-bit, little-endian Linux.

#[cfg(not(all(target_os = "linux", target_pointer_width = "64", target_endian = "little")))]
compile_error!("outboard runs on 64-bit little-endian Linux");

mod buffers;
mod cells;
mod copy;
mod cursor;
mod error;
mod gather;
mod iotlb;
mod log;
mod map;
mod mapping;
mod num;
mod packed;
mod region;
mod shared;
mod sigbus;
mod table;
mod transfer;
mod tun;
mod userfault;
mod usual;
mod view;
mod window;
mod window_copy;

pub use buffers::{Buffers, Segment};
#[cfg(outboard_loom)]
pub use cells::twin;
pub use cells::{
    Cell16, Cell32, Cells, Descriptor, Descriptors, Lap, PackedBody, PackedRing, Pairs, Ring16,
    UsedLap, fence,
};
pub use cursor::Cursor;
pub use error::{AccessError, IotlbError, LayoutError, MapError, WindowError};
pub use gather::Gather;
pub use iotlb::{IOTLB_ENTRIES, Iotlb, Permission};
pub use log::{DirtyLog, LOG_PAGE};
pub use map::GuestMemory;
pub use mapping::rounded;
pub use packed::PackedTaken;
pub use region::{MapOptions, Region, RegionSpec};
pub use shared::SharedArea;
pub use sigbus::install_sigbus_guard;
pub use tun::Tap;
pub use userfault::{FaultServer, UserFault};
pub use usual::Rules;
pub use view::View;
pub use window::{Window, page_size};
pub use window_copy::RESIDENT_PAGES;
