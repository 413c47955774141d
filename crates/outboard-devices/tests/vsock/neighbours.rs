//! Messages, guests that call each other, and guests that move.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use outboard_devices::vsock::{
    Address, HOST_CID, Kind, Neighbours, Op, Vsock, VsockOptions, feature, seq, shut,
};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType, accept, bind, connect, listen,
    recv, send, socket,
};

use crate::guest::{BOTH, Guest, answer, bytes, client, number, options, patient, server};

/// The host's server of a port, with messages.
fn message_server(folder: &Path, port: u32) -> OwnedFd {
    let server = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).expect("a socket");
    let address = SocketAddrUnix::new(folder.join(format!("vm_{port}"))).expect("a path");
    bind(&server, &address).expect("bound");
    listen(&server, 8).expect("listens");
    server
}

fn message(from: &OwnedFd) -> Vec<u8> {
    let mut bytes = vec![0; 300 << 10];
    let (_, length) = recv(from, &mut bytes[..], RecvFlags::empty()).expect("received");
    bytes.truncate(length);
    bytes
}

#[test]
fn messages_of_a_guest_reach_the_host_whole_and_those_of_the_host_the_guest() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = message_server(folder.path(), 1);
        let mut guest = Guest::start(options(folder.path()), events);
        let to = Address { cid: HOST_CID, port: 1 };
        let mut socket = guest.socket(5000, to, Kind::Seqpacket);
        guest.say(&mut socket, Op::Request);
        guest.expect(&mut socket, Op::Response);
        let host = accept(&listener).expect("a client");
        // One packet, two packets, one of no bytes (which would look like an end), and one more.
        guest.say_with(&mut socket, Op::Data, seq::END_OF_MESSAGE, b"one");
        guest.say_with(&mut socket, Op::Data, 0, b"two, ");
        guest.say_with(&mut socket, Op::Data, seq::END_OF_MESSAGE | seq::END_OF_RECORD, b"cut");
        guest.say_with(&mut socket, Op::Data, seq::END_OF_MESSAGE, b"");
        let long = bytes(100_000, 1);
        guest.say_with(&mut socket, Op::Data, 0, &long[..60_000]);
        guest.say_with(&mut socket, Op::Data, seq::END_OF_MESSAGE, &long[60_000..]);
        assert_eq!(message(&host), b"one");
        assert_eq!(message(&host), b"two, cut");
        assert!(message(&host) == long, "another message");
        // Longer than a receive buffer.
        let long = bytes(10_000, 2);
        send(&host, &long, SendFlags::empty()).expect("sent");
        send(&host, b"short", SendFlags::empty()).expect("sent");
        let mut got = Vec::new();
        let mut lengths = Vec::new();
        while lengths.len() < 2 {
            let (header, bytes) = guest.expect(&mut socket, Op::Data);
            got.extend(bytes);
            if header.flags() & seq::END_OF_MESSAGE != 0 {
                lengths.push(got.len());
            }
        }
        assert_eq!(lengths, [10_000, 10_005]);
        assert!(got[..10_000] == long && &got[10_000..] == b"short", "other bytes");
        drop(host);
        let (header, _) = guest.expect(&mut socket, Op::Shutdown);
        assert_ne!(header.flags() & shut::SEND, 0);
        guest.rig.end();
    }
}

#[test]
fn a_message_waits_for_credit_in_its_middle_and_others_do_not_wait_for_it() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = message_server(folder.path(), 1);
        let mut guest = Guest::start(options(folder.path()), events);
        let to = Address { cid: HOST_CID, port: 1 };
        let mut socket = guest.socket(5000, to, Kind::Seqpacket);
        guest.say(&mut socket, Op::Request);
        guest.expect(&mut socket, Op::Response);
        let host = accept(&listener).expect("a client");
        let (first, second) = (bytes(40_000, 1), bytes(40_000, 2));
        send(&host, &first, SendFlags::empty()).expect("sent");
        send(&host, &second, SendFlags::empty()).expect("sent");
        // The guest has 64 KiB: it goes on in the second one when it has taken the first one.
        let mut got = Vec::new();
        while got.len() < 64 << 10 {
            got.extend(guest.expect(&mut socket, Op::Data).1);
        }
        let stream = client(folder.path(), 9);
        guest.expect(&mut socket, Op::CreditRequest);
        let other = guest.accept(9);
        assert_eq!(answer(&stream), other.peer.port);
        socket.credit.took(40_000);
        guest.say(&mut socket, Op::CreditUpdate);
        let mut last = 0;
        while got.len() < 80_000 {
            let (header, bytes) = guest.expect(&mut socket, Op::Data);
            last = header.flags();
            got.extend(bytes);
        }
        assert_eq!(last, seq::END_OF_MESSAGE);
        assert!(got == [first, second].concat(), "other bytes");
        // One that no buffer of the guest's can hold ends the connection.
        socket.credit.took(40_000);
        guest.say(&mut socket, Op::CreditUpdate);
        send(&host, &bytes(70_000, 3), SendFlags::empty()).expect("sent");
        guest.expect(&mut socket, Op::Reset);
        guest.rig.end();
    }
}

