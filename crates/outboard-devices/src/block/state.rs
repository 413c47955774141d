//! What a disk tells its next process, and what it checks before it takes that over: version 1.
//!
//! Invariant: a guest never finds another disk than it left: sizes and write protection must be the
//! same. What its driver chose (the cache mode) and what it must not forget (a flush that failed)
//! goes with it; what the operator chose stays the operator's.

use outboard::{Error, Saved, Snapshot};
use serde::{Deserialize, Serialize};

use super::config::SECTOR;
use super::image::Image;

/// The newest version that this program reads, and the one that it writes.
pub const STATE_VERSION: u32 = 1;

/// Version 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    /// Sectors of 512 bytes.
    pub(super) sectors: u64,
    /// `blk_size`, in bytes.
    pub(super) block_size: u32,
    pub(super) read_only: bool,
    /// The configuration field of that name.
    pub(super) writeback: bool,
    pub(super) flush_failed: bool,
}

impl State {
    /// Of a disk on `image`.
    pub(super) fn new(image: &Image, writeback: bool, flush_failed: bool) -> Self {
        Self {
            sectors: image.geometry().size / SECTOR,
            block_size: image.geometry().block_size,
            read_only: image.read_only(),
            writeback,
            flush_failed,
        }
    }

    pub(super) fn save(self) -> Snapshot {
        Snapshot::of(STATE_VERSION, self)
    }

    /// Reads a state for a disk on `image`.
    pub(super) fn read(saved: Saved<'_>, image: &Image) -> Result<Self, Error> {
        let state: Self = saved.read(STATE_VERSION)?;
        let here = Self::new(image, state.writeback, state.flush_failed);
        if state == here {
            return Ok(state);
        }
        let refused = |what: String| Err(Error::refused(what));
        if state.sectors != here.sectors {
            return refused(format!(
                "state of a disk of {} sectors, this one has {}",
                state.sectors, here.sectors
            ));
        }
        if state.block_size != here.block_size {
            return refused(format!(
                "state of a disk with blocks of {} bytes, this one has {}",
                state.block_size, here.block_size
            ));
        }
        let word = |read_only: bool| if read_only { "read-only" } else { "writable" };
        let (theirs, ours) = (word(state.read_only), word(here.read_only));
        refused(format!("state of a {theirs} disk, this one is {ours}"))
    }
}
