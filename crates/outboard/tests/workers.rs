//! Workers: requests that are deferred, dropped, failed or panicked over; drivers that break rings
//! (contract §1b; rules R8, R10, R13, R18; cases B4, C32).

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::fs::File;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{FEATURES, Finished, PATIENCE, Rig, Ring, rang, serve};
use outboard::{
    AsyncWorker, Deferred, DeviceRequestHandler, Error, FileId, FileOp, HandlerOptions, HostError,
    LoopKind, QueueSpec, Request, Served, Worker, WorkerDevice,
};
use outboard_frontend::{Connection, SharedMemory};

const MOMENT: Duration = Duration::from_millis(60);

/// Hands every request to the test.
struct Hand(Sender<Deferred>);

impl Worker for Hand {
    fn serve(&mut self, request: Request<'_>) -> Result<Served, Error> {
        let _ = self.0.send(request.defer());
        Ok(Served::later())
    }
}

struct Bench<D> {
    front: Connection,
    memory: SharedMemory,
    thread: std::thread::JoinHandle<Finished<D>>,
}

fn bench<D: outboard::VhostUserDevice + 'static>(device: D, deadline: Duration) -> Bench<D> {
    let options = HandlerOptions { drain_deadline: deadline, ..HandlerOptions::default() };
    let (ours, thread) = serve(DeviceRequestHandler::new(device, options).unwrap());
    let mut front = Connection::from_fd(ours.into(), PATIENCE).unwrap();
    let memory = SharedMemory::with_size(1 << 20).unwrap();
    front.get_features().unwrap();
    front.get_protocol_features().unwrap();
    front.set_protocol_features(common::PROTOCOL).unwrap();
    front.set_features(FEATURES).unwrap();
    front.set_mem_table(memory.regions()).unwrap();
    Bench { front, memory, thread }
}

impl<D> Bench<D> {
    fn started(&mut self, index: u16) -> Ring {
        self.started_with(index, common::SIZE)
    }

    fn started_with(&mut self, index: u16, size: u16) -> Ring {
        let ring = Ring::sized(&self.memory, index, FEATURES, size);
        self.front.set_vring_num(index, size).unwrap();
        self.front.set_vring_addr(index, &ring.layout).unwrap();
        self.front.set_vring_call(index, &ring.call).unwrap();
        self.front.set_vring_err(index, &ring.err).unwrap();
        self.front.set_vring_kick(index, &ring.kick).unwrap();
        self.front.set_vring_enable(index, true).unwrap();
        ring
    }
}

type Handed = (Bench<WorkerDevice<outboard::Plain<Hand>>>, Receiver<Deferred>);

fn handed(deadline: Duration) -> Handed {
    let (sender, requests) = channel();
    let sender = Mutex::new(sender);
    let device = WorkerDevice::plain(&[QueueSpec::new("a", 64)], move |_| {
        Ok(Hand(sender.lock().unwrap().clone()))
    });
    (bench(device.unwrap(), deadline), requests)
}

/// Reads each request's bytes from a pipe, with the kernel's help.
struct Reader(FileId, Sender<()>);

impl Worker for Reader {
    fn serve(&mut self, request: Request<'_>) -> Result<Served, Error> {
        let submitted = request.submit(FileOp::Read { file: self.0, offset: 0 }, 0);
        let _ = self.1.send(());
        submitted.map_err(|_| Error::refused("no io_uring"))
    }
}

