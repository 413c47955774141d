//! Ports and their host's sides: names, opening and closing, back-pressure, breaking off.

use std::io::Write;
use std::net::Shutdown;

use outboard_devices::console::{Console, Host, PortOptions, Size, feature};

use crate::guest::{BOTH, Guest, client, options, read, read_to_end, socket, until};

/// Queues of port 1.
const RX: usize = 4;
const TX: usize = 5;

#[test]
fn a_driver_is_told_of_ports_their_kinds_names_and_whether_they_are_open() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let console = PortOptions { console: true, ..socket(folder.path(), "") };
        let ports = vec![console, socket(folder.path(), "org.a")];
        let mut guest = Guest::start(options(ports), events);
        guest.meet(2);
        guest.say(0, 3, 1);
        assert_eq!(guest.hear(), (0, 4, 1, Vec::new()), "CONSOLE_PORT");
        assert_eq!(guest.hear(), (0, 5, 0, vec![80, 0, 25, 0]), "RESIZE");
        guest.say(1, 3, 1);
        assert_eq!(guest.hear(), (1, 7, 1, b"org.a".to_vec()), "PORT_NAME");
        let host = client(folder.path(), "org.a");
        assert_eq!(guest.hear(), (1, 6, 1, Vec::new()), "PORT_OPEN");
        drop(host);
        assert_eq!(guest.hear(), (1, 6, 0, Vec::new()), "PORT_OPEN");
        guest.rig.end();
    }
}

#[test]
fn bytes_go_both_ways_on_each_port_by_itself() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let ports = vec![socket(folder.path(), "a"), socket(folder.path(), "b")];
        let mut guest = Guest::start(options(ports), events);
        let mut hosts = [client(folder.path(), "a"), client(folder.path(), "b")];
        for (port, (queue, host)) in [0, RX].into_iter().zip(&mut hosts).enumerate() {
            guest.make(u32::try_from(port).expect("small"));
            let text = format!("to the guest, port {port}");
            host.write_all(text.as_bytes()).expect("sent");
            assert_eq!(guest.receive_all(queue, text.len()), text.as_bytes());
            let long: Vec<_> = (0..40_000_u32).map(|n| n.to_le_bytes()[port]).collect();
            guest.transmit(queue + 1, &long);
            assert_eq!(read(host, long.len()), long);
        }
        guest.rig.end();
    }
}

#[test]
fn what_the_host_sends_waits_until_somebody_in_the_guest_opens_the_port() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let ports = vec![socket(folder.path(), "a"), socket(folder.path(), "b")];
        let mut guest = Guest::start(options(ports), events);
        let mut host = client(folder.path(), "b");
        host.write_all(b"early").expect("sent");
        guest.say(1, 3, 1);
        guest.say(1, 6, 0);
        assert!(!guest.rig.is_back(RX), "nobody reads");
        guest.say(1, 6, 1);
        assert_eq!(guest.receive_all(RX, 5), b"early");
        guest.rig.end();
    }
}

/// B71: one port's host reads nothing; the other port goes on, and nothing is lost.
#[test]
fn b71_a_host_that_does_not_read_holds_up_its_own_port_only() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let ports = vec![socket(folder.path(), "a"), socket(folder.path(), "b")];
        let mut guest = Guest::start(options(ports), events);
        let (mut deaf, mut host) = (client(folder.path(), "a"), client(folder.path(), "b"));
        guest.make(0);
        guest.make(1);
        // Until nothing is taken any more: socket buffers and ours are full.
        let piece = [7; 32 << 10];
        let (mut sent, mut taken) = (0_u64, 0_u64);
        loop {
            guest.send(1, &piece, sent);
            sent += 1;
            // Another port's round trip: by then this one was looked at, twice.
            for text in [b"ping", b"pong"] {
                guest.transmit(TX, text);
                assert_eq!(read(&mut host, 4), text);
            }
            while guest.rig.is_back(1) {
                taken += 1;
            }
            if taken + 8 <= sent {
                break;
            }
            assert!(sent < 10_000, "it never waits");
        }
        let all = read(&mut deaf, usize::try_from(sent).expect("small") * piece.len());
        assert!(all.iter().all(|&byte| byte == 7));
        while taken < sent {
            guest.rig.back(1);
            taken += 1;
        }
        guest.rig.end();
    }
}

