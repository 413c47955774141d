//! The block device as drivers see it: every request through a real socket and a real ring.
#![expect(clippy::expect_used, reason = "a failed step of a test is its end")]
#![expect(clippy::cast_possible_truncation, reason = "the lengths of tests are small")]

mod disk;
mod faults;
mod later;
mod memory;
mod model;
mod order;
mod outage;
mod requests;
mod state;
