//! Requests that are answered together: buffers that hold one packet (contract §1b, virtio 1.3 §5.1.6.3.1).

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use common::{FEATURES, PATIENCE, PROTOCOL, Ring, SIZE, serve};
use outboard::{
    DeviceRequestHandler, Error, Gather, HandlerOptions, LoopKind, QueueSpec, Request, Served,
    Worker, WorkerDevice,
};
use outboard_frontend::{Connection, SharedMemory};

/// What each packet is.
const PACKET: &[u8] = b"twelve bytes";
const BOTH: [LoopKind; 2] = [LoopKind::Epoll, LoopKind::Uring];

/// Puts the packet into as many buffers as it takes.
struct Merging(Arc<AtomicU32>);

impl Worker for Merging {
    fn serve(&mut self, mut request: Request<'_>) -> Result<Served, Error> {
        let answer = match request.gather(PACKET.len() as u64) {
            Gather::Enough(gathered) => gathered.done(PACKET),
            Gather::Later(served) | Gather::Never(served) => served,
        };
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(answer)
    }
}

struct Rig {
    served: Arc<AtomicU32>,
    front: Connection,
    ring: Ring,
    memory: SharedMemory,
}

impl Rig {
    fn start(kind: LoopKind) -> Self {
        let queues = [QueueSpec::new("rx", SIZE)];
        let served = Arc::new(AtomicU32::new(0));
        let theirs = Arc::clone(&served);
        let plain = outboard::Plain::new(&queues, move |_| Ok(Merging(Arc::clone(&theirs))));
        let device = WorkerDevice::with_options(plain, kind.into()).unwrap();
        let handler = DeviceRequestHandler::new(device, HandlerOptions::default()).unwrap();
        let (ours, _) = serve(handler);
        let mut front = Connection::from_fd(ours.into(), PATIENCE).unwrap();
        let memory = SharedMemory::with_size(1 << 20).unwrap();
        front.get_features().unwrap();
        front.get_protocol_features().unwrap();
        front.set_protocol_features(PROTOCOL).unwrap();
        front.set_features(FEATURES).unwrap();
        front.set_mem_table(memory.regions()).unwrap();
        let ring = Ring::new(&memory, 0, FEATURES);
        front.set_vring_num(0, SIZE).unwrap();
        front.set_vring_addr(0, &ring.layout).unwrap();
        front.set_vring_call(0, &ring.call).unwrap();
        front.set_vring_kick(0, &ring.kick).unwrap();
        front.set_vring_enable(0, true).unwrap();
        Self { served, front, ring, memory }
    }

    /// Offers a buffer of so many bytes at byte `at`.
    fn offer(&mut self, at: u64, length: u32) {
        let guest = self.ring.data.guest() + at;
        self.ring.driver.add(&[], &[(guest, length)], 7).unwrap();
        self.ring.driver.publish();
        self.ring.kick();
    }

    /// Offers one that is too little alone, and waits until it was taken.
    fn offer_a_runt(&mut self) {
        let before = self.served.load(Ordering::SeqCst);
        self.offer(0, 4);
        let until = Instant::now() + PATIENCE;
        while self.served.load(Ordering::SeqCst) == before {
            assert!(Instant::now() < until, "it is not taken");
            std::thread::yield_now();
        }
    }

    fn text(&self, at: usize, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.ring.data.read(at, &mut bytes).unwrap();
        bytes
    }
}

#[test]
fn a_packet_goes_into_as_many_buffers_as_it_takes_however_they_come() {
    for kind in BOTH {
        let mut rig = Rig::start(kind);
        // One by one, each with a doorbell of its own: what is too little waits for more.
        for at in [0, 100, 200] {
            rig.offer(at, 4);
        }
        assert_eq!([(); 3].map(|()| rig.ring.answered()), [4, 4, 4]);
        let text = [0, 100, 200].map(|at| rig.text(at, 4));
        assert_eq!(text.concat(), PACKET);
        rig.offer(300, 5);
        rig.offer(400, 40);
        assert_eq!([(); 2].map(|()| rig.ring.answered()), [5, 7]);
        assert_eq!([rig.text(300, 5), rig.text(400, 7)].concat(), PACKET);
    }
}

/// B64: buffers of one byte, as many as the ring holds.
#[test]
fn b64_a_ring_full_of_runts_goes_back_and_the_next_packet_arrives() {
    for kind in BOTH {
        let mut rig = Rig::start(kind);
        rig.front.get_vring_base(0).unwrap();
        for at in 0..u64::from(SIZE) - 5 {
            let guest = rig.ring.data.guest() + at;
            rig.ring.driver.add(&[], &[(guest, 1)], 7).unwrap();
        }
        for _ in 0..5 {
            // Nothing to write to.
            let guest = rig.ring.data.guest();
            rig.ring.driver.add(&[(guest, 1)], &[], 7).unwrap();
        }
        rig.ring.driver.publish();
        rig.front.set_vring_kick(0, &rig.ring.kick).unwrap();
        rig.ring.kick();
        for _ in 0..SIZE {
            assert_eq!(rig.ring.answered(), 0);
        }
        rig.offer(500, 64);
        assert_eq!(rig.ring.answered(), 12);
        assert_eq!(rig.text(500, 12), PACKET);
    }
}

#[test]
fn a_ring_stops_and_its_memory_changes_although_a_packet_waits_for_buffers() {
    for kind in BOTH {
        let mut rig = Rig::start(kind);
        rig.offer_a_runt();
        rig.front.set_mem_table(rig.memory.regions()).unwrap();
        assert_eq!(rig.ring.answered(), 0, "its memory may have gone");
        rig.offer_a_runt();
        assert_eq!(rig.front.get_vring_base(0).unwrap(), 2);
        assert_eq!(rig.ring.answered(), 0);
    }
}
