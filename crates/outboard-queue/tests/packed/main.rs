//! Packed rings: the device side against a guest that writes what it likes, and against our own driver side.
#![expect(clippy::unwrap_used, reason = "tests")]

mod dirty_log;
mod driver_side;
mod hostile_chains;
mod hostile_races;
mod inflight;
mod life;
mod model;
mod notifications;
mod rig;
mod wraps;
