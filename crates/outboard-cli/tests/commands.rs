//! The program as a user meets it: exit codes, one clear line, JSON that parses, against
//! qemu-storage-daemon where a back-end is needed (see `Daemon::start` for what happens without it).
#![expect(clippy::expect_used, clippy::panic, reason = "a failed step of a test is its end")]

#[path = "../../outboard-frontend/tests/common/mod.rs"]
mod common;

use std::process::{Command, Output};

use common::Daemon;
use serde_json::Value;

const MIB: u64 = 1 << 20;

fn outboard(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_outboard")).args(args).output().expect("our own program")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("text")
}

/// What the library of file systems says through the crate `log` is in our log: /proc has no handles.
#[test]
fn a_library_that_logs_is_heard() {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("s");
    let socket = socket.to_str().expect("text");
    let options = ["--sandbox", "none", "--inode-file-handles=mandatory"];
    let output = outboard(
        &[&["fs", "--socket-path", socket, "--shared-dir", "/proc"], &options[..]].concat(),
    );
    let said = text(&output.stderr);
    assert!(said.contains("ERROR") && said.contains("does not support file handles"), "{said}");
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn a_wrong_command_line_is_one_line_and_exit_code_2() {
    let folder = tempfile::tempdir().expect("a folder");
    let missing = folder.path().join("nobody.sock");
    let missing = missing.to_str().expect("text");
    let long = format!("/{}", "x".repeat(200));
    for (args, word) in [
        (vec!["frob"], "frob"),
        (vec!["probe"], "<SOCKET>"),
        (vec!["probe", missing], "No such file"),
        (vec!["probe", &long], "107"),
        (vec!["probe", "s", "--type", "toaster"], "known are block"),
        (vec!["bench", missing], "No such file"),
        (vec!["bench", "s", "--bs", "3"], "512 bytes"),
        (vec!["bench", "s", "--depth", "1,0"], "depth"),
        (vec!["bench", "s", "--rw", "trim"], "randread"),
        (vec!["bench", "s", "--seconds", "0"], "seconds"),
        (vec!["demo", "--size", "1k"], "64M"),
        (vec!["rng", "--source", "/nonexistent/source"], "/nonexistent/source: No such file"),
        (vec!["rng", "--max-bytes", "0"], "--max-bytes"),
        (vec!["rng", "--period", "7"], "--max-bytes"),
        (vec!["rng"], "no socket"),
        (vec!["console", "--port", "tty"], "socket:PATH"),
        (vec!["console", "--port", "file:/nonexistent/file"], "/nonexistent/file: No such file"),
        (vec!["console", "--port", "socket:/nonexistent/s"], "/nonexistent/s: No such file"),
        (vec!["console", "--size", "80"], "two numbers"),
        (vec!["console"], "no socket"),
        (vec!["fs", "--socket-path", "s"], "--shared-dir"),
        (
            vec!["fs", "--socket-path", "s", "--shared-dir", "/nonexistent/d"],
            "/nonexistent/d: No such",
        ),
        (vec!["fs", "--socket-path", "s", "-o", "cache=some"], "cache=some"),
        (vec!["fs", "--shared-dir", "/"], "no socket"),
        (vec!["net", "--socket-path", "s"], "no link"),
        (vec!["net", "--tap", "a name too long"], "interface a name too long"),
        (vec!["net", "--tap-fd", "999"], "descriptor 999"),
        (vec!["net", "--stream", "s", "--queue-pairs", "2"], "one pair"),
        (vec!["switch"], "--port"),
        (vec!["switch", "--port", "/nonexistent/s"], "No such file"),
        (vec!["net", "--stream", "/nonexistent/s"], "/nonexistent/s: No such file"),
        (vec!["net", "--stream", "s", "--mac", "1:2:3"], "52:54:00:12:34:56"),
        (vec!["net", "--stream", "s", "--mac", "01:00:5e:00:00:01"], "not a group's"),
        (vec!["net", "--stream", "s", "--mtu", "67"], "68"),
        (vec!["vsock", "--socket-path", "s"], "--uds-path"),
        (vec!["vsock", "--uds-path", "/nonexistent/s"], "/nonexistent/s: No such file"),
        (vec!["vsock", "--uds-path", "s", "--guest-cid", "2"], "3 to 4294967294"),
        (vec!["vsock", "--uds-path", "s", "--host-ports", "9-8"], "22,1024-2047"),
        (vec!["vsock", "--uds-path", &long], "bytes"),
    ] {
        let output = outboard(&args);
        let errors = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {errors}");
        assert_eq!(errors.lines().count(), 1, "{args:?}: {errors}");
        assert!(errors.contains(word), "{args:?}: {errors}");
        assert!(output.stdout.is_empty(), "{args:?}");
    }
}

#[test]
fn help_teaches_with_examples_and_exits_with_0() {
    for command in
        ["", "block", "console", "fs", "net", "rng", "switch", "vsock", "demo", "probe", "bench"]
    {
        let args: Vec<_> = [command, "--help"].into_iter().filter(|arg| !arg.is_empty()).collect();
        let output = outboard(&args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(text(&output.stdout).contains("Examples:\n  outboard "), "{args:?}");
    }
}

#[test]
fn every_device_says_as_json_what_it_is() {
    for device in ["block", "console", "fs", "net", "rng", "vsock"] {
        let output = outboard(&[device, "--print-capabilities"]);
        assert_eq!(output.status.code(), Some(0), "{device}");
        let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(answer["type"], device);
    }
}

#[test]
fn a_probe_answers_in_words_and_in_json() {
    let Some(daemon) = Daemon::start(8 * MIB, 2) else { return };
    drop(daemon.connect());
    let socket = daemon.socket();
    let socket = socket.to_str().expect("text");
    let words = outboard(&["probe", socket]);
    assert_eq!(words.status.code(), Some(0), "{}", text(&words.stderr));
    for word in ["block, by its looks", "VERSION_1", "REPLY_ACK", "capacity", "8388608 bytes"] {
        assert!(text(&words.stdout).contains(word), "{word}: {}", text(&words.stdout));
    }
    let json = outboard(&["probe", socket, "--json"]);
    let answer: Value = serde_json::from_slice(&json.stdout).expect("JSON");
    assert_eq!(answer["device"], "block");
    assert_eq!(answer["queues"], 2);
    assert!(answer["features"]["value"].as_str().is_some_and(|value| value.starts_with("0x")));
}

#[test]
fn a_bench_answers_with_a_table_and_in_json() {
    let Some(daemon) = Daemon::start(8 * MIB, 1) else { return };
    drop(daemon.connect());
    let socket = daemon.socket();
    let socket = socket.to_str().expect("text");
    let quick = ["--seconds", "0.1", "--rounds", "2", "--driver", "sleep"];
    let words = outboard(&[&["bench", socket, "--depth", "1,4"], &quick[..]].concat());
    assert_eq!(words.status.code(), Some(0), "{}", text(&words.stderr));
    assert_eq!(text(&words.stdout).lines().filter(|line| line.contains("randread")).count(), 2);
    assert!(words.stderr.is_empty(), "progress is for terminals");
    let json = outboard(
        &[&["bench", socket, "--json", "--verify", "--rw", "randrw"], &quick[..]].concat(),
    );
    let answer: Value = serde_json::from_slice(&json.stdout).expect("JSON");
    let median = &answer["cases"][0]["a"]["median"];
    assert!(median["iops"].as_f64().is_some_and(|iops| iops > 0.0), "{answer}");
    assert!(median["backend_cpu_us_per_io"].as_f64().is_some_and(|cpu| cpu > 0.0), "{answer}");
    assert_eq!(answer["verified"], true);
    let image = std::fs::read(daemon.image()).expect("the image");
    assert!(image.chunks(4096).all(|block| block.iter().any(|&byte| byte != 0)), "all was written");
    let two = outboard(&["bench", socket, "--queues", "2"]);
    assert_eq!(two.status.code(), Some(2), "it has one queue");
}

#[test]
fn a_bench_compares_two_back_ends() {
    let Some(first) = Daemon::start(8 * MIB, 1) else { return };
    let Some(second) = Daemon::start(8 * MIB, 1) else { return };
    drop((first.connect(), second.connect()));
    let sockets = [first.socket(), second.socket()];
    let [a, b] = sockets.each_ref().map(|path| path.to_str().expect("text"));
    let args = ["bench", a, "--vs", b, "--json", "--seconds", "0.1", "--driver", "sleep"];
    let output = outboard(&args);
    let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let ratio = answer["cases"][0]["iops_ratio"].as_f64().expect("a ratio");
    let rate = |side: &str| answer["cases"][0][side]["median"]["iops"].as_f64().expect("a rate");
    assert!((ratio - rate("a") / rate("b")).abs() < 1e-9);
}
