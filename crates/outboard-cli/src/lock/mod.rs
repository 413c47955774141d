//! Locks a device program in before it reads the first byte of a peer: no new privileges, no files but its
//! own (Landlock), a filter of system calls.
//!
//! Invariant: what the program stands on is open by then. What the system cannot do is told in one warning, and ends the
//! program (exit code 2) if it was asked for by name.

mod calls;
mod files;
mod filter;

use clap::ValueEnum;
use outboard::Inspect;
use tracing::{info, warn};

pub(crate) use files::Reach;

use crate::Failure;

/// What a program is, for what it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    /// A device that has open what it stands on.
    Device,
    /// A shared directory.
    Share,
    /// All kinds of devices, also later ones.
    Serve,
}

impl Program {
    /// Whether guests reach files by name.
    fn shares_files(self) -> bool {
        matches!(self, Self::Share | Self::Serve)
    }
}

/// What becomes of a system call that a device program does not need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Seccomp {
    /// It fails; what only an attacker does (execve, ptrace, mount ...) ends the program.
    Errno,
    /// It ends the program.
    Kill,
    /// It is done, and stands in the system's log.
    Log,
    /// There is no filter.
    None,
}

/// How a program other than a shared directory's is kept from files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sandbox {
    /// It reaches no file but what it has open or makes itself.
    Landlock,
    /// It reaches what its user may.
    None,
}

/// Whether the program is kept from files.
#[derive(clap::Args, Clone, Default)]
pub(crate) struct SandboxArgs {
    /// What keeps the device from files that are not its own; landlock by default, where the system has it.
    #[arg(long, value_enum, value_name = "HOW", help_heading = "Lock")]
    sandbox: Option<Sandbox>,
}

impl SandboxArgs {
    /// Keeps this thread and those that it starts from all files but `reach`, for good; says what does.
    ///
    /// # Errors
    /// The system cannot do what was asked for by name, or lacks room for it.
    pub(crate) fn enter(&self, reach: &Reach) -> Result<&'static str, Failure> {
        if self.sandbox == Some(Sandbox::None) {
            return Ok("none");
        }
        let why = match (threads(), reach.enter()) {
            (1, Ok(true)) => return Ok("landlock"),
            (1, Ok(false)) => "this kernel has no Landlock".to_owned(),
            // It has: descriptors or memory are missing, and that may be mended.
            (_, Err(error)) => return Err(Failure::Usage(format!("Landlock: {error}"))),
            (more, _) => format!("{more} threads run already"),
        };
        if self.sandbox.is_some() {
            return Err(Failure::Usage(format!("--sandbox landlock: {why}")));
        }
        warn!("not kept from files: {why}");
        Ok("none")
    }

    /// One of many devices is not locked in by itself.
    ///
    /// # Errors
    /// It was to be.
    pub(crate) fn among(&self) -> Result<(), Failure> {
        match self.sandbox {
            None | Some(Sandbox::None) => Ok(()),
            Some(Sandbox::Landlock) => {
                let why = "beside other devices the process cannot be locked in: no sandbox here";
                Err(Failure::Usage(why.to_owned()))
            }
        }
    }
}

/// How many this process has; one where the system does not say.
fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count)
}

/// How the program is locked in.
#[derive(clap::Args, Clone, Default)]
pub(crate) struct LockArgs {
    /// What becomes of system calls that the device does not need; errno by default.
    #[arg(long, value_enum, value_name = "WHAT")]
    seccomp: Option<Seccomp>,
}

/// Where `cargo xtask test` says what `--seccomp` is by default.
const DEFAULT: &str = "OUTBOARD_SECCOMP";

const WORDS: &str = "errno, kill, log or none";

impl LockArgs {
    /// The filter, and whether it was asked for by name.
    fn chosen(&self) -> Result<(Seccomp, bool), Failure> {
        if let Some(mode) = self.seccomp {
            return Ok((mode, true));
        }
        let Some(word) = std::env::var_os(DEFAULT) else {
            return Ok((Seccomp::Errno, false));
        };
        let wrong = || Failure::Usage(format!("{DEFAULT} is {WORDS}"));
        let mode = word.to_str().and_then(|word| Seccomp::from_str(word, true).ok());
        Ok((mode.ok_or_else(wrong)?, false))
    }

    /// As a file has it.
    ///
    /// # Errors
    /// What would have been right.
    pub(crate) fn parse(word: &str) -> Result<Self, String> {
        let mode = Seccomp::from_str(word, false).map_err(|_| format!("seccomp is {WORDS}"))?;
        Ok(Self { seccomp: Some(mode) })
    }

    /// Whether anything was asked for by name.
    pub(crate) fn is_some(&self) -> bool {
        self.seccomp.is_some()
    }

    /// Locks all threads of this process in, for good, and has its devices show it.
    ///
    /// # Errors
    /// The system cannot do what was asked for by name.
    pub(crate) fn enter(
        &self,
        program: Program,
        sandbox: &str,
        devices: &[Inspect],
    ) -> Result<(), Failure> {
        let (mode, by_name) = self.chosen()?;
        let word = mode.to_possible_value().map_or_else(String::new, |word| word.get_name().into());
        let held = match filter::install(program, mode) {
            Ok(()) => word,
            Err(error) if by_name => {
                return Err(Failure::Usage(format!("--seccomp {word}: {error}")));
            }
            Err(error) => {
                warn!("no filter of system calls: {error}");
                "none".to_owned()
            }
        };
        info!("locked in: sandbox {sandbox}, seccomp {held}");
        for device in devices {
            device.set("lock/seccomp", held.as_str());
            device.set("lock/sandbox", sandbox);
        }
        Ok(())
    }
}
