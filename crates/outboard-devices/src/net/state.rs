//! What a card tells its next process: version 1.
//!
//! Invariant: a guest keeps its address and gets the packets that it asked for; packets on their way are the
//! network's to repeat.

use outboard::{Error, Saved, Snapshot};
use serde::{Deserialize, Serialize};

use super::card::Card;
use super::filter::Filter;

/// The newest version that this program reads, and the one that it writes.
pub const STATE_VERSION: u32 = 1;

/// Version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    mac: [u8; 6],
    mtu: u16,
    names_vlans: bool,
    filter: Filter,
}

impl State {
    pub(super) fn of(card: &Card) -> Self {
        let (mac, mtu, names_vlans) = (card.mac, card.mtu, card.names_vlans);
        Self { mac, mtu, names_vlans, filter: card.filter.clone() }
    }

    pub(super) fn save(self) -> Snapshot {
        Snapshot::of(STATE_VERSION, self)
    }

    pub(super) fn read(saved: Saved<'_>, card: &Card) -> Result<Self, Error> {
        let state: Self = saved.read(STATE_VERSION)?;
        if !state.filter.is_sound() {
            return Err(Error::refused("state of a card with tables that no card has"));
        }
        if state.mtu != card.mtu {
            return Err(Error::refused(format!(
                "state of a card with an MTU of {}, this one has {}",
                state.mtu, card.mtu
            )));
        }
        Ok(state)
    }

    pub(super) fn apply(self, card: &mut Card) {
        card.mac = self.mac;
        card.names_vlans = self.names_vlans;
        card.filter = self.filter;
    }
}
