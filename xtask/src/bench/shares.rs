//! `cargo xtask bench --shares`: our shared directory and virtiofsd under the same driver, in turns, as a section of
//! `docs/shares.md`.
//!
//! The driver is the example `shares` of `outboard-devices`: one FUSE request at a time, on the first processor; the
//! back-end that is asked has the second one, the other one sleeps. The directories are in memory, so that what
//! differs is not the disk's. Invariant: what stands between the two marks of the
//! page is what this command wrote.

use super::{Options, outboard, pinned};
use crate::backend::{Device, socket};
use crate::{judged, paths, process};
use anyhow::{Context as _, Result};
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

const PAGE: &str = "docs/shares.md";
const BEGIN: &str = "<!-- written by `cargo xtask bench --shares` -->\n";
const END: &str = "<!-- to here -->\n";

/// What our side is told beside its directory.
const SCENES: &[(&str, &[&str])] =
    &[("as they come", &[]), ("without polling", &["--poll-us", "0"])];

/// Measures and writes the section.
///
/// # Errors
/// When a program cannot be had, or does not answer.
pub(super) fn run(options: &Options) -> Result<()> {
    let (outboard, virtiofsd) = (outboard()?, judged::virtiofsd()?);
    let mut build = Command::new("cargo");
    build.args(["build", "--release", "-p", "outboard-devices", "--example", "shares"]);
    process::run(build.current_dir(paths::workspace()))?;
    let driver = paths::target()?.join("release/examples/shares");
    let version = process::output(Command::new(&virtiofsd).arg("--version"))?;
    let mut said = format!("\n{} beside ours, on {}.\n", version.trim(), super::machine()?);
    for &(name, told) in SCENES {
        println!("bench: shared directories, {name}");
        let dir = tempfile::Builder::new().prefix("outboard-bench").tempdir_in("/dev/shm")?;
        let ours = share(pinned(&outboard), dir.path(), "outboard", told, Some("fs"))?;
        let theirs = share(pinned(&virtiofsd), dir.path(), "virtiofsd", &[], None)?;
        let mut drive = Command::new("taskset");
        drive
            .args(["-c", "0"])
            .arg(&driver)
            .args(["--rounds", &(5 * options.rounds_or(5)).to_string()]);
        let table = process::output(drive.args([&ours.socket, &theirs.socket]))?;
        println!("{table}");
        let _ = write!(said, "\n| {name}, per second | outboard | virtiofsd | ratio |\n{table}");
    }
    let page = paths::workspace().join(PAGE);
    let there = std::fs::read_to_string(&page)?;
    std::fs::write(page, with_section(&there, &said).context("the marks are gone")?)?;
    println!("bench: {PAGE}");
    Ok(())
}

/// A back-end on a directory of its own.
fn share(
    mut command: Command,
    dir: &Path,
    name: &str,
    told: &[&str],
    device: Option<&str>,
) -> Result<Device> {
    let shared = dir.join(format!("{name}-shared"));
    std::fs::create_dir(&shared)?;
    command.args(device).args(told).arg("--socket-path").arg(socket(dir, name));
    Device::start(command.arg("--shared-dir").arg(shared), dir, name)
}

/// The page with another section between its marks.
fn with_section(page: &str, section: &str) -> Option<String> {
    let (before, rest) = page.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}{section}\n{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_between_the_marks_is_replaced_and_nothing_else() {
        let page = format!("before\n{BEGIN}old\n{END}after\n");
        let new = with_section(&page, "new").unwrap();
        assert_eq!(new, format!("before\n{BEGIN}new\n{END}after\n"));
        assert_eq!(with_section("no marks", "new"), None);
        let page = std::fs::read_to_string(paths::workspace().join(PAGE)).unwrap();
        assert!(with_section(&page, "").is_some(), "{PAGE} has no marks");
    }
}
