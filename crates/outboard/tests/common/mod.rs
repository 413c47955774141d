//! What the handler's tests share: an echo device, and a front-end that is driven message by
//! message over a socket pair.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests; each test file uses a part"
)]

pub mod guest;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use outboard::protocol::{ProtocolFeatures, virtio};
use outboard::{
    DeviceRequestHandler, Ended, Error, HandlerOptions, HostError, LoopKind, MakeWorker, Model,
    QueueSpec, Request, Served, Worker, WorkerDevice,
};
use outboard_frontend::{Buffer, Connection, SharedMemory};
use outboard_queue::{DriverQueue, QueueLayout};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// How long anything may take before a test fails.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Entries of a test ring.
pub const SIZE: u16 = 16;
/// Features that the test front-end takes.
pub const FEATURES: u64 = virtio::VERSION_1
    | virtio::PROTOCOL_FEATURES
    | virtio::RING_EVENT_IDX
    | virtio::RING_INDIRECT_DESC;

/// Protocol features that the test front-end takes.
pub const PROTOCOL: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::RESET_DEVICE)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS);

/// Answers each request with its own bytes; b'!' as the first one panics, b'?' fails.
pub struct Echo;

impl Worker for Echo {
    fn serve(&mut self, mut request: Request<'_>) -> Result<Served, Error> {
        let mut bytes = vec![0; usize::try_from(request.readable().len()).unwrap()];
        request.readable().read_exact(&mut bytes)?;
        match bytes.first() {
            Some(b'!') => panic!("as the test asked"),
            Some(b'?') => return Err(Error::refused("as the test asked")),
            _ => {}
        }
        request.writable().write_all(&bytes)?;
        Ok(request.done(u32::try_from(bytes.len()).unwrap()))
    }
}

/// What the echo device did, seen from outside.
#[derive(Default)]
pub struct Seen {
    pub resumed: AtomicU32,
    pub suspended: AtomicU32,
    pub reset: AtomicU32,
}

/// Two queues that hold their requests while disabled, one that transmits.
pub struct EchoModel {
    pub seen: Arc<Seen>,
    pub threads: usize,
    pub config: [u8; 8],
}

impl Model for EchoModel {
    type Worker = Echo;

    fn queues(&self) -> Vec<QueueSpec> {
        vec![QueueSpec::new("a", 1024), QueueSpec::new("b", 1024), QueueSpec::transmit("tx", 1024)]
    }

    fn make_worker(&self) -> MakeWorker<Echo> {
        Arc::new(|_| Ok(Echo))
    }

    fn threads(&self) -> usize {
        self.threads
    }

    fn features(&self) -> u64 {
        0b111
    }

    fn ack_features(&mut self, features: u64) -> Result<(), Error> {
        match features & 0b100 {
            0 => Ok(()),
            _ => Err(Error::refused("bit 2 is never taken")),
        }
    }

    fn config_size(&self) -> u32 {
        8
    }

