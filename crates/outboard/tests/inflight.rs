//! The in-flight region of a session: made, taken up after a crash, refused (cases A75–A77, C7). A crash is a region and a
//! ring as a killed process leaves them; the program itself is killed in outboard-cli.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{FEATURES, PATIENCE, PROTOCOL, Rig, Ring, SIZE, rang, serve};
use outboard::protocol::ProtocolFeatures;
use outboard::protocol::payload::Inflight;
use outboard::{
    Deferred, DeviceRequestHandler, Error, HandlerOptions, LoopKind, QueueSpec, Request, Served,
    Worker, WorkerDevice,
};
use outboard_frontend::{Connection, Error as FrontError, SharedMemory};
use rustix::io::{pread, pwrite};

const MOMENT: Duration = Duration::from_millis(60);
const ALL: ProtocolFeatures = PROTOCOL.union(ProtocolFeatures::INFLIGHT_SHMFD);

fn negotiate(front: &mut Connection, memory: &SharedMemory) {
    front.get_features().unwrap();
    let offered = front.get_protocol_features().unwrap();
    assert!(offered.contains(ALL), "offered: {offered:?}");
    front.set_protocol_features(ALL).unwrap();
    front.set_features(FEATURES).unwrap();
    front.set_mem_table(memory.regions()).unwrap();
}

/// Negotiated, memory shared, no region yet.
fn ready(kind: LoopKind) -> Rig {
    let mut rig = Rig::bare(kind, HandlerOptions::default());
    negotiate(&mut rig.front, &rig.memory);
    rig
}

/// A region for three rings, known to the back-end.
fn region(front: &mut Connection) -> (Inflight, OwnedFd) {
    let (region, file) = front.get_inflight_fd(3, SIZE).unwrap().unwrap();
    front.set_inflight_fd(region, &file).unwrap();
    (region, file)
}

const AREA: u64 = 16 * SIZE as u64 + 64;

fn u16_at(file: &OwnedFd, at: u64) -> u16 {
    let mut bytes = [0; 2];
    pread(file, &mut bytes, at).unwrap();
    u16::from_le_bytes(bytes)
}

fn flags(file: &OwnedFd, ring: u64) -> Vec<u8> {
    let mut bytes = vec![0; 16 * usize::from(SIZE)];
    pread(file, &mut bytes, ring * AREA + 16).unwrap();
    bytes.chunks(16).map(|entry| entry[0]).collect()
}

/// Has the region of ring 0 say that these heads are in flight, the oldest one first.
fn in_flight(file: &OwnedFd, heads: &[u16]) {
    let mut head = [0; 16];
    head[8] = 1;
    head[10..12].copy_from_slice(&SIZE.to_le_bytes());
    pwrite(file, &head, 0).unwrap();
    for (counter, head) in (100_u64..).zip(heads) {
        let mut entry = [0; 16];
        entry[0] = 1;
        entry[8..].copy_from_slice(&counter.to_le_bytes());
        pwrite(file, &entry, 16 + 16 * u64::from(*head)).unwrap();
    }
}

fn refused<T>(outcome: Result<T, FrontError>) -> bool {
    matches!(outcome, Err(FrontError::Refused { .. }))
}

/// Offers requests of `texts`, each a byte to read and one to write, without a kick. Returns their heads.
fn offer(ring: &mut Ring, texts: &[u8]) -> Vec<u16> {
    let mut heads = Vec::new();
    for text in texts {
        let at = u64::from(*text) * 8;
        ring.data.write(usize::try_from(at).unwrap(), &[*text]).unwrap();
        let from = ring.data.guest() + at;
        let head = ring.driver.add(&[(from, 1)], &[(from + 4096, 1)], u64::from(*text)).unwrap();
        heads.push(head);
    }
    ring.driver.publish();
    heads
}

