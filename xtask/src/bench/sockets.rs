//! `cargo xtask bench --sockets`: our sockets and vhost-device-vsock under the same driver, in turns, as the first part of
//! `docs/vsock.md`.
//!
//! The driver is the example `vsock_bench` of `outboard-devices`, which does each kind of work with one back-end, then with the
//! other, A B A B. The peer is built from the crate registry once and kept in the target directory. Invariant: what people
//! have written below the figures stays.

use super::Options;
use crate::backend::{Device, socket};
use crate::{paths, process};
use anyhow::{Context as _, Result, ensure};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

const PAGE: &str = "docs/vsock.md";
const PEER: &str = "vhost-device-vsock";
const VERSION: &str = "0.3.0";
/// Where the part begins that is not written here.
const REST: &str = "\n## ";

const HEAD: &str = "# Sockets beside vhost-device-vsock\n\n\
    The figures are written by `cargo xtask bench --sockets`. `outboard vsock` and vhost-device-vsock 0.3.0 in one run, in turns,\n\
    driven by our front-end as a Linux guest drives them (packets of up to 64 KiB, receive buffers of 4 KiB): medians of 512 MiB\n\
    each way on one stream and 20,000 round trips of one byte. Nothing is pinned. Only ratios within a row mean something.\n\n";

/// Measures and writes the page.
///
/// # Errors
/// When a program cannot be had, or brings no figures.
pub(super) fn run(options: &Options) -> Result<()> {
    let (outboard, driver, peer) = (super::outboard()?, driver()?, peer()?);
    let dir = tempfile::tempdir()?;
    let mut command = Command::new(outboard);
    let ours = serve(command.arg("vsock").arg("--socket-path"), dir.path(), "ours", 3)?;
    let theirs = serve(Command::new(peer).arg("--socket"), dir.path(), "theirs", 4)?;
    let mut page = HEAD.to_owned();
    let rounds = options.rounds_or(5);
    let _ = writeln!(page, "Measured on {}, {rounds} rounds.\n", super::machine()?);
    page += "| | outboard | vhost-device-vsock | ratio |\n|---|---|---|---|\n";
    let mut command = Command::new(driver);
    command.arg(rounds.to_string()).arg(side(dir.path(), "ours")).arg(side(dir.path(), "theirs"));
    let said = process::output(&mut command);
    let said =
        said.map_err(|error| anyhow::anyhow!("{error:#}\n{}\n{}", ours.said(), theirs.said()))?;
    print!("{said}");
    page += &rows(&said)?;
    let file = paths::workspace().join(PAGE);
    std::fs::write(&file, page + rest(&std::fs::read_to_string(&file)?))?;
    println!("bench: {PAGE}");
    Ok(())
}

/// A table's rows of what the driver says.
fn rows(said: &str) -> Result<String> {
    let mut rows = String::new();
    for line in said.lines() {
        let (work, figures) = line.split_once(": ").context("no figures")?;
        let figures: Vec<f64> = figures
            .split(' ')
            .map(str::parse)
            .collect::<Result<_, _>>()
            .context(line.to_owned())?;
        let [ours, theirs] = figures[..] else { anyhow::bail!("{line}: not of two") };
        let _ = writeln!(rows, "| {work} | {ours} | {theirs} | **{:.2}** |", ours / theirs);
    }
    ensure!(!rows.is_empty(), "the driver says nothing");
    Ok(rows)
}

/// What stands below the figures.
fn rest(page: &str) -> &str {
    page.find(REST).and_then(|at| page.get(at..)).unwrap_or_default()
}

fn path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.vm"))
}

/// What the driver is told of a back-end.
fn side(dir: &Path, name: &str) -> String {
    format!("{}={}", socket(dir, name).display(), path(dir, name).display())
}

/// Starts a back-end whose last word so far wants its socket.
fn serve(command: &mut Command, dir: &Path, name: &str, cid: u32) -> Result<Device> {
    command.arg(socket(dir, name)).arg("--uds-path").arg(path(dir, name));
    Device::start(command.args(["--guest-cid", &cid.to_string()]), dir, name)
}

/// The driver, built as our program is.
fn driver() -> Result<PathBuf> {
    let mut build = Command::new("cargo");
    build.args(["build", "--release", "-p", "outboard-devices", "--example", "vsock_bench"]);
    process::run(build.current_dir(paths::workspace()))?;
    Ok(paths::target()?.join("release/examples/vsock_bench"))
}

/// The peer, from the crate registry when it is wanted for the first time.
fn peer() -> Result<PathBuf> {
    let root = paths::target()?.join("peers");
    let program = root.join("bin").join(PEER);
    if !program.exists() {
        let mut install = Command::new("cargo");
        install.args(["install", PEER, "--locked", "--version", VERSION, "--root"]).arg(&root);
        process::run(install.env("CARGO_TARGET_DIR", &root))?;
    }
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_two_become_rows_with_their_ratio() {
        let said = "to the host, MiB/s: 300 100\nround trips/s: 5 10\n";
        let wanted = "| to the host, MiB/s | 300 | 100 | **3.00** |\n| round trips/s | 5 | 10 | **0.50** |\n";
        assert_eq!(rows(said).unwrap(), wanted);
        assert!(rows("").is_err() && rows("trips: 5").is_err() && rows("trips: 5 6 7").is_err());
    }

    #[test]
    fn what_people_wrote_below_the_figures_stays() {
        assert_eq!(
            rest("# Figures\nold\n\n## Seen\nmuch\n## More\n"),
            "\n## Seen\nmuch\n## More\n"
        );
        assert_eq!(rest("# Figures\n"), "");
    }
}
