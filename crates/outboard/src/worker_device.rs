//! `WorkerDevice`: a whole [`VhostUserDevice`] of a [`Model`] and its [`Worker`]s.
//!
//! Threads are started when the device is made and live as long as it does; an idle one waits in
//! its event loop and costs nothing. Which queue is served by which thread the model says. Dropping the
//! device ends its threads; queues that still run are finished first.

use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use futures_channel::oneshot;
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::device::{ConfigWrite, VhostUserDevice};
use crate::error::{Error, HostError};
use crate::events::{LoopKind, event_loop};
use crate::hooks::Hooks;
use crate::inspect::Inspect;
use crate::queue::{Queue, QueueSpec};
use crate::shared_thread::SharedThread;
use crate::snapshot::{Saved, Snapshot};
use crate::thread::{self, Order, Place, Port};
use crate::worker::{MakeWorker, Model, Plain, Worker, WorkerContext};

/// Bytes of address space: a stack, and the 64 MiB in one aligned piece out of twice as much that
/// glibc's malloc(3) reserves for each thread, with some to spare.
const THREAD_ROOM: usize = 160 << 20;

/// What an operator can set about worker threads.
#[derive(Clone, Debug)]
pub struct WorkerOptions {
    /// What they wait in.
    pub event_loop: LoopKind,
    /// How long one looks at its rings, at most, before it sleeps; zero: it always sleeps.
    pub poll: Duration,
    /// Processors of the threads, by number, in turn; none: wherever the system puts them.
    pub pin: Vec<usize>,
    /// Where the model and its workers show themselves.
    pub inspect: Inspect,
    /// Threads that serve other devices too: the first worker sits at the first one, and so on, round and round. None:
    /// each worker has a thread of its own. With some, `event_loop`, `poll` and `pin` are theirs.
    pub shared: Vec<SharedThread>,
    /// What the device is called there.
    pub name: String,
}

impl WorkerOptions {
    /// A [`WorkerOptions::poll`] that never ends: a worker with a processor of its own.
    pub const NEVER_SLEEP: Duration = crate::poller::ALWAYS;
}

impl Default for WorkerOptions {
    fn default() -> Self {
        Self {
            event_loop: LoopKind::Auto,
            poll: Duration::from_micros(50),
            pin: Vec::new(),
            inspect: Inspect::new(),
            shared: Vec::new(),
            name: "device".to_owned(),
        }
    }
}

impl From<LoopKind> for WorkerOptions {
    /// This event loop, everything else as usual.
    fn from(event_loop: LoopKind) -> Self {
        Self { event_loop, ..Self::default() }
    }
}

/// The way to a worker.
struct Handle {
    port: Arc<Port>,
    life: Life,
}

/// What a worker lives on.
enum Life {
    /// A thread of its own, until somebody has waited for its end.
    Own(Option<JoinHandle<()>>),
    /// A place at a thread of many; the channel ends with it.
    Shared {
        ended: Mutex<mpsc::Receiver<()>>,
        /// It is not to end before.
        _thread: SharedThread,
    },
}

impl Life {
    fn has_ended(&self) -> bool {
        match self {
            Self::Own(join) => join.as_ref().is_none_or(JoinHandle::is_finished),
            Self::Shared { ended, .. } => {
                let ended = ended.lock().unwrap_or_else(PoisonError::into_inner);
                ended.try_recv() == Err(mpsc::TryRecvError::Disconnected)
            }
        }
    }

    fn wait(&mut self) {
        match self {
            // What it panicked with was logged there.
            Self::Own(join) => join.take().into_iter().for_each(|join| drop(join.join())),
            Self::Shared { ended, .. } => {
                let ended = ended.get_mut().unwrap_or_else(PoisonError::into_inner);
                let _ = ended.recv();
            }
        }
    }
}

/// Where a queue is.
#[derive(Debug)]
enum Run {
    /// With the handler.
    Stopped,
    /// With its thread.
    Started,
    /// With its thread, on its way back. Kept here, so that a caller who gives up waiting can ask
    /// again and nothing is lost.
    Stopping(oneshot::Receiver<Box<Queue>>),
}

