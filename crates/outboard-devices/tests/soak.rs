//! A small storm on one of two disks that one process serves (`examples/disks.rs`), load on the other.
#![expect(clippy::expect_used, reason = "a failed step of a test is its end")]

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use outboard_check::soak::{Options, Soak, soak};

/// The example, which cargo builds with the tests.
fn disks() -> PathBuf {
    let test = std::env::current_exe().expect("our own path");
    let built = test.parent().and_then(|deps| deps.parent()).expect("target/PROFILE/deps/TEST");
    built.join("examples/disks")
}

/// A94 and the storm's own cases: nothing stays, and the other disk's load does not notice.
#[test]
fn a_storm_on_one_disk_leaves_nothing_and_the_load_on_the_other_one_is_right() {
    let folder = tempfile::tempdir().expect("a folder");
    let image = |name: &str| {
        let path = folder.path().join(name);
        std::fs::File::create(&path).expect("an image").set_len(1 << 20).expect("room");
        path.into_os_string()
    };
    let socket = |text: &str| OsString::from(text);
    let command = [disks().into(), socket("{socket}"), image("a"), socket("{load}"), image("b")];
    let options = Options { count: 10_000, seed: 1, limit: Duration::from_secs(10), packed: false };
    let report = soak(Soak::Storm, &command, &options, &|_, _, _| {}).expect("a report");
    let [part] = report.parts.as_slice() else { panic!("one part: {report:?}") };
    assert!(part.holds(), "{part}");
    assert!(part.count >= 10_000, "{part}");
    let figure = |name: &str| {
        part.figures.iter().find(|figure| figure.name == name).expect("a figure").value
    };
    assert!(figure("reconnects") >= 100.0 && figure("verified requests") > 0.0, "{part}");
}
