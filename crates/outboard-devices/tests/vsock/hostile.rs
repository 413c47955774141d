//! Drivers that do not keep to the rules (cases B66, B67, B68).

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use outboard_devices::vsock::{Address, HOST_CID, Header, Kind, Op, Told, shut};
use zerocopy::IntoBytes;

use crate::guest::{BOTH, CID, Guest, ROOM, answer, bytes, client, options, patient, server};
use crate::guest::{BUFFER, BUFFERS, RX, Socket, TRANSMIT, TX};

/// Connections that are refused and of which the guest was not told yet, at most.
const REFUSALS: u64 = 256;
/// How long nothing happens when nothing is to happen.
const SILENCE: Duration = Duration::from_millis(200);

const HOST: Address = Address { cid: HOST_CID, port: 1 };

fn refused(guest: &mut Guest, header: &Header, bytes: &[u8]) {
    guest.send(*header, bytes);
    assert_eq!(guest.any().0, header.refusal(), "{header:?}");
}

/// The device answers a guest that asks for a connection.
fn lives(guest: &mut Guest, folder: &std::path::Path) {
    let host = client(folder, 9);
    let socket = guest.accept(9);
    assert_eq!(answer(&host), socket.peer.port);
}

#[test]
fn b66_packets_that_are_none_are_dropped() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let mut guest = Guest::start(options(folder.path()), events);
        let from = Address { cid: CID, port: 5000 };
        let whole = Header::new(from, HOST, Kind::Stream, Op::Request);
        for length in [1, 16, 24, 28, 43] {
            guest.send_raw(&whole.as_bytes()[..length]);
        }
        // Nobody but the guest speaks here, and nobody may speak for another one.
        for cid in [0, 1, 2, 4, 1 << 32 | CID, u64::MAX] {
            let header = Header::new(Address { cid, port: 5000 }, HOST, Kind::Stream, Op::Request);
            guest.send(header, &[]);
        }
        // Bytes that are not there.
        for length in [1, 65536, 1 << 31, u32::MAX] {
            let header = Header::new(from, HOST, Kind::Stream, Op::Data).with_length(length);
            guest.send(header, &[]);
        }
        // A chain of writable bytes only.
        let room = guest.rig.at(7 << 20);
        guest.rig.offer(TX, &[], &[(room, 64)], 5);
        assert_eq!(guest.rig.back(TX), (5, 0));
        lives(&mut guest, folder.path());
        guest.rig.end();
    }
}

#[test]
fn b66_unknown_types_operations_addresses_and_connections_are_reset() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let _listener = server(folder.path(), 1);
        let mut guest = Guest::start(options(folder.path()), events);
        let from = Address { cid: CID, port: 5000 };
        let request = Header::new(from, HOST, Kind::Stream, Op::Request);
        for kind in [0_u16, 3, 4, 0x101, u16::MAX] {
            let mut bytes = request.as_bytes().to_vec();
            bytes[28..30].copy_from_slice(&kind.to_le_bytes());
            guest.send_raw(&bytes);
            let (header, _) = guest.any();
            assert_eq!((header.op(), header.source()), (Some(Op::Reset), HOST), "type {kind}");
            assert_eq!(header.as_bytes()[28..30], kind.to_le_bytes());
        }
        for op in [0_u16, 8, 9, 0x101, u16::MAX] {
            let mut bytes = request.as_bytes().to_vec();
            bytes[30..32].copy_from_slice(&op.to_le_bytes());
            guest.send_raw(&bytes);
            assert_eq!(guest.any().0.op(), Some(Op::Reset), "operation {op}");
        }
        for op in [Op::Response, Op::Shutdown, Op::Data, Op::CreditUpdate, Op::CreditRequest] {
            refused(&mut guest, &Header::new(from, HOST, Kind::Stream, op), &[]);
        }
        for cid in [0, 1, CID, 77, u64::from(u32::MAX), u64::MAX] {
            let to = Address { cid, port: 1 };
            refused(&mut guest, &Header::new(from, to, Kind::Stream, Op::Request), &[]);
        }
        // Nobody answers a reset.
        guest.send(Header::new(from, HOST, Kind::Stream, Op::Reset), &[]);
        lives(&mut guest, folder.path());
        assert!(!guest.has_any(5000));
        guest.rig.end();
    }
}

/// A connection is reset by what it was sent, and the device goes on.
fn resets(spoil: impl Fn(&mut Guest, &mut Socket)) {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = server(folder.path(), 1);
        let mut guest = Guest::start(options(folder.path()), events);
        let mut socket = guest.connect(5000, 1);
        let mut host = patient(listener.accept().expect("a client").0);
        spoil(&mut guest, &mut socket);
        loop {
            let (header, _) = guest.any();
            assert_eq!(header.source(), socket.peer);
            if header.op() == Some(Op::Reset) {
                break;
            }
        }
        let mut rest = Vec::new();
        host.read_to_end(&mut rest).expect("an end");
        let _another = guest.connect(6000, 1);
        lives(&mut guest, folder.path());
        guest.rig.end();
    }
}

