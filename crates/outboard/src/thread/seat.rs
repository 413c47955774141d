//! A worker at its thread: its queues, what they wait for, its orders.
//!
//! ```text
//!   port (start, stop, quit) ─┐
//!   kick, control of each lane├─▶ wait ─▶ orders, changes ─▶ turn of each ready lane ─▶ arm ─┐
//!   device's own descriptors ─┤                              pop → serve → publish           │
//!   file completions ─────────┘ ◀────────────────────────────────────────────────────────────┘
//! ```
//! Invariant: a worker that panics costs its rings and what it panicked over, nothing else that happened.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use tracing::{debug, error, warn};

use super::lane::{Lane, turn};
use super::{Order, Place, Port, Rest, Rounds, token};
use crate::events::{Event, EventLoop};
use crate::queue::Queue;
use crate::request::{Outcome, Request};
use crate::worker::{MakeWorker, Worker, WorkerContext};

/// How often a ring without a doorbell is looked at.
const POLL_EVERY: Duration = Duration::from_micros(500);

/// See the module.
pub(super) struct Seat<W> {
    worker: W,
    make: MakeWorker<W>,
    place: Place,
    lanes: Vec<Lane>,
    events: Box<dyn EventLoop>,
    port: Arc<Port>,
    /// What has happened and is not done with, the last of it first.
    happened: Vec<Event>,
    /// There are orders.
    ordered: bool,
    next_tick: Option<Instant>,
    /// Some lane rests.
    rests: bool,
    /// Rings are looked at before the thread sleeps.
    looks: bool,
    quit: bool,
}

impl<W: Worker> Seat<W> {
    /// Builds the worker; to be called on its thread.
    ///
    /// # Errors
    /// It cannot be built, or the port cannot be waited for.
    pub(super) fn new(
        port: Arc<Port>,
        mut events: Box<dyn EventLoop>,
        make: MakeWorker<W>,
        place: Place,
    ) -> Result<Self, crate::Error> {
        use std::os::fd::AsFd;
        events.watch(port.as_fd(), token::PORT)?;
        let worker = make(&mut WorkerContext { events: events.as_mut(), place: &place })?;
        Ok(Self {
            next_tick: worker.tick_every().and_then(|every| Instant::now().checked_add(every)),
            worker,
            make,
            place,
            lanes: Vec::new(),
            events,
            port,
            happened: Vec::new(),
            ordered: false,
            rests: false,
            looks: false,
            quit: false,
        })
    }

    /// What waited until nothing is in flight: changes of memory, in-band kicks, stops.
    fn settle(&mut self) {
        let mut at = 0;
        while let Some(lane) = self.lanes.get_mut(at) {
            if lane.queue.is_idle() && lane.queue.waits() {
                lane.poll_control(self.events.as_mut());
            }
            lane.queue.processed_but(lane.resting);
            if !lane.has_stopped(self.events.as_ref()) {
                at += 1;
                continue;
            }
            let mut lane = self.lanes.swap_remove(at);
            lane.queue.publish();
            if lane.told {
                self.worker.serves(lane.queue.index(), false);
            }
            let index = u64::from(lane.queue.index());
            self.events.unwatch(token::KICK | index);
            self.events.unwatch(token::CONTROL | index);
            debug!(queue = index, "queue stopped");
            if let Some(reply) = lane.stopping.take() {
                // Whoever asked may have left: then the queue ends here.
                let _ = reply.send(lane.queue);
            }
        }
    }

    /// Whether the worker wants requests of a lane that rests; `last`: before the thread sleeps.
    #[cold]
    fn ask_again(&mut self, last: bool) -> bool {
        let mut busy = false;
        self.rests = false;
        for lane in self.lanes.iter_mut().filter(|lane| lane.resting) {
            let queue = lane.queue.index();
            let wanted = lane.stopping.is_none()
                && if last { self.worker.wants_at_last(queue) } else { self.worker.wants(queue) };
            lane.resting = !wanted;
            lane.ready |= wanted;
            self.rests |= lane.resting;
            busy |= wanted;
        }
        if busy {
            self.expect_more();
        }
        busy
    }

