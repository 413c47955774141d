//! Drivers and peers that do not keep to the rules (cases B61, B62, B64, B65).

use std::io::Write;

use outboard_devices::net::{MOST, Net, feature};

use crate::guest::{ALL, BOTH, Guest, HEADER, MAC, OTHER, Peer, RX, TX, options, packet};

/// B61: shorter than a header, a header alone, longer than any packet, gigabytes.
#[test]
fn b61_what_is_no_packet_is_dropped_and_counted() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let net = Net::new(&options(folder.path())).expect("a card");
        let counters = net.counters().remove(0);
        let mut guest = Guest::of(net, events, u64::MAX);
        guest.activate();
        let mut peer = Peer::connect(folder.path());
        let mut bad = 0;
        for length in [1, HEADER - 1, HEADER, HEADER + 1, HEADER + 13, HEADER + MOST + 1] {
            guest.send_raw(&vec![0; length]);
            bad += 1;
            assert_eq!(counters.malformed.get(), bad, "{length} bytes");
        }
        let at = guest.rig.at(0);
        guest.rig.offer(TX, &[(at, 8 << 20); 63], &[], 1);
        assert_eq!(guest.rig.back(TX), (1, 0));
        guest.rig.offer(TX, &[], &[(at, 64)], 2);
        assert_eq!(guest.rig.back(TX), (2, 0));
        assert_eq!(counters.malformed.get(), bad + 2);
        peer.send(&packet(MAC, 3, 60));
        guest.receive();
        guest.send(&packet(ALL, 1, MOST));
        assert_eq!(peer.receive(), packet(ALL, 1, MOST));
        guest.rig.end();
    }
}

/// B62: offloads that nobody agreed on, and fields that point outside of the packet.
#[test]
fn b62_headers_that_lie_drop_the_packet_or_mean_nothing() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let net = Net::new(&options(folder.path())).expect("a card");
        let counters = net.counters().remove(0);
        let mut guest = Guest::of(net, events, u64::MAX);
        guest.activate();
        let mut peer = Peer::connect(folder.path());
        peer.send(&packet(MAC, 3, 60));
        guest.receive();
        for kind in [1, 3, 4, 5, 0x80, 0xff] {
            let mut header = [0xff; HEADER];
            header[1] = kind;
            guest.send_raw(&[&header[..], &packet(ALL, 1, 60)].concat());
        }
        assert_eq!(counters.malformed.get(), 6);
        // A checksum far outside, which no feature speaks of.
        let mut header = [0xff; HEADER];
        header[1] = 0;
        guest.send_raw(&[&header[..], &packet(ALL, 2, 60)].concat());
        assert_eq!(peer.receive(), packet(ALL, 2, 60));
        guest.rig.end();
    }
}

/// B64: buffers that no packet fits into, and that cannot be written.
#[test]
fn b64_a_packet_for_a_buffer_that_is_too_small_is_dropped_and_the_next_one_arrives() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let net = Net::new(&options(folder.path())).expect("a card");
        let counters = net.counters().remove(0);
        let mut guest = Guest::of(net, events, !feature::MRG_RXBUF);
        guest.rig.activate(&[0, 1, 2], 64);
        let mut peer = Peer::connect(folder.path());
        let at = guest.rig.at(0);
        let header = u32::try_from(HEADER).expect("small");
        for (token, length) in (0..).zip([1, header - 1, header, header + 1, header + 59]) {
            peer.send(&packet(MAC, 1, 60));
            guest.rig.offer(RX, &[], &[(at, length)], token);
            assert_eq!(guest.rig.back(RX), (token, 0));
        }
        peer.send(&packet(MAC, 1, 60));
        guest.rig.offer(RX, &[(at, 2048)], &[], 9);
        assert_eq!(guest.rig.back(RX), (9, 0), "nothing to write to");
        assert_eq!(counters.too_large.get(), 6);
        peer.send(&packet(MAC, 7, 60));
        guest.rig.offer(RX, &[(at, 8)], &[(at + 8, 20), (at + 40, 52)], 10);
        assert_eq!(guest.rig.back(RX), (10, header + 60), "exactly, in two pieces");
        guest.rig.end();
    }
}