/// The next `count` answers, in the order of the used ring; each is right.
fn answers(ring: &mut Ring, count: usize) -> Vec<u8> {
    let until = std::time::Instant::now() + PATIENCE;
    let mut order = Vec::new();
    while order.len() < count {
        match ring.driver.pop_used().unwrap() {
            Some((token, 1)) => {
                let mut byte = [0];
                ring.data.read(4096 + 8 * usize::try_from(token).unwrap(), &mut byte).unwrap();
                assert_eq!(u64::from(byte[0]), token);
                order.push(byte[0]);
            }
            Some((token, written)) => assert_eq!((token, written), (token, 1)),
            None => assert!(std::time::Instant::now() < until, "only {order:?}"),
        }
        if !ring.driver.arm() {
            rang(&ring.call, Duration::from_millis(1));
        }
    }
    order
}

#[test]
fn a_region_is_made_of_zeros_and_its_length_cannot_be_changed() {
    let mut rig = ready(LoopKind::Auto);
    let (region, file) = rig.front.get_inflight_fd(3, SIZE).unwrap().unwrap();
    assert_eq!((region.mmap_size, region.mmap_offset), (3 * AREA, 0));
    assert_eq!((region.num_queues, region.queue_size), (3, SIZE));
    let mut bytes = vec![1; usize::try_from(3 * AREA).unwrap() + 1];
    assert_eq!(pread(&file, &mut bytes, 0).unwrap(), bytes.len() - 1);
    assert!(bytes[..bytes.len() - 1].iter().all(|byte| *byte == 0));
    assert!(
        rustix::fs::ftruncate(&file, 0).is_err() && rustix::fs::ftruncate(&file, 1 << 20).is_err()
    );
    let (_, another) = rig.front.get_inflight_fd(3, SIZE).unwrap().unwrap();
    pwrite(&file, &[7], 0).unwrap();
    assert_eq!(u16_at(&another, 0), 0, "each time another one");
}

#[test]
fn a_ring_that_runs_keeps_its_area_and_no_other() {
    for kind in [LoopKind::Uring, LoopKind::Epoll] {
        let mut rig = ready(kind);
        let (_, file) = region(&mut rig.front);
        let mut ring = rig.started(1);
        for round in 1..40 {
            ring.round(b"tracked");
            // The area is told after the used index.
            let until = std::time::Instant::now() + PATIENCE;
            while u16_at(&file, AREA + 14) != round {
                assert!(std::time::Instant::now() < until);
            }
        }
        assert_eq!((u16_at(&file, AREA + 8), u16_at(&file, AREA + 10)), (1, SIZE));
        assert!(flags(&file, 1).iter().all(|flag| *flag == 0));
        let mut others = vec![1; usize::try_from(AREA).unwrap()];
        for ring in [0, 2] {
            pread(&file, &mut others, ring * AREA).unwrap();
            assert!(others.iter().all(|byte| *byte == 0));
        }
        // Stopped and started: it goes on where it was, whatever base it is given.
        let base = rig.front.get_vring_base(1).unwrap();
        assert_eq!(base, 39);
        rig.front.set_vring_base(1, 7).unwrap();
        rig.front.set_vring_kick(1, &ring.kick).unwrap();
        ring.round(b"again");
        rig.front.set_mem_table(rig.memory.regions()).unwrap();
        ring.round(b"and in new memory");
        assert_eq!(rig.front.get_vring_base(1).unwrap(), 41);
    }
}

/// C7: what a killed process left is answered once, the oldest first, then what is new.
#[test]
fn c7_what_was_in_flight_is_served_first_in_its_order_and_each_once() {
    for kind in [LoopKind::Uring, LoopKind::Epoll] {
        let mut rig = ready(kind);
        let (_, file) = region(&mut rig.front);
        let mut ring = rig.ring(0);
        let heads = offer(&mut ring, &[1, 2, 3, 4, 5, 6]);
        // Three were taken, in this order; the others were not seen.
        in_flight(&file, &[heads[2], heads[0], heads[1]]);
        rig.set_up(&ring);
        // What the front-end believes is the used index.
        rig.front.set_vring_kick(0, &ring.kick).unwrap();
        rig.front.set_vring_enable(0, true).unwrap();
        assert_eq!(answers(&mut ring, 6), [3, 1, 2, 4, 5, 6]);
        assert_eq!(rig.front.get_vring_base(0).unwrap(), 6);
        assert!(flags(&file, 0).iter().all(|flag| *flag == 0));
        assert_eq!(u16_at(&file, 14), 6);
    }
}

