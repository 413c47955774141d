//! `cargo xtask soak`: the big counts. Builds our programs for release, has `outboard soak` do one thing
//! to them thousands of times, and keeps the figures in `docs/soak.md` when asked to.
//!
//! Invariants: the soaks are `outboard_check::soak`'s, so that they fit anybody's back-end; a soak that
//! is wrong is a failure and is not kept; the table has one row for each part of a soak, the last one
//! that was kept.

use crate::{lint, paths, process};
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What can be soaked, as `outboard soak` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Soak {
    /// 1000000 mutated messages and 10000 reconnects on one disk, load on another of the same process.
    Storm,
    /// Memory added, removed and swapped, 1000 times each way.
    Memory,
    /// Call descriptors swapped, 10000 times each way.
    Calls,
    /// Rings disabled, stopped, kicked otherwise, 10000 times each.
    Rings,
    /// The dirty log switched on, swapped and off 10000 times.
    Log,
    /// The process killed and started again 10000 times.
    Kill,
}

impl Soak {
    const ALL: [Self; 6] =
        [Self::Storm, Self::Memory, Self::Calls, Self::Rings, Self::Log, Self::Kill];

    const fn name(self) -> &'static str {
        match self {
            Self::Storm => "storm",
            Self::Memory => "memory",
            Self::Calls => "calls",
            Self::Rings => "rings",
            Self::Log => "log",
            Self::Kill => "kill",
        }
    }
}

/// What to soak, and how.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  cargo xtask soak                       all of them, about fifteen minutes
  cargo xtask soak calls --count 100     a quick look
  cargo xtask soak storm --keep          and keep the figures in docs/soak.md

Other people's back-ends: outboard soak --help.")]
pub struct Options {
    /// Which; all when none is named.
    #[arg(value_name = "SOAK")]
    soaks: Vec<Soak>,
    /// How often; each soak has its own default.
    #[arg(long, value_name = "NUMBER")]
    count: Option<u64>,
    /// Answer as JSON: a list of `outboard soak --json`.
    #[arg(long)]
    json: bool,
    /// Keep the figures in docs/soak.md.
    #[arg(long)]
    keep: bool,
    /// Build nothing: the programs lie here (`outboard`, `examples/disks`).
    #[arg(long, value_name = "FOLDER")]
    programs: Option<PathBuf>,
}

/// Does them, one after the other.
///
/// # Errors
/// When our programs do not build, or a soak found something wrong.
pub fn run(options: &Options) -> Result<()> {
    let programs = options.programs.clone().map_or_else(build, Ok)?;
    let folder = paths::xtask()?.join("soak");
    std::fs::create_dir_all(&folder)?;
    let chosen = if options.soaks.is_empty() { &Soak::ALL } else { options.soaks.as_slice() };
    let (mut reports, mut wrong) = (Vec::new(), Vec::new());
    for soak in chosen {
        let (report, well) = one(*soak, options.count, &programs, &folder)?;
        if !options.json {
            shown(&report).iter().for_each(|line| println!("soak: {line}"));
        }
        if !well {
            wrong.push(soak.name());
        } else if options.keep {
            keep(*soak, options.count, &report)?;
        }
        reports.push(report);
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&reports)?);
    }
    ensure!(wrong.is_empty(), "wrong: {}", wrong.join(", "));
    Ok(())
}

/// Builds our programs for release; their folder.
fn build() -> Result<PathBuf> {
    let mut build = lint::cargo_command(&["build", "--release", "--locked"]);
    build.args(["-p", "outboard-cli", "-p", "outboard-devices", "--bins", "--examples"]);
    process::run(build.stdout(Stdio::null()))?;
    Ok(paths::target()?.join("release"))
}

/// One soak: its report, and whether everything holds.
fn one(soak: Soak, count: Option<u64>, programs: &Path, folder: &Path) -> Result<(Value, bool)> {
    // The storm is about stalls: not about those of the disk below, where there is a folder in memory.
    let memory = match soak {
        Soak::Storm => tempfile::tempdir_in("/dev/shm").ok(),
        _ => None,
    };
    let folder = memory.as_ref().map_or(folder, tempfile::TempDir::path);
    let image = |name: &str| -> Result<PathBuf> {
        let path = folder.join(name);
        std::fs::File::create(&path)?.set_len(64 << 20)?;
        Ok(path)
    };
    let outboard = programs.join("outboard");
    let mut command = Command::new(&outboard);
    command.args(["soak", soak.name(), "--json"]);
    if let Some(count) = count {
        command.args(["--count", &count.to_string()]);
    }
    command.arg("--");
    match soak {
        Soak::Storm => command
            .arg(programs.join("examples/disks"))
            .arg("{socket}")
            .arg(image("a.img")?)
            .arg("{load}")
            .arg(image("b.img")?),
        _ => {
            command.arg(&outboard).args(["block", "--socket-path", "{socket}"]).arg(image("a.img")?)
        }
    };
    // The devices' own log is kept by the soak; its progress goes where we show ours.
    command.env("OUTBOARD_LOG", "error").stdin(Stdio::null()).stderr(Stdio::inherit());
    let done = command.output().with_context(|| process::shown(&command))?;
    if done.status.code() == Some(2) {
        // Nothing to soak: it has said why.
        return Ok((Value::Null, false));
    }
    let report = serde_json::from_slice(&done.stdout)
        .with_context(|| format!("{}: {}", done.status, process::shown(&command)))?;
    Ok((report, done.status.success()))
}

