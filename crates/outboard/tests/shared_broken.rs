//! Threads that serve several devices, where the guest of one breaks its ring or its front-end is killed: the other one
//! answers each request once, before, meanwhile and behind (contract §1b; cases A14, A35, A39, B2 to B5, B10, B39, B40,
//! B82, C13).

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use common::guest::{BOTH, Guest, Load, device, negotiated, number, started, thread};
use common::{Echo, FEATURES, PATIENCE, Ring, rang};
use outboard::memory::RegionSpec;
use outboard::protocol::virtio;
use outboard::{DeviceRequestHandler, HandlerOptions, SharedThread};
use outboard_memory::View;
use outboard_protocol::{Request, VringAddr};

const SIZE: u16 = 16;
const LAYOUTS: [u64; 2] = [FEATURES, FEATURES | virtio::RING_PACKED];

const NEXT: u16 = 1;
/// Of packed descriptors: made available in the first lap, used in it.
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// The guest that breaks its ring, served before.
struct Bad {
    guest: Guest<Echo>,
    ring: Ring,
    view: View,
    packed: bool,
}

/// What becomes of its ring.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    /// It is broken, and its error descriptor says so.
    Reported,
    /// Nothing looks at it.
    Parked,
    /// Its session is over.
    Over,
}

type Break = (&'static str, fn(&mut Bad), Fate);

const OF_SPLIT: [Break; 6] = [
    ("B4: a head outside the table", |bad| bad.offer(999), Fate::Reported),
    ("B1: its own successor", |bad| bad.chain(&[(0, 16, NEXT, 0)]), Fate::Reported),
    ("B2: a circle", Bad::circle, Fate::Reported),
    ("B3: a successor outside the table", |bad| bad.chain(&[(0, 16, NEXT, 99)]), Fate::Reported),
    ("B10: outside of memory", |bad| bad.chain(&[(1 << 50, 16, 0, 0)]), Fate::Reported),
    ("B5: too far ahead", Bad::run_ahead, Fate::Reported),
];

const OF_PACKED: [Break; 4] = [
    ("B40: an id that is none", |bad| bad.chain(&[(0, 16, 0, 77)]), Fate::Reported),
    ("B2: round and round", Bad::circle, Fate::Reported),
    ("B39: ahead of what is available", |bad| bad.chain(&[(0, 16, NEXT, 0)]), Fate::Reported),
    ("B10: outside of memory", |bad| bad.chain(&[(1 << 50, 16, 0, 0)]), Fate::Reported),
];

const OF_BOTH: [Break; 4] = [
    ("A39: the ring's memory goes", Bad::take_memory_away, Fate::Parked),
    ("A35: the ring's memory is cut off", Bad::cut_memory_off, Fate::Reported),
    ("A14: it leaves inside a message", Bad::leave_inside_a_message, Fate::Over),
    ("A8: a message that is none", Bad::send_nonsense, Fate::Over),
];

impl Bad {
    fn on(thread: &SharedThread, features: u64) -> Self {
        let device = device("bad", thread, 2, |_| Ok(Echo)).unwrap();
        let mut guest = Guest::with(device, features);
        let mut ring = guest.ring(0, SIZE);
        ring.round(b"whole");
        let view = guest.memory.view();
        Self { guest, ring, view, packed: features & virtio::RING_PACKED != 0 }
    }

    /// Where the next chain begins: the head in the available ring, or the first descriptor.
    fn position(&self) -> u16 {
        self.ring.driver.next_avail() % SIZE
    }

    /// Writes descriptors (address, 0: its data; length, flags, successor or id) and makes them available.
    fn chain(&mut self, descriptors: &[(u64, u32, u16, u16)]) {
        let first = if self.packed { self.position() } else { 0 };
        for (behind, (addr, length, flags, last)) in
            (0..SIZE).zip(descriptors).collect::<Vec<_>>().into_iter().rev()
        {
            let at = self.ring.layout.desc + 16 * u64::from((first + behind) % SIZE);
            let addr = if *addr == 0 { self.ring.data.guest() } else { *addr };
            let lap = if first + behind < SIZE { AVAIL } else { USED };
            let halves = if self.packed { [*last, flags | lap] } else { [*flags, *last] };
            self.view.write(at, &addr.to_le_bytes()).unwrap();
            self.view.write(at + 8, &length.to_le_bytes()).unwrap();
            let [third, fourth] = halves.map(u16::to_le_bytes);
            self.view.write(at + 12, &third).unwrap();
            // The first one's flags at the very end.
            fence(Ordering::SeqCst);
            self.view.write(at + 14, &fourth).unwrap();
        }
        if !self.packed {
            self.offer(0);
        }
        self.ring.kick();
    }

    /// Makes a head of a split ring available.
    fn offer(&mut self, head: u16) {
        let slot = self.ring.layout.avail + 4 + 2 * u64::from(self.position());
        self.view.write(slot, &head.to_le_bytes()).unwrap();
        self.avail(1);
    }

    fn avail(&mut self, further: u16) {
        fence(Ordering::SeqCst);
        let index = self.ring.driver.next_avail().wrapping_add(further);
        self.view.write(self.ring.layout.avail + 2, &index.to_le_bytes()).unwrap();
        self.ring.kick();
    }

    fn run_ahead(&mut self) {
        self.avail(SIZE + 1);
    }

    /// Each descriptor leads to the next one, the last one to the first.
    fn circle(&mut self) {
        let next = |at| if self.packed { 0 } else { (at + 1) % SIZE };
        let all: Vec<_> = (0..SIZE).map(|at| (0, 16, NEXT, next(at))).collect();
        self.chain(&all);
    }

    fn take_memory_away(&mut self) {
        self.guest.front.set_mem_table(std::iter::empty()).unwrap();
        self.ring.kick();
    }

    /// The other ring lies in memory that the front-end cuts off.
    fn cut_memory_off(&mut self) {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(1 << 20).unwrap();
        let spec = RegionSpec { guest_addr: 0, user_addr: 1 << 40, size: 1 << 20, offset: 0 };
        let both = self.guest.memory.regions().chain(std::iter::once((spec, file.as_fd())));
        let front = &mut self.guest.front;
        front.set_mem_table(both).unwrap();
        front.set_vring_num(1, SIZE).unwrap();
        let (desc, avail, used) = (1 << 40, (1 << 40) + 4096, (1 << 40) + 8192);
        let addr = VringAddr { index: 1, flags: 0, desc, avail, used, log_guest_addr: 0 };
        front.call(Request::SetVringAddr(addr)).unwrap();
        front.set_vring_err(1, &self.ring.err).unwrap();
        front.set_vring_kick(1, &self.ring.kick).unwrap();
        front.set_vring_enable(1, true).unwrap();
        file.set_len(0).unwrap();
        self.ring.kick();
    }

    fn leave_inside_a_message(&mut self) {
        // SET_MEM_TABLE that announces 40 bytes, and three of them.
        (&self.guest.raw).write_all(&[5, 0, 0, 0, 1, 0, 0, 0, 40, 0, 0, 0, 1, 0, 0]).unwrap();
        self.guest.raw.shutdown(Shutdown::Both).unwrap();
    }

    fn send_nonsense(&mut self) {
        (&self.guest.raw).write_all(&[0xff; 12]).unwrap();
    }

    /// Waits until its ring, or its session, has come to this.
    fn has_come_to(&self, fate: Fate) {
        let until = Instant::now() + PATIENCE;
        match fate {
            Fate::Reported => assert!(rang(&self.ring.err, PATIENCE), "its ring is reported"),
            Fate::Parked => assert!(!rang(&self.ring.err, Duration::ZERO), "parked is not broken"),
            Fate::Over => {
                while !self.guest.session.is_finished() {
                    assert!(Instant::now() < until, "its session goes on");
                    std::thread::yield_now();
                }
            }
        }
    }
}

fn good(thread: &SharedThread, features: u64) -> (Guest<Echo>, Load) {
    let mut guest = Guest::with(device("good", thread, 1, |_| Ok(Echo)).unwrap(), features);
    let ring = guest.ring(0, 64);
    (guest, Load::on(ring))
}

/// It sleeps when nobody has anything to do: no ring that is broken keeps it awake.
fn comes_to_rest(thread: &SharedThread, load: &mut Load) {
    let (until, before) = (Instant::now() + PATIENCE, number(thread, "sleeps"));
    while number(thread, "sleeps") == before {
        assert!(Instant::now() < until, "the thread does not sleep any more");
        load.go_on(1);
        load.end();
    }
}

/// B82: one bad guest beside a good one, on one thread.
#[test]
fn b82_a_guest_that_breaks_its_ring_costs_the_other_device_of_the_thread_no_request() {
    for (kind, features) in BOTH.into_iter().flat_map(|kind| LAYOUTS.map(|bits| (kind, bits))) {
        let packed = features & virtio::RING_PACKED != 0;
        let thread = thread(kind);
        let (guest, mut load) = good(&thread, features);
        let own: &[Break] = if packed { &OF_PACKED } else { &OF_SPLIT };
        for (what, breaks, fate) in own.iter().chain(&OF_BOTH) {
            println!("{kind:?}, packed: {packed}, {what}");
            let mut bad = Bad::on(&thread, features);
            load.go_on(20);
            breaks(&mut bad);
            load.go_on(20);
            bad.has_come_to(*fate);
            load.go_on(20);
            comes_to_rest(&thread, &mut load);
            load.fill();
            bad.guest.leave();
            assert_eq!(number(&thread, "devices/bad/0/turns"), None);
            load.go_on(20);
        }
        load.end();
        guest.leave();
    }
}

/// Set in a process that plays the front-end that is killed; its standard input is the socket.
const CHILD: &str = "OUTBOARD_SHARED_CHILD";
const SERVED: &str = "requests were answered";

/// A process that keeps its device busy until it is killed.
struct FrontEnd(Child);

impl FrontEnd {
    /// Started on a socket, and in the middle of its requests.
    fn at_work(socket: UnixStream, test: &str, features: u64) -> Self {
        let program = std::env::current_exe().unwrap();
        let mut child = Command::new(program)
            .args(["--exact", test, "--nocapture"])
            .env(CHILD, features.to_string())
            .stdin(OwnedFd::from(socket))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let child = Self(child);
        assert!(lines.map_while(Result::ok).any(|line| line.ends_with(SERVED)), "it gave up");
        child
    }

    /// What the process does: answers come while more requests are under way, until it is killed (or nobody serves it).
    fn play(features: u64) {
        let socket = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
        let (mut front, memory) = negotiated(socket, features);
        let mut load = Load::on(started(&mut front, &memory, features, 0, 64));
        load.go_on(100);
        println!("{SERVED}");
        loop {
            load.go_on(100);
        }
    }
}

impl Drop for FrontEnd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// C13: SIGKILL, with requests under way.
#[test]
fn c13_a_front_end_that_is_killed_costs_the_other_device_of_the_thread_no_request() {
    const TEST: &str =
        "c13_a_front_end_that_is_killed_costs_the_other_device_of_the_thread_no_request";
    if let Ok(features) = std::env::var(CHILD) {
        return FrontEnd::play(features.parse().unwrap());
    }
    for (kind, features) in BOTH.into_iter().flat_map(|kind| LAYOUTS.map(|bits| (kind, bits))) {
        let thread = thread(kind);
        let (guest, mut load) = good(&thread, features);
        for _ in 0..3 {
            let device = device("bad", &thread, 1, |_| Ok(Echo)).unwrap();
            let handler = DeviceRequestHandler::new(device, HandlerOptions::default()).unwrap();
            let (socket, session) = common::serve(handler);
            let front_end = FrontEnd::at_work(socket, TEST, features);
            load.go_on(50);
            drop(front_end);
            load.go_on(50);
            let (ended, handler) = session.join().unwrap();
            assert!(ended.is_ok(), "{ended:?}");
            comes_to_rest(&thread, &mut load);
            drop(handler);
            load.go_on(20);
        }
        load.end();
        guest.leave();
    }
}
