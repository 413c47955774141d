//! Live upgrade: a device changes its process while its guest works (`Server::take_over`).
//!
//! Both "processes" are servers on threads of this one; the descriptors travel over the same
//! control socket all the same. The program itself is tried in outboard-cli.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::{Echo, EchoModel, FEATURES, PATIENCE, Ring, Seen};
use outboard::memory::DirtyLog;
use outboard::protocol::{ProtocolFeatures, virtio};
use outboard::{
    Error, HandlerOptions, MakeWorker, Model, QueueSpec, Saved, Server, Snapshot, StopHandle,
    WorkerDevice,
};
use outboard_frontend::{Connection, SharedMemory};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, recv, send, socket_with,
};

/// A server on a thread.
struct Program {
    seen: Arc<Seen>,
    stop: StopHandle,
    thread: JoinHandle<Result<(), Error>>,
}

impl Program {
    fn run(server: Server, config: [u8; 8]) -> Self {
        let seen = Arc::new(Seen::default());
        let model = EchoModel { seen: Arc::clone(&seen), threads: 1, config };
        let stop = server.stop_handle();
        let thread = std::thread::spawn(move || server.serve(WorkerDevice::new(model).unwrap()));
        Self { seen, stop, thread }
    }

    fn stop(self) {
        self.stop.stop();
        self.thread.join().unwrap().unwrap();
    }
}

struct Place {
    _dir: tempfile::TempDir,
    socket: PathBuf,
    control: PathBuf,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (socket, control) = (dir.path().join("s"), dir.path().join("c"));
        Self { _dir: dir, socket, control }
    }

    fn first(&self) -> Program {
        let server = Server::listen(&self.socket).unwrap().with_control(&self.control).unwrap();
        Program::run(server, *b"OUTBOARD")
    }

    fn next(&self, options: HandlerOptions) -> Program {
        let server = Server::take_over(&self.control).unwrap().with_options(options);
        Program::run(server, *b"OUTBOARD")
    }
}

/// A front-end with a ring that runs.
fn guest(socket: &Path, protocol: ProtocolFeatures) -> (Connection, SharedMemory, Ring) {
    guest_with(socket, protocol, FEATURES, |_| ())
}

/// As [`guest`], with other features, and something told before the ring.
fn guest_with(
    socket: &Path,
    protocol: ProtocolFeatures,
    features: u64,
    tell: impl FnOnce(&mut Connection),
) -> (Connection, SharedMemory, Ring) {
    let mut front = Connection::connect(socket, PATIENCE).unwrap();
    let memory = SharedMemory::with_size(1 << 20).unwrap();
    front.set_owner().unwrap();
    front.get_features().unwrap();
    front.get_protocol_features().unwrap();
    front.set_protocol_features(protocol).unwrap();
    front.set_features(features).unwrap();
    front.set_mem_table(memory.regions()).unwrap();
    tell(&mut front);
    let ring = Ring::new(&memory, 0, features);
    front.set_vring_num(0, common::SIZE).unwrap();
    front.set_vring_addr(0, &ring.layout).unwrap();
    front.set_vring_base(0, ring.driver.base()).unwrap();
    front.set_vring_call(0, &ring.call).unwrap();
    front.set_vring_err(0, &ring.err).unwrap();
    front.set_vring_kick(0, &ring.kick).unwrap();
    front.set_vring_enable(0, true).unwrap();
    (front, memory, ring)
}

const ALL: ProtocolFeatures = common::PROTOCOL
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::STATUS)
    .union(ProtocolFeatures::BACKEND_REQ);

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let late = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < late, "{what}");
        std::thread::yield_now();
    }
}

/// A program of many devices has no control socket for each: it lets the next one in itself.
#[test]
fn a_device_goes_through_a_gate_from_process_to_process() {
    let place = Place::new();
    let (server, gate) = Server::listen(&place.socket).unwrap().with_gate().unwrap();
    let mut program = Program::run(server, *b"OUTBOARD");
    let (mut front, _memory, mut ring) = guest(&place.socket, ALL);
    ring.round(b"with the first");
    let mut gate = gate;
    for _ in 0..2 {
        let opened = Server::take_over_from(gate.open().unwrap()).unwrap();
        let (next, next_gate) = opened.with_gate().unwrap();
        let old = std::mem::replace(&mut program, Program::run(next, *b"OUTBOARD"));
        old.thread.join().unwrap().unwrap();
        ring.round(b"with the next");
        assert!(gate.open().is_err(), "nobody is behind the old one");
        gate = next_gate;
    }
    front.get_features().unwrap();
    program.stop();
    assert!(!place.socket.exists(), "the last one removes the socket");
}

