//! `outboard bench`: load one block device, or two in turns, and show what came of it.
//!
//! Invariant: figures are medians of rounds that [`outboard_check::bench`] measured; with `--vs` the two
//! take turns, round by round, so that a ratio compares the same moments of the machine.

use std::path::PathBuf;
use std::time::Duration;

use outboard_check::bench::{
    BenchError, Comparison, Driving, Load, Round, Setup, Summary, Target, Workload, compare,
    summary,
};
use serde::Serialize;

use crate::Failure;
use crate::probe::connect_failure;
use crate::report::{Table, bytes, maybe, micros, parse_size, process_name, say, short, spinner};

const EXAMPLES: &str = "\
Examples:
  outboard bench disk.sock                               random 4 KiB reads, 32 at a time
  outboard bench disk.sock --depth 1,32 --driver sleep   latency and throughput, as a guest sees them
  outboard bench disk.sock --rw randwrite,randrw --span 1G
  outboard bench disk.sock --rw write --bs 1M --depth 8  sequential writes of 1 MiB
  outboard bench disk.sock --rw randrw --verify          is every byte what was written?
  outboard bench ours.sock --vs theirs.sock --rounds 5 --cpu 0
                                                         side by side, A B A B, medians and ratios
  outboard bench disk.sock --json | jq '.cases[].a.median.iops'

Reads are harmless; writes and --verify destroy what is on the disk (within --span).
The back-end's CPU time is that of its whole process. It works with any vhost-user-blk back-end.";

/// Load a vhost-user block device and measure it: IOPS, MiB/s, latency, the back-end's CPU per I/O.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The socket that the back-end listens on.
    #[arg(value_name = "SOCKET")]
    socket: PathBuf,
    /// A second back-end to measure in turns with the first.
    #[arg(long, value_name = "SOCKET2")]
    vs: Option<PathBuf>,
    /// Loads: randread, read, randwrite, write, randrw, rw.
    #[arg(long, value_name = "LOAD,…", value_delimiter = ',', default_value = "randread", value_parser = parse_workload)]
    rw: Vec<Workload>,
    /// Share of reads in randrw and rw, in percent.
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u8).range(1..=99))]
    mix: u8,
    /// Size of each request.
    #[arg(long, value_name = "SIZE", default_value = "4k", value_parser = parse_block)]
    bs: u32,
    /// Requests under way on each queue.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "32", value_parser = clap::value_parser!(u16).range(1..=4096))]
    depth: Vec<u16>,
    /// Number of queues.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    queues: u16,
    /// Driver threads; the queues are dealt out to them.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    threads: u16,
    /// CPUs for the driver threads, in turn.
    #[arg(long, value_name = "CPU,…", value_delimiter = ',')]
    cpu: Vec<usize>,
    /// Length of one round in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0, value_parser = parse_seconds)]
    seconds: f64,
    /// Rounds of each load; figures are their medians.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Whether the driver polls the ring or sleeps until it is called.
    #[arg(long, value_name = "HOW", default_value = "poll")]
    driver: Driver,
    /// Use only this much of the disk, from its start.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    span: Option<u64>,
    /// Write the span first, check every read, read it all back at the end.
    #[arg(long)]
    verify: bool,
    /// Put requests into indirect tables, of both devices or of one.
    #[arg(long, value_name = "OF", num_args = 0..=1, require_equals = true, default_missing_value = "both")]
    indirect: Option<Side>,
    /// Use packed rings, with both devices or with one; it must offer them.
    #[arg(long, value_name = "OF", num_args = 0..=1, require_equals = true, default_missing_value = "both")]
    packed: Option<Side>,
    /// Longest wait for one answer, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// Answer as one JSON object.
    #[arg(long)]
    json: bool,
}

/// For which device an option holds.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Side {
    /// Both.
    Both,
    /// SOCKET.
    A,
    /// The one given with --vs.
    B,
}

