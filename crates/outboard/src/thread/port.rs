//! The way to a worker thread: orders that wake it, and operations of abandoned requests that it still has
//! under way.
//!
//! Invariant: orders are carried out in the order in which they were given.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use futures_channel::oneshot;

use crate::notify::Waker;
use crate::queue::Queue;

/// What the device tells a thread.
pub(crate) enum Order {
    /// Serve this queue.
    Start(Box<Queue>),
    /// Give the queue back when nothing of it is in flight.
    Stop { index: u16, reply: oneshot::Sender<Box<Queue>> },
    /// A queue that is to stop: give it back as soon as nothing of it can reach guest memory.
    Abandon { index: u16 },
    /// End the thread.
    Quit,
}

/// The way to a thread.
pub(crate) struct Port {
    waker: Waker,
    orders: Mutex<VecDeque<Order>>,
    abandoned: Abandoned,
}

/// Operations of abandoned requests that the kernel has not ended, counted by their thread.
#[derive(Default)]
struct Abandoned {
    count: AtomicUsize,
    /// Who waits for the last one to end.
    waiting: Mutex<Vec<oneshot::Sender<()>>>,
}

impl Port {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self { waker: Waker::new()?, orders: Mutex::default(), abandoned: Abandoned::default() })
    }

    /// Whether operations of abandoned requests are under way.
    pub(crate) fn is_busy(&self) -> bool {
        self.abandoned.count.load(Ordering::Acquire) != 0
    }

    /// Resolves, or fails, when none is.
    pub(crate) fn quiet(&self) -> oneshot::Receiver<()> {
        let (done, quiet) = oneshot::channel();
        let mut waiting = lock(&self.abandoned.waiting);
        if self.is_busy() {
            waiting.push(done);
        }
        quiet
    }

    pub(super) fn abandon(&self, operations: usize) {
        self.abandoned.count.fetch_add(operations, Ordering::AcqRel);
    }

    pub(super) fn ended(&self) {
        // Under the lock: who looks and finds some is on the list before the last one ends.
        let mut waiting = lock(&self.abandoned.waiting);
        if self.abandoned.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            waiting.clear();
        }
    }

    pub(crate) fn send(&self, order: Order) {
        lock(&self.orders).push_back(order);
        self.waker.wake();
    }

    /// Empties its wake-ups; to be called once per wake, before the orders are taken.
    pub(super) fn drain(&self) {
        self.waker.drain();
    }

    pub(super) fn take(&self) -> Option<Order> {
        lock(&self.orders).pop_front()
    }
}

impl AsFd for Port {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.waker.as_fd()
    }
}

/// A lock that a panic elsewhere cannot poison: what it guards is whole between any two lines.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