#[test]
fn a_disabled_ring_keeps_what_it_owes_and_stops_without_it() {
    let mut rig = ready(LoopKind::Auto);
    let (region, file) = region(&mut rig.front);
    let mut ring = rig.ring(0);
    let heads = offer(&mut ring, &[1, 2, 3]);
    in_flight(&file, &[heads[1], heads[0]]);
    rig.set_up(&ring);
    rig.front.set_vring_kick(0, &ring.kick).unwrap();
    assert!(ring.silent_for(MOMENT));
    rig.front.get_vring_base(0).unwrap();
    assert_eq!(flags(&file, 0).iter().filter(|flag| **flag == 1).count(), 2, "still in flight");
    // Started again, by another back-end even: there it is.
    rig.front.set_inflight_fd(region, &file).unwrap();
    rig.front.set_vring_kick(0, &ring.kick).unwrap();
    rig.front.set_vring_enable(0, true).unwrap();
    assert_eq!(answers(&mut ring, 3), [2, 1, 3]);
}

/// With kicks and calls as messages; the front-end's end of the channel.
fn in_band() -> (Rig, UnixStream) {
    let mut rig = Rig::bare(LoopKind::Auto, HandlerOptions::default());
    let channel = ProtocolFeatures::BACKEND_REQ | ProtocolFeatures::REPLY_ACK;
    let features = ALL | channel | ProtocolFeatures::INBAND_NOTIFICATIONS;
    rig.front.get_features().unwrap();
    rig.front.get_protocol_features().unwrap();
    rig.front.set_protocol_features(features).unwrap();
    rig.front.set_features(FEATURES).unwrap();
    rig.front.set_mem_table(rig.memory.regions()).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    rig.front.set_backend_req_fd(&theirs).unwrap();
    (rig, ours)
}

/// Who waits for the answer of an in-band kick does not wait for what cannot be served now.
#[test]
fn an_in_band_kick_of_a_disabled_or_broken_ring_that_owes_is_answered() {
    let (mut rig, _channel) = in_band();
    let (_, file) = region(&mut rig.front);
    let mut ring = rig.ring(0);
    let heads = offer(&mut ring, &[1, 2]);
    in_flight(&file, &[heads[1], heads[0]]);
    rig.set_up(&ring);
    rig.front.vring_kick(0).unwrap();
    rig.front.set_vring_enable(0, true).unwrap();
    rig.front.vring_kick(0).unwrap();
    assert_eq!(answers(&mut ring, 2), [2, 1]);
    rig.front.get_vring_base(0).unwrap();
    // A head that was in flight, says the region, and leads out of memory.
    ring.data.write(0, b"?").unwrap();
    let nowhere = ring.driver.add(&[(1 << 40, 1)], &[], 3).unwrap();
    in_flight(&file, &[nowhere]);
    let used = u16_at(&file, 14).wrapping_add(2);
    pwrite(&file, &used.to_le_bytes(), 14).unwrap();
    rig.front.vring_kick(0).unwrap();
    assert!(rang(&ring.err, PATIENCE), "broken");
    rig.front.vring_kick(0).unwrap();
}

