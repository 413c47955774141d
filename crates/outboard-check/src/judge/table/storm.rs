//! The rows of the storms.

use super::{Check, rows};
use crate::judge::storm as s;

rows! { Storm
    "storm-mutated" "Communication" "mutated conversations do no harm" s::mutated;
    "storm-reconnects" "Communication (A94)" "reconnects by the hundred do no harm" s::reconnects;
    "storm-silent" "Communication (A94)" "front-ends that say nothing or half a word do no harm" s::silent_connects;
    "storm-crowd" "Communication (A93)" "fifty front-ends at once do no harm" s::crowd;
}
