//! Sockets as a driver, the host's programs and other guests meet them (virtio 1.3 §5.10; cases B66, B67,
//! B68, C28).
#![expect(clippy::expect_used, reason = "a failed step of a test is its end")]

#[path = "../rig/mod.rs"]
mod rig;

mod crowd;
mod guest;
mod hostile;
mod machine;
mod neighbours;
mod streams;
mod upgrade;
mod wakes;