/// A killed process may have shown answers and not have called: whoever follows it calls, by whatever way.
#[test]
fn the_call_at_the_start_of_a_ring_with_a_region_goes_by_message_too() {
    let (mut rig, mut channel) = in_band();
    region(&mut rig.front);
    let ring = rig.ring(0);
    rig.front.set_vring_num(0, SIZE).unwrap();
    rig.front.set_vring_addr(0, &ring.layout).unwrap();
    rig.front.vring_kick(0).unwrap();
    let mut message = [0; 20];
    channel.read_exact(&mut message).unwrap();
    assert_eq!(message[..4], 4_u32.to_le_bytes(), "VRING_CALL");
    // Suspended, and back: the channel is open again when the call goes out.
    rig.front.get_vring_base(0).unwrap();
    rig.front.vring_kick(0).unwrap();
    channel.read_exact(&mut message).unwrap();
    assert_eq!(message[..4], 4_u32.to_le_bytes(), "VRING_CALL");
}

/// Hands every request to the test.
struct Hand(std::sync::mpsc::Sender<Deferred>);

impl Worker for Hand {
    fn serve(&mut self, request: Request<'_>) -> Result<Served, Error> {
        let _ = self.0.send(request.defer());
        Ok(Served::later())
    }
}

struct Handed {
    front: Connection,
    memory: SharedMemory,
    requests: Receiver<Deferred>,
}

fn handed() -> Handed {
    let (sender, requests) = channel();
    let sender = Mutex::new(sender);
    let device = WorkerDevice::plain(&[QueueSpec::new("a", 64)], move |_| {
        Ok(Hand(sender.lock().unwrap().clone()))
    });
    let handler = DeviceRequestHandler::new(device.unwrap(), HandlerOptions::default());
    let (ours, _thread) = serve(handler.unwrap());
    let mut front = Connection::from_fd(ours.into(), PATIENCE).unwrap();
    let memory = SharedMemory::with_size(1 << 20).unwrap();
    negotiate(&mut front, &memory);
    Handed { front, memory, requests }
}

fn echo(mut request: Deferred) -> u8 {
    let mut byte = [0];
    request.readable().read_exact(&mut byte).unwrap();
    request.writable().write_all(&byte).unwrap();
    request.done(1);
    byte[0]
}

/// Appends each request to a journal, where twice is wrong: what may have been appended before is answered with 0 bytes.
struct Journal {
    lines: Arc<Mutex<Vec<u8>>>,
    /// Whether it asks.
    careful: bool,
}

impl Worker for Journal {
    fn serve(&mut self, mut request: Request<'_>) -> Result<Served, Error> {
        if self.careful && request.is_repeated() {
            return Ok(request.done(0));
        }
        let line = request.readable().read_obj::<u8>()?;
        self.lines.lock().unwrap().push(line);
        request.writable().write_all(&[line])?;
        Ok(request.done(1))
    }
}

/// C10: the library repeats what was in flight, at least once; a device for which that is wrong can tell, and answers an
/// error: at most once.
#[test]
fn c10_a_device_that_asks_does_nothing_twice_and_one_that_does_not_repeats_it() {
    for (careful, expected, lengths) in
        [(true, vec![3, 4], [0, 0, 1, 1]), (false, vec![2, 1, 3, 4], [1; 4])]
    {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let theirs = Arc::clone(&lines);
        let device = WorkerDevice::plain(&[QueueSpec::new("journal", 64)], move |_| {
            Ok(Journal { lines: Arc::clone(&theirs), careful })
        });
        let handler = DeviceRequestHandler::new(device.unwrap(), HandlerOptions::default());
        let (ours, _thread) = serve(handler.unwrap());
        let mut front = Connection::from_fd(ours.into(), PATIENCE).unwrap();
        let memory = SharedMemory::with_size(1 << 20).unwrap();
        negotiate(&mut front, &memory);
        let (region, file) = front.get_inflight_fd(1, SIZE).unwrap().unwrap();
        front.set_inflight_fd(region, &file).unwrap();
        let mut ring = Ring::new(&memory, 0, FEATURES);
        let heads = offer(&mut ring, &[1, 2, 3, 4]);
        in_flight(&file, &[heads[1], heads[0]]);
        begin(&mut front, &ring);
        let mut got = Vec::new();
        let until = std::time::Instant::now() + PATIENCE;
        while got.len() < 4 {
            assert!(std::time::Instant::now() < until, "only {got:?}");
            match ring.driver.pop_used().unwrap() {
                Some((_, length)) => got.push(length),
                None if !ring.driver.arm() => drop(rang(&ring.call, Duration::from_millis(1))),
                None => {}
            }
        }
        assert_eq!((got, lines.lock().unwrap().clone()), (lengths.to_vec(), expected));
    }
}

