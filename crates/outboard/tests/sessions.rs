//! Sessions: executors, front-ends that come and go, futures that are dropped
//! (contract §2 and §5; cases A14, A15, A86, A93, A94, D-22, D-23).

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::future::Future;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use common::{FEATURES, PATIENCE, Rig, Ring, echo, open_descriptors, serve};
use outboard::{DeviceRequestHandler, Ended, HandlerOptions, HostError, LoopKind, Server};
use outboard_frontend::{Connection, SharedMemory};

/// One test at a time: they count this process's descriptors.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Negotiates, starts a ring and has one request answered.
fn use_device(stream: UnixStream) -> (Connection, Ring, SharedMemory) {
    let mut front = Connection::from_fd(stream.into(), PATIENCE).unwrap();
    let memory = SharedMemory::with_size(1 << 20).unwrap();
    front.get_features().unwrap();
    front.get_protocol_features().unwrap();
    front.set_protocol_features(common::PROTOCOL).unwrap();
    front.set_features(FEATURES).unwrap();
    front.set_mem_table(memory.regions()).unwrap();
    let mut ring = Ring::new(&memory, 0, FEATURES);
    front.set_vring_num(0, common::SIZE).unwrap();
    front.set_vring_addr(0, &ring.layout).unwrap();
    front.set_vring_call(0, &ring.call).unwrap();
    front.set_vring_kick(0, &ring.kick).unwrap();
    front.set_vring_enable(0, true).unwrap();
    ring.round(b"served");
    (front, ring, memory)
}

fn handler() -> DeviceRequestHandler<outboard::WorkerDevice<common::EchoModel>> {
    let (device, _) = echo(LoopKind::Auto, 1);
    DeviceRequestHandler::new(device, HandlerOptions::default()).unwrap()
}

#[test]
fn run_is_driven_by_tokio_on_any_of_its_threads() {
    let _alone = alone();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut handler = handler();
    let session = runtime.spawn(async move { handler.run(theirs).await });
    drop(use_device(ours));
    assert!(matches!(runtime.block_on(session).unwrap(), Ok(Ended::Left)));
}

#[test]
fn run_is_driven_by_smol() {
    let _alone = alone();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut handler = handler();
    let session = smol::spawn(async move { handler.run(theirs).await });
    drop(use_device(ours));
    assert!(matches!(smol::block_on(session), Ok(Ended::Left)));
}

/// Unparks a thread.
struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

#[test]
fn run_is_driven_by_a_bare_block_on() {
    let _alone = alone();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut handler = handler();
    let thread = std::thread::spawn(move || {
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut session = std::pin::pin!(handler.run(theirs));
        loop {
            match session.as_mut().poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(ended) => return ended,
                Poll::Pending => std::thread::park(),
            }
        }
    });
    drop(use_device(ours));
    assert!(matches!(thread.join().unwrap(), Ok(Ended::Left)));
}

/// Polls `run` by hand and drops it at its `stop_at`th pending; whether it came that far.
fn drop_run_at(stop_at: usize, server: &mut impl FnMut() -> bool) -> bool {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut handler = handler();
    let polls = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&polls);
    let driver = std::thread::spawn(move || {
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut session = Box::pin(handler.run(theirs));
        let mut pending = 0;
        let reached = loop {
            match session.as_mut().poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(_) => break false,
                Poll::Pending => pending += 1,
            }
            seen.store(pending, Ordering::SeqCst);
            if pending == stop_at {
                break true;
            }
            std::thread::park();
        };
        drop(session);
        (reached, handler)
    });
    // Whatever of the conversation is cut off is an error of the front-end's calls.
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| whole_conversation(ours)));
    let (reached, handler) = driver.join().unwrap();
    drop(handler);
    server() && reached
}

/// Every message that makes the handler wait for a worker.
fn whole_conversation(stream: UnixStream) {
    let (mut front, mut ring, memory) = use_device(stream);
    front.set_timeout(Duration::from_secs(1));
    ring.patience = Duration::from_millis(500);
    front.set_mem_table(memory.regions()).unwrap();
    front.set_vring_call(0, &ring.call).unwrap();
    front.set_vring_kick(0, &ring.kick).unwrap();
    front.set_vring_enable(0, false).unwrap();
    front.set_vring_enable(0, true).unwrap();
    ring.round(b"again");
    front.get_vring_base(0).unwrap();
    front.reset_device().unwrap();
}

