//! `cargo xtask`: the project's chores. `cargo xtask help` lists them.

mod guest_command;

use clap::{Parser, Subcommand};
use std::process::ExitCode;
use xtask::packages::Root;
use xtask::{bench, cases, counts, fuzz, guards, judged, lint, soak, suite};

/// Outboard's own chores.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Run every test: units, guests, documentation, loom models, instruction counts
    ///
    /// What cannot run here is reported as `SKIPPED name: why`; with CI=true that is a failure.
    Test {
        /// Only these steps (repeat or separate by commas)
        #[arg(long, value_delimiter = ',')]
        only: Vec<suite::Step>,
    },
    /// Boot a small Linux with our devices and run scripts in it
    Guest(guest_command::Options),
    /// Fetch and unpack the Debian packages that guests are made of; nothing is installed
    Packages {
        /// Ask for newer packages, and unpack again
        #[arg(long)]
        refresh: bool,
    },
    /// Check formatting, lints, documentation, licences, size limits, arrows between crates
    Lint,
    /// Run the fuzz targets, each for so long
    Fuzz {
        /// Seconds for each target
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// Only this target
        target: Option<String>,
    },
    /// Plant the defects of fuzz/planted.txt one by one, in a copy: a test and a fuzz target find each
    Plant {
        /// Seconds that a target has to find one
        #[arg(long, default_value_t = 120)]
        seconds: u64,
        /// Only those whose title has this in it
        only: Option<String>,
    },
    /// Our disk beside other people's on the same work, in turns: writes docs/performance.md
    Bench(bench::Options),
    /// Count instructions per request with callgrind, against xtask/counts.txt
    Counts {
        /// Write what was counted as the new record
        #[arg(long)]
        bless: bool,
    },
    /// The big counts: one thing done thousands of times to our disk under verified load
    Soak(soak::Options),
    /// Judge our devices and other people's, and write docs/judged.md
    ///
    /// Fetches DPDK's packages and builds virtiofsd the first time; takes minutes for each program.
    Judged {
        /// Only these programs (repeat or separate by commas)
        #[arg(long, value_delimiter = ',')]
        only: Vec<String>,
        /// Shorter silences, smaller storms
        #[arg(long)]
        quick: bool,
    },
    /// Write docs/cases.md: which test holds which hostile case of xtask/cases.txt
    Cases {
        /// Write nothing; fail when the table is not up to date or a case is missing
        #[arg(long)]
        check: bool,
    },
    /// Take the guards of xtask/guards.txt away one by one, in a copy, and see their tests fail
    Guards {
        /// Only those of these hostile cases
        ids: Vec<String>,
        /// Print the table as JSON
        #[arg(long)]
        json: bool,
        /// Build nothing: see that every guard and its test are still there
        #[arg(long, conflicts_with_all = ["ids", "json"])]
        check: bool,
    },
}

fn main() -> ExitCode {
    let done = match Arguments::parse().chore {
        Chore::Test { only } => suite::run(&only),
        Chore::Guest(options) => guest_command::run(&options),
        Chore::Packages { refresh } => packages(refresh),
        Chore::Lint => lint::run(),
        Chore::Fuzz { seconds, target } => fuzz::run(seconds, target.as_deref()).and_then(closing),
        Chore::Plant { seconds, only } => fuzz::plant::run(seconds, only.as_deref()),
        Chore::Bench(options) => bench::run(&options),
        Chore::Counts { bless } => counts::run(bless).and_then(closing),
        Chore::Soak(options) => soak::run(&options),
        Chore::Judged { only, quick } => judged::run(&only, quick),
        Chore::Cases { check } => cases::run(check),
        Chore::Guards { check: true, .. } => guards::check().map(|note| println!("guards: {note}")),
        Chore::Guards { ids, json, .. } => guards::run(&ids, json),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn packages(refresh: bool) -> anyhow::Result<()> {
    let root = Root::prepare(refresh)?;
    Root::prepare_tools(refresh)?;
    Root::prepare_peers(refresh)?;
    println!(
        "packages: {} in {}, kernel {}, User-mode Linux {}",
        root.contents()?.len(),
        root.path("").display(),
        root.kernel_release()?,
        root.uml_release()?,
    );
    Ok(())
}

fn closing(tally: xtask::summary::Tally) -> anyhow::Result<()> {
    println!("{tally}");
    anyhow::ensure!(tally.failed == 0, "{} failed", tally.failed);
    Ok(())
}
