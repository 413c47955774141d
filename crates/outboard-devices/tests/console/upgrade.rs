//! A live upgrade: terminals, sockets and those who are connected go along, with every byte that is under way. Both
//! "processes" are servers on threads of this one; `OUTBOARD_ROUNDS` has another number of upgrades.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use outboard::{LoopKind, Server, WorkerDevice};
use outboard_devices::console::{Console, ConsoleOptions, Host, PortOptions};
use outboard_frontend::Connection;

use crate::guest::{BOTH, Guest, client, options, read, socket, until};
use crate::rig::{PATIENCE, Rig};
use crate::terminal;

/// Queues of ports 1 and 2.
const SOCKET: usize = 4;
const FILE: usize = 6;
const NAME: &str = "org.a";

type Program = JoinHandle<Result<(), outboard::Error>>;

struct Place {
    folder: tempfile::TempDir,
    control: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        Self { control: folder.path().join("c"), folder }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn link(&self) -> PathBuf {
        self.path().join("tty")
    }

    /// A terminal, a socket and a file.
    fn options(&self) -> ConsoleOptions {
        let host = Host::File(self.path().join("log"));
        let log = PortOptions { name: "log".to_owned(), console: false, host };
        options(vec![terminal::port(&self.link()), socket(self.path(), NAME), log])
    }

    /// A console that listens and can be followed.
    fn first(&self, events: LoopKind) -> Program {
        let console = Console::new(self.options()).expect("a console");
        let server = Server::listen(self.path().join("s")).expect("listens");
        run(server.with_control(&self.control).expect("listens"), console, events)
    }

    /// Its next process.
    fn next(&self, events: LoopKind, change: impl FnOnce(&mut ConsoleOptions)) -> Program {
        let mut options = ConsoleOptions { inherits: true, ..self.options() };
        change(&mut options);
        let console = Console::new(options).expect("a console");
        run(Server::take_over(&self.control).expect("a predecessor"), console, events)
    }

    /// A guest of the first process that has all ports open.
    fn guest(&self) -> Guest {
        let connection = UnixStream::connect(self.path().join("s")).expect("it listens");
        let connection =
            Connection::from_fd(OwnedFd::from(connection), PATIENCE).expect("connected");
        let nobody = std::thread::spawn(|| ());
        let mut guest = Guest { rig: Rig::before(connection, nobody, u64::MAX) };
        guest.activate(&[0, 1, 2, 3, 4, 5, 6, 7]);
        guest.say(0, 0, 1);
        guest.meet(3);
        guest.make(0);
        assert_eq!((guest.hear().1, guest.hear().1), (4, 5), "a console, its size");
        guest.make(1);
        assert_eq!(guest.hear(), (1, 7, 1, NAME.into()));
        guest.make(2);
        assert_eq!((guest.hear().1, guest.hear().1), (7, 6), "its name; it is open");
        guest
    }

    fn log(&self) -> Vec<u8> {
        std::fs::read(self.path().join("log")).expect("there")
    }

    /// The last program listens for front-ends for ever: another one takes its place, and is told to stop.
    fn stop(&self, program: Program) {
        let options = ConsoleOptions { inherits: true, ..self.options() };
        let console = Console::new(options).expect("a console");
        let server = Server::take_over(&self.control).expect("a predecessor");
        let stop = server.stop_handle();
        let last = run(server, console, LoopKind::Epoll);
        has_ended(program);
        // Who hands over leaves the names.
        let _client = client(self.path(), NAME);
        assert!(self.link().exists(), "a link to a terminal");
        stop.stop();
        has_ended(last);
        until("the socket is gone", || !self.path().join("port-org.a").exists());
        assert!(self.link().symlink_metadata().is_err(), "the link is gone");
    }
}

fn run(server: Server, console: Console, events: LoopKind) -> Program {
    let device = WorkerDevice::with_options(console, events.into()).expect("a device");
    std::thread::spawn(move || server.serve(device))
}

fn has_ended(program: Program) {
    program.join().expect("no panic").expect("ended well");
}