/// The new process goes on with the in-flight region, and a ring can be abandoned there.
#[test]
fn the_in_flight_region_goes_along() {
    // Where the used index is, how far a request of two descriptors moves it, and where the entries are.
    region_goes_along(FEATURES, (14, 1), (16, 16));
    region_goes_along(FEATURES | virtio::RING_PACKED, (16, 2), (32, 32));
}

fn region_goes_along(features: u64, (index, step): (u64, u16), (entries, each): (u64, usize)) {
    let protocol = ALL
        | ProtocolFeatures::INFLIGHT_SHMFD
        | ProtocolFeatures::GET_VRING_BASE_INFLIGHT
        | ProtocolFeatures::SKIP_DRAIN;
    let place = Place::new();
    let mut old = place.first();
    let mut region = None;
    let (mut front, _memory, mut ring) = guest_with(&place.socket, protocol, features, |front| {
        let (description, file) = front.get_inflight_fd(1, common::SIZE).unwrap().unwrap();
        front.set_inflight_fd(description, &file).unwrap();
        region = Some(file);
    });
    let region = region.unwrap();
    let used = || {
        let mut bytes = [0; 2];
        rustix::io::pread(&region, &mut bytes, index).unwrap();
        u16::from_le_bytes(bytes)
    };
    for round in 1..6_u16 {
        ring.round(b"noted");
        // The area is told after the used index.
        until("the region knows", || used() == step * round);
        let new = place.next(HandlerOptions::default());
        old.thread.join().unwrap().unwrap();
        old = new;
    }
    ring.round(b"noted");
    assert_eq!(front.get_vring_base_skip_drain(0).unwrap() & 0x7fff, u32::from(6 * step));
    assert_eq!(used(), 6 * step);
    let mut bytes = vec![1; each * usize::from(common::SIZE)];
    rustix::io::pread(&region, &mut bytes, entries).unwrap();
    assert!(bytes.chunks(each).all(|entry| entry[0] == 0), "nothing is in flight");
    drop(front);
    old.stop();
}

#[test]
fn a_guest_goes_on_in_a_new_process_and_in_the_one_after_it() {
    let place = Place::new();
    let mut old = place.first();
    let (mut front, memory, mut ring) = guest(&place.socket, ALL);
    front.set_status(0xf).unwrap();
    ring.round(b"before");
    for turn in 0..5u8 {
        let new = place.next(HandlerOptions::default());
        old.thread.join().unwrap().unwrap();
        ring.round(&[b'a' + turn; 100]);
        assert_eq!(new.seen.resumed.load(Ordering::SeqCst), 1);
        assert_eq!(front.get_status().unwrap(), 0xf);
        old = new;
    }
    // Everything that was set up is there: the ring stops, starts elsewhere, memory changes.
    assert_eq!(front.get_vring_base(0).unwrap(), 6);
    let mut other = Ring::new(&memory, 1, FEATURES);
    front.set_vring_num(1, common::SIZE).unwrap();
    front.set_vring_addr(1, &other.layout).unwrap();
    front.set_vring_base(1, 0).unwrap();
    front.set_vring_call(1, &other.call).unwrap();
    front.set_vring_kick(1, &other.kick).unwrap();
    front.set_vring_enable(1, true).unwrap();
    other.round(b"another ring");
    drop(front);
    // The socket came along: the next front-end connects to the same path.
    let (_front, _memory, mut ring) = guest(&place.socket, ALL);
    ring.round(b"the next guest");
    assert!(place.socket.exists() && place.control.exists());
    old.stop();
    assert!(!place.socket.exists() && !place.control.exists());
}

/// The dirty log, its bell and the log flag of the ring come along.
#[test]
fn writes_are_noted_in_the_new_process_as_in_the_old_one() {
    writes_are_noted(FEATURES);
    writes_are_noted(FEATURES | virtio::RING_PACKED);
}

