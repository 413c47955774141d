//! The workers of several devices on one thread, by turns.
//!
//! Each has its rings, its events and its budget. The one that has had the least of the thread's time has its turn, so that
//! one whose requests take long gets no more of it than the others; one that had nothing to do cannot save time up.
//! Invariants: what a worker panics over, or a device that is built or taken away here, costs the others nothing but that
//! time; a seat that has ended is let go when the kernel has ended what it had asked for.

use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use tracing::error;

use super::{Place, Port, Rest, Rounds, Seat, sooner};
use crate::error::Error;
use crate::events::EventLoop;
use crate::events::shared::SharedLoop;
use crate::inspect::{Counter, Inspect};
use crate::poller::Poller;
use crate::shared_thread::Door;
use crate::worker::{MakeWorker, Worker};

/// Time that a turn is to take at most: the next one's budget is halved if it took more, and doubled again if it
/// took less than half of it.
const SLICE: Duration = Duration::from_micros(100);

/// A seat of any worker.
trait Sitting: Rounds {
    /// After a panic; false: it ends.
    fn recover(&mut self) -> bool;
}

impl<W: Worker> Sitting for Seat<W> {
    fn recover(&mut self) -> bool {
        Self::recover(self)
    }
}

/// A worker that wants to sit here: sits down, and says how that went. None: it does not.
pub(crate) type Admission = Box<dyn FnOnce(&SharedLoop, &Inspect) -> Option<Chair> + Send>;

/// A place at the thread, and who sits there.
pub(crate) struct Chair {
    /// None: it has ended, and the kernel may not have yet what it asked for.
    seat: Option<Box<dyn Sitting>>,
    number: u64,
    budget: u32,
    /// Time that it has had.
    total: Duration,
    /// The same, and what it let go by while it had nothing to do.
    used: Duration,
    turns: Counter,
    busy: Counter,
    /// Where it is shown.
    shown: Inspect,
    /// Dropped at the very end: who waits for that hears of it.
    _ended: mpsc::Sender<()>,
}

/// See the module.
pub(crate) struct Crew {
    chairs: Vec<Chair>,
    events: SharedLoop,
    door: Arc<Door>,
    inspect: Inspect,
    sleeps: Counter,
    quit: bool,
}

/// What has a worker sit at a shared thread; how that went comes by `built`, its end as the end of `ended`.
pub(crate) fn admission<W: Worker + 'static>(
    port: Arc<Port>,
    make: MakeWorker<W>,
    place: Place,
    name: String,
    built: mpsc::Sender<Result<(), Error>>,
    ended: mpsc::Sender<()>,
) -> Admission {
    Box::new(move |events, inspect| {
        let own = events.seat();
        let number = own.number();
        let seat = catch_unwind(AssertUnwindSafe(|| Seat::new(port, Box::new(own), make, place)));
        match seat.unwrap_or_else(|_| Err(Error::refused("a worker panicked while it was built"))) {
            Ok(seat) => {
                let _ = built.send(Ok(()));
                Some(Chair::new(Box::new(seat), number, inspect.branch(name), ended))
            }
            Err(error) => {
                events.leave(number);
                events.is_over(number);
                let _ = built.send(Err(error));
                None
            }
        }
    })
}

impl Chair {
    fn new(seat: Box<dyn Sitting>, number: u64, shown: Inspect, ended: mpsc::Sender<()>) -> Self {
        let (turns, busy) = (Counter::default(), Counter::default());
        shown.show("turns", &turns);
        shown.show("busy-us", &busy);
        let (budget, total, used) = (super::BUDGET, Duration::ZERO, Duration::ZERO);
        Self { seat: Some(seat), number, budget, total, used, turns, busy, shown, _ended: ended }
    }

    /// What it has to do, with nobody but itself hurt when it panics; `otherwise` when it does, or has ended.
    fn guarded<T>(&mut self, otherwise: T, act: impl FnOnce(&mut dyn Sitting) -> T) -> T {
        let Some(seat) = &mut self.seat else { return otherwise };
        match catch_unwind(AssertUnwindSafe(|| act(seat.as_mut()))) {
            Ok(result) => result,
            Err(_) => {
                let recovered = catch_unwind(AssertUnwindSafe(|| seat.recover()));
                if !recovered.unwrap_or(false) {
                    self.end();
                }
                otherwise
            }
        }
    }