/// See the module.
pub struct WorkerDevice<M: Model> {
    model: M,
    queues: Vec<QueueSpec>,
    threads: Vec<Handle>,
    runs: Vec<Run>,
    suspended: bool,
    /// The model is to be suspended when the last operation of abandoned requests has ended.
    owes_suspension: bool,
}

impl<M: Model> std::fmt::Debug for WorkerDevice<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkerDevice")
            .field("queues", &self.queues)
            .field("threads", &self.threads.len())
            .field("runs", &self.runs)
            .finish_non_exhaustive()
    }
}

impl<W: Worker + 'static> WorkerDevice<Plain<W>> {
    /// A device that has queues and a worker and nothing else: no configuration, no features.
    ///
    /// # Errors
    /// The worker cannot be built, or a thread cannot be started.
    pub fn plain(
        queues: &[QueueSpec],
        make: impl Fn(&mut WorkerContext<'_>) -> Result<W, Error> + Send + Sync + 'static,
    ) -> Result<Self, Error> {
        Self::new(Plain::new(queues, make))
    }
}

impl<M: Model> WorkerDevice<M> {
    /// Starts the model's threads, on io_uring where that can be had.
    ///
    /// # Errors
    /// A worker cannot be built, or a thread cannot be started.
    pub fn new(model: M) -> Result<Self, Error> {
        Self::with_options(model, WorkerOptions::default())
    }

    /// As [`WorkerDevice::new`], with the operator's options.
    ///
    /// # Errors
    /// As [`WorkerDevice::new`]; the event loop is refused.
    pub fn with_options(mut model: M, options: WorkerOptions) -> Result<Self, Error> {
        if !options.shared.is_empty() && !model.shares_threads() {
            return Err(Error::refused("its workers need threads of their own"));
        }
        model.shows(&options.inspect);
        let queues = model.queues();
        let count = model.threads().clamp(1, queues.len().max(1));
        let mut device = Self {
            runs: queues.iter().map(|_| Run::Stopped).collect(),
            queues,
            threads: Vec::with_capacity(count),
            suspended: true,
            owes_suspension: false,
            model,
        };
        // One after the other: where memory is short it is a thread's stack that is refused, not
        // some small thing of a thread that is just starting.
        for number in 0..count {
            let (built, result) = mpsc::channel();
            let make = device.model.make_worker();
            let handle = match options.shared.iter().cycle().nth(number) {
                Some(thread) => sit(make, &options, number, thread, built)?,
                None => spawn(make, options.clone(), number, built)?,
            };
            device.threads.push(handle);
            match result.recv() {
                Ok(result) => result?,
                Err(_) => return Err(Error::refused("a worker ended while it was built")),
            }
        }
        Ok(device)
    }

    /// The model.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// The model.
    pub fn model_mut(&mut self) -> &mut M {
        &mut self.model
    }

    fn thread_of(&self, index: u16) -> Option<&Handle> {
        self.threads.get(self.model.thread_of(index) % self.threads.len().max(1))
    }

    /// Whether operations of abandoned requests are under way.
    fn is_busy(&self) -> bool {
        self.threads.iter().any(|thread| thread.port.is_busy())
    }

    /// Has a thread give a queue back: when it is finished, or at once.
    async fn give_back(&mut self, index: u16, abandon: bool) -> Result<Queue, HostError> {
        let thread = self.thread_of(index).map(|thread| Arc::clone(&thread.port));
        let missing = self.no_such(index);
        let (Some(run), Some(port)) = (self.runs.get_mut(usize::from(index)), thread) else {
            return Err(missing);
        };
        if matches!(run, Run::Started) {
            let (reply, queue) = oneshot::channel();
            *run = Run::Stopping(queue);
            port.send(Order::Stop { index, reply });
        }
        let Run::Stopping(back) = run else { return Err(HostError::NotStarted(index)) };
        if abandon {
            port.send(Order::Abandon { index });
        }
        let queue = back.await;
        *run = Run::Stopped;
        queue.map(|queue| *queue).map_err(|_| HostError::WorkerGone(index))
    }

