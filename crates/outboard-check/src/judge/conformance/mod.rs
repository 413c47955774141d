//! What the protocol's text demands, one small check for each MUST (protocol facts b and d).
//!
//! Invariant: a check breaks only when the text, or what every known front-end relies on, is broken;
//! where the text leaves a choice, each choice holds.

pub(super) mod config;
pub(super) mod gates;
pub(super) mod memory;
pub(super) mod optional;
pub(super) mod rings;
pub(super) mod start;
pub(super) mod stream;
pub(super) mod transfer;