/// Starts the ring.
fn begin(front: &mut Connection, ring: &Ring) {
    front.set_vring_num(0, SIZE).unwrap();
    front.set_vring_addr(0, &ring.layout).unwrap();
    front.set_vring_call(0, &ring.call).unwrap();
    front.set_vring_kick(0, &ring.kick).unwrap();
    front.set_vring_enable(0, true).unwrap();
}

/// No new request is taken before the old ones are finished, so that none of them is executed after a newer one.
#[test]
fn nothing_new_is_taken_before_everything_owed_is_finished() {
    let Handed { mut front, memory, requests } = handed();
    let (region, file) = front.get_inflight_fd(1, SIZE).unwrap().unwrap();
    front.set_inflight_fd(region, &file).unwrap();
    let mut ring = Ring::new(&memory, 0, FEATURES);
    let heads = offer(&mut ring, &[1, 2, 3, 4]);
    in_flight(&file, &[heads[1], heads[0]]);
    begin(&mut front, &ring);
    let first = requests.recv_timeout(PATIENCE).unwrap();
    let second = requests.recv_timeout(PATIENCE).unwrap();
    ring.kick();
    assert!(requests.recv_timeout(MOMENT).is_err(), "two are owed");
    assert_eq!(echo(second), 1);
    ring.kick();
    assert!(requests.recv_timeout(MOMENT).is_err(), "one is owed");
    assert_eq!(echo(first), 2);
    // Nobody kicks now.
    for text in [3, 4] {
        assert_eq!(echo(requests.recv_timeout(PATIENCE).unwrap()), text);
    }
    assert_eq!(answers(&mut ring, 4), [1, 2, 3, 4]);
}

#[test]
fn a_stop_in_mid_recovery_waits_for_what_is_owed_and_takes_nothing_new() {
    let Handed { mut front, memory, requests } = handed();
    let (region, file) = front.get_inflight_fd(1, SIZE).unwrap().unwrap();
    front.set_inflight_fd(region, &file).unwrap();
    let mut ring = Ring::new(&memory, 0, FEATURES);
    let heads = offer(&mut ring, &[1, 2, 3]);
    in_flight(&file, &[heads[0], heads[1]]);
    begin(&mut front, &ring);
    let both = [(); 2].map(|()| requests.recv_timeout(PATIENCE).unwrap());
    let stopping = std::thread::spawn(move || front.get_vring_base(0));
    assert!(requests.recv_timeout(MOMENT).is_err());
    assert_eq!(both.map(echo), [1, 2]);
    let base = stopping.join().unwrap().unwrap();
    assert_eq!(answers(&mut ring, 2), [1, 2]);
    assert_eq!((base, flags(&file, 0)), (2, vec![0; usize::from(SIZE)]));
}

/// A75.
#[test]
fn a75_a_region_for_impossible_rings_is_not_made() {
    let mut rig = ready(LoopKind::Auto);
    for (queues, size) in [(0, SIZE), (3, 0), (4, SIZE), (65535, 65535), (3, 65535), (3, 2048)] {
        assert!(matches!(rig.front.get_inflight_fd(queues, size), Ok(None)), "{queues} {size}");
    }
    let before = common::open_descriptors();
    for _ in 0..200 {
        rig.front.get_inflight_fd(3, 1024).unwrap().unwrap();
    }
    let after = common::open_descriptors();
    assert!(after < before + 100, "{before} descriptors, then {after}");
}

