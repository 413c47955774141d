//! The network card as a driver and as the link's peer meet it (virtio 1.3 §5.1; cases B61, B62, B64, B65,
//! C27).
#![expect(clippy::expect_used, reason = "a failed step of a test is its end")]

#[path = "../rig/mod.rs"]
mod rig;

mod guest;
mod hostile;
mod packets;
mod pairs;
mod state;
mod switch;
