//! `cargo xtask fuzz`: each target of `fuzz/` for so many seconds, on libFuzzer.
//!
//! The targets are built as cargo-fuzz builds them, with the coverage pass of LLVM switched on by
//! code generation options, which the stable compiler takes too: no nightly toolchain is needed.
//! What was found before (`fuzz/corpus`) is the start, what is new stays below the target
//! directory. A target says what it has to reach (`want: …`) and what it reached (`cover: …`):
//! a run that does not reach all of it has failed. How many inputs and, where a target counts
//! them, messages a second were played is said for each.
//!
//! `cargo xtask plant` ([`plant`]) shows that a target finds what it is there for.

pub mod plant;

use crate::summary::Tally;
use crate::{paths, process, skips};
use anyhow::{Context as _, Result};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

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
    let programs = build(&compiler, &paths::workspace(), &paths::target()?.join("fuzz"))?;
    for target in targets()?.iter().filter(|name| only.is_none_or(|one| one == *name)) {
        println!("fuzz: {target}, {seconds} s");
        let run = Run { programs: &programs, kept: paths::target()?.join("fuzz"), target, seconds };
        match run.whole() {
            Ok(()) => tally.passed += 1,
            Err(error) => {
                println!("fuzz: {target}: FAILED: {error:#}");
                tally.failed += 1;
            }
        }
    }
    Ok(tally)
}

/// Builds all targets of the workspace at `root`; the folder of their programs.
fn build(compiler: &Path, root: &Path, target: &Path) -> Result<PathBuf> {
    let told = process::output(Command::new("rustc").arg("-vV"))?;
    let host = told.lines().find_map(|line| line.strip_prefix("host: "));
    let host = host.context("rustc does not say its host")?;
    let mut command = Command::new("cargo");
    command.args(["build", "--release", "--quiet", "--locked", "--manifest-path"]);
    command.arg(root.join("fuzz/Cargo.toml"));
    // With a target named, build scripts are not instrumented.
    command.args(["--target", host, "--target-dir"]).arg(target);
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
struct Run<'a> {
    programs: &'a Path,
    /// Where new inputs and findings go.
    kept: PathBuf,
    target: &'a str,
    seconds: u64,
}

/// What came of it.
struct Outcome {
    /// It ended without a finding.
    clean: bool,
    wanted: BTreeSet<String>,
    reached: BTreeSet<String>,
    /// The first line of a panic's message.
    finding: Option<String>,
    /// Inputs a second, and messages a second where they are counted.
    speed: (u64, Option<u64>),
    artifacts: PathBuf,
}

impl Run<'_> {
    /// A run that has to be clean and to reach all that is wanted.
    fn whole(&self) -> Result<()> {
        let done = self.go()?;
        anyhow::ensure!(done.clean, "it found something: see {}", done.artifacts.display());
        let missing: Vec<_> = done.wanted.difference(&done.reached).cloned().collect();
        anyhow::ensure!(missing.is_empty(), "not reached: {}", missing.join(", "));
        let messages = done.speed.1.map_or_else(String::new, |n| format!(", {n} messages/s"));
        println!(
            "fuzz: {}: {} wanted things reached, {} inputs/s{messages}",
            self.target,
            done.wanted.len(),
            done.speed.0
        );
        Ok(())
    }

    fn go(&self) -> Result<Outcome> {
        let found = self.kept.join("corpus").join(self.target);
        let artifacts = self.kept.join("artifacts").join(self.target);
        std::fs::create_dir_all(&found)?;
        std::fs::create_dir_all(&artifacts)?;
        let mut command = Command::new(self.programs.join(self.target));
        command.arg(format!("-max_total_time={}", self.seconds));
        command.arg(format!("-artifact_prefix={}/", artifacts.display()));
        command.args([
            "-rss_limit_mb=2048",
            "-timeout=20",
            "-max_len=4096",
            "-print_final_stats=1",
        ]);
        command.arg(&found);
        let kept = paths::workspace().join("fuzz/corpus").join(self.target);
        if kept.is_dir() {
            command.arg(kept);
        }
        let start = Instant::now();
        let output = command.output().with_context(|| process::shown(&command))?;
        let text = String::from_utf8_lossy(&output.stderr);
        let clean = output.status.success();
        let mut done = Outcome {
            clean,
            wanted: lines(&text, "want: "),
            reached: lines(&text, "cover: "),
            finding: finding(&text),
            speed: (number(&text, "stat::average_exec_per_sec:").unwrap_or(0), None),
            artifacts,
        };
        let messages = number(&text, "messages: ");
        done.speed.1 = messages.map(|count| count / start.elapsed().as_secs().max(1));
        if !clean {
            text.lines().filter(|line| is_worth(line)).for_each(|line| println!("  {line}"));
        }
        Ok(done)
    }
}

fn lines(text: &str, head: &str) -> BTreeSet<String> {
    text.lines().filter_map(|line| line.strip_prefix(head)).map(str::to_owned).collect()
}

/// The last number behind `head`.
fn number(text: &str, head: &str) -> Option<u64> {
    let said = text.lines().rev().find_map(|line| line.strip_prefix(head))?;
    said.trim().parse().ok()
}

/// What a panic says.
fn finding(text: &str) -> Option<String> {
    let mut lines = text.lines().skip_while(|line| !line.contains("panicked at"));
    let place = lines.next()?;
    let what = lines.next().unwrap_or(place);
    Some(what.to_owned())
}

/// Lines of a run with a finding that are worth being seen.
fn is_worth(line: &str) -> bool {
    let known = ["#", "cover: ", "want: ", "messages: ", "\tNEW_FUNC", "INFO: "];
    !known.iter().any(|head| line.starts_with(head))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "want: a b\nINFO: x\ncover: a b\nmessages: 5\nmessages: 12\n\n\
        thread 'x' panicked at src/a.rs:1:2:\nring 0 runs\nstat::average_exec_per_sec:     77\n";

    #[test]
    fn what_a_target_says_is_read_from_its_lines() {
        assert_eq!(lines(SAID, "want: "), lines(SAID, "cover: "));
        assert_eq!(number(SAID, "messages: "), Some(12));
        assert_eq!(number(SAID, "stat::average_exec_per_sec:"), Some(77));
        assert_eq!(finding(SAID).as_deref(), Some("ring 0 runs"));
        assert_eq!(finding("all is well"), None);
    }
}
