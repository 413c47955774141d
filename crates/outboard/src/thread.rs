//! A worker thread: one event loop, one worker, one or many queues.
//!
//! ```text
//!   port (start, stop, quit) ─┐
//!   kick, control of each lane├─▶ wait ─▶ orders, changes ─▶ turn of each ready lane ─▶ arm ─┐
//!   device's own descriptors ─┤                              pop → serve → publish           │
//!   file completions ─────────┘ ◀────────────────────────────────────────────────────────────┘
//! ```
//!
//! Invariants: a lane waits for its kick only after it has armed the ring and looked once more, or rests
//! without kicks while the worker does not want its requests; a lane stops only when nothing of it is in
//! flight and everything is published, or, when it is abandoned, when nothing of it can reach guest memory
//! any more; a worker that panics costs its rings, not the thread.

mod lane;
mod port;
mod token;

use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use tracing::{debug, error, warn};

use crate::events::{Event, EventLoop};
use crate::inspect::Inspect;
use crate::poller::Poller;
use crate::queue::Queue;
use crate::request::Request;
use crate::worker::{MakeWorker, Worker, WorkerContext};

use lane::{Lane, poll_control, tell, turn, watch_kick};
pub(crate) use port::{Order, Port};
pub(crate) use token::device_token;

/// Looks at the rings between two looks at the clock.
const SPINS: u32 = 32;
/// How often a ring without a doorbell is looked at.
const POLL_EVERY: Duration = Duration::from_micros(500);

/// The thread's state.
struct Thread<W> {
    worker: W,
    lanes: Vec<Lane>,
    events: Box<dyn EventLoop>,
    port: Arc<Port>,
    happened: Vec<Event>,
    poller: Poller,
    next_tick: Option<Instant>,
    /// Some lane rests.
    rests: bool,
    quit: bool,
}

/// Which of its device's threads this is, and where its worker shows itself.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) number: usize,
    pub(crate) inspect: Inspect,
}

/// Builds the worker, reports how that went, and serves until it is told to quit.
pub(crate) fn run<W: Worker>(
    port: Arc<Port>,
    mut events: Box<dyn EventLoop>,
    make: &MakeWorker<W>,
    place: Place,
    poll: Duration,
    built: &std::sync::mpsc::Sender<Result<(), crate::Error>>,
) {
    let worker = match prepare(&port, events.as_mut(), make, &place) {
        Ok(worker) => worker,
        Err(error) => {
            let _ = built.send(Err(error));
            return;
        }
    };
    let mut thread = Thread {
        next_tick: worker.tick_every().map(|every| Instant::now() + every),
        worker,
        lanes: Vec::new(),
        events,
        port,
        happened: Vec::new(),
        poller: Poller::new(poll),
        rests: false,
        quit: false,
    };
    let _ = built.send(Ok(()));
    while !thread.quit {
        let round = catch_unwind(AssertUnwindSafe(|| thread.serve()));
        if round.is_err() && !thread.recover(make, &place) {
            return;
        }
    }
}

fn prepare<W>(
    port: &Port,
    events: &mut dyn EventLoop,
    make: &MakeWorker<W>,
    place: &Place,
) -> Result<W, crate::Error> {
    events.watch(port.as_fd(), token::PORT)?;
    make(&mut WorkerContext { events, place })
}

impl<W: Worker> Thread<W> {
    fn serve(&mut self) {
        while !self.quit {
            self.turns();
            self.settle();
            // A change that was settled may have made a lane ready that is not asked for kicks.
            if self.is_busy() || self.spin() || self.arm() {
                self.look();
            } else {
                self.sleep();
            }
            self.tick();
        }
    }

    /// Gives every ready lane its turn; those that have more stay ready.
    fn turns(&mut self) {
        for lane in &mut self.lanes {
            if lane.ready {
                lane.ready = turn(&mut self.worker, lane, self.events.as_mut());
                lane.armed = lane.resting;
                self.rests |= lane.resting;
            }
        }
    }