/// A line for each part.
fn shown(report: &Value) -> Vec<String> {
    let parts = report["parts"].as_array().into_iter().flatten();
    parts
        .map(|part| {
            let what = part["what"].as_str().unwrap_or_default();
            let wrong =
                part["wrong"].as_str().map_or(String::new(), |why| format!("; WRONG: {why}"));
            format!("{what}: {}, {:.0} s; {}{wrong}", part["count"], seconds(part), figures(part))
        })
        .collect()
}

fn seconds(part: &Value) -> f64 {
    part["seconds"].as_f64().unwrap_or_default()
}

/// All figures of a part, with their units.
fn figures(part: &Value) -> String {
    let all = part["figures"].as_array().into_iter().flatten();
    let text = |figure: &Value| {
        let value = figure["value"].as_f64().unwrap_or_default();
        let digits = usize::from(value.fract() != 0.0 && value.abs() < 100.0) * 2;
        let unit = figure["unit"].as_str().unwrap_or_default();
        let name = figure["name"].as_str().unwrap_or_default();
        // `RSS +` and the like carry their sign in the name.
        let space = if name.ends_with('+') && value >= 0.0 { "" } else { " " };
        format!("{name}{space}{value:.digits$} {unit}").trim_end().to_owned()
    };
    all.map(text).collect::<Vec<_>>().join("; ")
}

const HEAD: &str = "\
# Soaks
What was done very often to our block device under verified load, and what came of it: every read is
checked against what was written, every block at the end. Written by `cargo xtask soak --keep`; times are
those of a machine with two virtual processors that others used as well, and mean little alone.

| soak | what | count | figures | date | command |
|---|---|---|---|---|---|
";

/// Puts the report's parts in the place of those that the table had of this soak.
fn keep(soak: Soak, count: Option<u64>, report: &Value) -> Result<()> {
    let path = paths::workspace().join("docs/soak.md");
    let date = process::output(Command::new("date").args(["-u", "+%F"]))?;
    let often = count.map_or(String::new(), |count| format!(" --count {count}"));
    let (name, date) = (soak.name(), date.trim());
    let row = |part: &Value| {
        let what = part["what"].as_str().unwrap_or_default();
        let (count, figures, seconds) = (&part["count"], figures(part), seconds(part));
        format!(
            "| {name} | {what} | {count} in {seconds:.0} s | {figures} | {date} | \
             `cargo xtask soak {name}{often}` |"
        )
    };
    let rows: Vec<_> = report["parts"].as_array().into_iter().flatten().map(row).collect();
    let old = std::fs::read_to_string(&path).unwrap_or_default();
    std::fs::write(&path, merged(&old, soak, &rows))?;
    Ok(())
}

/// The table with other rows for one soak; soaks keep their order.
fn merged(old: &str, soak: Soak, rows: &[String]) -> String {
    let mut text = HEAD.to_owned();
    for one in Soak::ALL {
        let start = format!("| {} |", one.name());
        let kept = old.lines().filter(|line| line.starts_with(&start)).map(str::to_owned);
        let lines = if one == soak { rows.to_vec() } else { kept.collect() };
        lines.iter().for_each(|line| {
            text.push_str(line);
            text.push('\n');
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_soak_that_is_done_again_replaces_its_own_rows_only() {
        let row = |name: &str, what: &str| format!("| {name} | {what} | 1 |");
        let first = merged("", Soak::Calls, &[row("calls", "a"), row("calls", "b")]);
        let both = merged(&first, Soak::Storm, &[row("storm", "c")]);
        let again = merged(&both, Soak::Calls, &[row("calls", "d")]);
        let rows: Vec<_> = again.lines().filter(|line| line.ends_with("| 1 |")).collect();
        assert_eq!(rows, [row("storm", "c"), row("calls", "d")]);
        assert!(again.starts_with(HEAD));
    }

    #[test]
    fn figures_have_their_units_and_no_digits_that_nobody_reads() {
        let part = serde_json::json!({ "figures": [
            { "name": "longest stall", "value": 12.345, "unit": "ms" },
            { "name": "RSS +", "value": 40.0, "unit": "KiB" },
            { "name": "verified requests", "value": 123_456.0, "unit": "" },
        ]});
        assert_eq!(figures(&part), "longest stall 12.35 ms; RSS +40 KiB; verified requests 123456");
    }
}
