//! `cargo xtask cases`: which test holds which hostile case, as a table in `docs/cases.md`.
//!
//! `xtask/cases.txt` lists the cases: `id | state | title`. `held` claims that a test names the
//! id ([`scan`] finds it); `open: why` says what is still to come. Invariant: the table is made
//! of the sources alone, so that it changes with them and with nothing else.

pub mod scan;

use crate::{paths, process};
use anyhow::{Context as _, Result, bail, ensure};
use scan::{Holder, Kind};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::process::Command;

const LIST: &str = "xtask/cases.txt";
const TABLE: &str = "docs/cases.md";

/// So many tests are named for one case, the others are counted.
const SHOWN: usize = 3;

/// The reason that stops being true as soon as a test names the id.
const UNNAMED: &str = "no test names it yet";

/// The parts of the table, by the first letter of their ids.
const PARTS: [(char, &str); 4] = [
    ('A', "Messages of a front-end"),
    ('B', "Rings and requests of a guest"),
    ('C', "Faults of the host"),
    ('R', "Rules behind the cases"),
];

/// One line of the list.
#[derive(Debug, PartialEq, Eq)]
struct Case {
    id: String,
    /// Why no test holds it (or not all of it); none when one is said to.
    open: Option<String>,
    title: String,
}

/// By id, who names it.
type Holders = BTreeMap<String, BTreeSet<Holder>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Held,
    Open,
    /// Neither held nor declared open.
    Missing,
    /// Declared open for want of a test, and there is one.
    Stale,
}

/// Writes the table, or with `check` compares it with the one that is there.
///
/// # Errors
/// When the list cannot be read; with `check`, when the table is not up to date, an id is
/// neither held nor declared open, or a declaration has been overtaken by a test.
pub fn run(check: bool) -> Result<()> {
    let root = paths::workspace();
    let cases = read(&std::fs::read_to_string(root.join(LIST)).context(LIST)?)?;
    let holders = holders(&cases)?;
    let table = table(&cases, &holders);
    let path = root.join(TABLE);
    println!("{}", summary(&cases, &holders));
    let wrong = complaints(&cases, &holders);
    for line in &wrong {
        println!("cases: {line}");
    }
    if !check {
        std::fs::create_dir_all(path.parent().context("the table has no folder")?)?;
        return Ok(std::fs::write(&path, table)?);
    }
    ensure!(wrong.is_empty(), "{} cases are neither held nor open for a true reason", wrong.len());
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    ensure!(there == table, "{TABLE} is not up to date: `cargo xtask cases` writes it");
    Ok(())
}

/// The title of each case, by its id.
///
/// # Errors
/// When the list cannot be read.
pub fn titles() -> Result<BTreeMap<String, String>> {
    let text = std::fs::read_to_string(paths::workspace().join(LIST)).context(LIST)?;
    Ok(read(&text)?.into_iter().map(|case| (case.id, case.title)).collect())
}

fn read(text: &str) -> Result<Vec<Case>> {
    let mut cases: Vec<Case> = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let fields: Vec<_> = line.split('|').map(str::trim).collect();
        let [id, state, title] = fields[..] else {
            bail!("{LIST}: a line of {} fields, 3 wanted: {line}", fields.len());
        };
        let open = state.strip_prefix("open: ");
        ensure!(
            open.is_some() || state == "held",
            "{LIST}: {id} is neither held nor open: {state}"
        );
        ensure!(
            PARTS.iter().any(|(letter, _)| id.starts_with(*letter)),
            "{LIST}: no such id: {id}"
        );
        ensure!(cases.iter().all(|case| case.id != id), "{LIST}: {id} stands there twice");
        ensure!(!title.is_empty(), "{LIST}: {id} has no title");
        let (id, open, title) = (id.to_owned(), open.map(str::to_owned), title.to_owned());
        cases.push(Case { id, open, title });
    }
    ensure!(!cases.is_empty(), "{LIST} lists no case");
    Ok(cases)
}

/// Looks through every source of the tree, tracked or new, but none that git ignores.
fn holders(cases: &[Case]) -> Result<Holders> {
    let known: BTreeSet<_> = cases.iter().map(|case| case.id.clone()).collect();
    let root = paths::workspace();
    let mut list = Command::new("git");
    list.args(["ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate"]);
    let listed = process::output(list.current_dir(&root))?;
    let mut holders = Holders::new();
    for path in listed.lines().filter(|path| scan::is_source(path)) {
        // A file that was just removed is still listed.
        let Ok(text) = std::fs::read_to_string(root.join(path)) else { continue };
        for (id, holder) in scan::file(path, &text, &known) {
            holders.entry(id).or_default().insert(holder);
        }
    }
    Ok(holders)
}

fn verdict(case: &Case, holders: &Holders) -> Verdict {
    let named = holders.contains_key(&case.id);
    match &case.open {
        Some(why) if named && why == UNNAMED => Verdict::Stale,
        Some(_) => Verdict::Open,
        None if named => Verdict::Held,
        None => Verdict::Missing,
    }
}

fn summary(cases: &[Case], holders: &Holders) -> String {
    let count = |wanted| cases.iter().filter(|case| verdict(case, holders) == wanted).count();
    let judged = |case: &&Case| {
        let mut by = holders.get(&case.id).into_iter().flatten();
        verdict(case, holders) == Verdict::Held && by.all(|holder| holder.kind == Kind::Judge)
    };
    format!(
        "cases: held {} ({} of them by the judge alone), open {}, missing {}",
        count(Verdict::Held),
        cases.iter().filter(judged).count(),
        count(Verdict::Open) + count(Verdict::Stale),
        count(Verdict::Missing),
    )
}