    /// Whether a lane has more. Then those that nobody kicks for are looked at, too: they would wait for as long as one
    /// of the others has always more.
    fn is_busy(&mut self) -> bool {
        let busy = self.lanes.iter().any(|lane| lane.ready);
        if busy && self.lanes.len() > 1 {
            for lane in self.lanes.iter_mut().filter(|lane| !lane.armed && !lane.ready) {
                lane.ready = lane.stopping.is_none() && lane.queue.has_requests();
            }
        }
        busy
    }

    /// Looks at the rings for as long as that pays; true when the events are to be looked at and then
    /// the rings again: one of them had something, or the thread never sleeps. While the kernel works
    /// on a request, sleeping is better: its completion wakes.
    fn spin(&mut self) -> bool {
        let (window, always) = (self.poller.window(), self.poller.always());
        let idle = self.lanes.iter().all(|lane| lane.armed);
        let waiting = !always && self.lanes.iter().any(|lane| !lane.queue.is_idle());
        if window.is_zero() || idle || waiting {
            return false;
        }
        let until = Instant::now() + window;
        loop {
            for _ in 0..SPINS {
                for lane in self.lanes.iter_mut().filter(|lane| !lane.armed) {
                    lane.ready |= lane.queue.has_requests();
                }
                if self.rests && self.ask_again(false) {
                    return true;
                }
                if self.lanes.iter().any(|lane| lane.ready) {
                    return true;
                }
                std::hint::spin_loop();
            }
            // What the worker waits for may come from elsewhere.
            if self.rests && self.events.has_news() {
                return true;
            }
            if Instant::now() >= until {
                self.poller.looked_in_vain();
                return always;
            }
        }
    }

    /// Asks for kicks and takes a last look; true when there is work after all.
    fn arm(&mut self) -> bool {
        let mut busy = false;
        for lane in self.lanes.iter_mut().filter(|lane| !lane.armed) {
            lane.ready = lane.stopping.is_none() && lane.queue.arm();
            lane.armed = !lane.ready;
            busy |= lane.ready;
        }
        if self.rests { self.ask_again(true) || busy } else { busy }
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

    /// Looks for events without waiting.
    fn look(&mut self) {
        self.wait(Some(Duration::ZERO));
    }

    /// Waits for events; the poller learns how long it took until there was work: a kick, or what the worker waited for.
    fn sleep(&mut self) {
        let before = Instant::now();
        self.wait(self.timeout());
        let time = before.elapsed();
        if self.lanes.iter().any(|lane| lane.ready) || self.rests && self.ask_again(false) {
            self.poller.slept(time);
        } else {
            self.poller.slept_on();
        }
    }

    fn wait(&mut self, timeout: Option<Duration>) {
        if let Err(failure) = self.events.wait(timeout, &mut self.happened) {
            // Nothing of a peer can cause it; without its loop the thread cannot serve.
            error!("event loop: {failure}");
            self.quit = true;
        }
        self.handle_events();
    }

    /// How long to wait when nothing is to do.
    fn timeout(&self) -> Option<Duration> {
        let polled = self.lanes.iter().any(|lane| lane.polled);
        let tick = self.next_tick.map(|at| at.saturating_duration_since(Instant::now()));
        match (polled, tick) {
            (true, Some(tick)) => Some(tick.min(POLL_EVERY)),
            (true, None) => Some(POLL_EVERY),
            (false, tick) => tick,
        }
    }

    fn handle_events(&mut self) {
        let mut happened = std::mem::take(&mut self.happened);
        let (mut ordered, mut answered) = (false, false);
        for event in happened.drain(..) {
            match event {
                // Afterwards: an operation that has ended is no longer there to be abandoned.
                Event::Ready(token::PORT) => ordered = true,
                Event::Ready(token) => self.ready(token),
                Event::Done { queue, token, chain, outcome } => {
                    self.completed(queue, token, chain, outcome);
                    answered = true;
                }
            }
        }
        self.happened = happened;
        if ordered {
            self.orders();
        }
        if answered {
            self.expect_more();
        }
        for lane in &mut self.lanes {
            if lane.polled {
                lane.ready = true;
                if lane.deaf {
                    poll_control(lane, self.events.as_mut());
                }
            }
            lane.queue.publish();
        }
        self.release();
    }

    /// The kernel has answered the last request, or there is something for the driver: if it waited for that, it has its
    /// next request ready soon. With a window it is looked for, and needs no kick; said before the driver sees the answer.
    fn expect_more(&mut self) {
        let working = self.lanes.iter().any(|lane| !lane.queue.is_idle());
        if working || self.poller.window().is_zero() {
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
                if let Some(lane) = self.lane(token::low(token)) {
                    lane.queue.drain_kick();
                    lane.ready = true;
                }
            }
            token::CONTROL => self.control(token::low(token)),
            _ => {
                if let Err(error) = self.worker.event(token::low(token)) {
                    warn!("device event: {error}");
                }
            }
        }
    }