/// So many bytes that come from nowhere else.
fn bytes(length: usize, seed: u64) -> Vec<u8> {
    (0..length as u64).map(|at| (at.wrapping_mul(seed + 3) >> 3).to_le_bytes()[0]).collect()
}

fn rounds() -> u64 {
    let rounds = std::env::var("OUTBOARD_ROUNDS").ok().and_then(|text| text.parse().ok());
    rounds.unwrap_or(3)
}

/// What the host types and reads while the guest does not look, and the other way round.
fn under_way(guest: &mut Guest, tty: &mut File, host: &mut UnixStream, round: u64) -> Sent {
    let sent = Sent {
        typed: bytes(3000, round),
        asked: bytes(60 << 10, round + 1),
        shown: bytes(3000, round + 2),
        answered: bytes(60 << 10, round + 3),
        logged: bytes(900, round + 4),
    };
    tty.write_all(&sent.typed).expect("typed");
    host.write_all(&sent.asked).expect("sent");
    guest.send(1, &sent.shown, 1);
    guest.send(SOCKET + 1, &sent.answered, 2);
    guest.send(FILE + 1, &sent.logged, 3);
    sent
}

struct Sent {
    typed: Vec<u8>,
    asked: Vec<u8>,
    shown: Vec<u8>,
    answered: Vec<u8>,
    logged: Vec<u8>,
}

impl Sent {
    fn arrives(&self, guest: &mut Guest, tty: &mut File, host: &mut UnixStream) {
        assert!(read(tty, self.shown.len()) == self.shown, "on the terminal");
        assert!(read(host, self.answered.len()) == self.answered, "on the socket");
        assert!(guest.receive_all(0, self.typed.len()) == self.typed, "from the terminal");
        assert!(guest.receive_all(SOCKET, self.asked.len()) == self.asked, "from the socket");
        for (queue, token) in [(1, 1), (SOCKET + 1, 2), (FILE + 1, 3)] {
            assert_eq!(guest.rig.back(queue), (token, 0), "answered once");
        }
    }
}

#[test]
fn terminals_sockets_and_clients_go_along_with_a_live_upgrade_and_no_byte_is_lost() {
    for events in BOTH {
        let place = Place::new();
        let mut program = place.first(events);
        let mut guest = place.guest();
        let mut tty = terminal::open(&place.link());
        assert_eq!(guest.hear(), (0, 6, 1, Vec::new()), "opened");
        let mut host = client(place.path(), NAME);
        assert_eq!(guest.hear(), (1, 6, 1, Vec::new()), "connected");
        let mut logged = Vec::new();
        for round in 0..rounds() {
            let sent = under_way(&mut guest, &mut tty, &mut host, round);
            let next = place.next(events, |_| ());
            has_ended(std::mem::replace(&mut program, next));
            sent.arrives(&mut guest, &mut tty, &mut host);
            logged.extend(&sent.logged);
            assert!(place.log() == logged, "in the file, round {round}");
        }
        assert!(!guest.rig.is_back(2), "nothing was closed, opened or named again");
        drop(tty);
        assert_eq!(guest.hear(), (0, 6, 0, Vec::new()), "it is seen that the terminal is left");
        drop(host);
        assert_eq!(guest.hear(), (1, 6, 0, Vec::new()), "and the socket");
        // What nobody is there to read goes along, too.
        guest.transmit(1, b"for who comes");
        let next = place.next(events, |_| ());
        has_ended(std::mem::replace(&mut program, next));
        assert_eq!(read(&mut terminal::open(&place.link()), 13), b"for who comes");
        drop(guest);
        place.stop(program);
    }
}

/// Bytes each way between two upgrades under load, and of one request.
const STRETCH: usize = 1 << 20;
const PIECE: usize = 4096;

/// Sends and receives until so much has gone each way in all.
fn pump(guest: &mut Guest, upto: usize, there: &mut Flow, back: &mut Flow) {
    while there.done < upto || back.done < upto {
        while there.begun < upto && there.begun - there.done < 8 * PIECE {
            let token = (there.begun / PIECE % 16) as u64;
            guest.send(SOCKET + 1, &bytes_at(there.begun, PIECE), token);
            there.begun += PIECE;
        }
        while guest.rig.is_back(SOCKET + 1) {
            there.done += PIECE;
        }
        while let Some(got) = guest.received(SOCKET) {
            assert!(got == bytes_at(back.done, got.len()), "to the guest, behind {}", back.done);
            back.done += got.len();
        }
        std::thread::yield_now();
    }
}