/// Real workers, whose answers may be there at once: which waits there are is not always the same. Each of
/// them, one by one: `awaits.rs`.
#[test]
fn run_dropped_where_it_waits_for_workers_leaves_no_thread_and_nothing_open() {
    let _alone = alone();
    std::panic::set_hook(Box::new(|_| {}));
    // The first round starts what stays for good (async-io's own thread).
    drop_run_at(1, &mut || true);
    let before = open_descriptors();
    let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
    let threads_before = threads();
    let mut at = 1;
    while drop_run_at(at, &mut || true) {
        at += 1;
    }
    let _ = std::panic::take_hook();
    // Fewer, when the first round's worker was still closing its own while they were counted.
    let until = Instant::now() + PATIENCE;
    while open_descriptors() > before {
        let now = open_descriptors();
        assert!(Instant::now() < until, "descriptors: {before} before, {now} after {at} drops");
        std::thread::yield_now();
    }
    while threads() > threads_before {
        assert!(Instant::now() < until, "threads: {threads_before} before, {} after", threads());
        std::thread::yield_now();
    }
}

#[test]
fn a94_a_hundred_front_ends_leave_no_descriptor_and_no_mapping() {
    let _alone = alone();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("echo.sock");
    let server = Server::listen(&path).unwrap();
    let stop = server.stop_handle();
    let (device, _) = echo(LoopKind::Auto, 2);
    let thread = std::thread::spawn(move || server.serve(device));
    // Shared mappings: the allocator's private ones come and go with threads.
    let count = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().filter(|line| line.contains("s ") && line.contains("memfd")).count()
    };
    let connect = || {
        let until = Instant::now() + PATIENCE;
        loop {
            // While the last session is being closed, a new front-end may be turned away.
            let stream = UnixStream::connect(&path).unwrap();
            let mut front =
                Connection::from_fd(stream.try_clone().unwrap().into(), PATIENCE).unwrap();
            if front.set_owner().is_ok() && front.get_features().is_ok() {
                drop(front);
                return stream;
            }
            assert!(Instant::now() < until);
        }
    };
    drop(use_device(connect()));
    drop(use_device(connect()));
    let settle = || {
        let idle = UnixStream::connect(&path).unwrap();
        drop(idle);
    };
    settle();
    let (descriptors, maps) = (open_descriptors(), count());
    for _ in 0..100 {
        drop(use_device(connect()));
    }
    settle();
    let until = Instant::now() + PATIENCE;
    while open_descriptors() > descriptors || count() > maps {
        assert!(
            Instant::now() < until,
            "descriptors {descriptors} -> {}, mappings {maps} -> {}",
            open_descriptors(),
            count()
        );
        std::thread::yield_now();
    }
    stop.stop();
    thread.join().unwrap().unwrap();
    assert!(!path.exists(), "the socket file is removed");
}

#[test]
fn a93_a_second_front_end_is_turned_away_at_once_and_the_first_is_untouched() {
    let _alone = alone();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("echo.sock");
    let server = Server::listen(&path).unwrap();
    let stop = server.stop_handle();
    let (device, _) = echo(LoopKind::Auto, 1);
    let thread = std::thread::spawn(move || server.serve(device));
    let (mut front, mut ring, _memory) = use_device(UnixStream::connect(&path).unwrap());
    for _ in 0..10 {
        let mut second = UnixStream::connect(&path).unwrap();
        second.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(second.read(&mut [0; 1]).unwrap_or(0), 0, "closed at once");
    }
    ring.round(b"untouched");
    front.get_features().unwrap();
    stop.stop();
    thread.join().unwrap().unwrap();
}