    fn lane(&mut self, index: u32) -> Option<&mut Lane> {
        self.lanes.iter_mut().find(|lane| u32::from(lane.queue.index()) == index)
    }

    fn completed(
        &mut self,
        index: u16,
        token: u64,
        chain: outboard_queue::Chain,
        outcome: crate::request::Outcome,
    ) {
        let lane = self.lanes.iter_mut().find(|lane| lane.queue.index() == index);
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
                if let Some(lane) = self.lane(u32::from(index)) {
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
        self.port.abandon(self.events.flying(index).all);
        self.events.cancel(index);
        debug!(queue = index, "queue abandoned");
    }

    fn start(&mut self, queue: Box<Queue>) {
        let index = u64::from(queue.index());
        let watched = self.events.watch(queue.control_fd(), token::CONTROL | index);
        if let Err(error) = &watched {
            warn!(queue = queue.index(), "polled, changes cannot be waited for: {error}");
        }
        let mut lane = Lane {
            queue,
            ready: true,
            armed: false,
            resting: false,
            kick_watched: false,
            polled: false,
            deaf: watched.is_err(),
            stopping: None,
            abandoning: false,
            told: false,
        };
        watch_kick(&mut lane, self.events.as_mut());
        tell(&mut self.worker, &mut lane);
        self.lanes.push(lane);
    }

    fn control(&mut self, index: u32) {
        let events = self.events.as_mut();
        let Some(lane) = self.lanes.iter_mut().find(|l| u32::from(l.queue.index()) == index) else {
            return;
        };
        lane.queue.drain_control();
        poll_control(lane, events);
        tell(&mut self.worker, lane);
    }

    /// What waited until nothing is in flight: changes of memory, in-band kicks, stops.
    fn settle(&mut self) {
        let mut at = 0;
        while let Some(lane) = self.lanes.get_mut(at) {
            if lane.queue.is_idle() && lane.queue.waits() {
                poll_control(lane, self.events.as_mut());
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

    fn tick(&mut self) {
        let (Some(at), Some(every)) = (self.next_tick, self.worker.tick_every()) else { return };
        if Instant::now() < at {
            return;
        }
        self.next_tick = Some(Instant::now() + every);
        if let Err(error) = self.worker.tick() {
            warn!("device tick: {error}");
        }
    }

    /// After a panic in the worker: its rings are retired, a new worker takes its place. False
    /// when none can be built: the thread ends.
    fn recover(&mut self, make: &MakeWorker<W>, place: &Place) -> bool {
        error!("worker panicked: its rings are retired");
        for lane in &mut self.lanes {
            lane.queue.retire(&"its worker panicked");
            for (_, chain) in lane.queue.take_held() {
                lane.queue.complete(chain, 0);
            }
            lane.queue.scatter();
        }
        let events = self.events.as_mut();
        match make(&mut WorkerContext { events, place }) {
            Ok(worker) => {
                self.worker = worker;
                for lane in &mut self.lanes {
                    lane.told = false;
                    tell(&mut self.worker, lane);
                }
                // Their wake-up may have come with what the old one panicked on.
                self.orders();
                true
            }
            Err(error) => {
                error!("no new worker: {error}");
                false
            }
        }
    }
}
