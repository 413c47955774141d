//! A device behind its own socket and threads, our front-end with its queues on the other side, and a folder of its own.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use outboard::{DeviceRequestHandler, HandlerOptions, LoopKind, Model, WorkerDevice};
use outboard_frontend::{Buffer, Connection, QueueSetup, SharedMemory, Virtqueue, Vmm, Wanted};

/// Longest waits for an answer.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug)]
pub struct Rig {
    /// In the order in which they were asked for.
    pub queues: Vec<Virtqueue>,
    pub vmm: Vmm,
    pub arena: Buffer,
    memory: SharedMemory,
    _thread: JoinHandle<()>,
}

impl Rig {
    /// Starts a device with these of its queues, and an arena of so many bytes.
    pub fn new<M: Model>(model: M, queues: &[u16], size: u16, arena: usize) -> Self {
        let device = WorkerDevice::with_options(model, LoopKind::Epoll.into()).expect("a device");
        let mut handler =
            DeviceRequestHandler::new(device, HandlerOptions::default()).expect("a handler");
        let (ours, theirs) = UnixStream::pair().expect("a socket");
        let thread = std::thread::spawn(move || {
            let _ = handler.run_blocking(theirs);
        });
        let front = Connection::from_fd(ours.into(), PATIENCE).expect("a connection");
        let mut vmm = Vmm::new(front, Wanted::default()).expect("negotiated");
        let memory = SharedMemory::with_size(16 << 20).expect("memory");
        let arena = memory.allocate(arena, 4096).expect("room");
        vmm.share_memory(memory.clone()).expect("shared");
        let setup = |index: &u16| QueueSetup { index: *index, size, indirect: 0 };
        let setups: Vec<_> = queues.iter().map(setup).collect();
        let queues = vmm.activate(&setups).expect("active");
        Self { queues, vmm, arena, memory, _thread: thread }
    }

    /// Guest address of a byte of the arena.
    pub fn at(&self, at: u64) -> u64 {
        self.arena.guest() + at
    }

    /// Puts bytes into the arena.
    pub fn store(&self, at: u64, bytes: &[u8]) {
        self.memory.view().write(self.at(at), bytes).expect("inside");
    }

    /// Bytes of the arena.
    pub fn load(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.view().read(self.at(at), &mut bytes).expect("inside");
        bytes
    }

    /// Offers a chain of places in the arena, and kicks.
    pub fn offer(
        &mut self,
        queue: usize,
        readable: &[(u64, u32)],
        writable: &[(u64, u32)],
        token: u64,
    ) {
        let base = self.arena.guest();
        let guest = |list: &[(u64, u32)]| -> Vec<_> {
            list.iter().map(|&(at, length)| (base + at, length)).collect()
        };
        let queue = &mut self.queues[queue];
        assert!(queue.add(&guest(readable), &guest(writable), token).expect("fits"), "a full ring");
        queue.kick().expect("kicked");
    }

    /// The next chain that comes back: its token and length.
    pub fn back(&mut self, queue: usize) -> (u64, u32) {
        let queue = &mut self.queues[queue];
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(done) = queue.pop().expect("a sound ring") {
                return done;
            }
            assert!(Instant::now() < until, "nothing comes back on queue {}", queue.index());
            queue.wait(PATIENCE).expect("waits");
        }
    }
}

/// An empty folder of this process, in memory where there is one. libFuzzer ends processes without a word: what those
/// before it left is removed.
pub fn folder(name: &str) -> PathBuf {
    let shared = PathBuf::from("/dev/shm");
    let place = if shared.is_dir() { shared } else { std::env::temp_dir() };
    let head = format!("outboard-fuzz-{name}-");
    for entry in std::fs::read_dir(&place).expect("a place for folders").flatten() {
        let (path, entry) = (entry.path(), entry.file_name());
        let pid = entry.to_str().and_then(|entry| entry.strip_prefix(&head));
        if pid.is_some_and(|pid| !PathBuf::from("/proc").join(pid).exists()) {
            let _ = std::fs::remove_dir_all(path);
        }
    }
    let own = place.join(format!("{head}{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&own);
    std::fs::create_dir(&own).expect("a folder");
    own
}

/// Cuts a range into up to `pieces` and one, none of them empty.
pub fn cut(
    input: &mut crate::input::Input<'_>,
    start: u64,
    length: usize,
    pieces: usize,
) -> Vec<(u64, u32)> {
    let (mut at, mut left, mut all) = (start, length, Vec::new());
    for _ in 0..input.below(pieces + 1) {
        let part = (usize::from(input.byte()) * 5 + 1).min(left);
        if part > 0 {
            all.push((at, part as u32));
        }
        (at, left) = (at + part as u64, left - part);
    }
    if left > 0 {
        all.push((at, left as u32));
    }
    all
}