/// Front-ends start a ring before they enable it, also one that a guest has used before: no byte of it is lost.
#[test]
fn what_is_transmitted_on_a_disabled_ring_waits_until_it_is_enabled() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let ports = vec![socket(folder.path(), "a"), socket(folder.path(), "b")];
        let mut guest = Guest::start(options(ports), events);
        let (mut one, mut host) = (client(folder.path(), "a"), client(folder.path(), "b"));
        guest.make(0);
        guest.make(1);
        guest.rig.vmm.connection().set_vring_enable(5, false).expect("disabled");
        guest.send(TX, b"late", 3);
        for text in [b"ping", b"pong"] {
            guest.transmit(1, text);
            assert_eq!(read(&mut one, 4), text);
        }
        assert!(!guest.rig.is_back(TX), "nobody has looked at it");
        guest.rig.vmm.connection().set_vring_enable(5, true).expect("enabled");
        assert_eq!(guest.rig.back(TX), (3, 0));
        assert_eq!(read(&mut host, 4), b"late");
        guest.rig.end();
    }
}

/// The newest bytes wait for whoever comes, and the guest never does.
#[test]
fn with_nobody_there_the_newest_bytes_that_fit_are_kept_and_the_guest_goes_on() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let mut guest = Guest::start(options(vec![socket(folder.path(), "a")]), events);
        guest.make(0);
        let all: Vec<_> = (0..50_000_u32).flat_map(u32::to_le_bytes).collect();
        for piece in all.chunks(10_000) {
            guest.transmit(1, piece);
        }
        let mut host = client(folder.path(), "a");
        assert_eq!(read(&mut host, 64 << 10), all[all.len() - (64 << 10)..]);
        guest.transmit(1, b"and on");
        assert_eq!(read(&mut host, 6), b"and on");
        guest.rig.end();
    }
}

#[test]
fn a_client_that_breaks_off_is_followed_by_another_and_nothing_that_fits_is_lost() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let mut guest = Guest::start(options(vec![socket(folder.path(), "a")]), events);
        guest.meet(1);
        guest.make(0);
        assert_eq!(guest.hear().1, 7);
        for round in 0..10_u8 {
            let mut host = client(folder.path(), "a");
            assert_eq!(guest.hear(), (0, 6, 1, Vec::new()));
            if round > 0 {
                assert_eq!(read(&mut host, 3), [round - 1; 3], "sent while nobody was there");
            }
            host.write_all(&[round; 100]).expect("sent");
            assert_eq!(guest.receive_all(0, 100), [round; 100]);
            drop(host);
            assert_eq!(guest.hear(), (0, 6, 0, Vec::new()));
            guest.transmit(1, &[round; 3]);
        }
        guest.rig.end();
    }
}

/// What fits 64 KiB, of as many as there were.
#[test]
fn what_clients_had_sent_who_are_followed_by_others_waits_for_the_guest() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let mut guest = Guest::start(options(vec![socket(folder.path(), "a")]), events);
        let mut all = Vec::new();
        for round in 0..3_u8 {
            let words = [round; 20_000];
            let mut host = client(folder.path(), "a");
            host.write_all(&words).expect("sent");
            all.extend(words);
            // The device has seen this one: it may read what the guest says.
            guest.transmit(1, b"!");
            assert_eq!(read(&mut host, 1), b"!");
        }
        guest.make(0);
        assert!(guest.receive_all(0, all.len()) == all, "in order, each byte once");
        guest.rig.end();
    }
}

/// C28: the host's last words come before the news that it has gone.
#[test]
fn c28_the_guest_hears_of_a_hosts_end_after_all_that_it_sent() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let mut guest = Guest::start(options(vec![socket(folder.path(), "a")]), events);
        guest.meet(1);
        guest.say(0, 3, 1);
        assert_eq!(guest.hear().1, 7);
        let mut host = client(folder.path(), "a");
        assert_eq!(guest.hear(), (0, 6, 1, Vec::new()));
        let words: Vec<_> = (0..30_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        host.write_all(&words).expect("sent");
        drop(host);
        assert!(!guest.rig.is_back(2), "it still has something to say");
        guest.say(0, 6, 1);
        assert_eq!(guest.receive_all(0, words.len()), words);
        assert_eq!(guest.hear(), (0, 6, 0, Vec::new()));
        guest.rig.end();
    }
}

