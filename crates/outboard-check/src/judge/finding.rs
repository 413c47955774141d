//! What a check can come to.
//!
//! Invariant: everything but [`Verdict::Holds`] carries one line that says why.

use serde::Serialize;

/// The judgement of one check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The back-end does what it must.
    Holds,
    /// It does something else.
    Breaks,
    /// Its process ended.
    Crashes,
    /// It does not answer, or serves nobody any more.
    Hangs,
    /// It burns processor time with nothing to do.
    Spins,
    /// It keeps descriptors or memory.
    Leaks,
    /// It does not offer what the check is about.
    NotOffered,
    /// The judge itself could not do its part.
    NotJudged,
}

impl Verdict {
    /// Every verdict.
    pub const ALL: [Self; 8] = [
        Self::Holds,
        Self::Breaks,
        Self::Crashes,
        Self::Hangs,
        Self::Spins,
        Self::Leaks,
        Self::NotOffered,
        Self::NotJudged,
    ];

    /// The verdict in words.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Holds => "holds",
            Self::Breaks => "breaks",
            Self::Crashes => "crashes",
            Self::Hangs => "hangs",
            Self::Spins => "spins",
            Self::Leaks => "leaks",
            Self::NotOffered => "not offered",
            Self::NotJudged => "not judged",
        }
    }

    /// Whether the back-end is at fault.
    #[must_use]
    pub const fn is_bad(self) -> bool {
        matches!(self, Self::Breaks | Self::Crashes | Self::Hangs | Self::Spins | Self::Leaks)
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.pad(self.name())
    }
}

/// Why a check does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) verdict: Verdict,
    pub(crate) why: String,
}

/// What a check returns.
pub(crate) type Outcome<T = ()> = Result<T, Finding>;

impl Finding {
    pub(crate) fn new(verdict: Verdict, why: impl Into<String>) -> Self {
        Self { verdict, why: why.into() }
    }

    pub(crate) fn breaks(why: impl Into<String>) -> Self {
        Self::new(Verdict::Breaks, why)
    }

    pub(crate) fn hangs(why: impl Into<String>) -> Self {
        Self::new(Verdict::Hangs, why)
    }

    pub(crate) fn not_offered(why: impl Into<String>) -> Self {
        Self::new(Verdict::NotOffered, why)
    }

    /// The judge could not do its part.
    pub(crate) fn own(what: &str, error: impl std::fmt::Display) -> Self {
        Self::new(Verdict::NotJudged, format!("the judge could not {what}: {error}"))
    }
}

/// Ends a check as broken unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($why:tt)+) => {
        if !$condition {
            return Err($crate::judge::finding::Finding::breaks(format!($($why)+)));
        }
    };
}
pub(crate) use ensure;
