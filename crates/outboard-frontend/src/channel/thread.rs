//! A channel that is served by a thread of its own.
//!
//! A back-end may wait for the answer on its channel before it answers on the main socket; a caller that
//! waits for the main socket can then not serve the channel too. Invariant: the thread ends when this is
//! dropped, whatever the back-end does; it never waits for the caller: events that nobody takes are
//! bounded in number, the oldest of them are lost and counted.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::net::Shutdown;

use super::{Channel, ChannelEvent, SharedObjects, SharedRegions};
use crate::connection::deadline;
use crate::error::Error;

/// Events that wait for the caller before the oldest is lost.
const BACKLOG: usize = 256;
/// The thread looks up this often; it is woken by the socket, so this is no delay of anything.
const LONG: Duration = Duration::from_secs(3600);

/// A thread that serves a channel. See the module's text.
#[derive(Debug)]
pub struct ChannelThread {
    events: Arc<Events>,
    socket: OwnedFd,
    regions: SharedRegions,
    objects: SharedObjects,
    thread: Option<JoinHandle<()>>,
}

/// What the thread has for the caller.
#[derive(Debug, Default)]
struct Events {
    waiting: Mutex<Waiting>,
    came: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    events: VecDeque<ChannelEvent>,
    missed: u64,
    /// Nothing comes any more, and why, until that was told.
    over: bool,
    why: Option<Error>,
}

impl Events {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, event: ChannelEvent) {
        let mut waiting = self.lock();
        if waiting.events.iter().any(|other| says_nothing_new(&event, other)) {
            return;
        }
        if waiting.events.len() >= BACKLOG {
            waiting.events.pop_front();
            waiting.missed = waiting.missed.saturating_add(1);
        }
        waiting.events.push_back(event);
        drop(waiting);
        self.came.notify_one();
    }

    fn end(&self, why: Option<Error>) {
        let mut waiting = self.lock();
        waiting.over = true;
        waiting.why = waiting.why.take().or(why);
        drop(waiting);
        self.came.notify_one();
    }
}

/// Whether a caller that finds `other` waiting learns all that `event` would tell.
fn says_nothing_new(event: &ChannelEvent, other: &ChannelEvent) -> bool {
    use ChannelEvent::{ConfigChanged, IotlbMiss, VringCall, VringErr};
    match (event, other) {
        (ConfigChanged, ConfigChanged) => true,
        (VringCall { queue: this }, VringCall { queue })
        | (VringErr { queue: this }, VringErr { queue }) => this == queue,
        (IotlbMiss { iova: this, perm: need }, IotlbMiss { iova, perm }) => {
            (this, need) == (iova, perm)
        }
        _ => false,
    }
}

impl ChannelThread {
    pub(super) fn spawn(channel: Channel, socket: OwnedFd) -> Result<Self, Error> {
        let events = Arc::new(Events::default());
        let (regions, objects) = (channel.regions().clone(), channel.objects().clone());
        let theirs = Over(Arc::clone(&events));
        let thread = std::thread::Builder::new()
            .name("outboard-channel".to_owned())
            .spawn(move || serve(channel, &theirs.0))
            .map_err(|source| Error::Host { call: "starting a thread", source })?;
        Ok(Self { events, socket, regions, objects, thread: Some(thread) })
    }

    /// The next event; `None` when none comes before `timeout`. One that says what an event says that
    /// still waits is not told twice (configuration changes, signals of one ring, misses of one address).
    ///
    /// # Errors
    /// The channel is over: why, and then [`Error::GivenUp`].
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<ChannelEvent>, Error> {
        let until = deadline(timeout);
        let mut waiting = self.events.lock();
        loop {
            if let Some(event) = waiting.events.pop_front() {
                return Ok(Some(event));
            }
            if waiting.over {
                return Err(waiting.why.take().unwrap_or(Error::GivenUp));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let woken = self.events.came.wait_timeout(waiting, left);
            waiting = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Events that were lost because nobody took them: they were carried out and answered all the same, so
    /// [`Self::regions`] and [`Self::objects`] are right. A caller that answers misses of the IOTLB has to
    /// look at all of its mappings again.
    #[must_use]
    pub fn missed(&self) -> u64 {
        self.events.lock().missed
    }

    /// The shared-memory regions that the back-end maps into.
    #[must_use]
    pub const fn regions(&self) -> &SharedRegions {
        &self.regions
    }

    /// The shared objects that the back-end can look up.
    #[must_use]
    pub const fn objects(&self) -> &SharedObjects {
        &self.objects
    }
}

impl Drop for ChannelThread {
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Tells the caller that nothing comes any more, however the thread ends.
struct Over(Arc<Events>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.end(None);
    }
}

fn serve(mut channel: Channel, events: &Events) {
    loop {
        match channel.next_event(LONG) {
            Ok(Some(event)) => events.put(event),
            Ok(None) => {}
            Err(error) => return events.end(Some(error)),
        }
    }
}
