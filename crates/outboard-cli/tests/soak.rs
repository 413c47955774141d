//! `outboard soak` as a user meets it: small counts of every soak that needs one disk, on our own.
//! (The storm needs two disks in one process: `outboard-devices/tests/soak.rs`.)
#![expect(clippy::expect_used, reason = "a failed step of a test is its end")]

use std::process::{Command, Output};

use serde_json::Value;

const OUTBOARD: &str = env!("CARGO_BIN_EXE_outboard");

fn outboard(args: &[&str]) -> Output {
    Command::new(OUTBOARD).args(args).env("OUTBOARD_LOG", "error").output().expect("our program")
}

/// Soaks our own block device a little; what each part found.
fn soaked(name: &str, count: u64) -> Vec<Value> {
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("disk.img");
    std::fs::File::create(&image).expect("an image").set_len(1 << 20).expect("room");
    let (image, often) = (image.to_str().expect("text"), count.to_string());
    let device = [OUTBOARD, "block", "--socket-path", "{socket}", image];
    let output =
        outboard(&[&["soak", name, "--json", "--count", &often, "--"], &device[..]].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(output.status.code(), Some(0), "{errors}\n{report:#}");
    let parts = report["parts"].as_array().expect("a list").clone();
    for part in &parts {
        assert_eq!(part["wrong"], Value::Null, "{part}");
        assert!(part["count"].as_u64().expect("a count") >= count, "{part}");
    }
    parts
}

/// A figure of a part.
fn figure(part: &Value, name: &str) -> f64 {
    let figures = part["figures"].as_array().expect("a list");
    let one = figures.iter().find(|figure| figure["name"] == name);
    one.and_then(|figure| figure["value"].as_f64()).expect("a figure")
}

/// A38, A44: nothing is lost, nothing stays.
#[test]
fn memory_comes_and_goes_under_verified_load() {
    let parts = soaked("memory", 20);
    assert_eq!(parts.len(), 4);
    assert!(parts.iter().all(|part| figure(part, "descriptors +") <= 0.0), "{parts:#?}");
    let reused: f64 =
        parts.iter().map(|p| figure(p, "times at the address of the one before")).sum();
    assert!(reused > 0.0, "no region came back at the address of another: {parts:#?}");
}

/// A front-end masks and unmasks, and no interrupt is lost.
#[test]
fn call_descriptors_are_swapped_under_a_driver_that_sleeps_and_one_that_polls() {
    let parts = soaked("calls", 100);
    assert_eq!(parts.len(), 4);
    let masked =
        |part: &&Value| part["what"].as_str().is_some_and(|what| what.starts_with("call swaps"));
    for part in parts.iter().filter(masked) {
        assert!(figure(part, "calls that came while masked") > 0.0, "{part}");
    }
}

#[test]
fn rings_are_disabled_stopped_and_kicked_otherwise_under_load() {
    let parts = soaked("rings", 50);
    assert_eq!(parts.len(), 6);
}

/// What the device writes is found in a log, whichever of two it is in.
#[test]
fn the_dirty_log_is_switched_and_swapped_under_load_and_no_page_is_missed() {
    let parts = soaked("log", 30);
    assert_eq!(parts.len(), 2);
    assert!(parts.iter().all(|part| figure(part, "pages noted") > 0.0), "{parts:#?}");
}

/// C7: verified requests, 32 at a time; the program is killed in the midst of them, and another goes on.
#[test]
fn c7_a_device_killed_fifty_times_loses_no_request_and_answers_none_twice() {
    let parts = soaked("kill", 50);
    assert_eq!(figure(&parts[0], "requests finished twice"), 0.0);
    assert!(figure(&parts[0], "verified requests") > 1000.0, "{parts:#?}");
}

#[test]
fn a_back_end_without_an_in_flight_region_is_not_killed_and_that_is_said() {
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("disk.img");
    std::fs::File::create(&image).expect("an image").set_len(1 << 20).expect("room");
    let image = image.to_str().expect("text");
    let device = [OUTBOARD, "block", "--without", "INFLIGHT_SHMFD", "--socket-path", "{socket}"];
    let output = outboard(&[&["soak", "kill", "--"], &device[..], &[image]].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{errors}");
    assert!(errors.contains("it offers no in-flight region"), "{errors}");
}

#[test]
fn a_wrong_command_line_or_nothing_to_soak_is_exit_code_2() {
    for (args, word) in [
        (vec!["soak"], "SOAK"),
        (vec!["soak", "frob", "--", "true", "{socket}"], "storm"),
        (vec!["soak", "calls"], "COMMAND"),
        (vec!["soak", "calls", "--", "true"], "{socket}"),
        (vec!["soak", "storm", "--", "true", "{socket}"], "{load}"),
        (vec!["soak", "calls", "--count", "0", "--", "true", "{socket}"], "--count"),
        (vec!["soak", "calls", "--", "false", "{socket}"], "ended before it listened"),
        (vec!["soak", "calls", "--", "/nonexistent", "{socket}"], "/nonexistent"),
    ] {
        let output = outboard(&args);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {errors}");
        assert_eq!(errors.lines().count(), 1, "{args:?}: {errors}");
        assert!(errors.contains(word), "{args:?}: {errors}");
    }
}