/// D-7: while a change of memory waits for what the kernel works on, a kick comes; nobody kicks again.
#[test]
fn a_request_that_was_kicked_while_a_new_table_waited_is_served_after_it() {
    let (pipe, writer) = rustix::pipe::pipe().unwrap();
    let pipe = Arc::new(File::from(pipe));
    let (sender, taken) = channel();
    let sender = Mutex::new(sender);
    let device = WorkerDevice::plain(&[QueueSpec::new("a", 64)], move |context| {
        Ok(Reader(context.add_file(Arc::clone(&pipe)), sender.lock().unwrap().clone()))
    });
    let mut bench = bench(device.unwrap(), PATIENCE);
    let mut ring = bench.started(0);
    let (guest, used) = (ring.data.guest(), usize::from(common::SIZE) * 8 + 4);
    let used = usize::try_from(ring.layout.used - ring.area.guest()).unwrap() + used;
    let finish = |ring: &mut Ring| {
        rustix::io::write(&writer, b"four").unwrap();
        assert_eq!(ring.answered(), 4);
    };
    let offer = |ring: &mut Ring| {
        ring.driver.add(&[], &[(guest, 4)], 7).unwrap();
        ring.driver.publish();
        ring.kick();
    };
    let mut offered = 0u16;
    for _ in 0..10 {
        offer(&mut ring);
        offered = offered.wrapping_add(1);
        taken.recv_timeout(PATIENCE).unwrap();
        std::thread::scope(|scope| {
            let (front, memory) = (&mut bench.front, &bench.memory);
            let change = scope.spawn(move || front.set_mem_table(memory.regions()));
            // One is in flight all the time. Another one is taken as long as the table has not come; then
            // the ring is looked at, which takes the wish for kicks back, and it stays there.
            loop {
                offer(&mut ring);
                offered = offered.wrapping_add(1);
                let looked = || {
                    let mut event = [0; 2];
                    ring.area.read(used, &mut event).unwrap();
                    u16::from_le_bytes(event) == offered.wrapping_sub(2)
                };
                while !looked() && taken.try_recv().is_err() {}
                if taken.recv_timeout(Duration::from_millis(5)).is_err() && looked() {
                    break;
                }
                finish(&mut ring);
            }
            finish(&mut ring);
            taken.recv_timeout(PATIENCE).expect("it is served after the table");
            change.join().unwrap().unwrap();
        });
        finish(&mut ring);
    }
}

#[test]
fn deferred_requests_are_answered_from_any_thread_and_in_any_order() {
    let (mut bench, requests) = handed(PATIENCE);
    let mut ring = bench.started(0);
    let guest = ring.data.guest();
    for token in 0..4u32 {
        ring.driver.add(&[], &[(guest + u64::from(64 * token), 8)], u64::from(token)).unwrap();
    }
    ring.driver.publish();
    ring.kick();
    let mut taken: Vec<_> = (0..4).map(|_| requests.recv_timeout(PATIENCE).unwrap()).collect();
    let mut order = Vec::new();
    for (position, written) in [(2, 3), (0, 1), (1, 4), (0, 2)] {
        let mut request = taken.remove(position);
        request.writable().write_all(&[9; 2]).unwrap();
        request.done(written);
        loop {
            if let Some((token, length)) = ring.driver.pop_used().unwrap() {
                order.push((token, length));
                break;
            }
            std::thread::yield_now();
        }
    }
    assert_eq!(order, [(2, 3), (0, 1), (3, 4), (1, 2)]);
}

#[test]
fn a_deferred_request_that_is_dropped_goes_back_with_length_0() {
    let (mut bench, requests) = handed(PATIENCE);
    let mut ring = bench.started(0);
    ring.offer(b"lost and found");
    ring.kick();
    drop(requests.recv_timeout(PATIENCE).unwrap());
    assert_eq!(ring.answered(), 0);
}

#[test]
fn r13_a_stop_waits_for_what_is_in_flight() {
    let (mut bench, requests) = handed(PATIENCE);
    let mut ring = bench.started(0);
    ring.offer(b"slow");
    ring.kick();
    let request = requests.recv_timeout(PATIENCE).unwrap();
    let (asked, answer) = channel();
    let mut front = bench.front;
    let stop = std::thread::spawn(move || {
        let base = front.get_vring_base(0).unwrap();
        asked.send(base).unwrap();
        front
    });
    assert!(answer.recv_timeout(MOMENT).is_err(), "no answer while a request is in flight");
    request.done(0);
    assert_eq!(answer.recv_timeout(PATIENCE).unwrap(), 1);
    assert_eq!(ring.answered(), 0, "and it was shown to the driver before");
    drop(stop.join().unwrap());
}

