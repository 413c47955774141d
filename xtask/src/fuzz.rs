//! `cargo xtask fuzz`: each target of `fuzz/` for so many seconds, with cargo-fuzz on a nightly
//! toolchain.
//!
//! A target starts from its checked-in seeds (`fuzz/seeds/TARGET`) and from what earlier runs on
//! this machine found (`target/xtask/corpus/TARGET`), with its dictionary (`fuzz/TARGET.dict`).

use crate::summary::Tally;
use crate::{paths, process, skips};
use anyhow::{Context as _, Result};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Runs each target, or the one named.
///
/// # Errors
/// When a tool is missing where nothing may be skipped, or the targets cannot be listed.
pub fn run(seconds: u64, only: Option<&str>) -> Result<Tally> {
    let root = paths::workspace();
    let mut tally = Tally::default();
    if !root.join("fuzz/Cargo.toml").exists() {
        println!("fuzz: there are no targets");
        return Ok(tally);
    }
    let tool = match tool() {
        Ok(tool) => tool,
        Err(why) => {
            skips::skip("fuzz", &format!("{why:#}"))?;
            tally.skipped += 1;
            return Ok(tally);
        }
    };
    let listed = process::output(cargo_fuzz(&tool, &root).arg("list"))?;
    for target in listed.lines().map(str::trim).filter(|name| only.is_none_or(|one| one == *name)) {
        println!("fuzz: {target}, {seconds} s");
        let begun = Instant::now();
        match one(&tool, &root, target, seconds) {
            Ok(()) => {
                println!("fuzz: {target}: clean after {:.0?}, building included", begun.elapsed());
                tally.passed += 1;
            }
            Err(error) => {
                println!("fuzz: {target}: FAILED: {error:#}");
                tally.failed += 1;
            }
        }
    }
    anyhow::ensure!(tally != Tally::default(), "there is no such target");
    Ok(tally)
}

fn one(tool: &Path, root: &Path, target: &str, seconds: u64) -> Result<()> {
    let corpus = paths::xtask()?.join("corpus").join(target);
    std::fs::create_dir_all(&corpus)?;
    let mut command = cargo_fuzz(tool, root);
    command.args(["run", "--target-dir"]).arg(paths::target()?.join("fuzz"));
    command.arg(target).arg(corpus);
    let seeds = root.join("fuzz/seeds").join(target);
    if seeds.is_dir() {
        command.arg(seeds);
    }
    command.arg("--").arg(format!("-max_total_time={seconds}"));
    command.args(["-rss_limit_mb=4096", "-timeout=20", "-print_final_stats=1", "-verbosity=0"]);
    let words = root.join(format!("fuzz/{target}.dict"));
    if words.exists() {
        command.arg(format!("-dict={}", words.display()));
    }
    process::run(&mut command)
}

fn cargo_fuzz(tool: &Path, root: &Path) -> Command {
    let mut command = Command::new(tool);
    command.arg("fuzz").current_dir(root);
    // The cargo that runs xtask is not the one wanted here.
    command.env("RUSTUP_TOOLCHAIN", "nightly").env_remove("CARGO").env_remove("CARGO_TARGET_DIR");
    command
}

/// cargo-fuzz: the user's, or one of our own below the target directory.
fn tool() -> Result<PathBuf> {
    let nightly =
        process::output(Command::new("rustc").env("RUSTUP_TOOLCHAIN", "nightly").arg("-V"));
    nightly.context("no nightly toolchain")?;
    if let Some(found) = process::find("cargo-fuzz") {
        return Ok(found);
    }
    let tools = paths::xtask()?.join("tools");
    let own = tools.join("bin/cargo-fuzz");
    if !own.exists() {
        println!("fuzz: building cargo-fuzz");
        let mut install = Command::new("cargo");
        install.args(["install", "--quiet", "--locked", "cargo-fuzz", "--root"]).arg(&tools);
        process::run(&mut install).context("cargo-fuzz cannot be built")?;
    }
    Ok(own)
}
