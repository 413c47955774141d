//! What wakes the device: bytes and ends, room only while bytes wait for it.

use std::collections::VecDeque;
use std::io::Read;
use std::os::unix::net::UnixStream;

use outboard::{Fact, Inspect, LoopKind, WorkerOptions};
use outboard_devices::vsock::{Neighbours, Op, Vsock, VsockOptions};

use crate::guest::{BOTH, CID, Guest, Socket, bytes, options, patient, server};
use crate::rig::{Rig, serve};

/// A guest whose device shows itself.
fn watched(options: VsockOptions, events: LoopKind) -> (Guest, Inspect) {
    let inspect = Inspect::new();
    let device = Vsock::new(options, &Neighbours::new()).expect("a device");
    let shown = WorkerOptions { inspect: inspect.clone(), ..events.into() };
    let (connection, server) = serve(device, shown);
    let rig = Rig::before(connection, server, u64::MAX);
    let mut guest = Guest { rig, cid: CID, heard: VecDeque::new(), refills: true };
    guest.activate();
    (guest, inspect)
}

fn host_events(inspect: &Inspect) -> u64 {
    let facts = inspect.facts();
    match facts.iter().find(|(name, _)| name.ends_with("host-events")) {
        Some((_, Fact::Number(number))) => *number,
        _ => u64::MAX,
    }
}

/// The guest sends a byte, which the host reads.
fn ping(guest: &mut Guest, socket: &mut Socket, host: &mut UnixStream) {
    guest.say_with(socket, Op::Data, 0, b"x");
    host.read_exact(&mut [0; 1]).expect("read");
}

#[test]
fn a_host_that_reads_what_the_guest_sends_wakes_nobody() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = server(folder.path(), 1);
        let (mut guest, inspect) = watched(options(folder.path()), events);
        let mut socket = guest.connect(5000, 1);
        let mut host = patient(listener.accept().expect("a client").0);
        let before = host_events(&inspect);
        (0..200).for_each(|_| ping(&mut guest, &mut socket, &mut host));
        assert_eq!(host_events(&inspect), before);
        guest.rig.end();
    }
}

#[test]
fn room_is_heard_of_while_bytes_wait_for_it_and_no_more_once_they_have_gone() {
    for events in BOTH {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = server(folder.path(), 1);
        // More than a socket of the host holds.
        let options = VsockOptions { room: 4 << 20, ..options(folder.path()) };
        let (mut guest, inspect) = watched(options, events);
        let mut socket = guest.connect(5000, 1);
        let mut host = patient(listener.accept().expect("a client").0);
        let sent = bytes(4 << 20, 1);
        for part in sent.chunks(32 << 10) {
            guest.say_with(&mut socket, Op::Data, 0, part);
        }
        let mut got = vec![0; sent.len()];
        host.read_exact(&mut got).expect("read");
        assert!(got == sent);
        ping(&mut guest, &mut socket, &mut host);
        let before = host_events(&inspect);
        (0..200).for_each(|_| ping(&mut guest, &mut socket, &mut host));
        assert_eq!(host_events(&inspect), before);
        guest.rig.end();
    }
}
