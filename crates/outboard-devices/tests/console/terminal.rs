//! A port on a pseudo-terminal, opened and left as people do.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use outboard_devices::console::{Host, PortOptions};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::guest::{BOTH, Guest, client, options, read, socket};

pub(crate) fn open(link: &Path) -> File {
    let flags = i32::try_from(rustix::fs::OFlags::NOCTTY.bits()).expect("a flag");
    let mut options = File::options();
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, flags);
    options.read(true).write(true).open(link).expect("a terminal")
}

pub(crate) fn port(link: &Path) -> PortOptions {
    let host = Host::Pty { link: Some(link.to_owned()) };
    PortOptions { name: String::new(), console: true, host }
}

#[test]
fn a_terminal_can_be_left_and_opened_again_and_nothing_that_fits_is_lost() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let link = folder.path().join("tty");
        let mut guest = Guest::start(options(vec![port(&link)]), events);
        guest.meet(1);
        guest.make(0);
        assert_eq!((guest.hear().1, guest.hear().1), (4, 5));
        guest.transmit(1, b"login: ");
        for round in 0..3_u8 {
            let mut tty = open(&link);
            assert_eq!(guest.hear(), (0, 6, 1, Vec::new()), "opened");
            assert_eq!(read(&mut tty, 7), b"login: ");
            // No echo, no translation: a raw terminal.
            tty.write_all(&[b'a' + round, b'\r', b'\n', 3, 4]).expect("typed");
            assert_eq!(guest.receive_all(0, 5), [b'a' + round, b'\r', b'\n', 3, 4]);
            drop(tty);
            assert_eq!(guest.hear(), (0, 6, 0, Vec::new()), "left");
            guest.transmit(1, b"login: ");
        }
        guest.rig.end();
        assert!(link.symlink_metadata().is_err(), "the link is gone");
    }
}

#[test]
fn what_was_typed_before_the_terminal_was_left_arrives() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let link = folder.path().join("tty");
        let mut guest = Guest::start(options(vec![port(&link)]), events);
        guest.say(0, 3, 1);
        let mut tty = open(&link);
        tty.write_all(b"halt\r").expect("typed");
        drop(tty);
        guest.say(0, 6, 1);
        assert_eq!(guest.receive_all(0, 5), b"halt\r");
        guest.rig.end();
    }
}

/// C28: what happened at the terminal was seen when a client that came later is.
#[test]
fn c28_the_guest_hears_that_a_terminal_was_left_after_all_that_was_typed() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let link = folder.path().join("tty");
        let ports = vec![port(&link), socket(folder.path(), "later")];
        let mut guest = Guest::start(options(ports), events);
        guest.meet(2);
        guest.say(0, 3, 1);
        assert_eq!((guest.hear().1, guest.hear().1), (4, 5));
        guest.say(1, 3, 1);
        assert_eq!(guest.hear().1, 7);
        let mut tty = open(&link);
        assert_eq!(guest.hear(), (0, 6, 1, Vec::new()), "opened");
        tty.write_all(b"halt\r").expect("typed");
        drop(tty);
        let _later = client(folder.path(), "later");
        assert_eq!(guest.hear(), (1, 6, 1, Vec::new()), "the terminal has something to say");
        guest.say(0, 6, 1);
        assert_eq!(guest.receive_all(0, 5), b"halt\r");
        assert_eq!(guest.hear(), (0, 6, 0, Vec::new()), "left");
        guest.rig.end();
    }
}

#[test]
fn a_terminals_new_size_is_told_with_the_next_key() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let link = folder.path().join("tty");
        let mut guest = Guest::start(options(vec![port(&link)]), events);
        guest.meet(1);
        guest.make(0);
        assert_eq!((guest.hear().1, guest.hear().1), (4, 5));
        let mut tty = open(&link);
        assert_eq!(guest.hear().1, 6);
        let size = Winsize { ws_row: 50, ws_col: 132, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&tty, size).expect("set");
        tty.write_all(b"x").expect("typed");
        assert_eq!(guest.hear(), (0, 5, 0, vec![132, 0, 50, 0]));
        guest.rig.end();
    }
}
