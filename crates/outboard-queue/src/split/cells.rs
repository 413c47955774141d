//! The three areas of a split ring, resolved once (virtio 1.3 §2.7.5, §2.7.6, §2.7.8).
//!
//! ```text
//!  available:  flags u16 | idx u16 | ring u16 × size | used_event u16      (driver writes)
//!  used:       flags u16 | idx u16 | (id u32, len u32) × size | avail_event u16   (device writes)
//! ```

use outboard_memory::{AccessError, Cell16, Cells, Descriptors, Pairs, Ring16, View};

use crate::error::RingError;
use crate::layout::{QueueFeatures, QueueLayout};

/// Handles on every field of the two rings.
#[derive(Clone, Debug)]
pub(crate) struct SplitCells {
    pub(crate) avail_flags: Cell16,
    pub(crate) avail_idx: Cell16,
    pub(crate) avail: Ring16,
    pub(crate) used_flags: Cell16,
    pub(crate) used_idx: Cell16,
    pub(crate) used: Pairs,
    /// There with EVENT_IDX, when the flags say nothing.
    pub(crate) events: Option<Events>,
}

/// The event fields (virtio 1.3 §2.7.10).
#[derive(Clone, Debug)]
pub(crate) struct Events {
    /// Written by the driver: call me when the used index passes this.
    pub(crate) used_event: Cell16,
    /// Written by the device: kick me when the available index passes this.
    pub(crate) avail_event: Cell16,
}

impl SplitCells {
    /// Finds the ring in guest memory: its descriptor table, and the fields of the two rings.
    pub(crate) fn resolve(
        layout: &QueueLayout,
        features: QueueFeatures,
        view: &View,
    ) -> Result<(Descriptors, Self), RingError> {
        let size = layout.size;
        if !size.is_power_of_two() || size > 32_768 {
            return Err(RingError::Size { size });
        }
        let count = u64::from(size);
        let event = if features.event_idx { 2 } else { 0 };
        let desc = view
            .cells_to_read(layout.desc, 16 * count)
            .and_then(|cells| cells.descriptors(0, size));
        let desc =
            desc.map_err(|source| RingError::Placement { part: "descriptor table", source })?;
        let (avail_cells, [avail_flags, avail_idx]) =
            area("available ring", view.cells_to_read(layout.avail, 4 + 2 * count + event))?;
        let avail = avail_cells.ring16(4, size);
        let avail =
            avail.map_err(|source| RingError::Placement { part: "available ring", source })?;
        let (used_cells, [used_flags, used_idx]) =
            area("used ring", view.cells(layout.used, 4 + 8 * count + event))?;
        let used = used_cells.pairs(4, size);
        let used = used.map_err(|source| RingError::Placement { part: "used ring", source })?;
        let events = if features.event_idx {
            let used_event = avail_cells.u16_at(4 + 2 * count);
            let avail_event = used_cells.u16_at(4 + 8 * count);
            Some(Events {
                used_event: used_event
                    .map_err(|source| RingError::Placement { part: "available ring", source })?,
                avail_event: avail_event
                    .map_err(|source| RingError::Placement { part: "used ring", source })?,
            })
        } else {
            None
        };
        Ok((desc, Self { avail_flags, avail_idx, avail, used_flags, used_idx, used, events }))
    }
}

/// One of the two rings, with its flags and index.
fn area(
    part: &'static str,
    cells: Result<Cells, AccessError>,
) -> Result<(Cells, [Cell16; 2]), RingError> {
    let found = || -> Result<_, AccessError> {
        let cells = cells?;
        let both = [cells.u16_at(0)?, cells.u16_at(2)?];
        Ok((cells, both))
    };
    found().map_err(|source| RingError::Placement { part, source })
}
