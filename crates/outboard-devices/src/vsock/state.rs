//! What a socket device tells its next process: version 1.
//!
//! Invariant: connections do not move, for their other ends are this host's; the guest hears of it by the
//! transport reset event (§5.10.6.7).

use outboard::{Error, Saved, Snapshot};
use serde::{Deserialize, Serialize};

/// The newest version that this program reads, and the one that it writes.
pub const STATE_VERSION: u32 = 1;

/// Version 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    guest_cid: u64,
}

impl State {
    pub(super) fn save(guest_cid: u64) -> Snapshot {
        Snapshot::of(STATE_VERSION, Self { guest_cid })
    }

    /// Reads a state for a guest with this address; a guest that has another one elsewhere hears of that too
    /// by the reset.
    pub(super) fn read(saved: Saved<'_>) -> Result<Self, Error> {
        saved.read(STATE_VERSION)
    }
}