    fn read_config(&self, offset: u32, bytes: &mut [u8]) -> Result<(), Error> {
        let at = usize::try_from(offset).unwrap();
        bytes.copy_from_slice(&self.config[at..at + bytes.len()]);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Error> {
        self.seen.resumed.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn suspend(&mut self) -> Result<(), Error> {
        self.seen.suspended.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Error> {
        self.seen.reset.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

pub fn echo(kind: LoopKind, threads: usize) -> (WorkerDevice<EchoModel>, Arc<Seen>) {
    let seen = Arc::new(Seen::default());
    let model = EchoModel { seen: Arc::clone(&seen), threads, config: *b"OUTBOARD" };
    (WorkerDevice::with_options(model, kind.into()).unwrap(), seen)
}

/// What the handler's thread leaves behind.
pub type Finished<D> = (Result<Ended, HostError>, DeviceRequestHandler<D>);

/// A handler that serves one connection on a thread.
pub fn serve<D: outboard::VhostUserDevice + 'static>(
    mut handler: DeviceRequestHandler<D>,
) -> (UnixStream, JoinHandle<Finished<D>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let ended = handler.run_blocking(theirs);
        (ended, handler)
    });
    (ours, thread)
}

/// A front-end on one end of a socket pair, an echo device on the other.
pub struct Rig {
    pub front: Connection,
    pub memory: SharedMemory,
    pub seen: Arc<Seen>,
    pub thread: JoinHandle<Finished<WorkerDevice<EchoModel>>>,
}

impl Rig {
    /// Connected, nothing negotiated.
    pub fn bare(kind: LoopKind, options: HandlerOptions) -> Self {
        let (device, seen) = echo(kind, 1);
        let (ours, thread) = serve(DeviceRequestHandler::new(device, options).unwrap());
        let front = Connection::from_fd(ours.into(), PATIENCE).unwrap();
        let memory = SharedMemory::with_size(1 << 20).unwrap();
        Self { front, memory, seen, thread }
    }

    /// Negotiated, memory shared.
    pub fn ready(kind: LoopKind) -> Self {
        let mut rig = Self::bare(kind, HandlerOptions::default());
        rig.negotiate(FEATURES);
        rig.front.set_mem_table(rig.memory.regions()).unwrap();
        rig
    }

    /// SET_OWNER to SET_FEATURES.
    pub fn negotiate(&mut self, features: u64) {
        self.front.set_owner().unwrap();
        let offered = self.front.get_features().unwrap();
        assert_eq!(offered & features, features, "offered: {offered:#x}");
        let protocol = self.front.get_protocol_features().unwrap();
        assert!(protocol.contains(PROTOCOL), "offered: {protocol:?}");
        self.front.set_protocol_features(PROTOCOL | ProtocolFeatures::CONFIG).unwrap();
        self.front.set_features(features).unwrap();
    }

    /// A ring in shared memory, not yet known to the back-end.
    pub fn ring(&self, index: u16) -> Ring {
        Ring::new(&self.memory, index, FEATURES)
    }

    /// A ring that is set up, started and enabled.
    pub fn started(&mut self, index: u16) -> Ring {
        let ring = self.ring(index);
        self.set_up(&ring);
        self.front.set_vring_kick(index, &ring.kick).unwrap();
        self.front.set_vring_enable(index, true).unwrap();
        ring
    }

    /// NUM, ADDR, BASE, CALL, ERR.
    pub fn set_up(&mut self, ring: &Ring) {
        let index = ring.index;
        self.front.set_vring_num(index, SIZE).unwrap();
        self.front.set_vring_addr(index, &ring.layout).unwrap();
        self.front.set_vring_base(index, 0).unwrap();
        self.front.set_vring_call(index, &ring.call).unwrap();
        self.front.set_vring_err(index, &ring.err).unwrap();
    }

    /// The front-end leaves; how the session ended.
    pub fn leave(self) -> Finished<WorkerDevice<EchoModel>> {
        drop(self.front);
        self.thread.join().unwrap()
    }
}

/// The driver's side of one ring.
pub struct Ring {
    pub index: u16,
    pub layout: QueueLayout,
    pub driver: DriverQueue,
    pub kick: OwnedFd,
    pub call: OwnedFd,
    pub err: OwnedFd,
    pub area: Buffer,
    pub data: Buffer,
    pub patience: Duration,
}

pub fn doorbell() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// Whether `fd` becomes readable within `time`; empties it.
pub fn rang(fd: impl AsFd, time: Duration) -> bool {
    let time = Timespec::try_from(time).unwrap();
    let ready = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&time)).unwrap() > 0;
    if ready {
        let _ = rustix::io::read(&fd, &mut [0; 8]);
    }
    ready
}

impl Ring {
    pub fn new(memory: &SharedMemory, index: u16, features: u64) -> Self {
        Self::sized(memory, index, features, SIZE)
    }

    /// Of `size` entries, at most 64.
    pub fn sized(memory: &SharedMemory, index: u16, features: u64, size: u16) -> Self {
        let area = memory.allocate(4096, 4096).unwrap();
        area.fill(0).unwrap();
        let data = memory.allocate(8192, 4096).unwrap();
        let packed = features & virtio::RING_PACKED != 0;
        let lay = if packed { QueueLayout::packed_at } else { QueueLayout::split_at };
        let (layout, _) = lay(area.guest(), size).unwrap();
        let driver = DriverQueue::new(layout, features, memory.view()).unwrap();
        let (kick, call, err) = (doorbell(), doorbell(), doorbell());
        Self { index, layout, driver, kick, call, err, area, data, patience: PATIENCE }
    }

    /// Offers one request with this text, without a kick.
    pub fn offer(&mut self, text: &[u8]) {
        self.data.write(0, text).unwrap();
        self.data.write(4096, &vec![0; text.len()]).unwrap();
        let length = u32::try_from(text.len()).unwrap();
        let guest = self.data.guest();
        self.driver.add(&[(guest, length)], &[(guest + 4096, length)], 7).unwrap();
        self.driver.publish();
    }

    pub fn kick(&self) {
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
    }

    /// The length that came back, within the patience.
    pub fn answered(&mut self) -> u32 {
        let until = Instant::now() + self.patience;
        loop {
            if let Some((token, written)) = self.driver.pop_used().unwrap() {
                assert_eq!(token, 7);
                return written;
            }
            assert!(Instant::now() < until, "no answer on ring {}", self.index);
            if !self.driver.arm() {
                rang(&self.call, Duration::from_millis(20));
            }
        }
    }

    /// Whether anything comes back within `time`.
    pub fn silent_for(&mut self, time: Duration) -> bool {
        std::thread::sleep(time);
        self.driver.pop_used().unwrap().is_none()
    }

    /// One round: offered, kicked, answered, right.
    pub fn round(&mut self, text: &[u8]) {
        self.offer(text);
        self.kick();
        self.expect(text);
    }

    pub fn expect(&mut self, text: &[u8]) {
        assert_eq!(self.answered() as usize, text.len());
        let mut back = vec![0; text.len()];
        self.data.read(4096, &mut back).unwrap();
        assert_eq!(back, text);
    }
}

/// Open descriptors of this process.
pub fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
