//! A queue on a worker thread: its turns, its doorbell, its end.
//!
//! Invariants: a lane waits for its kick only after it has armed the ring and looked once more, or rests
//! without kicks while the worker does not want its requests; a lane stops only when nothing of it is in
//! flight and everything is published, or, when it is abandoned, when nothing of it can reach guest memory
//! any more.

use std::os::fd::AsFd;

use futures_channel::oneshot;
use rustix::io::Errno;
use tracing::{debug, warn};

use super::token;
use crate::events::EventLoop;
use crate::queue::Queue;
use crate::request::Request;
use crate::worker::Worker;

/// Requests after which finished ones are shown to the driver although more are waiting.
const BATCH: u32 = 16;

/// A queue on this thread.
pub(super) struct Lane {
    pub(super) queue: Box<Queue>,
    /// The ring may hold requests: it is to have a turn.
    pub(super) ready: bool,
    /// A kick was asked for, and nothing has come since; or it rests.
    pub(super) armed: bool,
    /// The worker did not want its requests when it was last asked.
    pub(super) resting: bool,
    pub(super) kick_watched: bool,
    /// It is looked at again and again: nothing announces requests, or nothing that can be heard.
    pub(super) polled: bool,
    /// Nor are changes heard, for want of a descriptor: they are looked for as well.
    pub(super) deaf: bool,
    pub(super) stopping: Option<oneshot::Sender<Box<Queue>>>,
    /// It stops without finishing what is under way.
    pub(super) abandoning: bool,
    /// The worker was told that its requests reach it.
    pub(super) told: bool,
}

impl Lane {
    /// A queue that starts: it is looked at, and `events` tells of its kicks and changes.
    pub(super) fn start(queue: Box<Queue>, events: &mut dyn EventLoop) -> Self {
        let index = u64::from(queue.index());
        let watched = events.watch(queue.control_fd(), token::CONTROL | index);
        if let Err(error) = &watched {
            warn!(queue = queue.index(), "polled, changes cannot be waited for: {error}");
        }
        let mut lane = Self {
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
        lane.watch_kick(events);
        lane
    }

    /// Whether the queue can be given back; called again and again while it stops.
    pub(super) fn has_stopped(&mut self, events: &dyn EventLoop) -> bool {
        if self.stopping.is_none() {
            return false;
        }
        if self.abandoning {
            let queue = self.queue.index();
            return self.queue.abandon() && events.flying(queue.into()).into_memory == 0;
        }
        self.queue.scatter();
        self.queue.is_idle() && !self.queue.owes()
    }

    /// Tells the worker whether requests of the lane reach it, if that has changed.
    pub(super) fn tell<W: Worker>(&mut self, worker: &mut W) {
        let enabled = self.queue.is_enabled();
        if std::mem::replace(&mut self.told, enabled) != enabled {
            worker.serves(self.queue.index(), enabled);
        }
    }

    /// Takes changes and has the event loop follow.
    pub(super) fn poll_control(&mut self, events: &mut dyn EventLoop) {
        let changed = self.queue.poll_control();
        if changed.kick {
            self.watch_kick(events);
        }
        self.ready |= changed.look;
    }

    /// Waits for the doorbell of the moment.
    fn watch_kick(&mut self, events: &mut dyn EventLoop) {
        let token = token::KICK | u64::from(self.queue.index());
        if self.kick_watched {
            events.unwatch(token);
            self.kick_watched = false;
        }
        self.polled = self.deaf || self.queue.is_polled();
        if let Some(kick) = self.queue.kick_fd() {
            match events.watch(kick.as_fd(), token) {
                Ok(()) => self.kick_watched = true,
                Err(error) if is_want(&error) => {
                    warn!(
                        queue = self.queue.index(),
                        "polled, its doorbell cannot be heard: {error}"
                    );
                    self.polled = true;
                }
                // Any type is tolerated; one that cannot be waited for never kicks (case A58).
                Err(error) => {
                    warn!(queue = self.queue.index(), "the doorbell never rings: {error}");
                }
            }
        }
    }
}

/// Serves what is in one ring, up to `budget` requests; true when there may be more.
pub(super) fn turn<W: Worker>(
    worker: &mut W,
    lane: &mut Lane,
    events: &mut dyn EventLoop,
    budget: u32,
) -> bool {
    let stopping = lane.stopping.is_some();
    if stopping && (lane.abandoning || !lane.queue.owes()) {
        return false;
    }
    lane.resting = false;
    lane.queue.disarm();
    let more = serve_batch(worker, lane, events, (stopping, budget));
    lane.queue.publish();
    worker.turned(lane.queue.index());
    more
}

/// As [`turn`], without showing the end of it.
#[inline(always)]
fn serve_batch<W: Worker>(
    worker: &mut W,
    lane: &mut Lane,
    events: &mut dyn EventLoop,
    (stopping, budget): (bool, u32),
) -> bool {
    for served in 1..=budget {
        if !worker.wants(lane.queue.index()) && !stopping && !lane.queue.discards() {
            lane.resting = true;
            return false;
        }
        let Some(chain) = lane.queue.pop_chain() else { return false };
        let request = Request::new(chain, &mut lane.queue, Some(&mut *events));
        if let Err(error) = worker.serve(request) {
            debug!(queue = lane.queue.index(), "request failed: {error}");
        }
        if served % BATCH == 0 {
            lane.queue.publish();
        }
    }
    true
}

/// Whether the host lacks something: the peer is not to suffer for it (case C21).
fn is_want(error: &std::io::Error) -> bool {
    let lacks = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOSPC].map(Errno::raw_os_error);
    error.raw_os_error().is_some_and(|errno| lacks.contains(&errno))
}