    fn no_such(&self, index: u16) -> HostError {
        HostError::NoSuchQueue { index, queues: self.queues.len() }
    }
}

/// Where address space is limited (RLIMIT_AS), whether a thread fits beside what it allocates as it
/// starts. The system refuses a stack, which can be told; small things that nobody can do without,
/// which end the process, are short when the last of the space went into a stack.
pub(crate) fn room_for_a_thread() -> Result<(), Error> {
    if getrlimit(Resource::As).current.is_none() {
        return Ok(());
    }
    let mut room: Vec<u8> = Vec::new();
    room.try_reserve_exact(THREAD_ROOM).map_err(|_| {
        Error::refused(format!("no room for a thread: it may take {} MiB", THREAD_ROOM >> 20))
    })?;
    std::hint::black_box(room);
    Ok(())
}

/// Has the calling thread, the `number`-th, run on its processor of the list, if there is one.
fn pin(list: &[usize], number: usize) -> Result<(), Error> {
    list.iter().cycle().nth(number).map_or(Ok(()), |processor| processors(&[*processor]))
}

/// Has the calling thread run on these processors only, if there are any.
pub(crate) fn processors(list: &[usize]) -> Result<(), Error> {
    let names: Vec<_> = list.iter().map(usize::to_string).collect();
    let refused = |why: &dyn std::fmt::Display| {
        let names = names.join(", ");
        Error::refused(format!("no thread can be pinned to processor {names}: {why}"))
    };
    let mut set = CpuSet::new();
    for &processor in list {
        if processor >= CpuSet::MAX_CPU {
            return Err(refused(&format_args!("there are at most {}", CpuSet::MAX_CPU)));
        }
        set.set(processor);
    }
    match list.is_empty() {
        true => Ok(()),
        false => sched_setaffinity(None, &set).map_err(|errno| refused(&errno)),
    }
}

/// Has a worker sit at a thread that serves others too.
fn sit<W: Worker + 'static>(
    make: MakeWorker<W>,
    options: &WorkerOptions,
    number: usize,
    thread: &SharedThread,
    built: mpsc::Sender<Result<(), Error>>,
) -> Result<Handle, Error> {
    let port = Arc::new(Port::new()?);
    let place = Place { number, inspect: options.inspect.clone() };
    let (end, ended) = mpsc::channel();
    let (theirs, name) = (Arc::clone(&port), format!("{}/{number}", options.name));
    thread.admit(thread::admission(theirs, make, place, name, built, end));
    Ok(Handle { port, life: Life::Shared { ended: Mutex::new(ended), _thread: thread.clone() } })
}

fn spawn<W: Worker + 'static>(
    make: MakeWorker<W>,
    options: WorkerOptions,
    number: usize,
    built: mpsc::Sender<Result<(), Error>>,
) -> Result<Handle, Error> {
    room_for_a_thread()?;
    let port = Arc::new(Port::new()?);
    let theirs = Arc::clone(&port);
    let join = Builder::new().name(format!("worker{number}")).spawn(move || {
        let events = pin(&options.pin, number)
            .and_then(|()| event_loop(options.event_loop).map_err(Error::from));
        match events {
            Ok(events) => {
                let (poll, inspect) = (options.poll, options.inspect);
                let place = Place { number, inspect };
                thread::run(theirs, events, make, place, poll, &built);
            }
            Err(error) => drop(built.send(Err(error))),
        }
    });
    let join = join.map_err(HostError::io("cannot start a thread"))?;
    Ok(Handle { port, life: Life::Own(Some(join)) })
}

impl<M: Model> VhostUserDevice for WorkerDevice<M> {
    fn queues(&self) -> &[QueueSpec] {
        &self.queues
    }

    fn features(&self) -> u64 {
        self.model.features()
    }

    fn ack_features(&mut self, features: u64) -> Result<(), Error> {
        self.model.ack_features(features)
    }

