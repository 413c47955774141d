//! Building and running one test of a copy.
//!
//! Invariant: a test counts as run only when its runner says that it ran one test.

use super::copy::Copy;
use super::table::{Guard, Test};
use crate::process;
use anyhow::{Context as _, Result, bail, ensure};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// A test that runs longer than this hangs, in seconds.
const PATIENCE: &str = "30";

/// How a test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It passed.
    Held,
    /// It said that something does not hold.
    Failed,
    /// Its process was ended by a signal.
    Crashed,
    /// It did not end in time.
    Hung,
}

/// What builds and runs tests of a copy.
#[derive(Debug)]
pub struct Probe<'a> {
    copy: &'a Copy,
}

impl<'a> Probe<'a> {
    /// For tests of this copy.
    ///
    /// # Errors
    /// When there is no `timeout` program.
    pub fn new(copy: &'a Copy) -> Result<Self> {
        process::find("timeout").context("no `timeout` (Debian: coreutils)")?;
        Ok(Self { copy })
    }

    /// Sees that all these guards' tests hold as things are.
    ///
    /// # Errors
    /// Names those that do not.
    pub fn all_hold(&self, guards: &[&Guard]) -> Result<()> {
        let mut wrong = Vec::new();
        let mut done = BTreeSet::new();
        for test in guards.iter().map(|guard| &guard.test) {
            if !done.insert(test.to_string()) {
                continue;
            }
            match self.ending(test) {
                Ok(Ending::Held) => {}
                Ok(ending) => wrong.push(format!("{test}: {ending:?}")),
                Err(error) => wrong.push(format!("{test}: {error:#}")),
            }
        }
        ensure!(wrong.is_empty(), "with all guards in place:\n{}", wrong.join("\n"));
        eprintln!("guards: {} tests hold with all guards in place", done.len());
        Ok(())
    }

    /// Builds what the test lies in and runs this one test.
    ///
    /// # Errors
    /// When it does not build, or there is no such test.
    pub fn ending(&self, test: &Test) -> Result<Ending> {
        let program = self.build(test)?;
        let mut command = Command::new("timeout");
        command.args(["--kill-after=5", PATIENCE]).arg(program);
        command.args(["--exact", &test.name]).stdin(Stdio::null());
        command.current_dir(self.copy.path().join("crates").join(&test.package));
        command.env("RUST_BACKTRACE", "0");
        let done = command.output().with_context(|| process::shown(&command))?;
        let said = String::from_utf8_lossy(&done.stdout);
        ensure!(said.contains("running 1 test\n"), "no such test: {test}\n{said}");
        Ok(match done.status.code() {
            Some(0) if said.contains("1 passed") => Ending::Held,
            Some(0) => bail!("it did not run: {said}"),
            Some(124 | 137) => Ending::Hung,
            // What `timeout` gives when its command was ended by a signal.
            Some(128..) | None => Ending::Crashed,
            Some(_) => Ending::Failed,
        })
    }

    /// The test program.
    fn build(&self, test: &Test) -> Result<PathBuf> {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.args(["test", "--no-run", "--locked", "--quiet", "--message-format=json"]);
        command.args(["-p", &test.package]).current_dir(self.copy.path());
        let kind = if test.target == "lib" { "lib" } else { "test" };
        match kind {
            "lib" => command.arg("--lib"),
            _ => command.args(["--test", &test.target]),
        };
        command.env("CARGO_TARGET_DIR", self.copy.target()).env("CARGO_INCREMENTAL", "1");
        // What is left without a guard need not be tidy.
        command.env("RUSTFLAGS", "--cap-lints=allow").env("CARGO_PROFILE_DEV_DEBUG", "0");
        command.stdin(Stdio::null());
        let done = command.output().with_context(|| process::shown(&command))?;
        let messages = String::from_utf8_lossy(&done.stdout);
        let messages: Vec<serde_json::Value> =
            messages.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        if !done.status.success() {
            let said = messages.iter().filter_map(|m| m["message"]["rendered"].as_str());
            let errors: Vec<_> = said.filter(|text| text.starts_with("error")).collect();
            bail!(
                "it does not build: {test}\n{}{}",
                errors.join("\n"),
                String::from_utf8_lossy(&done.stderr)
            );
        }
        let program = messages.iter().find_map(|message| {
            let is_it = message["profile"]["test"] == true
                && message["target"]["kind"][0] == kind
                && (kind == "lib" || message["target"]["name"] == *test.target);
            message["executable"].as_str().filter(|_| is_it)
        });
        program.map(PathBuf::from).with_context(|| format!("cargo built no program for {test}"))
    }
}
