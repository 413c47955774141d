//! `outboard console` (and `rng`) that is killed, under a front-end that connects anew (the in-flight region), with bytes going both
//! ways; upgraded; and moved to another process. `OUTBOARD_ROUNDS=100` kills it so many times.
//!
//! What is promised of a port that is no console, while somebody is at its host's side: bytes of an answered request are
//! with the host's side, but for those of one request when that takes no more; what was not answered is said again from
//! its beginning by the next process. The guest gets a part of what the host sent, from its beginning, in order, once:
//! what is missing was under way when the host saw its connection break.
#![expect(clippy::expect_used, reason = "a failed step of a test is its end")]

#[path = "../../outboard-devices/tests/console/guest.rs"]
#[expect(dead_code, reason = "made for the tests of the device")]
mod guest;
mod program;
#[path = "../../outboard-devices/tests/rig/mod.rs"]
#[expect(dead_code, reason = "made for the tests of devices")]
mod rig;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread::JoinHandle;

use guest::Guest;
use outboard_frontend::{Connection, Wanted};
use program::Program;
use rig::{PATIENCE, Rig};

/// Queues of the port, and its name.
const RX: usize = 4;
const TX: usize = 5;
const NAME: &str = "org.a";
/// Bytes of a request, and requests that are under way.
const PIECE: usize = 4096;
const DEPTH: usize = 8;

fn rounds() -> usize {
    std::env::var("OUTBOARD_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(8)
}

fn console(folder: &Path, more: &[&str]) -> Program {
    started(folder, more, "")
}

/// Its host's sides have `there` behind their names: those of another host.
fn started(folder: &Path, more: &[&str], there: &str) -> Program {
    let port = format!("socket:port-{NAME}{there},name={NAME}");
    let terminal = format!("pty:tty{there}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_outboard"));
    command.args(["console", "--port", &terminal, "--port", &port]).args(more);
    let mut program = Program::run(&mut command, folder);
    program.says("serving").expect("it serves");
    program
}

fn connect(folder: &Path) -> Connection {
    connect_to(folder, "s")
}

fn connect_to(folder: &Path, socket: &str) -> Connection {
    Connection::connect_patiently(folder.join(socket), PATIENCE, PATIENCE).expect("connected")
}

/// Bytes of which each place of each stream has its own.
fn bytes_at(stream: usize, at: usize, length: usize) -> Vec<u8> {
    let word = |at: usize| {
        let mixed = (((stream as u64) << 40) + (at / 8) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9).to_be_bytes()
    };
    (at..at + length).map(|at| word(at).get(at % 8).copied().unwrap_or(0)).collect()
}

/// The host's end of one connection: it writes its stream for ever and notes what it reads.
struct Host {
    reads: JoinHandle<Vec<u8>>,
    writes: JoinHandle<()>,
    stream: UnixStream,
}

impl Host {
    fn connect(folder: &Path, number: usize) -> Self {
        Self::of(guest::client(folder, NAME), number)
    }

    fn of(mut reader: UnixStream, number: usize) -> Self {
        let mut writer = reader.try_clone().expect("a socket");
        let stream = reader.try_clone().expect("a socket");
        let reads = std::thread::spawn(move || {
            let mut all = Vec::new();
            // A reset is an end, too: what came before it is there.
            let _ = reader.read_to_end(&mut all);
            all
        });
        let writes = std::thread::spawn(move || {
            let mut at = 0;
            while writer.write_all(&bytes_at(number, at, PIECE)).is_ok() {
                at += PIECE;
            }
        });
        Self { reads, writes, stream }
    }

    /// What it had read when its connection broke.
    fn read(self) -> Vec<u8> {
        let all = self.reads.join().expect("it reads to the end");
        let _ = self.stream.shutdown(Shutdown::Both);
        self.writes.join().expect("it writes until nobody listens");
        all
    }
}

/// The guest's end: how far its own stream has come, and the host's on the connection of the moment.
struct Driver {
    guest: Guest,
    offered: usize,
    answered: usize,
    received: usize,
}

