//! `cargo xtask fuzz`: each target of `fuzz/` for so many seconds, with cargo-fuzz on a nightly
//! toolchain. What a target found before (`fuzz/corpus`) is its start.

use crate::summary::Tally;
use crate::{paths, process, skips};
use anyhow::{Context as _, Result};
use std::path::PathBuf;
use std::process::Command;

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
    let cargo = || {
        let mut command = Command::new(&tool);
        command.current_dir(&root).env("RUSTUP_TOOLCHAIN", "nightly").env_remove("CARGO");
        command.arg("fuzz");
        command
    };
    let listed = process::output(cargo().arg("list"))?;
    for target in listed.lines().map(str::trim).filter(|name| only.is_none_or(|one| one == *name)) {
        println!("fuzz: {target}, {seconds} s");
        let mut command = cargo();
        command.args(["run", target, "--"]).arg(format!("-max_total_time={seconds}"));
        command.args(["-rss_limit_mb=4096", "-timeout=20", "-print_final_stats=1", "-verbosity=0"]);
        match process::run(&mut command) {
            Ok(()) => tally.passed += 1,
            Err(error) => {
                println!("fuzz: {target}: FAILED: {error:#}");
                tally.failed += 1;
            }
        }
    }
    Ok(tally)
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
