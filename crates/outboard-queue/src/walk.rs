//! What the walks of both layouts have in common.

use outboard_memory::AccessError;

use crate::error::RingError;

/// The most bytes of a chain (virtio 1.3 §2.6.4: "the total length … MUST NOT exceed 2³²").
pub(crate) const MOST_BYTES: u64 = 1 << 32;

/// What it means that a buffer or a table of a chain cannot be reached.
#[cold]
pub(crate) fn unreachable(head: u16, source: AccessError) -> RingError {
    match source {
        AccessError::Miss { .. } | AccessError::Denied { .. } => {
            RingError::Untranslated { head, source }
        }
        source => RingError::Buffer { head, source },
    }
}

/// How much of a ring still works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Health {
    Live,
    /// The driver broke a rule: nothing more is taken; what is in flight can still be given back.
    Retired,
    /// Guest memory is gone: nothing is given back either.
    Lost,
}