fn complaints(cases: &[Case], holders: &Holders) -> Vec<String> {
    let complaint = |case: &Case| match verdict(case, holders) {
        Verdict::Missing => {
            Some(format!("{}: said to be held, and no test names it: {}", case.id, case.title))
        }
        Verdict::Stale => {
            Some(format!("{}: open, but now there is {}", case.id, by(case, holders)))
        }
        Verdict::Held | Verdict::Open => None,
    };
    cases.iter().filter_map(complaint).collect()
}

/// The first few who name a case, and how many more.
fn by(case: &Case, holders: &Holders) -> String {
    let all: Vec<_> = holders.get(&case.id).into_iter().flatten().collect();
    let first = all.iter().take(SHOWN).map(|holder| format!("`{}`", holder.place));
    let mut text = first.collect::<Vec<_>>().join(", ");
    if let Some(more) = all.len().checked_sub(SHOWN).filter(|more| *more > 0) {
        let _ = write!(text, ", +{more}");
    }
    text
}

fn table(cases: &[Case], holders: &Holders) -> String {
    let mut text = format!(
        "# Hostile cases and the tests that hold them\n\n\
         Written by `cargo xtask cases` from `{LIST}` and the sources: do not edit. A test, a\n\
         transcript or a check of the judge (`outboard-check/src/judge/table`) holds a case by\n\
         naming its id.\n\n{}.\n",
        summary(cases, holders)
    );
    for (letter, heading) in PARTS {
        let _ = write!(text, "\n## {heading}\n\n| id | case | held by |\n|---|---|---|\n");
        for case in cases.iter().filter(|case| case.id.starts_with(letter)) {
            let by = by(case, holders);
            let held = match (&case.open, by.is_empty()) {
                (None, true) => "missing".to_owned(),
                (None, false) => by,
                (Some(why), true) => format!("open: {why}"),
                (Some(why), false) => format!("open: {why}; so far {by}"),
            };
            let _ = writeln!(text, "| {} | {} | {held} |", case.id, case.title);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# a remark\nA1 | held | one\nA2 | open: later | two\n\
                        B1 | held | three\nR1 | open: no test names it yet | four\n";

    fn named(ids: &[(&str, usize)]) -> Holders {
        let holder = |n| Holder { kind: Kind::Test, place: format!("f.rs::t{n}") };
        let by =
            |(id, count): &(&str, usize)| ((*id).to_owned(), (0..*count).map(holder).collect());
        ids.iter().map(by).collect()
    }

    #[test]
    fn a_list_that_is_not_well_formed_is_refused() {
        assert_eq!(read(TEXT).unwrap().len(), 4);
        for line in ["A1 | held", "A1 | no | x", "A1 | held |", "X1 | held | x"] {
            assert!(read(line).is_err(), "{line}");
        }
        assert!(read("A1 | held | x\nA1 | held | y\n").is_err());
        assert!(read("# nothing\n").is_err());
    }

    #[test]
    fn each_case_is_held_open_or_missing() {
        let cases = read(TEXT).unwrap();
        let holders = named(&[("A1", 1), ("A2", 1)]);
        let wanted = [Verdict::Held, Verdict::Open, Verdict::Missing, Verdict::Open];
        assert!(cases.iter().map(|case| verdict(case, &holders)).eq(wanted));
        let line = "cases: held 1 (0 of them by the judge alone), open 2, missing 1";
        assert_eq!(summary(&cases, &holders), line);
        let [missing] = &complaints(&cases, &holders)[..] else { panic!("one complaint") };
        assert!(missing.starts_with("B1: "));
    }

    #[test]
    fn a_test_that_names_an_id_ends_the_excuse_that_there_is_none() {
        let cases = read(TEXT).unwrap();
        let holders = named(&[("A1", 1), ("B1", 1), ("R1", 1)]);
        let [stale] = &complaints(&cases, &holders)[..] else { panic!("one complaint") };
        assert_eq!(stale, "R1: open, but now there is `f.rs::t0`");
    }

    #[test]
    fn a_case_of_the_judge_alone_is_counted_apart() {
        let cases = read("A1 | held | one\n").unwrap();
        let holder = Holder { kind: Kind::Judge, place: "j".to_owned() };
        let holders = Holders::from([("A1".to_owned(), BTreeSet::from([holder]))]);
        assert!(summary(&cases, &holders).contains("held 1 (1 of them"));
    }

    #[test]
    fn the_table_shows_three_tests_and_counts_the_others() {
        let cases = read(TEXT).unwrap();
        let table = table(&cases, &named(&[("A1", 5), ("A2", 1), ("B1", 3)]));
        for line in [
            "| A1 | one | `f.rs::t0`, `f.rs::t1`, `f.rs::t2`, +2 |",
            "| A2 | two | open: later; so far `f.rs::t0` |",
            "| B1 | three | `f.rs::t0`, `f.rs::t1`, `f.rs::t2` |",
            "| R1 | four | open: no test names it yet |",
        ] {
            assert!(table.lines().any(|there| there == line), "{line}");
        }
    }

    #[test]
    fn the_list_of_this_tree_is_well_formed() {
        let text = std::fs::read_to_string(paths::workspace().join(LIST)).unwrap();
        read(&text).unwrap();
    }
}