/// B64: a driver that merges buffers leaves with half a packet gathered; the next one knows nothing of merging.
#[test]
fn b64_a_packet_that_was_not_gathered_to_its_end_goes_to_the_next_driver_whole() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let net = Net::new(&options(folder.path())).expect("a card");
        let counters = net.counters().remove(0);
        let mut guest = Guest::of(net, events, u64::MAX);
        guest.rig.activate(&[0, 1, 2], 64);
        let mut peer = Peer::connect(folder.path());
        peer.send(&packet(MAC, 1, 600));
        let (at, header) = (guest.rig.at(0), u32::try_from(HEADER).expect("small"));
        guest.rig.offer(RX, &[], &[(at, 256)], 1);
        // Until it was taken: it comes back as the ring stops, since it is not enough.
        while guest.rig.vmm.sleep().expect("stops").expect("was active")[RX] != (0, 1) {
            guest.rig.vmm.wake().expect("starts");
        }
        assert_eq!(guest.rig.back(RX), (1, 0));
        let queues = std::mem::take(&mut guest.rig.queues);
        guest.rig.vmm.reset(queues).expect("reset");
        guest.rig.vmm.mask_features(!feature::MRG_RXBUF);
        guest.rig.activate(&[0, 1, 2], 64);
        for (token, length) in [(2, 600), (3, 60)] {
            if token == 3 {
                peer.send(&packet(MAC, 2, 60));
            }
            guest.rig.offer(RX, &[], &[(at, 2048)], token);
            assert_eq!(guest.rig.back(RX), (token, header + length));
        }
        assert_eq!((counters.received.get(), counters.too_large.get()), (2, 0));
        guest.rig.end();
    }
}

#[test]
fn b65_commands_that_are_none_are_errors_and_change_nothing() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let mut guest = Guest::start(&options(folder.path()), events);
        let mut peer = Peer::connect(folder.path());
        assert_eq!(guest.command(&[0, 0, 0], 1), Some(0), "not promiscuous");
        let huge = u32::MAX.to_le_bytes();
        let none = 0_u32.to_le_bytes();
        let long = [&[1, 0][..], &huge, &OTHER].concat();
        let second = [&[1, 0][..], &none, &huge, &[0; 600]].concat();
        let short = [&[1, 0][..], &2_u32.to_le_bytes(), &OTHER].concat();
        for wrong in [
            &[][..],
            &[0],
            &[0, 0],
            &[0, 6, 1],
            &[0, 255, 1],
            &[1, 0],
            &long,
            &second,
            &short,
            &[1, 1, 1, 2, 3],
            &[1, 2],
            &[2, 0, 0],
            &[2, 0, 0, 0x10],
            &[2, 1, 0xff, 0xff],
            &[2, 2, 0, 0],
            &[3, 1],
            &[4, 0, 2, 0],
            &[4, 1],
            &[5, 0, 1, 0, 0, 0, 0, 0, 0, 0],
            &[255, 255, 255],
        ] {
            assert_eq!(guest.command(wrong, 1), Some(1), "{wrong:02x?}");
        }
        // Without room for an answer nothing is done.
        assert_eq!(guest.command(&[0, 0, 1], 0), None);
        peer.send(&packet(OTHER, 1, 60));
        peer.send(&packet(MAC, 2, 60));
        assert_eq!(guest.receive(), packet(MAC, 2, 60), "as it was");
        guest.rig.end();
    }
}

#[test]
fn b65_commands_whose_features_were_not_taken_are_errors() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let net = Net::new(&options(folder.path())).expect("a card");
        let mut guest = Guest::of(net, events, !feature::CONTROL);
        guest.activate();
        for command in
            [&[0, 0, 0][..], &[0, 2, 1], &[1, 1, 2, 0, 0, 0, 0, 1], &[2, 0, 1, 0], &[3, 0]]
        {
            assert_eq!(guest.command(command, 1), Some(1), "{command:02x?}");
        }
        guest.rig.end();
    }
}

/// A peer whose frames are longer than any packet is out of step: the link goes down, the next one works.
#[test]
fn a_peer_that_breaks_the_framing_is_left() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let mut guest = Guest::start(&options(folder.path()), events);
        for length in [u32::MAX, u32::try_from(MOST).expect("small") + 1] {
            let mut peer = Peer::connect(folder.path());
            peer.0.write_all(&length.to_be_bytes()).expect("sent");
            let mut byte = [0; 1];
            assert_eq!(std::io::Read::read(&mut peer.0, &mut byte).expect("its end"), 0);
        }
        let mut peer = Peer::connect(folder.path());
        // Runts are nobody's.
        for length in [0, 1, 13] {
            peer.send(&vec![0xff; length]);
        }
        peer.send(&packet(MAC, 1, 60));
        assert_eq!(guest.receive(), packet(MAC, 1, 60));
        guest.rig.end();
    }
}
