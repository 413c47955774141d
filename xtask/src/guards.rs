//! `cargo xtask guards`: the guards of the code taken away one by one, to see a test fail.
//!
//! `xtask/guards.txt` lists them ([`table`] reads it): what the guard's text is, what stands there
//! without it, and the test of a hostile case that must fail then. Each is taken out of a copy of
//! the tree ([`copy`]), the one test is built and run ([`probe`]) and the guard is put back. Before
//! that every test is seen to hold with all guards in place. Invariant: the tree itself is not
//! touched; a text that is not found exactly once, a test that is not there and a copy that does
//! not build are failures, not findings.

pub mod copy;
pub mod probe;
pub mod table;

use crate::{cases, paths};
use anyhow::{Result, bail, ensure};
use copy::Copy;
use probe::{Ending, Probe};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use table::Guard;

const RESULT: &str = "docs/guards.md";

/// Hostile ids that the sample has to touch.
const FEWEST: usize = 40;

/// What came of one guard's removal.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    /// The test failed, crashed, or hung: how.
    Caught(&'static str),
    /// The test held without the guard.
    Survived,
    /// It could not be tried.
    Broken(String),
}

impl Verdict {
    const fn shown(&self) -> &'static str {
        match self {
            Self::Caught(_) => "caught",
            Self::Survived => "SURVIVED",
            Self::Broken(_) => "NOT TRIED",
        }
    }
}

/// Takes away the guards of these ids (all, when none is named), prints what their tests said and
/// writes `docs/guards.md`: what was not tried now keeps its row, unless its entry has changed.
///
/// # Errors
/// When a test holds without its guard, or one could not be tried.
pub fn run(only: &[String], json: bool) -> Result<()> {
    let all = table::read()?;
    let chosen: Vec<_> =
        all.iter().filter(|guard| only.is_empty() || only.contains(&guard.id)).collect();
    for id in only {
        ensure!(all.iter().any(|guard| guard.id == *id), "no guard of {id} in {}", table::LIST);
    }
    let copy = Copy::refreshed("guards")?;
    let probe = Probe::new(&copy)?;
    probe.all_hold(&chosen)?;
    let mut tried = Vec::new();
    for guard in chosen {
        let verdict = attempt(&copy, &probe, guard);
        let how = match &verdict {
            Verdict::Caught(how) => (*how).to_owned(),
            Verdict::Survived => guard.test.to_string(),
            Verdict::Broken(why) => why.clone(),
        };
        eprintln!("guards: {}: {}: {}: {how}", guard.id, guard.title(), verdict.shown());
        tried.push((guard, verdict));
    }
    println!("{}", if json { as_json(&tried)? } else { as_text(&tried) });
    keep(&all, &tried)?;
    let wrong = tried.iter().filter(|(_, verdict)| !matches!(verdict, Verdict::Caught(_))).count();
    ensure!(wrong == 0, "{wrong} of {} guards can go without their test's notice", tried.len());
    Ok(())
}

/// Writes the result, with the earlier one of what was not tried now.
fn keep(all: &[Guard], tried: &[(&Guard, Verdict)]) -> Result<()> {
    let path = paths::workspace().join(RESULT);
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    let titles = cases::titles()?;
    let verdict = |guard: &Guard| {
        if let Some((_, verdict)) = tried.iter().find(|(other, _)| **other == *guard) {
            return verdict.clone();
        }
        let caught = Verdict::Caught("");
        let row = row(guard, &caught, &titles);
        if there.lines().any(|line| line == row) { caught } else { Verdict::Broken(String::new()) }
    };
    let results: Vec<_> = all.iter().map(|guard| (guard, verdict(guard))).collect();
    Ok(std::fs::write(path, document(&results)?)?)
}

fn attempt(copy: &Copy, probe: &Probe<'_>, guard: &Guard) -> Verdict {
    let ending = copy.without(&guard.removal).and_then(|_gone| probe.ending(&guard.test));
    match ending {
        Ok(Ending::Held) => Verdict::Survived,
        Ok(Ending::Failed) => Verdict::Caught("the test fails"),
        Ok(Ending::Crashed) => Verdict::Caught("the test crashes"),
        Ok(Ending::Hung) => Verdict::Caught("the test never ends"),
        Err(error) => Verdict::Broken(format!("{error:#}")),
    }
}

