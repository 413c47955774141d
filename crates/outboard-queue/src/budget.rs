//! What chains of many pieces cost: how much idle ones keep, and how much those in flight may take.

use crate::chain::{NOWHERE, Parts};
use crate::error::RingError;

/// A chain of more pieces is charged, and its list is kept only within limits.
pub(crate) const FEW_PIECES: u16 = 128;
/// The most pieces of chains in flight that have more than a few: 64 MiB of lists.
const MOST_PIECES: usize = 4 << 20;
/// Idle chains that may keep a long list for the next request.
pub(crate) const MOST_GROWN: usize = 64;

/// The account of one ring.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    /// How many may keep a long list.
    pub(crate) grown: usize,
    /// Pieces of chains in flight that have more than a few.
    pub(crate) charged: usize,
}

impl Budget {
    /// Counts the pieces of a chain that was just walked.
    pub(crate) fn charge(&mut self, parts: &mut Parts, pieces: usize) -> Result<(), RingError> {
        if pieces > usize::from(FEW_PIECES) {
            parts.charged = pieces;
            parts.place = NOWHERE;
            self.charged += pieces;
        }
        if self.charged > MOST_PIECES {
            Err(RingError::Pieces { limit: MOST_PIECES })
        } else {
            Ok(())
        }
    }

    /// A chain goes idle. If it has a long list, it keeps it, or not.
    #[inline(never)]
    pub(crate) fn discharge(&mut self, parts: &mut Parts) {
        if parts.charged == 0 {
            return;
        }
        self.charged = self.charged.saturating_sub(std::mem::take(&mut parts.charged));
        parts.place = parts.head.into();
        if !parts.grown && self.grown < MOST_GROWN {
            self.grown += 1;
            parts.grown = true;
        }
        if !parts.grown {
            parts.buffers.shrink();
        }
    }
}