#[test]
fn a14_a_front_end_that_leaves_inside_a_message_is_told_apart() {
    let _alone = alone();
    for (sent, boundary) in [(0, true), (5, false), (12, false), (15, false)] {
        let (mut ours, thread) = serve(handler());
        let message = [2u32, 1, 8, 0, 0].map(u32::to_le_bytes).concat();
        ours.write_all(&message[..sent]).unwrap();
        drop(ours);
        let (ended, _) = thread.join().unwrap();
        match ended {
            Ok(Ended::Left) => assert!(boundary, "{sent} bytes"),
            Err(HostError::PartialMessage) => assert!(!boundary, "{sent} bytes"),
            other => panic!("{sent} bytes: {other:?}"),
        }
    }
}

/// R19: nobody waits for the rest of a message.
#[test]
fn a15_rings_run_on_while_half_a_message_is_stuck() {
    let _alone = alone();
    let (ours, thread) = serve(handler());
    let mut raw = ours.try_clone().unwrap();
    let (front, mut ring, _memory) = use_device(ours);
    raw.write_all(&2u32.to_le_bytes()).unwrap();
    for _ in 0..100 {
        ring.round(b"data plane");
    }
    drop((front, raw));
    assert!(matches!(thread.join().unwrap().0, Err(HostError::PartialMessage)));
}

/// R19: nobody waits for a reader.
#[test]
fn a86_a_front_end_that_reads_no_replies_stops_only_itself() {
    let _alone = alone();
    let (mut ours, thread) = serve(handler());
    ours.set_nonblocking(true).unwrap();
    let question = [1u32, 1, 0].map(u32::to_le_bytes).concat();
    let mut asked = 0u32;
    while asked < 20_000 {
        match ours.write(&question) {
            Ok(count) => assert_eq!(count, question.len()),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
        asked += 1;
    }
    assert!(asked < 20_000, "back-pressure: the back-end stops reading");
    drop(ours);
    let _ = thread.join().unwrap();
}

#[test]
fn a6_a_wrong_version_ends_the_connection_with_the_reason() {
    let _alone = alone();
    let (mut ours, thread) = serve(handler());
    ours.write_all(&[1u32, 2, 0].map(u32::to_le_bytes).concat()).unwrap();
    let (ended, _) = thread.join().unwrap();
    assert!(matches!(ended, Err(HostError::Violation(_))), "{ended:?}");
}

#[test]
fn the_configuration_space_is_read_whole_and_zero_behind_its_end() {
    let _alone = alone();
    let mut rig = Rig::ready(LoopKind::Auto);
    assert_eq!(rig.front.get_config(0, 8).unwrap(), b"OUTBOARD");
    assert_eq!(rig.front.get_config(3, 2).unwrap(), b"BO");
    assert_eq!(rig.front.get_config(6, 6).unwrap(), b"RD\0\0\0\0");
    assert!(rig.front.get_config(0, 256).is_ok());
    assert!(rig.front.get_config(1, 256).is_err());
    assert!(rig.front.set_config(0, b"x", false).is_err(), "read-only");
    assert!(rig.front.set_config(7, b"xx", false).is_err(), "past the end");
    assert_eq!(rig.front.get_config(0, 8).unwrap(), b"OUTBOARD");
}

#[test]
fn features_are_replaced_never_added_up_and_a_refusal_keeps_the_old_set() {
    let _alone = alone();
    let mut rig = Rig::bare(LoopKind::Auto, HandlerOptions::default());
    rig.negotiate(FEATURES | 0b11);
    assert!(rig.front.set_features(FEATURES | 0b100).is_err(), "the device refuses bit 2");
    rig.front.set_features(FEATURES).unwrap();
}

#[test]
fn masked_features_are_not_offered() {
    let _alone = alone();
    let options = HandlerOptions {
        without_features: 1 << 29,
        without_protocol_features: outboard::protocol::ProtocolFeatures::CONFIGURE_MEM_SLOTS,
        ..HandlerOptions::default()
    };
    let mut rig = Rig::bare(LoopKind::Auto, options);
    assert_eq!(rig.front.get_features().unwrap() & (1 << 29), 0);
    let protocol = rig.front.get_protocol_features().unwrap();
    assert!(!protocol.contains(outboard::protocol::ProtocolFeatures::CONFIGURE_MEM_SLOTS));
}