/// The guest's stream has a number that no connection has.
const GUEST: usize = 1 << 20;

impl Driver {
    /// A driver whose port is open.
    fn start(folder: &Path) -> Self {
        let nobody = std::thread::spawn(|| ());
        let wanted = Wanted::default().with_inflight();
        let rig = Rig::with(connect(folder), nobody, u64::MAX, wanted);
        let mut guest = Guest { rig };
        guest.activate(&[0, 1, 2, 3, 4, 5]);
        guest.say(0, 0, 1);
        guest.meet(2);
        guest.make(1);
        assert_eq!(guest.hear(), (1, 7, 1, NAME.into()));
        Self { guest, offered: 0, answered: 0, received: 0 }
    }

    /// Somebody has come to the port's host side.
    fn hears_of_a_client(&mut self) {
        while self.guest.hear() != (1, 6, 1, Vec::new()) {}
    }

    /// Takes what has come back; `host` is whose bytes come.
    fn take(&mut self, host: usize) {
        self.take_answers();
        while let Some(bytes) = self.guest.received(RX) {
            let right = bytes_at(host, self.received, bytes.len());
            assert!(bytes == right, "to the guest, behind byte {}", self.received);
            self.received += bytes.len();
        }
    }

    fn take_answers(&mut self) {
        while let Some((token, _)) = self.guest.rig.if_back(TX) {
            assert_eq!(token, (self.answered / PIECE % 16) as u64, "in order, each once");
            self.answered += PIECE;
        }
    }

    fn offer(&mut self) {
        while self.offered - self.answered < DEPTH * PIECE {
            let token = (self.offered / PIECE % 16) as u64;
            self.guest.send(TX, &bytes_at(GUEST, self.offered, PIECE), token);
            self.offered += PIECE;
        }
    }

    /// Sends and receives until so much more has gone each way.
    fn pump(&mut self, more: usize, host: usize) {
        let (answered, received) = (self.answered + more, self.received + more);
        guest::until("bytes go both ways", || {
            self.offer();
            self.take(host);
            self.answered >= answered && self.received >= received
        });
    }
}

/// What is promised of a port that is killed while its guest and its host send as fast as they can.
#[test]
fn streams_through_a_console_that_is_killed_lose_and_double_only_what_is_said() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut program = console(folder.path(), &["--socket-path", "s"]);
    let mut driver = Driver::start(folder.path());
    // What the guest had answers for at the last kill, and what the host had read by then.
    let (mut answered, mut there) = (0, 0);
    for round in 0..rounds() {
        let host = Host::connect(folder.path(), round);
        if round > 0 {
            driver.guest.rig.vmm.reconnect(connect(folder.path())).expect("goes on");
        }
        driver.hears_of_a_client();
        driver.pump(((round % 5) * 37 + 1) * PIECE, round);
        drop(program);
        driver.take(round);
        let read = host.read();
        // From the first that the last process had not answered; some answers are shown by the next one.
        let mut begin = (answered..=there + PIECE).step_by(PIECE);
        let begin = begin.find(|begin| bytes_at(GUEST, *begin, read.len()) == read);
        let begin = begin.expect("a stream that begins where no byte is lost, in order");
        (answered, there, driver.received) = (driver.answered, begin + read.len(), 0);
        assert!(there + PIECE >= answered, "{there} of {answered} answered");
        assert!(there <= driver.offered);
        program = console(folder.path(), &["--socket-path", "s"]);
    }
}

/// With a host that reads nothing: what is answered waits in its socket, not in the process.
#[test]
fn a_killed_console_takes_no_more_than_one_request_with_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = console(folder.path(), &["--socket-path", "s"]);
    let mut driver = Driver::start(folder.path());
    let mut deaf = guest::client(folder.path(), NAME);
    driver.hears_of_a_client();
    driver.offer();
    let mut still = 0;
    // Until nothing is taken any more, seen from what is taken elsewhere.
    while still < 20 {
        let before = driver.answered;
        driver.guest.transmit(1, b"x");
        driver.take(0);
        driver.offer();
        still = if driver.answered == before { still + 1 } else { 0 };
    }
    drop(program);
    driver.take(0);
    let mut read = Vec::new();
    let _ = deaf.read_to_end(&mut read);
    assert!(read == bytes_at(GUEST, 0, read.len()), "in order");
    let lost = driver.answered.saturating_sub(read.len());
    assert!(lost <= PIECE, "{lost} bytes of {} that were answered", driver.answered);
}

