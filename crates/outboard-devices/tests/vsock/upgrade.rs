//! A live upgrade: sockets that are listened on, clients and connections go along, with every byte that is under
//! way. Both "processes" are servers on threads of this one; `OUTBOARD_ROUNDS` has another number of upgrades.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use outboard::{LoopKind, Server, WorkerDevice};
use outboard_devices::vsock::{Neighbours, Op, Vsock, VsockOptions};
use outboard_frontend::Connection;

use crate::guest::{
    BOTH, CID, EVENT, Guest, Socket, answer, bytes, client, options, path, patient, server,
};
use crate::rig::{PATIENCE, Rig};

struct Place {
    folder: tempfile::TempDir,
    socket: PathBuf,
    control: PathBuf,
}

type Program = JoinHandle<Result<(), outboard::Error>>;

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let (socket, control) = (folder.path().join("s"), folder.path().join("c"));
        Self { folder, socket, control }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A device that listens and can be followed.
    fn first(&self, events: LoopKind) -> Program {
        let model = Vsock::new(options(self.path()), &Neighbours::new()).expect("a device");
        let server = Server::listen(&self.socket).expect("listens");
        run(server.with_control(&self.control).expect("listens"), model, events)
    }

    /// Its next process.
    fn next(&self, events: LoopKind, change: impl FnOnce(&mut VsockOptions)) -> Program {
        let mut options = options(self.path());
        options.inherits = true;
        change(&mut options);
        let model = Vsock::new(options, &Neighbours::new()).expect("a device");
        run(Server::take_over(&self.control).expect("a predecessor"), model, events)
    }

    /// A guest of the first device, whose rings run.
    fn guest(&self) -> Guest {
        let connection = UnixStream::connect(&self.socket).expect("it listens");
        let connection =
            Connection::from_fd(OwnedFd::from(connection), PATIENCE).expect("connected");
        let nobody = std::thread::spawn(|| ());
        let rig = Rig::before(connection, nobody, u64::MAX);
        let mut guest = Guest { rig, cid: CID, heard: Default::default(), refills: true };
        guest.activate();
        guest
    }
}

fn run(server: Server, model: Vsock, events: LoopKind) -> Program {
    let device = WorkerDevice::with_options(model, events.into()).expect("a device");
    std::thread::spawn(move || server.serve(device))
}

fn has_ended(program: Program) {
    program.join().expect("no panic").expect("ended well");
}

/// More than the host's socket and the device hold together is never sent: what a guest has credit for.
fn send_what_may_be(guest: &mut Guest, socket: &mut Socket, seed: u64) -> Vec<u8> {
    let all = bytes(socket.credit.may_send() as usize, seed);
    guest.send_all(socket, &all);
    all
}

fn round_trip(guest: &mut Guest, socket: &mut Socket, host: &mut UnixStream, seed: u64) {
    let (there, back) = (bytes(1000, seed), bytes(1500, seed + 1));
    guest.send_all(socket, &there);
    let mut got = vec![0; there.len()];
    host.read_exact(&mut got).expect("read");
    assert!(got == there, "to the host");
    host.write_all(&back).expect("sent");
    assert!(guest.receive(socket, back.len()) == back, "to the guest");
}

fn rounds() -> u64 {
    let rounds = std::env::var("OUTBOARD_ROUNDS").ok().and_then(|text| text.parse().ok());
    rounds.unwrap_or(3)
}

#[test]
fn connections_clients_and_listeners_go_along_with_a_live_upgrade_and_no_byte_is_lost() {
    for events in BOTH {
        let place = Place::new();
        let mut program = place.first(events);
        let mut guest = place.guest();
        let listener = server(place.path(), 1234);
        let mut ours = guest.connect(9, 1234);
        let (host, _) = listener.accept().expect("connected");
        let mut host = patient(host);
        let mut theirs_host = client(place.path(), 22);
        let mut theirs = guest.accept(22);
        answer(&theirs_host);
        for round in 0..rounds() {
            // Bytes wait in the device in both directions, a client has not said its line.
            let under_way = send_what_may_be(&mut guest, &mut ours, round);
            let back = bytes(40 << 10, round + 100);
            host.write_all(&back).expect("sent");
            let mut shy =
                patient(UnixStream::connect(crate::guest::path(place.path())).expect("there"));
            let next = place.next(events, |_| ());
            has_ended(std::mem::replace(&mut program, next));
            let mut got = vec![0; under_way.len()];
            host.read_exact(&mut got).expect("read");
            assert!(got == under_way, "what was under way to the host, round {round}");
            assert!(guest.receive(&mut ours, back.len()) == back, "to the guest, round {round}");
            round_trip(&mut guest, &mut ours, &mut host, round);
            round_trip(&mut guest, &mut theirs, &mut theirs_host, round);
            shy.write_all(b"CONNECT 23\n").expect("it is still connected");
            let _shy = guest.accept(23);
            answer(&shy);
            let port = u32::try_from(round).expect("small") + 100;
            let mut fresh = guest.connect(port, 1234);
            let mut fresh_host = patient(listener.accept().expect("connected").0);
            round_trip(&mut guest, &mut fresh, &mut fresh_host, round);
        }
        assert!(!guest.rig.is_back(EVENT), "nothing was reset");
        drop(guest);
        has_ended(stopped(&place, program));
    }
}

