//! A disk of ours behind a real socket, driven descriptor by descriptor.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;

use outboard::protocol::ProtocolFeatures;
use outboard::{LoopKind, Server, WorkerDevice, WorkerOptions};
use outboard_devices::block::{Block, BlockOptions, EngineKind, Image, ImageOptions};
use outboard_frontend::{Buffer, Connection, QueueSetup, SharedMemory, Virtqueue, Vmm, Wanted};
use tempfile::NamedTempFile;

pub(crate) const OK: Option<u8> = Some(0);
pub(crate) const IOERR: Option<u8> = Some(1);
pub(crate) const UNSUPP: Option<u8> = Some(2);

pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const FLUSH: u32 = 4;
pub(crate) const GET_ID: u32 = 8;
pub(crate) const DISCARD: u32 = 11;
pub(crate) const WRITE_ZEROES: u32 = 13;

/// What a writable byte holds before the device has written it.
pub(crate) const UNTOUCHED: u8 = 0xee;

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
const ARENA: usize = 8 << 20;

/// All ways to reach an image, on the event loops that they need.
pub(crate) const ENGINES: [(EngineKind, LoopKind); 5] = [
    (EngineKind::Sync, LoopKind::Epoll),
    (EngineKind::Sync, LoopKind::Uring),
    (EngineKind::Uring, LoopKind::Uring),
    (EngineKind::Mmap, LoopKind::Epoll),
    (EngineKind::Mmap, LoopKind::Uring),
];

/// A file of the test's own on a real file system, gone with the test.
pub(crate) fn image_file(size: u64) -> NamedTempFile {
    let file = NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a file");
    file.as_file().set_len(size).expect("room");
    file
}

/// A file whose sector `n` is filled with `n` (modulo 251, plus 1).
pub(crate) fn numbered_file(sectors: u64) -> NamedTempFile {
    let file = image_file(sectors * 512);
    for sector in 0..sectors {
        let bytes = [number(sector); 512];
        std::os::unix::fs::FileExt::write_all_at(file.as_file(), &bytes, sector * 512)
            .expect("written");
    }
    file
}

pub(crate) fn number(sector: u64) -> u8 {
    u8::try_from(sector % 251 + 1).expect("small")
}

pub(crate) fn open(file: &NamedTempFile) -> Image {
    Image::open(file.path(), ImageOptions::default()).expect("opens")
}

pub(crate) fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend(0x1234_u32.to_le_bytes());
    bytes.extend(sector.to_le_bytes());
    bytes
}

pub(crate) fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// How a request ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// The length in the used ring.
    pub(crate) used: u32,
    /// All writable bytes but the last.
    pub(crate) data: Vec<u8>,
    /// The last writable byte, if there is one and it was written.
    pub(crate) status: Option<u8>,
}

/// A driver of one disk. Fields in the order in which they go.
pub(crate) struct Driven {
    pub(crate) queues: Vec<Virtqueue>,
    pub(crate) vmm: Vmm,
    pub(crate) arena: Buffer,
    pub(crate) memory: SharedMemory,
    server: Option<JoinHandle<()>>,
}

impl Driven {
    /// A disk on `image`, with everything else as usual.
    pub(crate) fn new(image: Image, (engine, events): (EngineKind, LoopKind)) -> Self {
        let options = BlockOptions { engine, ..BlockOptions::default() };
        Self::of(Block::new(image, options).expect("a disk"), events, 1)
    }

    /// Starts the disk and one queue of it for each of `queues`.
    pub(crate) fn of(block: Block, events: LoopKind, queues: u16) -> Self {
        let mut driven = Self::asleep(block, events, u64::MAX);
        driven.activate(queues);
        driven
    }

    /// Starts the disk and negotiates, without those feature bits that are not in `mask`.
    pub(crate) fn asleep(block: Block, events: impl Into<WorkerOptions>, mask: u64) -> Self {
        let device = WorkerDevice::with_options(block, events.into()).expect("a device");
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let server = Server::from_socket(theirs.into()).expect("a server");
        let server = std::thread::spawn(move || {
            server.serve(device).expect("served to the end");
        });
        let connection = Connection::from_fd(OwnedFd::from(ours), PATIENCE).expect("connected");
        let mut wanted = Wanted::default();
        wanted.protocol |= ProtocolFeatures::RESET_DEVICE;
        let mut vmm = Vmm::new(connection, wanted).expect("negotiated");
        vmm.mask_features(mask);
        let memory = SharedMemory::with_size(64 << 20).expect("memory");
        let arena = memory.allocate(ARENA, 4096).expect("room");
        vmm.share_memory(memory.clone()).expect("shared");
        Self { queues: Vec::new(), vmm, arena, memory, server: Some(server) }
    }