#[test]
fn a_drain_that_takes_too_long_ends_the_connection_with_that_reason() {
    let (mut bench, requests) = handed(Duration::from_millis(100));
    let mut ring = bench.started(0);
    ring.offer(b"hung");
    ring.kick();
    let request = requests.recv_timeout(PATIENCE).unwrap();
    assert!(bench.front.get_vring_base(0).is_err(), "no base is made up");
    drop(bench.front);
    let (ended, handler) = bench.thread.join().unwrap();
    assert!(matches!(ended, Err(HostError::DrainDeadline { index: 0, .. })), "{ended:?}");
    drop(request);
    drop(handler);
}

#[test]
fn a44_memory_that_a_request_uses_goes_only_when_the_request_is_finished() {
    let (mut bench, requests) = handed(PATIENCE);
    let mut ring = bench.started(0);
    ring.offer(b"using it");
    ring.kick();
    let mut request = requests.recv_timeout(PATIENCE).unwrap();
    let memory = bench.memory.clone();
    let mut front = bench.front;
    let (changed, changes) = channel();
    let change = std::thread::spawn(move || {
        front.set_mem_table(memory.regions()).unwrap();
        changed.send(()).unwrap();
        front
    });
    assert!(changes.recv_timeout(MOMENT).is_err(), "not acknowledged while it is used");
    request.writable().write_all(b"done").unwrap();
    request.done(4);
    changes.recv_timeout(PATIENCE).unwrap();
    assert_eq!(ring.answered(), 4);
    ring.offer(b"next");
    ring.kick();
    requests.recv_timeout(PATIENCE).unwrap().done(1);
    assert_eq!(ring.answered(), 1);
    drop(change.join().unwrap());
}

#[test]
fn a_request_whose_worker_fails_goes_back_and_the_ring_goes_on() {
    let mut rig = Rig::ready(LoopKind::Auto);
    let mut ring = rig.started(0);
    ring.offer(b"?");
    ring.kick();
    assert_eq!(ring.answered(), 0);
    ring.round(b"next");
}

/// R18: a panic goes no further than its rings.
#[test]
fn c32_a_worker_that_panics_costs_its_rings_and_not_the_thread() {
    let mut rig = Rig::ready(LoopKind::Auto);
    let mut ring = rig.started(0);
    ring.offer(b"!");
    ring.kick();
    assert!(rang(&ring.err, PATIENCE), "the ring is retired, and says so");
    rig.front.get_vring_base(0).unwrap();
    let mut again = rig.started(0);
    again.round(b"a new worker");
}

/// R10: a broken ring is broken once.
#[test]
fn b4_a_broken_ring_is_reported_once_and_the_others_run_on() {
    let mut rig = Rig::ready(LoopKind::Auto);
    let (mut bad, mut good) = (rig.started(0), rig.started(1));
    bad.round(b"well");
    // Head 999 in a ring of 16.
    let slot = bad.layout.avail + 4 + 2;
    let view = rig.memory.view();
    view.write(slot, &999u16.to_le_bytes()).unwrap();
    view.write(bad.layout.avail + 2, &2u16.to_le_bytes()).unwrap();
    bad.kick();
    assert!(rang(&bad.err, PATIENCE));
    bad.kick();
    assert!(!rang(&bad.err, MOMENT), "reported once");
    good.round(b"the other one");
    assert_eq!(rig.front.get_vring_base(0).unwrap(), 1);
    let mut again = rig.started(0);
    again.round(b"stopped and set up anew");
}

