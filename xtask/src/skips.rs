//! Tests that cannot run here say so, and are counted.
//!
//! A test that is skipped prints `SKIPPED name: why` and ends well. `cargo xtask test` gathers
//! those lines through a file and reports them; with `CI=true` it sets the variable below, and a
//! skip fails.

use std::io::Write as _;

/// A file to which the lines of skipped tests are added.
pub const LIST: &str = "OUTBOARD_SKIPS";

/// Set when nothing may be skipped.
pub const FORBIDDEN: &str = "OUTBOARD_NO_SKIPS";

/// True when a skip is a failure: under CI, or when asked for.
#[must_use]
pub fn forbidden() -> bool {
    std::env::var_os(FORBIDDEN).is_some() || std::env::var("CI").is_ok_and(|ci| ci == "true")
}

/// Notes that the test `name` does not run, and why. True: the test may return.
///
/// # Errors
/// When nothing may be skipped, or the note cannot be left.
pub fn skip(name: &str, why: &str) -> anyhow::Result<()> {
    let line = format!("SKIPPED {name}: {}", why.replace('\n', "; "));
    eprintln!("{line}");
    if let Some(list) = std::env::var_os(LIST) {
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(list)?;
        writeln!(file, "{line}")?;
    }
    anyhow::ensure!(!forbidden(), "{line} (nothing may be skipped here)");
    Ok(())
}
