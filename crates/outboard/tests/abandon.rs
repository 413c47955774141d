//! Rings that stop without finishing what they hold: GET_VRING_BASE_SKIP_DRAIN, and GET_VRING_BASE over the deadline
//! (protocol features 20 and 23). The device does not answer: requests are kept by the test, or lie with the kernel, which
//! reads from a pipe that nobody writes to and writes to one that nobody reads from.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::{FEATURES, PATIENCE, PROTOCOL, Ring, SIZE, rang, serve};
use outboard::protocol::ProtocolFeatures;
use outboard::protocol::payload::Inflight;
use outboard::{
    Deferred, DeviceRequestHandler, Ended, Error, FileId, FileOp, HandlerOptions, HostError,
    LoopKind, MakeWorker, Model, Outcome, QueueSpec, Request, Served, Worker, WorkerDevice,
};
use outboard_frontend::{Connection, SharedMemory};
use rustix::io::pread;

const MOMENT: Duration = Duration::from_millis(60);
const BASIC: ProtocolFeatures = PROTOCOL.union(ProtocolFeatures::INFLIGHT_SHMFD);
const PARKING: ProtocolFeatures = BASIC.union(ProtocolFeatures::GET_VRING_BASE_INFLIGHT);
const ALL: ProtocolFeatures = PARKING.union(ProtocolFeatures::SKIP_DRAIN);

/// What a request's first byte has the device do with it.
const KEEP: u8 = b'k';
const READ: u8 = b'r';
const WRITE: u8 = b'w';
const WAIT: u8 = b'B';

/// What the device does, seen from outside.
#[derive(Default)]
struct Seen {
    suspended: AtomicU32,
    /// Operations that ended after their requests had been left behind.
    abandoned: AtomicU32,
    /// Where a worker waits for the test.
    gate: Mutex<()>,
}

/// Answers a request with its bytes, unless it is kept or given to the kernel.
struct Hung {
    kept: Sender<Deferred>,
    pipe: FileId,
    seen: Arc<Seen>,
}

impl Worker for Hung {
    fn serve(&mut self, mut request: Request<'_>) -> Result<Served, Error> {
        let byte = request.readable().read_obj::<u8>()?;
        let op = match byte {
            READ => FileOp::Read { file: self.pipe, offset: u64::MAX },
            WRITE => FileOp::Write { file: self.pipe, offset: u64::MAX },
            KEEP => {
                let _ = self.kept.send(request.defer());
                return Ok(Served::later());
            }
            _ => {
                if byte == WAIT {
                    drop(self.seen.gate.lock().unwrap());
                }
                request.writable().write_all(&[byte])?;
                return Ok(request.done(1));
            }
        };
        request.submit(op, 5).map_err(|_| Error::refused("no io_uring"))
    }

    fn completed(
        &mut self,
        request: Request<'_>,
        token: u64,
        outcome: Outcome,
    ) -> Result<Served, Error> {
        assert_eq!(token, 5);
        Ok(request.done(outcome?))
    }

    fn abandoned(&mut self, token: u64, _: Outcome) {
        assert_eq!(token, 5);
        self.seen.abandoned.fetch_add(1, Ordering::SeqCst);
    }
}

struct HungModel {
    kept: Mutex<Sender<Deferred>>,
    pipe: Arc<File>,
    seen: Arc<Seen>,
}

impl Model for HungModel {
    type Worker = Hung;

    fn queues(&self) -> Vec<QueueSpec> {
        vec![QueueSpec::new("a", 64), QueueSpec::new("b", 64)]
    }

    fn make_worker(&self) -> MakeWorker<Hung> {
        let kept = Mutex::new(self.kept.lock().unwrap().clone());
        let (pipe, seen) = (Arc::clone(&self.pipe), Arc::clone(&self.seen));
        Arc::new(move |context| {
            let kept = kept.lock().unwrap().clone();
            Ok(Hung { kept, pipe: context.add_file(Arc::clone(&pipe)), seen: Arc::clone(&seen) })
        })
    }