/// A76: the description against the file, the rings and the limits.
#[test]
fn a76_a_region_that_cannot_be_is_refused_and_the_old_one_stays() {
    let mut rig = ready(LoopKind::Auto);
    let (good, file) = region(&mut rig.front);
    let mut ring = rig.ring(0);
    rig.set_up(&ring);
    let short = tempfile::tempfile_in("/dev/shm").unwrap();
    short.set_len(2 * AREA).unwrap();
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let read_only = std::fs::File::open(std::env::current_exe().unwrap()).unwrap();
    let bad = |change: &dyn Fn(&mut Inflight)| {
        let mut region = good;
        change(&mut region);
        region
    };
    for (region, fd) in [
        (good, short.as_fd()),
        (good, pipe.as_fd()),
        (good, read_only.as_fd()),
        (bad(&|r| r.mmap_size = 3 * AREA - 1), file.as_fd()),
        (bad(&|r| r.mmap_size = 0), file.as_fd()),
        (bad(&|r| r.mmap_size = 3 * AREA + 1), file.as_fd()),
        (bad(&|r| r.mmap_size = u64::MAX), file.as_fd()),
        (bad(&|r| r.mmap_offset = 8), file.as_fd()),
        (bad(&|r| r.mmap_offset = 4), file.as_fd()),
        (bad(&|r| r.mmap_offset = u64::MAX - 7), file.as_fd()),
        (bad(&|r| r.mmap_offset = 1 << 62), file.as_fd()),
        (bad(&|r| r.num_queues = 4), file.as_fd()),
        (bad(&|r| r.num_queues = 0), file.as_fd()),
        (bad(&|r| r.queue_size = 65535), file.as_fd()),
        // Ring 0 has twice as many.
        (bad(&|r| r.queue_size = SIZE / 2), file.as_fd()),
    ] {
        assert!(refused(rig.front.set_inflight_fd(region, fd)), "{region:?}");
    }
    assert!(refused(rig.front.set_vring_num(0, 2 * SIZE)), "larger than its area");
    rig.front.set_vring_kick(0, &ring.kick).unwrap();
    rig.front.set_vring_enable(0, true).unwrap();
    ring.round(b"the first one");
    assert_eq!(u16_at(&file, 8), 1);
    assert!(refused(rig.front.set_inflight_fd(good, &file)), "a ring runs");
}

/// A77: the ring does not start, and is told so; with another region it does.
#[test]
fn a77_a_region_full_of_nonsense_keeps_its_ring_from_starting_and_no_other() {
    let mut rig = ready(LoopKind::Auto);
    let (region, file) = region(&mut rig.front);
    pwrite(&file, &[0xa5; 4096][..usize::try_from(AREA).unwrap()], 0).unwrap();
    let mut ring = rig.ring(0);
    rig.set_up(&ring);
    assert!(refused(rig.front.set_vring_kick(0, &ring.kick)));
    let mut other = rig.started(1);
    other.round(b"alive");
    rig.front.get_vring_base(1).unwrap();
    pwrite(&file, &[0; 4096][..usize::try_from(AREA).unwrap()], 0).unwrap();
    rig.front.set_inflight_fd(region, &file).unwrap();
    rig.front.set_vring_kick(0, &ring.kick).unwrap();
    rig.front.set_vring_enable(0, true).unwrap();
    ring.round(b"with a fresh one");
}

/// A76: the front-end cuts its own file short.
#[test]
fn a76_a_region_cut_short_under_the_ring_leaves_the_ring_alone() {
    let mut rig = ready(LoopKind::Auto);
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(3 * AREA).unwrap();
    let region =
        Inflight { mmap_size: 3 * AREA, num_queues: 3, queue_size: SIZE, ..Inflight::default() };
    rig.front.set_inflight_fd(region, &file).unwrap();
    let mut ring = rig.started(0);
    ring.round(b"whole");
    file.set_len(0).unwrap();
    for _ in 0..10 {
        ring.round(b"cut");
    }
    assert!(!rang(&ring.err, Duration::ZERO));
    rig.leave().0.unwrap();
}
