//! Drivers that do not keep to the rules (cases B70, B71).

use crate::guest::{BOTH, Guest, client, options, read, socket};

#[test]
fn b70_control_messages_that_are_none_are_ignored() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let mut guest = Guest::start(options(vec![socket(folder.path(), "a")]), events);
        guest.meet(1);
        for length in 0..8 {
            guest.transmit(3, &vec![0xff; length.max(1)]);
        }
        for port in [1, 2, 0x7fff_ffff, u32::MAX] {
            for event in [0_u16, 3, 6] {
                if event != 0 {
                    guest.say(port, event, 1);
                }
            }
        }
        for event in [1, 2, 4, 5, 7, 8, u16::MAX] {
            guest.say(0, event, 1);
        }
        // A chain of writable bytes only, and one of nothing to read.
        let room = guest.rig.at(7 << 20);
        guest.rig.offer(3, &[], &[(room, 8)], 5);
        assert_eq!(guest.rig.back(3), (5, 0));
        guest.make(0);
        assert_eq!(guest.hear(), (0, 7, 1, b"a".to_vec()));
        let mut host = client(folder.path(), "a");
        guest.transmit(1, b"lives");
        assert_eq!(read(&mut host, 5), b"lives");
        guest.rig.end();
    }
}

/// A driver that asks and asks and takes nothing: then it takes, and each fact comes once.
#[test]
fn b70_a_driver_that_introduces_itself_for_ever_makes_nothing_grow() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let ports = vec![socket(folder.path(), "a"), socket(folder.path(), "b")];
        let mut guest = Guest::start(options(ports), events);
        guest.meet(2);
        for _ in 0..2000 {
            guest.say(0, 0, 1);
            guest.say(1, 3, 1);
            guest.say(1, 3, 0);
        }
        guest.say(0, 0, 1);
        guest.say(1, 3, 1);
        let mut heard = Vec::new();
        while heard.last() != Some(&(1, 7)) {
            let (port, event, _, _) = guest.hear();
            heard.push((port, event));
        }
        let rest = heard.len();
        // What was taken on the way is no more than there were buffers.
        assert!(rest < 12_000, "{rest} messages");
        guest.rig.end();
    }
}

#[test]
fn b70_a_control_buffer_that_is_too_short_comes_back_empty_and_the_next_one_has_the_message() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let console = outboard_devices::console::Console::new(options(vec![socket(
            folder.path(),
            "a-long-name",
        )]))
        .expect("a console");
        let mut guest = Guest::of(console, events, u64::MAX);
        guest.rig.activate(&[0, 1, 2, 3], 64);
        let room = guest.rig.at(0);
        for (token, length) in [(0, 7), (1, 1), (2, 8)] {
            guest.rig.offer(2, &[], &[(room, length)], token);
        }
        guest.say(0, 0, 1);
        assert_eq!(guest.rig.back(2), (0, 0));
        assert_eq!(guest.rig.back(2), (1, 0));
        assert_eq!(guest.rig.back(2), (2, 8));
        guest.say(0, 3, 1);
        for (token, length) in [(3, 18), (4, 19)] {
            guest.rig.offer(2, &[], &[(room, length)], token);
        }
        assert_eq!(guest.rig.back(2), (3, 0));
        assert_eq!(guest.rig.back(2), (4, 19));
        assert_eq!(guest.rig.load(room + 8, 11), b"a-long-name");
        guest.rig.end();
    }
}

/// B70: 500 MiB in one request, the same bytes again and again: a bounded part of it is taken.
#[test]
fn b70_a_request_of_hundreds_of_megabytes_costs_a_bounded_piece() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let mut guest = Guest::start(options(vec![socket(folder.path(), "a")]), events);
        guest.make(0);
        let room = guest.rig.at(0);
        guest.rig.offer(1, &[(room, 8 << 20); 63], &[], 9);
        assert_eq!(guest.rig.back(1), (9, 0));
        guest.transmit(1, b"goes on");
        let mut host = client(folder.path(), "a");
        let all = read(&mut host, 64 << 10);
        assert!(all.ends_with(b"goes on"));
        guest.rig.end();
    }
}

/// B70: bytes that are no text.
#[test]
fn b70_what_is_no_text_is_passed_on_as_it_is() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let mut guest = Guest::start(options(vec![socket(folder.path(), "a")]), events);
        guest.make(0);
        let mut host = client(folder.path(), "a");
        let bytes: Vec<_> = (0..=255_u8).rev().chain([0xc3, 0x28, 0xf0, 0x9f]).collect();
        guest.transmit(1, &bytes);
        assert_eq!(read(&mut host, bytes.len()), bytes);
        guest.rig.end();
    }
}
