//! Tests of the deadline of a drain, on a clock that the test moves by hand: it is the deadline of the message, not of each
//! thing that the message waits for (contract §1). How long anything takes on this machine says nothing here.

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::task::{Poll, Waker};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use outboard_frontend::{Connection, SharedMemory};
use outboard_protocol::{ProtocolFeatures, virtio};
use outboard_queue::{DriverQueue, QueueLayout};
use rustix::event::{EventfdFlags, eventfd};

use super::rings::MOMENT;
use super::{Attention, DeviceRequestHandler, Ended, HandlerOptions};
use crate::reactor::{Parker, Reactor, block_on};
use crate::{
    Deferred, Error, HostError, Plain, QueueSpec, Request, Served, Worker, WorkerContext,
    WorkerDevice,
};

/// How long anything may take before a test fails.
const PATIENCE: Duration = Duration::from_secs(20);
const DEADLINE: Duration = Duration::from_secs(3600);

/// Sockets as they are, and time as the test has it.
#[derive(Clone)]
struct Clock(Arc<(Mutex<Time>, Condvar)>);

struct Time {
    start: Instant,
    now: Duration,
    /// Sleeps that were begun so far.
    begun: u64,
    /// Those that somebody waits for: until when.
    sleeps: BTreeMap<u64, (Duration, Waker)>,
}

struct Sleep {
    clock: Clock,
    number: u64,
    until: Duration,
}

impl Sleep {
    fn poll(&self, waker: &Waker) -> Poll<()> {
        let (time, changed) = &*self.clock.0;
        let mut time = time.lock().unwrap();
        if time.now >= self.until {
            return Poll::Ready(());
        }
        time.sleeps.insert(self.number, (self.until, waker.clone()));
        changed.notify_all();
        Poll::Pending
    }
}

/// Nobody waits for it any more: something else was earlier.
impl Drop for Sleep {
    fn drop(&mut self) {
        self.clock.0.0.lock().unwrap().sleeps.remove(&self.number);
    }
}

impl Clock {
    fn new() -> Self {
        let (start, now) = (Instant::now(), Duration::ZERO);
        let time = Time { start, now, begun: 0, sleeps: BTreeMap::new() };
        Self(Arc::new((Mutex::new(time), Condvar::new())))
    }

    /// Waits until somebody sleeps. Until when, in time since the start.
    fn sleeper(&self) -> Duration {
        let (time, changed) = &*self.0;
        let nobody = |time: &mut Time| time.sleeps.is_empty();
        let waited = changed.wait_timeout_while(time.lock().unwrap(), PATIENCE, nobody).unwrap();
        assert!(!waited.1.timed_out(), "nobody waits for the time");
        waited.0.sleeps.values().map(|(until, _)| *until).min().unwrap()
    }

    /// It is that time, and who slept until then wakes up.
    fn set(&self, now: Duration) {
        let mut time = self.0.0.lock().unwrap();
        time.now = now;
        time.sleeps
            .values()
            .filter(|(until, _)| *until <= now)
            .for_each(|(_, waker)| waker.wake_by_ref());
        time.sleeps.retain(|_, (until, _)| *until > now);
    }
}

impl Reactor for Clock {
    type Source = Arc<OwnedFd>;

    fn source(&self, fd: OwnedFd) -> io::Result<Arc<OwnedFd>> {
        Parker.source(fd)
    }

    fn readable(&self, source: &Arc<OwnedFd>) -> impl Future<Output = io::Result<()>> + Send {
        Parker.readable(source)
    }

    fn writable(&self, source: &Arc<OwnedFd>) -> impl Future<Output = io::Result<()>> + Send {
        Parker.writable(source)
    }

    fn sleep(&self, time: Duration) -> impl Future<Output = ()> + Send {
        let (clock, mut time_of) = (self.clone(), self.0.0.lock().unwrap());
        time_of.begun += 1;
        let sleep = Sleep { clock, number: time_of.begun, until: time_of.now + time };
        drop(time_of);
        poll_fn(move |context| sleep.poll(context.waker()))
    }

    fn now(&self) -> Instant {
        let time = self.0.0.lock().unwrap();
        time.start + time.now
    }
}

/// Hands every request to the test.
struct Hand(std::sync::mpsc::Sender<Deferred>);

impl Worker for Hand {
    fn serve(&mut self, request: Request<'_>) -> Result<Served, Error> {
        let _ = self.0.send(request.defer());
        Ok(Served::later())
    }
}

type Session = (Result<Ended, HostError>, DeviceRequestHandler<WorkerDevice<Plain<Hand>>>);

