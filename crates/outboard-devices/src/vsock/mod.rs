//! Sockets between a guest, its host and other guests: the device of virtio 1.3 §5.10, on Unix sockets.
//!
//! ```text
//!  guest ◀─ rings ─▶ worker ─▶ hub ─▶ table: entries ─▶ machine: what the guest is told, credit
//!                               │                   └─▶ link: the host's socket
//!                               ├─ host: PATH, PATH.seqpacket, PATH_port
//!                               └─ neighbours: other guests of this process, through pairs of sockets
//! ```
//! Invariants: a slow peer holds up its own connection only, in either direction; memory and descriptors of one
//! guest are bounded by its options, whatever it sends; bytes are never lost before an end.
//!
//! ```no_run
//! use outboard::{Server, WorkerDevice};
//! use outboard_devices::vsock::{Neighbours, Vsock, VsockOptions};
//!
//! let options = VsockOptions::new(3, "/run/vm.vsock");
//! let device = WorkerDevice::new(Vsock::new(options, &Neighbours::new())?)?;
//! Server::listen("/run/vsock.sock")?.serve(device)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod config;
mod connection;
mod credit;
mod host;
mod hub;
mod link;
mod neighbours;
mod packet;
mod ports;
mod stage;
mod state;
mod table;
mod worker;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outboard::{
    Counter, Error, Heirloom, Hooks, Inspect, MakeWorker, Model, QueueSpec, Saved, Snapshot,
};
use tracing::warn;

pub use config::{CONFIG_SIZE, feature, is_guest_cid};
pub use connection::{Connection, Heard, Phase};
pub use credit::{Credit, Lie};
use hub::Hub;
pub use neighbours::Neighbours;
use neighbours::{Gate, Membership};
pub use packet::{Address, HEADER, HOST_CID, Header, Kind, Op, Told, seq, shut};
pub use ports::Ports;
pub use state::STATE_VERSION;
use state::State;
pub use worker::VsockWorker;

/// Room for what a guest sends on one connection and the host has not taken, in bytes.
pub const ROOM: u32 = 256 << 10;
/// The least room: a packet of Linux is no longer than 64 KiB.
const LEAST_ROOM: u32 = 4096;
/// The most: what is sent to a host's socket at once has to fit it.
const MOST_ROOM: u32 = 1 << 30;
/// Connections of one guest at once.
pub const CONNECTIONS: usize = 1024;

/// Rings: receive, transmit, events.
const QUEUES: usize = 3;
/// The wrap counters in the base of a packed ring.
const WRAPS: u32 = 0x8000_8000;

/// What an operator can set about a guest's sockets.
#[derive(Clone, Debug)]
pub struct VsockOptions {
    /// The guest's address: 3 to 2^32 − 2.
    pub guest_cid: u64,
    /// Where the host's side listens; the guest's calls go to this path with `_port` behind it.
    pub uds_path: PathBuf,
    /// Ports of the host that the guest may call.
    pub host_ports: Ports,
    /// Ports of the guest that clients of the host may call.
    pub guest_ports: Ports,
    /// Guests reach each other that have a group in common.
    pub groups: Vec<String>,
    /// Connections at once.
    pub connections: usize,
    /// Room for what was sent and not yet taken, of each connection, in bytes.
    pub room: u32,
    /// Largest ring size: a power of two up to 32768.
    pub queue_size: u16,
    /// Takes the place of another process ([`outboard::Server::take_over`]): listens on what that hands over, and does
    /// not listen before.
    pub inherits: bool,
}

impl VsockOptions {
    /// Sockets of the guest `guest_cid` at `uds_path`, with everything else as usual.
    #[must_use]
    pub fn new(guest_cid: u64, uds_path: impl Into<PathBuf>) -> Self {
        Self {
            guest_cid,
            uds_path: uds_path.into(),
            host_ports: Ports::default(),
            guest_ports: Ports::default(),
            groups: vec!["default".to_owned()],
            connections: CONNECTIONS,
            room: ROOM,
            queue_size: 256,
            inherits: false,
        }
    }
}

/// What is counted, under the device's own names.
#[derive(Clone, Debug, Default)]
struct Counters {
    opened: Counter,
    refused: Counter,
    broken: Counter,
    malformed: Counter,
    from_guest: Counter,
    to_guest: Counter,
    host_events: Counter,
}

impl Counters {
    fn of(inspect: &Inspect) -> Self {
        Self {
            opened: inspect.counter("opened"),
            refused: inspect.counter("refused"),
            broken: inspect.counter("broken"),
            malformed: inspect.counter("malformed"),
            from_guest: inspect.counter("bytes-from-guest"),
            to_guest: inspect.counter("bytes-to-guest"),
            host_events: inspect.counter("host-events"),
        }
    }
}