#[test]
fn a_client_with_messages_reaches_the_guest() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let mut guest = Guest::start(options(folder.path()), events);
        let host = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).expect("a socket");
        let path = SocketAddrUnix::new(folder.path().join("vm.seqpacket")).expect("a path");
        connect(&host, &path).expect("it listens");
        send(&host, b"CONNECT 7\n", SendFlags::empty()).expect("sent");
        let mut socket = guest.accept(7);
        assert_eq!(socket.kind, Kind::Seqpacket);
        assert_eq!(message(&host), format!("OK {}\n", socket.peer.port).as_bytes());
        guest.say_with(&mut socket, Op::Data, seq::END_OF_MESSAGE, b"hello");
        assert_eq!(message(&host), b"hello");
        guest.rig.end();
    }
}

/// What a driver has not taken it does not get: types are refused by what was negotiated.
#[test]
fn types_that_were_not_negotiated_are_refused() {
    for (mask, stream, seqpacket) in [
        (!(feature::SEQPACKET | feature::NO_IMPLIED_STREAM), true, false),
        (!(feature::STREAM | feature::NO_IMPLIED_STREAM), true, true),
        (!feature::STREAM, false, true),
        (!feature::SEQPACKET, true, false),
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        let (_streams, _messages) = (server(folder.path(), 1), message_server(folder.path(), 2));
        let mut guest = Guest::asleep(options(folder.path()), &Neighbours::new(), BOTH[0], mask);
        guest.activate();
        for (port, kind, granted) in [(1, Kind::Stream, stream), (2, Kind::Seqpacket, seqpacket)] {
            let mut socket = guest.socket(5000, Address { cid: HOST_CID, port }, kind);
            guest.say(&mut socket, Op::Request);
            let expected = if granted { Op::Response } else { Op::Reset };
            guest.expect(&mut socket, expected);
        }
        guest.rig.end();
    }
}

fn neighbour(folder: &Path, cid: u64, groups: &[&str]) -> VsockOptions {
    let mut options = VsockOptions::new(cid, folder.join(format!("vm{cid}")));
    options.groups = groups.iter().map(|&group| group.to_owned()).collect();
    options
}

#[test]
fn guests_of_one_group_reach_each_other_and_half_close() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let neighbours = Neighbours::new();
        let [mut a, mut b] = [3, 4].map(|cid| {
            Guest::among(neighbour(folder.path(), cid, &["x", "y"]), &neighbours, events)
        });
        for kind in [Kind::Stream, Kind::Seqpacket] {
            let mut from = a.socket(5000, Address { cid: 4, port: 80 }, kind);
            a.say(&mut from, Op::Request);
            let mut to = b.accept(80);
            assert_eq!((to.peer, to.kind), (Address { cid: 3, port: 5000 }, kind));
            a.expect(&mut from, Op::Response);
            a.say_with(&mut from, Op::Data, seq::END_OF_MESSAGE, b"question");
            assert_eq!(b.receive(&mut to, 8), b"question");
            b.say_with(&mut to, Op::Data, seq::END_OF_MESSAGE, b"answer");
            assert_eq!(a.receive(&mut from, 6), b"answer");
            a.say_with(&mut from, Op::Shutdown, shut::BOTH, &[]);
            a.expect(&mut from, Op::Reset);
            let (header, _) = b.expect(&mut to, Op::Shutdown);
            assert_ne!(header.flags() & shut::SEND, 0);
            b.say(&mut to, Op::Reset);
        }
        a.rig.end();
        b.rig.end();
    }
}

/// `OUTBOARD_MIB=1024` has so many of them.
#[test]
fn many_bytes_go_from_guest_to_guest() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let neighbours = Neighbours::new();
        let [mut a, mut b] = [3, 4]
            .map(|cid| Guest::among(neighbour(folder.path(), cid, &["x"]), &neighbours, events));
        let mut from = a.socket(5000, Address { cid: 4, port: 80 }, Kind::Stream);
        a.say(&mut from, Op::Request);
        let mut to = b.accept(80);
        a.expect(&mut from, Op::Response);
        // The same again and again, whose length is that of no buffer.
        let (all, times) = (bytes((1 << 20) + 1, 5), number("OUTBOARD_MIB", 3));
        let sent = all.clone();
        let receiver = std::thread::spawn(move || {
            let mut at = 0;
            while at < sent.len() * times {
                let came = b.receive_some(&mut to);
                let wanted = sent.iter().cycle().skip(at % sent.len());
                assert!(came.iter().eq(wanted.take(came.len())), "other bytes at {at}");
                at += came.len();
            }
            assert_eq!(at, sent.len() * times);
            b
        });
        (0..times).for_each(|_| a.send_all(&mut from, &all));
        receiver.join().expect("ended well").rig.end();
        a.rig.end();
    }
}

