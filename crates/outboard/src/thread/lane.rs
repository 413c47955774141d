//! One queue on a worker thread: its turn, its doorbell, its end.
//!
//! Invariant: requests that the worker does not want stay in the ring; finished ones are shown after a batch at the latest.

use std::os::fd::AsFd;

use futures_channel::oneshot;
use rustix::io::Errno;
use tracing::{debug, warn};

use super::token;
use crate::events::EventLoop;
use crate::queue::Queue;
use crate::request::Request;
use crate::worker::Worker;

/// Requests that one lane serves before the next one has its turn.
const BUDGET: u32 = 64;
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
    /// Whether the queue can be given back; called again and again while it stops.
    pub(super) fn has_stopped(&mut self, events: &dyn EventLoop) -> bool {
        if self.stopping.is_none() {
            return false;
        }
        if self.abandoning {
            let queue = self.queue.index();
            return self.queue.abandon() && events.flying(queue).into_memory == 0;
        }
        self.queue.scatter();
        self.queue.is_idle() && !self.queue.owes()
    }
}

/// Serves what is in one ring, up to its budget; true when there may be more.
pub(super) fn turn<W: Worker>(worker: &mut W, lane: &mut Lane, events: &mut dyn EventLoop) -> bool {
    let stopping = lane.stopping.is_some();
    if stopping && (lane.abandoning || !lane.queue.owes()) {
        return false;
    }
    lane.resting = false;
    lane.queue.disarm();
    let more = serve_batch(worker, lane, events, stopping);
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
    stopping: bool,
) -> bool {
    for served in 1..=BUDGET {
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

/// Tells the worker whether requests of a lane reach it, if that has changed.
pub(super) fn tell<W: Worker>(worker: &mut W, lane: &mut Lane) {
    let enabled = lane.queue.is_enabled();
    if std::mem::replace(&mut lane.told, enabled) != enabled {
        worker.serves(lane.queue.index(), enabled);
    }
}

/// Takes changes of a lane and has the event loop follow.
pub(super) fn poll_control(lane: &mut Lane, events: &mut dyn EventLoop) {
    let changed = lane.queue.poll_control();
    if changed.kick {
        watch_kick(lane, events);
    }
    lane.ready |= changed.look;
}

/// Waits for the lane's doorbell of the moment.
pub(super) fn watch_kick(lane: &mut Lane, events: &mut dyn EventLoop) {
    let token = token::KICK | u64::from(lane.queue.index());
    if lane.kick_watched {
        events.unwatch(token);
        lane.kick_watched = false;
    }
    lane.polled = lane.deaf || lane.queue.is_polled();
    if let Some(kick) = lane.queue.kick_fd() {
        match events.watch(kick.as_fd(), token) {
            Ok(()) => lane.kick_watched = true,
            Err(error) if is_want(&error) => {
                warn!(queue = lane.queue.index(), "polled, its doorbell cannot be heard: {error}");
                lane.polled = true;
            }
            // Any type is tolerated; one that cannot be waited for never kicks (case A58).
            Err(error) => warn!(queue = lane.queue.index(), "the doorbell never rings: {error}"),
        }
    }
}

/// Whether the host lacks something: the peer is not to suffer for it (case C21).
fn is_want(error: &std::io::Error) -> bool {
    let lacks = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOSPC].map(Errno::raw_os_error);
    error.raw_os_error().is_some_and(|errno| lacks.contains(&errno))
}
