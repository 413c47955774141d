//! Which packets a driver wants: receive modes, addresses, VLANs (virtio 1.3 §5.1.6.5.1 to §5.1.6.5.3).
//!
//! Invariants: tables are bounded, and one that overflows lets everything of its kind through; a card
//! whose driver has said nothing gets every packet.

use serde::{Deserialize, Serialize};

use super::frame::ETHERNET;

/// Addresses of each kind that are kept; with more, all packets of that kind pass.
pub(super) const MOST: usize = 64;
/// Bytes of the map of VLANs, one bit for each.
const VLANS: usize = 4096 / 8;
/// The type of a packet that names a VLAN (IEEE 802.1Q).
const TAGGED: [u8; 2] = [0x81, 0x00];

/// `command` of the class of receive modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Promiscuous,
    AllMulticast,
    AllUnicast,
    NoMulticast,
    NoUnicast,
    NoBroadcast,
}

/// Addresses of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Table {
    addresses: Vec<[u8; 6]>,
    /// There were more than are kept.
    overflown: bool,
}

impl Table {
    /// Of `count` addresses, those that are kept.
    pub(super) fn new(addresses: Vec<[u8; 6]>, count: u64) -> Self {
        let overflown = count > MOST as u64;
        Self { addresses: if overflown { Vec::new() } else { addresses }, overflown }
    }

    fn has(&self, address: [u8; 6]) -> bool {
        self.overflown || self.addresses.contains(&address)
    }
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Filter {
    promiscuous: bool,
    all_multicast: bool,
    all_unicast: bool,
    no_multicast: bool,
    no_unicast: bool,
    no_broadcast: bool,
    pub(super) unicast: Table,
    pub(super) multicast: Table,
    /// A bit for each VLAN that passes.
    vlans: Vec<u8>,
}

impl Default for Filter {
    fn default() -> Self {
        Self {
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Table::default(),
            multicast: Table::default(),
            vlans: vec![0xff; VLANS],
        }
    }
}

impl Filter {
    pub(super) fn set_mode(&mut self, mode: Mode, on: bool) {
        *match mode {
            Mode::Promiscuous => &mut self.promiscuous,
            Mode::AllMulticast => &mut self.all_multicast,
            Mode::AllUnicast => &mut self.all_unicast,
            Mode::NoMulticast => &mut self.no_multicast,
            Mode::NoUnicast => &mut self.no_unicast,
            Mode::NoBroadcast => &mut self.no_broadcast,
        } = on;
    }

    /// With a filter of VLANs none passes until the driver names it; without one all do.
    pub(super) fn start_vlans(&mut self, filtered: bool) {
        self.vlans = vec![if filtered { 0 } else { 0xff }; VLANS];
    }

    /// Lets a VLAN through, or no more. False: there is no such VLAN.
    pub(super) fn set_vlan(&mut self, vlan: u16, passes: bool) -> bool {
        let Some(bits) = self.vlans.get_mut(usize::from(vlan / 8)) else { return false };
        let bit = 1 << (vlan % 8);
        *bits = if passes { *bits | bit } else { *bits & !bit };
        true
    }

    /// Whether the fields fit a state that was loaded.
    pub(super) fn is_sound(&self) -> bool {
        let bounded = |table: &Table| table.addresses.len() <= MOST;
        self.vlans.len() == VLANS && bounded(&self.unicast) && bounded(&self.multicast)
    }

    /// Whether a driver at `mac` wants this packet. One without a whole header is nobody's.
    pub(super) fn passes(&self, mac: [u8; 6], packet: &[u8]) -> bool {
        let Some((to, rest)) = packet.split_first_chunk::<6>() else { return false };
        if packet.len() < ETHERNET {
            return false;
        }
        if let Some([tag @ .., high, low]) = rest.get(6..10).and_then(|b| b.first_chunk::<4>())
            && *tag == TAGGED
        {
            let vlan = u16::from_be_bytes([*high, *low]) & 0xfff;
            let bits = self.vlans.get(usize::from(vlan / 8)).copied().unwrap_or(0);
            if bits & (1 << (vlan % 8)) == 0 {
                return false;
            }
        }
        if self.promiscuous {
            return true;
        }
        if *to == [0xff; 6] {
            return !self.no_broadcast;
        }
        if to[0] & 1 == 1 {
            return !self.no_multicast && (self.all_multicast || self.multicast.has(*to));
        }
        !self.no_unicast && (self.all_unicast || *to == mac || self.unicast.has(*to))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];
    const GROUP: [u8; 6] = [1, 0, 0x5e, 0, 0, 1];

