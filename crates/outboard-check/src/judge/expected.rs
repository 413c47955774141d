//! Failures that are known: a list with a reason for each, given by the user.
//!
//! One line each, `ID VERDICT REASON`; `#` begins a comment. The verdict may be `any`. Invariant: a line
//! without a reason is an error, and so is one for a check that does not exist: a list cannot rot.

use super::finding::Verdict;
use super::table::checks;

/// The known failures of one back-end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expected(Vec<Line>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    id: String,
    verdict: Option<Verdict>,
    reason: String,
}

/// Why a list cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExpectedError {
    /// Not `ID VERDICT REASON`.
    #[error("line {line}: an expected failure is ID VERDICT REASON")]
    Shape {
        /// Line number, from 1.
        line: usize,
    },
    /// No such check.
    #[error("line {line}: there is no check {id}")]
    NoSuchCheck {
        /// Line number, from 1.
        line: usize,
        /// The name.
        id: String,
    },
    /// No such verdict, or one that is no failure.
    #[error(
        "line {line}: {word} is no failure; there are breaks, crashes, hangs, spins, leaks, any"
    )]
    NoSuchVerdict {
        /// Line number, from 1.
        line: usize,
        /// The word.
        word: String,
    },
}

impl Expected {
    /// Reads a list.
    ///
    /// # Errors
    /// [`ExpectedError`] with the number of the line.
    pub fn parse(text: &str) -> Result<Self, ExpectedError> {
        let mut lines = Vec::new();
        for (at, text) in text.lines().enumerate() {
            let text = text.trim();
            if !text.is_empty() && !text.starts_with('#') {
                lines.push(Line::parse(at + 1, text)?);
            }
        }
        Ok(Self(lines))
    }

    /// The reason why this failure is known.
    #[must_use]
    pub fn reason(&self, id: &str, verdict: Verdict) -> Option<&str> {
        let fits = |line: &&Line| line.id == id && line.verdict.is_none_or(|v| v == verdict);
        self.0.iter().find(fits).map(|line| line.reason.as_str())
    }

    /// The checks that are listed.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|line| line.id.as_str())
    }
}

impl Line {
    fn parse(line: usize, text: &str) -> Result<Self, ExpectedError> {
        let mut words = text.splitn(3, char::is_whitespace);
        let (Some(id), Some(word), Some(reason)) = (words.next(), words.next(), words.next())
        else {
            return Err(ExpectedError::Shape { line });
        };
        if !checks().any(|check| check.id == id) {
            return Err(ExpectedError::NoSuchCheck { line, id: id.to_owned() });
        }
        let known = Verdict::ALL.into_iter().find(|v| v.is_bad() && v.name() == word);
        if known.is_none() && word != "any" {
            return Err(ExpectedError::NoSuchVerdict { line, word: word.to_owned() });
        }
        Ok(Self { id: id.to_owned(), verdict: known, reason: reason.trim().to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_names_checks_verdicts_and_reasons() {
        let list =
            "# of some peer\n\nqueue-count breaks it has none\nowner-repeated any  it is old\n";
        let list = Expected::parse(list).expect("it is well formed");
        assert_eq!(list.reason("queue-count", Verdict::Breaks), Some("it has none"));
        assert_eq!(list.reason("queue-count", Verdict::Crashes), None);
        assert_eq!(list.reason("owner-repeated", Verdict::Hangs), Some("it is old"));
    }

    #[test]
    fn a_line_that_says_nothing_is_refused() {
        let parse = |text: &str| Expected::parse(text).expect_err("it is wrong").to_string();
        assert!(parse("queue-count breaks").contains("line 1"));
        assert!(parse("\nnothing-like-it breaks why").contains("nothing-like-it"));
        assert!(parse("queue-count holds why").contains("holds is no failure"));
    }
}