fn header(socket: &Socket, op: Op, room: u32, taken: u32) -> Header {
    Header::new(socket.ours, socket.peer, socket.kind, op).with_credit(Told { room, taken })
}

#[test]
fn b66_bytes_that_are_not_there_are_not_brought() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = server(folder.path(), 1);
        let mut guest = Guest::start(options(folder.path()), events);
        let mut socket = guest.connect(5000, 1);
        let mut host = patient(listener.accept().expect("a client").0);
        let short = header(&socket, Op::Data, ROOM, 0).with_length(100);
        guest.send(short, b"too short");
        guest.say_with(&mut socket, Op::Data, 0, b"whole");
        let mut bytes = [0; 5];
        host.read_exact(&mut bytes).expect("bytes");
        assert_eq!(&bytes, b"whole");
        guest.rig.end();
    }
}

#[test]
fn b66_another_type_resets_a_connection() {
    resets(|guest, socket| {
        let header = Header::new(socket.ours, socket.peer, Kind::Seqpacket, Op::CreditUpdate);
        guest.send(header, &[]);
    });
}

#[test]
fn b67_a_guest_that_has_taken_more_than_was_sent_is_reset() {
    for taken in [1, 1000, 1 << 30, 1 << 31] {
        resets(|guest, socket| guest.send(header(socket, Op::CreditUpdate, ROOM, taken), &[]));
    }
}

#[test]
fn b67_bytes_beyond_credit_reset_a_connection_and_no_more_than_that_is_kept() {
    resets(|guest, socket| {
        // The host does not read.
        let piece = vec![7; 32 << 10];
        for _ in 0..64 {
            let header = header(socket, Op::Data, ROOM, 0).with_length(32 << 10);
            guest.send(header, &piece);
        }
    });
    resets(|guest, socket| {
        let header = header(socket, Op::Data, ROOM, 0).with_length((256 << 10) + 1);
        guest.send(header, &vec![7; (256 << 10) + 1]);
    });
}

#[test]
fn b67_requests_responses_and_bytes_after_the_end_reset_a_connection() {
    resets(|guest, socket| guest.say(socket, Op::Request));
    resets(|guest, socket| guest.say(socket, Op::Response));
    resets(|guest, socket| {
        guest.say_with(socket, Op::Shutdown, shut::SEND, &[]);
        guest.say_with(socket, Op::Data, 0, b"more");
    });
}

/// B67: with no room, and then with 4 GiB of it, a guest gets what its buffers hold.
#[test]
fn b67_a_guest_with_no_room_gets_nothing_and_one_with_all_of_it_gets_what_there_is() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = server(folder.path(), 1);
        let mut guest = Guest::start(options(folder.path()), events);
        let mut socket = guest.connect(5000, 1);
        guest.send(header(&socket, Op::CreditUpdate, 0, 0), &[]);
        let mut host = patient(listener.accept().expect("a client").0);
        host.write_all(b"waits").expect("sent");
        guest.expect(&mut socket, Op::CreditRequest);
        guest.send(header(&socket, Op::CreditUpdate, 0, 0), &[]);
        lives(&mut guest, folder.path());
        assert!(!guest.has_any(5000), "it was asked once");
        guest.send(header(&socket, Op::CreditUpdate, u32::MAX, 0), &[]);
        assert_eq!(guest.expect(&mut socket, Op::Data).1, b"waits");
        guest.rig.end();
    }
}

/// B68: connections of one guest are bounded, and the others are served.
#[test]
fn b68_a_flood_of_connections_ends_at_the_limit() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = server(folder.path(), 1);
        let mut options = options(folder.path());
        options.connections = 10;
        let mut guest = Guest::start(options, events);
        let (mut granted, mut hosts) = (Vec::new(), Vec::new());
        for ours in 0..65_536 / 64 {
            let mut socket = guest.socket(ours, HOST, Kind::Stream);
            guest.say(&mut socket, Op::Request);
            match guest.hear(&mut socket).0 {
                Op::Response => {
                    granted.push(socket);
                    hosts.push(listener.accept().expect("a client").0);
                }
                op => assert_eq!(op, Op::Reset),
            }
        }
        assert_eq!(granted.len(), 10);
        let mut turned_away = client(folder.path(), 9);
        assert!(!matches!(turned_away.read(&mut [0; 1]), Ok(1..)), "it was let in");
        // The same port again ends the old connection; then there is room.
        let mut first = granted.swap_remove(0);
        guest.say(&mut first, Op::Request);
        guest.expect(&mut first, Op::Reset);
        lives(&mut guest, folder.path());
        guest.rig.end();
    }
}