    /// Does with everything that has happened.
    fn handle_events(&mut self) {
        let mut answered = false;
        while let Some(event) = self.happened.pop() {
            match event {
                // Afterwards: an operation that has ended is no longer there to be abandoned.
                Event::Ready(token::PORT) => self.ordered = true,
                Event::Ready(token) => self.ready(token),
                Event::Done { queue, token, chain, outcome } => {
                    self.completed(queue, token, chain, outcome);
                    answered = true;
                }
            }
        }
        if std::mem::take(&mut self.ordered) {
            self.orders();
        }
        if answered {
            self.expect_more();
        }
        for lane in &mut self.lanes {
            if lane.polled {
                lane.ready = true;
                if lane.deaf {
                    lane.poll_control(self.events.as_mut());
                }
            }
            lane.queue.publish();
        }
        self.release();
    }

    /// The kernel has answered the last request, or there is something for the driver: if it waited for that, it has its
    /// next request ready soon. Where rings are looked at it needs no kick; said before the driver sees the answer.
    fn expect_more(&mut self) {
        if !self.looks || self.lanes.iter().any(|lane| !lane.queue.is_idle()) {
            return;
        }
        for lane in &mut self.lanes {
            if lane.armed && !lane.resting && lane.stopping.is_none() {
                lane.queue.disarm();
                lane.armed = false;
            }
        }
    }

    /// Goes on with requests that were set aside; what they waited for has been shown.
    fn release(&mut self) {
        while let Some(token) = self.worker.release() {
            for lane in &mut self.lanes {
                let Some(chain) = lane.queue.held(token) else { continue };
                let request = Request::new(chain, &mut lane.queue, Some(self.events.as_mut()));
                if let Err(error) = self.worker.resumed(request, token) {
                    debug!(queue = lane.queue.index(), "request failed: {error}");
                }
                lane.queue.publish();
                break;
            }
        }
    }

    fn ready(&mut self, token: u64) {
        match token::kind(token) {
            token::KICK => {
                if let Some(lane) = self.lane(token::low(token).into()) {
                    lane.queue.drain_kick();
                    lane.ready = true;
                }
            }
            token::CONTROL => self.control(token::low(token).into()),
            _ => {
                if let Err(error) = self.worker.event(token::low(token)) {
                    warn!("device event: {error}");
                }
            }
        }
    }

    fn lane(&mut self, index: u64) -> Option<&mut Lane> {
        self.lanes.iter_mut().find(|lane| u64::from(lane.queue.index()) == index)
    }

    fn completed(
        &mut self,
        index: u64,
        token: u64,
        chain: outboard_queue::Chain,
        outcome: Outcome,
    ) {
        let lane = self.lanes.iter_mut().find(|lane| u64::from(lane.queue.index()) == index);
        let Some(lane) = lane.filter(|lane| !lane.abandoning) else {
            // Its queue is as good as gone, and is not started again before the last one has ended.
            drop(chain);
            self.worker.abandoned(token, outcome);
            self.port.ended();
            return;
        };
        let request = Request::new(chain, &mut lane.queue, Some(self.events.as_mut()));
        if let Err(error) = self.worker.completed(request, token, outcome) {
            warn!(queue = index, "request failed: {error}");
        }
    }

    fn orders(&mut self) {
        self.port.drain();
        while let Some(order) = self.port.take() {
            self.order(order);
        }
    }

    fn order(&mut self, order: Order) {
        match order {
            Order::Start(queue) => self.start(queue),
            Order::Stop { index, reply } => {
                if let Some(lane) = self.lane(index.into()) {
                    lane.stopping = Some(reply);
                }
            }
            Order::Abandon { index } => self.abandon(index),
            Order::Quit => self.quit = true,
        }
    }

