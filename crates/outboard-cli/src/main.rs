//! The `outboard` program: one sub-command, one module.
//!
//! Invariants: a bad option or operand ends with exit code 2 and one clear line on standard error, a
//! failure of the job itself with 1; what a command answers goes to standard output, everything else to
//! standard error; each module has `Args` (clap) and `run`, and knows nothing of the others.

mod bench;
mod block;
mod check;
mod console;
mod ctl;
mod demo;
mod device;
mod fs;
mod lock;
mod log;
mod losses;
mod manual;
mod net;
mod probe;
mod report;
mod rng;
mod serve;
mod service;
mod soak;
mod switch;
mod vsock;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};

use device::{Origin, Prepared};

const EXAMPLES: &str = "\
Examples:
  outboard block --socket-path /run/disk.sock F   serve the file F as a disk for a VMM
  outboard console --socket-path /run/con.sock    give it a console on a terminal of the host
  outboard fs --socket-path /run/fs.sock --shared-dir D     share a directory with it
  outboard net --socket-path /run/net.sock --tap up0   give it a network card
  outboard switch --port /run/a.sock --port /run/b.sock   connect guests to each other
  outboard rng --socket-path /run/rng.sock        give it entropy
  outboard vsock --socket-path /run/vsock.sock --guest-cid 3 --uds-path /run/vm.vsock   give it sockets
  outboard serve vm7.toml                many devices in one process, as a file lists them
  outboard demo                          see it work: a disk, driven, verified and measured
  outboard probe /run/disk.sock          what does this back-end offer?
  outboard bench /run/disk.sock          how fast is it? (random 4 KiB reads, harmless)
  outboard bench a.sock --vs b.sock      which of two is faster?
  outboard check -- COMMAND {socket}     does it keep to the protocol, whatever is thrown at it?
  outboard soak calls -- COMMAND {socket}  ten thousand changes under load: is anything lost?

Every command explains itself with examples: outboard COMMAND --help
Exit code: 0 done, 1 it failed, 2 the command line was wrong.";

/// Virtio devices outside the VMM: run them, drive them, measure them, over vhost-user.
#[derive(Parser)]
#[command(name = "outboard", version, after_help = EXAMPLES, max_term_width = 100)]
#[command(disable_help_subcommand = true, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Block(Box<block::Args>),
    Console(Box<console::Args>),
    Fs(Box<fs::Args>),
    Net(Box<net::Args>),
    Switch(switch::Args),
    Rng(Box<rng::Args>),
    Vsock(Box<vsock::Args>),
    Serve(serve::Args),
    Ctl(ctl::Args),
    Demo(demo::Args),
    Probe(probe::Args),
    Bench(bench::Args),
    Check(check::Args),
    Soak(soak::Args),
    Manual(manual::Args),
}

impl Command {
    /// The device that the command is for; None: it is for none.
    fn device(&self, origin: Origin<'_>) -> Option<Result<Prepared, Failure>> {
        Some(match self {
            Self::Block(args) => block::prepare(args, origin),
            Self::Console(args) => console::prepare(args, origin),
            Self::Net(args) => net::prepare(args, origin),
            Self::Fs(args) => fs::prepare(args, origin),
            Self::Rng(args) => rng::prepare(args, origin),
            Self::Vsock(args) => vsock::prepare(args, origin),
            _ => return None,
        })
    }
}

/// Why a command ended without success: the exit code and the one line that says it.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line is wrong, or names something that is not there: exit code 2.
    Usage(String),
    /// The job was tried and failed: exit code 1.
    Failed(String),
}

impl Failure {
    /// A failure of the job, from any error.
    pub(crate) fn failed(error: impl std::fmt::Display) -> Self {
        Self::Failed(error.to_string())
    }

    /// A wrong command line, from any error.
    pub(crate) fn usage(error: impl std::fmt::Display) -> Self {
        Self::Usage(error.to_string())
    }

    fn report(self) -> ExitCode {
        let (code, line) = match self {
            Self::Usage(line) => (2, line),
            Self::Failed(line) => (1, line),
        };
        eprintln!("outboard: {line}");
        ExitCode::from(code)
    }
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return answer_parser(&error),
    };
    log::start();
    let outcome = match cli.command {
        Command::Block(args) => block::run(&args),
        Command::Console(args) => console::run(&args),
        Command::Fs(args) => fs::run(&args),
        Command::Net(args) => net::run(&args),
        Command::Switch(args) => switch::run(&args),
        Command::Rng(args) => rng::run(&args),
        Command::Vsock(args) => vsock::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Ctl(args) => ctl::run(&args),
        Command::Demo(args) => demo::run(args),
        Command::Probe(args) => probe::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Check(args) => check::run(args),
        Command::Soak(args) => soak::run(&args),
        Command::Manual(args) => manual::run(&args, Cli::command()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

/// Help and version go where the user asked for them; a wrong command line becomes one line.
fn answer_parser(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A closed pipe is the reader's choice.
            let _ = error.print();
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = Cli::command().print_help();
            ExitCode::from(2)
        }
        _ => Failure::Usage(one_line(&error.to_string())).report(),
    }
}

/// The parser's first paragraph and its tip, on one line.
fn one_line(text: &str) -> String {
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let first = text.split("\n\n").next().unwrap_or(text);
    let mut line = first.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((_, tip)) = text.split_once("tip: ") {
        let tip = tip.split("\n\n").next().unwrap_or(tip);
        line.push_str("; ");
        line.push_str(&tip.split_whitespace().collect::<Vec<_>>().join(" "));
    }
    line.push_str("; see --help");
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_wrong_option_becomes_one_line_that_names_it() {
        let error = Cli::try_parse_from(["outboard", "probe", "s", "--jsom"]).err().expect("wrong");
        let line = one_line(&error.to_string());
        assert!(line.contains("--jsom") && line.contains("--json"), "{line}");
        assert_eq!(line.lines().count(), 1, "{line}");
    }

    #[test]
    fn a_missing_operand_becomes_one_line_that_names_it() {
        let error = Cli::try_parse_from(["outboard", "probe"]).err().expect("wrong");
        let line = one_line(&error.to_string());
        assert!(line.contains("<SOCKET>"), "{line}");
        assert_eq!(line.lines().count(), 1, "{line}");
    }
}
