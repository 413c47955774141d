//! `DeviceRequestHandler`: carries out the vhost-user protocol on a device (contract §2).
//!
//! ```text
//!   Connection ─bytes, fds─▶ Backend (pure) ─Effect + Ticket─▶ Session ─▶ VhostUserDevice
//!       ▲                        │  ▲ answer(Ticket, …)           │  changes, through the mailbox
//!       └──────── Frame ─────────┘  └──────────────────────────────┘        ▼
//!                                                                     queues on their workers
//! ```
//! One session serves one front-end. Invariant: when a session is over, for whatever reason and
//! also when its future is dropped at an await, every queue has been stopped and drained and every
//! descriptor it received is closed; the device is ready for the next front-end.

mod by_hand;
mod channel;
#[cfg(test)]
mod deadlines;
mod dispatch;
mod extras;
mod hand_over;
mod inflight;
mod iotlb;
mod log;
mod memory;
mod postcopy;
mod rings;
mod session;
mod shown;
mod state;
mod transfer;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use outboard_memory::UserFault;
use outboard_protocol::{Offer, ProtocolFeatures, virtio};

use crate::device::VhostUserDevice;
use crate::error::{Error, HostError};
use crate::inspect::Inspect;
use crate::reactor::{Parker, Reactor, block_on};
use crate::take_over::{FrontEnd, Heir};
pub use by_hand::ByHand;
pub(crate) use hand_over::bequeath;
pub(crate) use session::{Attention, Session};
use state::StateDesk;

/// Regions of guest memory that fit the table (GET_MAX_MEM_SLOTS).
pub(crate) const MEM_SLOTS: u64 = 509;

/// Feature bits that the framework carries for every device.
pub(crate) const RING_FEATURES: u64 = virtio::RING_INDIRECT_DESC
    | virtio::RING_EVENT_IDX
    | virtio::RING_PACKED
    | virtio::VERSION_1
    | virtio::RING_RESET
    | virtio::LOG_ALL
    | virtio::ACCESS_PLATFORM;

/// Protocol features that the framework carries for every device.
const PROTOCOL_FEATURES: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::LOG_SHMFD)
    .union(ProtocolFeatures::INFLIGHT_SHMFD)
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::BACKEND_REQ)
    .union(ProtocolFeatures::RESET_DEVICE)
    .union(ProtocolFeatures::INBAND_NOTIFICATIONS)
    .union(ProtocolFeatures::STATUS)
    .union(ProtocolFeatures::GPA_ADDRESSES)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(ProtocolFeatures::DEVICE_STATE);

/// What an operator can set about the handler.
#[derive(Clone, Debug)]
pub struct HandlerOptions {
    /// Feature bits that are not offered, to test a front-end or to work around one.
    pub without_features: u64,
    /// Protocol features that are not offered.
    pub without_protocol_features: ProtocolFeatures,
    /// How long a queue may take to finish its requests when it is stopped, and to take a change.
    pub drain_deadline: Duration,
    /// The same once the server was told to stop.
    pub stop_deadline: Duration,
    /// How long a start waits for what another process still holds ([`Error::Busy`]): one that was
    /// killed keeps its locks for as long as the kernel works on what it had asked for. Zero: it is
    /// refused at once.
    pub claim_patience: Duration,
    /// Keep what a new process needs to take over: the descriptors of guest memory.
    pub hand_over: bool,
    /// Bytes that a device's own state may have, saved or loaded.
    pub state_limit: u64,
    /// How long a transfer of device state may take.
    pub state_deadline: Duration,
    /// Device state goes over pipes of ours, whatever descriptor the front-end sends.
    pub own_state_channel: bool,
    /// Where the session and its rings show themselves.
    pub inspect: Inspect,
}