/// A front-end of a device whose requests are the test's to finish.
struct Bench {
    clock: Clock,
    front: Connection,
    memory: SharedMemory,
    kept: Receiver<Deferred>,
    session: JoinHandle<Session>,
}

impl Bench {
    fn new(protocol: ProtocolFeatures) -> Self {
        let (sender, kept) = channel();
        let sender = Mutex::new(sender);
        let queues = [QueueSpec::new("a", 64), QueueSpec::new("b", 64)];
        let make = move |_: &mut WorkerContext<'_>| Ok(Hand(sender.lock().unwrap().clone()));
        let device = WorkerDevice::plain(&queues, make).unwrap();
        let options = HandlerOptions { drain_deadline: DEADLINE, ..HandlerOptions::default() };
        let mut handler = DeviceRequestHandler::new(device, options).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let clock = Clock::new();
        let reactor = clock.clone();
        let session = std::thread::spawn(move || {
            let ended = handler.run_on(reactor, theirs.into(), Attention::none());
            (block_on(ended).unwrap(), handler)
        });
        let mut front = Connection::from_fd(ours.into(), PATIENCE).unwrap();
        let memory = SharedMemory::with_size(1 << 20).unwrap();
        front.get_features().unwrap();
        front.get_protocol_features().unwrap();
        let basic = ProtocolFeatures::MQ | ProtocolFeatures::REPLY_ACK;
        front.set_protocol_features(basic | protocol).unwrap();
        front.set_features(virtio::VERSION_1 | virtio::PROTOCOL_FEATURES).unwrap();
        front.set_mem_table(memory.regions()).unwrap();
        if protocol.contains(ProtocolFeatures::INFLIGHT_SHMFD) {
            let (region, file) = front.get_inflight_fd(2, 16).unwrap().unwrap();
            front.set_inflight_fd(region, file).unwrap();
        }
        Self { clock, front, memory, kept, session }
    }

    /// A request of a ring that starts, taken by the device.
    fn taken(&mut self, index: u16) -> Deferred {
        let area = self.memory.allocate(4096, 4096).unwrap();
        let (layout, _) = QueueLayout::split_at(area.guest(), 16).unwrap();
        let mut driver = DriverQueue::new(layout, virtio::VERSION_1, self.memory.view()).unwrap();
        let kick = eventfd(1, EventfdFlags::CLOEXEC).unwrap();
        driver.add(&[], &[(area.guest() + 2048, 1)], 7).unwrap();
        driver.publish();
        self.front.set_vring_num(index, 16).unwrap();
        self.front.set_vring_addr(index, &layout).unwrap();
        self.front.set_vring_kick(index, &kick).unwrap();
        self.front.set_vring_enable(index, true).unwrap();
        area.leak();
        self.kept.recv_timeout(PATIENCE).unwrap()
    }
}

/// The session waits for its deadline, then for a moment, and for nothing else.
fn spends_one_deadline(clock: &Clock, session: JoinHandle<Session>) -> Session {
    assert_eq!(clock.sleeper(), DEADLINE);
    clock.set(DEADLINE);
    assert_eq!(clock.sleeper(), DEADLINE + MOMENT, "the deadline was spent already");
    clock.set(DEADLINE + MOMENT);
    let (ended, handler) = session.join().unwrap();
    assert!(matches!(ended, Err(HostError::DrainDeadline { index: 0, .. })), "{ended:?}");
    (ended, handler)
}

#[test]
fn a_base_that_cannot_be_had_spends_its_deadline_once() {
    let parking = ProtocolFeatures::INFLIGHT_SHMFD | ProtocolFeatures::GET_VRING_BASE_INFLIGHT;
    let mut bench = Bench::new(parking);
    let mut kept = bench.taken(0);
    let room = kept.writable();
    let Bench { clock, mut front, session, .. } = bench;
    let asking = std::thread::spawn(move || front.get_vring_base(0).is_err());
    let ended = spends_one_deadline(&clock, session);
    assert!(asking.join().unwrap(), "a writer is in guest memory");
    drop(room);
    kept.done(0);
    drop(ended);
}

/// The rings of a disk that hangs do not wait one after the other for as long each.
#[test]
fn rings_that_do_not_drain_spend_one_deadline_together() {
    let mut bench = Bench::new(ProtocolFeatures::empty());
    let kept = [bench.taken(0), bench.taken(1)];
    let Bench { clock, front, session, .. } = bench;
    drop(front);
    let ended = spends_one_deadline(&clock, session);
    kept.into_iter().for_each(|request| request.done(0));
    drop(ended);
}