    /// Nothing of a queue that stops is finished from now on.
    fn abandon(&mut self, index: u16) {
        let Some(lane) = self.lanes.iter_mut().find(|lane| lane.queue.index() == index) else {
            return;
        };
        if lane.stopping.is_none() || !lane.queue.can_abandon() || lane.abandoning {
            return;
        }
        lane.abandoning = true;
        for (token, chain) in lane.queue.take_held() {
            drop(chain);
            self.worker.abandoned(token, Err(Errno::CANCELED.into()));
        }
        self.port.abandon(self.events.flying(index.into()).all);
        self.events.cancel(index.into());
        debug!(queue = index, "queue abandoned");
    }

    fn start(&mut self, queue: Box<Queue>) {
        self.lanes.push(Lane::start(queue, self.events.as_mut()));
        if let Some(lane) = self.lanes.last_mut() {
            lane.tell(&mut self.worker);
        }
    }

    fn control(&mut self, index: u64) {
        let lane = self.lanes.iter_mut().find(|lane| u64::from(lane.queue.index()) == index);
        let Some(lane) = lane else { return };
        lane.queue.drain_control();
        lane.poll_control(self.events.as_mut());
        lane.tell(&mut self.worker);
    }

    /// After a panic in the worker: its rings are retired, a new worker takes its place and hears of what else had
    /// happened. False when none can be built.
    pub(super) fn recover(&mut self) -> bool {
        error!("worker panicked: its rings are retired");
        for lane in &mut self.lanes {
            lane.queue.retire(&"its worker panicked");
            for (_, chain) in lane.queue.take_held() {
                lane.queue.complete(chain, 0);
            }
            lane.queue.scatter();
        }
        let context = &mut WorkerContext { events: self.events.as_mut(), place: &self.place };
        match (self.make)(context) {
            Ok(worker) => {
                self.worker = worker;
                for lane in &mut self.lanes {
                    lane.told = false;
                    lane.tell(&mut self.worker);
                }
                // Their wake-up may have come with what the old one panicked on.
                self.ordered = true;
                true
            }
            Err(error) => {
                error!("no new worker: {error}");
                false
            }
        }
    }
}

/// Whether a lane that nobody kicks for has work: it would wait for as long as one of the others has always more.
fn has_more<W: Worker>(worker: &mut W, lane: &mut Lane) -> bool {
    if lane.stopping.is_some() {
        return false;
    }
    if lane.resting {
        worker.wants(lane.queue.index())
    } else {
        !lane.armed && lane.queue.has_requests()
    }
}

impl<W: Worker> Rounds for Seat<W> {
    fn turns(&mut self, budget: u32) {
        // None: it waits until others have had their share.
        let lanes = if budget == 0 { &mut [] } else { self.lanes.as_mut_slice() };
        let several = lanes.iter().any(|lane| lane.ready) && lanes.len() > 1;
        for lane in lanes {
            if lane.ready || several && has_more(&mut self.worker, lane) {
                lane.ready = turn(&mut self.worker, lane, self.events.as_mut(), budget);
                lane.armed = lane.resting;
                self.rests |= lane.resting;
            }
        }
        self.settle();
    }

    fn is_ready(&self) -> bool {
        self.lanes.iter().any(|lane| lane.ready)
    }

    fn wants(&mut self) -> bool {
        self.rests && self.ask_again(false)
    }

    fn has_news(&mut self) -> bool {
        self.rests && self.events.has_news()
    }

    fn rest(&self) -> Rest {
        Rest {
            armed: self.lanes.iter().all(|lane| lane.armed),
            idle: self.lanes.iter().all(|lane| lane.queue.is_idle()),
        }
    }

    fn peek(&mut self) -> bool {
        for lane in self.lanes.iter_mut().filter(|lane| !lane.armed) {
            lane.ready |= lane.queue.has_requests();
        }
        self.wants() || self.is_ready()
    }

    fn arm(&mut self) -> bool {
        let mut busy = false;
        for lane in self.lanes.iter_mut().filter(|lane| !lane.armed) {
            lane.ready = lane.stopping.is_none() && lane.queue.arm();
            lane.armed = !lane.ready;
            busy |= lane.ready;
        }
        if self.rests { self.ask_again(true) || busy } else { busy }
    }

