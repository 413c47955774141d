//! How fast is a socket device? Bytes to the host, bytes to the guest, round trips; of several back-ends in
//! turns, as a Linux guest drives them (packets of 64 KiB, receive buffers of 4 KiB).
//!
//! `vsock_bench ROUNDS SOCKET=PATH [SOCKET=PATH]…`: the device's socket, and where it has its Unix sockets. One line for each
//! kind of work: its name, and the medians, in the order of the back-ends. `cargo xtask bench --sockets` makes a page of it.
#![expect(
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a failed step of a measurement is its end"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use outboard_devices::vsock::{Address, Credit, HEADER, HOST_CID, Header, Kind, Op};
use outboard_frontend::{Buffer, Connection, QueueSetup, SharedMemory, Virtqueue, Vmm, Wanted};
use zerocopy::{FromBytes, IntoBytes};

const PATIENCE: Duration = Duration::from_secs(60);
const SIZE: u16 = 128;
/// A receive buffer of Linux: 4 KiB and a header.
const BUFFER: u64 = 4096 + 44;
const PACKET: u32 = 64 << 10;
const ROOM: u32 = 256 << 10;
/// What goes each way, in bytes, and how often a byte goes there and back.
const BYTES: u64 = 512 << 20;
const TRIPS: u32 = 20_000;

/// A guest's driver. Fields in the order in which they go.
struct Guest {
    queues: Vec<Virtqueue>,
    _vmm: Vmm,
    arena: Buffer,
    memory: SharedMemory,
    cid: u64,
    path: PathBuf,
    /// Packets of the transmit ring under way, by place.
    free: Vec<u64>,
}

struct Socket {
    ours: Address,
    peer: Address,
    credit: Credit,
}

impl Guest {
    fn new(socket: &str, path: &str) -> Self {
        let connection =
            Connection::connect(std::path::Path::new(socket), PATIENCE).expect("connected");
        let mut vmm = Vmm::new(connection, Wanted::default()).expect("negotiated");
        let memory = SharedMemory::with_size(64 << 20).expect("memory");
        let arena = memory.allocate(32 << 20, 4096).expect("room");
        vmm.share_memory(memory.clone()).expect("shared");
        let cid = vmm.read_config(0, 8).expect("read");
        let cid = u64::from_le_bytes(cid.try_into().expect("eight"));
        let setups = [0, 1, 2].map(|index| QueueSetup { index, size: SIZE, indirect: 0 });
        let queues = vmm.activate(&setups).expect("active");
        let free = (0..u64::from(SIZE)).collect();
        let mut guest = Self { queues, _vmm: vmm, arena, memory, cid, path: path.into(), free };
        for slot in 0..u64::from(SIZE) {
            guest.refill(slot);
        }
        guest.queues[0].kick().expect("kicked");
        guest
    }

    fn refill(&mut self, slot: u64) {
        let at = self.arena.guest() + slot * 8192;
        assert!(self.queues[0].add(&[], &[(at, BUFFER as u32)], slot).expect("fits"));
    }

    /// Whether a packet could be sent.
    fn say(&mut self, socket: &mut Socket, op: Op, length: u32) -> bool {
        while let Some((slot, _)) = self.queues[1].pop().expect("a sound ring") {
            self.free.push(slot);
        }
        let Some(slot) = self.free.pop() else { return false };
        let header = Header::new(socket.ours, socket.peer, Kind::Stream, op).with_length(length);
        socket.credit.sent(length);
        let header = header.with_credit(socket.credit.tell());
        let at = self.arena.guest() + (2 << 20) + slot * 128 * 1024;
        self.memory.view().write(at, header.as_bytes()).expect("stored");
        let all = HEADER as u32 + length;
        assert!(self.queues[1].add(&[(at, all)], &[], slot).expect("fits"));
        self.queues[1].kick().expect("kicked");
        true
    }

    /// The next packet; None: there is none now.
    fn hear(&mut self) -> Option<Header> {
        let (slot, _) = self.queues[0].pop().expect("a sound ring")?;
        let mut bytes = [0; HEADER];
        self.memory.view().read(self.arena.guest() + slot * 8192, &mut bytes).expect("loaded");
        self.refill(slot);
        self.queues[0].kick().expect("kicked");
        Some(Header::read_from_bytes(&bytes).expect("a header"))
    }

    fn wait(&mut self) -> Header {
        loop {
            if let Some(header) = self.hear() {
                return header;
            }
            self.queues[0].wait(PATIENCE).expect("waits");
        }
    }

    /// Takes a packet of a connection.
    fn take(&mut self, socket: &mut Socket, header: &Header) -> u32 {
        assert_ne!(header.op(), Some(Op::Reset), "the connection was reset");
        socket.credit.hear(header.credit()).expect("true");
        let length = header.length();
        socket.credit.received(length).expect("credit");
        socket.credit.took(length);
        if socket.credit.should_tell() || header.op() == Some(Op::CreditRequest) {
            while !self.say(socket, Op::CreditUpdate, 0) {
                std::thread::yield_now();
            }
        }
        length
    }

