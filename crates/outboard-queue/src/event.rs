//! When the other side wants to be told (virtio 1.3 §2.7.7.2, §2.7.10).

/// Whether moving an index from `old` to `new` passes `event`: true exactly when `event` is one of
/// `old, old + 1, … new - 1`, modulo 2¹⁶.
#[inline(always)]
pub const fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
