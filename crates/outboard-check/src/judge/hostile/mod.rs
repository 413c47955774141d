//! What a hostile front-end does (hostile cases A). The runner looks afterwards whether the process
//! lives, answers the next front-end, kept descriptors or burns processor time.
//!
//! Invariant: a check sends what its title says and accepts every sane answer: a refusal, an end of the
//! connection, or being ignored; it breaks on a yes to what cannot be, on silence and on what it left.

pub(super) mod descriptors;
pub(super) mod framing;
pub(super) mod inflight;
pub(super) mod memory;
pub(super) mod notifiers;
pub(super) mod states;

use super::case::Case;
use super::finding::{Finding, Outcome};
use super::message::{self, Msg};
use super::session::Session;
use super::wire::{Came, Wire};

/// Sends a message that deserves no good answer: any answer or the end of the connection is one, as long
/// as the connection does not fall silent.
fn answered_or_closed(session: &mut Session, msg: &Msg<'_>, what: &str) -> Outcome {
    session.wire.send(msg)?;
    not_silent(&mut session.wire, what)
}

/// That the back-end closes, or answers a question.
fn not_silent(wire: &mut Wire, what: &str) -> Outcome {
    wire.send(&message::get_features())?;
    loop {
        match wire.receive(wire.limit)? {
            Came::Closed => return Ok(()),
            Came::Nothing => return Err(Finding::hangs(format!("it is silent after {what}"))),
            Came::Reply(reply) if reply.header.request == 1 => return Ok(()),
            Came::Reply(_) => {}
        }
    }
}

/// Waits until the connection is closed; whether it was.
fn closes(wire: &mut Wire, case: &Case<'_>) -> Outcome<bool> {
    for _ in 0..8 {
        match wire.receive(case.quiet)? {
            Came::Closed => return Ok(true),
            Came::Nothing => return Ok(false),
            Came::Reply(_) => {}
        }
    }
    Ok(false)
}
