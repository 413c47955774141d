//! Hostile back-ends against the front-end: wrong messages, wrong rings.
#![expect(clippy::expect_used, clippy::panic, reason = "a failed step of a test is its end")]

mod messages;
mod rings;
mod scripted;
