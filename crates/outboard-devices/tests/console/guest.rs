//! A console's driver: fills receive rings, talks over the control queues.

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use outboard::LoopKind;
use outboard_devices::console::{Console, ConsoleOptions, Host, PortOptions};

use crate::rig::{PATIENCE, Rig};

pub(crate) const BOTH: [LoopKind; 2] = [LoopKind::Epoll, LoopKind::Uring];
/// Entries of each ring.
const SIZE: u16 = 64;
/// Bytes of a receive buffer, and how many of them each ring has.
pub(crate) const BUFFER: u32 = 1024;
const BUFFERS: u64 = 16;
/// Where a queue's buffers begin, and where it transmits from.
const AREA: u64 = 64 << 10;
const TRANSMIT: u64 = 4 << 20;
/// The token of a request that nothing else overtakes.
const ALONE: u64 = 1000;

/// A port that clients connect to.
pub(crate) fn socket(folder: &Path, name: &str) -> PortOptions {
    let host = Host::Socket(folder.join(format!("port-{name}")));
    PortOptions { name: name.to_owned(), console: false, host }
}

pub(crate) fn client(folder: &Path, name: &str) -> UnixStream {
    let client = UnixStream::connect(folder.join(format!("port-{name}"))).expect("it listens");
    client.set_read_timeout(Some(PATIENCE)).expect("a time");
    client.set_write_timeout(Some(PATIENCE)).expect("a time");
    client
}

/// Reads exactly so many bytes.
pub(crate) fn read(from: &mut impl Read, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes).expect("so many bytes");
    bytes
}

pub(crate) fn options(ports: Vec<PortOptions>) -> ConsoleOptions {
    ConsoleOptions { ports, ..ConsoleOptions::default() }
}

/// A driver that knows ports (or, without MULTIPORT, one).
pub(crate) struct Guest {
    pub(crate) rig: Rig,
}

impl Guest {
    /// Starts all queues and introduces itself.
    pub(crate) fn start(options: ConsoleOptions, events: LoopKind) -> Self {
        let ports = u16::try_from(options.ports.len()).expect("few");
        let mut guest = Self::of(Console::new(options).expect("a console"), events, u64::MAX);
        let queues: Vec<_> = (0..2 + 2 * ports).collect();
        guest.activate(&queues);
        guest.say(0, 0, 1);
        guest
    }

    /// Negotiated, nothing started.
    pub(crate) fn of(console: Console, events: LoopKind, mask: u64) -> Self {
        Self { rig: Rig::asleep(console, events, mask) }
    }

    /// Starts queues and fills those that receive.
    pub(crate) fn activate(&mut self, queues: &[u16]) {
        self.rig.activate(queues, SIZE);
        for queue in (0..queues.len()).step_by(2) {
            for slot in 0..BUFFERS {
                self.refill(queue, slot);
            }
        }
    }

    fn slot(&self, queue: usize, slot: u64) -> u64 {
        self.rig.at(u64::try_from(queue).expect("few") * AREA + slot * u64::from(BUFFER))
    }

    fn refill(&mut self, queue: usize, slot: u64) {
        let at = self.slot(queue, slot);
        self.rig.offer(queue, &[], &[(at, BUFFER)], slot);
    }

    /// What comes next on a queue.
    pub(crate) fn receive(&mut self, queue: usize) -> Vec<u8> {
        let back = self.rig.back(queue);
        self.took(queue, back)
    }

    /// What has come on a queue, if anything has.
    pub(crate) fn received(&mut self, queue: usize) -> Option<Vec<u8>> {
        let back = self.rig.if_back(queue)?;
        Some(self.took(queue, back))
    }

    fn took(&mut self, queue: usize, (slot, length): (u64, u32)) -> Vec<u8> {
        let bytes = self.rig.load(self.slot(queue, slot), length);
        self.refill(queue, slot);
        bytes
    }

    /// So many bytes of a queue, however they were cut.
    pub(crate) fn receive_all(&mut self, queue: usize, length: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < length {
            bytes.extend(self.receive(queue));
        }
        assert_eq!(bytes.len(), length, "more than was sent");
        bytes
    }

    /// Transmits, and waits until it was taken.
    pub(crate) fn transmit(&mut self, queue: usize, bytes: &[u8]) {
        self.send(queue, bytes, ALONE);
        assert_eq!(self.rig.back(queue), (ALONE, 0));
    }

    /// Transmits without waiting; requests whose tokens are 16 apart share their bytes.
    pub(crate) fn send(&mut self, queue: usize, bytes: &[u8], token: u64) {
        let slot = if token == ALONE { 16 } else { token % 16 };
        let at = self.rig.at(TRANSMIT + slot * AREA);
        self.rig.store(at, bytes);
        let length = u32::try_from(bytes.len()).expect("small");
        self.rig.offer(queue, &[(at, length)], &[], token);
    }

    /// Sends a control message.
    pub(crate) fn say(&mut self, port: u32, event: u16, value: u16) {
        let message = [&port.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()];
        self.transmit(3, &message.concat());
    }

    /// The next control message: port, event, value, what follows.
    pub(crate) fn hear(&mut self) -> (u32, u16, u16, Vec<u8>) {
        let bytes = self.receive(2);
        let (head, rest) = bytes.split_at(8);
        let half = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
        let port = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
        (port, half(4), half(6), rest.to_vec())
    }

    /// Makes port `port` of those that were announced, and opens it.
    pub(crate) fn make(&mut self, port: u32) {
        self.say(port, 3, 1);
        self.say(port, 6, 1);
    }

    /// Takes the announcements of so many ports.
    pub(crate) fn meet(&mut self, ports: u32) {
        for port in 0..ports {
            assert_eq!(self.hear(), (port, 1, 1, Vec::new()), "PORT_ADD");
        }
    }
}

/// Reads until the other side has closed.
pub(crate) fn read_to_end(client: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match client.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
    bytes
}

/// Waits until `done` says so: for what sends no event.
pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::yield_now();
    }
}
