//! A console that moves to another process.

use std::io::Write;
use std::path::Path;

use outboard::LoopKind;
use outboard::protocol::ProtocolFeatures;
use outboard_devices::console::{Console, ConsoleOptions, PortOptions};

use crate::guest::{BOTH, Guest, client, options, read, socket};

fn ports(folder: &Path) -> ConsoleOptions {
    let console = PortOptions { console: true, ..socket(folder, "") };
    options(vec![console, socket(folder, "org.a")])
}

/// A guest with an open port, something that nobody has read on either way, and its state.
fn moved(folder: &Path, events: LoopKind) -> (Guest, Vec<u8>) {
    let mut guest = Guest::start(ports(folder), events);
    guest.meet(2);
    guest.make(1);
    assert_eq!(guest.hear().1, 7);
    guest.transmit(5, b"for who comes");
    guest.rig.vmm.sleep().expect("stops").expect("was active");
    let state = guest.rig.vmm.connection().save_state().expect("saved");
    (guest, state)
}

#[test]
fn a_guest_goes_on_in_another_process_with_what_nobody_had_read() {
    for events in BOTH {
        let folders = [0, 1].map(|_| tempfile::tempdir().expect("a folder"));
        let (source, state) = moved(folders[0].path(), events);
        let console = Console::new(ports(folders[1].path())).expect("a console");
        let mut guest = Guest::of(console, events, u64::MAX);
        assert!(guest.rig.vmm.protocol_features().contains(ProtocolFeatures::DEVICE_STATE));
        guest.rig.vmm.connection().load_state(&state).expect("loaded");
        guest.activate(&[0, 1, 2, 3, 4, 5]);
        // The port is open already: nobody has to introduce himself again.
        let mut host = client(folders[1].path(), "org.a");
        assert_eq!(guest.hear(), (1, 6, 1, Vec::new()));
        assert_eq!(read(&mut host, 13), b"for who comes");
        host.write_all(b"welcome").expect("sent");
        assert_eq!(guest.receive_all(4, 7), b"welcome");
        guest.rig.end();
        source.rig.end();
    }
}

#[test]
fn a_state_of_other_ports_is_refused_and_the_console_goes_on() {
    let folders = [0, 1].map(|_| tempfile::tempdir().expect("a folder"));
    let (source, state) = moved(folders[0].path(), LoopKind::Epoll);
    source.rig.end();
    let other = options(vec![socket(folders[1].path(), "a"), socket(folders[1].path(), "b")]);
    let console = Console::new(other).expect("a console");
    let mut guest = Guest::of(console, LoopKind::Epoll, u64::MAX);
    guest.rig.vmm.connection().load_state(&state).expect_err("other ports");
    guest.activate(&[0, 1, 2, 3]);
    guest.say(0, 0, 1);
    guest.meet(2);
    guest.rig.end();
}
