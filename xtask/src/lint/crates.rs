//! Checks of the packages: our crates among themselves (arrows one way, `ARCHITECTURE.md`), what
//! they stand on, and under which licences.

use super::cargo_command;
use crate::process;
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use std::collections::BTreeSet;

/// Which of our crates each may use, tests aside.
const ARROWS: &[(&str, &[&str])] = &[
    ("outboard-protocol", &[]),
    ("outboard-memory", &[]),
    ("outboard-queue", &["outboard-memory"]),
    ("outboard", &["outboard-protocol", "outboard-memory", "outboard-queue"]),
    ("outboard-devices", &["outboard"]),
    ("outboard-frontend", &["outboard-protocol", "outboard-memory", "outboard-queue"]),
    (
        "outboard-check",
        &["outboard-frontend", "outboard-protocol", "outboard-memory", "outboard-queue"],
    ),
    (
        "outboard-cli",
        &[
            "outboard-devices",
            "outboard",
            "outboard-check",
            "outboard-frontend",
            "outboard-protocol",
            "outboard-memory",
            "outboard-queue",
        ],
    ),
    ("xtask", &[]),
];

/// Pairs that may not meet even in tests: the judge must judge anybody's device alike.
const NEVER: (&str, &str) = ("outboard-check", "outboard");

/// Packages that the library may stand on, itself and its siblings counted.
const BUDGETS: &[(&[&str], usize)] = &[(&["--no-default-features"], 24), (&[], 42)];

/// Licences that go with ours.
const LICENCES: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// The checks by name, each with a note or what it found.
#[must_use]
pub fn checks() -> Vec<(&'static str, Result<String>)> {
    vec![
        ("arrows between our crates", metadata(&["--no-deps"]).and_then(|data| arrows(&data))),
        ("packages that the library stands on", budgets()),
        ("licences", metadata(&[]).and_then(|data| licences(&data))),
    ]
}

/// What cargo knows of the workspace.
///
/// # Errors
/// When cargo fails or says something that is not JSON.
pub fn metadata(more: &[&str]) -> Result<Value> {
    let mut command = cargo_command(&["metadata", "--format-version", "1", "--locked"]);
    Ok(serde_json::from_str(&process::output(command.args(more))?)?)
}

/// The packages in cargo's answer.
///
/// # Errors
/// When it has none.
pub fn packages(metadata: &Value) -> Result<&Vec<Value>> {
    metadata["packages"].as_array().context("cargo metadata has no packages")
}

fn arrows(metadata: &Value) -> Result<String> {
    let packages = packages(metadata)?;
    let ours: BTreeSet<_> =
        packages.iter().filter_map(|package| package["name"].as_str()).collect();
    let mut found = Vec::new();
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        let row = ARROWS.iter().find(|(from, _)| *from == name);
        let Some((_, allowed)) = row else {
            found.push(format!("{name}: no row in the table of arrows"));
            continue;
        };
        for need in package["dependencies"].as_array().into_iter().flatten() {
            let (to, kind) = (need["name"].as_str().unwrap_or_default(), need["kind"].as_str());
            let tests_only = kind == Some("dev") && (name, to) != NEVER;
            if ours.contains(to) && !tests_only && !allowed.contains(&to) {
                found.push(format!("{name} may not use {to}"));
            }
        }
    }
    ensure!(found.is_empty(), "{}", found.join("\n"));
    Ok(format!("ok ({} crates)", packages.len()))
}

fn budgets() -> Result<String> {
    let mut notes = Vec::new();
    for (options, limit) in BUDGETS {
        let mut tree = cargo_command(&["tree", "-p", "outboard", "-e", "normal,build", "--locked"]);
        let listed =
            process::output(tree.args(["--prefix", "none", "--no-dedupe"]).args(*options))?;
        let names: BTreeSet<_> = listed
            .lines()
            .filter_map(|line| line.split(" (").next())
            .filter(|l| !l.is_empty())
            .collect();
        if names.len() > *limit {
            let all: Vec<_> = names.iter().copied().collect();
            bail!("{} packages, at most {limit} {options:?}:\n{}", names.len(), all.join("\n"));
        }
        notes.push(format!("{} of {limit}", names.len()));
    }
    Ok(format!("ok ({} without default features, {} with)", notes[0], notes[1]))
}

fn licences(metadata: &Value) -> Result<String> {
    let packages = packages(metadata)?;
    let mut found = Vec::new();
    for package in packages {
        let licence = package["license"].as_str().unwrap_or("none");
        if !compatible(licence) {
            found.push(format!("{}: {licence}", package["name"].as_str().unwrap_or_default()));
        }
    }
    ensure!(found.is_empty(), "{}", found.join("\n"));
    Ok(format!("ok ({} packages)", packages.len()))
}

/// True when the licence expression can be met with what goes with ours: one of its alternatives
/// (OR, or an older package's `/`) holds, and an alternative holds when all its parts (AND) do.
fn compatible(licence: &str) -> bool {
    let spaced = licence.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let mut words = spaced.split_ascii_whitespace().peekable();
    alternatives(&mut words) && words.next().is_none()
}

type Words<'a> = std::iter::Peekable<std::str::SplitAsciiWhitespace<'a>>;

fn alternatives(words: &mut Words<'_>) -> bool {
    let mut holds = parts(words);
    while words.next_if_eq(&"OR").is_some() {
        holds |= parts(words);
    }
    holds
}

fn parts(words: &mut Words<'_>) -> bool {
    let mut holds = one(words);
    while words.next_if_eq(&"AND").is_some() {
        holds &= one(words);
    }
    holds
}

fn one(words: &mut Words<'_>) -> bool {
    if words.next_if_eq(&"(").is_some() {
        return alternatives(words) & words.next_if_eq(&")").is_some();
    }
    let mut name = words.next().unwrap_or_default().to_owned();
    while let Some(more) = words.next_if(|word| !["AND", "OR", "(", ")"].contains(word)) {
        name = format!("{name} {more}");
    }
    LICENCES.contains(&name.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_licence_is_accepted_when_one_alternative_is() {
        assert!(compatible("MIT OR Apache-2.0"));
        assert!(compatible("MIT/Apache-2.0"));
        assert!(compatible("GPL-3.0 OR MIT"));
        assert!(compatible("(MIT OR Apache-2.0) AND Unicode-3.0"));
        assert!(!compatible("GPL-3.0"));
        assert!(!compatible("MIT AND GPL-3.0"));
        assert!(!compatible("(MIT OR Apache-2.0) AND GPL-3.0"));
        assert!(compatible("Apache-2.0 WITH LLVM-exception OR GPL-3.0"));
        assert!(!compatible("none"));
    }

    #[test]
    fn an_arrow_the_wrong_way_is_found() {
        let package = |name: &str, to: &str, kind: Option<&str>| serde_json::json!({ "name": name, "dependencies": [{ "name": to, "kind": kind }] });
        let check = |from, to, kind| {
            let other = package(to, "x", None);
            arrows(&serde_json::json!({ "packages": [package(from, to, kind), other] })).is_ok()
        };
        assert!(check("outboard-queue", "outboard-memory", None));
        assert!(!check("outboard-memory", "outboard-queue", None));
        assert!(check("outboard-memory", "outboard-queue", Some("dev")));
        assert!(!check("outboard-check", "outboard", Some("dev")));
    }
}
