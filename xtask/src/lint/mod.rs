//! `cargo xtask lint`: what must hold of the tree beside its tests.
//!
//! rustfmt, clippy and rustdoc with warnings denied, then checks of our own: [`sources`] reads
//! the files, [`crates`] the packages. Invariant: every check runs, whatever the ones before it
//! found, so that one run tells everything.

pub mod crates;
pub mod sources;

use crate::{guards, paths, process};
use anyhow::{Result, bail};
use std::process::Command;

/// Runs all checks.
///
/// # Errors
/// When any of them does not hold: each has told why.
pub fn run() -> Result<()> {
    let mut failed = Vec::new();
    let mut count = 0;
    let mut check = |name: &str, result: Result<String>| {
        count += 1;
        match result {
            Ok(note) => println!("lint: {name}: {}", if note.is_empty() { "ok" } else { &note }),
            Err(error) => {
                println!("lint: {name}: FAILED\n{error:#}");
                failed.push(name.to_owned());
            }
        }
    };
    check("rustfmt", cargo(&["fmt", "--all", "--check"], &[]));
    let clippy = ["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"];
    check("clippy", cargo(&clippy, &[]));
    let light =
        ["clippy", "-p", "outboard", "--no-default-features", "--locked", "--", "-D", "warnings"];
    check("clippy without default features", cargo(&light, &[]));
    // The fuzz targets are a workspace of their own.
    let manifest = "--manifest-path=fuzz/Cargo.toml";
    check("rustfmt of the fuzz targets", cargo(&["fmt", manifest, "--check"], &[]));
    let clippy = ["clippy", manifest, "--all-targets", "--locked", "--", "-D", "warnings"];
    let target = paths::target().map(|dir| dir.join("fuzz").display().to_string());
    let checked = target.and_then(|dir| cargo(&clippy, &[("CARGO_TARGET_DIR", &dir)]));
    check("clippy of the fuzz targets", checked);
    // The program is documented by itself: it has the library's name.
    for (name, which) in [
        ("rustdoc", ["--workspace", "--exclude=outboard-cli"]),
        ("rustdoc of the program", ["-p", "outboard-cli"]),
    ] {
        let doc = [["doc", "--no-deps", "--locked"].as_slice(), &which].concat();
        check(name, cargo(&doc, &[("RUSTDOCFLAGS", "-D warnings")]));
    }
    for (name, result) in sources::checks() {
        check(name, result);
    }
    for (name, result) in crates::checks() {
        check(name, result);
    }
    check("guards and their tests", guards::check());
    if !failed.is_empty() {
        bail!("{} of {count} lint checks do not hold: {}", failed.len(), failed.join(", "));
    }
    println!("lint: all {count} checks hold");
    Ok(())
}

/// `cargo` at the root of the workspace.
#[must_use]
pub fn cargo_command(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(paths::workspace());
    command
}

fn cargo(arguments: &[&str], environment: &[(&str, &str)]) -> Result<String> {
    let mut command = cargo_command(arguments);
    command.envs(environment.iter().copied());
    process::run(&mut command).map(|()| String::new())
}
