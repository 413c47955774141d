//! Tests that cannot run here say so; with `CI=true` that is a failure.

use std::io::Write;

/// Says that this test does not run, also in the list that `cargo xtask test` keeps; fails when nothing
/// may be skipped.
pub(crate) fn skip(why: &str) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let line = format!("SKIPPED {test}: {why}");
    let set = |name: &str| std::env::var_os(name).is_some();
    let ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
    assert!(!ci && !set("OUTBOARD_NO_SKIPS"), "{line} (nothing may be skipped here)");
    eprintln!("{line}");
    if let Some(list) = std::env::var_os("OUTBOARD_SKIPS") {
        let mut file = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(list)
            .expect("the list of skipped tests");
        writeln!(file, "{line}").expect("room in the list");
    }
}