#[test]
fn c28_a_host_that_has_said_its_last_word_still_hears() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let mut guest = Guest::start(options(vec![socket(folder.path(), "a")]), events);
        guest.make(0);
        let mut host = client(folder.path(), "a");
        host.write_all(b"question").expect("sent");
        host.shutdown(Shutdown::Write).expect("half closed");
        assert_eq!(guest.receive_all(0, 8), b"question");
        guest.transmit(1, b"answer");
        assert_eq!(read(&mut host, 6), b"answer");
        guest.rig.end();
    }
}

#[test]
fn a_second_client_is_turned_away_while_the_first_is_there() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let mut guest = Guest::start(options(vec![socket(folder.path(), "a")]), events);
        guest.make(0);
        let mut first = client(folder.path(), "a");
        guest.transmit(1, b"one");
        assert_eq!(read(&mut first, 3), b"one");
        assert_eq!(read_to_end(&mut client(folder.path(), "a")), b"");
        guest.transmit(1, b"two");
        assert_eq!(read(&mut first, 3), b"two");
        guest.rig.end();
    }
}

#[test]
fn a_file_gets_what_the_guest_writes_behind_what_it_has() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("log");
        std::fs::write(&path, "before ").expect("written");
        let host = Host::File(path.clone());
        let port = PortOptions { name: String::new(), console: true, host };
        let mut guest = Guest::start(options(vec![port]), events);
        guest.transmit(1, b"after");
        assert_eq!(std::fs::read(&path).expect("there"), b"before after");
        guest.rig.end();
    }
}

#[test]
fn without_multiport_there_is_one_port_and_characters_of_an_emergency() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let console = Console::new(options(vec![socket(folder.path(), "a")])).expect("a console");
        let mut guest = Guest::of(console, events, !feature::MULTIPORT);
        assert_eq!(
            guest.rig.vmm.read_config(0, 12).expect("read"),
            [80, 0, 25, 0, 1, 0, 0, 0, 0, 0, 0, 0]
        );
        guest.rig.vmm.write_config(8, b"!\0\0\0").expect("written");
        guest.activate(&[0, 1]);
        let mut host = client(folder.path(), "a");
        host.write_all(b"hello").expect("sent");
        assert_eq!(guest.receive_all(0, 5), b"hello");
        guest.transmit(1, b"world");
        assert_eq!(read(&mut host, 6), b"!world");
        guest.rig.vmm.write_config(0, b"x").expect_err("read-only");
        guest.rig.end();
    }
}

#[test]
fn a_new_size_is_told_to_a_driver_of_ports_and_shown_in_the_configuration() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let port = PortOptions { console: true, ..socket(folder.path(), "") };
        let console = Console::new(options(vec![port])).expect("a console");
        let resizer = console.resizer();
        let mut guest = Guest::of(console, events, u64::MAX);
        guest.activate(&[0, 1, 2, 3]);
        guest.say(0, 0, 1);
        guest.meet(1);
        guest.say(0, 3, 1);
        assert_eq!((guest.hear().1, guest.hear().1), (4, 5));
        resizer.resize(0, Size { columns: 132, rows: 50 });
        assert_eq!(guest.hear(), (0, 5, 0, vec![132, 0, 50, 0]));
        assert_eq!(guest.rig.vmm.read_config(0, 4).expect("read"), [132, 0, 50, 0]);
        resizer.resize(7, Size::default());
        guest.rig.end();
    }
}

#[test]
fn sockets_are_gone_with_their_console_and_stale_ones_are_replaced() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("port-a");
    drop(std::os::unix::net::UnixListener::bind(&path).expect("a stale one"));
    let console = Console::new(options(vec![socket(folder.path(), "a")])).expect("a console");
    let error = Console::new(options(vec![socket(folder.path(), "a")])).expect_err("in use");
    assert!(error.to_string().contains("port-a"), "{error}");
    drop(console);
    until("the socket is gone", || !path.exists());
}
