//! The one place where a `u64` becomes a `usize`; the crate builds for 64-bit targets only, so nothing is lost.

/// `n` as a length or an offset of this process.
#[inline(always)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the crate refuses to build unless pointers have 64 bits"
)]
pub(crate) const fn index(n: u64) -> usize {
    n as usize
}

/// `n` as a number of bytes on the wire or in a file.
#[inline(always)]
pub(crate) const fn wide(n: usize) -> u64 {
    n as u64
}
