//! Adaptive polling: how long a worker looks at its rings before it asks for a kick and sleeps.
//!
//! While requests come fast, sleeping costs more than looking: a kick and a wake-up take 5 to 50 µs,
//! a look at a ring some nanoseconds, and with notifications off the driver saves its kicks too.
//! Nor is it a kick alone that is looked for: while a worker has no use for a ring's requests (a socket without bytes), the
//! thread looks whether its own descriptors have news, and when they had, at the rings for the driver's answer.
//! The rule is that of the kernel's halt polling: a sleep that ended within the bound would have
//! been worth spinning through, so the window doubles, up to the bound; one that lasted longer
//! would not, so the window closes. An idle device therefore spins once, for at most the bound,
//! and then sleeps until somebody kicks.
//!
//! ```text
//!  gap between requests   0 … 8 µs: looked through at once      beyond the bound: never looked for
//!                         8 µs … bound: after a few short sleeps, each of which doubles the window
//! ```
//! While the kernel works on requests there is nothing to look for: its completion wakes. When it has answered the last
//! one, a driver that waited for that has its next request ready within some microseconds, so a thread whose window is
//! open looks then, too. If nothing was found and the sleep that followed was ended by something else than a kick (the
//! next completion, say, of a driver that offers in its own time), the window is halved.
//!
//! A bound of zero never looks, [`ALWAYS`] never sleeps while a ring runs: for a processor of its own.

use std::time::Duration;

/// The first window that opens.
const START: Duration = Duration::from_micros(8);

/// The bound of a worker that never sleeps.
pub(crate) const ALWAYS: Duration = Duration::MAX;
/// The longest window of one that does: one that the clock reaches.
const LONGEST: Duration = Duration::from_secs(3600);
/// How long one that never sleeps looks at its rings before it looks at everything else.
const STRETCH: Duration = Duration::from_micros(20);

/// See the module.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Poller {
    window: Duration,
    bound: Duration,
    /// Nothing came while it was looked for.
    vain: bool,
}

impl Poller {
    /// Never looks longer than `bound`; zero: never polls.
    pub(crate) fn new(bound: Duration) -> Self {
        let bound = if bound == ALWAYS { bound } else { bound.min(LONGEST) };
        Self { window: Duration::ZERO, bound, vain: false }
    }

    /// How long to look before the next sleep, or the next look at everything else.
    pub(crate) fn window(&self) -> Duration {
        if self.always() { STRETCH } else { self.window }
    }

    /// Whether there is no sleep.
    pub(crate) fn always(&self) -> bool {
        self.bound == ALWAYS
    }

    /// Nothing came while it was looked for.
    pub(crate) fn looked_in_vain(&mut self) {
        self.vain = true;
    }

    /// A sleep ended without a kick.
    pub(crate) fn slept_on(&mut self) {
        if std::mem::take(&mut self.vain) {
            self.window = if self.window > START { self.window / 2 } else { Duration::ZERO };
        }
    }

    /// A sleep lasted this long until a kick came.
    pub(crate) fn slept(&mut self, time: Duration) {
        self.vain = false;
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
    fn looks_in_vain_that_no_kick_follows_close_the_window_step_by_step() {
        let mut poller = Poller::new(BOUND);
        (0..4).for_each(|_| poller.slept(Duration::from_micros(20)));
        poller.slept_on();
        assert_eq!(poller.window(), BOUND, "it had not looked");
        let windows: Vec<_> = (0..4)
            .map(|_| {
                poller.looked_in_vain();
                poller.slept_on();
                poller.window().as_micros()
            })
            .collect();
        assert_eq!(windows, [25, 12, 6, 0]);
    }

    #[test]
    fn looks_in_vain_that_a_kick_follows_soon_do_not_keep_the_window_from_opening() {
        let mut poller = Poller::new(BOUND);
        for _ in 0..4 {
            poller.slept(Duration::from_micros(20));
            poller.looked_in_vain();
        }
        assert_eq!(poller.window(), BOUND);
    }

    #[test]
    fn the_window_of_any_bound_is_one_that_the_clock_reaches() {
        let mut poller = Poller::new(ALWAYS - Duration::from_nanos(1));
        (0..200).for_each(|_| poller.slept(Duration::ZERO));
        assert!(std::time::Instant::now().checked_add(poller.window()).is_some());
        assert!(!poller.always());
    }

    #[test]
    fn one_that_never_sleeps_looks_from_the_start_and_whatever_it_slept_before_its_rings_ran() {
        let mut poller = Poller::new(ALWAYS);
        assert!(poller.always() && !poller.window().is_zero());
        poller.slept(Duration::from_secs(1));
        assert!(!poller.window().is_zero());
        assert!(!Poller::new(BOUND).always());
    }

    #[test]
    fn a_bound_of_zero_never_polls() {
        let mut poller = Poller::new(Duration::ZERO);
        poller.slept(Duration::ZERO);
        assert_eq!(poller.window(), Duration::ZERO);
    }
}
