//! Streams both ways: connecting, bytes, ends.

use std::io::{Read, Write};

use outboard_devices::vsock::{Address, HOST_CID, Kind, Op, shut};

use crate::guest::{BOTH, Guest, answer, bytes, client, options, patient, server};

#[test]
fn a_guest_reaches_a_port_of_the_host_and_bytes_go_both_ways() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = server(folder.path(), 1234);
        let mut guest = Guest::start(options(folder.path()), events);
        assert_eq!(guest.rig.vmm.read_config(0, 8).expect("read"), 3_u64.to_le_bytes());
        let mut socket = guest.connect(5000, 1234);
        let mut host = patient(listener.accept().expect("a client").0);
        guest.say_with(&mut socket, Op::Data, 0, b"to the host");
        let mut got = [0; 11];
        host.read_exact(&mut got).expect("read");
        assert_eq!(&got, b"to the host");
        host.write_all(b"to the guest").expect("sent");
        assert_eq!(guest.receive(&mut socket, 12), b"to the guest");
        guest.rig.end();
    }
}

#[test]
fn a_client_of_the_host_reaches_a_port_of_the_guest() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let mut guest = Guest::start(options(folder.path()), events);
        let mut host = client(folder.path(), 22);
        host.write_all(b"early").expect("sent");
        let mut socket = guest.accept(22);
        assert_eq!(answer(&host), socket.peer.port);
        assert_eq!(guest.receive(&mut socket, 5), b"early");
        guest.say_with(&mut socket, Op::Data, 0, b"late");
        let mut got = [0; 4];
        host.read_exact(&mut got).expect("read");
        assert_eq!(&got, b"late");
        guest.rig.end();
    }
}

#[test]
fn many_bytes_go_both_ways_with_credit_that_is_exact() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = server(folder.path(), 1);
        let mut guest = Guest::start(options(folder.path()), events);
        let mut socket = guest.connect(5000, 1);
        let mut host = patient(listener.accept().expect("a client").0);
        let (up, down) = (bytes(3_000_001, 1), bytes(2_000_003, 2));
        let mut reader = host.try_clone().expect("a copy");
        let count = up.len();
        let read = std::thread::spawn(move || {
            let mut all = vec![0; count];
            reader.read_exact(&mut all).expect("read");
            all
        });
        guest.send_all(&mut socket, &up);
        assert!(read.join().expect("ended well") == up, "other bytes");
        let sent = down.clone();
        let write = std::thread::spawn(move || {
            host.write_all(&sent).expect("sent");
            host
        });
        assert!(guest.receive(&mut socket, down.len()) == down, "other bytes");
        drop(write.join().expect("ended well"));
        guest.rig.end();
    }
}

/// C28: the guest hears of the host's end after all that was sent before it.
#[test]
fn c28_the_host_closes_and_the_guest_hears_it_after_the_bytes() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = server(folder.path(), 1);
        let mut guest = Guest::start(options(folder.path()), events);
        let mut socket = guest.connect(5000, 1);
        let mut host = patient(listener.accept().expect("a client").0);
        host.write_all(&bytes(100_000, 3)).expect("sent");
        drop(host);
        assert!(guest.receive(&mut socket, 100_000) == bytes(100_000, 3), "other bytes");
        let mut told = 0;
        while told != shut::BOTH {
            let (header, _) = guest.expect(&mut socket, Op::Shutdown);
            assert_eq!(told & !header.flags(), 0, "what was said stays said");
            told = header.flags();
        }
        guest.say(&mut socket, Op::Reset);
        // The addresses can be used again.
        let _again = guest.connect(5000, 1);
        guest.rig.end();
    }
}

