//! The judge: conformance checks, semantic probes, ring checks and hostile peers for any back-end.
//!
//! ```text
//!  Target ─▶ runner: a fresh process for each case ─▶ Case ─▶ check ─▶ what it left behind ─▶ Verdict ─▶ Report
//! ```
//! Each check is one row of [`checks`] and one small function in the file of its group. Carries out
//! protocol facts 3.6 and the cases A and B of hostile peers that an outside judge can play. Invariant:
//! nothing here is built on `outboard`; what is judged is a process behind a socket, whoever wrote it.

pub(crate) mod case;
mod channel;
mod disk;
mod expected;
pub(crate) mod finding;
pub(crate) mod message;
mod musts;
pub(crate) mod peer;
mod report;
pub(crate) mod ring;
pub(crate) mod runner;
mod session;
mod table;
pub(crate) mod wire;

mod conformance;
mod hostile;
mod leaks;
mod rings;
mod semantics;
pub(crate) mod storm;

pub use expected::{Expected, ExpectedError};
pub use finding::Verdict;
pub use musts::{Must, musts};
pub use peer::Target;
pub use report::{Judgement, Report};
pub use runner::{JudgeError, Options, judge};
pub use table::{Check, Group, checks};