fn writes_are_noted(features: u64) {
    let place = Place::new();
    let mut old = place.first();
    let protocol = ALL | ProtocolFeatures::LOG_SHMFD;
    let (mut front, _memory, mut ring) = guest_with(&place.socket, protocol, features, |_| ());
    let (log, file) = DirtyLog::memfd(1 << 32).unwrap();
    let bell = common::doorbell();
    front.set_log_base(&file, log.size(), 0).unwrap();
    front.set_log_fd(&bell).unwrap();
    front.set_features(features | virtio::LOG_ALL).unwrap();
    front.set_vring_addr_logged(0, &ring.layout, Some(ring.layout.used)).unwrap();
    let both = [ring.layout.used / 4096 * 4096, ring.data.guest() + 4096];
    for _ in 0..3 {
        ring.round(b"here");
        let mut pages = Vec::new();
        log.take(|page| pages.push(page));
        assert_eq!(pages, both);
        assert!(common::rang(&bell, PATIENCE));
        let new = place.next(HandlerOptions::default());
        old.thread.join().unwrap().unwrap();
        log.take(|_| ());
        old = new;
    }
    drop(front);
    old.stop();
}

#[test]
fn a_front_end_that_negotiated_little_is_handed_over_as_it_is() {
    for protocol in [ProtocolFeatures::empty(), ProtocolFeatures::CONFIGURE_MEM_SLOTS] {
        let place = Place::new();
        let old = place.first();
        let (mut front, _memory, mut ring) = guest(&place.socket, protocol);
        ring.round(b"before");
        let new = place.next(HandlerOptions::default());
        old.thread.join().unwrap().unwrap();
        ring.round(b"after");
        assert_eq!(front.get_vring_base(0).unwrap(), 2);
        drop(front);
        new.stop();
    }
}

#[test]
fn requests_offered_during_the_hand_over_are_answered_once() {
    let place = Place::new();
    let old = place.first();
    let (front, _memory, mut ring) = guest(&place.socket, ALL);
    let new = place.next(HandlerOptions::default());
    for round in 0..2000u32 {
        ring.round(format!("round {round}").as_bytes());
    }
    old.thread.join().unwrap().unwrap();
    assert!(ring.driver.pop_used().unwrap().is_none(), "answered twice");
    drop(front);
    new.stop();
}

#[test]
fn a_disabled_ring_stays_disabled_and_its_requests_wait() {
    let place = Place::new();
    let old = place.first();
    let (mut front, _memory, mut ring) = guest(&place.socket, ALL);
    front.set_vring_enable(0, false).unwrap();
    ring.offer(b"later");
    ring.kick();
    let new = place.next(HandlerOptions::default());
    old.thread.join().unwrap().unwrap();
    assert!(ring.silent_for(Duration::from_millis(50)));
    front.set_vring_enable(0, true).unwrap();
    ring.expect(b"later");
    drop(front);
    new.stop();
}

#[test]
fn a_new_process_that_lacks_a_feature_is_refused_and_the_old_one_goes_on() {
    let place = Place::new();
    let old = place.first();
    let (front, _memory, mut ring) = guest(&place.socket, ALL);
    ring.round(b"before");
    for (options, reason) in [
        (
            HandlerOptions {
                without_features: virtio::RING_EVENT_IDX,
                ..HandlerOptions::default()
            },
            "does not offer features 0x20000000",
        ),
        (
            HandlerOptions {
                without_protocol_features: ProtocolFeatures::STATUS,
                ..HandlerOptions::default()
            },
            "does not offer protocol features 0x10000",
        ),
    ] {
        let error = place.next(options).thread.join().unwrap().unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
        ring.round(b"after a refusal");
    }
    assert_eq!(old.seen.resumed.load(Ordering::SeqCst), 3, "started again after each");
    drop(front);
    old.stop();
}

#[test]
fn an_idle_device_hands_its_sockets_over() {
    let place = Place::new();
    let old = place.first();
    let new = place.next(HandlerOptions::default());
    old.thread.join().unwrap().unwrap();
    let (front, _memory, mut ring) = guest(&place.socket, ALL);
    ring.round(b"served");
    drop(front);
    new.stop();
}

/// A device that keeps a word, in one of two versions of its state.
struct Keeper {
    version: u32,
    word: Arc<Mutex<Vec<u8>>>,
}