/// C28: each side can end its direction and go on receiving.
#[test]
fn c28_half_closed_streams_go_on_in_the_other_direction() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = server(folder.path(), 1);
        let mut guest = Guest::start(options(folder.path()), events);
        let mut socket = guest.connect(5000, 1);
        let mut host = patient(listener.accept().expect("a client").0);
        guest.say_with(&mut socket, Op::Data, 0, b"question");
        guest.say_with(&mut socket, Op::Shutdown, shut::SEND, &[]);
        let mut all = Vec::new();
        host.read_to_end(&mut all).expect("read to its end");
        assert_eq!(all, b"question");
        host.write_all(b"answer").expect("sent");
        assert_eq!(guest.receive(&mut socket, 6), b"answer");
        host.shutdown(std::net::Shutdown::Write).expect("ended");
        let (header, _) = guest.expect(&mut socket, Op::Shutdown);
        // Both: a socket with two ends is not told from one that was closed.
        assert_eq!(header.flags() & shut::SEND, shut::SEND);
        guest.say_with(&mut socket, Op::Shutdown, shut::BOTH, &[]);
        guest.expect(&mut socket, Op::Reset);

        let mut socket = guest.connect(5001, 1);
        let mut host = patient(listener.accept().expect("a client").0);
        host.shutdown(std::net::Shutdown::Write).expect("ended");
        let (header, _) = guest.expect(&mut socket, Op::Shutdown);
        assert_eq!(header.flags(), shut::SEND);
        guest.say_with(&mut socket, Op::Data, 0, b"still there");
        let mut got = [0; 11];
        host.read_exact(&mut got).expect("read");
        assert_eq!(&got, b"still there");
        guest.rig.end();
    }
}

/// C28: bytes that the host will never read do not hold up the guest, and bytes that it has sent come first.
#[test]
fn c28_a_host_that_leaves_with_bytes_unread_resets_the_connection_after_its_own() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = server(folder.path(), 1);
        let mut guest = Guest::start(options(folder.path()), events);
        let mut socket = guest.connect(5000, 1);
        let mut host = patient(listener.accept().expect("a client").0);
        guest.say_with(&mut socket, Op::Data, 0, b"unread");
        host.write_all(b"last words").expect("sent");
        drop(host);
        assert_eq!(guest.receive(&mut socket, 10), b"last words");
        let (op, _, _) = guest.hear(&mut socket);
        assert!(matches!(op, Op::Reset | Op::Shutdown), "{op:?}");
        guest.rig.end();
    }
}

/// B66: addresses that are not for everybody.
#[test]
fn b66_a_port_without_a_server_and_one_that_is_not_allowed_are_refused() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let _listeners = [server(folder.path(), 7), server(folder.path(), 8)];
        let mut options = options(folder.path());
        options.host_ports = "8-9".parse().expect("ports");
        options.guest_ports = "22".parse().expect("ports");
        let mut guest = Guest::start(options, events);
        for port in [7, 9] {
            let mut socket = guest.socket(5000, Address { cid: HOST_CID, port }, Kind::Stream);
            guest.say(&mut socket, Op::Request);
            guest.expect(&mut socket, Op::Reset);
        }
        let _granted = guest.connect(5000, 8);
        let mut refused = client(folder.path(), 23);
        assert!(!matches!(refused.read(&mut [0; 1]), Ok(1..)), "it was let in");
        let _first = client(folder.path(), 22);
        let (asked, _) = guest.any();
        assert_eq!(asked.destination().port, 22, "of the other one nothing is heard");
        guest.send(asked.refusal(), &[]);
        let host = client(folder.path(), 22);
        let socket = guest.accept(22);
        assert_eq!(answer(&host), socket.peer.port);
        guest.rig.end();
    }
}

#[test]
fn a_guest_that_refuses_a_client_closes_its_socket() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let mut guest = Guest::start(options(folder.path()), events);
        let mut host = client(folder.path(), 22);
        let (header, _) = guest.any();
        assert_eq!(header.op(), Some(Op::Request));
        guest.send(header.refusal(), &[]);
        assert_eq!(host.read(&mut [0; 1]).expect("closed"), 0);
        guest.rig.end();
    }
}

/// A server that has too many callers at the moment is called again.
#[test]
fn a_busy_server_is_called_until_it_has_time() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = server(folder.path(), 1);
        rustix::net::listen(&listener, 0).expect("a short queue");
        let mut guest = Guest::start(options(folder.path()), events);
        let mut sockets = Vec::new();
        for ours in 0..5 {
            let mut socket = guest.socket(ours, Address { cid: HOST_CID, port: 1 }, Kind::Stream);
            guest.say(&mut socket, Op::Request);
            sockets.push(socket);
        }
        let clients: Vec<_> = (0..5).map(|_| listener.accept().expect("a client")).collect();
        for socket in &mut sockets {
            guest.expect(socket, Op::Response);
        }
        drop(clients);
        guest.rig.end();
    }
}