/// The guest's driver introduces itself once in its life, whatever becomes of the process.
#[test]
fn after_a_kill_ports_are_open_names_known_and_the_guest_hears_who_is_there() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut program = console(folder.path(), &["--socket-path", "s"]);
    let mut driver = Driver::start(folder.path());
    for round in 0..3 {
        drop(program);
        program = console(folder.path(), &["--socket-path", "s"]);
        driver.guest.rig.vmm.reconnect(connect(folder.path())).expect("goes on");
        let mut heard = [driver.guest.hear(), driver.guest.hear(), driver.guest.hear()];
        heard.sort_by_key(|(port, event, ..)| (*port, *event));
        assert_eq!(heard[0], (0, 5, 0, vec![80, 0, 25, 0]), "RESIZE, round {round}");
        assert_eq!(heard[1], (0, 6, 0, Vec::new()), "nobody is at the terminal");
        assert_eq!(heard[2], (1, 6, 0, Vec::new()), "nor at the socket");
        let mut host = guest::client(folder.path(), NAME);
        assert_eq!(driver.guest.hear(), (1, 6, 1, Vec::new()));
        host.write_all(b"still there?").expect("sent");
        assert_eq!(driver.guest.receive_all(RX, 12), b"still there?");
        driver.guest.transmit(TX, b"yes");
        assert_eq!(guest::read(&mut host, 3), b"yes");
        drop(host);
        assert_eq!(driver.guest.hear(), (1, 6, 0, Vec::new()));
    }
    drop(program);
}

#[test]
fn a_stream_goes_on_while_the_program_is_upgraded() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut program = console(folder.path(), &["--socket-path", "s", "--control", "c"]);
    let mut driver = Driver::start(folder.path());
    let host = Host::connect(folder.path(), 0);
    driver.hears_of_a_client();
    for _ in 0..3 {
        driver.pump(64 * PIECE, 0);
        let mut next = console(folder.path(), &["--take-over", "c"]);
        driver.pump(64 * PIECE, 0);
        next.says("taken over").expect("it takes over");
        program.says("handed over").expect("the old one gives way");
        assert_eq!(program.ends(), Some(0));
        program = next;
    }
    assert!(folder.path().join("tty").exists(), "a link to a terminal");
    let sent = driver.answered;
    drop(program);
    let read = host.read();
    assert!(read == bytes_at(GUEST, 0, read.len()) && read.len() + PIECE >= sent, "to the host");
}

/// The guest's stream arrives on both hosts together, each byte once; of the host's streams it gets the beginning of one, with
/// what the first process had read for it, and then the other.
#[test]
fn a_guest_moves_to_another_host_in_the_middle_of_its_streams_and_loses_none_of_its_own() {
    let folder = tempfile::tempdir().expect("a folder");
    let here = console(folder.path(), &["--socket-path", "s"]);
    let there = started(folder.path(), &["--socket-path", "s-there"], "-there");
    let mut driver = Driver::start(folder.path());
    let first = Host::connect(folder.path(), 0);
    driver.hears_of_a_client();
    driver.pump(100 * PIECE, 0);
    driver.offer();
    let vmm = &mut driver.guest.rig.vmm;
    vmm.sleep().expect("stops").expect("was active");
    let state = vmm.connection().save_state().expect("saved");
    driver.take(0);
    let second = Host::of(guest::client(folder.path(), "org.a-there"), 1);
    let vmm = &mut driver.guest.rig.vmm;
    vmm.reconnect(connect_to(folder.path(), "s-there")).expect("the same features");
    vmm.connection().load_state(&state).expect("loaded");
    vmm.wake().expect("goes on");
    let (begin, mut bytes) = (driver.received, Vec::new());
    let answered = driver.answered + 100 * PIECE;
    guest::until("bytes go both ways", || {
        driver.offer();
        driver.take_answers();
        bytes.extend(driver.guest.received(RX).into_iter().flatten());
        driver.answered >= answered && bytes.len() >= 100 * PIECE
    });
    let (of_first, of_second) = (bytes_at(0, begin, 4096), bytes_at(1, 0, bytes.len()));
    let late = (0..=4096).find(|late| {
        let (read_ahead, rest) = bytes.split_at(*late);
        of_first.starts_with(read_ahead) && of_second.starts_with(rest)
    });
    late.expect("first what had been read on the first host, then the second host's stream");
    drop((here, there));
    driver.take_answers();
    let (first, second) = (first.read(), second.read());
    let both = [&first[..], &second].concat();
    assert!(both == bytes_at(GUEST, 0, both.len()), "each byte once, in order");
    assert!(both.len() + PIECE >= driver.answered);
}

