//! `outboard check` as a user meets it: exit codes, lists, JSON, JUnit, expected failures; against our
//! own block device and qemu-storage-daemon.
#![expect(clippy::expect_used, clippy::panic, reason = "a failed step of a test is its end")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

#[path = "../../outboard-frontend/tests/common/skip.rs"]
mod skip;

const OUTBOARD: &str = env!("CARGO_BIN_EXE_outboard");

fn outboard(args: &[&str]) -> Output {
    Command::new(OUTBOARD).args(args).output().expect("our own program")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("text")
}

/// Judges our own block device.
fn ours(folder: &Path, options: &[&str]) -> Output {
    let image = folder.join("disk.img");
    std::fs::File::create(&image).expect("an image").set_len(4 << 20).expect("room");
    let image = image.to_str().expect("text");
    let device = [OUTBOARD, "block", "--num-queues", "2", "--socket-path", "{socket}", image];
    outboard(&[&["check", "--quick"], options, &["--"], &device].concat())
}

/// That every check holds, or is not offered for a reason, which is printed.
fn holds_or_is_not_offered(output: &Output) {
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let all = report["judgements"].as_array().expect("a list");
    assert!(all.len() > 300, "{} checks", all.len());
    let line = |one: &Value| format!("{}: {} {}", one["id"], one["verdict"], one["why"]);
    let is = |one: &Value, verdict: &str| one["verdict"] == verdict;
    let bad: Vec<_> =
        all.iter().filter(|one| !is(one, "holds") && !is(one, "not-offered")).map(line).collect();
    assert!(bad.is_empty(), "{bad:#?}");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let mut reasons = BTreeMap::<&str, Vec<&str>>::new();
    for one in all.iter().filter(|one| is(one, "not-offered")) {
        let why = one["why"].as_str().filter(|why| !why.is_empty());
        let why = why.unwrap_or_else(|| panic!("{} is not offered for no reason", one["id"]));
        reasons.entry(why).or_default().push(one["id"].as_str().expect("a name"));
    }
    let held = all.iter().filter(|one| is(one, "holds")).count();
    println!("{held} of {} checks hold", all.len());
    reasons
        .iter()
        .for_each(|(why, ids)| println!("{} because {why}: {}", ids.len(), ids.join(" ")));
}

#[test]
fn our_block_device_holds_every_check_that_it_offers() {
    let folder = tempfile::tempdir().expect("a folder");
    holds_or_is_not_offered(&ours(folder.path(), &["--json", "--seconds", "10"]));
}

/// The checks know no request of such a device: what is left is of the protocol and the rings.
fn device_holds(device: &[&str]) {
    let args = ["check", "--quick", "--json", "--seconds", "10", "--", OUTBOARD];
    holds_or_is_not_offered(&outboard(&[&args, device, &["--socket-path", "{socket}"]].concat()));
}

#[test]
fn our_console_holds_every_check_that_it_offers() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = format!("file:{},name=log", folder.path().join("log").display());
    device_holds(&["console", "--port", "pty", "--port", &file]);
}

#[test]
fn our_shared_directory_holds_every_check_that_it_offers() {
    let folder = tempfile::tempdir().expect("a folder");
    device_holds(&["fs", "--shared-dir", folder.path().to_str().expect("text")]);
}

#[test]
fn our_network_card_holds_every_check_that_it_offers() {
    let folder = tempfile::tempdir().expect("a folder");
    let link = folder.path().join("link");
    device_holds(&["net", "--stream-listen", link.to_str().expect("text")]);
}

#[test]
fn our_source_of_entropy_holds_every_check_that_it_offers() {
    device_holds(&["rng"]);
}

#[test]
fn our_sockets_hold_every_check_that_they_offer() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("vm");
    device_holds(&["vsock", "--uds-path", path.to_str().expect("text")]);
}

/// The example's program, built if it is not there yet: tests of one package build the examples of that
/// package only.
fn everything() -> PathBuf {
    let deps = std::env::current_exe().expect("our own path");
    let profile = deps.parent().and_then(Path::parent).expect("target/PROFILE/deps");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.args(["build", "--quiet", "--package", "outboard", "--example", "everything"]);
    build.arg("--target-dir").arg(profile.parent().expect("target/PROFILE"));
    if profile.ends_with("release") {
        build.arg("--release");
    }
    assert!(build.status().expect("cargo").success(), "the example is not built");
    profile.join("examples/everything")
}

#[test]
fn the_example_everything_holds_every_check_that_it_offers() {
    let program = everything();
    let program = program.to_str().expect("text");
    let args = ["check", "--quick", "--json", "--seconds", "10", "--", program, "{socket}"];
    holds_or_is_not_offered(&outboard(&args));
}