    fn suspend(&mut self) -> Result<(), Error> {
        self.seen.suspended.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

type Handler = DeviceRequestHandler<WorkerDevice<HungModel>>;

/// A process that has the device.
struct Back {
    front: Connection,
    kept: Receiver<Deferred>,
    seen: Arc<Seen>,
    thread: JoinHandle<(Result<Ended, HostError>, Handler)>,
}

impl Back {
    fn new(
        pipe: &Arc<File>,
        kind: LoopKind,
        options: HandlerOptions,
        protocol: ProtocolFeatures,
    ) -> Self {
        let (sender, kept) = channel();
        let seen = Arc::new(Seen::default());
        let model =
            HungModel { kept: Mutex::new(sender), pipe: Arc::clone(pipe), seen: Arc::clone(&seen) };
        let device = WorkerDevice::with_options(model, kind.into()).unwrap();
        let (ours, thread) = serve(DeviceRequestHandler::new(device, options).unwrap());
        let mut front = Connection::from_fd(ours.into(), PATIENCE).unwrap();
        front.get_features().unwrap();
        assert!(front.get_protocol_features().unwrap().contains(protocol));
        front.set_protocol_features(protocol).unwrap();
        front.set_features(FEATURES).unwrap();
        Self { front, kept, seen, thread }
    }

    fn start(&mut self, ring: &Ring) {
        self.front.set_vring_num(ring.index, SIZE).unwrap();
        self.front.set_vring_addr(ring.index, &ring.layout).unwrap();
        self.front.set_vring_base(ring.index, 0).unwrap();
        self.front.set_vring_call(ring.index, &ring.call).unwrap();
        self.front.set_vring_kick(ring.index, &ring.kick).unwrap();
        self.front.set_vring_enable(ring.index, true).unwrap();
    }
}

/// Guest memory with a ring in it, a pipe and an in-flight region, which outlive a process.
struct Bench {
    memory: SharedMemory,
    ring: Ring,
    reader: Arc<File>,
    writer: Arc<File>,
    region: Option<(Inflight, OwnedFd)>,
}

impl Bench {
    fn new() -> Self {
        let memory = SharedMemory::with_size(1 << 20).unwrap();
        let ring = Ring::new(&memory, 0, FEATURES);
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let (reader, writer) = (Arc::new(reader.into()), Arc::new(writer.into()));
        Self { memory, ring, reader, writer, region: None }
    }

    /// Memory, the region and the ring are told; the ring runs.
    fn begin(&mut self, back: &mut Back) {
        back.front.set_mem_table(self.memory.regions()).unwrap();
        let region = self
            .region
            .get_or_insert_with(|| back.front.get_inflight_fd(2, SIZE).unwrap().unwrap());
        back.front.set_inflight_fd(region.0, &region.1).unwrap();
        back.start(&self.ring);
    }

    /// Offers requests: a byte to read each, and one of 0xee to write.
    fn offer(&mut self, texts: &[u8]) {
        for text in texts {
            let at = usize::from(*text) * 8;
            self.ring.data.write(at, &[*text]).unwrap();
            self.ring.data.write(4096 + at, &[0xee]).unwrap();
            let from = self.ring.data.guest() + at as u64;
            // WRITE has a byte left for the kernel to write.
            let length = 1 + u32::from(*text == WRITE);
            self.ring.driver.add(&[(from, length)], &[(from + 4096, 1)], u64::from(*text)).unwrap();
        }
        self.ring.driver.publish();
        self.ring.kick();
    }

    /// What a request's room holds.
    fn room(&self, text: u8) -> u8 {
        let mut byte = [0];
        self.ring.data.read(4096 + 8 * usize::from(text), &mut byte).unwrap();
        byte[0]
    }

    /// The next answer.
    fn answer(&mut self) -> u8 {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some((token, written)) = self.ring.driver.pop_used().unwrap() {
                assert_eq!(written, 1, "{token}");
                return u8::try_from(token).unwrap();
            }
            assert!(Instant::now() < until, "no answer");
            if !self.ring.driver.arm() {
                rang(&self.ring.call, Duration::from_millis(1));
            }
        }
    }

    fn none_answered(&mut self) -> bool {
        self.ring.driver.pop_used().unwrap().is_none()
    }

    /// How many requests the region says are in flight.
    fn in_flight(&self) -> usize {
        let (_, file) = self.region.as_ref().unwrap();
        let mut bytes = vec![0; 16 * usize::from(SIZE)];
        pread(file, &mut bytes, 16).unwrap();
        bytes.chunks(16).filter(|entry| entry[0] == 1).count()
    }

    fn fill_pipe(&self) {
        rustix::io::ioctl_fionbio(&self.writer, true).unwrap();
        while (&*self.writer).write(&[0; 4096]).is_ok() {}
        rustix::io::ioctl_fionbio(&self.writer, false).unwrap();
    }
}

/// Finishes a request that was kept, whatever becomes of that.
fn finish(mut request: Deferred, byte: u8) {
    let _ = request.writable().write_all(&[byte]);
    request.done(1);
}

#[test]
fn skip_drain_leaves_requests_under_way_for_the_next_process_and_never_answers_them() {
    for kind in [LoopKind::Uring, LoopKind::Epoll] {
        let mut bench = Bench::new();
        let mut first = Back::new(&bench.reader, kind, HandlerOptions::default(), ALL);
        bench.begin(&mut first);
        bench.offer(b"aKk");
        assert_eq!((bench.answer(), bench.answer()), (b'a', b'K'));
        bench.offer(b"b");
        assert_eq!(bench.answer(), b'b');
        let mut kept = first.kept.recv_timeout(PATIENCE).unwrap();
        assert_eq!(first.front.get_vring_base_skip_drain(0).unwrap(), 4, "as many were taken");
        rang(&bench.ring.call, Duration::ZERO);
        assert_eq!(bench.in_flight(), 1);
        // Its device goes on as if nothing had happened.
        assert!(kept.is_abandoned() && kept.readable().is_empty() && kept.writable().is_empty());
        finish(kept, 0x11);
        assert!(!rang(&bench.ring.call, MOMENT), "nobody calls any more");
        assert!(bench.none_answered() && bench.room(KEEP) == 0xee && bench.in_flight() == 1);
        bench.offer(b"c");
        let mut second = Back::new(&bench.reader, kind, HandlerOptions::default(), ALL);
        bench.begin(&mut second);
        let kept = second.kept.recv_timeout(PATIENCE).unwrap();
        assert!(bench.none_answered(), "what is new waits");
        finish(kept, 0x22);
        assert_eq!((bench.answer(), bench.room(KEEP)), (KEEP, 0x22));
        assert_eq!(bench.answer(), b'c');
    }
}

/// A migration that fails: the same process goes on.
#[test]
fn the_process_that_left_requests_behind_serves_them_when_its_ring_starts_again() {
    let mut bench = Bench::new();
    let mut back = Back::new(&bench.reader, LoopKind::Auto, HandlerOptions::default(), ALL);
    bench.begin(&mut back);
    for round in 0..50_u8 {
        bench.offer(b"k");
        let old = back.kept.recv_timeout(PATIENCE).unwrap();
        assert_eq!(back.front.get_vring_base_skip_drain(0).unwrap(), u32::from(round) + 1);
        bench.start_again(&mut back);
        let new = back.kept.recv_timeout(PATIENCE).unwrap();
        finish(old, 0x33);
        finish(new, round);
        assert_eq!((bench.answer(), bench.room(KEEP)), (KEEP, round));
        assert!(bench.none_answered());
        assert_eq!(back.front.get_vring_base(0).unwrap(), u32::from(round) + 1);
        bench.start_again(&mut back);
    }
}

impl Bench {
    fn start_again(&mut self, back: &mut Back) {
        back.front.set_vring_kick(0, &self.ring.kick).unwrap();
    }
}

#[test]
fn operations_of_the_kernel_are_cancelled_and_their_requests_stay_in_flight() {
    let mut bench = Bench::new();
    for (text, pipe) in [(READ, Arc::clone(&bench.reader)), (WRITE, Arc::clone(&bench.writer))] {
        if text == WRITE {
            bench.fill_pipe();
        }
        let mut back = Back::new(&pipe, LoopKind::Uring, HandlerOptions::default(), ALL);
        bench.begin(&mut back);
        // The second one says that the first one was taken.
        bench.offer(&[text, b'a']);
        assert_eq!(bench.answer(), b'a');
        assert_eq!(back.front.get_vring_base_skip_drain(0).unwrap() % 2, 0);
        assert_eq!(bench.in_flight(), 1);
        if text == READ {
            (&*bench.writer).write_all(&[0x44]).unwrap();
        }
        std::thread::sleep(MOMENT);
        assert!(bench.none_answered() && bench.room(text) == 0xee, "the kernel has let go");
        // Where the disk answers it is served, and the byte that was not read before is there.
        let mut next = Back::new(&pipe, LoopKind::Uring, HandlerOptions::default(), ALL);
        let mut drained = vec![0; 1 << 16];
        if text == WRITE {
            let read = (&*bench.reader).read(&mut drained).unwrap();
            assert!(read > 0);
        }
        bench.begin(&mut next);
        assert_eq!(bench.answer(), text);
        assert_eq!(next.front.get_vring_base(0).unwrap() % 2, 0);
        let until = Instant::now() + PATIENCE;
        while back.seen.abandoned.load(Ordering::SeqCst) == 0 {
            assert!(Instant::now() < until, "the operation never ended");
        }
        // What it holds is let go when that has ended, and not twice.
        while back.seen.suspended.load(Ordering::SeqCst) < 2 {
            assert!(Instant::now() < until, "suspended at first and now");
        }
        drop(back.front);
        back.thread.join().unwrap().0.unwrap();
        assert_eq!(back.seen.suspended.load(Ordering::SeqCst), 2);
    }
}

#[test]
fn a_base_is_not_answered_while_somebody_is_in_guest_memory_with_a_request() {
    let mut bench = Bench::new();
    let mut back = Back::new(&bench.reader, LoopKind::Auto, HandlerOptions::default(), ALL);
    bench.begin(&mut back);
    bench.offer(b"k");
    let mut kept = back.kept.recv_timeout(PATIENCE).unwrap();
    let mut room = kept.writable();
    let mut front = back.front;
    let (answered, answers) = channel();
    let asking = std::thread::spawn(move || {
        let base = front.get_vring_base_skip_drain(0);
        answered.send(()).unwrap();
        base
    });
    assert!(answers.recv_timeout(MOMENT).is_err(), "answered with a writer in guest memory");
    room.write_all(&[0x55]).unwrap();
    drop(room);
    answers.recv_timeout(PATIENCE).unwrap();
    assert_eq!(asking.join().unwrap().unwrap(), 1);
    rang(&bench.ring.call, Duration::ZERO);
    kept.done(1);
    assert!(!rang(&bench.ring.call, MOMENT) && bench.none_answered() && bench.in_flight() == 1);
}

fn impatient() -> HandlerOptions {
    HandlerOptions { drain_deadline: MOMENT, ..HandlerOptions::default() }
}

/// Contract §1, "Deadline of a drain".
#[test]
fn a_drain_that_is_too_late_leaves_requests_in_the_region_where_that_was_negotiated() {
    let mut bench = Bench::new();
    let mut first = Back::new(&bench.reader, LoopKind::Auto, impatient(), PARKING);
    bench.begin(&mut first);
    bench.offer(b"ka");
    assert_eq!(bench.answer(), b'a');
    let kept = first.kept.recv_timeout(PATIENCE).unwrap();
    let before = Instant::now();
    assert_eq!(first.front.get_vring_base(0).unwrap(), 2);
    assert!(before.elapsed() >= MOMENT, "it was given its time");
    finish(kept, 0x66);
    assert!(bench.none_answered() && bench.room(KEEP) == 0xee);
    let mut second = Back::new(&bench.reader, LoopKind::Auto, impatient(), PARKING);
    bench.begin(&mut second);
    finish(second.kept.recv_timeout(PATIENCE).unwrap(), 0x77);
    assert_eq!((bench.answer(), bench.room(KEEP)), (KEEP, 0x77));
}

/// Contract §1, "Deadline of a drain".
#[test]
fn a_drain_that_is_too_late_ends_the_connection_where_it_was_not() {
    let mut bench = Bench::new();
    let mut back = Back::new(&bench.reader, LoopKind::Auto, impatient(), BASIC);
    bench.begin(&mut back);
    bench.offer(b"k");
    let kept = back.kept.recv_timeout(PATIENCE).unwrap();
    assert!(back.front.get_vring_base(0).is_err(), "no answer is made up");
    let (ended, handler) = back.thread.join().unwrap();
    let error = ended.unwrap_err();
    assert!(matches!(error, HostError::DrainDeadline { index: 0, .. }), "{error}");
    assert!(error.to_string().contains("queue 0 did not drain"), "{error}");
    assert_eq!(bench.in_flight(), 1, "the next process finds it all the same");
    finish(kept, 0x77);
    drop(handler);
}

/// There is nowhere to leave anything: the drain is waited for.
#[test]
fn skip_drain_without_a_region_drains() {
    let mut bench = Bench::new();
    let mut back = Back::new(&bench.reader, LoopKind::Auto, HandlerOptions::default(), ALL);
    back.front.set_mem_table(bench.memory.regions()).unwrap();
    back.start(&bench.ring);
    bench.offer(b"k");
    let kept = back.kept.recv_timeout(PATIENCE).unwrap();
    let finishing = std::thread::spawn(move || {
        std::thread::sleep(MOMENT);
        finish(kept, 0x99);
    });
    assert_eq!(back.front.get_vring_base_skip_drain(0).unwrap(), 1);
    assert_eq!((bench.answer(), bench.room(KEEP)), (KEEP, 0x99));
    finishing.join().unwrap();
}

#[test]
fn what_needs_what_is_not_offered_is_not_offered_either() {
    for (without, offered) in [
        (ProtocolFeatures::empty(), ALL),
        (ProtocolFeatures::SKIP_DRAIN, PARKING),
        (ProtocolFeatures::GET_VRING_BASE_INFLIGHT, BASIC),
        (ProtocolFeatures::INFLIGHT_SHMFD, PROTOCOL),
    ] {
        let options =
            HandlerOptions { without_protocol_features: without, ..HandlerOptions::default() };
        let bench = Bench::new();
        let mut back = Back::new(&bench.reader, LoopKind::Auto, options, PROTOCOL);
        let all = back.front.get_protocol_features().unwrap();
        assert_eq!(all & ALL, offered);
        assert!(back.front.set_protocol_features(ALL).is_ok() == (offered == ALL));
    }
}

/// It has ended, and the worker learns of that and of the stop at once.
#[test]
fn an_operation_that_ends_as_its_ring_is_abandoned_is_counted_once() {
    let mut bench = Bench::new();
    let mut back = Back::new(&bench.reader, LoopKind::Uring, HandlerOptions::default(), ALL);
    bench.begin(&mut back);
    bench.offer(&[READ, b'a']);
    assert_eq!(bench.answer(), b'a');
    let gate = back.seen.gate.lock().unwrap();
    bench.offer(&[WAIT]);
    std::thread::sleep(MOMENT);
    let mut front = back.front;
    let asking = std::thread::spawn(move || {
        front.get_vring_base_skip_drain(0).unwrap();
        front
    });
    std::thread::sleep(MOMENT);
    (&*bench.writer).write_all(&[1]).unwrap();
    drop(gate);
    back.front = asking.join().unwrap();
    // Or it is served again, and needs another byte.
    (&*bench.writer).write_all(&[2]).unwrap();
    bench.start_again(&mut back);
    let mut answers = [bench.answer(), bench.answer()];
    answers.sort_unstable();
    assert_eq!(answers, [WAIT, READ]);
    assert!(bench.none_answered());
}

/// An author who wants to wait for ever says so.
#[test]
fn a_deadline_that_never_comes_is_no_end_of_the_session() {
    let options = HandlerOptions { drain_deadline: Duration::MAX, ..HandlerOptions::default() };
    let mut bench = Bench::new();
    let mut back = Back::new(&bench.reader, LoopKind::Auto, options, BASIC);
    bench.begin(&mut back);
    bench.offer(b"k");
    let kept = back.kept.recv_timeout(PATIENCE).unwrap();
    drop(back.front);
    finish(kept, 1);
    let (ended, handler) = back.thread.join().unwrap();
    assert!(ended.is_ok(), "{ended:?}");
    drop(handler);
}
