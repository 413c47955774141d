//! One event loop for the workers of several devices: each has a view of it that is its own.
//!
//! ```text
//!  seat 1 ─ watch, submit ─▶ tokens and queues with the seat's number ─▶ the thread's loop
//!         ◀─ inbox of the seat ◀──────────── shared out ◀───────────────┘
//! ```
//! Invariant: a seat hears of what is its own and of nothing else; what it leaves behind when it ends (watches,
//! files, operations that the kernel has not ended) is the loop's and reaches nobody.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use outboard_queue::Chain;

use super::{Event, EventLoop, FileId, FileOp, Flights};

/// Bits of a token, and of a queue's number, before those of its seat.
const TOKEN_BITS: u32 = 40;
const QUEUE_BITS: u32 = 16;
/// A seat's number has the bits that a token leaves.
const SEATS: u64 = 1 << (64 - TOKEN_BITS);

/// The thread's loop. Used by one thread only.
#[derive(Clone, Debug)]
pub(crate) struct SharedLoop(Rc<RefCell<Inner>>);

#[derive(Debug)]
struct Inner {
    events: Box<dyn EventLoop>,
    seats: BTreeMap<u64, Seat>,
    /// Of the thread's own.
    rung: bool,
    happened: Vec<Event>,
    last: u64,
}

#[derive(Debug, Default)]
struct Seat {
    inbox: Vec<Event>,
    /// Operations that the kernel has not ended.
    flying: usize,
    /// Queues that had any are below this one.
    queues: u64,
}

/// One seat's view of the loop.
#[derive(Debug)]
pub(crate) struct SeatLoop {
    shared: SharedLoop,
    number: u64,
    watched: Vec<u64>,
    files: Vec<FileId>,
}

impl SharedLoop {
    pub(crate) fn new(events: Box<dyn EventLoop>) -> Self {
        let (seats, happened) = (BTreeMap::new(), Vec::new());
        Self(Rc::new(RefCell::new(Inner { events, seats, rung: false, happened, last: 0 })))
    }

    /// Has [`SharedLoop::wait`] tell when `fd` becomes readable: the thread's own.
    pub(crate) fn watch(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.0.borrow_mut().events.watch(fd, 0)
    }

    /// Another seat's view.
    pub(crate) fn seat(&self) -> SeatLoop {
        let mut inner = self.0.borrow_mut();
        loop {
            // 0 is the thread itself.
            inner.last = (inner.last + 1) % SEATS;
            if inner.last != 0 && !inner.seats.contains_key(&inner.last) {
                break;
            }
        }
        let number = inner.last;
        inner.seats.insert(number, Seat::default());
        SeatLoop { shared: self.clone(), number, watched: Vec::new(), files: Vec::new() }
    }

    /// Waits as [`EventLoop::wait`] does and shares out what has happened; whether the thread's own descriptor is ready.
    pub(crate) fn wait(&self, timeout: Option<Duration>) -> io::Result<bool> {
        let mut inner = self.0.borrow_mut();
        let Inner { events, seats, rung, happened, .. } = &mut *inner;
        events.wait(timeout, happened)?;
        for event in happened.drain(..) {
            let (number, event) = match event {
                Event::Ready(0) => {
                    *rung = true;
                    continue;
                }
                Event::Ready(token) => {
                    (token >> TOKEN_BITS, Event::Ready(token & ((1 << TOKEN_BITS) - 1)))
                }
                Event::Done { queue, token, chain, outcome } => {
                    let number = queue >> QUEUE_BITS;
                    if let Some(seat) = seats.get_mut(&number) {
                        seat.flying = seat.flying.saturating_sub(1);
                    }
                    let queue = queue & ((1 << QUEUE_BITS) - 1);
                    (number, Event::Done { queue, token, chain, outcome })
                }
            };
            // What a seat is told that has ended goes nowhere.
            if let Some(seat) = seats.get_mut(&number) {
                seat.inbox.push(event);
            }
        }
        Ok(std::mem::take(rung))
    }

    /// A seat has ended, its view is gone: asks the kernel to end its operations.
    pub(crate) fn leave(&self, number: u64) {
        let mut inner = self.0.borrow_mut();
        let Inner { events, seats, .. } = &mut *inner;
        let queues = seats.get(&number).map_or(0, |seat| seat.queues);
        (0..queues).for_each(|queue| events.cancel(number << QUEUE_BITS | queue));
    }

    /// Whether the kernel has ended all operations of a seat that has ended; then it is forgotten.
    pub(crate) fn is_over(&self, number: u64) -> bool {
        let mut inner = self.0.borrow_mut();
        let over = inner.seats.get(&number).is_none_or(|seat| seat.flying == 0);
        if over {
            inner.seats.remove(&number);
        } else if let Some(seat) = inner.seats.get_mut(&number) {
            seat.inbox.clear();
        }
        over
    }
}

impl SeatLoop {
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    fn token(&self, token: u64) -> u64 {
        self.number << TOKEN_BITS | token
    }

    fn queue(&self, queue: u64) -> u64 {
        self.number << QUEUE_BITS | queue
    }
}

impl EventLoop for SeatLoop {
    fn watch(&mut self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        self.shared.0.borrow_mut().events.watch(fd, self.token(token))?;
        self.watched.push(token);
        Ok(())
    }

    fn unwatch(&mut self, token: u64) {
        self.shared.0.borrow_mut().events.unwatch(self.token(token));
        self.watched.retain(|watched| *watched != token);
    }

    fn add_file(&mut self, file: Arc<File>) -> FileId {
        let file = self.shared.0.borrow_mut().events.add_file(file);
        self.files.push(file);
        file
    }

    fn remove_file(&mut self, file: FileId) {
        self.shared.0.borrow_mut().events.remove_file(file);
        self.files.retain(|kept| *kept != file);
    }

    fn can_submit(&self) -> bool {
        self.shared.0.borrow().events.can_submit()
    }

    fn submit(
        &mut self,
        op: FileOp,
        (queue, token): (u64, u64),
        apart: bool,
        chain: Chain,
    ) -> Result<(), Chain> {
        let mut inner = self.shared.0.borrow_mut();
        inner.events.submit(op, (self.queue(queue), token), apart, chain)?;
        if let Some(seat) = inner.seats.get_mut(&self.number) {
            seat.flying += 1;
            seat.queues = seat.queues.max(queue + 1);
        }
        Ok(())
    }

    fn cancel(&mut self, queue: u64) {
        self.shared.0.borrow_mut().events.cancel(self.queue(queue));
    }

    fn flying(&self, queue: u64) -> Flights {
        self.shared.0.borrow().events.flying(self.queue(queue))
    }

    fn has_news(&mut self) -> bool {
        let mut inner = self.shared.0.borrow_mut();
        inner.seats.get(&self.number).is_some_and(|seat| !seat.inbox.is_empty())
            || inner.events.has_news()
    }

    /// Takes what was shared out; it is the thread that waits.
    fn wait(&mut self, _: Option<Duration>, events: &mut Vec<Event>) -> io::Result<()> {
        if let Some(seat) = self.shared.0.borrow_mut().seats.get_mut(&self.number) {
            events.append(&mut seat.inbox);
        }
        Ok(())
    }
}

impl Drop for SeatLoop {
    fn drop(&mut self) {
        let mut inner = self.shared.0.borrow_mut();
        for token in self.watched.drain(..) {
            inner.events.unwatch(self.number << TOKEN_BITS | token);
        }
        self.files.drain(..).for_each(|file| inner.events.remove_file(file));
    }
}
