//! Packets both ways, receive modes, the link that comes and goes.

use std::os::unix::net::UnixListener;

use outboard::protocol::virtio;
use outboard_devices::net::{Net, NetOptions, Stream};
use outboard_frontend::Wanted;

use crate::guest::{ALL, BOTH, CONTROL, Guest, MAC, OTHER, Peer, RX, link, options, packet};
use crate::rig::{Rig, serve};

#[test]
fn packets_of_every_length_go_both_ways_whole_and_in_order() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let mut guest = Guest::start(&options(folder.path()), events);
        let mut peer = Peer::connect(folder.path());
        for (fill, length) in (0..).zip([14, 15, 59, 60, 61, 1000, 1514, 2036]) {
            peer.send(&packet(MAC, fill, length));
            assert_eq!(guest.receive(), packet(MAC, fill, length));
            guest.send(&packet(ALL, fill, length));
            assert_eq!(peer.receive(), packet(ALL, fill, length));
        }
        for fill in 0..200 {
            peer.send(&packet(MAC, fill, 100));
        }
        for fill in 0..200 {
            assert_eq!(guest.receive(), packet(MAC, fill, 100));
        }
        guest.rig.end();
    }
}

/// DPDK's driver asks for it by itself.
#[test]
fn b46_packets_go_both_ways_where_order_was_promised_on_either_kind_of_ring() {
    for wanted in
        [Wanted::default().with_in_order(), Wanted::default().with_in_order().with_packed_rings()]
    {
        let folder = tempfile::tempdir().expect("a folder");
        let net = Net::new(&options(folder.path())).expect("a card");
        let (connection, server) = serve(net, BOTH[1]);
        let rig = Rig::with(connection, server, u64::MAX, wanted);
        assert_ne!(rig.vmm.features() & virtio::IN_ORDER, 0, "offered");
        let mut guest = Guest { rig, control: CONTROL };
        guest.activate();
        let mut peer = Peer::connect(folder.path());
        for round in 0..20 {
            for fill in 0..20 {
                peer.send(&packet(MAC, round + fill, 100));
            }
            for fill in 0..20 {
                assert_eq!(guest.receive(), packet(MAC, round + fill, 100));
            }
            guest.send_many(20, &packet(ALL, round, 60));
            for _ in 0..20 {
                assert_eq!(peer.receive(), packet(ALL, round, 60));
            }
        }
        guest.rig.end();
    }
}

#[test]
fn frames_may_be_cut_anywhere() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let mut guest = Guest::start(&options(folder.path()), events);
        let mut peer = Peer::connect(folder.path());
        for cut in [1, 2, 3, 4, 5, 20, 103] {
            let frame = [&100_u32.to_be_bytes()[..], &packet(MAC, 9, 100)].concat();
            for part in [&frame[..cut], &frame[cut..]] {
                std::io::Write::write_all(&mut peer.0, part).expect("sent");
                // Another thing that takes its time: so that each part comes by itself at times.
                assert_eq!(guest.command(&[9, 9], 1), Some(1));
            }
            assert_eq!(guest.receive(), packet(MAC, 9, 100));
        }
        guest.rig.end();
    }
}

/// A packet waits for a buffer; buffers stay in the ring while there is no packet.
#[test]
fn a_ring_without_packets_stops_with_all_of_its_buffers() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let mut guest = Guest::start(&options(folder.path()), events);
        let mut peer = Peer::connect(folder.path());
        peer.send(&packet(MAC, 1, 60));
        assert_eq!(guest.receive(), packet(MAC, 1, 60));
        let bases = guest.rig.vmm.sleep().expect("stops").expect("was active");
        assert_eq!(bases[RX], (0, 1), "one buffer was used, and no other one was taken");
        peer.send(&packet(MAC, 2, 60));
        guest.rig.vmm.wake().expect("starts");
        assert_eq!(guest.receive(), packet(MAC, 2, 60));
        guest.rig.end();
    }
}

