//! The log: lines on standard error, chosen by `OUTBOARD_LOG` (`info`, `outboard=debug`, …).
//!
//! A peer can cause a line with every message, so of each kind of line (one place in the source) ten
//! a second are shown, and the next one tells how many were not. What somebody asked for with `debug`
//! or `trace` is shown whole.

use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt};

/// Lines of one kind that are shown in each [`SECOND`].
const MOST: u32 = 10;
const SECOND: Duration = Duration::from_secs(1);

/// Logs from now on.
pub(crate) fn start() {
    let filter = EnvFilter::try_from_env("OUTBOARD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    // Only fails when a subscriber is set already, and then there is one.
    let _ =
        tracing_subscriber::registry().with(filter).with(Quiet::default()).with(lines).try_init();
}

/// Leaves out what comes too often.
#[derive(Default)]
struct Quiet(Mutex<HashMap<Identifier, Window>>);

/// What was shown of one kind since `begun`.
struct Window {
    begun: Instant,
    shown: u32,
    hidden: u64,
}

impl Window {
    const fn new(now: Instant) -> Self {
        Self { begun: now, shown: 0, hidden: 0 }
    }

    /// Whether a line that comes `now` is shown, and how many were not before it.
    fn takes(&mut self, now: Instant) -> Option<u64> {
        let mut left_out = 0;
        if now.saturating_duration_since(self.begun) >= SECOND {
            left_out = self.hidden;
            *self = Self::new(now);
        }
        if self.shown == MOST {
            self.hidden += 1;
            return None;
        }
        self.shown += 1;
        Some(left_out)
    }
}

impl<S: Subscriber> Layer<S> for Quiet {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let kind = event.metadata();
        if *kind.level() > Level::INFO {
            return true;
        }
        let now = Instant::now();
        let mut kinds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let window = kinds.entry(kind.callsite()).or_insert_with(|| Window::new(now));
        let taken = window.takes(now);
        drop(kinds);
        if let Some(left_out) = taken.filter(|left_out| *left_out > 0) {
            // Not through the log: this is inside it. A closed standard error loses it, as it should.
            let _ = writeln!(std::io::stderr(), "({left_out} lines like the next were left out)");
        }
        taken.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_lines_a_second_are_shown_and_the_others_counted() {
        let begun = Instant::now();
        let mut window = Window::new(begun);
        let shown = (0..1000).filter(|_| window.takes(begun).is_some()).count();
        assert_eq!(shown, 10);
        assert_eq!(window.takes(begun + SECOND), Some(990));
        assert_eq!(window.takes(begun + SECOND), Some(0));
    }
}
