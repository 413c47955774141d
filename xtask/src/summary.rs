//! Counts tests from the closing lines of the runners that ran them.
//!
//! Invariant: a runner that failed without saying which test failed counts as one failure, so
//! that a bad run never sums up as a good one.

use std::ops::AddAssign;

/// How many tests passed, failed and did not run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Ran and held.
    pub passed: u64,
    /// Ran and did not hold, or could not be built or finished.
    pub failed: u64,
    /// Did not run.
    pub skipped: u64,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, more: Self) {
        self.passed += more.passed;
        self.failed += more.failed;
        self.skipped += more.skipped;
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

impl Tally {
    /// Reads one line; anything but a closing line adds nothing.
    pub fn read(&mut self, line: &str) {
        let counts = nextest(line).or_else(|| libtest(line));
        *self += counts.unwrap_or_default();
    }

    /// Closes the count of one runner that ended well or not.
    #[must_use]
    pub const fn closed(mut self, well: bool) -> Self {
        if !well && self.failed == 0 {
            self.failed = 1;
        }
        self
    }
}

/// `Summary [ 1.2s] 12 tests run: 10 passed (1 slow), 2 failed, 3 skipped`.
fn nextest(line: &str) -> Option<Tally> {
    let (_, rest) = line.trim_start().strip_prefix("Summary [")?.split_once(']')?;
    let (_, counts) = rest.split_once("run: ")?;
    Some(words(&without_parentheses(counts), ','))
}

/// `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 1s`.
fn libtest(line: &str) -> Option<Tally> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    Some(words(counts, ';'))
}

fn words(counts: &str, separator: char) -> Tally {
    let mut tally = Tally::default();
    for part in counts.split(separator) {
        let Some((number, what)) = part.trim().split_once(' ') else { continue };
        let number = number.parse().unwrap_or(0);
        match what.trim() {
            "passed" => tally.passed += number,
            "failed" | "timed out" | "exec failed" => tally.failed += number,
            "skipped" | "ignored" => tally.skipped += number,
            _ => {}
        }
    }
    tally
}

fn without_parentheses(text: &str) -> String {
    let mut depth = 0;
    let outside = text.chars().filter(|c| {
        depth += i32::from(*c == '(') - i32::from(*c == ')');
        depth == 0 && *c != ')'
    });
    outside.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn tally(passed: u64, failed: u64, skipped: u64) -> Tally {
        Tally { passed, failed, skipped }
    }

    fn read(line: &str) -> Tally {
        let mut found = Tally::default();
        found.read(line);
        found
    }

    #[test]
    fn the_closing_lines_of_nextest_and_libtest_are_counted() {
        let line = "     Summary [   0.01s] 14 tests run: 11 passed (2 slow, 1 flaky), 1 failed, \
                    2 timed out, 3 skipped";
        assert_eq!(read(line), tally(11, 3, 3));
        let line = "test result: ok. 9 passed; 0 failed; 1 ignored; 0 measured; 4 filtered out; \
                    finished in 0.00s";
        assert_eq!(read(line), tally(9, 0, 1));
        assert_eq!(read("test a ... ok"), Tally::default());
    }

    #[test]
    fn a_runner_that_fails_without_a_word_is_one_failure() {
        assert_eq!(Tally::default().closed(false), tally(0, 1, 0));
        assert_eq!(tally(3, 2, 0).closed(false), tally(3, 2, 0));
        assert_eq!(tally(3, 0, 0).closed(true), tally(3, 0, 0));
    }
}
