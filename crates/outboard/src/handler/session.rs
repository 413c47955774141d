//! One front-end's session: from its first byte until everything of it is gone.
//!
//! Messages are carried out one at a time and in order: nothing of the next is looked at before
//! the last is answered. A session that is dropped, at whatever await, stops its queues on the
//! spot.

use std::fmt;
use std::future::pending;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use outboard_memory::GuestMemory;
use outboard_protocol::{Backend, Offer, Refusal, Step, virtio};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::{debug, info, warn};

use super::channel::{Plug, drive};
use super::inflight::SessionInflight;
use super::iotlb::Iommu;
use super::log::SessionLog;
use super::postcopy::Postcopy;
use super::rings::HostRing;
use super::shown::Shown;
use super::state::StateDesk;
use super::{Ended, HandlerOptions, RING_FEATURES};
use crate::channel::BackendChannel;
use crate::connection::{Connection, Received};
use crate::device::{ConfigWrite, VhostUserDevice};
use crate::error::HostError;
use crate::reactor::{Raced, Reactor, block_on, race};
use crate::serving::ACCEPT_PAUSE;
use crate::take_over::{Door, Heir};

/// The longest message: header and the largest payload.
const BUFFER: usize = 12 + 4096;

/// What a session looks out for besides its front-end.
pub(crate) struct Attention<'a, R: Reactor> {
    /// Readable when the server is to stop.
    pub(crate) stop: Option<&'a R::Source>,
    /// Readable when another front-end knocks; what is to be done then (false: not possible now).
    pub(crate) knock: Option<(&'a R::Source, &'a (dyn Fn() -> bool + Sync))>,
    /// Where a new process asks to take over.
    pub(crate) door: Option<&'a Door<R>>,
}

impl<R: Reactor> Attention<'_, R> {
    /// Nothing.
    pub(crate) fn none() -> Self {
        Self { stop: None, knock: None, door: None }
    }

    /// Only the stop.
    pub(crate) fn stop_only(&self) -> Self {
        Self { stop: self.stop, ..Self::none() }
    }

    /// Resolves when a new process asks to take over.
    async fn heir(&self) -> Heir<R> {
        match self.door {
            Some(door) => door.heir().await,
            None => pending().await,
        }
    }

    /// Lets new processes in; never resolves.
    async fn keep_door(&self) {
        match self.door {
            Some(door) => door.keep().await,
            None => pending().await,
        }
    }

    /// Resolves when the server is to stop; sends others away meanwhile. Whoever knocks when the
    /// front-end on `socket` has left already is the next one, and waits.
    async fn stopped(&self, reactor: &R, socket: &OwnedFd) {
        let stop = async {
            match self.stop {
                Some(stop) => drop(reactor.readable(stop).await),
                None => pending().await,
            }
        };
        let knocks = async {
            let Some((listener, turn_away)) = &self.knock else { return pending().await };
            while reactor.readable(listener).await.is_ok() && !has_left(socket) {
                if !turn_away() {
                    // It knocks on, and without descriptors there is no way to make it stop.
                    reactor.sleep(ACCEPT_PAUSE).await;
                }
            }
            pending::<()>().await;
        };
        race(stop, knocks).await;
    }
}

/// Whether the peer has closed its end, whatever is still to be read.
fn has_left(socket: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut fds, Some(&now)), Ok(1..))
}

/// See the module.
pub(crate) struct Session<'h, D: VhostUserDevice, R: Reactor> {
    pub(super) device: &'h mut D,
    pub(super) options: &'h HandlerOptions,
    pub(super) reactor: R,
    pub(super) connection: Connection<R>,
    pub(super) channel: BackendChannel,
    pub(super) plug: Arc<Plug<R>>,
    /// The virtio status byte (SET_STATUS).
    pub(super) status: u8,
    pub(super) backend: Backend<OwnedFd>,
    /// Guest memory, by guest-physical and front-end addresses.
    pub(super) memory: Arc<GuestMemory>,
    pub(super) log: SessionLog,
    pub(super) inflight: SessionInflight,
    pub(super) iommu: Iommu,
    pub(super) rings: Vec<HostRing>,
    pub(super) postcopy: Option<Postcopy>,
    pub(super) state: StateDesk,
    /// How long a queue may take to stop or to take a change.
    pub(super) bound: Duration,
    /// A drain took longer than that: the session ends.
    pub(super) spent: bool,
    shown: Shown,
    closed: bool,
}

