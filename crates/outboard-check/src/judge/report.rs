//! What the judge found, for people, programs and CI.
//!
//! Invariant: a failure that was expected is still shown with its reason, and a listed failure that did
//! not happen is told, so that lists are kept true.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use super::expected::Expected;
use super::finding::{Outcome, Verdict};
use super::table::{Check, Group};

/// The judgement of one check.
#[derive(Clone, Debug, Serialize)]
pub struct Judgement {
    /// What was checked.
    #[serde(flatten)]
    pub check: Check,
    /// What came of it.
    pub verdict: Verdict,
    /// One line of why, empty when it holds.
    pub why: String,
    /// The reason from the list of expected failures.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected: Option<String>,
    /// How long it took, in seconds.
    pub seconds: f64,
}

impl Judgement {
    pub(crate) fn new(check: &Check, outcome: Outcome, took: Duration, list: &Expected) -> Self {
        let (verdict, why) = match outcome {
            Ok(()) => (Verdict::Holds, String::new()),
            Err(finding) => (finding.verdict, finding.why),
        };
        let expected = list.reason(check.id, verdict).filter(|_| verdict.is_bad());
        let expected = expected.map(str::to_owned);
        Self { check: *check, verdict, why, expected, seconds: took.as_secs_f64() }
    }

    /// Whether it is a failure that nobody expected.
    #[must_use]
    pub const fn is_failure(&self) -> bool {
        self.verdict.is_bad() && self.expected.is_none()
    }

    /// One line for people.
    #[must_use]
    pub fn line(&self) -> String {
        let mut line = format!("{:<11} {:<28}", self.verdict, self.check.id);
        if self.why.is_empty() {
            let _ = write!(line, " {}", self.check.title);
        } else {
            let _ = write!(line, " {}", self.why);
        }
        if let Some(reason) = &self.expected {
            let _ = write!(line, " [expected: {reason}]");
        }
        line
    }
}

/// All judgements of one run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// In the order in which they were played.
    pub judgements: Vec<Judgement>,
}

impl Report {
    /// How often each verdict came.
    #[must_use]
    pub fn counts(&self) -> BTreeMap<Verdict, usize> {
        let mut counts = BTreeMap::new();
        for judgement in &self.judgements {
            *counts.entry(judgement.verdict).or_insert(0) += 1;
        }
        counts
    }

    /// The exit code: 0 all hold or are not offered, 1 something is wrong, 2 something could not be
    /// judged (and nothing is wrong).
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        if self.judgements.iter().any(Judgement::is_failure) {
            return 1;
        }
        if self.judgements.iter().any(|judgement| judgement.verdict == Verdict::NotJudged) {
            return 2;
        }
        0
    }

    /// The last line for people.
    #[must_use]
    pub fn summary(&self) -> String {
        let counts = self.counts();
        let parts: Vec<_> =
            counts.iter().map(|(verdict, count)| format!("{count} {verdict}")).collect();
        let mut line = format!("{} checks: {}", self.judgements.len(), parts.join(", "));
        let expected = self.judgements.iter().filter(|one| one.expected.is_some()).count();
        if expected > 0 {
            let _ = write!(line, "; {expected} of them expected");
        }
        line
    }

    /// Expected failures that were played and did not happen.
    #[must_use]
    pub fn stale(&self, list: &Expected) -> Vec<String> {
        let held = |id: &&str| {
            self.judgements.iter().any(|one| one.check.id == *id && !one.verdict.is_bad())
        };
        list.ids().filter(held).map(str::to_owned).collect()
    }

    /// The whole as JUnit XML; a group is a test suite.
    #[must_use]
    pub fn junit(&self) -> String {
        let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites>\n");
        for group in Group::ALL {
            let all: Vec<_> =
                self.judgements.iter().filter(|one| one.check.group == group).collect();
            if all.is_empty() {
                continue;
            }
            let failures = all.iter().filter(|one| one.is_failure()).count();
            let _ = writeln!(
                xml,
                "  <testsuite name=\"{}\" tests=\"{}\" failures=\"{failures}\">",
                group.name(),
                all.len()
            );
            all.iter().for_each(|one| xml.push_str(&junit_case(one)));
            xml.push_str("  </testsuite>\n");
        }
        xml.push_str("</testsuites>\n");
        xml
    }
}

fn junit_case(one: &Judgement) -> String {
    let why = escape(&one.why);
    let inside = match one.verdict {
        Verdict::Holds => String::new(),
        verdict if one.is_failure() => {
            format!("<failure type=\"{verdict}\" message=\"{why}\"/>")
        }
        Verdict::NotJudged => format!("<error message=\"{why}\"/>"),
        _ => {
            let reason = one.expected.as_deref().map_or(why, escape);
            format!("<skipped message=\"{reason}\"/>")
        }
    };
    let (class, name) = (one.check.group.name(), one.check.id);
    let time = one.seconds;
    format!(
        "    <testcase classname=\"{class}\" name=\"{name}\" time=\"{time:.3}\">{inside}</testcase>\n"
    )
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}