#[test]
fn a_wrong_command_line_or_nothing_to_judge_is_exit_code_2() {
    for (args, word) in [
        (vec!["check"], "--socket"),
        (vec!["check", "--", "true"], "{socket}"),
        (vec!["check", "--", "false", "{socket}"], "ended before it listened"),
        (vec!["check", "--", "/nonexistent", "{socket}"], "/nonexistent"),
        (vec!["check", "--socket", "/nonexistent"], "nobody listens"),
        (vec!["check", "--only", "frob", "--socket", "/nonexistent"], "frob"),
        (vec!["check", "--expect", "/nonexistent", "--list"], "/nonexistent"),
        (vec!["check", "--seconds", "0", "--list"], "seconds"),
    ] {
        let output = outboard(&args);
        let errors = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {errors}");
        assert_eq!(errors.lines().count(), 1, "{args:?}: {errors}");
        assert!(errors.contains(word), "{args:?}: {errors}");
    }
}

#[test]
fn the_list_names_every_check_once_with_its_section() {
    let output = outboard(&["check", "--list"]);
    let lines = text(&output.stdout);
    assert!(lines.contains("features-answered") && lines.contains("[GET_FEATURES]"));
    let json = outboard(&["check", "--list", "--json", "--only", "conformance"]);
    let list: Value = serde_json::from_slice(&json.stdout).expect("JSON");
    let list = list.as_array().expect("a list");
    assert!(list.len() > 100 && list.iter().all(|check| check["group"] == "conformance"));
}

#[test]
fn every_demand_of_the_specification_is_shown_with_its_checks() {
    let output = outboard(&["check", "--musts"]);
    assert_eq!(output.status.code(), Some(0));
    let lines = text(&output.stdout);
    assert!(lines.contains("[Header] every reply has the flags of a reply"), "{lines}");
    let json = outboard(&["check", "--musts", "--json"]);
    let list: Value = serde_json::from_slice(&json.stdout).expect("JSON");
    let list = list.as_array().expect("a list");
    let count = format!("{} demands of the specification", list.len());
    assert!(lines.lines().last().is_some_and(|line| line.starts_with(&count)), "{lines}");
    println!("{}", lines.lines().last().expect("a count"));
}

#[test]
fn the_known_defects_of_qemu_storage_daemon_are_found() {
    let folder = tempfile::tempdir().expect("a folder");
    if Command::new("qemu-storage-daemon").arg("--version").output().is_err() {
        return skip::skip("qemu-storage-daemon is not installed (Debian: qemu-utils)");
    }
    let image = folder.path().join("disk.img");
    std::fs::File::create(&image).expect("an image").set_len(4 << 20).expect("room");
    let node = format!("driver=file,filename={},node-name=d,locking=off", image.display());
    let export = "type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={socket},writable=on,num-queues=2";
    let junit = folder.path().join("junit.xml");
    let daemon = ["qemu-storage-daemon", "--blockdev", &node, "--export", export];
    let only = ["index-set-vring-num", "regions-4-gi", "fd-stray-often", "memory-short", "served"];
    let mut args = vec!["check", "--quick", "--json", "--junit", junit.to_str().expect("text")];
    only.iter().for_each(|id| args.extend(["--only", id]));
    args.push("--");
    let output = outboard(&[args.as_slice(), &daemon].concat());
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let verdict = |id: &str| {
        let all = report["judgements"].as_array().expect("a list");
        all.iter().find(|one| one["id"] == id).map(|one| one["verdict"].clone())
    };
    // It writes outside of an array: it crashes, or goes on with whatever it hit.
    assert_ne!(verdict("index-set-vring-num"), Some("holds".into()));
    assert_eq!(verdict("fd-stray-often"), Some("leaks".into()));
    assert_eq!(verdict("memory-short"), Some("crashes".into()));
    assert_eq!(verdict("served"), Some("holds".into()));
    assert_ne!(verdict("regions-4-gi"), Some("holds".into()));
    let xml = std::fs::read_to_string(&junit).expect("a report");
    assert!(xml.contains("<testsuite name=\"hostile\"") && xml.contains("killed by"), "{xml}");
    let known = folder.path().join("known.txt");
    std::fs::write(&known, "index-set-vring-num any its index is not checked\n").expect("a list");
    let args =
        ["check", "--only", "index-set-vring-num", "--expect", known.to_str().expect("text")];
    let output = outboard(&[&args[..], &["--"], &daemon].concat());
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("its index is not checked"));
}