impl Default for HandlerOptions {
    fn default() -> Self {
        Self {
            without_features: 0,
            without_protocol_features: ProtocolFeatures::empty(),
            drain_deadline: Duration::from_secs(30),
            stop_deadline: Duration::from_secs(2),
            claim_patience: Duration::from_secs(1),
            hand_over: false,
            state_limit: 64 << 20,
            state_deadline: Duration::from_secs(60),
            own_state_channel: false,
            inspect: Inspect::new(),
        }
    }
}

/// A session to be taken over from another process.
pub(crate) struct Inheritance<R: Reactor> {
    pub(crate) front_end: FrontEnd,
    pub(crate) mappings: Vec<(u8, u64, u64)>,
    /// When its rings stopped.
    pub(crate) stopped: u64,
    /// The other process.
    pub(crate) heir: Heir<R>,
}

/// How a session ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The front-end left between two messages.
    Left,
    /// The server was told to stop.
    Stopped,
    /// A new process has taken over.
    HandedOver,
}

/// See the module.
#[derive(Debug)]
pub struct DeviceRequestHandler<D> {
    device: D,
    options: HandlerOptions,
    /// Held by each thread that moves device state: one at a time, however many front-ends come.
    transfers: Arc<()>,
}

impl<D: VhostUserDevice> DeviceRequestHandler<D> {
    /// A handler for `device`, which is put into its suspended state.
    ///
    /// # Errors
    /// The device cannot enter its suspended state, or its queues are more than 256 or of a size
    /// that no split ring has.
    pub fn new(device: D, options: HandlerOptions) -> Result<Self, HostError> {
        let mut handler = Self { device, options, transfers: Arc::default() };
        check_queues(&handler.device)?;
        let suspended = block_on(handler.device.enter_suspended_state());
        suspended.map_err(HostError::io("poll"))??;
        Ok(handler)
    }

    /// Serves one front-end until it leaves; then the handler can serve the next one. Runs on any
    /// executor.
    ///
    /// # Errors
    /// The front-end left inside a message or its stream was out of step; a queue could not be
    /// stopped. The queues that could be are stopped all the same.
    #[cfg(feature = "async-io")]
    pub async fn run(&mut self, connection: UnixStream) -> Result<Ended, HostError> {
        self.run_on(crate::reactor::AsyncIo, connection.into(), Attention::none()).await
    }

    /// As `run`, on the calling thread.
    ///
    /// # Errors
    /// As `run`.
    pub fn run_blocking(&mut self, connection: UnixStream) -> Result<Ended, HostError> {
        let session = self.run_on(Parker, connection.into(), Attention::none());
        block_on(session).map_err(HostError::io("poll"))?
    }

