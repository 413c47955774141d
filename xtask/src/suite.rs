//! `cargo xtask test`: every test there is, in the order in which a fault is cheapest to find.
//!
//! Each step passes on what its runner prints and counts its closing lines; the last line sums
//! them up. Invariant: every step runs, whatever the ones before it found; a step that cannot run
//! is a counted skip, and with `CI=true` a failure.

use crate::packages::Root;
use crate::summary::Tally;
use crate::{counts, lint, paths, process, skips};
use anyhow::{Context as _, Result, ensure};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// One part of the suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Step {
    /// The guests' packages (`cargo xtask packages`).
    Packages,
    /// Programs and examples, as the guests use them.
    Build,
    /// All tests of the workspace with cargo-nextest; the guest tests are among them.
    Nextest,
    /// The examples in the documentation.
    Doc,
    /// Concurrency models, under `--cfg outboard_loom`.
    Loom,
    /// Instructions per request (`cargo xtask counts`).
    Counts,
}

const ALL: [Step; 6] =
    [Step::Packages, Step::Build, Step::Nextest, Step::Doc, Step::Loom, Step::Counts];

/// Runs the steps (all when none is named) and prints what they sum up to.
///
/// # Errors
/// When a test failed or, where nothing may be skipped, did not run.
pub fn run(only: &[Step]) -> Result<()> {
    let skipped = skip_list()?;
    let mut tally = Tally::default();
    let mut times = Vec::new();
    for step in ALL.into_iter().filter(|step| only.is_empty() || only.contains(step)) {
        let begun = Instant::now();
        println!("test: {step:?}");
        tally += one(step, &skipped).unwrap_or_else(|error| {
            println!("test: {step:?}: FAILED: {error:#}");
            Tally { failed: 1, ..Tally::default() }
        });
        times.push((step, begun.elapsed()));
    }
    close(tally, &skipped, &times)
}

fn close(mut tally: Tally, skipped: &Path, times: &[(Step, Duration)]) -> Result<()> {
    let lines = std::fs::read_to_string(skipped).unwrap_or_default();
    print!("{lines}");
    if !skips::forbidden() {
        // To its runner a test that said SKIPPED has passed; elsewhere it has failed already.
        let count = u64::try_from(lines.lines().count())?;
        tally.passed = tally.passed.saturating_sub(count);
        tally.skipped += count;
    }
    let shown: Vec<_> = times.iter().map(|(step, took)| format!("{step:?} {took:.0?}")).collect();
    println!("test: {}", shown.join(", "));
    println!("{tally}");
    ensure!(tally.failed == 0, "{} tests failed", tally.failed);
    ensure!(tally.passed > 0, "no test ran");
    ensure!(tally.skipped == 0 || !skips::forbidden(), "{} tests were skipped", tally.skipped);
    Ok(())
}

/// A new, empty list for the tests to note skips in.
fn skip_list() -> Result<PathBuf> {
    let dir = paths::xtask()?;
    std::fs::create_dir_all(&dir)?;
    let list = dir.join("skips");
    std::fs::write(&list, "")?;
    Ok(list)
}

fn one(step: Step, skipped: &Path) -> Result<Tally> {
    match step {
        Step::Packages => Ok(packages()),
        Step::Build => {
            let mut build = lint::cargo_command(&["build", "--workspace", "--bins", "--examples"]);
            process::run(build.arg("--locked")).map(|()| Tally::default())
        }
        Step::Nextest => nextest(skipped),
        Step::Doc => counted(&["test", "--workspace", "--doc", "--locked"], skipped),
        Step::Loom => loom(skipped),
        Step::Counts => counts::run(false),
    }
}

/// Without packages the suite goes on: each test that needs them is skipped and says so.
fn packages() -> Tally {
    for prepare in [Root::prepare, Root::prepare_tools, Root::prepare_peers] {
        if let Err(error) = prepare(false) {
            println!("test: no packages: {error:#}");
        }
    }
    Tally::default()
}

fn nextest(skipped: &Path) -> Result<Tally> {
    let profile = if skips::forbidden() { "ci" } else { "default" };
    let arguments = ["nextest", "run", "--workspace", "--no-fail-fast", "--locked", "--profile"];
    counted(&[arguments.as_slice(), &[profile]].concat(), skipped)
}

/// Runs cargo and counts its tests' closing lines.
fn counted(arguments: &[&str], skipped: &Path) -> Result<Tally> {
    let mut command = lint::cargo_command(arguments);
    environment(&mut command, skipped)?;
    let mut tally = Tally::default();
    let well = process::tee(&mut command, |line| tally.read(line))?;
    Ok(tally.closed(well))
}

/// What the tests find in their environment: where to note skips, our programs, and the packages'
/// programs at the end of the search path.
fn environment(command: &mut std::process::Command, skipped: &Path) -> Result<()> {
    // Where an error was made matters less than what it says, and it is long.
    command.env(skips::LIST, skipped).env("RUST_LIB_BACKTRACE", "0");
    // A system call that the programs' filter does not know ends them here (C34).
    command.env("OUTBOARD_SECCOMP", "kill");
    if skips::forbidden() {
        command.env(skips::FORBIDDEN, "1");
    }
    let built = paths::target()?.join("debug");
    let programs = [
        ("OUTBOARD_BIN", "outboard"),
        ("OUTBOARD_RNG", "examples/rng"),
        ("OUTBOARD_GROWING", "examples/growing"),
        ("OUTBOARD_FILES", "examples/files"),
    ];
    for (variable, file) in programs.map(|(variable, name)| (variable, built.join(name))) {
        if file.exists() {
            command.env(variable, file);
        }
    }
    if let Ok(root) = Root::open() {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let dirs = std::env::split_paths(&path).chain([root.wrappers()]);
        command.env("PATH", std::env::join_paths(dirs)?);
    }
    Ok(())
}

/// Models run long: what they consist of is optimised, what else their packages need is not.
const LOOM_PROFILE: [&str; 3] = [
    "profile.dev.opt-level=2",
    "profile.dev.package.'*'.opt-level=0",
    "profile.dev.package.loom.opt-level=2",
];

/// The models: of every package that uses loom, the library's tests with `loom` in their path and
/// the integration tests whose name begins so.
fn loom(skipped: &Path) -> Result<Tally> {
    let data = lint::crates::metadata(&["--no-deps"])?;
    let target = paths::target()?.join("loom");
    let mut tally = Tally::default();
    for package in lint::crates::packages(&data)? {
        let entries = |key: &str| package[key].as_array().into_iter().flatten();
        if !entries("dependencies").any(|need| need["name"] == "loom") {
            continue;
        }
        let name = package["name"].as_str().context("a package without a name")?;
        let mut runs = vec![vec!["--lib", "loom"]];
        for test in entries("targets").filter(|target| target["kind"][0] == "test") {
            let test = test["name"].as_str().unwrap_or_default();
            if test.starts_with("loom") {
                runs.push(vec!["--test", test]);
            }
        }
        for run in runs {
            let mut command = lint::cargo_command(&["test", "--locked", "-p", name]);
            command.env("CARGO_TARGET_DIR", &target).env("RUSTFLAGS", "--cfg outboard_loom");
            for profile in LOOM_PROFILE {
                command.arg("--config").arg(profile);
            }
            environment(command.args(run), skipped)?;
            let mut part = Tally::default();
            let well = process::tee(&mut command, |line| part.read(line))?;
            tally += part.closed(well);
        }
    }
    ensure!(tally != Tally::default(), "there is no loom test");
    Ok(tally)
}