    fn config_size(&self) -> u32 {
        self.model.config_size()
    }

    fn read_config(&self, offset: u32, bytes: &mut [u8]) -> Result<(), Error> {
        self.model.read_config(offset, bytes)
    }

    fn write_config(
        &mut self,
        offset: u32,
        bytes: &[u8],
        origin: ConfigWrite,
    ) -> Result<(), Error> {
        self.model.write_config(offset, bytes, origin)
    }

    fn start_queue(&mut self, index: u16, queue: Queue) -> Result<(), Error> {
        let missing = self.no_such(index);
        match self.runs.get_mut(usize::from(index)) {
            None => return Err(missing.into()),
            // Its last stop was given up waiting for: the thread may still hold the queue.
            Some(Run::Stopping(back)) => {
                if let Ok(None) = back.try_recv() {
                    return Err(Error::refused(format!("queue {index} has not drained yet")));
                }
            }
            Some(_) => {}
        }
        let thread = self.thread_of(index).ok_or_else(|| self.no_such(index))?;
        if thread.life.has_ended() {
            return Err(HostError::WorkerGone(index).into());
        }
        let port = Arc::clone(&thread.port);
        if self.is_busy() {
            return Err(Error::busy("what abandoned requests asked for is still under way"));
        }
        self.owes_suspension = false;
        self.model.ring_starts(index, queue.base());
        // Last: nothing fails once the doors are open.
        if self.suspended {
            self.model.resume()?;
            self.suspended = false;
        }
        port.send(Order::Start(Box::new(queue)));
        if let Some(run) = self.runs.get_mut(usize::from(index)) {
            *run = Run::Started;
        }
        Ok(())
    }

    async fn stop_queue(&mut self, index: u16) -> Result<Queue, HostError> {
        self.give_back(index, false).await
    }

    fn can_abandon(&self) -> bool {
        true
    }

    async fn abandon_queue(&mut self, index: u16) -> Result<Queue, HostError> {
        self.give_back(index, true).await
    }

    fn is_settled(&self) -> bool {
        !self.owes_suspension
    }

    async fn settle(&mut self) {
        for thread in &self.threads {
            // It fails when the thread is gone, and what it had with it.
            let _ = thread.port.quiet().await;
        }
    }

    async fn reset(&mut self) -> Result<(), Error> {
        self.model.reset()
    }

    async fn enter_suspended_state(&mut self) -> Result<(), Error> {
        // What abandoned requests asked for may still be coming: nobody else is let in before.
        self.owes_suspension = !self.suspended && self.is_busy();
        if self.owes_suspension {
            return Ok(());
        }
        self.suspended = true;
        self.model.suspend()
    }

    fn front_end_left(&mut self) {
        self.model.front_end_left();
    }

    fn device_type(&self) -> String {
        self.model.device_type()
    }

    async fn snapshot(&mut self) -> Result<Snapshot, Error> {
        self.model.snapshot()
    }

    async fn restore(&mut self, saved: Saved<'_>) -> Result<(), Error> {
        self.model.restore(saved)
    }

    fn hooks(&mut self) -> Option<&mut dyn Hooks> {
        self.model.hooks()
    }
}

impl<M: Model> Drop for WorkerDevice<M> {
    fn drop(&mut self) {
        for thread in &self.threads {
            thread.port.send(Order::Quit);
        }
        let count = self.threads.len().max(1);
        let mut stuck = vec![false; count];
        for (index, run) in (0..).zip(self.runs.iter_mut()) {
            let thread = self.model.thread_of(index) % count;
            if let (Run::Stopping(back), Some(stuck)) = (run, stuck.get_mut(thread)) {
                *stuck |= matches!(back.try_recv(), Ok(None));
            }
        }
        for (thread, stuck) in self.threads.iter_mut().zip(stuck) {
            // A thread that never gave its queue back hangs in the kernel: it is left to itself,
            // and keeps what it uses mapped.
            if !stuck {
                thread.life.wait();
            }
        }
    }
}
