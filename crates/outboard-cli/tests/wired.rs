//! A `[[switch]]` in a file of `outboard serve`: network cards of one process that are wired to each other, ports that
//! come and go while packets move, and an account in which no packet is missing.
#![expect(clippy::expect_used, reason = "a failed step of a test is its end")]

#[path = "../../outboard-devices/tests/net/guest.rs"]
#[expect(dead_code, reason = "the card's own tests need more of it")]
mod guest;
mod program;
#[path = "../../outboard-devices/tests/rig/mod.rs"]
#[expect(dead_code, reason = "the devices' own tests need more of it")]
mod rig;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use guest::{ALL, CONTROL, Guest, Peer, TX, packet};
use outboard_frontend::Connection;
use program::Program;
use rig::Rig;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);

const TWO_CARDS: &str = "\
control = 'c'
[[worker]]
name = 'quay'
[[switch]]
name = 'lan'
stream-listen = 'up'
patience = 60000
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

const ONE_MORE: &str = "[[device]]\nname = 'x'\ntype = 'net'\nswitch = 'lan'\nworker = 'quay'\nsocket-path = 'x.sock'\n";

fn outboard(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outboard"));
    command.current_dir(folder).stdin(Stdio::null());
    command
}

fn file(folder: &Path, name: &str, text: &str) {
    std::fs::write(folder.join(name), text).expect("a file");
}

fn serving(folder: &Path, args: &[&str]) -> Program {
    Program::run(outboard(folder).arg("serve").args(args), folder)
}

fn ctl(folder: &Path, args: &[&str]) -> Value {
    let output = outboard(folder).args(["ctl", "c", "--json"]).args(args).output();
    let output = output.expect("our own program");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{args:?}: {text}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// The guest whose card listens there.
fn guest(folder: &Path, socket: &str) -> Guest {
    let connection = Connection::connect_patiently(folder.join(socket), PATIENCE, PATIENCE);
    let elsewhere = std::thread::spawn(|| {});
    let rig = Rig::before(connection.expect("it listens"), elsewhere, u64::MAX);
    let mut guest = Guest { rig, control: CONTROL };
    guest.activate();
    // A round trip on the thread of its rings: by now they have heard that they are enabled.
    assert_eq!(guest.command(&[9, 9], 1), Some(1));
    guest
}

fn address(number: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, number]
}

/// A packet from one guest to an address.
fn from(sender: u8, to: [u8; 6], fill: u8) -> Vec<u8> {
    let mut bytes = packet(to, fill, 60);
    bytes[6..12].copy_from_slice(&address(sender));
    bytes
}

/// A packet each way, each of which arrives.
fn exchange(a: &mut Guest, b: &mut Guest, round: u8) {
    let (there, back) = (from(1, address(2), round), from(2, address(1), round));
    a.send(&there);
    assert_eq!(b.receive(), there);
    b.send(&back);
    assert_eq!(a.receive(), back);
}

/// Both are known to the switch from now on.
fn meet(a: &mut Guest, b: &mut Guest) {
    a.send(&from(1, ALL, 0));
    b.receive();
    b.send(&from(2, ALL, 0));
    a.receive();
}

/// Gives an order while two guests exchange packets, none of which is lost.
fn meanwhile(folder: &Path, order: &[&str], a: &mut Guest, b: &mut Guest) {
    let mut command = outboard(folder);
    command.args(["ctl", "c"]).args(order).stdout(Stdio::null());
    let mut child = command.spawn().expect("our own program");
    for round in (0..=u8::MAX).cycle() {
        exchange(a, b, round);
        if let Some(status) = child.try_wait().expect("ours") {
            assert!(status.success(), "{order:?}");
            return;
        }
    }
}

/// What a counter of all ports or all cards stands at, summed up.
fn sum(stats: &Value, wanted: &dyn Fn(&str, &str) -> bool) -> u64 {
    fn add(value: &Value, path: &str, wanted: &dyn Fn(&str, &str) -> bool) -> u64 {
        let Some(inner) = value.as_object() else { return 0 };
        let of_one = |(name, value): (&String, &Value)| match value.as_u64() {
            Some(number) if wanted(path, name) => number,
            _ => add(value, &format!("{path}/{name}"), wanted),
        };
        inner.iter().map(of_one).sum()
    }
    add(&stats["stats"], "", wanted)
}

