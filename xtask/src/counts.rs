//! `cargo xtask counts`: instructions per request, counted by callgrind, against a checked-in file.
//!
//! A crate that promises a count has a bench target `counts`: `--list` prints its cases, `CASE
//! ITERATIONS` runs one so many times, `CASE ITERATIONS driver` only what drives it. Two runs of
//! different length are counted and the shorter taken from the longer, so that neither start-up
//! nor a symbol's name matters; what drives it is taken away likewise. Instructions do not depend
//! on the machine's load; they do on the compiler, hence a tolerance.
//! The record, `xtask/counts.txt`: `crate case instructions ceiling`, one case a line.

use crate::packages::Root;
use crate::summary::Tally;
use crate::{lint, paths, process};
use anyhow::{Context as _, Result, bail};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The lengths of the two runs: whole batches of any power of two up to 2048.
const RUNS: [u64; 2] = [2_048, 6_144];

/// How much above its record a count may be, in percent, before it fails.
const TOLERANCE: u64 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    instructions: u64,
    ceiling: u64,
}

type Records = BTreeMap<(String, String), Record>;

/// Counts every case; with `bless` writes what was counted as the new record.
///
/// # Errors
/// When there is no callgrind, a bench does not build or run, or the record cannot be read.
pub fn run(bless: bool) -> Result<Tally> {
    let valgrind = valgrind()?;
    let file = paths::workspace().join("xtask/counts.txt");
    let mut records = read(&std::fs::read_to_string(&file).unwrap_or_default())?;
    let mut tally = Tally::default();
    for package in with_counts()? {
        let bench = build(&package)?;
        for case in process::output(Command::new(&bench).arg("--list"))?.lines() {
            let counted = count(&valgrind, &bench, case)?;
            let key = (package.clone(), case.to_owned());
            let record = records.get(&key).copied();
            let verdict = if bless { blessed(counted, record) } else { judge(counted, record) };
            println!("counts: {package} {case}: {counted} instructions, {}", shown(&verdict));
            let held = verdict.is_ok();
            *(if held { &mut tally.passed } else { &mut tally.failed }) += 1;
            if bless {
                let ceiling = record.map_or(counted + counted / 5, |old| old.ceiling);
                records.insert(key, Record { instructions: counted, ceiling });
            }
        }
    }
    if bless {
        std::fs::write(&file, written(&records))?;
    }
    Ok(tally)
}

/// The machine's valgrind, or the one from the packages.
fn valgrind() -> Result<PathBuf> {
    match process::find("valgrind") {
        Some(found) => Ok(found),
        None => Ok(Root::prepare(false)?.wrappers().join("valgrind")),
    }
}

/// Holds, or why not.
fn judge(counted: u64, record: Option<Record>) -> Result<String, String> {
    let Some(record) = record else {
        return Err("no record: `cargo xtask counts --bless` makes one".to_owned());
    };
    let Record { instructions, ceiling } = record;
    if counted > ceiling {
        return Err(format!("more than its ceiling of {ceiling}"));
    }
    if counted * 100 > instructions * (100 + TOLERANCE) {
        return Err(format!("more than {TOLERANCE} % above its record of {instructions}"));
    }
    Ok(format!("record {instructions}, ceiling {ceiling}"))
}

/// A new record is no reason to fail; a ceiling is still one.
fn blessed(counted: u64, old: Option<Record>) -> Result<String, String> {
    let above = old.filter(|record| counted > record.ceiling);
    above.map_or_else(|| Ok("recorded".to_owned()), |record| judge(counted, Some(record)))
}

fn shown(verdict: &Result<String, String>) -> String {
    match verdict {
        Ok(note) => format!("ok ({note})"),
        Err(why) => format!("FAILED: {why}"),
    }
}

/// The packages with a bench target of that name.
fn with_counts() -> Result<Vec<String>> {
    let data = lint::crates::metadata(&["--no-deps"])?;
    let has = |package: &&serde_json::Value| {
        let mut targets = package["targets"].as_array().into_iter().flatten();
        targets.any(|target| target["name"] == "counts")
    };
    let names = lint::crates::packages(&data)?.iter().filter(has);
    Ok(names.filter_map(|package| package["name"].as_str()).map(String::from).collect())
}

/// Builds the bench and gives its program.
fn build(package: &str) -> Result<PathBuf> {
    let mut command =
        lint::cargo_command(&["bench", "--no-run", "--message-format=json", "--locked"]);
    command.args(["-p", package, "--bench", "counts"]).stderr(std::process::Stdio::inherit());
    let messages = process::output(&mut command)?;
    let mut built = messages.lines().filter_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let named = message["target"]["name"] == "counts";
        named.then(|| message["executable"].as_str().map(PathBuf::from)).flatten()
    });
    built.next_back().with_context(|| format!("{package}: the bench `counts` has no program"))
}

/// Instructions for one iteration.
fn count(valgrind: &Path, bench: &Path, case: &str) -> Result<u64> {
    let [short, long] = RUNS;
    let each = |more: &[&str]| -> Result<u64> {
        let total = |iterations| total(valgrind, bench, case, iterations, more);
        Ok(total(long)?.saturating_sub(total(short)?).div_ceil(long - short))
    };
    Ok(each(&[])?.saturating_sub(each(&["driver"])?))
}

/// Instructions of one whole run, the starting of the program among them.
fn total(valgrind: &Path, bench: &Path, case: &str, iterations: u64, more: &[&str]) -> Result<u64> {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("callgrind");
    let mut command = Command::new(valgrind);
    command.arg("--tool=callgrind").arg(format!("--callgrind-out-file={}", out.display()));
    process::output(command.arg(bench).args([case, &iterations.to_string()]).args(more))?;
    let text = std::fs::read_to_string(&out)?;
    let line = text.lines().find_map(|line| line.strip_prefix("summary: "));
    let number = line.or_else(|| text.lines().find_map(|line| line.strip_prefix("totals: ")));
    Ok(number.context("callgrind wrote no total")?.trim().parse()?)
}

fn read(text: &str) -> Result<Records> {
    let mut records = Records::new();
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        let [package, case, instructions, ceiling] = words[..] else {
            bail!("counts.txt: a line of {} words, 4 wanted: {line}", words.len());
        };
        let record = Record { instructions: instructions.parse()?, ceiling: ceiling.parse()? };
        records.insert((package.to_owned(), case.to_owned()), record);
    }
    Ok(records)
}

fn written(records: &Records) -> String {
    let mut text = "# Instructions for one request, counted by callgrind: `cargo xtask counts`.\n\
                    # crate case instructions ceiling\n"
        .to_owned();
    for ((package, case), Record { instructions, ceiling }) in records {
        text.push_str(&format!("{package} {case} {instructions} {ceiling}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_fails_above_its_ceiling_above_its_record_and_without_one() {
        let record = Some(Record { instructions: 200, ceiling: 300 });
        assert!(judge(190, record).is_ok());
        assert!(judge(204, record).is_ok());
        assert!(judge(205, record).is_err());
        assert!(judge(100, Some(Record { instructions: 90, ceiling: 99 })).is_err());
        assert!(judge(100, None).is_err());
    }

    #[test]
    fn the_record_is_read_as_it_was_written() {
        let text = "a x 1 2\nb y 3 4\n";
        let records = read(text).unwrap();
        assert!(written(&records).ends_with(text));
        assert!(read("a x 1\n").is_err());
    }
}
