//! Every place where `run` waits, one by one: for the front-end's next message, and for each answer of
//! the device (contract §2: a dropped future leaves nothing behind).
//!
//! ```text
//!  front-end's thread ── about to send ──▶ ┌──────┐ ◀── stop, reset, suspend ── device (in the handler)
//!                                          │ desk │ ◀── a change in its mailbox ── queue
//!  driver's thread: polls `run` ◀── drop ──└──────┘
//! ```
//! Nothing goes on before the desk, which is the test, has answered: the order and number of waits are the
//! same on every machine.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::future::Future;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use common::{FEATURES, PATIENCE, PROTOCOL, Ring, open_descriptors};
use futures_channel::oneshot;
use outboard::{
    ConfigWrite, DeviceRequestHandler, Error, HandlerOptions, HostError, Queue, QueueSpec,
    VhostUserDevice,
};
use outboard_frontend::{Connection, Error as FrontError, SharedMemory};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// What comes to the desk.
enum Asked {
    /// The front-end is about to send this.
    Message(&'static str, Sender<()>),
    /// A queue was started: it lies on the desk from now on.
    Start(Box<Queue>),
    Stop(oneshot::Sender<Box<Queue>>),
    Reset(oneshot::Sender<()>),
    Suspend(oneshot::Sender<()>),
}

/// A device that asks the desk for everything that may take time.
struct Asking {
    queues: [QueueSpec; 1],
    desk: Sender<Asked>,
    /// It was told to be quiet once: before there was a session.
    made: bool,
}

impl Asking {
    async fn ask<T>(&self, how: impl FnOnce(oneshot::Sender<T>) -> Asked) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        let _ = self.desk.send(how(reply));
        answer.await.ok()
    }
}

impl VhostUserDevice for Asking {
    fn queues(&self) -> &[QueueSpec] {
        &self.queues
    }

    fn features(&self) -> u64 {
        0
    }

    fn ack_features(&mut self, _: u64) -> Result<(), Error> {
        Ok(())
    }

    fn config_size(&self) -> u32 {
        0
    }

    fn read_config(&self, _: u32, _: &mut [u8]) -> Result<(), Error> {
        Ok(())
    }

    fn write_config(&mut self, _: u32, _: &[u8], _: ConfigWrite) -> Result<(), Error> {
        Ok(())
    }

    fn start_queue(&mut self, _: u16, queue: Queue) -> Result<(), Error> {
        let _ = self.desk.send(Asked::Start(Box::new(queue)));
        Ok(())
    }

    async fn stop_queue(&mut self, index: u16) -> Result<Queue, HostError> {
        let queue = self.ask(Asked::Stop).await;
        queue.map(|queue| *queue).ok_or(HostError::NotStarted(index))
    }

    async fn reset(&mut self) -> Result<(), Error> {
        self.ask(Asked::Reset).await.ok_or_else(|| Error::refused("the desk is gone"))
    }

    async fn enter_suspended_state(&mut self) -> Result<(), Error> {
        if !std::mem::replace(&mut self.made, true) {
            return Ok(());
        }
        self.ask(Asked::Suspend).await.ok_or_else(|| Error::refused("the desk is gone"))
    }
}

/// Every message that makes the handler wait for its device, each announced.
fn conversation(stream: UnixStream, desk: &Sender<Asked>) -> Result<(), FrontError> {
    let mut front = Connection::from_fd(stream.into(), PATIENCE)?;
    let memory = SharedMemory::with_size(1 << 20)?;
    let ring = Ring::new(&memory, 0, FEATURES);
    let next = |name| {
        let (go, may) = channel();
        let _ = desk.send(Asked::Message(name, go));
        may.recv().map_err(|_| FrontError::GivenUp)
    };
    next("GET_FEATURES")?;
    front.get_features()?;
    next("GET_PROTOCOL_FEATURES")?;
    front.get_protocol_features()?;
    next("SET_PROTOCOL_FEATURES")?;
    front.set_protocol_features(PROTOCOL)?;
    for again in [false, true] {
        next("SET_FEATURES")?;
        front.set_features(FEATURES)?;
        next("SET_MEM_TABLE")?;
        front.set_mem_table(memory.regions())?;
        next("SET_VRING_NUM")?;
        front.set_vring_num(0, common::SIZE)?;
        next("SET_VRING_ADDR")?;
        front.set_vring_addr(0, &ring.layout)?;
        next("SET_VRING_KICK")?;
        front.set_vring_kick(0, &ring.kick)?;
        next("SET_VRING_ENABLE")?;
        front.set_vring_enable(0, true)?;
        next("SET_VRING_CALL")?;
        front.set_vring_call(0, &ring.call)?;
        next("SET_VRING_ERR")?;
        front.set_vring_err(0, &ring.err)?;
        next("SET_VRING_KICK")?;
        front.set_vring_kick(0, &ring.kick)?;
        next("SET_MEM_TABLE")?;
        front.set_mem_table(memory.regions())?;
        if again {
            break;
        }
        next("GET_VRING_BASE")?;
        front.get_vring_base(0)?;
        next("RESET_DEVICE")?;
        front.reset_device()?;
    }
    next("the end")?;
    Ok(())
}

