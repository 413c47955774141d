//! The one table of checks.
//!
//! Invariant: an id stands once; ids begin with the name of their group's file; a check without a row
//! does not exist, as its function would be dead code.

use serde::Serialize;

use super::case::Case;
use super::conformance as c;
use super::finding::Outcome;

/// What kind of check it is; also the order in which they are played.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Group {
    /// What the protocol's text demands.
    Conformance,
    /// What the messages must mean, and orders of messages that real front-ends use.
    Semantics,
    /// Rings and requests of block devices.
    Rings,
    /// Descriptors, memory and processor time.
    Leaks,
    /// What a hostile front-end does.
    Hostile,
    /// Mutated conversations and reconnects by the hundred.
    Storm,
}

impl Group {
    /// Every group, in order.
    pub const ALL: [Self; 6] =
        [Self::Conformance, Self::Semantics, Self::Rings, Self::Leaks, Self::Hostile, Self::Storm];

    /// The group in a word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Conformance => "conformance",
            Self::Semantics => "semantics",
            Self::Rings => "rings",
            Self::Leaks => "leaks",
            Self::Hostile => "hostile",
            Self::Storm => "storm",
        }
    }
}

/// One check.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Check {
    /// Its name, for `--only` and for lists of expected failures.
    pub id: &'static str,
    /// Its group.
    pub group: Group,
    /// The section of the specification, or the hostile case, that it comes from.
    pub section: &'static str,
    /// What must be so.
    pub title: &'static str,
    #[serde(skip)]
    pub(crate) run: fn(&mut Case<'_>) -> Outcome,
}

macro_rules! checks {
    ($($group:ident { $($id:literal $section:literal $title:literal $run:expr;)* })*) => {
        const CHECKS: &[Check] = &[$($(Check {
            id: $id,
            group: Group::$group,
            section: $section,
            title: $title,
            run: $run,
        },)*)*];
    };
}

/// Every check there is.
#[must_use]
pub const fn checks() -> &'static [Check] {
    CHECKS
}

checks! {
    Conformance {
        "features-answered" "Front-end message types: GET_FEATURES" "GET_FEATURES is answered with a u64 and no descriptor" c::start::features_answered;
        "features-stable" "Front-end message types: GET_FEATURES" "the same features are offered before and after negotiation" c::start::features_stable;
        "features-before-owner" "Communication" "GET_FEATURES and GET_PROTOCOL_FEATURES are answered before SET_OWNER" c::start::features_before_owner;
        "owner-repeated" "Front-end message types: SET_OWNER" "a second SET_OWNER changes nothing" c::start::owner_repeated;
        "owner-late" "Communication" "SET_OWNER may come after SET_PROTOCOL_FEATURES" c::start::owner_late;
        "features-unoffered" "Front-end message types: SET_FEATURES (A66)" "a feature bit that was not offered is refused" c::start::features_unoffered;
        "features-replaced" "Front-end message types: SET_FEATURES" "SET_FEATURES may come again with fewer bits" c::start::features_replaced;
        "protocol-features-answered" "Protocol features" "GET_PROTOCOL_FEATURES is answered before SET_FEATURES" c::start::protocol_features_answered;
        "protocol-features-unoffered" "Protocol features (A66)" "a protocol feature that was not offered is refused" c::start::protocol_features_unoffered;
        "queue-count" "Multiple queue support" "GET_QUEUE_NUM is answered with 1 or more" c::start::queue_count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_id_stands_once_and_every_check_says_why() {
        let mut ids: Vec<_> = checks().iter().map(|check| check.id).collect();
        ids.sort_unstable();
        let count = ids.len();
        ids.dedup();
        assert_eq!(ids.len(), count, "an id stands twice");
        for check in checks() {
            let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            assert!(check.id.chars().all(fits), "{}", check.id);
            assert!(!check.section.is_empty() && !check.title.is_empty(), "{}", check.id);
        }
    }

    #[test]
    fn the_groups_stand_in_the_order_in_which_they_are_played() {
        assert!(checks().is_sorted_by_key(|check| check.group));
    }
}
