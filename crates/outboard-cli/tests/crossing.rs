//! Numbered packets cross the switch of `outboard serve` both ways without a pause, while its process is killed and started
//! again, or replaced by another one: none is damaged, they stay in order, and each that is missing is accounted for.
//!
//! What a kill may cost: what waited in the process, lost, and what the device had not answered, sent twice. A take-over
//! sends nothing twice and counts what it loses. `OUTBOARD_ROUNDS=100` for so many rounds.
#![expect(clippy::expect_used, reason = "a failed step of a test is its end")]

#[path = "../../outboard-devices/tests/net/guest.rs"]
#[expect(dead_code, reason = "the card's own tests need more of it")]
mod guest;
mod program;
#[path = "../../outboard-devices/tests/rig/mod.rs"]
#[expect(dead_code, reason = "the devices' own tests need more of it")]
mod rig;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use guest::{CONTROL, Guest, TX, packet};
use outboard_frontend::{Connection, Wanted};
use program::Program;
use rig::Rig;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);
/// Packets that are with the device at once.
const WINDOW: u64 = 32;
/// Packets that each gets before the next thing happens.
const STRETCH: u64 = 2000;
/// What a process may hold of those that go one way: a full inbox, and two rings of it.
const HELD: u64 = 512 + 2 * 64;

const FILE: &str = "\
control = 'c'
[[switch]]
name = 'lan'
patience = 60000
[[worker]]
name = 'quay'
[[device]]
name = 'a'
type = 'net'
switch = 'lan'
worker = 'quay'
socket-path = 'a.sock'
[[device]]
name = 'b'
type = 'net'
switch = 'lan'
socket-path = 'b.sock'
";

/// A guest that sends numbers to the other one and checks those that it gets.
struct Station {
    guest: Guest,
    number: u8,
    /// The next number to be sent.
    next: u64,
    /// Those that are free again, as places of packets.
    places: Vec<u64>,
    /// The last number that came.
    last: Option<u64>,
    received: u64,
    missing: u64,
    twice: u64,
    /// The other one may have begun again a little before the last number.
    anew: bool,
}

impl Station {
    fn new(folder: &Path, socket: &str, number: u8) -> Self {
        let elsewhere = std::thread::spawn(|| {});
        let wanted = Wanted::default().with_inflight();
        let rig = Rig::with(connection(folder, socket), elsewhere, u64::MAX, wanted);
        let mut guest = Guest { rig, control: CONTROL };
        guest.activate();
        let (places, last) = ((0..WINDOW).collect(), None);
        let (received, missing, twice, anew) = (0, 0, 0, false);
        let mut this =
            Self { guest, number, next: 0, places, last, received, missing, twice, anew };
        this.settle();
        this
    }

    /// A round trip on the thread of its rings: by now they have heard that they run.
    fn settle(&mut self) {
        assert_eq!(self.guest.command(&[9, 9], 1), Some(1));
    }

    /// Goes on with the process that follows.
    fn reconnect(&mut self, folder: &Path, socket: &str) {
        // What is in the used rings is of the one before.
        self.take();
        self.guest.rig.vmm.reconnect(connection(folder, socket)).expect("it goes on");
        self.anew = true;
    }

    /// Sends as many as there is room for.
    fn send(&mut self) {
        self.collect();
        while let Some(place) = self.places.pop() {
            let bytes = numbered(self.number, self.next);
            let at = self.guest.rig.at((1 << 20) + place * 256);
            self.guest.rig.store(at, &[&[0; guest::HEADER], &bytes[..]].concat());
            let length = u32::try_from(guest::HEADER + bytes.len()).expect("small");
            self.guest.rig.offer(TX, &[(at, length)], &[], place);
            self.next += 1;
        }
    }

    /// Whether everything that was sent is done.
    fn collect(&mut self) -> bool {
        while let Some((place, _)) = self.guest.rig.if_back(TX) {
            self.places.push(place);
        }
        self.places.len() as u64 == WINDOW
    }

    /// Checks what has come.
    fn take(&mut self) {
        while let Some(bytes) = self.guest.take() {
            let number = u64::from_le_bytes(bytes[14..22].try_into().expect("eight"));
            assert_eq!(bytes, numbered(3 - self.number, number), "whole");
            let due = self.last.map_or(0, |last| last + 1);
            if number < due {
                assert!(self.anew && due - number <= WINDOW, "{number} where {due} is due");
                self.twice += due - number;
            } else {
                self.missing += number - due;
                self.received += 1;
            }
            (self.last, self.anew) = (Some(number), false);
        }
    }
}

fn connection(folder: &Path, socket: &str) -> Connection {
    let connection = Connection::connect_patiently(folder.join(socket), PATIENCE, PATIENCE);
    connection.expect("it listens")
}

/// A packet that one of both sends to the other.
fn numbered(sender: u8, number: u64) -> Vec<u8> {
    let mut bytes = packet([2, 0, 0, 0, 0, 3 - sender], number.to_le_bytes()[0], 90);
    bytes[6..12].copy_from_slice(&[2, 0, 0, 0, 0, sender]);
    bytes[14..22].copy_from_slice(&number.to_le_bytes());
    bytes
}

fn outboard(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outboard"));
    command.current_dir(folder).stdin(Stdio::null());
    command
}

fn serving(folder: &Path, args: &[&str]) -> Program {
    Program::run(outboard(folder).args(["serve", "vm.toml"]).args(args), folder)
}

