//! The rows of the semantic probes.

use super::{Check, rows};

rows! { Semantics
}
