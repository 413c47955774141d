//! A device that another process still holds: its start waits, and nobody else does
//! (contract §1, `start_queue` returns at once; §6, the image lock after a `kill -9`).

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use common::{Echo, FEATURES, PATIENCE, PROTOCOL, Ring, SIZE};
use outboard::{
    DeviceRequestHandler, Error, HandlerOptions, MakeWorker, Model, QueueSpec, WorkerDevice,
};
use outboard_frontend::{Connection, SharedMemory};

/// A device that has to be free before its first ring starts.
struct Claimed {
    taken: Arc<AtomicBool>,
    asked: Arc<AtomicU32>,
}

impl Model for Claimed {
    type Worker = Echo;

    fn queues(&self) -> Vec<QueueSpec> {
        vec![QueueSpec::new("a", 1024)]
    }

    fn make_worker(&self) -> MakeWorker<Echo> {
        Arc::new(|_| Ok(Echo))
    }

    fn resume(&mut self) -> Result<(), Error> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        match self.taken.load(Ordering::SeqCst) {
            true => Err(Error::busy("taken by the test")),
            false => Ok(()),
        }
    }
}

/// A device and what the test holds of it.
struct Held {
    handler: DeviceRequestHandler<WorkerDevice<Claimed>>,
    taken: Arc<AtomicBool>,
    asked: Arc<AtomicU32>,
}

fn held(taken: bool, claim_patience: Duration) -> Held {
    let (taken, asked) = (Arc::new(AtomicBool::new(taken)), Arc::new(AtomicU32::new(0)));
    let model = Claimed { taken: Arc::clone(&taken), asked: Arc::clone(&asked) };
    let device = WorkerDevice::new(model).unwrap();
    let options = HandlerOptions { claim_patience, ..HandlerOptions::default() };
    Held { handler: DeviceRequestHandler::new(device, options).unwrap(), taken, asked }
}

/// A front-end with one ring that lacks nothing but its kick.
fn set_up(socket: std::os::unix::net::UnixStream) -> (Connection, SharedMemory, Ring) {
    let mut front = Connection::from_fd(socket.into(), PATIENCE).unwrap();
    let memory = SharedMemory::with_size(1 << 20).unwrap();
    front.set_owner().unwrap();
    front.get_features().unwrap();
    front.get_protocol_features().unwrap();
    front.set_protocol_features(PROTOCOL).unwrap();
    front.set_features(FEATURES).unwrap();
    front.set_mem_table(memory.regions()).unwrap();
    let ring = Ring::new(&memory, 0, FEATURES);
    front.set_vring_num(0, SIZE).unwrap();
    front.set_vring_addr(0, &ring.layout).unwrap();
    front.set_vring_base(0, 0).unwrap();
    front.set_vring_call(0, &ring.call).unwrap();
    front.set_vring_enable(0, true).unwrap();
    (front, memory, ring)
}

#[test]
fn a_start_that_waits_for_a_claim_holds_up_nobody_else_on_its_thread() {
    let (mut waiting, mut free) = (held(true, PATIENCE * 6), held(false, Duration::ZERO));
    let (taken, asked) = (Arc::clone(&waiting.taken), Arc::clone(&waiting.asked));
    let (first, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let (second, others) = std::os::unix::net::UnixStream::pair().unwrap();
    let both = std::thread::spawn(move || {
        let mut sessions = [waiting.handler.by_hand(theirs), free.handler.by_hand(others)];
        let mut over = [false; 2];
        while over != [true; 2] {
            for (session, over) in sessions.iter_mut().zip(&mut over) {
                *over |= session.turn().is_ready();
            }
        }
    });
    let (mut front, _memory, mut ring) = set_up(first);
    let start = std::thread::spawn(move || {
        front.set_vring_kick(0, &ring.kick).unwrap();
        ring.round(b"after the claim");
    });
    // From here on the first device waits for its claim.
    while asked.load(Ordering::SeqCst) < 2 {
        std::thread::yield_now();
    }
    let (mut front, _memory, mut ring) = set_up(second);
    front.set_vring_kick(0, &ring.kick).unwrap();
    ring.round(b"meanwhile");
    assert!(!start.is_finished(), "it is answered when it has started");
    taken.store(false, Ordering::SeqCst);
    start.join().unwrap();
    drop(front);
    both.join().unwrap();
}

#[test]
fn a_claim_that_stays_taken_is_a_refusal_and_the_ring_can_be_started_later() {
    let Held { handler, taken, asked } = held(true, Duration::ZERO);
    let (socket, thread) = common::serve(handler);
    let (mut front, _memory, mut ring) = set_up(socket);
    front.set_vring_kick(0, &ring.kick).unwrap_err();
    assert_eq!(asked.load(Ordering::SeqCst), 1, "without patience it is asked once");
    taken.store(false, Ordering::SeqCst);
    front.set_vring_kick(0, &ring.kick).unwrap();
    ring.round(b"free");
    drop(front);
    thread.join().unwrap().0.unwrap();
}

/// An author who wants to wait for ever says so.
#[test]
fn a_claim_may_be_waited_for_without_end() {
    let Held { handler, taken, asked } = held(true, Duration::MAX);
    let (socket, thread) = common::serve(handler);
    let (mut front, _memory, mut ring) = set_up(socket);
    let freeing = std::thread::spawn(move || {
        while asked.load(Ordering::SeqCst) < 2 {
            std::thread::yield_now();
        }
        taken.store(false, Ordering::SeqCst);
    });
    front.set_vring_kick(0, &ring.kick).unwrap();
    freeing.join().unwrap();
    ring.round(b"at last");
    drop(front);
    thread.join().unwrap().0.unwrap();
}
