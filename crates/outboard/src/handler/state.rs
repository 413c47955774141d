//! Device state: saved, loaded and applied (contract §2; vhost-user messages 42 and 43).
//!
//! The state is taken when SET_DEVICE_STATE_FD comes (no ring runs) and moved by a thread
//! (`transfer.rs`); a loaded one is applied as a whole when CHECK_DEVICE_STATE asks for the
//! outcome, and no ring starts between the two. A ring that starts while a state is being saved
//! makes that state an old one: CHECK_DEVICE_STATE then says so. What fails leaves the device as it
//! was, ready to run, to save and to load.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use outboard_protocol::{Refusal, StateDirection};
use rustix::pipe::{PipeFlags, pipe_with};
use tracing::{info, warn};

use super::session::Session;
use super::transfer::{Bounds, Job, Transfer, can_carry};
use crate::device::VhostUserDevice;
use crate::error::{Error, HostError};
use crate::reactor::{Raced, Reactor, race};
use crate::snapshot::{DeviceState, Fit, PASSING, StateError};

/// What a session knows of transfers.
#[derive(Debug, Default)]
pub(super) struct StateDesk {
    transfer: Option<Transfer>,
    /// Features of the state that was restored, until its first ring starts.
    restored: Option<u64>,
    /// A ring has started since the state was taken.
    outdated: bool,
    /// Held by the handler, by this and by each thread.
    threads: Arc<()>,
}

impl StateDesk {
    /// For a session of the handler that holds `threads`.
    pub(super) fn new(threads: Arc<()>) -> Self {
        Self { threads, ..Self::default() }
    }

    /// Whether a thread of an earlier transfer hangs in the kernel.
    fn hangs(&self) -> bool {
        Arc::strong_count(&self.threads) > 2
    }

    /// Whether a state is coming in, and rings have to wait for it.
    pub(super) fn holds_rings(&self) -> bool {
        self.transfer.as_ref().is_some_and(|one| one.direction() == StateDirection::Load)
    }

    /// A ring has started: from here on the device lives its own life.
    pub(super) fn ring_started(&mut self) {
        self.restored = None;
        self.outdated = true;
    }

    /// Whether these features are those of the state that was restored, if one was.
    pub(super) fn agrees(&self, negotiated: u64) -> Result<(), StateError> {
        let negotiated = negotiated & !PASSING;
        match self.restored {
            Some(features) if features != negotiated => {
                Err(StateError::Negotiated { features, negotiated })
            }
            _ => Ok(()),
        }
    }
}