/// Compares the table with the tree, without building anything: every guard's text and test are
/// there, and `docs/guards.md` has its rows.
///
/// # Errors
/// Names everything that is not.
pub fn check() -> Result<String> {
    let guards = table::read()?;
    let root = paths::workspace();
    let mut wrong = Vec::new();
    for guard in &guards {
        let found = guard.removal.place(&root).and_then(|_| guard.test.is_in(&root));
        if let Err(error) = found {
            wrong.push(format!("{}: {}: {error:#}", guard.id, guard.title()));
        }
    }
    let ids: BTreeSet<_> = guards.iter().map(|guard| guard.id.as_str()).collect();
    if ids.len() < FEWEST {
        wrong.push(format!("guards of {} hostile ids, at least {FEWEST} wanted", ids.len()));
    }
    let caught: Vec<_> = guards.iter().map(|guard| (guard, Verdict::Caught(""))).collect();
    let there = std::fs::read_to_string(root.join(RESULT)).unwrap_or_default();
    if there != document(&caught)? {
        wrong.push(format!("{RESULT} is not of this table: `cargo xtask guards` writes it"));
    }
    if !wrong.is_empty() {
        bail!("{}", wrong.join("\n"));
    }
    Ok(format!("ok ({} guards of {} ids)", guards.len(), ids.len()))
}

fn as_json(tried: &[(&Guard, Verdict)]) -> Result<String> {
    let row = |(guard, verdict): &(&Guard, Verdict)| {
        let why = match verdict {
            Verdict::Broken(why) => why.as_str(),
            Verdict::Caught(how) => how,
            Verdict::Survived => "",
        };
        serde_json::json!({
            "id": guard.id,
            "file": guard.removal.file,
            "guard": guard.removal.text,
            "without": guard.removal.without,
            "test": guard.test.to_string(),
            "result": verdict.shown(),
            "how": why,
        })
    };
    Ok(serde_json::to_string_pretty(&tried.iter().map(row).collect::<Vec<_>>())?)
}

fn as_text(tried: &[(&Guard, Verdict)]) -> String {
    let mut text = String::new();
    for (guard, verdict) in tried {
        let _ = writeln!(
            text,
            "{:<9} {:<4} {:<50} {}",
            verdict.shown(),
            guard.id,
            guard.title(),
            guard.test
        );
    }
    text + &summary(tried)
}

fn summary(tried: &[(&Guard, Verdict)]) -> String {
    let ids: BTreeSet<_> = tried.iter().map(|(guard, _)| guard.id.as_str()).collect();
    let count = |what: &str| tried.iter().filter(|(_, verdict)| verdict.shown() == what).count();
    format!(
        "guards: {} of {} hostile ids: caught {}, survived {}, not tried {}",
        tried.len(),
        ids.len(),
        count("caught"),
        count("SURVIVED"),
        count("NOT TRIED"),
    )
}

/// The kept result. It holds nothing that differs between two runs of the same tree.
fn document(tried: &[(&Guard, Verdict)]) -> Result<String> {
    let titles = cases::titles()?;
    let mut text = format!(
        "# Guards and the tests that miss them\n\n\
         Written by `cargo xtask guards` from `{}`: do not edit. Each guard was taken out of a\n\
         copy of the tree, and the test of its hostile case was built and run: `caught` when it\n\
         failed, crashed or never ended.\n\n{}.\n\n\
         | id | case | guard | what it becomes | test | result |\n|---|---|---|---|---|---|\n",
        table::LIST,
        summary(tried)
    );
    for (guard, verdict) in tried {
        let _ = writeln!(text, "{}", row(guard, verdict, &titles));
    }
    Ok(text)
}

fn row(guard: &Guard, verdict: &Verdict, titles: &BTreeMap<String, String>) -> String {
    let title = titles.get(&guard.id).map_or("", String::as_str);
    let file = guard.removal.file.strip_prefix("crates/").unwrap_or(&guard.removal.file);
    format!(
        "| {} | {title} | `{file}`: {} | {} | `{}` | {} |",
        guard.id,
        code(&guard.removal.text),
        code(&guard.removal.without),
        guard.test.short(),
        verdict.shown()
    )
}

/// Source text in one cell of a table.
fn code(text: &str) -> String {
    let words: Vec<_> = text.split_ascii_whitespace().collect();
    if words.is_empty() {
        return "nothing".to_owned();
    }
    format!("`{}`", words.join(" ").replace('|', "\\|"))
}