#[test]
fn guests_of_other_groups_those_that_refuse_and_those_that_are_gone_reset() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let neighbours = Neighbours::new();
        let mut a = Guest::among(neighbour(folder.path(), 3, &["x"]), &neighbours, events);
        let mut b = Guest::among(neighbour(folder.path(), 4, &["x"]), &neighbours, events);
        let c = Guest::among(neighbour(folder.path(), 5, &["y"]), &neighbours, events);
        let refused = |a: &mut Guest, cid, b: Option<&mut Guest>| {
            let mut socket = a.socket(5000, Address { cid, port: 80 }, Kind::Stream);
            a.say(&mut socket, Op::Request);
            if let Some(b) = b {
                let (header, _) = b.any();
                assert_eq!(header.op(), Some(Op::Request));
                b.send(header.refusal(), &[]);
            }
            a.expect(&mut socket, Op::Reset);
        };
        refused(&mut a, 5, None);
        refused(&mut a, 4, Some(&mut b));
        refused(&mut a, 9, None);
        let twice = Vsock::new(neighbour(&folder.path().join("x"), 3, &["x"]), &neighbours);
        assert!(twice.expect_err("refused").to_string().contains("two guests"));
        b.rig.end();
        refused(&mut a, 4, None);
        c.rig.end();
        a.rig.end();
    }
}

/// Connections do not move: the guest is told, and goes on.
#[test]
fn a_guest_that_moved_hears_that_its_connections_are_gone() {
    for events in BOTH {
        let folders = [0, 1].map(|_| tempfile::tempdir().expect("a folder"));
        let listener = server(folders[0].path(), 1);
        let mut source = Guest::start(options(folders[0].path()), events);
        let mut socket = source.connect(5000, 1);
        let mut host = patient(listener.accept().expect("a client").0);
        source.rig.vmm.sleep().expect("stops").expect("was active");
        let state = source.rig.vmm.connection().save_state().expect("saved");

        let listener = server(folders[1].path(), 1);
        let mut guest =
            Guest::asleep(options(folders[1].path()), &Neighbours::new(), events, u64::MAX);
        guest.rig.vmm.connection().load_state(&state).expect("loaded");
        guest.activate();
        assert_eq!(guest.event(), 0);
        // What it still says of the old one is refused; new ones are served.
        guest.say_with(&mut socket, Op::Data, 0, b"anybody?");
        guest.expect(&mut socket, Op::Reset);
        let mut again = guest.connect(5000, 1);
        guest.say_with(&mut again, Op::Data, 0, b"yes");
        let mut got = [0; 3];
        patient(listener.accept().expect("a client").0).read_exact(&mut got).expect("read");
        assert_eq!(&got, b"yes");
        guest.rig.end();

        // Where it came from nothing has changed: it can go on there.
        source.rig.vmm.wake().expect("starts");
        host.write_all(b"here").expect("sent");
        assert_eq!(source.receive(&mut socket, 4), b"here");
        source.rig.end();
    }
}

/// C28, from the other side: who waits for a guest that is gone hears of its end.
#[test]
fn a_guest_that_leaves_takes_its_connections_along() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = server(folder.path(), 1);
        let mut guest = Guest::start(options(folder.path()), events);
        let mut socket = guest.connect(5000, 1);
        let mut host = patient(listener.accept().expect("a client").0);
        let mut client = client(folder.path(), 9);
        guest.accept(9);
        assert!(answer(&client) > 0);
        guest.say_with(&mut socket, Op::Data, 0, b"last words");
        guest.rig.end();
        let mut said = Vec::new();
        host.read_to_end(&mut said).expect("an end");
        assert_eq!(said, b"last words");
        assert_eq!(client.read(&mut [0; 1]).expect("an end"), 0);
    }
}

/// After a kill: the next process finds rings that were served, and tells the guest that nothing is left.
#[test]
fn a_process_that_follows_a_killed_one_tells_the_guest_that_its_connections_are_gone() {
    for events in BOTH {
        let folders = [0, 1].map(|_| tempfile::tempdir().expect("a folder"));
        let listener = server(folders[0].path(), 1);
        let mut guest = Guest::start(options(folders[0].path()), events);
        let mut socket = guest.connect(5000, 1);
        let host = listener.accept().expect("a client").0;
        let next = Vsock::new(options(folders[1].path()), &Neighbours::new()).expect("a device");
        guest.follow(next, events);
        assert_eq!(guest.event(), 0);
        guest.say_with(&mut socket, Op::Data, 0, b"anybody?");
        guest.expect(&mut socket, Op::Reset);
        let _listener = server(folders[1].path(), 1);
        let _again = guest.connect(5000, 1);
        drop(host);
        guest.rig.end();
    }
}
