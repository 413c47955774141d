//! The console as a driver and as the host's side meet it (virtio 1.3 §5.3; cases B70, B71, C28).
#![expect(clippy::expect_used, reason = "a failed step of a test is its end")]

#[path = "../rig/mod.rs"]
mod rig;

mod guest;
mod hostile;
mod ports;
mod state;
mod terminal;
mod upgrade;
