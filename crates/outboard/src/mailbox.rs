//! The control mailbox of a queue: how a change reaches a ring that runs (contract §1).
//!
//! The handler holds a [`QueueControl`], the queue the other end. A change is put in, the queue's
//! owner is woken, takes it between two requests and answers; only then does the handler
//! acknowledge the front-end. Invariant: a change that was put in is answered exactly once, with
//! an error when the queue is gone.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_channel::oneshot;
use outboard_memory::GuestMemory;
use outboard_queue::{Chain, RingLog};

use crate::channel::ChannelError;
use crate::notify::{Call, Kick, Waker};

/// A change of a running ring.
#[derive(Debug)]
pub(crate) enum Change {
    /// Another way to call the driver, or none.
    Call(Option<Arc<Call>>),
    /// Another doorbell.
    Kick(Kick),
    /// Another place to report that the ring broke.
    Err(Option<Arc<Call>>),
    /// VRING_KICK: look at the ring, and answer when what was in it is finished.
    Process,
    /// SET_VRING_ENABLE, or SET_FEATURES without bit 30.
    Enable(bool),
    /// Where writes are noted, or no more.
    Log(Option<RingLog>),
    /// The front-end's answer to the queue's question of this number about its IOMMU.
    Translated {
        /// The question.
        number: u64,
        /// Whether the front-end says that there is an entry now.
        told: Result<(), ChannelError>,
    },
    /// Questions can be asked (again): there is a channel.
    Ask,
    /// The next generation of guest memory. `drain`: what the old one had may go away, so
    /// requests that use it are finished first.
    Memory {
        /// The new map.
        memory: Arc<GuestMemory>,
        /// Finish what is in flight before taking it.
        drain: bool,
    },
}

/// What a queue answers once it lives by a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Applied {
    /// It serves requests, or would if it were enabled.
    Serving,
    /// Its ring is in no region: it waits for the memory to come back.
    Parked,
}

/// A change and whom to tell.
#[derive(Debug)]
pub(crate) struct Posted {
    pub(crate) change: Change,
    pub(crate) done: oneshot::Sender<Applied>,
}

/// In [`Mailbox::doors`]: nobody comes in any more.
const CLOSED: usize = 1 << (usize::BITS - 1);

/// What both ends share.
#[derive(Debug)]
pub(crate) struct Mailbox {
    waker: Waker,
    /// Whether the queue may leave requests behind: then whoever has one elsewhere reaches guest memory through the doors.
    has_doors: bool,
    /// How many are in guest memory with such a request, and [`CLOSED`].
    doors: AtomicUsize,
    /// None: the queue is gone, nobody would answer.
    changes: Mutex<Option<VecDeque<Posted>>>,
    returned: Mutex<Vec<(Chain, u32)>>,
    returned_count: AtomicUsize,
    broken: AtomicBool,
}

impl Mailbox {
    /// An empty mailbox. `has_doors`: [`Mailbox::shut`] may come.
    pub(crate) fn new(has_doors: bool) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            waker: Waker::new()?,
            has_doors,
            doors: AtomicUsize::new(0),
            changes: Mutex::new(Some(VecDeque::new())),
            returned: Mutex::default(),
            returned_count: AtomicUsize::new(0),
            broken: AtomicBool::new(false),
        }))
    }

    /// Puts a change in that nobody waits for.
    pub(crate) fn tell(&self, change: Change) {
        if let Some(changes) = lock(&self.changes).as_mut() {
            changes.push_back(Posted { change, done: oneshot::channel().0 });
        }
        self.waker.wake();
    }

    /// The next change, oldest first.
    pub(crate) fn take(&self) -> Option<Posted> {
        lock(&self.changes).as_mut()?.pop_front()
    }

    /// Gives a request back that was finished, or dropped, away from the queue. After [`Mailbox::shut`]
    /// it stays as it is: in flight.
    pub(crate) fn give_back(&self, chain: Chain, written: u32) {
        let mut returned = lock(&self.returned);
        if self.doors.load(Ordering::Acquire) & CLOSED != 0 {
            return;
        }
        returned.push((chain, written));
        self.returned_count.store(returned.len(), Ordering::Release);
        drop(returned);
        self.waker.wake();
    }

    /// Whether requests were given back: one load, for the hot path.
    pub(crate) fn has_returns(&self) -> bool {
        self.returned_count.load(Ordering::Acquire) != 0
    }

    /// The requests that were given back.
    pub(crate) fn take_returns(&self) -> Vec<(Chain, u32)> {
        let mut returned = lock(&self.returned);
        self.returned_count.store(0, Ordering::Release);
        std::mem::take(&mut *returned)
    }

    /// Comes in with a request that left its queue, to where guest memory can be reached; to be
    /// followed by [`Mailbox::go`]. `None`: the queue has left the request behind. `false`: there are
    /// no doors.
    pub(crate) fn come(&self) -> Option<bool> {
        if !self.has_doors {
            return Some(false);
        }
        if self.doors.fetch_add(1, Ordering::AcqRel) & CLOSED == 0 {
            return Some(true);
        }
        self.go();
        None
    }

    /// Leaves guest memory alone again.
    pub(crate) fn go(&self) {
        if self.doors.fetch_sub(1, Ordering::AcqRel) == CLOSED + 1 {
            self.waker.wake();
        }
    }

    /// Shuts the doors: requests that are elsewhere and were not given back stay there. Returns those
    /// that were.
    pub(crate) fn shut(&self) -> Vec<(Chain, u32)> {
        let mut returned = lock(&self.returned);
        self.doors.fetch_or(CLOSED, Ordering::AcqRel);
        self.returned_count.store(0, Ordering::Release);
        std::mem::take(&mut *returned)
    }

    /// Whether nobody is in guest memory any more; the waker tells when the last one goes.
    pub(crate) fn is_empty(&self) -> bool {
        self.doors.load(Ordering::Acquire) & !CLOSED == 0
    }

    /// Takes back the wake-ups so far.
    pub(crate) fn drain_wakes(&self) {
        self.waker.drain();
    }

    /// The queue is gone: whoever waits for an answer, now or later, hears that none comes.
    pub(crate) fn close(&self) {
        drop(lock(&self.changes).take());
    }

    /// Latches that the ring broke.
    pub(crate) fn set_broken(&self) {
        self.broken.store(true, Ordering::Release);
    }
}

impl AsFd for Mailbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.waker.as_fd()
    }
}

/// A lock that a panic elsewhere cannot poison: what it guards is whole between any two lines.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The handler's end of a queue's mailbox.
#[derive(Debug)]
pub(crate) struct QueueControl(Arc<Mailbox>);

impl QueueControl {
    /// The other end of `mailbox`.
    pub(crate) fn new(mailbox: Arc<Mailbox>) -> Self {
        Self(mailbox)
    }

    /// Posts a change; the receiver resolves when the queue lives by it, or fails when the queue
    /// is gone.
    pub(crate) fn post(&self, change: Change) -> oneshot::Receiver<Applied> {
        let (done, receiver) = oneshot::channel();
        if let Some(changes) = lock(&self.0.changes).as_mut() {
            changes.push_back(Posted { change, done });
        }
        self.0.waker.wake();
        receiver
    }

    /// Whether the ring broke since it started.
    pub(crate) fn is_broken(&self) -> bool {
        self.0.broken.load(Ordering::Acquire)
    }
}