/// Both send and take, until `done`.
fn cross(both: &mut [Station; 2], done: &mut dyn FnMut(&[Station; 2]) -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done(both) {
        for station in both.iter_mut() {
            station.send();
            station.take();
        }
        assert!(Instant::now() < end, "{} and {} came", both[0].received, both[1].received);
    }
}

/// The switch knows both from now on. Before that it holds nobody up, and drops what there is no room for.
fn meet([a, b]: &mut [Station; 2]) {
    greet(a, b);
    greet(b, a);
}

fn greet(from: &mut Station, to: &mut Station) {
    let (before, end) = (to.received + to.twice, Instant::now() + PATIENCE);
    from.send();
    while to.received + to.twice == before {
        to.take();
        assert!(Instant::now() < end, "nothing comes from {}", from.number);
    }
}

/// Until each has got so many more.
fn stretch(both: &mut [Station; 2]) {
    let wanted = both.each_ref().map(|station| station.received + STRETCH);
    cross(both, &mut |both| both.iter().zip(wanted).all(|(it, wanted)| it.received >= wanted));
}

/// Waits until all that was sent has come or is counted as lost, here or in the programs before.
fn land(both: &mut [Station; 2], folder: &Path, before: u64) -> u64 {
    let end = Instant::now() + PATIENCE;
    loop {
        let done = both.each_mut().map(Station::collect);
        both.iter_mut().for_each(Station::take);
        let output = outboard(folder).args(["ctl", "c", "--json", "stats"]).output();
        let output = output.expect("our own program").stdout;
        let stats: Value = serde_json::from_slice(&output).expect("JSON");
        let lost = before + in_stats(&stats);
        let sum = |of: fn(&Station) -> u64| both.iter().map(of).sum::<u64>();
        let (sent, received) = (sum(|it| it.next), sum(|it| it.received));
        if done == [true, true] && received + lost == sent {
            return lost;
        }
        assert!(Instant::now() < end, "{sent} sent, {received} received, {lost} lost: {stats:#}");
    }
}

/// The packets that one program has dropped, as it shows them: with two ports each copy is the packet.
fn in_stats(stats: &Value) -> u64 {
    fn add(value: &Value) -> u64 {
        let Some(inner) = value.as_object() else { return 0 };
        let of_one = |(name, value): (&String, &Value)| match value.as_u64() {
            Some(count) if name.starts_with("dropped") => count,
            // What a card shows of its port is on the switch's page, too.
            _ if name == "switch" => 0,
            _ => add(value),
        };
        inner.iter().map(of_one).sum()
    }
    add(&stats["stats"])
}

/// The packets that a program has dropped that has ended, as it told.
fn in_log(program: &mut Program) -> u64 {
    let lines = std::iter::from_fn(|| program.says("has thrown away: "));
    let of_line = |line: String| {
        let (_, list) = line.trim_end().split_once("thrown away: ").expect("a list");
        let count = |item: &str| item.rsplit_once(' ')?.1.parse::<u64>().ok();
        list.split(", ").map(|item| count(item).expect("a count")).sum::<u64>()
    };
    lines.map(of_line).sum()
}

fn rounds() -> u64 {
    std::env::var("OUTBOARD_ROUNDS").map_or(3, |rounds| rounds.parse().expect("a number"))
}

fn started() -> (tempfile::TempDir, Program, [Station; 2]) {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("vm.toml"), FILE).expect("a file");
    let mut program = serving(folder.path(), &[]);
    program.says("serving b").expect("it serves");
    let both = [("a.sock", 1), ("b.sock", 2)];
    let both = both.map(|(socket, number)| Station::new(folder.path(), socket, number));
    (folder, program, both)
}

#[test]
fn a_switch_that_is_killed_under_load_costs_what_it_held_and_nothing_else() {
    let (folder, mut program, mut both) = started();
    for _ in 0..rounds() {
        stretch(&mut both);
        let missing = both.each_ref().map(|station| station.missing);
        drop(program);
        program = serving(folder.path(), &[]);
        for (station, socket) in both.iter_mut().zip(["a.sock", "b.sock"]) {
            station.reconnect(folder.path(), socket);
        }
        both.iter_mut().for_each(Station::settle);
        meet(&mut both);
        stretch(&mut both);
        for (station, missing) in both.iter().zip(missing) {
            assert!(station.missing - missing <= HELD, "{} lost", station.missing - missing);
        }
    }
    for station in &both {
        let (missing, twice) = (station.missing, station.twice);
        println!("{} received, {missing} missing, {twice} twice", station.received);
        assert!(twice <= rounds() * WINDOW, "{twice} came twice");
    }
}

#[test]
fn a_switch_that_is_replaced_under_load_sends_nothing_twice_and_counts_what_it_loses() {
    let (folder, mut program, mut both) = started();
    let mut lost = 0;
    for _ in 0..rounds() {
        stretch(&mut both);
        let mut next = serving(folder.path(), &["--take-over", "c"]);
        cross(&mut both, &mut |_| program.child.try_wait().expect("ours").is_some());
        next.says("the old program has ended").expect("everything was taken over");
        lost += in_log(&mut program);
        assert_eq!(program.ends(), Some(0));
        program = next;
        stretch(&mut both);
    }
    let lost = land(&mut both, folder.path(), lost);
    let [a, b] = &both;
    println!("{} sent, {lost} lost", a.next + b.next);
    assert_eq!((a.twice, b.twice), (0, 0));
}
