//! A worker that has no use for its requests now: they stay in the ring (contract §1b).

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use common::{FEATURES, PATIENCE, PROTOCOL, Ring, SIZE, doorbell, serve};
use outboard::protocol::ProtocolFeatures;
use outboard::{
    DeviceRequestHandler, Error, HandlerOptions, LoopKind, MakeWorker, Model, QueueSpec, Request,
    Served, Worker, WorkerDevice,
};
use outboard_frontend::{Connection, SharedMemory};

/// Wants requests of queue 0 once its bell rang, and of queue 1 when it has served one of queue 0.
struct Picky {
    wants: [bool; 2],
    asked: Arc<AtomicU32>,
}

impl Worker for Picky {
    fn wants(&mut self, queue: u16) -> bool {
        self.asked.fetch_add(1, Ordering::SeqCst);
        self.wants[usize::from(queue)]
    }

    fn serve(&mut self, request: Request<'_>) -> Result<Served, Error> {
        if request.queue() == 0 {
            self.wants[1] = true;
        }
        Ok(request.done(0))
    }

    fn event(&mut self, _: u32) -> Result<(), Error> {
        self.wants[0] = true;
        Ok(())
    }
}

struct PickyModel {
    bell: Arc<OwnedFd>,
    asked: Arc<AtomicU32>,
}

impl Model for PickyModel {
    type Worker = Picky;

    fn queues(&self) -> Vec<QueueSpec> {
        vec![QueueSpec::new("a", 64), QueueSpec::transmit("b", 64)]
    }

    fn make_worker(&self) -> MakeWorker<Picky> {
        let (bell, asked) = (Arc::clone(&self.bell), Arc::clone(&self.asked));
        Arc::new(move |context| {
            context.watch(bell.as_fd(), 0)?;
            Ok(Picky { wants: [false; 2], asked: Arc::clone(&asked) })
        })
    }
}

struct Rig {
    front: Connection,
    rings: Vec<Ring>,
    bell: Arc<OwnedFd>,
    asked: Arc<AtomicU32>,
    _memory: SharedMemory,
}

fn rig(kind: LoopKind, in_band: bool) -> Rig {
    let (bell, asked) = (Arc::new(doorbell()), Arc::default());
    let model = PickyModel { bell: Arc::clone(&bell), asked: Arc::clone(&asked) };
    let device = WorkerDevice::with_options(model, kind.into()).unwrap();
    let handler = DeviceRequestHandler::new(device, HandlerOptions::default()).unwrap();
    let (ours, _) = serve(handler);
    let mut front = Connection::from_fd(ours.into(), PATIENCE).unwrap();
    let memory = SharedMemory::with_size(1 << 20).unwrap();
    front.get_features().unwrap();
    front.get_protocol_features().unwrap();
    let bits = ProtocolFeatures::INBAND_NOTIFICATIONS | ProtocolFeatures::BACKEND_REQ;
    let more = if in_band { bits } else { ProtocolFeatures::empty() };
    front.set_protocol_features(PROTOCOL | more).unwrap();
    front.set_features(FEATURES).unwrap();
    front.set_mem_table(memory.regions()).unwrap();
    let mut rings = Vec::new();
    for index in 0..2 {
        let ring = Ring::new(&memory, index, FEATURES);
        front.set_vring_num(index, SIZE).unwrap();
        front.set_vring_addr(index, &ring.layout).unwrap();
        front.set_vring_call(index, &ring.call).unwrap();
        if in_band {
            front.set_vring_kick_polled(index).unwrap();
        } else {
            front.set_vring_kick(index, &ring.kick).unwrap();
        }
        front.set_vring_enable(index, true).unwrap();
        rings.push(ring);
    }
    Rig { front, rings, bell, asked, _memory: memory }
}

const BOTH: [LoopKind; 2] = [LoopKind::Epoll, LoopKind::Uring];

#[test]
fn requests_that_are_not_wanted_stay_in_the_ring_until_they_are() {
    for kind in BOTH {
        let mut rig = rig(kind, false);
        for ring in &mut rig.rings {
            ring.offer(b"wait");
            ring.kick();
        }
        // The ring stops with nothing taken, and goes on there.
        assert_eq!(rig.front.get_vring_base(0).unwrap(), 0);
        rig.front.set_vring_base(0, 0).unwrap();
        rig.front.set_vring_kick(0, &rig.rings[0].kick).unwrap();
        assert!(rig.rings.iter_mut().all(|ring| ring.driver.pop_used().unwrap().is_none()));
        rustix::io::write(&*rig.bell, &1u64.to_ne_bytes()).unwrap();
        // What a request of one queue makes wanted of another one is served without a kick.
        assert_eq!(rig.rings[0].answered(), 0);
        assert_eq!(rig.rings[1].answered(), 0);
    }
}

#[test]
fn a_worker_that_wants_nothing_is_not_asked_in_a_loop() {
    for kind in BOTH {
        let mut rig = rig(kind, false);
        rig.rings[1].offer(b"wait");
        rig.rings[1].kick();
        // An answer on the other ring's control path is proof that the thread went round.
        rig.front.set_vring_enable(0, true).unwrap();
        let before = rig.asked.load(Ordering::SeqCst);
        std::thread::sleep(std::time::Duration::from_millis(50));
        let asked = rig.asked.load(Ordering::SeqCst) - before;
        assert!(asked < 100, "asked {asked} times in a moment in which nothing happened");
    }
}

/// A disabled ring that transmits drops what is in it, wanted or not.
#[test]
fn what_a_disabled_ring_transmits_is_dropped_although_nobody_wants_it() {
    for kind in BOTH {
        let mut rig = rig(kind, false);
        rig.front.set_vring_enable(1, false).unwrap();
        rig.rings[1].offer(b"gone");
        rig.rings[1].kick();
        assert_eq!(rig.rings[1].answered(), 0);
    }
}

/// VRING_KICK with an acknowledgement: answered once the ring was looked at.
#[test]
fn a_kick_by_message_is_acknowledged_although_nothing_is_wanted() {
    for kind in BOTH {
        let mut rig = rig(kind, true);
        rig.rings[0].offer(b"wait");
        rig.front.vring_kick(0).unwrap();
        assert!(rig.rings[0].driver.pop_used().unwrap().is_none());
    }
}
