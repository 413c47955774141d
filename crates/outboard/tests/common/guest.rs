//! Devices on a thread that they share, each with a front-end of its own, and a load that counts its answers.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use outboard::{
    DeviceRequestHandler, Error, Fact, HandlerOptions, LoopKind, Plain, QueueSpec, SharedOptions,
    SharedThread, Worker, WorkerContext, WorkerDevice, WorkerOptions,
};
use outboard_frontend::{Connection, SharedMemory};

use super::{Echo, FEATURES, Finished, PATIENCE, PROTOCOL, Ring, rang, serve};

pub const BOTH: [LoopKind; 2] = [LoopKind::Epoll, LoopKind::Uring];

pub fn thread(event_loop: LoopKind) -> SharedThread {
    let options = SharedOptions { event_loop, ..SharedOptions::default() };
    SharedThread::start("shared", &options).unwrap()
}

/// A device of workers that `make` builds, on `thread`.
pub fn device<W: Worker + 'static>(
    name: &str,
    thread: &SharedThread,
    queues: usize,
    make: impl Fn(&mut WorkerContext<'_>) -> Result<W, Error> + Send + Sync + 'static,
) -> Result<WorkerDevice<Plain<W>>, Error> {
    let shared = vec![thread.clone()];
    let options = WorkerOptions { shared, name: name.to_owned(), ..WorkerOptions::default() };
    let queues = vec![QueueSpec::new("a", 1024); queues];
    WorkerDevice::with_options(Plain::new(&queues, make), options)
}

pub fn echo(thread: &SharedThread, name: &str) -> Guest<Echo> {
    Guest::of(device(name, thread, 1, |_| Ok(Echo)).unwrap())
}

/// What the thread shows under that name.
pub fn number(thread: &SharedThread, name: &str) -> Option<u64> {
    let facts = thread.inspect().facts();
    facts.into_iter().find_map(|(own, fact)| match fact {
        Fact::Number(number) if own == name => Some(number),
        _ => None,
    })
}

/// A device's front-end, its rings, and the end of its session.
pub struct Guest<W: Worker + 'static> {
    pub front: Connection,
    pub memory: SharedMemory,
    pub session: std::thread::JoinHandle<Finished<WorkerDevice<Plain<W>>>>,
    /// The front-end's socket, for what no front-end sends.
    pub raw: UnixStream,
    features: u64,
}

impl<W: Worker + Send + 'static> Guest<W> {
    pub fn of(device: WorkerDevice<Plain<W>>) -> Self {
        Self::with(device, FEATURES)
    }

    /// Its driver takes these features.
    pub fn with(device: WorkerDevice<Plain<W>>, features: u64) -> Self {
        let handler = DeviceRequestHandler::new(device, HandlerOptions::default()).unwrap();
        let (ours, session) = serve(handler);
        let raw = ours.try_clone().unwrap();
        let (front, memory) = negotiated(ours.into(), features);
        Self { front, memory, session, raw, features }
    }

    pub fn ring(&mut self, index: u16, size: u16) -> Ring {
        started(&mut self.front, &self.memory, self.features, index, size)
    }

    /// Its front-end leaves, then the device goes.
    pub fn leave(self) {
        drop((self.front, self.raw));
        drop(self.session.join().unwrap());
    }
}

/// A front-end that has negotiated and shares its memory.
pub fn negotiated(socket: std::os::fd::OwnedFd, features: u64) -> (Connection, SharedMemory) {
    let mut front = Connection::from_fd(socket, PATIENCE).unwrap();
    let memory = SharedMemory::with_size(4 << 20).unwrap();
    front.get_features().unwrap();
    front.get_protocol_features().unwrap();
    front.set_protocol_features(PROTOCOL).unwrap();
    front.set_features(features).unwrap();
    front.set_mem_table(memory.regions()).unwrap();
    (front, memory)
}

/// A ring of it that is set up, started and enabled.
pub fn started(
    front: &mut Connection,
    memory: &SharedMemory,
    features: u64,
    index: u16,
    size: u16,
) -> Ring {
    let ring = Ring::sized(memory, index, features, size);
    front.set_vring_num(index, size).unwrap();
    front.set_vring_addr(index, &ring.layout).unwrap();
    front.set_vring_call(index, &ring.call).unwrap();
    front.set_vring_err(index, &ring.err).unwrap();
    front.set_vring_kick(index, &ring.kick).unwrap();
    front.set_vring_enable(index, true).unwrap();
    ring
}

/// Requests without end, some always under way, each to be answered once and with its own bytes.
pub struct Load {
    pub ring: Ring,
    next: u64,
    /// Token of each one under way, and the place of its bytes.
    pending: BTreeMap<u64, usize>,
    free: Vec<usize>,
}

impl Load {
    const BYTES: usize = 8;

    /// At most 16 under way, of two descriptors each.
    pub fn on(ring: Ring) -> Self {
        let most = usize::from(ring.layout.size / 2).min(16);
        Self { ring, next: 0, pending: BTreeMap::new(), free: (0..most).collect() }
    }

    /// What a request holds. The first byte is no order to [`Echo`].
    fn text(token: u64) -> [u8; Self::BYTES] {
        (token << 8).to_le_bytes()
    }

    /// Offers what there is room for.
    pub fn fill(&mut self) {
        while let Some(place) = self.free.pop() {
            let (at, token) = (place * Self::BYTES, self.next);
            self.ring.data.write(at, &Self::text(token)).unwrap();
            self.ring.data.write(4096 + at, &[0xee; Self::BYTES]).unwrap();
            let (from, length) =
                (self.ring.data.guest() + at as u64, u32::try_from(Self::BYTES).unwrap());
            self.ring.driver.add(&[(from, length)], &[(from + 4096, length)], token).unwrap();
            self.pending.insert(token, place);
            self.next += 1;
        }
        if self.ring.driver.publish() {
            self.ring.kick();
        }
    }

    /// Waits for one answer, which is one of a request under way.
    fn take(&mut self) {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some((token, written)) = self.ring.driver.pop_used().unwrap() {
                let place = self.pending.remove(&token);
                let place =
                    place.unwrap_or_else(|| panic!("{token} is answered and not under way"));
                let mut back = [0; Self::BYTES];
                self.ring.data.read(4096 + place * Self::BYTES, &mut back).unwrap();
                assert_eq!((written as usize, back), (Self::BYTES, Self::text(token)));
                self.free.push(place);
                return;
            }
            assert!(Instant::now() < until, "no answer; {} under way", self.pending.len());
            if !self.ring.driver.arm() {
                rang(&self.ring.call, PATIENCE / 100);
            }
        }
    }

    /// As many answers more, and others under way behind them.
    pub fn go_on(&mut self, answers: usize) {
        for _ in 0..answers {
            self.fill();
            self.take();
        }
        self.fill();
    }

    /// The rest is answered, and nothing more.
    pub fn end(&mut self) {
        while !self.pending.is_empty() {
            self.take();
        }
        assert_eq!(self.ring.driver.pop_used().unwrap(), None);
    }
}