/// What the worker and the model share. The model takes the lock while no ring runs.
#[derive(Debug)]
struct Shared {
    hub: Mutex<Hub>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Hub> {
        // A worker that panicked has lost its rings; the connections are sound.
        self.hub.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The model of a socket device; [`outboard::WorkerDevice`] makes a whole device of it.
#[derive(Debug)]
pub struct Vsock {
    shared: Arc<Shared>,
    guest_cid: u64,
    queue_size: u16,
    /// The rings that have started for the guest whose connections these are.
    met: [bool; QUEUES],
    _membership: Membership,
}

impl Vsock {
    /// Listens for clients of the host, and makes the guest known to its neighbours.
    ///
    /// # Errors
    /// The path cannot be listened on; the address is no guest's or somebody else's; an option makes no sense.
    pub fn new(options: VsockOptions, neighbours: &Neighbours) -> Result<Self, Error> {
        check_options(&options)?;
        let (guest_cid, queue_size) = (options.guest_cid, options.queue_size);
        let gate = Arc::new(Gate::new(options.groups.clone())?);
        let membership = neighbours.join(guest_cid, &gate)?;
        let hub = Mutex::new(Hub::new(options, neighbours.clone(), gate)?);
        let shared = Arc::new(Shared { hub });
        Ok(Self { shared, guest_cid, queue_size, met: [false; QUEUES], _membership: membership })
    }

    /// What the guest had is gone, whoever it is.
    fn forget(&mut self, owes_reset: bool) {
        let mut hub = self.shared.lock();
        hub.forget();
        hub.owes_reset = owes_reset;
        drop(hub);
        self.met = [owes_reset; QUEUES];
    }
}

fn check_options(options: &VsockOptions) -> Result<(), Error> {
    let VsockOptions { guest_cid, connections, room, queue_size: size, .. } = options;
    if !is_guest_cid(*guest_cid) {
        return Err(Error::refused(format!("address {guest_cid}: a guest has 3 to 4294967294")));
    }
    if *connections == 0 {
        return Err(Error::refused("no connection at all: at least one is wanted"));
    }
    if !(LEAST_ROOM..=MOST_ROOM).contains(room) {
        return Err(Error::refused(format!("room for {room} bytes: {LEAST_ROOM} to {MOST_ROOM}")));
    }
    if !size.is_power_of_two() || *size > 32768 {
        return Err(Error::refused(format!(
            "queue size {size}: it must be a power of two up to 32768"
        )));
    }
    Ok(())
}

impl Model for Vsock {
    type Worker = VsockWorker;

    fn queues(&self) -> Vec<QueueSpec> {
        let size = self.queue_size;
        vec![QueueSpec::new("rx", size), QueueSpec::new("tx", size), QueueSpec::new("event", size)]
    }

    fn make_worker(&self) -> MakeWorker<VsockWorker> {
        let shared = Arc::clone(&self.shared);
        Arc::new(move |context| VsockWorker::new(Arc::clone(&shared), context))
    }

    fn shows(&mut self, inspect: &Inspect) {
        self.shared.lock().shows(Counters::of(inspect));
    }

    fn features(&self) -> u64 {
        feature::STREAM | feature::SEQPACKET | feature::NO_IMPLIED_STREAM
    }

    fn ack_features(&mut self, features: u64) -> Result<(), Error> {
        self.shared.lock().features = features;
        Ok(())
    }

    fn config_size(&self) -> u32 {
        CONFIG_SIZE
    }

    fn read_config(&self, offset: u32, bytes: &mut [u8]) -> Result<(), Error> {
        config::read(self.guest_cid, offset, bytes);
        Ok(())
    }

    fn ring_starts(&mut self, queue: u16, base: u32) {
        let Some(met) = self.met.get_mut(usize::from(queue)) else { return };
        if !std::mem::replace(met, true) && base & !WRAPS != 0 {
            // Another process, which was killed, has served this driver: what it had open is gone.
            self.shared.lock().owes_reset = true;
        }
    }

    fn front_end_left(&mut self) {
        self.forget(false);
    }

    fn reset(&mut self) -> Result<(), Error> {
        self.forget(false);
        Ok(())
    }

    fn device_type(&self) -> String {
        "vsock".to_owned()
    }

    fn snapshot(&mut self) -> Result<Snapshot, Error> {
        let mut hub = self.shared.lock();
        let connections = hub.rests().then(|| hub.connections());
        Ok(State::save(self.guest_cid, connections))
    }

    fn restore(&mut self, saved: Saved<'_>) -> Result<(), Error> {
        let state = State::read(saved, self.guest_cid)?;
        match state.connections {
            None => self.forget(true),
            Some(connections) => {
                self.shared.lock().restore(connections)?;
                self.met = [true; QUEUES];
            }
        }
        Ok(())
    }

    fn hooks(&mut self) -> Option<&mut dyn Hooks> {
        Some(self)
    }
}

/// A live upgrade: listeners, clients and connections go along.
impl Hooks for Vsock {
    fn hand_over(&mut self) -> Result<Vec<Heirloom>, Error> {
        self.shared.lock().give()
    }

    fn handed_over(&mut self, gone: bool) {
        let mut hub = self.shared.lock();
        if gone { hub.leave() } else { hub.wake() }
    }

    fn inherit(&mut self, heirlooms: Vec<Heirloom>) -> Result<(), Error> {
        self.shared.lock().receive(heirlooms)
    }

    fn inherited(&mut self) {
        if let Err(error) = self.shared.lock().own() {
            warn!("nobody is let in any more: {error}");
        }
    }
}
