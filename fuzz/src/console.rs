//! A console's driver: bytes, buffers and control messages of any kind, against the device behind its own socket and
//! thread, with clients of the host that come, write, read and leave (virtio 1.3 §5.3.6).
//!
//! Held: everything that is transmitted is taken once; of what the guest wrote each client gets the next bytes, in order,
//! none twice and none left out while somebody reads; the guest gets what clients sent, of one after the other, in order,
//! also of those that have left; control messages are sound and name ports that are there. Whatever came before, a driver
//! that introduces itself finds all ports, by name, and bytes go both ways.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Instant;

use outboard_devices::console::{Console, ConsoleOptions, Host, PortOptions};

use crate::cover::{played, reached, wanted};
use crate::input::Input;
use crate::rig::{PATIENCE, Rig, cut, folder};

const PORTS: usize = 2;
const NAMES: [&str; PORTS] = ["", "org.fuzz"];
const CONTROL_RX: usize = 2;
const CONTROL_TX: usize = 3;
const BUFFERS: u64 = 8;
const BUFFER: u64 = 512;
const SENT: u64 = 64 << 10;
const ARENA: usize = 128 << 10;
/// Bytes that wait for nobody, and for the guest: less than the device keeps.
const KEPT: usize = 32 << 10;

fn rx(port: usize) -> usize {
    if port == 0 { 0 } else { 4 }
}

/// A port as both ends know it.
#[derive(Default)]
struct Port {
    client: Option<UnixStream>,
    /// What the guest wrote that no client has read.
    written: Vec<u8>,
    /// What clients wrote that the guest has not got.
    sent: Vec<u8>,
}

struct Guest {
    rig: Rig,
    folder: PathBuf,
    ports: [Port; PORTS],
    /// What was said of ports since the driver introduced itself: added, named.
    told: [(bool, bool); PORTS],
    next: u8,
}

thread_local! {
    static GUESTS: std::cell::RefCell<Guest> = std::cell::RefCell::new(Guest::new());
}

/// Plays one script.
pub fn run(data: &[u8]) {
    wanted(|| {
        let what = [
            "transmit", "connect", "leave", "send", "read", "control", "nonsense", "heard",
            "received",
        ];
        what.map(|what| format!("console {what}")).into()
    });
    GUESTS.with_borrow_mut(|guest| {
        let mut input = Input::new(data);
        while !input.is_empty() {
            guest.step(&mut input);
        }
        guest.end();
    });
}

impl Guest {
    fn new() -> Self {
        let folder = folder("console");
        let ports = NAMES.map(|name| PortOptions {
            name: name.to_owned(),
            console: name.is_empty(),
            host: Host::Socket(folder.join(format!("port-{name}"))),
        });
        let options = ConsoleOptions { ports: ports.into(), ..ConsoleOptions::default() };
        let console = Console::new(options).expect("a console");
        let rig = Rig::new(console, &[0, 1, 2, 3, 4, 5], 64, ARENA);
        let mut guest =
            Self { rig, folder, ports: Default::default(), told: Default::default(), next: 0 };
        for queue in [0, CONTROL_RX, 4] {
            (0..BUFFERS).for_each(|slot| guest.refill(queue, slot));
        }
        guest
    }

    fn slot(queue: usize, slot: u64) -> u64 {
        (queue as u64 * BUFFERS + slot) * BUFFER
    }

