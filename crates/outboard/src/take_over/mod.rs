//! Live upgrade: a running device hands everything over to a new process and ends; the guest sees
//! nothing but a pause (issue "state that survives").
//!
//! ```text
//!  new process                               old process
//!  "take over" ──────── control socket ─────▶ its rings are stopped and drained
//!              ◀─ heirlooms ─────────────────  (what the device itself has open: `Hooks::hand_over`)
//!              ◀─ hand-over: descriptors ────  (listener, front-end's socket, a fresh socket pair)
//!  its handler ◀═══ vhost-user ══════════════ plays the front-end: features, memory, rings, kicks
//!              ◀─ "go" ──────────────────────  and ends
//!  serves the real front-end's socket
//! ```
//! State travels as the protocol itself: whatever a front-end can set up, the old process sets up
//! in the new one, which checks it as it checks any front-end. So there is no second format, both
//! versions agree through the protocol's own negotiation, and every refusal has its reason.
//! Invariant: until "go" was sent the old process owns the rings: a refusal, a crash or silence of
//! the new one makes it start them again where they stood.

mod control;
mod letter;
mod play;

use outboard_protocol::Violation;

use crate::error::HostError;

pub(crate) use control::{Belongings, Control, Door, Heir};
#[cfg(fuzzing)]
pub use letter::letter_again;
pub(crate) use letter::{Estate, FrontEnd, Letter, now, parcels};
pub(crate) use play::Play;

/// Why a hand-over came to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandOverError {
    /// The new process refused a message.
    #[error("the new process refused {message}")]
    Refused {
        /// Which.
        message: &'static str,
    },
    /// The new process lacks something that the guest uses.
    #[error("the new process does not offer {what} {bits:#x}")]
    Lacks {
        /// Feature bits or protocol features.
        what: &'static str,
        /// The bits that it lacks.
        bits: u64,
    },
    /// What we have cannot be handed over.
    #[error("{0}")]
    Unable(String),
    /// The new process is no device of ours.
    #[error("the new process broke the protocol: {0}")]
    Protocol(#[from] Violation),
    /// The new process left, or our side failed.
    #[error("{0}")]
    Host(#[from] HostError),
}

impl HandOverError {
    pub(crate) fn unable(why: impl std::fmt::Display) -> Self {
        Self::Unable(why.to_string())
    }
}