/// Waits until what was sent, with copies in the place of what was flooded, is what was received and what was dropped:
/// counters are a moment behind. Cards that are gone have taken `gone` (sent, received and dropped) along.
fn adds_up(folder: &Path, gone: (u64, u64)) -> Value {
    let end = Instant::now() + PATIENCE;
    loop {
        let stats = ctl(folder, &["stats"]);
        // What a card shows of its port is on the switch's page too.
        let own = |path: &str| !path.ends_with("/switch");
        let of = |name: &'static str| sum(&stats, &move |path, this| own(path) && this == name);
        let dropped = of("dropped-passed-over") + of("dropped-stopped");
        // An uplink drops these behind the switch, a card before it.
        let behind = sum(&stats, &|path, name| {
            path.contains("uplink") && ["dropped-link-down", "dropped-refused"].contains(&name)
        });
        let sent = gone.0 + of("sent-packets") + of("flooded-copies") - of("flooded");
        let arrived = gone.1 + of("received-packets") + of("filtered") + of("too-large");
        if sent == arrived + dropped + behind {
            return stats;
        }
        assert!(Instant::now() < end, "{sent} sent, {arrived} + {dropped} + {behind}: {stats:#}");
        std::thread::yield_now();
    }
}

#[test]
fn cards_of_a_file_are_wired_to_each_other_and_ports_come_and_go_while_packets_move() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = folder.path();
    file(at, "vm.toml", TWO_CARDS);
    file(at, "more.toml", ONE_MORE);
    let mut program = serving(at, &["vm.toml"]);
    program.says("serving b").expect("it serves");
    let (mut a, mut b) = (guest(at, "a.sock"), guest(at, "b.sock"));
    meet(&mut a, &mut b);
    for turn in 1..=3 {
        meanwhile(at, &["add", "more.toml"], &mut a, &mut b);
        let mut x = guest(at, "x.sock");
        let hello = from(3, ALL, 3);
        x.send(&hello);
        assert_eq!(a.receive(), hello);
        assert_eq!(b.receive(), hello);
        let answer = from(1, address(3), turn);
        a.send(&answer);
        assert_eq!(x.receive(), answer);
        exchange(&mut a, &mut b, turn);
        drop(x);
        meanwhile(at, &["remove", "x"], &mut a, &mut b);
        assert!(!at.join("x.sock").exists(), "its socket went with it");
        // Nobody knows where the one is that has gone: the others get what is for it.
        let late = from(1, address(3), turn);
        a.send(&late);
        assert_eq!(b.receive(), late);
        exchange(&mut a, &mut b, turn);
    }
    // Three cards were there that sent a packet and got one.
    let stats = adds_up(at, (3, 3));
    let listed = ctl(at, &["list"]);
    assert_eq!(listed["devices"][0]["what"], "a network card on the switch lan", "{listed}");
    let ports = &stats["stats"]["switch/lan"]["ports"];
    assert_eq!(ports["x"]["flooded"], 3, "{stats}");
    assert_eq!(ports["uplink:1"]["link"], "up", "{stats}");
    assert_eq!(ports["uplink:1"]["received-packets"], 0, "nobody is there: {stats}");
    assert_ne!(ports["uplink:1"]["dropped-link-down"], 0, "{stats}");
    assert!(stats["stats"]["a"]["switch"]["flooded"].as_u64() >= Some(4), "{stats}");
}

#[test]
fn what_is_behind_the_uplink_is_one_more_of_them() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = folder.path();
    file(at, "vm.toml", TWO_CARDS);
    let mut program = serving(at, &["vm.toml"]);
    program.says("serving b").expect("it serves");
    let (mut a, mut b) = (guest(at, "a.sock"), guest(at, "b.sock"));
    meet(&mut a, &mut b);
    // What they said to all is on its way to the uplink as well, and is dropped there: nobody is behind it yet.
    let end = Instant::now() + PATIENCE;
    while ctl(at, &["stats"])["stats"]["switch/lan"]["ports"]["uplink:1"]["dropped-link-down"] != 2
    {
        assert!(Instant::now() < end, "two packets, dropped at the uplink");
        std::thread::yield_now();
    }
    let mut peer = Peer::of(UnixStream::connect(at.join("up")).expect("it listens"));
    let hello = from(7, ALL, 7);
    peer.send(&hello);
    assert_eq!(a.receive(), hello);
    assert_eq!(b.receive(), hello);
    for round in 0..100 {
        let (there, back) = (from(1, address(7), round), from(7, address(1), round));
        a.send(&there);
        let mut got = peer.receive();
        while got.starts_with(&ALL) {
            // From when the guests met: the uplink may have had them still.
            got = peer.receive();
        }
        assert_eq!(got, there);
        peer.send(&back);
        assert_eq!(a.receive(), back);
        exchange(&mut a, &mut b, round);
    }
    // A packet that no guest of this switch could take does not hold up those behind it.
    peer.send(&packet(address(1), 1, 9000));
    peer.send(&from(7, address(1), 8));
    assert_eq!(a.receive(), from(7, address(1), 8));
    let stats = adds_up(at, (0, 0));
    let uplink = &stats["stats"]["switch/lan"]["ports"]["uplink:1"];
    let (got, lost) = (&uplink["received-packets"], &uplink["dropped-link-down"]);
    let before = [(100, 2), (101, 1), (102, 0)].map(|pair| (Some(pair.0), Some(pair.1)));
    assert!(before.contains(&(got.as_u64(), lost.as_u64())), "{stats}");
    assert_eq!(uplink["sent-packets"], 102, "{stats}");
    assert_eq!(uplink["dropped-too-long"], 1, "{stats}");
}