/// How far one direction has come, in bytes.
#[derive(Default)]
struct Flow {
    begun: usize,
    done: usize,
}

/// A stream of bytes of which each place has its own.
fn bytes_at(at: usize, length: usize) -> Vec<u8> {
    (at..at + length)
        .map(|at| ((at as u64).wrapping_mul(0x9e37_79b9) >> 16).to_le_bytes()[0])
        .collect()
}

#[test]
fn streams_that_never_stop_go_through_live_upgrades_byte_for_byte() {
    for events in BOTH {
        let place = Place::new();
        let mut program = place.first(events);
        let mut guest = place.guest();
        let mut host = client(place.path(), NAME);
        assert_eq!(guest.hear(), (1, 6, 1, Vec::new()), "connected");
        let all = STRETCH * usize::try_from(rounds() + 1).expect("few");
        let mut writer = host.try_clone().expect("a socket");
        let writes = std::thread::spawn(move || {
            (0..all)
                .step_by(PIECE)
                .for_each(|at| writer.write_all(&bytes_at(at, PIECE)).expect("sent"));
        });
        let reads = std::thread::spawn(move || {
            for at in (0..all).step_by(PIECE) {
                assert!(read(&mut host, PIECE) == bytes_at(at, PIECE), "to the host, at {at}");
            }
            host
        });
        let (mut there, mut back) = (Flow::default(), Flow::default());
        for round in 1..=rounds() {
            let next = place.next(events, |_| ());
            let upto = STRETCH * usize::try_from(round).expect("few");
            pump(&mut guest, upto, &mut there, &mut back);
            has_ended(std::mem::replace(&mut program, next));
        }
        pump(&mut guest, all, &mut there, &mut back);
        writes.join().expect("all was sent");
        let _host = reads.join().expect("all came");
        drop(guest);
        place.stop(program);
    }
}

#[test]
fn when_the_new_process_cannot_carry_the_guest_the_old_one_goes_on_with_every_byte() {
    for events in BOTH {
        let place = Place::new();
        let program = place.first(events);
        let mut guest = place.guest();
        let mut tty = terminal::open(&place.link());
        assert_eq!(guest.hear(), (0, 6, 1, Vec::new()), "opened");
        let mut host = client(place.path(), NAME);
        assert_eq!(guest.hear(), (1, 6, 1, Vec::new()), "connected");
        for round in 0..3 {
            let sent = under_way(&mut guest, &mut tty, &mut host, round);
            // Its rings are too small; or its ports are others, which it finds later.
            let refused = place.next(events, |options| match round {
                1 => options.ports.swap(1, 2),
                _ => options.queue_size = 16,
            });
            refused.join().expect("no panic").expect_err("it cannot");
            sent.arrives(&mut guest, &mut tty, &mut host);
        }
        assert!(!guest.rig.is_back(2), "nothing was closed, opened or named again");
        drop(guest);
        place.stop(program);
    }
}

#[test]
fn what_a_guest_left_behind_goes_along_after_it_has_gone() {
    let place = Place::new();
    let program = place.first(LoopKind::Epoll);
    let mut guest = place.guest();
    guest.transmit(1, b"last words");
    guest.transmit(SOCKET + 1, b"to nobody");
    drop(guest);
    let next = place.next(LoopKind::Epoll, |_| ());
    has_ended(program);
    assert_eq!(read(&mut terminal::open(&place.link()), 10), b"last words");
    assert_eq!(read(&mut client(place.path(), NAME), 9), b"to nobody");
    // And it serves the next one.
    let mut guest = place.guest();
    let mut host = client(place.path(), NAME);
    host.write_all(b"hello").expect("sent");
    assert_eq!(guest.receive_all(SOCKET, 5), b"hello");
    drop(guest);
    place.stop(next);
}
