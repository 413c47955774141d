//! `Worker` and `Model`: what most device authors write (contract §1b).
//!
//! A [`Model`] says what the device is: its queues, features, configuration. A [`Worker`] serves
//! requests on a thread that the library runs; it is built on that thread and need not be `Send`.
//! [`crate::WorkerDevice`] makes a whole [`crate::VhostUserDevice`] of the two.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::device::ConfigWrite;
use crate::error::Error;
use crate::events::{EventLoop, FileId};
use crate::hooks::Hooks;
use crate::inspect::Inspect;
use crate::queue::QueueSpec;
use crate::request::{Outcome, Request, Served};
use crate::snapshot::{Saved, Snapshot, named_by};
use crate::thread::Place;

/// Serves the requests of one or many queues.
pub trait Worker {
    /// Serves one request: answer it ([`Request::done`]), keep it ([`Request::defer`]) or hand it
    /// to the kernel ([`Request::submit`]).
    ///
    /// # Errors
    /// An error is logged; the request, dropped, went back with length 0 and the ring goes on.
    fn serve(&mut self, request: Request<'_>) -> Result<Served, Error>;

    /// Whether requests of `queue` are of any use now. Those that are not stay in the ring, where they
    /// outlive a stop, a migration and a crash: receive buffers with nothing to receive, bytes to
    /// transmit while the host's side is full. Asked before each request; after a no, with every round of the
    /// thread, so an answer is to be quick and without a system call in the long run.
    ///
    /// A request may be served after a no: one that an earlier process had taken, when its queue is to
    /// stop.
    fn wants(&mut self, queue: u16) -> bool {
        let _ = queue;
        true
    }

    /// As [`Worker::wants`], for the last time before the thread may sleep: what makes it a yes from now on
    /// has to wake the thread, through a descriptor that it watches.
    fn wants_at_last(&mut self, queue: u16) -> bool {
        self.wants(queue)
    }

    /// What was in `queue` was served, as far as its turn went: what the worker has put together meanwhile
    /// can go.
    fn turned(&mut self, queue: u16) {
        let _ = queue;
    }

    /// Requests of `queue` reach this worker from now on (its ring has started and is enabled), or no more.
    fn serves(&mut self, queue: u16, reach: bool) {
        let _ = (queue, reach);
    }

    /// A file operation started by [`Request::submit`] has finished.
    ///
    /// # Errors
    /// As [`Worker::serve`].
    fn completed(
        &mut self,
        request: Request<'_>,
        token: u64,
        outcome: Outcome,
    ) -> Result<Served, Error> {
        let _ = token;
        Ok(request.done(outcome.unwrap_or(0)))
    }

    /// The token of a request that was set aside ([`Request::hold`]) and can go on now. Asked after
    /// operations have ended, until there is none.
    fn release(&mut self) -> Option<u64> {
        None
    }

    /// A request that [`Worker::release`] has named.
    ///
    /// # Errors
    /// As [`Worker::serve`].
    fn resumed(&mut self, request: Request<'_>, token: u64) -> Result<Served, Error> {
        let _ = token;
        Ok(request.done(0))
    }

    /// A file operation started by [`Request::submit`] has ended, long after its request was left in
    /// the in-flight region ([`crate::VhostUserDevice::abandon_queue`]). There is nothing to answer;
    /// the operation may have been carried out in part. A request that was set aside is told at once.
    fn abandoned(&mut self, token: u64, outcome: Outcome) {
        let _ = (token, outcome);
    }

    /// A descriptor given to [`WorkerContext::watch`] became readable.
    ///
    /// # Errors
    /// Logged; the worker goes on.
    fn event(&mut self, token: u32) -> Result<(), Error> {
        let _ = token;
        Ok(())
    }

    /// Time between calls of [`Worker::tick`]; None: never.
    fn tick_every(&self) -> Option<Duration> {
        None
    }

    /// Called when [`Worker::tick_every`] has passed.
    ///
    /// # Errors
    /// Logged; the worker goes on.
    fn tick(&mut self) -> Result<(), Error> {
        Ok(())
    }
}

/// What a worker can ask of its thread while it is built.
#[derive(Debug)]
pub struct WorkerContext<'a> {
    pub(crate) events: &'a mut dyn EventLoop,
    pub(crate) place: &'a Place,
}

impl WorkerContext<'_> {
    /// Number of this thread among the device's worker threads.
    #[must_use]
    pub fn thread(&self) -> usize {
        self.place.number
    }

    /// Where the worker shows itself: the same for all workers of a device.
    #[must_use]
    pub fn inspect(&self) -> &Inspect {
        &self.place.inspect
    }

    /// Has [`Worker::event`] called with `token` when `fd` becomes readable (edges).
    ///
    /// # Errors
    /// The descriptor cannot be waited for.
    pub fn watch(&mut self, fd: BorrowedFd<'_>, token: u32) -> io::Result<()> {
        self.events.watch(fd, crate::thread::device_token(token))
    }

    /// Makes a file known to the event loop, for [`Request::submit`].
    pub fn add_file(&mut self, file: Arc<File>) -> FileId {
        self.events.add_file(file)
    }

    /// Whether [`Request::submit`] can be had on this thread.
    #[must_use]
    pub fn can_submit(&self) -> bool {
        self.events.can_submit()
    }
}

