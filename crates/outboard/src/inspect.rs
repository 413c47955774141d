//! What a device shows of itself: facts by name, to be read at any time, from any thread
//! (design.md, "everything long-lived can show itself").
//!
//! ```text
//!  session ──▶ "front-end/features" = 0x1…    control plane: set when they change
//!  worker  ──▶ "rings/0/finished" += n        data plane: one store for each batch, no lock
//!  device  ──▶ "image/engine" = "uring"
//!                    └────────▶ facts(): every one of them, sorted by name
//! ```
//! Invariant: whoever reads waits for nobody and holds nobody up, so that a device that hangs can be
//! looked at too.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One fact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fact {
    /// Words.
    Text(String),
    /// A number, or what a counter stood at.
    Number(u64),
    /// Yes or no.
    Flag(bool),
}

impl From<&str> for Fact {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Fact {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<u64> for Fact {
    fn from(number: u64) -> Self {
        Self::Number(number)
    }
}

impl From<bool> for Fact {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

/// A number that grows, counted by one thread (or with [`add_shared`](Self::add_shared) by many) and read by all.
#[derive(Clone, Debug, Default)]
pub struct Counter(Arc<AtomicU64>);

impl Counter {
    /// Counts `more`. Only one thread at a time may count so.
    #[inline]
    pub fn add(&self, more: u64) {
        self.set(self.get().wrapping_add(more));
    }

    /// Counts `more`, whoever else counts.
    pub fn add_shared(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// It stands at `count`.
    #[inline]
    pub fn set(&self, count: u64) {
        self.0.store(count, Ordering::Relaxed);
    }

    /// Where it stands.
    #[must_use]
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug)]
enum Entry {
    Fact(Fact),
    Counter(Counter),
}

/// The facts of one device, or a branch of them. A clone shows the same.
#[derive(Clone, Debug, Default)]
pub struct Inspect {
    /// What names of this branch begin with.
    prefix: String,
    entries: Arc<Mutex<BTreeMap<String, Entry>>>,
}

impl Inspect {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A branch: its names stand after `name` and a slash.
    #[must_use]
    pub fn branch(&self, name: impl std::fmt::Display) -> Self {
        Self { prefix: format!("{}{name}/", self.prefix), entries: Arc::clone(&self.entries) }
    }

    /// From now on `name` is this; what it was before is gone.
    pub fn set(&self, name: &str, fact: impl Into<Fact>) {
        self.lock().insert(format!("{}{name}", self.prefix), Entry::Fact(fact.into()));
    }

    /// `name` is no longer shown.
    pub fn forget(&self, name: &str) {
        self.lock().remove(&format!("{}{name}", self.prefix));
    }

    /// The counter of that name; it starts at zero and outlives every session.
    #[must_use]
    pub fn counter(&self, name: &str) -> Counter {
        let mut entries = self.lock();
        let name = format!("{}{name}", self.prefix);
        if let Some(Entry::Counter(counter)) = entries.get(&name) {
            return counter.clone();
        }
        let counter = Counter::default();
        entries.insert(name, Entry::Counter(counter.clone()));
        counter
    }

    /// Shows a counter that is there already under `name`.
    pub fn show(&self, name: &str, counter: &Counter) {
        self.lock().insert(format!("{}{name}", self.prefix), Entry::Counter(counter.clone()));
    }

    /// Forgets what this branch shows; its counters stay.
    pub fn clear(&self) {
        self.lock().retain(|name, entry| {
            matches!(entry, Entry::Counter(_)) || !name.starts_with(&self.prefix)
        });
    }

    /// All facts of this branch, by their whole names.
    #[must_use]
    pub fn facts(&self) -> Vec<(String, Fact)> {
        let entries = self.lock();
        let ours = entries.iter().filter(|(name, _)| name.starts_with(&self.prefix));
        ours.map(|(name, entry)| {
            let fact = match entry {
                Entry::Fact(fact) => fact.clone(),
                Entry::Counter(counter) => Fact::Number(counter.get()),
            };
            (name.clone(), fact)
        })
        .collect()
    }

    /// A panic elsewhere cannot leave the map in two minds.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_sorted_and_the_last_word_counts() {
        let inspect = Inspect::new();
        let ring = inspect.branch("rings").branch(0);
        ring.set("state", "started");
        inspect.set("front-end", false);
        inspect.set("front-end", true);
        let finished = ring.counter("finished");
        finished.add(3);
        ring.counter("finished").add(4);
        let expected = [
            ("front-end", Fact::Flag(true)),
            ("rings/0/finished", Fact::Number(7)),
            ("rings/0/state", Fact::from("started")),
        ];
        let facts = inspect.facts();
        assert_eq!(facts, expected.map(|(name, fact)| (name.to_owned(), fact)));
        assert_eq!(ring.facts().len(), 2);
    }

    #[test]
    fn a_branch_that_is_cleared_keeps_its_counters_and_its_neighbours() {
        let inspect = Inspect::new();
        let branch = inspect.branch("front-end");
        branch.set("features", 7);
        let sessions = branch.counter("sessions");
        sessions.add(1);
        inspect.set("front-endless", 1);
        branch.clear();
        let names: Vec<_> = inspect.facts().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["front-end/sessions", "front-endless"]);
    }
}
