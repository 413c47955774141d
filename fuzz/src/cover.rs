//! What a run has reached and what it has to reach, each thing said once.
//!
//! Lines `want: …` and `cover: …` on standard error; a run is complete when every wanted thing was
//! covered.

use std::cell::RefCell;
use std::collections::BTreeSet;

thread_local! {
    static SEEN: RefCell<BTreeSet<String>> = const { RefCell::new(BTreeSet::new()) };
}

/// Prints `cover: what` the first time.
pub fn reached(what: String) {
    SEEN.with_borrow_mut(|seen| {
        if !seen.contains(&what) {
            eprintln!("cover: {what}");
            seen.insert(what);
        }
    });
}

/// Prints `want: …` for everything that a run of this target has to reach, the first time.
pub fn wanted(what: impl FnOnce() -> Vec<String>) {
    thread_local! {
        static SAID: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
    }
    if !SAID.replace(true) {
        for one in what() {
            eprintln!("want: {one}");
        }
    }
}

/// Counts messages that were played, and says so now and then: `messages: n`.
pub fn played(messages: u64) {
    thread_local! {
        static PLAYED: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
    }
    let before = PLAYED.get();
    PLAYED.set(before + messages);
    if before >> 12 != PLAYED.get() >> 12 {
        eprintln!("messages: {}", PLAYED.get());
    }
}
