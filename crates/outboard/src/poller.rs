//! Adaptive polling: how long a worker looks at its rings before it asks for a kick and sleeps.
//!
//! While requests come fast, sleeping costs more than looking: a kick and a wake-up take 5 to 50 µs,
//! a look at a ring some nanoseconds, and with notifications off the driver saves its kicks too.
//! The rule is that of the kernel's halt polling: a sleep that ended within the bound would have
//! been worth spinning through, so the window doubles, up to the bound; one that lasted longer
//! would not, so the window closes. An idle device therefore spins once, for at most the bound,
//! and then sleeps until somebody kicks.

use std::time::Duration;

/// The first window that opens.
const START: Duration = Duration::from_micros(8);

/// See the module.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Poller {
    window: Duration,
    bound: Duration,
}

impl Poller {
    /// Never looks longer than `bound`; zero: never polls.
    pub(crate) fn new(bound: Duration) -> Self {
        Self { window: Duration::ZERO, bound }
    }

    /// How long to look before the next sleep.
    pub(crate) fn window(&self) -> Duration {
        self.window
    }

    /// A sleep lasted this long until a kick came.
    pub(crate) fn slept(&mut self, time: Duration) {
        self.window = if time > self.bound {
            Duration::ZERO
        } else {
            (self.window * 2).max(START).min(self.bound)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUND: Duration = Duration::from_micros(50);

    #[test]
    fn short_sleeps_open_the_window_up_to_its_bound() {
        let mut poller = Poller::new(BOUND);
        let windows: Vec<_> = (0..5)
            .map(|_| {
                poller.slept(Duration::from_micros(20));
                poller.window().as_micros()
            })
            .collect();
        assert_eq!(windows, [8, 16, 32, 50, 50]);
    }

    #[test]
    fn one_long_sleep_closes_the_window() {
        let mut poller = Poller::new(BOUND);
        poller.slept(Duration::from_micros(20));
        poller.slept(Duration::from_micros(51));
        assert_eq!(poller.window(), Duration::ZERO);
    }

    #[test]
    fn a_bound_of_zero_never_polls() {
        let mut poller = Poller::new(Duration::ZERO);
        poller.slept(Duration::ZERO);
        assert_eq!(poller.window(), Duration::ZERO);
    }
}