impl Model for Keeper {
    type Worker = Echo;

    fn queues(&self) -> Vec<QueueSpec> {
        vec![QueueSpec::new("words", 256)]
    }

    fn make_worker(&self) -> MakeWorker<Echo> {
        Arc::new(|_| Ok(Echo))
    }

    fn device_type(&self) -> String {
        "keeper".to_owned()
    }

    fn snapshot(&mut self) -> Result<Snapshot, Error> {
        Ok(Snapshot::new(self.version, self.word.lock().unwrap().clone()))
    }

    fn restore(&mut self, saved: Saved<'_>) -> Result<(), Error> {
        if saved.version() > self.version {
            let (theirs, ours) = (saved.version(), self.version);
            return Err(Error::refused(format!("state of version {theirs}, ours is {ours}")));
        }
        saved.bytes().clone_into(&mut self.word.lock().unwrap());
        Ok(())
    }
}

type Word = Arc<Mutex<Vec<u8>>>;

fn keeper(server: Server, version: u32, word: &[u8]) -> (JoinHandle<Result<(), Error>>, Word) {
    let word = Arc::new(Mutex::new(word.to_vec()));
    let model = Keeper { version, word: Arc::clone(&word) };
    let thread = std::thread::spawn(move || server.serve(WorkerDevice::new(model).unwrap()));
    (thread, word)
}

#[test]
fn the_devices_own_state_goes_along_to_a_newer_version_and_is_refused_by_an_older_one() {
    let place = Place::new();
    let server = Server::listen(&place.socket).unwrap().with_control(&place.control).unwrap();
    let (old, _) = keeper(server, 1, b"remember me");
    let (front, _memory, mut ring) = guest(&place.socket, ALL - ProtocolFeatures::CONFIG);
    ring.round(b"before");
    let (new, word) = keeper(Server::take_over(&place.control).unwrap(), 2, b"nothing");
    old.join().unwrap().unwrap();
    ring.round(b"after");
    assert_eq!(*word.lock().unwrap(), b"remember me");
    // Back to version 1: the new one goes on, with what it knows.
    let (older, _) = keeper(Server::take_over(&place.control).unwrap(), 1, b"nothing");
    let error = older.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("refused CHECK_DEVICE_STATE"), "{error}");
    ring.round(b"after a refusal");
    // Another kind of device is refused for what it is.
    let other = place.next(HandlerOptions::default()).thread.join().unwrap();
    assert!(other.is_err());
    ring.round(b"still here");
    drop(front);
    drop(new);
}

/// Somebody on the control socket who is no Outboard.
fn stranger(control: &Path) -> std::os::fd::OwnedFd {
    let socket =
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .unwrap();
    connect(&socket, &SocketAddrUnix::new(control).unwrap()).unwrap();
    socket
}

#[test]
fn strangers_on_the_control_socket_change_nothing() {
    let place = Place::new();
    let old = place.first();
    let (front, _memory, mut ring) = guest(&place.socket, ALL);
    for text in [&b"hello"[..], b"outboard 9 take-over\n", &[0xff; 4096], b"outboard 1 go\n"] {
        let socket = stranger(&place.control);
        send(&socket, text, rustix::net::SendFlags::NOSIGNAL).unwrap();
        ring.round(b"undisturbed");
        let mut buffer = [0; 4096];
        // A reason, or just the end.
        let _ = recv(&socket, &mut buffer, rustix::net::RecvFlags::empty()).unwrap();
    }
    // One that asks and leaves, one that asks and never plays along, one that never speaks.
    let leaves = stranger(&place.control);
    send(&leaves, b"outboard 1 take-over\n", rustix::net::SendFlags::NOSIGNAL).unwrap();
    drop(leaves);
    until("the ring goes on", || old.seen.resumed.load(Ordering::SeqCst) == 2);
    ring.round(b"after one that left");
    let silent = stranger(&place.control);
    ring.round(b"beside one that is silent");
    drop(silent);
    drop(front);
    old.stop();
}

#[test]
fn a_control_socket_that_nobody_has_is_an_error_with_the_path() {
    let place = Place::new();
    let error = Server::take_over(&place.control).unwrap_err().to_string();
    assert!(error.contains(place.control.to_str().unwrap()), "{error}");
}
