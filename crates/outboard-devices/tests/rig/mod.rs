//! Any device of this crate on one end of a socket pair, our front-end with its queues on the other.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use outboard::protocol::ProtocolFeatures;
use outboard::{LoopKind, Model, Server, WorkerDevice, WorkerOptions};
use outboard_frontend::{Buffer, Connection, QueueSetup, SharedMemory, Virtqueue, Vmm, Wanted};

/// How long anything may take before a test fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
const ARENA: usize = 8 << 20;

/// A device that is served on a thread, and the way to it.
pub(crate) fn serve<M: Model>(
    model: M,
    events: impl Into<WorkerOptions>,
) -> (Connection, JoinHandle<()>) {
    let device = WorkerDevice::with_options(model, events.into()).expect("a device");
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let server = Server::from_socket(theirs.into()).expect("a server");
    let server = std::thread::spawn(move || {
        server.serve(device).expect("served to the end");
    });
    (Connection::from_fd(OwnedFd::from(ours), PATIENCE).expect("connected"), server)
}

/// A driver of one device. Fields in the order in which they go.
pub(crate) struct Rig {
    pub(crate) queues: Vec<Virtqueue>,
    pub(crate) vmm: Vmm,
    pub(crate) arena: Buffer,
    pub(crate) memory: SharedMemory,
    pub(crate) server: Option<JoinHandle<()>>,
}

impl Rig {
    /// Starts the device and negotiates all that is offered and in `mask`.
    pub(crate) fn asleep<M: Model>(model: M, events: LoopKind, mask: u64) -> Self {
        let (connection, server) = serve(model, events);
        Self::before(connection, server, mask)
    }

    /// As [`Rig::asleep`], of a device that is served already.
    pub(crate) fn before(connection: Connection, server: JoinHandle<()>, mask: u64) -> Self {
        Self::with(connection, server, mask, Wanted::default())
    }

    /// The same, with what is wanted of it.
    pub(crate) fn with(
        connection: Connection,
        server: JoinHandle<()>,
        mask: u64,
        mut wanted: Wanted,
    ) -> Self {
        wanted.protocol |= ProtocolFeatures::RESET_DEVICE
            | ProtocolFeatures::STATUS
            | ProtocolFeatures::RARP
            | ProtocolFeatures::MTU;
        let mut vmm = Vmm::new(connection, wanted.with_channel()).expect("negotiated");
        vmm.mask_features(mask);
        let memory = SharedMemory::with_size(64 << 20).expect("memory");
        let arena = memory.allocate(ARENA, 4096).expect("room");
        vmm.share_memory(memory.clone()).expect("shared");
        Self { queues: Vec::new(), vmm, arena, memory, server: Some(server) }
    }

    /// Starts queues of so many entries.
    pub(crate) fn activate(&mut self, queues: &[u16], size: u16) {
        let setup = |index: &u16| QueueSetup { index: *index, size, indirect: 0 };
        let setups: Vec<_> = queues.iter().map(setup).collect();
        self.queues = self.vmm.activate(&setups).expect("active");
    }

    /// Guest address of byte `at` of the arena.
    pub(crate) fn at(&self, at: u64) -> u64 {
        assert!(usize::try_from(at).expect("small") < ARENA, "behind the arena");
        self.arena.guest() + at
    }

    /// Offers a chain on the queue at place `queue`, and kicks.
    pub(crate) fn offer(
        &mut self,
        queue: usize,
        readable: &[(u64, u32)],
        writable: &[(u64, u32)],
        token: u64,
    ) {
        let queue = self.queues.get_mut(queue).expect("active");
        assert!(queue.add(readable, writable, token).expect("fits"), "the ring is full");
        queue.kick().expect("kicked");
    }

    /// The next chain that comes back: its token and length.
    pub(crate) fn back(&mut self, queue: usize) -> (u64, u32) {
        let queue = self.queues.get_mut(queue).expect("active");
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(done) = queue.pop().expect("a sound ring") {
                return done;
            }
            assert!(Instant::now() < until, "nothing comes back on queue {}", queue.index());
            queue.wait(PATIENCE).expect("waits");
        }
    }

    /// Whether something has come back.
    pub(crate) fn is_back(&mut self, queue: usize) -> bool {
        self.if_back(queue).is_some()
    }

    /// The next chain that has come back.
    pub(crate) fn if_back(&mut self, queue: usize) -> Option<(u64, u32)> {
        self.queues.get_mut(queue).expect("active").pop().expect("a sound ring")
    }

    pub(crate) fn store(&self, guest: u64, bytes: &[u8]) {
        self.memory.view().write(guest, bytes).expect("stored");
    }

    pub(crate) fn load(&self, guest: u64, length: u32) -> Vec<u8> {
        let mut bytes = vec![0; length as usize];
        self.memory.view().read(guest, &mut bytes).expect("loaded");
        bytes
    }

    /// Disconnects and waits for the device to end.
    pub(crate) fn end(self) {
        let Self { queues, vmm, arena, memory, server } = self;
        drop((queues, vmm, arena, memory));
        server.expect("running").join().expect("ended well");
    }
}
