//! `outboard serve` and `outboard ctl` as their users type them: many devices in one process, orders
//! while they run, an upgrade of all of them at once.
#![expect(clippy::expect_used, reason = "a failed step of a test is its end")]

mod load;
mod program;

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use load::under_load;
use outboard_frontend::Connection;
use outboard_frontend::block::{BlockDevice, BlockOptions, SECTOR};
use program::Program;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);
const MIB: u64 = 1 << 20;

/// A running `outboard serve`.
fn serving(folder: &Path, args: &[&str]) -> Program {
    Program::run(outboard(folder).arg("serve").args(args), folder)
}

fn outboard(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outboard"));
    command.current_dir(folder).stdin(Stdio::null());
    command
}

fn ctl(folder: &Path, args: &[&str]) -> Output {
    outboard(folder).args(["ctl", "c"]).args(args).output().expect("our own program")
}

/// An order that is carried out, answered in JSON.
fn told(folder: &Path, args: &[&str]) -> Value {
    let output = ctl(folder, &[args, &["--json"]].concat());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{args:?}: {text}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// An order that is refused: the one line that says why.
fn refused(folder: &Path, args: &[&str]) -> String {
    let output = ctl(folder, args);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{args:?}: {text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

fn file(folder: &Path, name: &str, text: &str) {
    std::fs::write(folder.join(name), text).expect("a file");
}

fn image(folder: &Path, name: &str, size: u64) {
    let made = std::fs::File::create(folder.join(name)).expect("an image");
    made.set_len(size).expect("room");
}

fn open(folder: &Path, socket: &str) -> BlockDevice {
    let socket = Connection::connect_patiently(folder.join(socket), PATIENCE, PATIENCE);
    BlockDevice::open(socket.expect("it listens"), BlockOptions::default()).expect("a disk")
}

const TWO_DISKS: &str = "\
control = 'c'
[[device]]
name = 'root'
type = 'block'
socket-path = 'r'
image = 'root.img'
[[device]]
name = 'data'
type = 'block'
socket-path = 'd'
blk-file = 'data.img'
";

fn two_disks() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    image(folder.path(), "root.img", 16 * MIB);
    image(folder.path(), "data.img", 16 * MIB);
    file(folder.path(), "vm.toml", TWO_DISKS);
    folder
}

#[test]
fn devices_of_a_file_are_served_listed_added_and_removed() {
    let folder = two_disks();
    let at = folder.path();
    let mut program = serving(at, &["vm.toml"]);
    program.says("serving root").expect("it serves");
    let mut root = open(at, "r");
    root.write(8, &[7; 4096]).expect("written");
    let listed = told(at, &["list"]);
    let devices = listed["devices"].as_array().expect("a list");
    let seen: Vec<_> = devices
        .iter()
        .map(|one| (one["name"].as_str(), one["connected"].as_bool(), one["finished"].as_u64()))
        .collect();
    assert_eq!(seen[0], (Some("data"), Some(false), Some(0)));
    assert_eq!((seen[1].0, seen[1].1), (Some("root"), Some(true)));
    assert!(seen[1].2 >= Some(1), "{listed}");
    let stats = told(at, &["stats", "root"]);
    let ring = &stats["stats"]["root"]["rings"]["0"];
    assert_eq!(ring["state"], "running", "{stats}");
    assert_eq!(stats["stats"]["root"]["image"]["bytes"], 16 * MIB, "{stats}");

    file(at, "more.toml", "[[device]]\ntype = 'rng'\nsocket-path = 'g'\n");
    assert_eq!(told(at, &["add", "more.toml"])["done"], "serving rng");
    drop(Connection::connect_patiently(at.join("g"), PATIENCE, PATIENCE).expect("it listens"));
    assert!(refused(at, &["add", "more.toml"]).contains("line 1: there is a device 'rng'"));
    file(at, "bad.toml", "[[device]]\ntype = 'rng'\nname = 'x'\nsource = '/nonexistent'\n");
    assert!(refused(at, &["add", "bad.toml"]).contains("line 1: /nonexistent"));

    told(at, &["remove", "data"]);
    assert!(!at.join("d").exists(), "its socket went with it");
    assert!(refused(at, &["remove", "data"]).contains("there is no device 'data'"));
    assert!(refused(at, &["stats", "data"]).contains("there is no device 'data'"));
    assert!(refused(at, &["resize", "rng"]).contains("rng has no size"));
    let mut back = [0; 4096];
    root.read(8, &mut back).expect("the others go on");
    assert_eq!(back, [7; 4096]);
    drop(root);

    told(at, &["remove", "root"]);
    told(at, &["remove", "rng"]);
    assert_eq!(told(at, &["list"])["devices"].as_array().map(Vec::len), Some(0));
    rustix::process::kill_process(
        rustix::process::Pid::from_child(&program.child),
        rustix::process::Signal::TERM,
    )
    .expect("it runs");
    assert_eq!(program.ends(), Some(0));
    assert!(!at.join("c").exists(), "the control socket went with it");
}

#[test]
fn a_guest_sees_what_its_image_has_grown_by() {
    let folder = two_disks();
    let at = folder.path();
    let mut program = serving(at, &["vm.toml"]);
    program.says("serving root").expect("it serves");
    let mut root = open(at, "r");
    let behind = 16 * MIB / SECTOR;
    root.write(behind, &[9; 4096]).expect_err("behind the end");
    assert!(refused(at, &["resize", "root"]).contains("keeps its size"), "it has not grown");
    let grown = std::fs::OpenOptions::new().write(true).open(at.join("root.img")).expect("there");
    grown.set_len(24 * MIB).expect("room");
    told(at, &["resize", "root"]);
    root.refresh_config().expect("the new one");
    root.write(behind, &[9; 4096]).expect("there is room now");
    let mut back = [0; 4096];
    root.read(behind, &mut back).expect("read");
    assert_eq!(back, [9; 4096]);
    root.write(24 * MIB / SECTOR, &[9; 4096]).expect_err("behind the new end");
    assert_eq!(std::fs::metadata(at.join("root.img")).expect("there").len(), 24 * MIB);
}

#[test]
fn what_is_wrong_with_any_device_is_one_line_and_nothing_was_made() {
    let folder = two_disks();
    let at = folder.path();
    for (more, told) in [
        (
            "[[device]]\ntype = 'block'\nimage = 'none.img'\nsocket-path = 's'\n",
            "bad.toml:12: image none.img: No such file",
        ),
        ("[[device]]\ntype = 'block'\nimage = 'root.img'\n", "bad.toml:12: no socket"),
        (
            "[[device]]\ntype = 'rng'\nsocket-path = 'r'\n",
            "bad.toml:12: socket r: another program serves",
        ),
        (
            "[[device]]\ntype = 'rng'\nsocket-path = 's'\nqueue-size = 'x'\n",
            "bad.toml:15: invalid value 'x'",
        ),
        ("[[worker]]\nname = 'w'\npin = 9999\n", "bad.toml:12: no thread can be pinned to"),
        (
            "[[worker]]\nname = 'w'\n[[device]]\ntype = 'fs'\nsocket-path = 's'\nshared-dir = '.'\nsandbox = 'none'\nworker = 'w'\n",
            "bad.toml:14: its workers need threads of their own",
        ),
    ] {
        file(at, "bad.toml", &format!("{TWO_DISKS}{more}"));
        let output = outboard(at).args(["serve", "bad.toml"]).output().expect("it ends");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{text}");
        let lines: Vec<_> = text.lines().collect();
        assert!(lines.len() == 1 && text.starts_with(&format!("outboard: {told}")), "{text}");
        let left: Vec<_> =
            ["r", "d", "s", "c"].into_iter().filter(|s| at.join(s).exists()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
    let checked = outboard(at).args(["serve", "--check", "vm.toml"]).output().expect("it ends");
    assert_eq!(String::from_utf8_lossy(&checked.stdout), "vm.toml: 2 devices, in order\n");
}

/// The same two disks on one thread.
fn on_one_worker() -> String {
    let shared = TWO_DISKS.replace("type = 'block'\n", "type = 'block'\nworker = 'both'\n");
    format!("{shared}[[worker]]\nname = 'both'\npoll-us = 20\n")
}

#[test]
fn a_new_program_takes_all_devices_over_under_load() {
    taken_over_under_load(TWO_DISKS);
}

#[test]
fn a_new_program_takes_devices_over_under_load_that_share_a_worker() {
    taken_over_under_load(&on_one_worker());
}

fn taken_over_under_load(devices: &str) {
    let folder = two_disks();
    let at = folder.path();
    file(at, "vm.toml", devices);
    let mut program = serving(at, &["vm.toml"]);
    program.says("serving root").expect("it serves");
    let mut data = open(at, "d");
    data.write(8, &[5; 4096]).expect("written");
    let _last = under_load(&at.join("r"), |live| {
        let ways: [&[_]; 3] = [
            &["serve", "vm.toml", "--take-over", "c"],
            &["ctl", "c", "take-over", "vm.toml"],
            &["serve", "vm.toml", "--take-over", "c"],
        ];
        for way in ways {
            let mut next = Program::run(outboard(at).args(way), at);
            next.says("the old program has ended").expect("everything was taken over");
            assert_eq!(program.ends(), Some(0));
            live.progress(32).expect("the load goes on");
            program = next;
            // Orders are taken once the socket is there.
            Connection::connect_patiently(at.join("c"), PATIENCE, PATIENCE).expect("it listens");
            assert_eq!(told(at, &["list"])["devices"].as_array().map(Vec::len), Some(2));
        }
        program
    });
    let mut back = [0; 4096];
    data.read(8, &mut back).expect("the other guest goes on too");
    assert_eq!(back, [5; 4096]);
}

#[test]
fn one_device_of_a_worker_is_looked_at_resized_and_removed_under_the_load_of_another() {
    let folder = two_disks();
    let at = folder.path();
    file(at, "vm.toml", &on_one_worker());
    let mut program = serving(at, &["vm.toml"]);
    program.says("serving root").expect("it serves");
    file(
        at,
        "again.toml",
        "[[device]]\nname = 'data'\ntype = 'block'\nsocket-path = 'd'\nimage = 'data.img'\nworker = ['both', 'more']\n\
         num-queues = 2\n[[worker]]\nname = 'more'\n",
    );
    under_load(&at.join("r"), |live| {
        for round in 1..=5 {
            let mut data = open(at, "d");
            data.write(8, &[round; 4096]).expect("written");
            let grown = 16 * MIB + u64::from(round) * MIB;
            let image = std::fs::OpenOptions::new().write(true).open(at.join("data.img"));
            image.expect("there").set_len(grown).expect("room");
            told(at, &["resize", "data"]);
            data.refresh_config().expect("the new one");
            data.write(grown / SECTOR - 8, &[9; 4096]).expect("there is room now");
            let stats = told(at, &["stats"]);
            let shown = &stats["stats"]["worker/both"]["devices"];
            assert!(shown["root"]["0"]["turns"].as_u64() > Some(0), "{stats}");
            assert!(shown["data"]["0"]["turns"].as_u64() > Some(0), "{stats}");
            drop(data);
            told(at, &["remove", "data"]);
            let stats = told(at, &["stats", "worker/both"]);
            assert!(stats["stats"]["worker/both"]["devices"]["data"].is_null(), "{stats}");
            live.progress(32).expect("the other one goes on");
            told(at, &["add", "again.toml"]);
            file(
                at,
                "again.toml",
                &std::fs::read_to_string(at.join("again.toml"))
                    .expect("there")
                    .replace("[[worker]]\nname = 'more'\n", ""),
            );
        }
    });
    assert!(refused(at, &["stats", "worker/none"]).contains("worker/none"));
}

#[test]
fn a_take_over_that_leaves_a_device_out_is_refused_before_anything_moves() {
    let folder = two_disks();
    let at = folder.path();
    let mut program = serving(at, &["vm.toml"]);
    program.says("serving root").expect("it serves");
    let mut root = open(at, "r");
    let one = TWO_DISKS.split("[[device]]\nname = 'data'").next().expect("the first");
    file(at, "one.toml", one);
    let args = ["serve", "one.toml", "--take-over", "c"];
    let output = outboard(at).args(args).output().expect("it ends");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("'data' runs there and is not in the file"), "{text}");
    root.write(8, &[1; 4096]).expect("nothing has moved");
    let devices = told(at, &["list"]);
    assert_eq!(devices["devices"].as_array().map(Vec::len), Some(2));
}

#[test]
fn what_cannot_be_taken_over_goes_on_in_the_old_program_and_the_others_move() {
    let folder = two_disks();
    let at = folder.path();
    let mut program = serving(at, &["vm.toml"]);
    program.says("serving root").expect("it serves");
    let mut data = open(at, "d");
    data.write(8, &[5; 4096]).expect("written");
    let (mut next, program) = under_load(&at.join("r"), |live| {
        // Smaller rings than the one that the guest of this disk uses.
        file(at, "small.toml", &format!("{TWO_DISKS}queue-size = 4\n"));
        let mut next = serving(at, &["small.toml", "--take-over", "c"]);
        next.says("taken over").expect("one disk moves");
        program.says("not handed over, the device goes on here").expect("the other one stays");
        live.progress(32).expect("the load goes on");
        (next, program)
    });
    let mut back = [0; 4096];
    data.read(8, &mut back).expect("its guest goes on");
    assert_eq!(back, [5; 4096]);
    data.write(8, &[6; 4096]).expect("and writes");
    drop((data, program));
    next.says("the old program has ended").expect("it was waited for");
}

#[test]
fn strangers_on_the_control_socket_change_nothing() {
    use std::io::{Read, Write};
    let folder = two_disks();
    let at = folder.path();
    let mut program = serving(at, &["vm.toml"]);
    program.says("serving root").expect("it serves");
    drop(Connection::connect_patiently(at.join("c"), PATIENCE, PATIENCE).expect("it listens"));
    for text in ["", "\n", "hello\n", "{\"order\":\"sing\"}\n", "{\"order\":\"remove\"}\n"] {
        let mut stream = std::os::unix::net::UnixStream::connect(at.join("c")).expect("there");
        stream.write_all(text.as_bytes()).expect("room");
        stream.shutdown(std::net::Shutdown::Write).expect("ours");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        assert!(answer.starts_with("{\"refused\":"), "{text:?}: {answer}");
    }
    assert_eq!(told(at, &["list"])["devices"].as_array().map(Vec::len), Some(2));
}
