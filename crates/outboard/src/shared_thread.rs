//! A thread that serves queues of several devices: started by itself, given to devices with
//! [`crate::WorkerOptions::shared`].
//!
//! Invariant: it lives as long as somebody has it, or a device that it serves does.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::Builder;
use std::time::Duration;

use crate::error::{Error, HostError};
use crate::events::{LoopKind, event_loop};
use crate::inspect::Inspect;
use crate::notify::Waker;
use crate::thread::{Admission, Crew};
use crate::worker_device::{processors, room_for_a_thread};

/// What an operator can set about a thread that devices share.
#[derive(Clone, Debug)]
pub struct SharedOptions {
    /// What it waits in.
    pub event_loop: LoopKind,
    /// How long it looks at its rings, at most, before it sleeps; zero: it always sleeps.
    pub poll: Duration,
    /// Processors that it may run on, by number; none: wherever the system puts it.
    pub pin: Vec<usize>,
}

impl Default for SharedOptions {
    fn default() -> Self {
        Self { event_loop: LoopKind::Auto, poll: Duration::from_micros(50), pin: Vec::new() }
    }
}

/// See the module. A clone is the same thread.
#[derive(Clone, Debug)]
pub struct SharedThread(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    door: Arc<Door>,
    inspect: Inspect,
}

/// Where workers come in, from other threads.
pub(crate) struct Door {
    waker: Waker,
    coming: Mutex<VecDeque<Admission>>,
    shut: AtomicBool,
}

impl std::fmt::Debug for Door {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Door").field("shut", &self.is_shut()).finish_non_exhaustive()
    }
}

impl SharedThread {
    /// Starts a thread of this name; nothing is served there yet.
    ///
    /// # Errors
    /// It cannot be started or pinned, or the event loop is refused.
    pub fn start(name: &str, options: &SharedOptions) -> Result<Self, Error> {
        room_for_a_thread()?;
        let door = Arc::new(Door::new()?);
        let inspect = Inspect::new();
        let (ready, result) = mpsc::channel();
        let (theirs, shown, options) = (Arc::clone(&door), inspect.clone(), options.clone());
        let run = move || {
            let events = processors(&options.pin)
                .and_then(|()| event_loop(options.event_loop).map_err(Error::from));
            match events {
                Ok(events) => Crew::run(events, theirs, shown, options.poll, &ready),
                Err(error) => drop(ready.send(Err(error))),
            }
        };
        let thread = Builder::new().name(name.chars().take(15).collect()).spawn(run);
        thread.map_err(HostError::io("cannot start a thread"))?;
        result.recv().map_err(|_| Error::refused("a thread ended as it started"))??;
        Ok(Self(Arc::new(Inner { door, inspect })))
    }

    /// What it shows of itself: how often it slept, and for each device its turns and the time that they took.
    #[must_use]
    pub fn inspect(&self) -> &Inspect {
        &self.0.inspect
    }

    /// Somebody comes to sit there.
    pub(crate) fn admit(&self, admission: Admission) {
        let coming = &self.0.door.coming;
        coming.lock().unwrap_or_else(PoisonError::into_inner).push_back(admission);
        self.0.door.waker.wake();
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.door.shut.store(true, Ordering::Release);
        self.door.waker.wake();
    }
}

impl Door {
    pub(crate) fn new() -> std::io::Result<Self> {
        let (coming, shut) = (Mutex::default(), AtomicBool::new(false));
        Ok(Self { waker: Waker::new()?, coming, shut })
    }

    /// Those who wait there, and their wake-ups.
    pub(crate) fn take(&self) -> VecDeque<Admission> {
        self.waker.drain();
        std::mem::take(&mut *self.coming.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Nobody comes any more.
    pub(crate) fn is_shut(&self) -> bool {
        self.shut.load(Ordering::Acquire)
    }
}

impl AsFd for Door {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.waker.as_fd()
    }
}
