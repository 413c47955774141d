//! Judge and load any vhost-user back-end, ours or anybody's: never built on `outboard` itself.
//!
//! [`mod@bench`] is the load generator for block devices, [`judge`] finds out what a back-end does wrong,
//! [`probe`] asks what it offers, [`mod@soak`] does one thing to it thousands of times under load.

pub mod bench;
pub mod judge;
pub mod probe;
pub mod soak;
