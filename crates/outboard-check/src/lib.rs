//! Judge and load any vhost-user back-end, ours or anybody's: never built on `outboard` itself.
//!
//! [`mod@bench`] is the load generator for block devices, [`probe`] asks a back-end what it offers.

pub mod bench;
pub mod probe;
