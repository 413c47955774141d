//! Worker threads: what one does round by round, whether it serves one worker ([`seat`]) or those of several
//! devices by turns ([`crew`]).
//!
//! ```text
//!  turns of what is ready ─▶ look for more: rings, for as long as that pays ─▶ ask for kicks ─▶ sleep
//!        ▲                                  │ found                              │ found          │ woken
//!        └──────────────────────────────────┴────────────────────────────────────┴────────────────┘
//! ```
//! Invariant: a thread sleeps only when all of its rings were armed and looked at once more.

mod crew;
mod lane;
mod port;
mod seat;
mod token;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::events::EventLoop;
use crate::inspect::Inspect;
use crate::poller::Poller;
use crate::worker::{MakeWorker, Worker};

pub(crate) use crew::{Admission, Crew, admission};
pub(crate) use port::{Order, Port};
use seat::Seat;
pub(crate) use token::device_token;

/// Requests that one lane serves before the next one has its turn.
const BUDGET: u32 = 64;
/// Looks at the rings between two looks at the clock.
const SPINS: u32 = 32;

/// Which of its device's threads this is, and where its worker shows itself.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) number: usize,
    pub(crate) inspect: Inspect,
}

/// What is served round by round.
trait Rounds {
    /// Gives what is ready its turn, up to `budget` requests of each ring; what has more stays ready.
    fn turns(&mut self, budget: u32);
    /// Whether something is to have a turn.
    fn is_ready(&self) -> bool;
    /// Whether a worker wants requests that it did not want before.
    fn wants(&mut self) -> bool;
    /// Whether what a worker waits for may have come from elsewhere.
    fn has_news(&mut self) -> bool;
    /// Whether there is anything to look for.
    fn rest(&self) -> Rest;
    /// Looks at the rings; true when something is ready now.
    fn peek(&mut self) -> bool;
    /// Asks for kicks and takes a last look; true when there is work after all.
    fn arm(&mut self) -> bool;
    /// Takes what has happened, and waits for it up to `timeout`, for ever without one. `looks`: rings are looked at before
    /// the next sleep.
    fn wait(&mut self, timeout: Option<Duration>, looks: bool);
    /// How long to wait when nothing is to do.
    fn timeout(&self) -> Option<Duration>;
    /// The time may have come for something.
    fn tick(&mut self);
    /// Nothing is to be served any more.
    fn has_ended(&self) -> bool;
}

/// What rings do that are not ready.
#[derive(Clone, Copy)]
struct Rest {
    /// They wait for kicks.
    armed: bool,
    /// The kernel works on no request.
    idle: bool,
}

/// Serves until there is nothing more to be served.
fn serve<R: Rounds>(rounds: &mut R, poller: &mut Poller) {
    while !rounds.has_ended() {
        rounds.turns(BUDGET);
        // A change that was settled may have made a lane ready that is not asked for kicks.
        if rounds.is_ready() || spin(rounds, poller) || rounds.arm() {
            rounds.wait(Some(Duration::ZERO), !poller.window().is_zero());
        } else {
            sleep(rounds, poller);
        }
        rounds.tick();
    }
}

/// Looks at the rings for as long as that pays; true when the events are to be looked at and then
/// the rings again: one of them had something, or the thread never sleeps. While the kernel works
/// on a request, sleeping is better: its completion wakes.
fn spin<R: Rounds>(rounds: &mut R, poller: &mut Poller) -> bool {
    let (window, always) = (poller.window(), poller.always());
    let rest = rounds.rest();
    if window.is_zero() || rest.armed || !always && !rest.idle {
        return false;
    }
    let until = Instant::now() + window;
    loop {
        for _ in 0..SPINS {
            if rounds.peek() {
                return true;
            }
            std::hint::spin_loop();
        }
        if rounds.has_news() {
            return true;
        }
        if Instant::now() >= until {
            poller.looked_in_vain();
            return always;
        }
    }
}

/// Waits for events; the poller learns how long it took until there was work: a kick, or what a worker waited for.
fn sleep<R: Rounds>(rounds: &mut R, poller: &mut Poller) {
    let before = Instant::now();
    rounds.wait(rounds.timeout(), !poller.window().is_zero());
    let time = before.elapsed();
    if rounds.is_ready() || rounds.wants() {
        poller.slept(time);
    } else {
        poller.slept_on();
    }
}

/// The shorter one, of those that there are.
fn sooner(one: Option<Duration>, other: Option<Duration>) -> Option<Duration> {
    one.into_iter().chain(other).min()
}

/// Builds the worker, reports how that went, and serves until it is told to quit.
pub(crate) fn run<W: Worker>(
    port: Arc<Port>,
    events: Box<dyn EventLoop>,
    make: MakeWorker<W>,
    place: Place,
    poll: Duration,
    built: &std::sync::mpsc::Sender<Result<(), crate::Error>>,
) {
    let mut seat = match Seat::new(port, events, make, place) {
        Ok(seat) => seat,
        Err(error) => {
            let _ = built.send(Err(error));
            return;
        }
    };
    let _ = built.send(Ok(()));
    let mut poller = Poller::new(poll);
    while !seat.has_ended() {
        let round = catch_unwind(AssertUnwindSafe(|| serve(&mut seat, &mut poller)));
        if round.is_err() && !seat.recover() {
            return;
        }
    }
}