    pub(crate) fn activate(&mut self, queues: u16) {
        let setups: Vec<_> =
            (0..queues).map(|index| QueueSetup { index, size: 256, indirect: 0 }).collect();
        self.queues = self.vmm.activate(&setups).expect("active");
    }

    /// Runs a request whose readable bytes are cut into pieces of these sizes (the rest in one),
    /// and its writable ones likewise.
    pub(crate) fn run_cut(
        &mut self,
        readable: &[u8],
        read_cuts: &[usize],
        writable: usize,
        write_cuts: &[usize],
    ) -> Answer {
        self.run_at(0, readable, read_cuts, writable, write_cuts)
    }

    /// The same, with every piece `skew` bytes behind an aligned address.
    pub(crate) fn run_at(
        &mut self,
        skew: u64,
        readable: &[u8],
        read_cuts: &[usize],
        writable: usize,
        write_cuts: &[usize],
    ) -> Answer {
        let mut at = skew;
        let mut place = |length: usize, cuts: &[usize]| {
            let (mut pieces, mut left) = (Vec::new(), length);
            for &cut in cuts.iter().chain([&usize::MAX]) {
                let part = cut.min(left);
                if part > 0 {
                    pieces.push((self.arena.guest() + at, u32::try_from(part).expect("small")));
                    // Pieces neither touch nor share a page.
                    at += (part as u64).next_multiple_of(4096) + 4096;
                    left -= part;
                }
            }
            pieces
        };
        let out = place(readable.len(), read_cuts);
        let into = place(writable, write_cuts);
        assert!(usize::try_from(at).expect("small") <= self.arena.len(), "the arena is too small");
        self.store(&out, readable);
        self.store(&into, &vec![UNTOUCHED; writable]);
        let used = self.run_raw(&out, &into);
        let mut data = self.load(&into, writable);
        let status = data.pop().filter(|status| *status != UNTOUCHED);
        Answer { used, data, status }
    }

    /// Runs a request in the usual layout: header, data, status.
    pub(crate) fn run(&mut self, kind: u32, sector: u64, data: &[u8], writable: usize) -> Answer {
        let mut readable = header(kind, sector);
        readable.extend(data);
        self.run_cut(&readable, &[16], writable + 1, &[writable])
    }

    pub(crate) fn read(&mut self, sector: u64, bytes: usize) -> Vec<u8> {
        let answer = self.run(IN, sector, &[], bytes);
        assert_eq!((answer.status, answer.used as usize), (OK, bytes + 1));
        answer.data
    }

    pub(crate) fn write(&mut self, sector: u64, data: &[u8]) -> Option<u8> {
        let answer = self.run(OUT, sector, data, 0);
        assert_eq!(answer.used, 1);
        answer.status
    }

    pub(crate) fn flush(&mut self) -> Option<u8> {
        self.run(FLUSH, 0, &[], 0).status
    }

    /// Runs one chain on queue 0 and answers the used length.
    pub(crate) fn run_raw(&mut self, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u32 {
        let queue = self.queues.first_mut().expect("active");
        assert!(queue.add(readable, writable, 7).expect("fits"), "the ring is full");
        queue.kick().expect("kicked");
        assert!(queue.wait(PATIENCE).expect("waits"), "the request never ended");
        let (token, used) = queue.pop().expect("whole").expect("one");
        assert_eq!(token, 7);
        used
    }

    pub(crate) fn store(&self, pieces: &[(u64, u32)], mut bytes: &[u8]) {
        for &(guest, length) in pieces {
            let (now, later) = bytes.split_at(length as usize);
            self.memory.view().write(guest, now).expect("stored");
            bytes = later;
        }
    }

    pub(crate) fn load(&self, pieces: &[(u64, u32)], length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length);
        for &(guest, length) in pieces {
            let mut piece = vec![0; length as usize];
            self.memory.view().read(guest, &mut piece).expect("loaded");
            bytes.extend(piece);
        }
        bytes
    }
}

/// Disconnects and waits for the device to end.
pub(crate) fn end(driven: Driven) {
    let Driven { queues, vmm, arena, memory, server } = driven;
    drop((queues, vmm, arena, memory));
    server.expect("running").join().expect("ended well");
}

/// What is in the file now.
pub(crate) fn contents(file: &File) -> Vec<u8> {
    let length = usize::try_from(file.metadata().expect("there").len()).expect("small");
    let mut bytes = vec![0; length];
    std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, 0).expect("readable");
    bytes
}
