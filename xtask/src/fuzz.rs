//! `cargo xtask fuzz`: each target of `fuzz/` for so many seconds, on libFuzzer.
//!
//! The targets are built as cargo-fuzz builds them, with the coverage pass of LLVM switched on by
//! code generation options, which the stable compiler takes too: no nightly toolchain is needed.
//! What was found before (`fuzz/corpus`) is the start, what is new stays below the target
//! directory. A target says what it has to reach (`want: …`) and what it reached (`cover: …`):
//! a run that does not reach all of it has failed.

use crate::summary::Tally;
use crate::{paths, process, skips};
use anyhow::{Context as _, Result};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

const COVERAGE: &[&str] = &[
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
    "--cfg=fuzzing",
];

/// Runs each target, or the one named.
///
/// # Errors
/// When a tool is missing where nothing may be skipped, or the targets cannot be listed.
pub fn run(seconds: u64, only: Option<&str>) -> Result<Tally> {
    let mut tally = Tally::default();
    let Some(compiler) = process::find("c++").or_else(|| process::find("g++")) else {
        skips::skip("fuzz", "no C++ compiler for libFuzzer (Debian: g++)")?;
        tally.skipped += 1;
        return Ok(tally);
    };
    let programs = build(&compiler)?;
    for target in targets()?.iter().filter(|name| only.is_none_or(|one| one == *name)) {
        println!("fuzz: {target}, {seconds} s");
        match fuzz(&programs, target, seconds) {
            Ok(()) => tally.passed += 1,
            Err(error) => {
                println!("fuzz: {target}: FAILED: {error:#}");
                tally.failed += 1;
            }
        }
    }
    Ok(tally)
}

/// Builds all targets; the folder of their programs.
fn build(compiler: &Path) -> Result<PathBuf> {
    let told = process::output(Command::new("rustc").arg("-vV"))?;
    let host = told.lines().find_map(|line| line.strip_prefix("host: "));
    let host = host.context("rustc does not say its host")?;
    let target = paths::target()?.join("fuzz");
    let mut command = Command::new("cargo");
    command.args(["build", "--release", "--quiet", "--locked", "--manifest-path"]);
    command.arg(paths::workspace().join("fuzz/Cargo.toml"));
    // With a target named, build scripts are not instrumented.
    command.args(["--target", host, "--target-dir"]).arg(&target);
    command.env("RUSTFLAGS", COVERAGE.join(" ")).env("CXX", compiler);
    process::run(&mut command).context("the fuzz targets do not build")?;
    Ok(target.join(host).join("release"))
}

/// The targets' names: a program each.
fn targets() -> Result<BTreeSet<String>> {
    let folder = paths::workspace().join("fuzz/src/bin");
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        if let Some(name) = entry?.path().file_stem() {
            names.insert(name.to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

/// One target's run.
fn fuzz(programs: &Path, target: &str, seconds: u64) -> Result<()> {
    let found = paths::target()?.join("fuzz/corpus").join(target);
    let artifacts = paths::target()?.join("fuzz/artifacts").join(target);
    std::fs::create_dir_all(&found)?;
    std::fs::create_dir_all(&artifacts)?;
    let mut command = Command::new(programs.join(target));
    command.arg(format!("-max_total_time={seconds}"));
    command.arg(format!("-artifact_prefix={}/", artifacts.display()));
    command.args(["-rss_limit_mb=2048", "-timeout=20", "-max_len=4096", "-print_final_stats=1"]);
    command.arg(&found);
    let kept = paths::workspace().join("fuzz/corpus").join(target);
    if kept.is_dir() {
        command.arg(kept);
    }
    let (mut wanted, mut reached) = (BTreeSet::new(), BTreeSet::new());
    let ended = quietly(&mut command, |line| {
        if let Some(what) = line.strip_prefix("want: ") {
            wanted.insert(what.to_owned());
        }
        if let Some(what) = line.strip_prefix("cover: ") {
            reached.insert(what.to_owned());
        }
    })?;
    anyhow::ensure!(ended, "it found something: see {}", artifacts.display());
    let missing: Vec<_> = wanted.difference(&reached).cloned().collect();
    anyhow::ensure!(missing.is_empty(), "not reached: {}", missing.join(", "));
    println!("fuzz: {target}: {} of {} wanted things reached", wanted.len(), wanted.len());
    Ok(())
}

/// Runs the command, shows its findings and closing figures, hands each line on.
fn quietly(command: &mut Command, mut line: impl FnMut(&str)) -> Result<bool> {
    let output = command.output().with_context(|| process::shown(command))?;
    let text = String::from_utf8_lossy(&output.stderr);
    for said in text.lines() {
        line(said);
        let worth = said.starts_with("stat::number_of_executed_units")
            || said.starts_with("stat::average_exec_per_sec")
            || (!output.status.success() && !said.starts_with('#') && !said.contains(": "));
        if worth || said.contains("panicked") || said.starts_with("==") {
            println!("  {said}");
        }
    }
    Ok(output.status.success())
}
