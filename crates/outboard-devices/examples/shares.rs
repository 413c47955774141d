//! Shared directories side by side, driven with requests of FUSE (virtio 1.3 §5.11), one at a time.
//!
//! ```text
//! outboard fs --socket-path a.sock --shared-dir A & virtiofsd --socket-path b.sock --shared-dir B &
//! cargo run --release -p outboard-devices --example shares -- a.sock b.sock
//! ```
//! `cargo xtask bench --shares` does this and keeps what it says.
//! Each of 4 KiB random reads and writes of a file of 64 MiB, and CREATE+RELEASE, LOOKUP (stat), UNLINK of files
//! one after the other: in short turns, `--rounds` of each (25); the medians and their ratio, as lines of a table.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a measuring program ends at what it did not expect"
)]

use std::time::{Duration, Instant};

use outboard_frontend::{Buffer, Connection, QueueSetup, SharedMemory, Virtqueue, Vmm, Wanted};

const PATIENCE: Duration = Duration::from_secs(20);
const FILE: u64 = 64 << 20;
const PAGE: u32 = 4096;
/// Requests of one turn; files of one turn.
const REQUESTS: u32 = 4_000;
const FILES: u32 = 400;

struct Share {
    vmm: Vmm,
    queue: Virtqueue,
    memory: SharedMemory,
    arena: Buffer,
    unique: u64,
    file: (u64, u64),
}

fn u32s(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn u64s(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

impl Share {
    fn mount(path: &str) -> Self {
        let connection = Connection::connect(path, PATIENCE).unwrap();
        let mut vmm = Vmm::new(connection, Wanted::default()).unwrap();
        let memory = SharedMemory::with_size(16 << 20).unwrap();
        let arena = memory.allocate(4 << 20, 4096).unwrap();
        vmm.share_memory(memory.clone()).unwrap();
        let setup = |index| QueueSetup { index, size: 64, indirect: 0 };
        let mut queues = vmm.activate(&[setup(0), setup(1)]).unwrap();
        let queue = queues.remove(1);
        let mut share = Self { vmm, queue, memory, arena, unique: 0, file: (0, 0) };
        share.ask(26, 1, &u32s(&[7, 38, 65536, 0]), 64);
        share.file = share.create("big");
        let data = vec![7; 1 << 19];
        for at in 0..FILE / (1 << 19) {
            share.write(at << 19, &data);
        }
        share
    }

    /// Asks, waits, and gives what follows the header.
    fn ask(&mut self, opcode: u32, node: u64, body: &[u8], room: u32) -> Vec<u8> {
        self.unique += 1;
        let length = u32::try_from(40 + body.len()).unwrap();
        let head =
            [u32s(&[length, opcode]), u64s(&[self.unique, node]), u32s(&[0, 0, 1, 0])].concat();
        let (to, from) = (self.arena.guest(), self.arena.guest() + (2 << 20));
        self.memory.view().write(to, &[&head, body].concat()).unwrap();
        let reply = [(from, 16), (from + 4096, room)];
        let reply = if room == 0 { &reply[..1] } else { &reply[..] };
        assert!(self.queue.add(&[(to, length)], reply, 1).unwrap());
        self.queue.kick().unwrap();
        while self.queue.pop().unwrap().is_none() {
            std::hint::spin_loop();
        }
        let mut header = [0; 16];
        self.memory.view().read(from, &mut header).unwrap();
        assert_eq!(header[4..8], [0; 4], "operation {opcode}");
        let mut said = vec![0; room.min(144) as usize];
        self.memory.view().read(from + 4096, &mut said).unwrap();
        said
    }

    fn create(&mut self, name: &str) -> (u64, u64) {
        let body = [&u32s(&[0o102, 0o644, 0, 0])[..], name.as_bytes(), &[0]].concat();
        let made = self.ask(35, 1, &body, 144);
        (u64_at(&made, 0), u64_at(&made, 128))
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (node, handle) = self.file;
        let size = u32::try_from(data.len()).unwrap();
        let head = [u64s(&[handle, offset]), u32s(&[size, 0]), u64s(&[0]), u32s(&[0, 0])].concat();
        self.ask(16, node, &[&head, data].concat(), 8);
    }

    fn read(&mut self, offset: u64) {
        let (node, handle) = self.file;
        let body = [u64s(&[handle, offset]), u32s(&[PAGE, 0]), u64s(&[0]), u32s(&[0, 0])].concat();
        self.ask(15, node, &body, PAGE);
    }

    /// Operations per second of one kind, in a turn of round `round`.
    fn turn(&mut self, kind: &str, round: u32) -> f64 {
        let name = |at: u32| format!("file-{round}-{at}");
        let ended = |at: u32| [name(at).as_bytes(), &[0]].concat();
        let page = vec![9; PAGE as usize];
        let mut seed = u64::from(round);
        let mut random = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % (FILE / u64::from(PAGE)) * u64::from(PAGE)
        };
        match kind {
            "4 KiB random read" => rate(REQUESTS, |_| self.read(random())),
            "4 KiB random write" => rate(REQUESTS, |_| self.write(random(), &page)),
            "create and close" => rate(FILES, |at| {
                let (node, handle) = self.create(&name(at));
                let body = [u64s(&[handle]), u32s(&[0, 0]), u64s(&[0])].concat();
                self.ask(18, node, &body, 0);
            }),
            "stat" => rate(FILES, |at| drop(self.ask(1, 1, &ended(at), 128))),
            _ => rate(FILES, |at| drop(self.ask(10, 1, &ended(at), 0))),
        }
    }
}

const KINDS: [&str; 5] =
    ["4 KiB random read", "4 KiB random write", "create and close", "stat", "unlink"];

fn rate(count: u32, mut step: impl FnMut(u32)) -> f64 {
    let start = Instant::now();
    (0..count).for_each(&mut step);
    f64::from(count) / start.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let mut sockets: Vec<_> = std::env::args().skip(1).collect();
    let mut rounds: u32 = 25;
    if sockets.first().is_some_and(|first| first == "--rounds") {
        rounds = sockets[1].parse().unwrap();
        sockets.drain(..2);
    }
    assert_eq!(sockets.len(), 2, "two sockets are wanted");
    let mut shares: Vec<_> = sockets.iter().map(|path| Share::mount(path)).collect();
    let mut rates = vec![[Vec::new(), Vec::new()]; KINDS.len()];
    for round in 0..rounds {
        for (kind, rates) in KINDS.iter().zip(&mut rates) {
            // Whoever comes second finds the processors warm: each is second as often.
            for at in [round % 2, 1 - round % 2].map(|at| at as usize) {
                rates[at].push(shares[at].turn(kind, round));
            }
        }
    }
    println!("|---|---|---|---|");
    for (kind, [ours, theirs]) in KINDS.iter().zip(rates) {
        let (ours, theirs) = (median(ours), median(theirs));
        println!("| {kind} | {ours:.0} | {theirs:.0} | **{:.2}** |", ours / theirs);
    }
    for share in shares {
        let Share { vmm, queue, .. } = share;
        drop((queue, vmm));
    }
}