    fn end(&mut self) {
        let seat = self.seat.take();
        if catch_unwind(AssertUnwindSafe(|| drop(seat))).is_err() {
            error!("a worker panicked as it ended");
        }
    }

    fn is_ready(&self) -> bool {
        self.seat.as_ref().is_some_and(|seat| seat.is_ready())
    }

    /// It has had so much time for a turn.
    fn had(&mut self, took: Duration) {
        self.spent(took);
        self.turns.add(1);
        if took > SLICE {
            self.budget = (self.budget / 2).max(1);
        } else if took < SLICE / 2 {
            self.budget = (self.budget * 2).min(super::BUDGET);
        }
    }

    fn spent(&mut self, took: Duration) {
        self.used += took;
        self.total += took;
        self.busy.set(u64::try_from(self.total.as_micros()).unwrap_or(u64::MAX));
    }
}

impl Drop for Chair {
    fn drop(&mut self) {
        self.shown.forget("turns");
        self.shown.forget("busy-us");
    }
}

impl Crew {
    /// Serves those who come to `door`, until it is shut and nobody is left.
    pub(crate) fn run(
        events: Box<dyn EventLoop>,
        door: Arc<Door>,
        inspect: Inspect,
        poll: Duration,
        ready: &mpsc::Sender<Result<(), Error>>,
    ) {
        let events = SharedLoop::new(events);
        if let Err(error) = events.watch(door.as_fd()) {
            let _ = ready.send(Err(error.into()));
            return;
        }
        let _ = ready.send(Ok(()));
        super::serve(&mut Self::new(events, door, &inspect), &mut Poller::new(poll));
    }

    fn new(events: SharedLoop, door: Arc<Door>, inspect: &Inspect) -> Self {
        let (sleeps, inspect) = (inspect.counter("sleeps"), inspect.branch("devices"));
        Self { chairs: Vec::new(), events, door, inspect, sleeps, quit: false }
    }

    /// Those who wait at the door sit down; it may have been shut.
    fn admit(&mut self) {
        for admission in self.door.take() {
            self.chairs.extend(admission(&self.events, &self.inspect));
        }
        self.quit = self.door.is_shut();
    }

    /// Lets those go that have ended, and whose last operation has.
    fn clear(&mut self) {
        let events = self.events.clone();
        self.chairs.retain_mut(|chair| {
            if chair.seat.as_ref().is_some_and(|seat| seat.has_ended()) {
                chair.end();
            }
            if chair.seat.is_some() {
                return true;
            }
            events.leave(chair.number);
            !events.is_over(chair.number)
        });
    }

    fn seats(&self) -> impl Iterator<Item = &dyn Sitting> {
        self.chairs.iter().filter_map(|chair| chair.seat.as_deref())
    }
}

impl Rounds for Crew {
    fn turns(&mut self, _: u32) {
        let ready = self.chairs.iter().filter(|chair| chair.is_ready());
        let least = ready.map(|chair| chair.used).min();
        let mut before = Instant::now();
        for chair in &mut self.chairs {
            // Nobody else looks at its rings while others have always more.
            let ready =
                chair.is_ready() || least.is_some() && chair.guarded(true, |seat| seat.peek());
            if let Some(least) = least.filter(|_| !ready) {
                chair.used = chair.used.max(least);
            }
            // One that has had more than its share looks on, and settles what is to be settled.
            let waits = ready && least.is_some_and(|least| chair.used > least + SLICE);
            let budget = if waits { 0 } else { chair.budget };
            chair.guarded((), |seat| seat.turns(budget));
            let now = Instant::now();
            if ready && !waits {
                chair.had(now - before);
            }
            before = now;
        }
        self.clear();
    }

    fn is_ready(&self) -> bool {
        self.chairs.iter().any(Chair::is_ready)
    }

    fn wants(&mut self) -> bool {
        self.chairs.iter_mut().any(|chair| chair.guarded(true, |seat| seat.wants()))
    }

    fn has_news(&mut self) -> bool {
        self.chairs.iter_mut().any(|chair| chair.guarded(true, |seat| seat.has_news()))
    }

    fn rest(&self) -> Rest {
        let rests = self.seats().map(|seat| seat.rest());
        rests.fold(Rest { armed: true, idle: true }, |all, one| Rest {
            armed: all.armed && one.armed,
            idle: all.idle && one.idle,
        })
    }

