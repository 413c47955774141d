//! A place in a packed ring: an index and the wrap counter that goes with it, and the arithmetic of both
//! (virtio 1.3 §2.8.1, §2.8.10).
//!
//! Written as 16 bits, index below and counter in bit 15, it is what event structures carry, and each half of a base.

/// An index of a ring and a wrap counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) at: u16,
    pub(crate) wrap: bool,
}

impl Place {
    /// From 16 bits; `None` when a ring of `size` has no such index.
    pub(crate) fn from_bits(bits: u16, size: u16) -> Option<Self> {
        let at = bits & 0x7fff;
        (at < size).then_some(Self { at, wrap: bits & 0x8000 != 0 })
    }

    pub(crate) const fn bits(self) -> u16 {
        self.at | (self.wrap as u16) << 15
    }

    /// `count` descriptors further, at most one ring. True: round its end.
    #[inline(always)]
    pub(crate) const fn advance(&mut self, count: u16, size: u16) -> bool {
        let at = self.at + count;
        if at >= size {
            self.at = at - size;
            self.wrap = !self.wrap;
            true
        } else {
            self.at = at;
            false
        }
    }

    /// `count` descriptors back, at most one ring.
    pub(crate) const fn back(self, count: u16, size: u16) -> Self {
        if count > self.at {
            Self { at: size - (count - self.at), wrap: !self.wrap }
        } else {
            Self { at: self.at - count, wrap: self.wrap }
        }
    }

    /// Descriptors from `earlier` to here. `None`: it is not earlier, or by more than one ring.
    pub(crate) fn since(self, earlier: Self, size: u16) -> Option<u16> {
        if self.wrap == earlier.wrap {
            self.at.checked_sub(earlier.at)
        } else {
            earlier.at.checked_sub(self.at).map(|short| size - short)
        }
    }
}

/// Descriptors of so many bytes of a ring, which has at most 32,768.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "at most 2^19 bytes")]
pub(crate) const fn descriptors(bytes: u32) -> u16 {
    (bytes / 16) as u16
}

/// Whether one side wrote into its event structure that it wants to be told of every step.
#[inline(always)]
pub(crate) const fn is_enabled(word: u32) -> bool {
    word & 0x3_0000 == (ENABLE as u32) << 16
}

/// What one side wrote into its event structure: whether the other side's step to `new`, by `count` descriptors, is to
/// be told. `events`: EVENT_IDX was negotiated. What is reserved or no place of the ring counts as "yes".
pub(crate) const fn wants(word: u32, events: bool, new: Place, count: u16, size: u16) -> bool {
    let [low, high, flags, _] = word.to_le_bytes();
    match flags & 3 {
        DISABLE => false,
        DESC if events => {
            let event = u16::from_le_bytes([low, high]);
            let at = event & 0x7fff;
            if at >= size {
                return true;
            }
            // Indices relative to the lap of `new`: what lies before it is negative.
            let at = if (event & 0x8000 != 0) == new.wrap { at } else { at.wrapping_sub(size) };
            crate::event::need_event(at, new.at, new.at.wrapping_sub(count))
        }
        _ => true,
    }
}

/// Event flags: tell of every step.
pub(crate) const ENABLE: u8 = 0;
/// Of none.
pub(crate) const DISABLE: u8 = 1;
/// Of the one that passes a place.
pub(crate) const DESC: u8 = 2;

/// An event structure as it is written.
#[inline(always)]
pub(crate) const fn event_word(place: u16, flags: u8) -> u32 {
    let [low, high] = place.to_le_bytes();
    u32::from_le_bytes([low, high, flags, 0])
}

#[cfg(test)]
mod tests;
