//! What a card tells its next process: version 1.
//!
//! Invariant: a guest keeps its address, the packets that it asked for, its pairs and its offloads; packets on their
//! way are the network's to repeat.

use outboard::{Error, Saved, Snapshot};
use serde::{Deserialize, Serialize};

use super::card::{Card, Rules, Said};
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
    /// What the driver has said of them, if it has.
    pairs: Option<u16>,
    offloads: Option<u64>,
}

impl State {
    pub(super) fn of(card: &Card) -> Self {
        let Rules { mac, filter, names_vlans } = (*card.rules()).clone();
        let Said { pairs, offloads } = card.said();
        Self { mac, mtu: card.mtu(), names_vlans, filter, pairs, offloads }
    }

    pub(super) fn save(self) -> Snapshot {
        Snapshot::of(STATE_VERSION, self)
    }

    pub(super) fn read(saved: Saved<'_>, card: &Card) -> Result<Self, Error> {
        let state: Self = saved.read(STATE_VERSION)?;
        if !state.filter.is_sound() {
            return Err(Error::refused("state of a card with tables that no card has"));
        }
        if state.mtu != card.mtu() {
            return Err(Error::refused(format!(
                "state of a card with an MTU of {}, this one has {}",
                state.mtu,
                card.mtu()
            )));
        }
        let pairs = card.pairs();
        if state.pairs.is_some_and(|used| !(1..=pairs).contains(&usize::from(used))) {
            return Err(Error::refused(format!(
                "state of a card with {} pairs of queues, this one has {pairs}",
                state.pairs.unwrap_or(0)
            )));
        }
        Ok(state)
    }

    pub(super) fn apply(self, card: &Card) {
        let Self { mac, names_vlans, filter, pairs, offloads, .. } = self;
        card.change_rules(|rules| *rules = Rules { mac, filter, names_vlans });
        card.set_said(Said { pairs, offloads });
    }
}
