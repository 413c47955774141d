//! `outboard block` on a host that is short of something, and beside front-ends and operators that
//! end things at bad moments (cases A96 and C12 to C41 of `docs/cases.md`).
#![expect(clippy::expect_used, reason = "a failed step of a test is its end")]

mod clock;
mod ends;
mod flood;
mod limits;
mod program;
