//! `outboard soak`: one thing done to a block back-end thousands of times under verified load.
//!
//! Invariant: the soaks are [`outboard_check::soak`]'s; this module only chooses one and shows what came
//! out. Exit codes: 0 all holds, 1 something is wrong, 2 there was nothing to soak.

use std::cell::Cell;
use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use outboard_check::soak::{Options, Report, Soak, SoakError, soak};

use crate::Failure;
use crate::report::{say, spinner};

const EXAMPLES: &str = "\
Examples:
  outboard soak calls -- outboard block --socket-path {socket} scratch.img
  outboard soak memory --count 50 -- COMMAND {socket}
  outboard soak storm -- TWO_DISKS {socket} a.img {load} b.img
  outboard soak rings --json -- COMMAND {socket} | jq '.parts[].figures'

  storm    --count mutated messages (1000000) and a hundredth of reconnects on the device behind
           {socket}, load on the one behind {load}, which the same process must serve
  memory   memory added, removed and swapped --count times (1000), by slots and by tables
  calls    the call descriptor swapped --count times (10000), driver asleep and polling
  rings    rings disabled and enabled, stopped and started, kicked through another descriptor, --count
           times each (10000)
  log      the dirty log switched on, swapped and off --count times (10000), each tenth time as in a
           migration: what was copied is the memory
  kill     the process killed and started again --count times (10000); nothing lost, nothing twice

Every read of the load is checked, and at the end every block. The disk is overwritten.
Exit code: 0 everything holds, 1 something is wrong, 2 there is nothing to soak.";

/// Do one thing to a vhost-user block device thousands of times under verified load.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// What is done: storm, memory, calls, rings, log, kill.
    #[arg(value_name = "SOAK", value_parser = parse_soak)]
    soak: Soak,
    /// How often; each soak has its own default.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Start of everything that is random.
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// Longest wait for one answer, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// The load uses packed rings; the device must offer them.
    #[arg(long)]
    packed: bool,
    /// Answer as one JSON object.
    #[arg(long)]
    json: bool,
    /// The back-end and its arguments; {socket} becomes the path to listen on.
    #[arg(value_name = "COMMAND", last = true, required = true)]
    command: Vec<OsString>,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    for socket in args.soak.sockets() {
        if !args.command.iter().any(|word| word.to_string_lossy().contains(socket)) {
            let name = args.soak.name();
            return Err(Failure::Usage(format!(
                "{name}: the command does not say where {socket} goes; see --help"
            )));
        }
    }
    let options = Options {
        count: args.count.unwrap_or_else(|| args.soak.count()),
        seed: args.seed,
        limit: Duration::from_secs(args.seconds.into()),
        packed: args.packed,
    };
    let report = watch(args, &options).map_err(|error| match error {
        SoakError::NoBackend(_) => Failure::usage(error),
        SoakError::Bench(_) | SoakError::Wrong(_) => Failure::failed(error),
    })?;
    if args.json {
        say(serde_json::to_string_pretty(&report).map_err(Failure::failed)?);
    } else {
        report.parts.iter().for_each(say);
    }
    if report.holds() {
        return Ok(());
    }
    let wrong = report.parts.iter().filter(|part| !part.holds()).count();
    Err(Failure::Failed(format!(
        "{}: {wrong} of {} parts are wrong",
        report.soak,
        report.parts.len()
    )))
}

/// Does it with something to look at: a line that changes on a terminal, else one each ten seconds.
fn watch(args: &Args, options: &Options) -> Result<Report, SoakError> {
    let bar = spinner();
    let shown = Cell::new(Instant::now());
    let report = soak(args.soak, &args.command, options, &|what, done, total| {
        let terminal = std::io::stderr().is_terminal();
        let pause = Duration::from_millis(if terminal { 100 } else { 10_000 });
        if shown.get().elapsed() < pause {
            return;
        }
        shown.set(Instant::now());
        if terminal {
            bar.set_message(format!("{what}: {done} of {total}"));
        } else {
            eprintln!("outboard: {what}: {done} of {total}");
        }
    });
    bar.finish_and_clear();
    report
}

fn parse_soak(name: &str) -> Result<Soak, String> {
    let names = || Soak::ALL.map(Soak::name).join(", ");
    Soak::named(name).ok_or_else(|| format!("there is no such soak; there are {}", names()))
}