    fn to(address: [u8; 6]) -> Vec<u8> {
        [&address[..], &[0; 8]].concat()
    }

    fn tagged(vlan: u16) -> Vec<u8> {
        [&MAC[..], &OTHER, &TAGGED, &vlan.to_be_bytes(), &[8, 0]].concat()
    }

    fn quiet() -> Filter {
        let mut filter = Filter::default();
        filter.set_mode(Mode::Promiscuous, false);
        filter
    }

    #[test]
    fn a_driver_that_has_said_nothing_gets_every_whole_packet() {
        let filter = Filter::default();
        for address in [MAC, OTHER, GROUP, [0xff; 6]] {
            assert!(filter.passes(MAC, &to(address)));
        }
        assert!(filter.passes(MAC, &tagged(5)));
        for length in 0..ETHERNET {
            assert!(!filter.passes(MAC, &vec![0xff; length]), "{length} bytes");
        }
    }

    #[test]
    fn without_the_promiscuous_mode_only_what_was_asked_for_passes() {
        let mut filter = quiet();
        let passing = |filter: &Filter| {
            [MAC, OTHER, GROUP, [0xff; 6]].map(|address| filter.passes(MAC, &to(address)))
        };
        assert_eq!(passing(&filter), [true, false, false, true]);
        filter.unicast = Table::new(vec![OTHER], 1);
        filter.multicast = Table::new(vec![GROUP], 1);
        assert_eq!(passing(&filter), [true, true, true, true]);
        filter.unicast = Table::default();
        filter.multicast = Table::default();
        for (mode, expected) in [
            (Mode::AllUnicast, [true, true, false, true]),
            (Mode::AllMulticast, [true, false, true, true]),
            (Mode::NoBroadcast, [true, false, false, false]),
            (Mode::NoUnicast, [false, false, false, true]),
        ] {
            filter.set_mode(mode, true);
            assert_eq!(passing(&filter), expected, "{mode:?}");
            filter.set_mode(mode, false);
        }
        filter.set_mode(Mode::AllMulticast, true);
        filter.set_mode(Mode::NoMulticast, true);
        assert_eq!(passing(&filter), [true, false, false, true]);
    }

    #[test]
    fn b65_a_table_of_four_thousand_million_addresses_lets_all_of_its_kind_through() {
        let mut filter = quiet();
        filter.unicast = Table::new(vec![MAC; 3], 0xffff_ffff);
        assert!(filter.passes(MAC, &to(OTHER)));
        assert!(!filter.passes(MAC, &to(GROUP)));
        assert!(filter.is_sound());
    }

    #[test]
    fn vlans_pass_when_they_were_named() {
        let mut filter = quiet();
        filter.start_vlans(true);
        assert!(!filter.passes(MAC, &tagged(5)) && filter.passes(MAC, &to(MAC)));
        assert!(filter.set_vlan(5, true) && filter.set_vlan(4095, true));
        assert!(filter.passes(MAC, &tagged(5)) && filter.passes(MAC, &tagged(0xefff | 4095)));
        assert!(!filter.passes(MAC, &tagged(4)) && !filter.passes(MAC, &tagged(13)));
        assert!(filter.set_vlan(5, false));
        assert!(!filter.passes(MAC, &tagged(5)));
        for vlan in [4096, u16::MAX] {
            assert!(!filter.set_vlan(vlan, true), "b65: no such VLAN");
        }
    }
}