#[test]
fn a_driver_gets_what_its_receive_modes_and_addresses_let_through() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let mut guest = Guest::start(&options(folder.path()), events);
        let mut peer = Peer::connect(folder.path());
        assert_eq!(guest.command(&[0, 0, 0], 1), Some(0), "not promiscuous");
        peer.send(&packet(OTHER, 1, 60));
        peer.send(&packet(MAC, 2, 60));
        assert_eq!(guest.receive(), packet(MAC, 2, 60));
        let table = [&[1, 0][..], &1_u32.to_le_bytes(), &OTHER, &0_u32.to_le_bytes()].concat();
        assert_eq!(guest.command(&table, 1), Some(0));
        peer.send(&packet(OTHER, 3, 60));
        assert_eq!(guest.receive(), packet(OTHER, 3, 60));
        assert_eq!(guest.command(&[0, 5, 1], 1), Some(0), "no broadcasts");
        assert_eq!(guest.command(&[&[1, 1][..], &[2, 0, 0, 0, 0, 7]].concat(), 1), Some(0));
        assert_eq!(guest.rig.vmm.read_config(0, 6).expect("read"), [2, 0, 0, 0, 0, 7]);
        peer.send(&packet(ALL, 4, 60));
        peer.send(&packet(MAC, 5, 60));
        peer.send(&packet([2, 0, 0, 0, 0, 7], 6, 60));
        assert_eq!(guest.receive(), packet([2, 0, 0, 0, 0, 7], 6, 60));
        guest.rig.end();
    }
}

/// Untagged packets always pass; tagged ones all do until the driver names a VLAN, and then those that are named.
#[test]
fn a_driver_that_names_vlans_gets_packets_of_those_and_of_none() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let net = Net::new(&options(folder.path())).expect("a card");
        let counters = net.counters().remove(0);
        let mut guest = Guest::of(net, events, u64::MAX);
        guest.activate();
        let mut peer = Peer::connect(folder.path());
        // Priority bits are none of the number.
        let tagged = |vlan: u16, fill: u8| {
            let [high, low] = vlan.to_be_bytes();
            let mut bytes = packet(MAC, fill, 64);
            bytes[12..16].copy_from_slice(&[0x81, 0, 0xa0 | high, low]);
            bytes
        };
        let named = |command: u8, vlan: u16| [&[2, command][..], &vlan.to_le_bytes()].concat();
        peer.send(&tagged(7, 1));
        assert_eq!(guest.receive(), tagged(7, 1), "nothing was named yet");
        assert_eq!(guest.command(&named(0, 100), 1), Some(0));
        assert_eq!(guest.command(&named(0, 4095), 1), Some(0));
        for (sent, passes) in [
            (tagged(7, 2), false),
            (tagged(100, 3), true),
            (tagged(101, 4), false),
            (tagged(4095, 5), true),
            (packet(MAC, 6, 60), true),
        ] {
            peer.send(&sent);
            if passes {
                assert_eq!(guest.receive(), sent);
            }
        }
        assert_eq!(guest.command(&named(1, 100), 1), Some(0), "no more");
        peer.send(&tagged(100, 7));
        peer.send(&tagged(4095, 8));
        assert_eq!(guest.receive(), tagged(4095, 8));
        assert_eq!(counters.filtered.get(), 3);
        assert_eq!(guest.command(&named(0, 4096), 1), Some(1), "there is no such VLAN");
        guest.rig.end();
    }
}

/// C27: the link goes down and comes back; packets are dropped and counted meanwhile.
#[test]
fn c27_a_peer_that_leaves_takes_the_link_down_and_the_next_one_brings_it_up() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let net = Net::new(&options(folder.path())).expect("a card");
        let counters = net.counters().remove(0);
        let mut guest = Guest::of(net, events, u64::MAX);
        guest.activate();
        let status = |guest: &mut Guest| guest.rig.vmm.read_config(6, 1).expect("read")[0];
        assert_eq!(status(&mut guest), 0, "down");
        for round in 0..3 {
            let lost = counters.link_down.get();
            guest.send(&packet(ALL, 1, 60));
            assert_eq!(counters.link_down.get(), lost + 1);
            let mut peer = Peer::connect(folder.path());
            peer.send(&packet(MAC, round, 60));
            assert_eq!(guest.receive(), packet(MAC, round, 60));
            assert_eq!(status(&mut guest), 1, "up");
            guest.send(&packet(ALL, round, 60));
            assert_eq!(peer.receive(), packet(ALL, round, 60));
            drop(peer);
            while status(&mut guest) == 1 {
                std::thread::yield_now();
            }
        }
        guest.rig.end();
    }
}