#[test]
fn a_new_program_takes_cards_over_that_are_wired_to_each_other() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = folder.path();
    file(at, "vm.toml", TWO_CARDS);
    let mut program = serving(at, &["vm.toml"]);
    program.says("serving b").expect("it serves");
    let (mut a, mut b) = (guest(at, "a.sock"), guest(at, "b.sock"));
    meet(&mut a, &mut b);
    for round in 0..3 {
        exchange(&mut a, &mut b, round);
        let mut next = serving(at, &["vm.toml", "--take-over", "c"]);
        next.says("the old program has ended").expect("everything was taken over");
        assert_eq!(program.ends(), Some(0));
        program = next;
        meet(&mut a, &mut b);
        exchange(&mut a, &mut b, round);
        Connection::connect_patiently(at.join("c"), PATIENCE, PATIENCE).expect("it listens");
        // What is behind the uplink is there again, too.
        let up = Connection::connect_patiently(at.join("up"), PATIENCE, PATIENCE);
        drop(up.expect("the uplink listens"));
    }
}

#[test]
fn what_is_wrong_with_a_switch_or_a_card_on_it_is_one_line_and_nothing_was_made() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = folder.path();
    for (more, told) in [
        ("[[switch]]\nname = 'lan'\n", "bad.toml:19: there is another switch 'lan'"),
        ("[[switch]]\nname = 'x'\nmtu = 1\n", "bad.toml:21: invalid value '1' for '--mtu"),
        ("[[switch]]\nname = 'x'\nstream = 'none'\n", "bad.toml:19: none: No such file"),
        (
            "[[device]]\ntype = 'net'\nswitch = 'wan'\nsocket-path = 's'\n",
            "bad.toml:21: there is no switch 'wan'",
        ),
        (
            "[[device]]\ntype = 'net'\nswitch = 'lan'\nsocket-path = 's'\ntap = 't'\n",
            "bad.toml:23: tap: the card is on the switch 'lan'",
        ),
        (
            "[[device]]\ntype = 'net'\nswitch = 'lan'\nsocket-path = 's'\nmtu = 9000\n",
            "bad.toml:19: MTU 9000: the switch takes 1500 at most",
        ),
        ("[[device]]\ntype = 'rng'\nswitch = 'lan'\n", "bad.toml:21: rng has no switch"),
    ] {
        file(at, "bad.toml", &format!("{TWO_CARDS}{more}"));
        let output = outboard(at).args(["serve", "bad.toml"]).output().expect("it ends");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.lines().count() == 1 && text.contains(told), "{text}");
        let mut left = ["a.sock", "b.sock", "c", "s", "up"].into_iter();
        assert_eq!(left.find(|name| at.join(name).exists()), None);
    }
}

/// A guest whose ring is broken, a front-end that asks without end and one that goes in the middle: the guests that share
/// their thread and their switch exchange every packet, in order, and the broken ring is told.
#[test]
fn a_guest_that_breaks_its_ring_costs_those_who_share_its_thread_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = folder.path();
    file(
        at,
        "vm.toml",
        &TWO_CARDS.replace("'lan'\nsocket-path", "'lan'\nworker = 'quay'\nsocket-path"),
    );
    file(at, "more.toml", ONE_MORE);
    let mut program = serving(at, &["vm.toml"]);
    program.says("serving b").expect("it serves");
    let (mut a, mut b) = (guest(at, "a.sock"), guest(at, "b.sock"));
    meet(&mut a, &mut b);
    meanwhile(at, &["add", "more.toml"], &mut a, &mut b);
    for (address, length) in [(1 << 60, 60), (u64::MAX - 8, 60)] {
        let mut bad = guest(at, "x.sock");
        bad.rig.offer(TX, &[(address, length)], &[], 1);
        let end = Instant::now() + PATIENCE;
        for round in (0..=u8::MAX).cycle() {
            exchange(&mut a, &mut b, round);
            let stats = ctl(at, &["stats", "x"]);
            let why = &stats["stats"]["x"]["rings"]["1"]["broken"];
            if why.as_str().is_some_and(|why| why.contains("memory")) {
                break;
            }
            assert!(Instant::now() < end, "the broken ring is told: {stats:#}");
        }
        // Its front-end asks without end while the others go on, and is gone in the middle of it.
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let flood = scope.spawn(|| {
                let mut asked = 0;
                while !done.load(Ordering::Relaxed) {
                    bad.rig.vmm.read_config(0, 24).expect("answered");
                    asked += 1;
                }
                drop(bad);
                asked
            });
            for round in 0..=u8::MAX {
                exchange(&mut a, &mut b, round);
            }
            done.store(true, Ordering::Relaxed);
            let asked: u64 = flood.join().expect("it was answered to the end");
            println!("{asked} questions meanwhile");
        });
        exchange(&mut a, &mut b, 0);
    }
}
