//! What came out of a soak: figures with their bounds.
//!
//! Invariant: a figure with a bound holds when it is at most the bound; a part holds when all its figures
//! do and nothing went wrong.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::SoakError;
use super::subject::Holdings;
use crate::bench::Disturbed;

/// One figure.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// What was counted or measured.
    pub name: &'static str,
    /// How much of it.
    pub value: f64,
    /// Unit of the value; empty for a count.
    pub unit: &'static str,
    /// The most that is right.
    pub bound: Option<f64>,
}

impl Figure {
    /// Whether it keeps its bound.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.bound.is_none_or(|bound| self.value <= bound)
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let space = if self.unit.is_empty() { "" } else { " " };
        write!(out, "{} {}{space}{}", self.name, Short(self.value), self.unit)?;
        match self.bound {
            Some(bound) if !self.holds() => write!(out, " (bound {})", Short(bound)),
            _ => Ok(()),
        }
    }
}

/// A number without digits that nobody reads.
struct Short(f64);

impl fmt::Display for Short {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.fract() == 0.0 || self.0.abs() >= 100.0 {
            write!(out, "{:.0}", self.0)
        } else {
            write!(out, "{:.2}", self.0)
        }
    }
}

/// One part of a soak: one kind of change, one way of driving.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Part {
    /// What was done.
    pub what: String,
    /// How often.
    pub count: u64,
    /// In which time.
    pub seconds: f64,
    /// What was found.
    pub figures: Vec<Figure>,
    /// What ended it before its time.
    pub wrong: Option<String>,
}

impl Part {
    /// A part of which nothing is known yet.
    pub(super) fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), count: 0, seconds: 0.0, figures: Vec::new(), wrong: None }
    }

    pub(super) fn figure(&mut self, name: &'static str, value: f64, unit: &'static str) {
        self.figures.push(Figure { name, value, unit, bound: None });
    }

    pub(super) fn bounded(
        &mut self,
        name: &'static str,
        value: f64,
        unit: &'static str,
        most: f64,
    ) {
        self.figures.push(Figure { name, value, unit, bound: Some(most) });
    }

    /// The figures of the load: it was checked, byte for byte.
    pub(super) fn load(&mut self, load: &Disturbed) {
        let round = &load.round;
        self.figure("verified requests", number(round.reads + round.writes), "");
        self.figure("requests/s", round.iops, "");
        self.figure("slowest request", round.latency.max_us / 1e3, "ms");
        self.figure("longest stall", load.stall_ms, "ms");
    }

    /// What the process holds more than before.
    pub(super) fn holdings(&mut self, before: Holdings, after: Holdings) {
        self.bounded("descriptors +", growth(before.descriptors, after.descriptors), "", 0.0);
        self.bounded("mappings +", growth(before.mappings, after.mappings), "", 0.0);
        self.bounded("RSS +", growth(before.resident, after.resident), "KiB", 2048.0);
    }

    /// Closes the part with how it ended.
    pub(super) fn ended(
        mut self,
        took: Duration,
        end: Result<(), SoakError>,
    ) -> Result<Self, SoakError> {
        self.seconds = took.as_secs_f64();
        match end {
            Ok(()) => {}
            Err(SoakError::NoBackend(why)) => return Err(SoakError::NoBackend(why)),
            Err(error) => self.wrong = Some(error.to_string()),
        }
        Ok(self)
    }

    /// Whether everything was as it must be.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.wrong.is_none() && self.figures.iter().all(Figure::holds)
    }
}

impl fmt::Display for Part {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = if self.holds() { "holds" } else { "WRONG" };
        write!(out, "{mark}  {}: {} in {:.1} s", self.what, self.count, self.seconds)?;
        for figure in &self.figures {
            write!(out, "; {figure}")?;
        }
        match &self.wrong {
            Some(wrong) => write!(out, "; {wrong}"),
            None => Ok(()),
        }
    }
}

/// A whole soak.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Its name.
    pub soak: &'static str,
    /// Its parts, in the order in which they were done.
    pub parts: Vec<Part>,
}

impl Report {
    /// Whether every part holds.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.parts.iter().all(Part::holds)
    }
}

/// A count as a figure.
pub(super) fn number(count: u64) -> f64 {
    // Exact to 2^32, and counts of requests beyond that are known well enough.
    let (high, low) = (count >> 32, count & 0xffff_ffff);
    let half = |half: u64| f64::from(u32::try_from(half).unwrap_or(u32::MAX));
    half(high).mul_add(4_294_967_296.0, half(low))
}

fn growth(before: u64, after: u64) -> f64 {
    if after >= before { number(after - before) } else { -number(before - after) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_beyond_its_bound_is_wrong_and_says_so() {
        let mut part = Part::new("things");
        part.figure("requests", 1e6, "");
        part.bounded("RSS +", -40.0, "KiB", 2048.0);
        assert!(part.holds(), "{part}");
        part.bounded("descriptors +", 1.0, "", 0.0);
        assert!(!part.holds());
        let text = part.to_string();
        assert!(
            text.ends_with("requests 1000000; RSS + -40 KiB; descriptors + 1 (bound 0)"),
            "{text}"
        );
    }

    #[test]
    fn what_ended_a_part_is_part_of_it_unless_there_was_no_back_end() {
        let ended = |error| Part::new("things").ended(Duration::from_secs(1), Err(error));
        let part = ended(SoakError::Wrong("it stood still".to_owned())).expect("a part");
        assert!(!part.holds() && part.to_string().ends_with("it stood still"), "{part}");
        assert!(ended(SoakError::NoBackend("gone".to_owned())).is_err());
    }
}