/// Builds a worker on the thread that it will run on.
pub type MakeWorker<W> = Arc<dyn Fn(&mut WorkerContext<'_>) -> Result<W, Error> + Send + Sync>;

/// What a device is, apart from serving requests.
pub trait Model: Send + 'static {
    /// What serves its requests.
    type Worker: Worker + 'static;

    /// Its queues, in virtio's order.
    fn queues(&self) -> Vec<QueueSpec>;

    /// How a worker is built; called on each worker thread, again after a worker panicked.
    fn make_worker(&self) -> MakeWorker<Self::Worker>;

    /// Where the device shows itself to operators, told once before anything else.
    fn shows(&mut self, inspect: &Inspect) {
        let _ = inspect;
    }

    /// How many threads serve the queues.
    fn threads(&self) -> usize {
        1
    }

    /// Whether workers may sit at a thread with those of other devices. Not if they change what belongs to a thread: its
    /// umask, its user, its directory.
    fn shares_threads(&self) -> bool {
        true
    }

    /// Which of them serves this queue, counted modulo their number: by turns, if nothing else is said.
    fn thread_of(&self, queue: u16) -> usize {
        usize::from(queue)
    }

    /// The device's own feature bits (virtio 1.3 §5, bits 0–23 and 50 up).
    fn features(&self) -> u64 {
        0
    }

    /// The driver took these of them.
    ///
    /// # Errors
    /// The set is refused, the old one stays.
    fn ack_features(&mut self, features: u64) -> Result<(), Error> {
        let _ = features;
        Ok(())
    }

    /// Number of bytes of the configuration space.
    fn config_size(&self) -> u32 {
        0
    }

    /// Copies configuration from byte `offset` into `bytes`; the range is inside the space.
    ///
    /// # Errors
    /// The front-end hears of a refusal.
    fn read_config(&self, offset: u32, bytes: &mut [u8]) -> Result<(), Error> {
        let _ = offset;
        bytes.fill(0);
        Ok(())
    }

    /// Writes configuration; the range is inside the space.
    ///
    /// # Errors
    /// Nothing there can be written.
    fn write_config(
        &mut self,
        offset: u32,
        bytes: &[u8],
        origin: ConfigWrite,
    ) -> Result<(), Error> {
        let _ = (bytes, origin);
        Err(Error::refused(format!("configuration byte {offset} is read-only")))
    }

    /// Ring `queue` is about to start with the driver's request number `base` (modulo 2^16; with packed rings
    /// as GET_VRING_BASE has it): a driver that has just started is at 0, or at the packed 0x8000_8000.
    fn ring_starts(&mut self, queue: u16, base: u32) {
        let _ = (queue, base);
    }

    /// The front-end has left, or its session has failed; all queues are stopped. Another one may come: the
    /// next one of the same guest, or somebody new. Not called when another process has taken over.
    fn front_end_left(&mut self) {}

    /// The first ring is about to start: take locks, open doors. Returns at once: what somebody else
    /// still holds is [`Error::Busy`], and the handler asks again for a while.
    ///
    /// # Errors
    /// The ring does not start and the front-end hears of it.
    fn resume(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// The last ring has stopped: let go of what another process may need.
    ///
    /// # Errors
    /// The request that caused it is refused.
    fn suspend(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// The device goes to its power-on state; no ring runs.
    ///
    /// # Errors
    /// The connection ends.
    fn reset(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// Kind of the device, up to 32 bytes: a state that was saved by another kind is refused. The
    /// names of its queues by itself.
    fn device_type(&self) -> String {
        named_by(&self.queues())
    }

    /// What the device has to tell its next process, beside what was negotiated; no ring runs. What
    /// takes its time belongs into [`Snapshot::later`].
    ///
    /// # Errors
    /// The state is not saved; the device goes on.
    fn snapshot(&mut self) -> Result<Snapshot, Error> {
        Ok(Snapshot::none())
    }

    /// Takes what [`Model::snapshot`] made, perhaps in an older or a newer program; no ring runs.
    ///
    /// # Errors
    /// The state is refused; nothing has changed.
    fn restore(&mut self, saved: Saved<'_>) -> Result<(), Error> {
        saved.nothing()
    }

    /// What only some devices have; the same answer for as long as the device lives.
    fn hooks(&mut self) -> Option<&mut dyn Hooks> {
        None
    }
}

/// The model of a device that has queues and nothing else.
pub struct Plain<W> {
    pub(crate) queues: Vec<QueueSpec>,
    pub(crate) make: MakeWorker<W>,
}

impl<W: Worker + 'static> Plain<W> {
    /// A device with these queues, whose workers `make` builds.
    pub fn new(
        queues: &[QueueSpec],
        make: impl Fn(&mut WorkerContext<'_>) -> Result<W, Error> + Send + Sync + 'static,
    ) -> Self {
        Self { queues: queues.to_vec(), make: Arc::new(make) }
    }
}

impl<W: Worker + 'static> Model for Plain<W> {
    type Worker = W;

    fn queues(&self) -> Vec<QueueSpec> {
        self.queues.clone()
    }

    fn make_worker(&self) -> MakeWorker<W> {
        Arc::clone(&self.make)
    }
}
