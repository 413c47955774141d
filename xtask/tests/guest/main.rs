//! Tests with real guests: Linux in QEMU and User-mode Linux use our devices.
//!
//! They need the packages of `cargo xtask packages` and built programs; `cargo xtask test` sees
//! to both. Without them each says that it is skipped.

mod bios;
mod console;
mod crash;
mod disk;
mod iommu;
mod lab;
mod live;
mod migrate;
mod net;
mod net_dpdk;
mod net_moves;
mod net_passt;
mod net_switch;
mod notices;
mod rng;
mod share;
mod share_moves;
mod share_rules;
mod share_tools;
mod uml;
mod vsock;
mod vsock_moves;
mod vsock_pair;
