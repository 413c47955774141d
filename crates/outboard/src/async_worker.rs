//! `AsyncWorker`: lets an async fn per queue serve requests, over the same [`Worker`] trait
//! (contract §1b).
//!
//! The future of a queue lives on the worker's thread and need not be `Send`. It is polled when a
//! request comes and when its waker is called, from whatever thread; what it awaits besides
//! requests (a socket of any async library, a timer) is its own affair. A future that returns is
//! made anew for the next request; what it had not taken goes back to the driver with length 0.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::future::{Future, poll_fn};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use crate::error::Error;
use crate::notify;
use crate::request::{Deferred, Request, Served};
use crate::worker::{Worker, WorkerContext};

/// The token of the wakers' own descriptor: authors' tokens are theirs.
const WAKE: u32 = u32::MAX;

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// Requests that wait for their future, and who is to be told of new ones.
#[derive(Debug, Default)]
struct Waiting {
    requests: VecDeque<Deferred>,
    waker: Option<Waker>,
}

/// The requests of one queue, for its future.
#[derive(Debug)]
pub struct Requests {
    queue: u16,
    waiting: Rc<RefCell<Waiting>>,
}

impl Requests {
    /// Which of the device's queues this is.
    #[must_use]
    pub fn queue(&self) -> u16 {
        self.queue
    }

    /// The next request. When the ring stops, the future simply gets no more.
    pub async fn next(&mut self) -> Deferred {
        poll_fn(|context| {
            let mut waiting = self.waiting.borrow_mut();
            match waiting.requests.pop_front() {
                Some(request) => Poll::Ready(request),
                None => {
                    waiting.waker = Some(context.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }
}

/// One queue's future.
struct Lane {
    queue: u16,
    waiting: Rc<RefCell<Waiting>>,
    task: Option<Task>,
}

/// See the module.
pub struct AsyncWorker {
    make: Box<dyn Fn(Requests) -> Task>,
    lanes: Vec<Lane>,
    wakes: Arc<notify::Waker>,
    waker: Waker,
}

impl fmt::Debug for AsyncWorker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AsyncWorker").field("lanes", &self.lanes.len()).finish_non_exhaustive()
    }
}

impl AsyncWorker {
    /// A worker whose queues are each served by a future that `serve` makes.
    ///
    /// # Errors
    /// No descriptor is left for the waker.
    pub fn new<F: Future<Output = ()> + 'static>(
        context: &mut WorkerContext<'_>,
        serve: impl Fn(Requests) -> F + 'static,
    ) -> Result<Self, Error> {
        let wakes = Arc::new(notify::Waker::new()?);
        context.watch(wakes.as_fd(), WAKE)?;
        Ok(Self {
            make: Box::new(move |requests| Box::pin(serve(requests))),
            lanes: Vec::new(),
            waker: Waker::from(Arc::clone(&wakes)),
            wakes,
        })
    }

    fn lane(&mut self, queue: u16) -> Option<&mut Lane> {
        if !self.lanes.iter().any(|lane| lane.queue == queue) {
            let lane = Lane { queue, waiting: Rc::default(), task: None };
            self.lanes.push(lane);
        }
        self.lanes.iter_mut().find(|lane| lane.queue == queue)
    }

    fn poll(&mut self) {
        let mut context = Context::from_waker(&self.waker);
        for lane in &mut self.lanes {
            let done =
                lane.task.as_mut().is_some_and(|task| task.as_mut().poll(&mut context).is_ready());
            if done {
                lane.task = None;
                lane.waiting.take();
            }
        }
    }
}

impl Worker for AsyncWorker {
    fn serve(&mut self, request: Request<'_>) -> Result<Served, Error> {
        let queue = request.queue();
        let deferred = request.defer();
        if let Some(lane) = self.lane(queue) {
            let mut waiting = lane.waiting.borrow_mut();
            waiting.requests.push_back(deferred);
            if let Some(waker) = waiting.waker.take() {
                waker.wake();
            }
        }
        for lane in &mut self.lanes {
            if lane.task.is_none() && !lane.waiting.borrow().requests.is_empty() {
                let waiting = Rc::clone(&lane.waiting);
                lane.task = Some((self.make)(Requests { queue: lane.queue, waiting }));
                self.waker.wake_by_ref();
            }
        }
        Ok(Served::later())
    }

    fn event(&mut self, token: u32) -> Result<(), Error> {
        if token == WAKE {
            self.wakes.drain();
            self.poll();
        }
        Ok(())
    }
}