    /// As `run`, but nobody waits: the caller polls the session with [`ByHand::turn`].
    pub fn by_hand(&mut self, connection: UnixStream) -> ByHand<'_> {
        ByHand::new(self.run_on(Parker, connection.into(), Attention::none()))
    }

    pub(crate) async fn run_on<R: Reactor>(
        &mut self,
        reactor: R,
        socket: OwnedFd,
        attention: Attention<'_, R>,
    ) -> Result<Ended, HostError> {
        let offer = self.offer();
        let mut session = Session::new(&mut self.device, &self.options, offer, reactor, socket)?;
        session.state = StateDesk::new(Arc::clone(&self.transfers));
        let ended = session.serve(&attention).await;
        let closed = session.close().await;
        drop(session);
        self.has_ended(&ended);
        // Why it ended matters more than what went wrong afterwards.
        let ended = ended?;
        closed.map(|()| ended)
    }

    /// As `run_on`, taking a session over from another process: first it plays the front-end, then
    /// its word and the front-end's own socket come.
    pub(crate) async fn inherit_on<R: Reactor>(
        &mut self,
        reactor: R,
        inheritance: Inheritance<R>,
        attention: Attention<'_, R>,
    ) -> Result<Ended, HostError> {
        let Inheritance { front_end: FrontEnd { play, socket }, mappings, stopped, heir } =
            inheritance;
        let offer = self.offer();
        let mut session = Session::new(&mut self.device, &self.options, offer, reactor, play)?;
        session.state = StateDesk::new(Arc::clone(&self.transfers));
        session.inherit_mappings(mappings);
        let mut ended = session.serve(&attention.stop_only()).await;
        if matches!(ended, Ok(Ended::Left)) {
            ended = match session.inherit(&heir, socket, stopped).await {
                Ok(()) => session.serve(&attention).await,
                Err(error) => Err(error),
            };
        }
        drop(heir);
        let closed = session.close().await;
        drop(session);
        self.has_ended(&ended);
        let ended = ended?;
        closed.map(|()| ended)
    }

    fn has_ended(&mut self, ended: &Result<Ended, HostError>) {
        if !matches!(ended, Ok(Ended::HandedOver)) {
            self.device.front_end_left();
        }
    }

    /// What is offered to a front-end.
    fn offer(&mut self) -> Offer {
        let mut protocol_features = PROTOCOL_FEATURES;
        let mut gpu_socket = false;
        if let Some(hooks) = self.device.hooks() {
            protocol_features |= hooks.protocol_features();
            gpu_socket = hooks.takes_gpu_socket();
            if !hooks.shared_memory().is_empty() {
                protocol_features |= ProtocolFeatures::SHMEM | ProtocolFeatures::BACKEND_SEND_FD;
            }
        }
        if UserFault::is_available() {
            protocol_features |= ProtocolFeatures::PAGEFAULT;
        }
        let device = &self.device;
        if device.config_size() > 0 {
            protocol_features |= ProtocolFeatures::CONFIG;
        }
        if device.can_abandon() {
            protocol_features |=
                ProtocolFeatures::GET_VRING_BASE_INFLIGHT | ProtocolFeatures::SKIP_DRAIN;
        }
        let largest = device.queues().iter().map(|queue| queue.max_size).max();
        let mut protocol_features = protocol_features - self.options.without_protocol_features;
        // Each needs the one before.
        if !protocol_features.contains(ProtocolFeatures::INFLIGHT_SHMFD) {
            protocol_features -= ProtocolFeatures::GET_VRING_BASE_INFLIGHT;
        }
        if !protocol_features.contains(ProtocolFeatures::GET_VRING_BASE_INFLIGHT) {
            protocol_features -= ProtocolFeatures::SKIP_DRAIN;
        }
        let mut features = (RING_FEATURES | device.features()) & !self.options.without_features;
        // Misses are told over the channel.
        if !protocol_features.contains(ProtocolFeatures::BACKEND_REQ | ProtocolFeatures::REPLY_ACK)
        {
            features &= !virtio::ACCESS_PLATFORM;
        }
        Offer {
            features,
            protocol_features,
            queues: u16::try_from(device.queues().len()).unwrap_or(u16::MAX),
            max_queue_size: largest.unwrap_or(1),
            mem_slots: MEM_SLOTS,
            gpu_socket,
        }
    }

    /// The device and the handler part.
    pub fn into_device(self) -> D {
        self.device
    }
}

impl<D> AsRef<D> for DeviceRequestHandler<D> {
    fn as_ref(&self) -> &D {
        &self.device
    }
}

impl<D> AsMut<D> for DeviceRequestHandler<D> {
    fn as_mut(&mut self) -> &mut D {
        &mut self.device
    }
}

/// Vhost-user can address 256 rings, and a split ring has 32768 entries at most.
fn check_queues(device: &impl VhostUserDevice) -> Result<(), Error> {
    let queues = device.queues();
    if queues.is_empty() || queues.len() > 256 {
        return Err(Error::refused(format!("{} queues: 1 to 256 can be served", queues.len())));
    }
    for queue in queues {
        if !queue.max_size.is_power_of_two() || queue.max_size > 32768 {
            return Err(Error::refused(format!(
                "queue {} of {} entries: a power of two up to 32768 is needed",
                queue.name, queue.max_size
            )));
        }
    }
    Ok(())
}