impl<D: VhostUserDevice, R: Reactor> Session<'_, D, R> {
    /// SET_DEVICE_STATE_FD: the answer is a descriptor of ours, if the front-end is to use that.
    pub(super) async fn set_state_fd(
        &mut self,
        direction: StateDirection,
        fd: OwnedFd,
    ) -> Result<Option<OwnedFd>, Refusal> {
        // A front-end that changed its mind, or whose migration was called off.
        self.end_transfer().await;
        if self.state.hangs() {
            return Err(Refusal::because("an earlier transfer of device state still hangs"));
        }
        let (fd, theirs) = self.way(direction, fd).map_err(Refusal::because)?;
        let job = match direction {
            StateDirection::Save => self.take_state().await.map_err(Refusal::because)?,
            StateDirection::Load => Job::Load,
        };
        let bounds = Bounds { limit: self.options.state_limit, time: self.options.state_deadline };
        let transfer = Transfer::start(job, fd, bounds, Arc::clone(&self.state.threads));
        self.state.transfer = Some(transfer.map_err(Refusal::because)?);
        self.state.outdated = false;
        Ok(theirs)
    }

    /// The descriptor to use, and one for the front-end when it is not its own: theirs cannot carry
    /// this direction, or the options say so.
    fn way(
        &self,
        direction: StateDirection,
        fd: OwnedFd,
    ) -> Result<(OwnedFd, Option<OwnedFd>), HostError> {
        if !self.options.own_state_channel && can_carry(fd.as_fd(), direction) {
            return Ok((fd, None));
        }
        let made = pipe_with(PipeFlags::CLOEXEC);
        let (reader, writer) = made.map_err(|errno| HostError::io("pipe")(errno.into()))?;
        Ok(match direction {
            StateDirection::Save => (writer, Some(reader)),
            StateDirection::Load => (reader, Some(writer)),
        })
    }

    async fn take_state(&mut self) -> Result<Job, StateError> {
        let bound = self.bound;
        let snapshot = match race(self.device.snapshot(), self.reactor.sleep(bound)).await {
            Raced::First(snapshot) => snapshot?,
            Raced::Second(()) => return Err(StateError::Deadline(bound.as_secs())),
        };
        let acked = self.backend.acked_features() & !PASSING;
        let state = DeviceState {
            device_type: self.device.device_type(),
            queues: self.backend.offer().queues,
            features: self.backend.features_set().then_some(acked),
            protocol_features: self.backend.acked_protocol_features().bits(),
            version: 0,
            value: Vec::new(),
        };
        Ok(Job::Save(snapshot, state))
    }

    /// Whether a transfer is under way, or was not asked about yet.
    pub(super) fn is_transferring(&self) -> bool {
        self.state.transfer.is_some()
    }

    /// Saves the state into `to`; CHECK_DEVICE_STATE's part is [`Session::saved`].
    pub(super) async fn save_into(&mut self, to: OwnedFd) -> Result<(), StateError> {
        let job = self.take_state().await?;
        let bounds = Bounds { limit: self.options.state_limit, time: self.options.state_deadline };
        let transfer = Transfer::start(job, to, bounds, Arc::clone(&self.state.threads))?;
        self.state.transfer = Some(transfer);
        self.state.outdated = false;
        Ok(())
    }

    /// CHECK_DEVICE_STATE: joins the transfer; a state that came in whole is applied.
    pub(super) async fn check_state(&mut self) -> Result<(), Refusal> {
        let Some(transfer) = &mut self.state.transfer else {
            return Err(Refusal::because("no device state was transferred"));
        };
        let direction = transfer.direction();
        let outcome = transfer.finished().await;
        if let Some(transfer) = self.state.transfer.take() {
            transfer.join();
        }
        let done = match outcome {
            Ok(Some(state)) => self.apply(state).await,
            Ok(None) if self.state.outdated => {
                Err(Error::refused("a ring has started since the state was taken").into())
            }
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        if done.is_ok() {
            info!("device state: {direction:?} done");
        }
        // Kicked while the state came in.
        self.start_all_ready().await;
        done.map_err(Refusal::because)
    }

    async fn apply(&mut self, state: DeviceState) -> Result<(), StateError> {
        let offer = self.backend.offer();
        let negotiated = self.backend.features_set().then_some(self.backend.acked_features());
        let fit = Fit {
            device_type: self.device.device_type(),
            queues: offer.queues,
            offered: offer.features,
            negotiated,
            protocol: offer.protocol_features,
        };
        state.fits(&fit)?;
        let bound = self.bound;
        match race(self.device.restore(state.saved()), self.reactor.sleep(bound)).await {
            Raced::First(done) => done?,
            Raced::Second(()) => return Err(StateError::Deadline(bound.as_secs())),
        }
        // SET_FEATURES has to say the same, if it comes before the first ring starts.
        self.state.restored = state.features.map(|features| features & !PASSING);
        Ok(())
    }

    /// The device is reset: what was on its way, or was restored, is no more.
    pub(super) async fn forget_state(&mut self) {
        self.end_transfer().await;
        self.state.restored = None;
    }

    /// Gives a transfer up and joins it.
    pub(super) async fn end_transfer(&mut self) {
        let Some(transfer) = &mut self.state.transfer else { return };
        transfer.give_up();
        let bound = self.bound;
        if let Raced::Second(()) = race(transfer.finished(), self.reactor.sleep(bound)).await {
            warn!("a transfer of device state hangs, and is left to itself");
        }
        if let Some(transfer) = self.state.transfer.take() {
            transfer.join();
        }
    }
}
