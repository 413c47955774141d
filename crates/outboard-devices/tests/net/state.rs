//! A card that moves to another process.

use std::path::Path;

use outboard_devices::net::Net;

use crate::guest::{BOTH, Guest, MAC, OTHER, Peer, options, packet};

fn card(folder: &Path) -> Net {
    Net::new(&options(folder)).expect("a card")
}

#[test]
fn a_card_keeps_its_address_and_modes_and_is_asked_to_announce_itself() {
    for events in BOTH {
        let folders = [0, 1].map(|_| tempfile::tempdir().expect("a folder"));
        let mut source = Guest::of(card(folders[0].path()), events, u64::MAX);
        source.activate();
        let own = [2, 0, 0, 0, 0, 7];
        assert_eq!(source.command(&[0, 0, 0], 1), Some(0));
        assert_eq!(source.command(&[&[1, 1][..], &own].concat(), 1), Some(0));
        source.rig.vmm.sleep().expect("stops");
        let state = source.rig.vmm.connection().save_state().expect("saved");

        let mut guest = Guest::of(card(folders[1].path()), events, u64::MAX);
        let features = guest.rig.vmm.features();
        guest.rig.vmm.connection().set_features(features).expect("taken");
        guest.rig.vmm.connection().load_state(&state).expect("loaded");
        guest.activate();
        let config = guest.rig.vmm.read_config(0, 8).expect("read");
        assert_eq!((&config[..6], config[6] & 2), (&own[..], 2), "announce");
        assert_eq!(guest.command(&[3, 0], 1), Some(0));
        assert_eq!(guest.rig.vmm.read_config(6, 1).expect("read")[0] & 2, 0, "announced");
        let mut peer = Peer::connect(folders[1].path());
        for to in [MAC, OTHER, own] {
            peer.send(&packet(to, 1, 60));
        }
        assert_eq!(guest.receive(), packet(own, 1, 60));
        guest.rig.end();
        source.rig.end();
    }
}