    fn peek(&mut self) -> bool {
        self.chairs.iter_mut().any(|chair| chair.guarded(true, |seat| seat.peek()))
    }

    fn arm(&mut self) -> bool {
        let mut busy = false;
        for chair in &mut self.chairs {
            busy |= chair.guarded(true, |seat| seat.arm());
        }
        busy
    }

    fn wait(&mut self, timeout: Option<Duration>, looks: bool) {
        if timeout != Some(Duration::ZERO) {
            self.sleeps.add(1);
        }
        match self.events.wait(timeout) {
            Ok(true) => self.admit(),
            Ok(false) => {}
            Err(failure) => {
                // Nothing of a peer can cause it; without its loop the thread cannot serve.
                error!("event loop: {failure}");
                self.chairs.clear();
                self.quit = true;
            }
        }
        let mut before = Instant::now();
        for chair in &mut self.chairs {
            chair.guarded((), |seat| seat.wait(Some(Duration::ZERO), looks));
            let now = Instant::now();
            chair.spent(now - before);
            before = now;
        }
        self.clear();
    }

    fn timeout(&self) -> Option<Duration> {
        let restless = self.chairs.iter().any(|chair| chair.seat.is_none());
        let restless = restless.then_some(Duration::from_secs(1));
        self.seats().map(|seat| seat.timeout()).fold(restless, sooner)
    }

    fn tick(&mut self) {
        self.chairs.iter_mut().for_each(|chair| chair.guarded((), |seat| seat.tick()));
    }

    fn has_ended(&self) -> bool {
        self.quit && self.chairs.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Always has more; notes the budgets of its turns.
    struct Busy(std::rc::Rc<std::cell::RefCell<Vec<u32>>>);

    impl Rounds for Busy {
        fn turns(&mut self, budget: u32) {
            self.0.borrow_mut().push(budget);
        }

        fn is_ready(&self) -> bool {
            true
        }

        fn wants(&mut self) -> bool {
            false
        }

        fn has_news(&mut self) -> bool {
            false
        }

        fn rest(&self) -> Rest {
            Rest { armed: true, idle: true }
        }

        fn peek(&mut self) -> bool {
            true
        }

        fn arm(&mut self) -> bool {
            true
        }

        fn wait(&mut self, _: Option<Duration>, _: bool) {}

        fn timeout(&self) -> Option<Duration> {
            None
        }

        fn tick(&mut self) {}

        fn has_ended(&self) -> bool {
            false
        }
    }

    impl Sitting for Busy {
        fn recover(&mut self) -> bool {
            false
        }
    }

    fn chair() -> (Chair, std::rc::Rc<std::cell::RefCell<Vec<u32>>>) {
        let turns = std::rc::Rc::default();
        let seat = Box::new(Busy(std::rc::Rc::clone(&turns)));
        (Chair::new(seat, 1, Inspect::new(), mpsc::channel().0), turns)
    }

    #[test]
    fn c22_a_turn_that_took_long_is_followed_by_a_shorter_one_until_it_does_not() {
        let (mut chair, _) = chair();
        let budgets: Vec<_> = (0..8)
            .map(|_| {
                chair.had(SLICE * 2);
                chair.budget
            })
            .collect();
        assert_eq!(budgets, [32, 16, 8, 4, 2, 1, 1, 1]);
        chair.had(SLICE);
        assert_eq!(chair.budget, 1);
        (0..10).for_each(|_| chair.had(SLICE / 4));
        assert_eq!(chair.budget, super::super::BUDGET);
    }

    /// One that has had more than its share waits until the other one has had as much.
    #[test]
    fn c22_the_one_that_has_had_the_least_time_has_its_turn() {
        let events = crate::events::event_loop(crate::LoopKind::Epoll).unwrap();
        let door = Arc::new(Door::new().unwrap());
        let mut crew = Crew::new(SharedLoop::new(events), door, &Inspect::new());
        let ((mut greedy, first), (other, second)) = (chair(), chair());
        greedy.used = Duration::from_secs(3600);
        crew.chairs.extend([greedy, other]);
        crew.turns(super::super::BUDGET);
        assert_eq!((first.borrow()[0], second.borrow()[0]), (0, 64));
        // One that had nothing to do has not saved anything up.
        crew.chairs[1].used = crew.chairs[0].used;
        crew.turns(super::super::BUDGET);
        assert_eq!((first.borrow()[1], second.borrow()[1]), (64, 64));
    }
}
