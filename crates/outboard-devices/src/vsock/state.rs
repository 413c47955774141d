//! What a socket device tells its next process: versions 1 and 2.
//!
//! Invariants: connections go along with a live upgrade, which hands their sockets over (version 2), and with
//! nothing else, for their other ends are this host's; otherwise the guest hears that they are gone by the
//! transport reset event (§5.10.6.7). A state without connections is of version 1, which earlier programs read.

use outboard::{Error, Saved, Snapshot};
use serde::{Deserialize, Serialize};

use super::hub::Connections;

/// The newest version that this program reads; it writes it with connections only.
pub const STATE_VERSION: u32 = 2;

/// Versions 1 and 2.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    guest_cid: u64,
    /// Since version 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) connections: Option<Connections>,
}

impl State {
    pub(super) fn save(guest_cid: u64, connections: Option<Connections>) -> Snapshot {
        let version = if connections.is_some() { STATE_VERSION } else { 1 };
        Snapshot::of(version, Self { guest_cid, connections })
    }

    /// Reads a state for a guest with this address; a guest that has another one elsewhere hears of that too
    /// by the reset.
    pub(super) fn read(saved: Saved<'_>, guest_cid: u64) -> Result<Self, Error> {
        let mut state: Self = saved.read(STATE_VERSION)?;
        state.connections.take_if(|_| state.guest_cid != guest_cid);
        Ok(state)
    }
}