/// B68: who asks and asks and takes no answer waits with what he asks, and harms nobody.
#[test]
fn b68_a_guest_that_posts_no_buffers_waits_with_its_requests() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let mut guest = Guest::start(options(folder.path()), events);
        guest.refills = false;
        let at = guest.rig.at(TRANSMIT);
        let from = Address { cid: CID, port: 5000 };
        guest.rig.store(at, Header::new(from, HOST, Kind::Stream, Op::Data).as_bytes());
        let (mut sent, mut taken) = (0_u64, 0_u64);
        // Each is to be refused: what the ring of receive buffers holds, and as many as may wait, are taken.
        loop {
            if sent < taken + 60 {
                guest.rig.offer(TX, &[(at, 44)], &[], sent);
                sent += 1;
            } else if !guest.rig.queues[TX].wait(SILENCE).expect("waits") {
                break;
            }
            while guest.rig.is_back(TX) {
                taken += 1;
            }
            assert!(taken <= BUFFERS + REFUSALS, "{taken} were taken");
        }
        // With buffers it goes on.
        let mut heard = 0;
        while heard < sent {
            let (slot, length) = guest.rig.back(RX);
            assert_eq!(length, 44);
            heard += 1;
            guest.refill(slot);
        }
        while taken < sent {
            guest.rig.back(TX);
            taken += 1;
        }
        guest.rig.end();
    }
}

/// Writes until there is no room; what it was.
fn fill(host: &mut UnixStream, seed: u64) -> Vec<u8> {
    rustix::net::sockopt::set_socket_send_buffer_size(&*host, 64 << 10).expect("a size");
    host.set_nonblocking(true).expect("a socket");
    let (all, mut count) = (bytes(4 << 20, seed), 0);
    loop {
        assert!(count < all.len(), "somebody takes all of it");
        match host.write(&all[count..]) {
            Ok(more) => count += more,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => assert_eq!(error.kind(), ErrorKind::Interrupted),
        }
    }
    host.set_nonblocking(false).expect("a socket");
    all[..count].to_vec()
}

#[test]
fn b68_a_guest_without_receive_buffers_holds_up_its_hosts_and_nothing_it_sends() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let mut guest = Guest::start(options(folder.path()), events);
        let mut connect = |port| {
            let host = client(folder.path(), port);
            let socket = guest.accept(port);
            assert_eq!(answer(&host), socket.peer.port);
            (socket, host)
        };
        let mut pairs: Vec<_> = (100..104).map(&mut connect).collect();
        // More than its buffers hold. It takes none of them, and gives no others.
        let sent: Vec<_> =
            (0..).zip(&mut pairs).map(|(seed, (_, host))| fill(host, seed)).collect();
        let all: u64 = sent.iter().map(|bytes| bytes.len() as u64).sum();
        assert!(all > BUFFERS * BUFFER, "{all} bytes");
        for (socket, host) in &mut pairs {
            guest.say_with(socket, Op::Data, 0, b"x");
            host.read_exact(&mut [0; 1]).expect("read");
        }
        for ((socket, _host), sent) in pairs.iter_mut().zip(&sent) {
            assert!(guest.receive(socket, sent.len()) == *sent, "other bytes came");
        }
        guest.rig.end();
    }
}

/// Receive buffers that are too short come back empty; what was to be said is said in the next one.
#[test]
fn b66_receive_buffers_of_any_length_are_used_as_far_as_they_go() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let mut guest = Guest::start(options(folder.path()), events);
        guest.refills = false;
        let mut host = client(folder.path(), 9);
        host.write_all(b"0123456789").expect("sent");
        let mut socket = guest.accept(9);
        // The rest of the buffers goes to refusals.
        let stray = Header::new(Address { cid: CID, port: 1 }, HOST, Kind::Stream, Op::Data);
        let mut got = guest.expect(&mut socket, Op::Data).1;
        assert_eq!(got, b"0123456789");
        for _ in 0..30 {
            guest.send(stray, &[]);
            assert_eq!(guest.any().0.op(), Some(Op::Reset));
        }
        host.write_all(b"abcdef").expect("sent");
        got.clear();
        let place = guest.rig.at(0);
        for (length, bytes) in [(1, 0), (43, 0), (44, 0), (46, 2), (45, 1), (100, 3)] {
            guest.rig.offer(RX, &[], &[(place, length)], 0);
            let (_, used) = guest.rig.back(RX);
            assert_eq!(used, if bytes == 0 { 0 } else { 44 + bytes }, "{length}");
            if bytes > 0 {
                got.extend(guest.rig.load(place + 44, bytes));
            }
        }
        assert_eq!(got, b"abcdef");
        // One that only the driver may write is no room at all.
        guest.rig.offer(RX, &[(place, 4096)], &[], 0);
        host.write_all(b"x").expect("sent");
        assert_eq!(guest.rig.back(RX).1, 0);
        assert_eq!(BUFFER, 4096);
        guest.rig.end();
    }
}