fn entropy(folder: &Path, more: &[&str]) -> Program {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outboard"));
    command.args(["rng", "--max-bytes", "64", "--period", "20"]).args(more);
    let mut program = Program::run(&mut command, folder);
    program.says("serving").expect("it serves");
    program
}

/// To another process, where the requests from `token` on are answered, and back.
fn there_and_back(rig: &mut Rig, folder: &Path, token: u64) {
    let there = entropy(folder, &["--socket-path", "s-there"]);
    rig.vmm.sleep().expect("stops").expect("was active");
    let state = rig.vmm.connection().save_state().expect("saved");
    rig.vmm.reconnect(connect_to(folder, "s-there")).expect("the same features");
    rig.vmm.connection().load_state(&state).expect("loaded");
    rig.vmm.wake().expect("goes on");
    let answered: Vec<_> = (0..2).map(|_| rig.back(0)).collect();
    assert_eq!(answered, [(token, 32), (token + 1, 32)], "over there");
    rig.vmm.sleep().expect("stops").expect("was active");
    rig.vmm.reconnect(connect(folder)).expect("the same features");
    rig.vmm.wake().expect("goes on");
    drop(there);
}

/// Requests that wait for the next period of a limit: in the ring, wherever the device is.
#[test]
fn requests_for_entropy_outlive_kills_upgrades_and_moves_and_each_is_answered_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let first = ["--socket-path", "s", "--control", "c"];
    let mut program = entropy(folder, &first);
    let nobody = std::thread::spawn(|| ());
    let mut rig = Rig::with(connect(folder), nobody, u64::MAX, Wanted::default().with_inflight());
    rig.activate(&[0], 64);
    for round in 0..9 {
        // Three periods' worth is asked for at once.
        let tokens = round * 6..round * 6 + 6;
        for token in tokens.clone() {
            let room = rig.at(token % 6 * 32);
            rig.store(room, &[0; 32]);
            rig.offer(0, &[], &[(room, 32)], token);
        }
        let mut expected = tokens.clone();
        assert_eq!(rig.back(0), (expected.next().expect("six"), 32));
        match round % 3 {
            0 => {
                drop(program);
                program = entropy(folder, &first);
                rig.vmm.reconnect(connect(folder)).expect("goes on");
            }
            1 => {
                let mut heir = entropy(folder, &["--take-over", "c"]);
                heir.says("taken over").expect("it takes over");
                assert_eq!(program.ends(), Some(0));
                program = heir;
            }
            _ => {
                there_and_back(&mut rig, folder, tokens.start + 1);
                expected = tokens.start + 3..tokens.end;
            }
        }
        for token in expected {
            assert_eq!(rig.back(0), (token, 32), "in order, each once, round {round}");
        }
        for token in tokens {
            let bytes = rig.load(rig.at(token % 6 * 32), 32);
            assert!(bytes.iter().any(|byte| *byte != 0), "entropy, round {round}");
        }
    }
}