    fn wait(&mut self, timeout: Option<Duration>, looks: bool) {
        // What a panic left comes first.
        if self.happened.is_empty() && !self.ordered {
            if let Err(failure) = self.events.wait(timeout, &mut self.happened) {
                // Nothing of a peer can cause it; without its loop the thread cannot serve.
                error!("event loop: {failure}");
                self.quit = true;
            }
            self.happened.reverse();
        }
        self.looks = looks;
        self.handle_events();
    }

    fn timeout(&self) -> Option<Duration> {
        let polled = self.lanes.iter().any(|lane| lane.polled).then_some(POLL_EVERY);
        let tick = self.next_tick.map(|at| at.saturating_duration_since(Instant::now()));
        super::sooner(polled, tick)
    }

    fn tick(&mut self) {
        let (Some(at), Some(every)) = (self.next_tick, self.worker.tick_every()) else { return };
        if Instant::now() < at {
            return;
        }
        self.next_tick = Instant::now().checked_add(every);
        if let Err(error) = self.worker.tick() {
            warn!("device tick: {error}");
        }
    }

    fn has_ended(&self) -> bool {
        self.quit
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::BorrowedFd;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::Mutex;

    use super::*;
    use crate::events::{FileId, FileOp, Flights};
    use crate::inspect::Inspect;

    /// Tells of these device events, all at once.
    #[derive(Debug)]
    struct Script(Vec<u32>);

    impl EventLoop for Script {
        fn watch(&mut self, _: BorrowedFd<'_>, _: u64) -> std::io::Result<()> {
            Ok(())
        }

        fn unwatch(&mut self, _: u64) {}

        fn add_file(&mut self, _: Arc<File>) -> FileId {
            FileId(0)
        }

        fn remove_file(&mut self, _: FileId) {}

        fn can_submit(&self) -> bool {
            false
        }

        fn submit(
            &mut self,
            _: FileOp,
            _: (u64, u64),
            _: bool,
            chain: outboard_queue::Chain,
        ) -> Result<(), outboard_queue::Chain> {
            Err(chain)
        }

        fn cancel(&mut self, _: u64) {}

        fn flying(&self, _: u64) -> Flights {
            Flights::default()
        }

        fn has_news(&mut self) -> bool {
            !self.0.is_empty()
        }

        fn wait(&mut self, _: Option<Duration>, events: &mut Vec<Event>) -> std::io::Result<()> {
            events.extend(self.0.drain(..).map(|number| Event::Ready(token::device_token(number))));
            Ok(())
        }
    }

    /// Notes its events; panics over number 2.
    struct Notes(Arc<Mutex<Vec<u32>>>);

    impl Worker for Notes {
        fn serve(&mut self, request: Request<'_>) -> Result<crate::Served, crate::Error> {
            Ok(request.done(0))
        }

        fn event(&mut self, number: u32) -> Result<(), crate::Error> {
            assert!(number != 2, "as the test asked");
            self.0.lock().unwrap().push(number);
            Ok(())
        }
    }

    /// C32: a change that waits for its answer is not lost with the worker that fell over something else.
    #[test]
    fn c32_what_else_happened_in_the_round_of_a_panic_reaches_the_next_worker() {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let notes = Arc::clone(&heard);
        let make: MakeWorker<Notes> = Arc::new(move |_| Ok(Notes(Arc::clone(&notes))));
        let port = Arc::new(Port::new().unwrap());
        let place = Place { number: 0, inspect: Inspect::new() };
        let events = Box::new(Script(vec![1, 2, 3, 4]));
        let mut seat = Seat::new(Arc::clone(&port), events, make, place).unwrap();
        port.send(Order::Quit);
        let round = catch_unwind(AssertUnwindSafe(|| seat.wait(None, false)));
        assert!(round.is_err() && seat.recover());
        assert_eq!(*heard.lock().unwrap(), [1]);
        seat.wait(None, false);
        assert_eq!(*heard.lock().unwrap(), [1, 3, 4]);
        assert!(seat.has_ended(), "orders too, whose wake-up may have been among them");
    }
}