#[test]
fn an_async_fn_serves_a_queue_and_may_wait_between_requests() {
    let device = WorkerDevice::plain(&[QueueSpec::new("a", 64)], |context| {
        AsyncWorker::new(context, |mut requests| async move {
            loop {
                // Two at a time, answered in the other order: an async fn keeps state of its own.
                let mut first = requests.next().await;
                let second = requests.next().await;
                let mut byte = [0];
                if first.readable().read_exact(&mut byte).is_ok() && byte == [b'.'] {
                    return;
                }
                second.done(2);
                first.done(1);
            }
        })
    });
    let mut bench = bench(device.unwrap(), PATIENCE);
    let mut ring = bench.started(0);
    let mut round = |text: &[u8]| {
        ring.offer(text);
        ring.offer(text);
        ring.kick();
        (ring.answered(), ring.answered())
    };
    assert_eq!(round(b"a"), (2, 1));
    assert_eq!(round(b"."), (0, 0), "a future that returned gives back what it held");
    assert_eq!(round(b"b"), (2, 1), "and is made anew");
}

#[test]
fn queues_are_spread_over_threads_and_each_serves_its_own() {
    let (device, _) = common::echo(LoopKind::Auto, 3);
    let mut bench = bench(device, PATIENCE);
    let mut rings: Vec<_> = (0..3).map(|index| bench.started(index)).collect();
    for _ in 0..50 {
        for ring in &mut rings {
            ring.offer(b"each");
            ring.kick();
        }
        for ring in &mut rings {
            ring.expect(b"each");
        }
    }
}

/// Says which queue a request is of, and waits for the test before it answers.
struct Asked(Sender<u16>, Arc<Mutex<Receiver<()>>>);

impl Worker for Asked {
    fn serve(&mut self, request: Request<'_>) -> Result<Served, Error> {
        let _ = self.0.send(request.queue());
        let _ = self.1.lock().unwrap().recv();
        Ok(request.done(4))
    }
}

#[test]
fn a_ring_that_is_never_empty_does_not_starve_another_one_of_its_thread() {
    const FLOOD: u32 = 2_000;
    let (sender, asked) = channel();
    let (go, waits) = channel();
    let (sender, waits) = (Mutex::new(sender), Arc::new(Mutex::new(waits)));
    let queues = [QueueSpec::new("a", 64), QueueSpec::new("b", 64)];
    let device = WorkerDevice::plain(&queues, move |_| {
        Ok(Asked(sender.lock().unwrap().clone(), Arc::clone(&waits)))
    });
    let mut bench = bench(device.unwrap(), PATIENCE);
    let (mut flooded, mut other) = (bench.started_with(0, 64), bench.started(1));
    let offer = |ring: &mut Ring| {
        let guest = ring.data.guest();
        ring.driver.add(&[], &[(guest, 4)], 7).unwrap();
        if ring.driver.publish() {
            ring.kick();
        }
    };
    (0..16).for_each(|_| offer(&mut flooded));
    // For each one that is taken another one is offered before it is answered. The second one of the other ring needs no
    // kick, as the driver is told: its thread had no time to ask for one.
    for _ in 0..2 {
        let mut before = 0;
        while asked.recv_timeout(PATIENCE).expect("a request is served") == 0 {
            if before == 0 {
                offer(&mut other);
            }
            before += 1;
            assert!(before < FLOOD, "the other ring waits");
            while flooded.driver.pop_used().unwrap().is_some() {}
            offer(&mut flooded);
            go.send(()).unwrap();
        }
        go.send(()).unwrap();
    }
    drop(go);
    assert_eq!((other.answered(), other.answered()), (4, 4));
}

/// Its time never comes.
struct Unticked;

impl Worker for Unticked {
    fn serve(&mut self, request: Request<'_>) -> Result<Served, Error> {
        Ok(request.done(0))
    }

    fn tick_every(&self) -> Option<Duration> {
        Some(Duration::MAX)
    }
}

#[test]
fn a_worker_whose_ticks_are_further_apart_than_the_clock_reaches_gets_none() {
    let device = WorkerDevice::plain(&[QueueSpec::new("a", 64)], |_| Ok(Unticked));
    let mut bench = bench(device.unwrap(), PATIENCE);
    let mut ring = bench.started(0);
    ring.offer(b"served");
    ring.kick();
    assert_eq!(ring.answered(), 0);
}
