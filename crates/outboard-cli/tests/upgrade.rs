//! Live upgrade of `outboard block` as its users type it: `--control` and `--take-over`, under load of
//! which every byte is checked. The later program of another state version is this test program.
//!
//! `OUTBOARD_ROUNDS=100` upgrades between the two so many times.
#![expect(clippy::expect_used, reason = "a failed step of a test is its end")]

#[path = "../../outboard-devices/tests/block/later.rs"]
mod later;
mod load;
mod program;

use std::path::Path;
use std::process::Command;

use later::Later;
use load::under_load;
use outboard::{Server, WorkerDevice};
use outboard_check::bench::Live;
use outboard_devices::block::{Block, BlockOptions, Image, ImageOptions};
use program::Program;

/// Set for this test program when it is to be a disk: the version that it writes.
const WRITES: &str = "OUTBOARD_LATER_WRITES";

/// A running `outboard block`.
fn started(args: &[&str], folder: &Path) -> Program {
    Program::run(Command::new(env!("CARGO_BIN_EXE_outboard")).arg("block").args(args), folder)
}

/// The later program takes over; it writes this version of a state.
fn later(writes: u32, folder: &Path) -> Program {
    let program = std::env::current_exe().expect("our own path");
    let args = ["--exact", "the_later_program", "--nocapture"];
    Program::run(Command::new(program).args(args).env(WRITES, writes.to_string()), folder)
}

fn image(folder: &Path) {
    let file = std::fs::File::create(folder.join("disk.img")).expect("an image");
    file.set_len(16 << 20).expect("room");
}

/// The load gets answers, whichever process gives them.
fn goes_on(live: &Live) {
    live.progress(32).expect("the load goes on");
}

const NEXT: [&str; 3] = ["--take-over", "c", "disk.img"];

#[test]
fn twelve_live_upgrades_under_checked_load_lose_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    image(folder.path());
    let mut disk = started(&["--socket-path", "s", "--control", "c", "disk.img"], folder.path());
    disk.says("serving").expect("it serves");
    // What serves at the end outlives the load, which reads everything back.
    let _last = under_load(&folder.path().join("s"), |live| {
        for turn in 0..12 {
            let mut next = started(&NEXT, folder.path());
            let pause = next.says("taken over").unwrap_or_else(|| panic!("turn {turn}"));
            assert!(pause.contains("stood still for"), "{pause}");
            disk.says("handed over").expect("the old one gives way");
            assert_eq!(disk.ends(), Some(0));
            disk = next;
            goes_on(live);
        }
        disk
    });
}

/// Not a test: the later program, for the test below.
#[test]
fn the_later_program() {
    let Ok(writes) = std::env::var(WRITES) else { return };
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    let image = Image::open("disk.img", ImageOptions::default()).expect("an image");
    let disk = Block::new(image, BlockOptions::default()).expect("a disk");
    let later = Later { writes: writes.parse().expect("a version"), ..Later::new(disk, 0) };
    let device = WorkerDevice::new(later).expect("threads");
    Server::take_over("c").expect("a predecessor").serve(device).expect("it serves");
}

/// How long the rings stood still, as the new side's log has it; in microseconds.
fn pause(line: &str) -> u64 {
    let number = line.split("stood still for ").nth(1).and_then(|rest| rest.split(' ').next());
    number.and_then(|number| number.parse().ok()).expect("the pause in microseconds")
}

/// To the later program, which then is asked in vain by the earlier one; every second time it writes
/// what that can read, and is followed by it. Answers who serves in the end.
fn upgraded(mut disk: Program, round: usize, folder: &Path, pauses: &mut Vec<u64>) -> Program {
    let back = round % 2 == 1;
    let mut later = self::later(if back { 1 } else { 2 }, folder);
    let line = later.says("taken over").expect("the later one takes over");
    pauses.push(pause(&line));
    disk.says("handed over").expect("the old one gives way");
    assert_eq!(disk.ends(), Some(0));
    let mut earlier = started(&NEXT, folder);
    if !back {
        earlier.says("state version 2, this program knows up to 1").expect("a reason");
        assert_eq!(earlier.ends(), Some(1));
        later.says("not handed over").expect("it says why it goes on");
        return later;
    }
    let line = earlier.says("taken over").expect("the earlier one takes over");
    pauses.push(pause(&line));
    later.says("handed over").expect("the later one gives way");
    assert_eq!(later.ends(), Some(0));
    earlier
}

#[test]
fn upgrades_to_a_later_state_version_and_back_lose_nothing_and_what_cannot_be_read_stays() {
    let rounds = std::env::var("OUTBOARD_ROUNDS").ok().and_then(|text| text.parse().ok());
    let rounds: usize = rounds.unwrap_or(8);
    let folder = tempfile::tempdir().expect("a folder");
    image(folder.path());
    let mut disk = started(&["--socket-path", "s", "--control", "c", "disk.img"], folder.path());
    disk.says("serving").expect("it serves");
    let mut pauses = Vec::new();
    let _last = under_load(&folder.path().join("s"), |live| {
        for round in 0..rounds {
            disk = upgraded(disk, round, folder.path(), &mut pauses);
            goes_on(live);
        }
        disk
    });
    pauses.sort_unstable();
    let at = |share: usize| pauses.get((pauses.len() - 1) * share / 100).copied().unwrap_or(0);
    println!(
        "{} upgrades: the rings stood still for {} us (p50), {} us (p99)",
        pauses.len(),
        at(50),
        at(99)
    );
}

#[test]
fn a_take_over_that_the_new_side_cannot_carry_leaves_the_old_one_serving() {
    let folder = tempfile::tempdir().expect("a folder");
    image(folder.path());
    let mut disk = started(&["--socket-path", "s", "--control", "c", "disk.img"], folder.path());
    disk.says("serving").expect("it serves");
    under_load(&folder.path().join("s"), |live| {
        for _ in 0..4 {
            let args = ["--take-over", "c", "--without", "VIRTIO_RING_F_EVENT_IDX", "disk.img"];
            let mut next = started(&args, folder.path());
            let why = next.says("take-over").expect("a reason");
            assert!(why.contains("does not offer features 0x20000000"), "{why}");
            assert_eq!(next.ends(), Some(1));
            disk.says("not handed over").expect("it says why it goes on");
            goes_on(live);
        }
    });
}

#[test]
fn nothing_to_take_over_is_one_line_and_exit_code_2() {
    let folder = tempfile::tempdir().expect("a folder");
    image(folder.path());
    let mut disk = started(&NEXT, folder.path());
    disk.says("socket c:").expect("the path");
    assert_eq!(disk.ends(), Some(2));
}
