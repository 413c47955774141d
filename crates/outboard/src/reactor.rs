//! How the control plane waits: for sockets, for time, for other threads.
//!
//! The handler is written once, as `async fn`. [`Reactor`] is all that it asks of the world, in two
//! forms: [`Parker`] with [`block_on`], a few lines over poll(2) for the blocking
//! `Server::serve`, and [`AsyncIo`], which runs on any executor. Why our own `block_on`: the small
//! build of the library has no executor to borrow one from.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Wake};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::notify::Waker;

/// What the control plane needs of an executor's surroundings.
pub(crate) trait Reactor: Clone + Send + Sync {
    /// A descriptor that can be waited for.
    type Source: AsFd + Send + Sync;

    /// Makes a descriptor fit to be waited for.
    fn source(&self, fd: OwnedFd) -> io::Result<Self::Source>;

    /// Resolves when a read would not block, or would fail at once.
    fn readable(&self, source: &Self::Source) -> impl Future<Output = io::Result<()>> + Send;

    /// Resolves when a write would not block, or would fail at once.
    fn writable(&self, source: &Self::Source) -> impl Future<Output = io::Result<()>> + Send;

    /// Resolves after `time`, on the monotonic clock.
    fn sleep(&self, time: Duration) -> impl Future<Output = ()> + Send;

    /// The time on that clock.
    fn now(&self) -> Instant {
        Instant::now()
    }
}

/// Waits on the thread itself; its futures make progress inside [`block_on`] only.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parker;

/// What the futures of the running `block_on` wait for, gathered anew in each round.
#[derive(Default)]
struct Interests {
    fds: Vec<(Arc<OwnedFd>, PollFlags)>,
    until: Option<Instant>,
}

thread_local! {
    static INTERESTS: RefCell<Interests> = RefCell::default();
}

impl Reactor for Parker {
    type Source = Arc<OwnedFd>;

    fn source(&self, fd: OwnedFd) -> io::Result<Arc<OwnedFd>> {
        Ok(Arc::new(fd))
    }

    fn readable(&self, source: &Arc<OwnedFd>) -> impl Future<Output = io::Result<()>> + Send {
        ready(Arc::clone(source), PollFlags::IN)
    }

    fn writable(&self, source: &Arc<OwnedFd>) -> impl Future<Output = io::Result<()>> + Send {
        ready(Arc::clone(source), PollFlags::OUT)
    }

    fn sleep(&self, time: Duration) -> impl Future<Output = ()> + Send {
        // None: it is longer than the clock reaches.
        let until = Instant::now().checked_add(time);
        poll_fn(move |_| {
            let Some(until) = until else { return Poll::Pending };
            if Instant::now() >= until {
                return Poll::Ready(());
            }
            INTERESTS.with_borrow_mut(|interests| {
                interests.until = Some(interests.until.map_or(until, |other| other.min(until)));
            });
            Poll::Pending
        })
    }
}

fn ready(fd: Arc<OwnedFd>, flags: PollFlags) -> impl Future<Output = io::Result<()>> + Send {
    poll_fn(move |_| {
        let mut fds = [PollFd::new(&fd, flags)];
        match poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(0) | Err(Errno::INTR) => {
                INTERESTS.with_borrow_mut(|all| all.fds.push((Arc::clone(&fd), flags)));
                Poll::Pending
            }
            Ok(_) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(error.into())),
        }
    })
}

impl Wake for Waker {
    fn wake(self: Arc<Self>) {
        Self::wake(&self);
    }
}

/// Runs a future on this thread until it is finished; waits in poll(2) in between.
///
/// # Errors
/// No eventfd can be had, or poll(2) failed.
pub(crate) fn block_on<F: Future>(future: F) -> io::Result<F::Output> {
    let own = Arc::new(Waker::new()?);
    let waker = std::task::Waker::from(Arc::clone(&own));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        // What an outer `block_on` of this thread waits for is not ours to touch.
        let outer = INTERESTS.take();
        let state = future.as_mut().poll(&mut context);
        let wanted = INTERESTS.replace(outer);
        if let Poll::Ready(output) = state {
            return Ok(output);
        }
        park(&own, &wanted)?;
    }
}

/// Polls a future of [`Parker`] once; nothing wakes it, whoever calls this calls it again.
pub(crate) fn poll_once<F: Future + ?Sized>(future: Pin<&mut F>) -> Poll<F::Output> {
    let outer = INTERESTS.take();
    let state = future.poll(&mut Context::from_waker(std::task::Waker::noop()));
    drop(INTERESTS.replace(outer));
    state
}

/// Waits until the waker, one of the descriptors or the time calls.
fn park(own: &Waker, wanted: &Interests) -> io::Result<()> {
    let mut fds = vec![PollFd::new(own, PollFlags::IN)];
    for (fd, flags) in &wanted.fds {
        fds.push(PollFd::new(fd, *flags));
    }
    let left = wanted.until.map(|until| until.saturating_duration_since(Instant::now()));
    let timeout = left.and_then(|left| Timespec::try_from(left).ok());
    match poll(&mut fds, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    own.drain();
    Ok(())
}

/// Any executor: descriptors and timers of `async-io`, which brings its own thread to poll them.
#[cfg(feature = "async-io")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct AsyncIo;

#[cfg(feature = "async-io")]
impl Reactor for AsyncIo {
    type Source = async_io::Async<OwnedFd>;

    fn source(&self, fd: OwnedFd) -> io::Result<Self::Source> {
        // The flags stay as they are: all our calls are non-blocking by themselves.
        async_io::Async::new_nonblocking(fd)
    }

    fn readable(&self, source: &Self::Source) -> impl Future<Output = io::Result<()>> + Send {
        source.readable()
    }

    fn writable(&self, source: &Self::Source) -> impl Future<Output = io::Result<()>> + Send {
        source.writable()
    }

    async fn sleep(&self, time: Duration) {
        async_io::Timer::after(time).await;
    }
}

/// The first of two futures to finish; the other one is dropped.
pub(crate) async fn race<A: Future, B: Future>(first: A, second: B) -> Raced<A::Output, B::Output> {
    let mut first = pin!(first);
    let mut second = pin!(second);
    poll_fn(move |context| {
        if let Poll::Ready(output) = poll_pinned(first.as_mut(), context) {
            return Poll::Ready(Raced::First(output));
        }
        match poll_pinned(second.as_mut(), context) {
            Poll::Ready(output) => Poll::Ready(Raced::Second(output)),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

fn poll_pinned<F: Future>(future: Pin<&mut F>, context: &mut Context<'_>) -> Poll<F::Output> {
    future.poll(context)
}

/// Which of two futures won [`race`].
pub(crate) enum Raced<A, B> {
    /// The first; it also wins a tie.
    First(A),
    /// The second.
    Second(B),
}