/// Unparks the driver, or any thread.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// The test's side: takes what is asked, answers it, and has the session dropped at one of the waits.
struct Desk {
    asked: Receiver<Asked>,
    queue: Option<Box<Queue>>,
    /// What was waited for so far.
    waits: Vec<&'static str>,
    drop_at: usize,
    drop_now: Arc<AtomicBool>,
    /// What the session was dropped over: it is not answered, not even by closing the way.
    unanswered: Option<Asked>,
}

impl Desk {
    /// Answers until the session is over.
    fn serve(&mut self, driver: &JoinHandle<()>) {
        let until = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < until, "nothing more was asked after {:?}", self.waits);
            let over = driver.is_finished();
            match self.asked.try_recv() {
                Ok(asked) => self.answer(asked, driver.thread()),
                Err(_) if over => return,
                Err(_) => self.look(driver.thread()),
            }
        }
    }

    /// One more wait; false when the session ends at it, and what it waits for is not to come.
    fn goes_on(&mut self, name: &'static str, driver: &Thread) -> bool {
        if self.drop_now.load(Ordering::SeqCst) {
            return true; // what is asked while a session is dropped is answered
        }
        self.waits.push(name);
        if self.waits.len() != self.drop_at {
            return true;
        }
        self.drop_now.store(true, Ordering::SeqCst);
        driver.unpark();
        false
    }

    fn answer(&mut self, asked: Asked, driver: &Thread) {
        let name = match &asked {
            Asked::Message(name, _) => name,
            Asked::Stop(_) => "stop",
            Asked::Reset(_) => "reset",
            Asked::Suspend(_) => "suspend",
            Asked::Start(_) => "",
        };
        if !name.is_empty() && !self.goes_on(name, driver) {
            self.unanswered = Some(asked);
            return;
        }
        match asked {
            Asked::Message(_, go) => go.send(()).unwrap(),
            Asked::Start(queue) => self.queue = Some(queue),
            Asked::Stop(reply) => {
                if let Some(queue) = self.queue.take() {
                    self.queue = reply.send(queue).err();
                }
            }
            Asked::Reset(reply) | Asked::Suspend(reply) => {
                let _ = reply.send(());
            }
        }
    }

    /// A moment for a change in the queue's mailbox.
    fn look(&mut self, driver: &Thread) {
        let moment = Timespec::try_from(Duration::from_millis(1)).unwrap();
        let Some(queue) = &self.queue else {
            std::thread::yield_now();
            return;
        };
        let ready = poll(&mut [PollFd::new(&queue.control_fd(), PollFlags::IN)], Some(&moment));
        if ready.unwrap() > 0
            && self.goes_on("change", driver)
            && let Some(queue) = &mut self.queue
        {
            queue.drain_control();
            queue.poll_control();
        }
    }
}

/// Runs the conversation and drops the session at its `drop_at`th wait; what was waited for until then.
fn dropped_at(drop_at: usize) -> Vec<&'static str> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (sender, asked) = channel();
    let drop_now = Arc::new(AtomicBool::new(false));
    let mut desk = Desk {
        asked,
        queue: None,
        waits: Vec::new(),
        drop_at,
        drop_now: Arc::clone(&drop_now),
        unanswered: None,
    };
    let front = std::thread::spawn({
        let desk = sender.clone();
        move || conversation(ours, &desk)
    });
    let driver = std::thread::spawn(move || {
        let device = Asking { queues: [QueueSpec::new("a", 64)], desk: sender, made: false };
        let mut handler = DeviceRequestHandler::new(device, HandlerOptions::default()).unwrap();
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut session = Box::pin(handler.run(theirs));
        while !drop_now.load(Ordering::SeqCst) {
            match session.as_mut().poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(_) => break,
                Poll::Pending => std::thread::park(),
            }
        }
        drop(session);
    });
    desk.serve(&driver);
    driver.join().unwrap();
    desk.unanswered = None;
    // Cut off or not: the front-end's calls end.
    let _ = front.join().unwrap();
    desk.waits
}

/// What one start of the ring and the changes of it wait for.
const LIFE: [&str; 15] = [
    "SET_FEATURES",
    "SET_MEM_TABLE",
    "SET_VRING_NUM",
    "SET_VRING_ADDR",
    "SET_VRING_KICK",
    "SET_VRING_ENABLE",
    "change",
    "SET_VRING_CALL",
    "change",
    "SET_VRING_ERR",
    "change",
    "SET_VRING_KICK",
    "change",
    "SET_MEM_TABLE",
    "change",
];

#[test]
fn run_dropped_at_each_of_its_awaits_leaves_nothing_running_or_open() {
    let first = ["GET_FEATURES", "GET_PROTOCOL_FEATURES", "SET_PROTOCOL_FEATURES"];
    let stop = ["GET_VRING_BASE", "stop", "suspend", "RESET_DEVICE", "reset"];
    let end = ["the end", "stop", "suspend"];
    let expected = [&first[..], &LIFE, &stop, &LIFE, &end].concat();
    assert_eq!(dropped_at(usize::MAX), expected);
    let before = open_descriptors();
    for at in 1..=expected.len() {
        assert_eq!(dropped_at(at), expected.get(..at).unwrap(), "dropped at {at}");
        // A timer that was dropped keeps its waker until async-io's own thread has its next turn: sessions
        // give it turns.
        let until = Instant::now() + PATIENCE;
        while open_descriptors() != before {
            assert!(Instant::now() < until, "descriptors after a drop at {at}: {before} before");
            dropped_at(4);
        }
    }
}