impl<D: VhostUserDevice, R: Reactor> fmt::Debug for Session<'_, D, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("rings", &self.rings).finish_non_exhaustive()
    }
}

impl<'h, D: VhostUserDevice, R: Reactor> Session<'h, D, R> {
    pub(crate) fn new(
        device: &'h mut D,
        options: &'h HandlerOptions,
        offer: Offer,
        reactor: R,
        socket: OwnedFd,
    ) -> Result<Self, HostError> {
        let rings = device.queues().iter().map(|_| HostRing::default()).collect();
        let channel = device.hooks().and_then(|hooks| hooks.back_end_channel()).unwrap_or_default();
        let memory = Arc::new(GuestMemory::new(0, Vec::new())?);
        let shown = Shown::new(&options.inspect, device.queues());
        Ok(Self {
            device,
            options,
            connection: Connection::new(reactor.clone(), socket)?,
            reactor,
            channel,
            plug: Arc::new(Plug::new()),
            status: 0,
            backend: Backend::new(offer),
            iommu: Iommu::new(&memory),
            memory,
            log: SessionLog::default(),
            inflight: SessionInflight::default(),
            rings,
            postcopy: None,
            state: StateDesk::default(),
            bound: options.drain_deadline,
            spent: false,
            shown,
            closed: false,
        })
    }

    /// Serves until the front-end leaves or the server stops.
    pub(crate) async fn serve(&mut self, attention: &Attention<'_, R>) -> Result<Ended, HostError> {
        let reactor = self.reactor.clone();
        let socket = self.connection.descriptor()?;
        let channel = drive(reactor.clone(), self.channel.clone(), Arc::clone(&self.plug));
        // Boxed: a future that is awaited inside another is part of it, and these are large.
        let beside = race(attention.stopped(&reactor, &socket), channel);
        let beside = Box::pin(race(beside, attention.keep_door()));
        match race(Box::pin(self.messages(attention)), beside).await {
            Raced::First(ended) => ended,
            Raced::Second(_) => {
                self.bound = self.bound.min(self.options.stop_deadline);
                Ok(Ended::Stopped)
            }
        }
    }

    async fn messages(&mut self, attention: &Attention<'_, R>) -> Result<Ended, HostError> {
        let mut buffer = vec![0; BUFFER];
        loop {
            self.steps().await?;
            let want = self.backend.wanted().clamp(1, BUFFER);
            let room = buffer.get_mut(..want).unwrap_or_default();
            let between = self.backend.at_message_boundary();
            let heir = async { if between { attention.heir().await } else { pending().await } };
            let device = &mut *self.device;
            let settled =
                async { if device.is_settled() { pending().await } else { device.settle().await } };
            let beside = race(heir, settled);
            let received = match race(self.connection.receive(room), beside).await {
                Raced::First(received) => received?,
                Raced::Second(Raced::Second(())) => {
                    self.device.enter_suspended_state().await?;
                    continue;
                }
                Raced::Second(Raced::First(heir)) => {
                    let Some(door) = attention.door else { continue };
                    let estate = door.estate().map_err(HostError::io("dup"));
                    if self.hand_over(heir, estate).await? {
                        return Ok(Ended::HandedOver);
                    }
                    continue;
                }
            };
            match received {
                Received::Bytes(count, fds) => {
                    self.backend.receive(room.get(..count).unwrap_or_default(), fds);
                }
                Received::End if self.backend.at_message_boundary() => return Ok(Ended::Left),
                Received::End => return Err(HostError::PartialMessage),
            }
        }
    }