/// C27: a peer that takes nothing holds up what the guest sends, and nothing is lost.
#[test]
fn c27_a_peer_that_does_not_read_holds_up_the_transmit_queue_only() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let mut guest = Guest::start(&options(folder.path()), events);
        let mut peer = Peer::connect(folder.path());
        let bytes = [&[0; 12][..], &packet(ALL, 7, 1514)].concat();
        let at = guest.rig.at(3 << 20);
        guest.rig.store(at, &bytes);
        let (mut sent, mut taken) = (0_u64, 0_u64);
        while sent < taken + 40 {
            guest.rig.offer(1, &[(at, 1526)], &[], sent);
            sent += 1;
            // Round trips elsewhere: by then this queue was looked at.
            peer.send(&packet(MAC, 1, 60));
            assert_eq!(guest.receive(), packet(MAC, 1, 60));
            assert_eq!(guest.command(&[9, 9], 1), Some(1));
            while guest.rig.is_back(1) {
                taken += 1;
            }
            assert!(sent < 100_000, "it never waits");
        }
        for _ in 0..sent {
            assert_eq!(peer.receive(), packet(ALL, 7, 1514));
        }
        while taken < sent {
            guest.rig.back(1);
            taken += 1;
        }
        guest.rig.end();
    }
}

#[test]
fn a_card_can_connect_to_its_peer_and_writes_what_goes_through_to_a_file() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = UnixListener::bind(link(folder.path())).expect("a peer");
        let mut options = NetOptions::new(Stream::Connect(link(folder.path())));
        options.mtu = Some(9000);
        options.pcap = Some(folder.path().join("pcap"));
        let net = Net::new(&options).expect("a card");
        let mac = net.mac();
        assert_eq!(mac[0] & 3, 2, "one of its own");
        let mut guest = Guest::of(net, events, u64::MAX);
        guest.activate();
        let config = guest.rig.vmm.read_config(0, 12).expect("read");
        assert_eq!((&config[..6], &config[10..]), (&mac[..], &9000_u16.to_le_bytes()[..]));
        let mut peer = Peer::of(listener.accept().expect("it connects").0);
        peer.send(&packet(mac, 1, 60));
        assert_eq!(guest.receive(), packet(mac, 1, 60));
        guest.send(&packet(ALL, 2, 70));
        assert_eq!(peer.receive(), packet(ALL, 2, 70));
        guest.rig.end();
        let file = std::fs::read(folder.path().join("pcap")).expect("there");
        assert_eq!(file[..4], 0xa1b2_c3d4_u32.to_le_bytes());
        assert_eq!(file.len(), 24 + 16 + 60 + 16 + 70);
        assert_eq!(file[24 + 8..24 + 16], [60, 0, 0, 0, 60, 0, 0, 0]);
        assert_eq!(file[24 + 16 + 60 + 16..], packet(ALL, 2, 70));
    }
}

#[test]
fn an_earlier_capture_is_kept_until_the_card_that_takes_its_place_is_served() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("packets.pcap");
    std::fs::write(&file, "an earlier capture that is longer than a head").expect("written");
    let pcap = Some(file.clone());
    let nobody = NetOptions::new(Stream::Connect(folder.path().join("nobody")));
    assert!(Net::new(&NetOptions { pcap: pcap.clone(), ..nobody }).is_err());
    let net = Net::new(&NetOptions { pcap, ..options(folder.path()) }).expect("a card");
    let kept = std::fs::read_to_string(&file).expect("still there");
    assert_eq!(kept, "an earlier capture that is longer than a head");
    let mut guest = Guest::of(net, BOTH[0], u64::MAX);
    guest.activate();
    guest.rig.end();
    let head = std::fs::read(&file).expect("there");
    assert_eq!((head.len(), &head[..4]), (24, &[0xd4, 0xc3, 0xb2, 0xa1][..]), "and no packet");
}

#[test]
fn the_front_end_has_a_rarp_sent_and_sets_the_mtu() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut options = options(folder.path());
    options.mtu = Some(1500);
    let mut guest = Guest::start(&options, BOTH[0]);
    let mut peer = Peer::connect(folder.path());
    peer.send(&packet(MAC, 1, 60));
    guest.receive();
    guest.rig.vmm.connection().send_rarp(OTHER).expect("sent");
    let rarp = peer.receive();
    assert_eq!(rarp.len(), 60);
    assert_eq!(
        (&rarp[..6], &rarp[6..12], &rarp[12..14]),
        (&ALL[..], &OTHER[..], &[0x80, 0x35][..])
    );
    assert_eq!((&rarp[20..22], &rarp[22..28]), (&[0, 3][..], &OTHER[..]));
    guest.rig.vmm.connection().net_set_mtu(1400).expect("set");
    assert_eq!(guest.rig.vmm.read_config(10, 2).expect("read"), 1400_u16.to_le_bytes());
    guest.rig.vmm.connection().net_set_mtu(1501).expect_err("more than there is");
    guest.rig.vmm.connection().net_set_mtu(67).expect_err("less than any network has");
    guest.rig.end();
}
