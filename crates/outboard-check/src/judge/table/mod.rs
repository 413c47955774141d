//! The one table of checks.
//!
//! One file of rows for each group. Invariant: an id stands once; a check without a row does not exist, as
//! its function would be dead code.

use serde::Serialize;

use super::case::Case;
use super::finding::Outcome;

mod conformance;
mod hostile;
mod leaks;
mod rings;
mod semantics;
mod storm;

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

/// Turns rows `id section title function;` into the checks of one group.
macro_rules! rows {
    ($group:ident $($id:literal $section:literal $title:literal $run:expr;)*) => {
        pub(super) const CHECKS: &[Check] = &[$(Check {
            id: $id,
            group: super::Group::$group,
            section: $section,
            title: $title,
            run: $run,
        },)*];
    };
}
use rows;

/// Every check there is, in the order in which they are played.
pub fn checks() -> impl Iterator<Item = &'static Check> {
    [
        conformance::CHECKS,
        semantics::CHECKS,
        rings::CHECKS,
        leaks::CHECKS,
        hostile::CHECKS,
        storm::CHECKS,
    ]
    .into_iter()
    .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_id_stands_once_and_every_check_says_why() {
        let mut ids: Vec<_> = checks().map(|check| check.id).collect();
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