    /// Carries out whole messages, and sends what is to be answered.
    async fn steps(&mut self) -> Result<(), HostError> {
        loop {
            self.note_broken_rings();
            self.log.look();
            self.inflight.look();
            let step = self.backend.poll();
            let step = match step {
                Ok(step) => step,
                Err(violation) => {
                    self.flush().await?;
                    return Err(violation.into());
                }
            };
            match step {
                Some(Step::Effect(effect)) => {
                    debug!("{}", effect.name());
                    self.carry_out(effect).await?;
                    let rings = &self.rings;
                    let broken = |ring| rings.get(ring).is_some_and(HostRing::is_broken);
                    self.shown.look(&self.backend, broken);
                }
                Some(Step::Violation(violation)) => warn!("front-end: {violation}"),
                None => return self.flush().await,
            }
            self.flush().await?;
        }
    }

    async fn flush(&mut self) -> Result<(), HostError> {
        while let Some(frame) = self.backend.transmit() {
            self.connection.send(frame).await?;
        }
        Ok(())
    }

    pub(super) async fn set_features(
        &mut self,
        features: u64,
        enable_all: bool,
    ) -> Result<(), Refusal> {
        let running = self.rings.iter().any(HostRing::is_running);
        let changed = self.backend.acked_features() ^ features;
        if running && changed & !(virtio::PROTOCOL_FEATURES | virtio::LOG_ALL) != 0 {
            return Err(Refusal::because("features cannot change while a ring runs"));
        }
        self.state.agrees(features).map_err(Refusal::because)?;
        let own = features & self.device.features() & !RING_FEATURES;
        self.device.ack_features(own).map_err(Refusal::because)?;
        self.set_log_all(features).await?;
        if enable_all {
            self.enable_all(true).await?;
        }
        Ok(())
    }

    pub(super) fn read_config(&self, offset: u32, size: u32) -> Result<Vec<u8>, Refusal> {
        // Bytes past the device's configuration read as zero: front-ends ask for the whole struct
        // that they know, which may be longer than ours.
        let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
        let inside = self.device.config_size().saturating_sub(offset).min(size);
        let inside = usize::try_from(inside).unwrap_or(0);
        if let Some(part) = bytes.get_mut(..inside).filter(|part| !part.is_empty()) {
            self.device.read_config(offset, part).map_err(Refusal::because)?;
        }
        Ok(bytes)
    }

    pub(super) fn write_config(
        &mut self,
        offset: u32,
        bytes: &[u8],
        migration: bool,
    ) -> Result<(), Refusal> {
        let size = self.device.config_size();
        let end = u64::from(offset) + bytes.len() as u64;
        if end > u64::from(size) {
            return Err(Refusal::because(format_args!(
                "configuration bytes {offset}..{end} of {size}"
            )));
        }
        let origin = if migration { ConfigWrite::Migration } else { ConfigWrite::Guest };
        self.device.write_config(offset, bytes, origin).map_err(Refusal::because)
    }

    /// RESET_DEVICE: memory, protocol features and channel stay.
    pub(super) async fn reset_device(&mut self) -> Result<(), HostError> {
        self.stop_all().await?;
        self.forget_state().await;
        self.device.reset().await?;
        self.channel.forget_mappings();
        Ok(())
    }

    /// Waits for what abandoned requests asked for, so that the device can let go of what it holds.
    async fn settle(&mut self) -> Result<(), HostError> {
        if self.device.is_settled() {
            return Ok(());
        }
        let late = self.reactor.sleep(self.left());
        match race(self.device.settle(), late).await {
            Raced::First(()) => Ok(self.device.enter_suspended_state().await?),
            Raced::Second(()) => {
                warn!("abandoned requests are still under way: the device keeps its claim");
                Ok(())
            }
        }
    }

    /// Stops what runs and closes what was received.
    pub(crate) async fn close(&mut self) -> Result<(), HostError> {
        self.postcopy_abandon();
        let stopped = self.stop_all().await.and(self.settle().await);
        self.end_transfer().await;
        self.channel.close();
        self.closed = true;
        info!("front-end left");
        stopped
    }
}

impl<D: VhostUserDevice, R: Reactor> Drop for Session<'_, D, R> {
    fn drop(&mut self) {
        if self.closed {
            return;
        }
        self.postcopy_abandon();
        match block_on(self.stop_all()) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!("session dropped: {error}"),
            Err(error) => warn!("session dropped: {error}"),
        }
        if let Err(error) = block_on(self.end_transfer()) {
            warn!("session dropped: {error}");
        }
        self.channel.close();
    }
}
