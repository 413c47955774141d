//! What the token of an event means: the upper half is the kind, the lower one a queue or the device's number.

pub(super) const PORT: u64 = 0;
pub(super) const KICK: u64 = 1 << 32;
pub(super) const CONTROL: u64 = 2 << 32;
pub(super) const DEVICE: u64 = 3 << 32;

pub(super) fn kind(token: u64) -> u64 {
    token & !u64::from(u32::MAX)
}

pub(super) fn low(token: u64) -> u32 {
    u32::try_from(token & u64::from(u32::MAX)).unwrap_or(u32::MAX)
}

/// The token under which a device's own descriptor is watched.
pub(crate) fn device_token(number: u32) -> u64 {
    DEVICE | u64::from(number)
}