    fn refill(&mut self, queue: usize, slot: u64) {
        self.rig.offer(queue, &[], &[(Self::slot(queue, slot), BUFFER as u32)], slot);
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let port = input.below(PORTS);
        match input.below(8) {
            0 | 1 => self.transmit(port, input),
            2 => self.connect(port),
            3 => self.leave(port),
            4 => self.send(port, input),
            5 => self.read(port),
            6 => self.say(port, input),
            _ => self.nonsense(input),
        }
        self.hear();
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count)
            .map(|_| {
                self.next = self.next.wrapping_mul(5).wrapping_add(7);
                self.next
            })
            .collect()
    }

    fn transmit(&mut self, port: usize, input: &mut Input<'_>) {
        let count = input.below(64) * [1, 30][input.below(2)];
        let bytes = self.bytes(count);
        let pieces = cut(input, SENT, count, 3);
        let lost =
            self.ports[port].client.is_none() && self.ports[port].written.len() + count > KEPT;
        if pieces.is_empty() || lost {
            return;
        }
        self.rig.store(SENT, &bytes);
        self.ports[port].written.extend(&bytes);
        self.offer(rx(port) + 1, &pieces);
        reached("console transmit".into());
    }

    /// Offers bytes to be read, and waits until they are taken: a host that does not read is read for.
    fn offer(&mut self, queue: usize, pieces: &[(u64, u32)]) {
        self.rig.offer(queue, pieces, &[], 77);
        played(1);
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(done) = self.rig.queues[queue].pop().expect("a sound ring") {
                assert_eq!(done, (77, 0), "taken once");
                break;
            }
            assert!(Instant::now() < until, "nothing is taken on queue {queue}");
            (0..PORTS).for_each(|port| self.read(port));
            self.wait();
        }
    }

    fn connect(&mut self, port: usize) {
        if self.ports[port].client.is_none() {
            let path = self.folder.join(format!("port-{}", NAMES[port]));
            let client = UnixStream::connect(path).expect("it listens");
            client.set_nonblocking(true).expect("a socket");
            self.ports[port].client = Some(client);
            reached("console connect".into());
        }
        // Whatever waits for it comes once it is let in; from then on nothing is left out.
        let waits = self.ports[port].written.len();
        let until = Instant::now() + PATIENCE;
        while waits > 0 && self.ports[port].written.len() == waits {
            assert!(Instant::now() < until, "{waits} bytes never come");
            self.read(port);
            self.wait();
        }
    }

    /// A client reads all that there is for it before it leaves, so that it is known what the next one gets.
    fn leave(&mut self, port: usize) {
        if self.ports[port].client.is_none() {
            return;
        }
        let until = Instant::now() + PATIENCE;
        while !self.ports[port].written.is_empty() {
            assert!(Instant::now() < until, "{} bytes never come", self.ports[port].written.len());
            self.read(port);
            self.wait();
        }
        self.ports[port].client = None;
        reached("console leave".into());
    }

    fn send(&mut self, port: usize, input: &mut Input<'_>) {
        let count = input.below(64) * [1, 40][input.below(2)];
        let room = KEPT.saturating_sub(self.ports[port].sent.len());
        let bytes = self.bytes(count.min(room));
        let Port { client: Some(client), sent, .. } = &mut self.ports[port] else { return };
        if client.write_all(&bytes).is_ok() {
            sent.extend(bytes);
            reached("console send".into());
        }
    }

    /// What the client has got.
    fn read(&mut self, port: usize) {
        let Port { client: Some(client), written, .. } = &mut self.ports[port] else { return };
        let mut bytes = [0; 4096];
        loop {
            match client.read(&mut bytes) {
                Ok(0) => panic!("a client was sent away"),
                Ok(got) => {
                    assert!(written.starts_with(&bytes[..got]), "other bytes than were written");
                    written.drain(..got);
                    reached("console read".into());
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => panic!("a client reads: {error}"),
            }
        }
    }

    /// A message of a driver about a port that is there.
    fn say(&mut self, port: usize, input: &mut Input<'_>) {
        let (event, value) = [(0, 1), (3, 1), (3, 0), (6, 1), (6, 0)][input.below(5)];
        self.control(port as u32, event, value);
        reached("console control".into());
    }

    fn control(&mut self, port: u32, event: u16, value: u16) {
        let message =
            [&port.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
        self.rig.store(SENT, &message);
        self.offer(CONTROL_TX, &[(SENT, 8)]);
    }

    /// Bytes that are no message, or one of a port that is not there.
    fn nonsense(&mut self, input: &mut Input<'_>) {
        let mut message = [0; 24];
        message[..4].copy_from_slice(&(PORTS as u32 + input.number() as u32 % 1000).to_le_bytes());
        message[4..6].copy_from_slice(&(1 + input.number() as u16 % 9).to_le_bytes());
        message[6] = input.byte();
        let length = input.below(message.len());
        self.rig.store(SENT, &message);
        let pieces = cut(input, SENT, length, 2);
        if !pieces.is_empty() {
            self.offer(CONTROL_TX, &pieces);
            reached("console nonsense".into());
        }
    }

    /// The host's side tells nobody when bytes come: all is looked at again.
    fn wait(&mut self) {
        self.hear();
        std::thread::yield_now();
    }

    /// Takes what has come to the guest.
    fn hear(&mut self) {
        for queue in [0, CONTROL_RX, 4] {
            while let Some((slot, length)) = self.rig.queues[queue].pop().expect("a sound ring") {
                let bytes = self.rig.load(Self::slot(queue, slot), length as usize);
                self.refill(queue, slot);
                if queue == CONTROL_RX {
                    self.message(&bytes)
                } else {
                    self.received(queue / 4, &bytes)
                }
            }
        }
    }

    fn received(&mut self, port: usize, bytes: &[u8]) {
        let sent = &mut self.ports[port].sent;
        assert!(!bytes.is_empty(), "an answer with nothing");
        assert!(sent.starts_with(bytes), "other bytes than were sent");
        sent.drain(..bytes.len());
        reached("console received".into());
    }

    fn message(&mut self, bytes: &[u8]) {
        let [a, b, c, d, e, f, g, h, ref rest @ ..] = *bytes else {
            panic!("a message of {bytes:?}")
        };
        let port = u32::from_le_bytes([a, b, c, d]) as usize;
        assert!(port < PORTS, "port {port}");
        match (u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h])) {
            (1, 1) => self.told[port] = (true, false),
            (4, 1) => assert!(port == 0 && rest.is_empty(), "a console"),
            (5, _) => assert_eq!(rest, [80, 0, 25, 0]),
            (6, 0 | 1) => assert!(rest.is_empty()),
            (7, 1) => {
                assert_eq!(rest, NAMES[port].as_bytes());
                self.told[port].1 = true;
            }
            other => panic!("{other:?} of port {port}"),
        }
        reached("console heard".into());
    }

    /// A driver introduces itself, finds all ports, and bytes go both ways; then nobody is there.
    fn end(&mut self) {
        self.told = Default::default();
        self.control(0, 0, 1);
        self.until("ports are told", |guest| guest.told.iter().all(|told| told.0));
        for port in 0..PORTS {
            self.control(port as u32, 3, 1);
            self.control(port as u32, 6, 1);
        }
        self.until("names are told", |guest| guest.told[1].1);
        for port in 0..PORTS {
            self.connect(port);
            let bytes = self.bytes(9);
            self.rig.store(SENT, &bytes);
            self.ports[port].written.extend(&bytes);
            self.offer(rx(port) + 1, &[(SENT, 9)]);
            let Port { client: Some(client), sent, .. } = &mut self.ports[port] else { continue };
            client.write_all(&bytes).expect("sent");
            sent.extend(bytes);
            self.until("bytes go both ways", |guest| guest.ports[port].sent.is_empty());
            self.leave(port);
        }
    }

    fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < until, "never: {what}");
            self.wait();
        }
    }
}
