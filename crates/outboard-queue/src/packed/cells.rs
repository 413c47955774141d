//! The three areas of a packed ring, resolved once (virtio 1.3 §2.8.13, §2.8.14).
//!
//! ```text
//!  descriptor ring:  (addr u64, len u32, id u16, flags u16) × size      (both sides write)
//!  event structures: place u16 | flags u16                              (one of the driver, one of the device)
//! ```

use outboard_memory::{Cell32, PackedRing, View};

use crate::error::RingError;
use crate::layout::QueueLayout;

/// Handles on the ring and the event structures.
#[derive(Clone, Debug)]
pub(crate) struct PackedCells {
    pub(crate) ring: PackedRing,
    /// Whether the driver wants calls.
    pub(crate) driver_event: Cell32,
    /// Whether the device wants kicks.
    pub(crate) device_event: Cell32,
}

impl PackedCells {
    /// Finds the ring in guest memory: its descriptors, and the event structures.
    pub(crate) fn resolve(layout: &QueueLayout, view: &View) -> Result<Self, RingError> {
        let size = layout.size;
        if size == 0 || size > 32_768 {
            return Err(RingError::Size { size });
        }
        let placed = |part| move |source| RingError::Placement { part, source };
        let ring = view
            .cells(layout.desc, 16 * u64::from(size))
            .and_then(|cells| cells.packed(0, size))
            .map_err(placed("descriptor ring"))?;
        let driver_event = view
            .cells_to_read(layout.avail, 4)
            .and_then(|cells| cells.u32_at(0))
            .map_err(placed("driver event structure"))?;
        let device_event = view
            .cells(layout.used, 4)
            .and_then(|cells| cells.u32_at(0))
            .map_err(placed("device event structure"))?;
        Ok(Self { ring, driver_event, device_event })
    }
}
