//! Soaks: one thing done to a block back-end thousands of times while verified load runs on it.
//!
//! ```text
//!  command ─▶ Peer (its process) ◀─ Target: load on driver threads, each byte and each call checked
//!                    ▲                 │ during: Live
//!                    └── messages ◀── soak: what is done so often ─▶ Part: figures, what went wrong
//! ```
//! Each soak is one file. Invariants: nothing here knows whose back-end it is; between one round of changes
//! and the next requests are finished, so that each met a device at work; what a process holds
//! (descriptors, memory) is compared at rest, with the same front-ends connected.

mod calls;
mod kill;
mod log;
mod memory;
mod report;
mod rings;
mod storm;
mod subject;

use std::ffi::OsString;
use std::time::Duration;

use crate::bench::BenchError;
use crate::judge::finding::Finding;

pub use report::{Figure, Part, Report};

/// Something that is done very often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Soak {
    /// Mutated conversations and reconnects on one device, load on another one of the same process.
    Storm,
    /// Memory added, removed and swapped.
    Memory,
    /// Call descriptors swapped, as for masked interrupts.
    Calls,
    /// Rings disabled and enabled, stopped and started, kick descriptors swapped.
    Rings,
    /// The dirty log switched on, swapped and off.
    Log,
    /// The process killed and started again.
    Kill,
}

impl Soak {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Storm, Self::Memory, Self::Calls, Self::Rings, Self::Log, Self::Kill];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Storm => "storm",
            Self::Memory => "memory",
            Self::Calls => "calls",
            Self::Rings => "rings",
            Self::Log => "log",
            Self::Kill => "kill",
        }
    }

    /// The soak of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|soak| soak.name() == name)
    }

    /// How often it is done unless the caller says otherwise: messages for the storm, else changes of each
    /// kind.
    #[must_use]
    pub const fn count(self) -> u64 {
        match self {
            Self::Storm => 1_000_000,
            Self::Memory => 1_000,
            Self::Calls | Self::Rings | Self::Log | Self::Kill => 10_000,
        }
    }

    /// What must stand in the command: the sockets that it is to listen on.
    #[must_use]
    pub const fn sockets(self) -> &'static [&'static str] {
        match self {
            Self::Storm => &["{socket}", "{load}"],
            _ => &["{socket}"],
        }
    }
}

/// How a soak is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How often; see [`Soak::count`].
    pub count: u64,
    /// Start of everything random.
    pub seed: u64,
    /// Longest wait for one answer of the back-end.
    pub limit: Duration,
    /// Whether the load's rings are packed.
    pub packed: bool,
}

/// How far a part has come: its name, how many are done, of how many.
pub type Progress<'a> = dyn Fn(&str, u64, u64) + 'a;

/// Why a soak, or a part of it, came to no end.
#[derive(Debug, thiserror::Error)]
pub enum SoakError {
    /// There is no back-end, or not the one that the soak needs.
    #[error("no back-end to soak: {0}")]
    NoBackend(String),
    /// The load or the device failed.
    #[error(transparent)]
    Bench(#[from] BenchError),
    /// The device did what it must not.
    #[error("{0}")]
    Wrong(String),
}

impl From<outboard_frontend::Error> for SoakError {
    fn from(error: outboard_frontend::Error) -> Self {
        Self::Bench(error.into())
    }
}

impl From<Finding> for SoakError {
    fn from(finding: Finding) -> Self {
        Self::Wrong(finding.why)
    }
}

/// Does it: `command` is started once for each part, with the sockets of [`Soak::sockets`] filled in. The
/// disk behind `{socket}` (for the storm: the one behind `{load}`, too) is written to.
///
/// # Errors
/// [`SoakError::NoBackend`] when the command does not serve as it must; whatever else goes wrong is in
/// the report.
pub fn soak(
    soak: Soak,
    command: &[OsString],
    options: &Options,
    progress: &Progress<'_>,
) -> Result<Report, SoakError> {
    let parts = match soak {
        Soak::Storm => storm::parts(command, options, progress)?,
        Soak::Memory => memory::parts(command, options, progress)?,
        Soak::Calls => calls::parts(command, options, progress)?,
        Soak::Rings => rings::parts(command, options, progress)?,
        Soak::Log => log::parts(command, options, progress)?,
        Soak::Kill => kill::parts(command, options, progress)?,
    };
    Ok(Report { soak: soak.name(), parts })
}
