//! `outboard check`: judges a back-end, ours or anybody's.
//!
//! Invariant: the checks are [`outboard_check::judge`]'s; this module only chooses them and shows what
//! came out. Exit codes: 0 all hold, 1 something is wrong, 2 it could not be judged.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use outboard_check::judge::{
    Expected, Group, JudgeError, Judgement, Options, Report, Target, checks, judge, musts,
};

use crate::Failure;
use crate::report::{say, spinner};

const EXAMPLES: &str = "\
Examples:
  outboard check -- outboard block --socket-path {socket} scratch.img
  outboard check -- qemu-storage-daemon --blockdev driver=file,filename=F,node-name=d \\
      --export type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={socket},writable=on
  outboard check --socket /run/disk.sock       judge one that runs already
  outboard check --list                        what is checked, and why
  outboard check --musts                       what the specification demands, and the checks of each
  outboard check --only hostile -- COMMAND     one group; or a part of an id, or of a section
  outboard check --expect known.txt --junit out.xml -- COMMAND

With a command, every check has a fresh process, killed afterwards; {socket} is the path that it must
listen on. Give it a scratch image: checks read, write a few sectors and put them back, and a back-end
with a defect may do more. With --socket the checks share one process, and those that kill come last.

A list of expected failures has a line ID VERDICT REASON for each; the verdict may be 'any'.
Exit code: 0 everything holds or is not offered, 1 something is wrong, 2 it could not be judged.";

/// Judge a vhost-user back-end: conformance, semantics, rings, hostile peers, leaks.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Judge the back-end that listens on this socket.
    #[arg(long, value_name = "PATH", conflicts_with = "command")]
    socket: Option<PathBuf>,
    /// The back-end and its arguments; {socket} becomes the path to listen on.
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
    /// Only checks with this in their id, group or section (repeatable).
    #[arg(long, value_name = "PATTERN")]
    only: Vec<String>,
    /// Show the checks and leave.
    #[arg(long)]
    list: bool,
    /// Show what the specification demands with "must", and the checks of each demand.
    #[arg(long)]
    musts: bool,
    /// Longest wait for one answer, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0, value_parser = parse_seconds)]
    seconds: f64,
    /// Listen to silence for a shorter time and storm less.
    #[arg(long)]
    quick: bool,
    /// Failures that are known, with a reason each.
    #[arg(long, value_name = "FILE")]
    expect: Option<PathBuf>,
    /// Where the mutations of the storm begin.
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// Answer as one JSON object.
    #[arg(long)]
    json: bool,
    /// Write a JUnit report as well.
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
}

/// Runs the command.
pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let options = Options {
        limit: Duration::from_secs_f64(args.seconds),
        quick: args.quick,
        only: args.only,
        expected: read_expected(args.expect.as_deref())?,
        seed: args.seed,
    };
    if args.list {
        return list(&options, args.json);
    }
    if args.musts {
        return demands(args.json);
    }
    let target = match (args.socket, args.command) {
        (Some(path), _) => Target::Socket(path),
        (None, words) => command(words)?,
    };
    let report = watch(&target, &options, args.json).map_err(Failure::usage)?;
    if let Some(path) = args.junit {
        std::fs::write(&path, report.junit())
            .map_err(|error| Failure::failed(format!("{}: {error}", path.display())))?;
    }
    if args.json {
        say(serde_json::to_string_pretty(&report).map_err(Failure::failed)?);
    } else {
        say(report.summary());
    }
    for id in report.stale(&options.expected) {
        eprintln!("outboard: {id} is listed as an expected failure and did not fail");
    }
    match report.exit_code() {
        0 => Ok(()),
        1 => Err(Failure::Failed(format!("not everything holds: {}", report.summary()))),
        _ => Err(Failure::Usage("some checks could not be judged".to_owned())),
    }
}

fn watch(target: &Target, options: &Options, silent: bool) -> Result<Report, JudgeError> {
    let bar = spinner();
    let mut group: Option<Group> = None;
    let report = judge(target, options, |one: &Judgement| {
        bar.set_message(one.check.id);
        if silent {
            return;
        }
        bar.suspend(|| {
            if group.replace(one.check.group) != Some(one.check.group) {
                say(format_args!("{}", one.check.group.name()));
            }
            say(format_args!("  {}", one.line()));
        });
    });
    bar.finish_and_clear();
    report
}

fn list(options: &Options, json: bool) -> Result<(), Failure> {
    let wanted: Vec<_> = checks().filter(|check| options.wants(check)).collect();
    if json {
        say(serde_json::to_string_pretty(&wanted).map_err(Failure::failed)?);
        return Ok(());
    }
    for group in Group::ALL {
        let all: Vec<_> = wanted.iter().filter(|check| check.group == group).collect();
        if all.is_empty() {
            continue;
        }
        say(format_args!("{} ({})", group.name(), all.len()));
        for check in all {
            say(format_args!("  {:<28} {} [{}]", check.id, check.title, check.section));
        }
    }
    say(format_args!("{} checks; {}", wanted.len(), demands_in_one_line()));
    Ok(())
}

/// The demands of the specification, with how many checks look at each.
fn demands(json: bool) -> Result<(), Failure> {
    if json {
        say(serde_json::to_string_pretty(musts()).map_err(Failure::failed)?);
        return Ok(());
    }
    for must in musts() {
        say(format_args!("{:>2}  [{}] {}", must.checks.len(), must.section, must.demand));
        let why = if must.checks.is_empty() { must.unseen } else { &must.checks.join(" ") };
        say(format_args!("      {why}"));
    }
    say(demands_in_one_line());
    Ok(())
}

fn demands_in_one_line() -> String {
    let seen = musts().iter().filter(|must| !must.checks.is_empty());
    let least = seen.clone().map(|must| must.checks.len()).min().unwrap_or(0);
    let most = seen.clone().map(|must| must.checks.len()).max().unwrap_or(0);
    format!(
        "{} demands of the specification: {} with {least} to {most} checks each, {} that cannot be seen from outside",
        musts().len(),
        seen.clone().count(),
        musts().len() - seen.count(),
    )
}

fn command(words: Vec<OsString>) -> Result<Target, Failure> {
    if words.is_empty() {
        return Err(Failure::usage(
            "nothing to judge: give --socket PATH or a command; see --help",
        ));
    }
    if !words.iter().any(|word| word.to_string_lossy().contains("{socket}")) {
        return Err(Failure::usage("the command does not say where {socket} goes; see --help"));
    }
    Ok(Target::Command(words))
}

fn read_expected(path: Option<&Path>) -> Result<Expected, Failure> {
    let Some(path) = path else { return Ok(Expected::default()) };
    let wrong =
        |error: &dyn std::fmt::Display| Failure::usage(format!("{}: {error}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| wrong(&error))?;
    Expected::parse(&text).map_err(|error| wrong(&error))
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && (0.05..=3600.0).contains(&value) => Ok(value),
        _ => Err(format!("'{text}' is no number of seconds from 0.05 to 3600")),
    }
}