impl Side {
    /// Whether the device at this place is meant.
    fn has(wanted: Option<Self>, at: usize) -> bool {
        match wanted {
            None => false,
            Some(Self::Both) => true,
            Some(Self::A) => at == 0,
            Some(Self::B) => at == 1,
        }
    }
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Driver {
    /// Spin on the ring, no calls.
    Poll,
    /// Sleep until called.
    Sleep,
}

/// Everything that was measured.
#[derive(Serialize)]
struct Answer {
    a: String,
    b: Option<String>,
    block_size: u32,
    queues: u16,
    threads: u16,
    driver: &'static str,
    verified: bool,
    cases: Vec<Case>,
}

/// One load at one depth.
#[derive(Serialize)]
struct Case {
    load: &'static str,
    depth: u16,
    a: Summary,
    b: Option<Summary>,
    iops_ratio: Option<f64>,
    p50_ratio: Option<f64>,
    cpu_ratio: Option<f64>,
}

/// Runs the command.
pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let mut targets = Vec::new();
    for (at, socket) in std::iter::once(&args.socket).chain(&args.vs).enumerate() {
        targets.push(Target::open(socket, setup(&args, at)).map_err(failure)?);
    }
    let progress = spinner();
    let mut cases = Vec::new();
    for &workload in &args.rw {
        for &depth in &args.depth {
            let load = load(&args, workload, depth);
            let rounds = measure(&mut targets, &load, args.rounds, &progress)?;
            cases.extend(case(&load, &rounds));
        }
    }
    progress.finish_and_clear();
    let answer = Answer {
        a: args.socket.display().to_string(),
        b: args.vs.as_ref().map(|path| path.display().to_string()),
        block_size: args.bs,
        queues: args.queues,
        threads: args.threads.min(args.queues),
        driver: match args.driver {
            Driver::Poll => "poll",
            Driver::Sleep => "sleep",
        },
        verified: args.verify,
        cases,
    };
    if args.json {
        say(serde_json::to_string_pretty(&answer).map_err(Failure::failed)?);
    } else {
        let table = if answer.b.is_some() { side_by_side(&answer) } else { alone(&answer) };
        say(heading(&args, &answer, &mut targets));
        say(table.to_string().trim_end());
    }
    Ok(())
}

fn setup(args: &Args, at: usize) -> Setup {
    Setup {
        queues: args.queues,
        depth: args.depth.iter().copied().max().unwrap_or(1),
        block_size: args.bs,
        indirect: Side::has(args.indirect, at),
        packed: Side::has(args.packed, at),
        timeout: Duration::from_secs(args.timeout),
    }
}

fn load(args: &Args, workload: Workload, depth: u16) -> Load {
    let mixed = (1..100).contains(&workload.read_percent);
    let read_percent = if mixed { args.mix } else { workload.read_percent };
    Load {
        workload: Workload { read_percent, ..workload },
        block_size: args.bs,
        depth,
        duration: Duration::from_secs_f64(args.seconds),
        driving: match args.driver {
            Driver::Poll => Driving::Poll,
            Driver::Sleep => Driving::Sleep,
        },
        threads: args.threads,
        cpus: args.cpu.clone(),
        span: args.span,
        verify: args.verify,
        seed: 1,
    }
}

/// Rounds in turns; one list for each target.
fn measure(
    targets: &mut [Target],
    load: &Load,
    count: u16,
    progress: &indicatif::ProgressBar,
) -> Result<Vec<Vec<Round>>, Failure> {
    let mut rounds = vec![Vec::new(); targets.len()];
    for turn in 0..count {
        for (at, (target, rounds)) in targets.iter_mut().zip(&mut rounds).enumerate() {
            let name = if at == 0 { "A" } else { "B" };
            progress.set_message(format!(
                "{name}: {} at depth {}, round {} of {count}",
                load.workload.name(),
                load.depth,
                turn + 1
            ));
            let load = Load { seed: u64::from(turn) + 1, ..load.clone() };
            rounds.push(target.round(&load).map_err(failure)?);
        }
    }
    Ok(rounds)
}

fn case(load: &Load, rounds: &[Vec<Round>]) -> Option<Case> {
    let (load, depth) = (load.workload.name(), load.depth);
    match rounds {
        [a, b] => {
            let Comparison { a, b, iops_ratio, p50_ratio, cpu_ratio } = compare(a, b)?;
            let (iops_ratio, p50_ratio) = (Some(iops_ratio), Some(p50_ratio));
            Some(Case { load, depth, a, b: Some(b), iops_ratio, p50_ratio, cpu_ratio })
        }
        rounds => {
            let a = summary(rounds.first()?)?;
            let (iops_ratio, p50_ratio, cpu_ratio) = (None, None, None);
            Some(Case { load, depth, a, b: None, iops_ratio, p50_ratio, cpu_ratio })
        }
    }
}

