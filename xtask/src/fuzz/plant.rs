//! `cargo xtask plant`: defects put into a copy of the tree one by one, to see them found.
//!
//! `fuzz/planted.txt` lists them, in the form of the guards' table: what stands there, what shall
//! stand there, the test that has to fail then, and, in the place of a case's id, the fuzz target
//! that has to find it in so many seconds. Invariant: the tree itself is not touched; each test is
//! seen to hold and each target to be quiet with nothing planted.

use super::{Run, build};
use crate::guards::copy::Copy;
use crate::guards::probe::{Ending, Probe};
use crate::guards::table::{self, Guard};
use crate::process;
use anyhow::{Context as _, Result, ensure};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

const LIST: &str = "fuzz/planted.txt";

/// Seconds for a target with nothing planted.
const QUIET: u64 = 5;

/// Plants all defects, or those whose title has `only` in it.
///
/// # Errors
/// When a test or a target does not find one, or one could not be tried.
pub fn run(seconds: u64, only: Option<&str>) -> Result<()> {
    let all = table::read_list(LIST)?;
    let chosen: Vec<_> =
        all.iter().filter(|guard| only.is_none_or(|text| guard.title().contains(text))).collect();
    ensure!(!chosen.is_empty(), "{LIST} has no such defect");
    let compiler = process::find("c++").or_else(|| process::find("g++"));
    let compiler = compiler.context("no C++ compiler for libFuzzer (Debian: g++)")?;
    let copy = Copy::refreshed("planted")?;
    let probe = Probe::new(&copy)?;
    probe.all_hold(&chosen)?;
    let fuzzer = Fuzzer { copy: &copy, compiler: &compiler };
    let targets: BTreeSet<_> = chosen.iter().map(|guard| guard.id.as_str()).collect();
    for target in targets {
        let found = fuzzer.finds(target, QUIET)?;
        ensure!(found.is_none(), "{target} finds something with nothing planted: {found:?}");
    }
    let mut missed = Vec::new();
    for guard in &chosen {
        match attempt(&fuzzer, &probe, guard, seconds) {
            Ok(said) => println!("plant: {}: found: {said}", guard.title()),
            Err(error) => missed.push(format!("{}: {error:#}", guard.title())),
        }
    }
    ensure!(missed.is_empty(), "of {} defects not found:\n{}", chosen.len(), missed.join("\n"));
    Ok(())
}

/// Plants one and says who found it, and how.
fn attempt(fuzzer: &Fuzzer<'_>, probe: &Probe<'_>, guard: &Guard, seconds: u64) -> Result<String> {
    let _planted = fuzzer.copy.without(&guard.removal)?;
    let ending = probe.ending(&guard.test)?;
    ensure!(ending != Ending::Held, "the test holds: {}", guard.test);
    let start = Instant::now();
    let found = fuzzer.finds(&guard.id, seconds)?;
    let took = start.elapsed().as_secs();
    let what = found.with_context(|| format!("{} finds nothing in {seconds} s", guard.id))?;
    Ok(format!("{} ({ending:?}); {} within {took} s, build included: {what}", guard.test, guard.id))
}

struct Fuzzer<'a> {
    copy: &'a Copy,
    compiler: &'a Path,
}

impl Fuzzer<'_> {
    /// What the target says within so many seconds.
    fn finds(&self, target: &str, seconds: u64) -> Result<Option<String>> {
        let programs = build(self.compiler, self.copy.path(), &self.copy.target().join("fuzz"))?;
        // What a run with a defect learns is of no use to the next one.
        let kept = tempfile::tempdir()?;
        let kept = kept.path().to_path_buf();
        let done = Run { programs: &programs, kept, target, seconds }.go()?;
        Ok((!done.clean).then(|| done.finding.unwrap_or_else(|| "a crash".to_owned())))
    }
}