/// The last program listens for front-ends for ever: another one takes its place, and is told to stop.
fn stopped(place: &Place, program: Program) -> Program {
    let mut options = options(place.path());
    options.inherits = true;
    let model = Vsock::new(options, &Neighbours::new()).expect("a device");
    let server = Server::take_over(&place.control).expect("a predecessor");
    let stop = server.stop_handle();
    let last = run(server, model, LoopKind::Epoll);
    has_ended(program);
    assert!(path(place.path()).exists(), "who hands over leaves the names");
    // It answers once it has taken over.
    let _client = UnixStream::connect(path(place.path())).expect("somebody listens");
    stop.stop();
    last
}

#[test]
fn when_the_new_process_cannot_carry_the_guest_the_old_one_goes_on_with_every_connection() {
    for events in BOTH {
        let place = Place::new();
        let program = place.first(events);
        let mut guest = place.guest();
        let listener = server(place.path(), 1234);
        let mut ours = guest.connect(9, 1234);
        let mut host = patient(listener.accept().expect("connected").0);
        for round in 0..3 {
            let under_way = send_what_may_be(&mut guest, &mut ours, round);
            // Its rings are too small.
            let refused = place.next(events, |options| options.queue_size = 16);
            refused.join().expect("no panic").expect_err("it cannot");
            let mut got = vec![0; under_way.len()];
            host.read_exact(&mut got).expect("read");
            assert!(got == under_way, "round {round}");
            round_trip(&mut guest, &mut ours, &mut host, round);
        }
        let mut theirs_host = client(place.path(), 22);
        let mut theirs = guest.accept(22);
        answer(&theirs_host);
        round_trip(&mut guest, &mut theirs, &mut theirs_host, 7);
        assert!(!guest.rig.is_back(EVENT), "nothing was reset");
        drop(guest);
        has_ended(stopped(&place, program));
    }
}

#[test]
fn a_device_without_a_front_end_hands_its_sockets_over_and_the_last_one_removes_them() {
    let place = Place::new();
    let program = place.first(LoopKind::Epoll);
    let second = place.next(LoopKind::Epoll, |_| ());
    has_ended(program);
    let mut guest = place.guest();
    let mut host = client(place.path(), 22);
    let mut socket = guest.accept(22);
    answer(&host);
    round_trip(&mut guest, &mut socket, &mut host, 1);
    drop(guest);
    has_ended(stopped(&place, second));
    assert!(!path(place.path()).exists(), "nobody listens, no socket is left");
}

#[test]
fn a_guest_that_takes_its_state_elsewhere_without_the_sockets_hears_that_they_are_gone() {
    let place = Place::new();
    let program = place.first(LoopKind::Epoll);
    let mut guest = place.guest();
    let listener = server(place.path(), 1234);
    let _ours = guest.connect(9, 1234);
    let mut host = patient(listener.accept().expect("connected").0);
    // Another address over there: it is not the guest that the connections belong to.
    let next = place.next(LoopKind::Epoll, |options| options.guest_cid = CID + 1);
    has_ended(program);
    assert_eq!(guest.event(), 0, "transport reset");
    assert_eq!(host.read(&mut [0; 1]).expect("an end"), 0);
    guest.cid = CID + 1;
    let mut again = guest.socket(
        9,
        outboard_devices::vsock::Address { cid: 2, port: 1234 },
        outboard_devices::vsock::Kind::Stream,
    );
    guest.say(&mut again, Op::Request);
    guest.expect(&mut again, Op::Response);
    drop(guest);
    has_ended(stopped(&place, next));
}