fn heading(args: &Args, answer: &Answer, targets: &mut [Target]) -> String {
    let mut text = String::new();
    for (name, (socket, target)) in
        ["A", "B"].iter().zip(std::iter::once(&answer.a).chain(&answer.b).zip(targets))
    {
        let process =
            target.device().vmm().connection().peer_pid().map_or_else(String::new, process_name);
        let name = if answer.b.is_some() { format!("{name}: ") } else { String::new() };
        let size = bytes(target.device().config().bytes());
        text.push_str(&format!("{name}{socket}{process}, {size}\n"));
    }
    let plural =
        |count: u16, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
    text.push_str(&format!(
        "{} requests, {}, {}, driver {}s, medians of {} of {} s{}\n",
        bytes(u64::from(answer.block_size)),
        plural(answer.queues, "queue"),
        plural(answer.threads, "driver thread"),
        answer.driver,
        plural(args.rounds, "round"),
        args.seconds,
        if answer.verified { ", every byte verified" } else { "" }
    ));
    text
}

/// The figures of one back-end.
fn alone(answer: &Answer) -> Table {
    let mut table = Table::new([
        "load",
        "depth",
        "IOPS",
        "MiB/s",
        "mean µs",
        "p50",
        "p99",
        "p99.9",
        "max",
        "CPU µs/IO",
        "kicks/IO",
    ]);
    for case in &answer.cases {
        let round = case.a.median;
        table.row([
            case.load.to_owned(),
            case.depth.to_string(),
            short(round.iops),
            short(round.mib_per_second),
            micros(round.latency.mean_us),
            micros(round.latency.p50_us),
            micros(round.latency.p99_us),
            micros(round.latency.p999_us),
            micros(round.latency.max_us),
            maybe(round.backend_cpu_us_per_io),
            format!("{:.3}", round.kicks_per_io),
        ]);
    }
    table
}

/// The figures of two back-ends, with ratios.
fn side_by_side(answer: &Answer) -> Table {
    let mut table = Table::new([
        "load",
        "depth",
        "A IOPS",
        "B IOPS",
        "A/B",
        "A p50 µs",
        "B p50 µs",
        "A/B",
        "A p99",
        "B p99",
        "A CPU µs/IO",
        "B CPU µs/IO",
        "A/B",
    ]);
    for case in &answer.cases {
        let (a, b) = (case.a.median, case.b.as_ref().map_or(case.a.median, |b| b.median));
        table.row([
            case.load.to_owned(),
            case.depth.to_string(),
            short(a.iops),
            short(b.iops),
            maybe(case.iops_ratio),
            micros(a.latency.p50_us),
            micros(b.latency.p50_us),
            maybe(case.p50_ratio),
            micros(a.latency.p99_us),
            micros(b.latency.p99_us),
            maybe(a.backend_cpu_us_per_io),
            maybe(b.backend_cpu_us_per_io),
            maybe(case.cpu_ratio),
        ]);
    }
    table
}

/// A load that does not fit the device is a wrong command line; anything else is a failure.
fn failure(error: BenchError) -> Failure {
    match error {
        BenchError::Frontend(outboard_frontend::Error::Queue(_))
        | BenchError::Load(_)
        | BenchError::Host { .. } => Failure::usage(error),
        BenchError::Frontend(error) => connect_failure(error),
        other => Failure::failed(other),
    }
}

fn parse_workload(text: &str) -> Result<Workload, String> {
    Workload::named(text).ok_or_else(|| {
        "no such load; known are randread, read, randwrite, write, randrw, rw".to_owned()
    })
}

fn parse_block(text: &str) -> Result<u32, String> {
    let size = parse_size(text)?;
    u32::try_from(size)
        .ok()
        .filter(|size| (512..=16 << 20).contains(size))
        .ok_or_else(|| format!("{text} is not from 512 bytes to 16 MiB"))
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("'{text}' is no number of seconds"))?;
    if seconds > 0.0 && seconds <= 86_400.0 {
        return Ok(seconds);
    }
    Err(format!("{text} seconds are not from 0 to 86400"))
}