    /// A connection to a port of the host.
    fn connect(&mut self, port: u32) -> (Socket, UnixStream) {
        let path = format!("{}_{port}", self.path.display());
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).expect("listens");
        let peer = Address { cid: HOST_CID, port };
        let ours = Address { cid: self.cid, port: 5000 + port };
        let mut socket = Socket { ours, peer, credit: Credit::new(ROOM) };
        self.say(&mut socket, Op::Request, 0);
        let host = listener.accept().expect("a client").0;
        let header = self.wait();
        assert_eq!(header.op(), Some(Op::Response));
        self.take(&mut socket, &header);
        (socket, host)
    }

    /// Ends a connection, and waits for the end of what is still said of it.
    fn end(&mut self, mut socket: Socket) {
        self.say(&mut socket, Op::Reset, 0);
        std::thread::sleep(Duration::from_millis(50));
        while self.hear().is_some() {}
    }

    fn send_all(&mut self, port: u32) -> f64 {
        let (mut socket, mut host) = self.connect(port);
        let begin = Instant::now();
        let reader = std::thread::spawn(move || {
            let (mut all, mut buffer) = (0, vec![0; 256 << 10]);
            while all < BYTES {
                all += host.read(&mut buffer).expect("read") as u64;
            }
        });
        let mut sent = 0;
        while sent < BYTES {
            let most = socket.credit.may_send().min(PACKET);
            if most > 0 && self.say(&mut socket, Op::Data, most) {
                sent += u64::from(most);
                while let Some(header) = self.hear() {
                    self.take(&mut socket, &header);
                }
            } else if most == 0 {
                let header = self.wait();
                self.take(&mut socket, &header);
            } else {
                std::thread::yield_now();
            }
        }
        reader.join().expect("ended well");
        let speed = BYTES as f64 / begin.elapsed().as_secs_f64() / f64::from(1 << 20);
        self.end(socket);
        speed
    }

    /// A client of the host that the guest has accepted.
    fn accept(&mut self, port: u32) -> (Socket, UnixStream) {
        let mut host = UnixStream::connect(&self.path).expect("it listens");
        host.write_all(format!("CONNECT {port}\n").as_bytes()).expect("sent");
        let header = self.wait();
        assert_eq!(header.op(), Some(Op::Request));
        let ours = Address { cid: self.cid, port };
        let mut socket = Socket { ours, peer: header.source(), credit: Credit::new(ROOM) };
        socket.credit.hear(header.credit()).expect("true");
        self.say(&mut socket, Op::Response, 0);
        let mut line = String::new();
        BufReader::with_capacity(1, &host).read_line(&mut line).expect("an answer");
        assert!(line.starts_with("OK "), "{line}");
        (socket, host)
    }

    fn receive_all(&mut self, port: u32) -> f64 {
        let (mut socket, mut host) = self.accept(port);
        let begin = Instant::now();
        let writer = std::thread::spawn(move || {
            let buffer = vec![7; 256 << 10];
            for _ in 0..BYTES / buffer.len() as u64 {
                host.write_all(&buffer).expect("sent");
            }
            host
        });
        let mut all = 0;
        while all < BYTES {
            let header = self.wait();
            all += u64::from(self.take(&mut socket, &header));
        }
        let speed = BYTES as f64 / begin.elapsed().as_secs_f64() / f64::from(1 << 20);
        drop(writer.join().expect("ended well"));
        self.end(socket);
        speed
    }

    fn trips(&mut self, port: u32) -> f64 {
        let (mut socket, mut host) = self.accept(port);
        let begin = Instant::now();
        let client = std::thread::spawn(move || {
            for _ in 0..TRIPS {
                host.write_all(b"x").expect("sent");
                host.read_exact(&mut [0; 1]).expect("read");
            }
            host
        });
        let mut back = 0;
        while back < TRIPS {
            let header = self.wait();
            for _ in 0..self.take(&mut socket, &header) {
                while !self.say(&mut socket, Op::Data, 1) {
                    std::thread::yield_now();
                }
                back += 1;
            }
        }
        let host = client.join().expect("ended well");
        let speed = f64::from(TRIPS) / begin.elapsed().as_secs_f64();
        drop(host);
        self.end(socket);
        speed
    }
}

fn main() {
    let mut words = std::env::args().skip(1);
    let rounds: u32 = words.next().and_then(|word| word.parse().ok()).expect("rounds");
    let sides: Vec<_> = words.collect();
    let mut guests: Vec<_> = sides
        .iter()
        .map(|side| {
            let (socket, path) = side.split_once('=').expect("SOCKET=PATH");
            Guest::new(socket, path)
        })
        .collect();
    let mut figures = vec![[const { Vec::new() }; 3]; guests.len()];
    for round in 0..rounds {
        for (guest, figures) in guests.iter_mut().zip(&mut figures) {
            figures[0].push(guest.send_all(3 * round + 1));
            figures[1].push(guest.receive_all(3 * round + 2));
            figures[2].push(guest.trips(3 * round + 3));
        }
    }
    let names = ["to the host, MiB/s", "to the guest, MiB/s", "round trips/s"];
    for (place, name) in names.iter().enumerate() {
        let medians: Vec<f64> = figures
            .iter_mut()
            .map(|figures| {
                figures[place].sort_by(f64::total_cmp);
                figures[place][figures[place].len() / 2]
            })
            .collect();
        let shown: Vec<_> = medians.iter().map(|median| format!("{median:.0}")).collect();
        println!("{name}: {}", shown.join(" "));
    }
}
