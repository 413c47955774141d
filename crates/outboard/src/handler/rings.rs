//! The rings of a session: starting, stopping and changing them
//! (vhost-user, "Ring states"; messages 8 to 14 and 18).
//!
//! `Backend` knows what the front-end wants of each ring; here is what really runs. A ring runs as
//! soon as it was kicked and everything else is there, in whatever order that came. Every change of
//! a running ring is answered by its queue before it is acknowledged to the front-end.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_channel::oneshot;
use outboard_protocol::{Notifier, ProtocolFeatures, Refusal, RingEvent, RunState, virtio};
use tracing::{debug, info, warn};

use super::session::Session;
use crate::device::VhostUserDevice;
use crate::error::{Error, HostError};
use crate::mailbox::{Applied, Change, Mailbox, QueueControl};
use crate::notify::{Call, InBand, Kick};
use crate::queue::{Counted, Queue, Setup, StartError};
use crate::reactor::{Raced, Reactor, race};

/// What a thing gets that is waited for after a deadline was spent already.
pub(super) const MOMENT: Duration = Duration::from_millis(500);
/// Between two tries to start a ring of a device that is held elsewhere.
const CLAIM_PAUSE: Duration = Duration::from_micros(200);

/// What the host holds of one ring.
#[derive(Debug, Default)]
pub(crate) struct HostRing {
    kick: Option<Kick>,
    call: Option<Arc<Call>>,
    err: Option<Arc<Call>>,
    /// The way to the queue while a worker owns it.
    control: Option<QueueControl>,
}

impl HostRing {
    /// Whether a worker owns the queue.
    pub(crate) fn is_running(&self) -> bool {
        self.control.is_some()
    }

    /// Whether its queue has retired it: the driver broke a rule.
    pub(super) fn is_broken(&self) -> bool {
        self.control.as_ref().is_some_and(QueueControl::is_broken)
    }

    /// How the driver kicks, if it said so.
    pub(super) fn kick(&self) -> Option<&Kick> {
        self.kick.as_ref()
    }

    /// The descriptor by which the driver is called.
    pub(super) fn call_fd(&self) -> Option<&OwnedFd> {
        self.call.as_ref()?.descriptor()
    }

    /// The descriptor by which the driver hears of a broken ring.
    pub(super) fn err_fd(&self) -> Option<&OwnedFd> {
        self.err.as_ref()?.descriptor()
    }
}

impl<D: VhostUserDevice, R: Reactor> Session<'_, D, R> {
    /// The machine checked the index; a ring that is not there is refused all the same.
    fn ring(&mut self, index: u16) -> Result<&mut HostRing, Refusal> {
        let missing = Refusal::because(format_args!("ring {index} of {}", self.rings.len()));
        self.rings.get_mut(usize::from(index)).ok_or(missing)
    }

    /// Whether a worker owns the queue.
    pub(super) fn is_running(&self, index: u16) -> bool {
        self.rings.get(usize::from(index)).is_some_and(HostRing::is_running)
    }

    /// How to notify the driver: a descriptor wins; without one by message, if that was negotiated.
    fn call_way(&self, notifier: Notifier<OwnedFd>, message: InBand) -> Option<Arc<Call>> {
        match notifier {
            Notifier::Fd(fd) => Some(Arc::new(Call::new(Arc::new(fd)))),
            Notifier::Poll if self.is_in_band() => {
                Some(Arc::new(Call::in_band(self.channel.clone(), message)))
            }
            Notifier::Poll => None,
        }
    }

    /// SET_VRING_KICK: starts the ring, or swaps its doorbell.
    pub(super) async fn set_kick(
        &mut self,
        index: u16,
        kick: Notifier<OwnedFd>,
    ) -> Result<(), Refusal> {
        let kick = match kick {
            Notifier::Fd(fd) => Kick::Fd(Arc::new(fd)),
            Notifier::Poll if self.is_in_band() => Kick::Message,
            Notifier::Poll => Kick::Poll,
        };
        self.set_kick_way(index, kick).await
    }

    /// Starts the ring, or swaps its doorbell.
    pub(super) async fn set_kick_way(&mut self, index: u16, kick: Kick) -> Result<(), Refusal> {
        let ring = self.ring(index)?;
        ring.kick = Some(kick.clone());
        if ring.is_running() {
            return self.change(index, Change::Kick(kick)).await;
        }
        self.start(index, self.claim_deadline()).await
    }

    /// SET_VRING_CALL: in use before it is acknowledged.
    pub(super) async fn set_call(
        &mut self,
        index: u16,
        notifier: Notifier<OwnedFd>,
    ) -> Result<(), Refusal> {
        let call = self.call_way(notifier, InBand::Call(index));
        self.ring(index)?.call.clone_from(&call);
        self.change(index, Change::Call(call)).await
    }

    /// SET_VRING_ERR.
    pub(super) async fn set_err(
        &mut self,
        index: u16,
        notifier: Notifier<OwnedFd>,
    ) -> Result<(), Refusal> {
        let err = self.call_way(notifier, InBand::Err(index));
        self.ring(index)?.err.clone_from(&err);
        self.change(index, Change::Err(err)).await
    }

    /// SET_VRING_ENABLE: the worker knows before it is acknowledged.
    pub(super) async fn enable(&mut self, index: u16, enabled: bool) -> Result<(), Refusal> {
        self.change(index, Change::Enable(enabled)).await
    }

    /// SET_FEATURES without bit 30, RESET_OWNER.
    pub(super) async fn enable_all(&mut self, enabled: bool) -> Result<(), Refusal> {
        for index in self.running() {
            self.enable(index, enabled).await?;
        }
        Ok(())
    }

    /// The rings that a worker owns.
    fn running(&self) -> Vec<u16> {
        (0u16..)
            .zip(&self.rings)
            .filter(|(_, ring)| ring.is_running())
            .map(|(index, _)| index)
            .collect()
    }

    /// GET_VRING_BASE: drained, then the true next index; on a ring that never started the base
    /// last set. What does not finish in time is left in the in-flight region, where that was
    /// negotiated; with `skip_drain` at once.
    pub(super) async fn get_base(
        &mut self,
        index: u16,
        skip_drain: bool,
    ) -> Result<Result<u32, Refusal>, HostError> {
        let was_running = self.is_running(index);
        let base = if was_running {
            let queue = self.stop_or_abandon(index, skip_drain).await;
            self.spent |= matches!(queue, Err(HostError::DrainDeadline { .. }));
            queue?.base()
        } else {
            self.backend.ring(index).map_or(0, |ring| ring.base)
        };
        if let Some(ring) = self.rings.get_mut(usize::from(index)) {
            ring.kick = None;
        }
        if was_running && self.running().is_empty() {
            self.suspend().await?;
        }
        Ok(Ok(base))
    }

    /// Takes a queue back from its worker. The ring counts as running until it is back, so that a
    /// session dropped meanwhile waits for it.
    pub(super) async fn stop(&mut self, index: u16) -> Result<Queue, HostError> {
        self.stop_within(index, self.left()).await
    }

    async fn stop_within(&mut self, index: u16, time: Duration) -> Result<Queue, HostError> {
        let queue = self.drained(index, time).await;
        self.stopped(index);
        queue
    }

    /// How long a thing may be waited for: a moment only, once the deadline of a drain was spent.
    pub(super) fn left(&self) -> Duration {
        if self.spent { self.bound.min(MOMENT) } else { self.bound }
    }

    /// As [`Self::stop`]; requests that do not finish in time, or that are not to be waited for,
    /// are left where the next process finds them.
    async fn stop_or_abandon(&mut self, index: u16, now: bool) -> Result<Queue, HostError> {
        let left = self.may_abandon(index);
        let mut queue = if now && left {
            self.abandoned(index, self.bound).await
        } else {
            self.drained(index, self.bound).await
        };
        if left && matches!(queue, Err(HostError::DrainDeadline { .. })) {
            warn!(queue = index, "requests do not finish: left in the in-flight region");
            queue = self.abandoned(index, self.bound.min(MOMENT)).await;
        }
        self.stopped(index);
        queue
    }

    /// Whether requests of a ring can be left in the in-flight region.
    fn may_abandon(&self, index: u16) -> bool {
        let negotiated = ProtocolFeatures::GET_VRING_BASE_INFLIGHT;
        self.backend.acked_protocol_features().contains(negotiated)
            && self.ring_inflight(index).is_some_and(|area| !area.is_poisoned())
    }

    /// Waits for a worker to finish.
    async fn drained(&mut self, index: u16, time: Duration) -> Result<Queue, HostError> {
        let late = self.reactor.sleep(time);
        match race(self.device.stop_queue(index), late).await {
            Raced::First(queue) => queue,
            Raced::Second(()) => Err(self.too_late(index)),
        }
    }

    /// Waits until nothing of a ring can reach guest memory.
    async fn abandoned(&mut self, index: u16, time: Duration) -> Result<Queue, HostError> {
        let late = self.reactor.sleep(time);
        match race(self.device.abandon_queue(index), late).await {
            Raced::First(queue) => queue,
            Raced::Second(()) => Err(self.too_late(index)),
        }
    }

    fn too_late(&self, index: u16) -> HostError {
        HostError::DrainDeadline { index, seconds: self.bound.as_secs() }
    }

    fn stopped(&mut self, index: u16) {
        if let Some(ring) = self.rings.get_mut(usize::from(index)) {
            ring.control = None;
        }
        self.backend.ring_event(index, RingEvent::Stopped);
        info!(queue = index, "ring stopped");
    }

    /// Stops all rings; the first failure is reported, the others are stopped all the same. They
    /// share one deadline.
    pub(super) async fn stop_all(&mut self) -> Result<(), HostError> {
        let running = self.running();
        let any = !running.is_empty();
        let mut result = Ok(());
        let (begun, together) = (self.reactor.now(), self.left());
        for index in running {
            let left = together.saturating_sub(self.reactor.now() - begun);
            let left = left.max(self.bound.min(MOMENT));
            if let Err(error) = self.stop_within(index, left).await {
                self.spent |= matches!(error, HostError::DrainDeadline { .. });
                result = result.and(Err(error));
            }
        }
        if any {
            result = result.and(self.suspend().await);
        }
        result
    }

    /// No ring runs any more: nothing is written, signalled or asked until the next start.
    pub(super) async fn suspend(&mut self) -> Result<(), HostError> {
        self.channel.set_suspended(true);
        self.flush_iotlb();
        Ok(self.device.enter_suspended_state().await?)
    }

    /// Starts every ring that was kicked and lacked something until now. What came is in force
    /// whether or not they start: a ring that cannot goes on waiting, the others do not.
    pub(super) async fn start_all_ready(&mut self) {
        let late = self.claim_deadline();
        for index in 0..u16::try_from(self.rings.len()).unwrap_or(u16::MAX) {
            if let Err(refusal) = self.start_if_ready(index, late).await {
                warn!(queue = index, "ring not started: {refusal}");
            }
        }
    }

    /// Starts a ring if it was kicked before.
    pub(super) async fn start_if_ready(
        &mut self,
        index: u16,
        late: Option<Instant>,
    ) -> Result<(), Refusal> {
        match self.backend.ring(index).map(|ring| ring.run) {
            Some(RunState::Waiting) => self.start(index, late).await,
            _ => Ok(()),
        }
    }

    /// When a start that comes now gives up waiting for what another process holds; None: never.
    pub(super) fn claim_deadline(&self) -> Option<Instant> {
        self.reactor.now().checked_add(self.options.claim_patience)
    }

    /// Starts a ring as [`Self::try_start`] does; asks again until `late` while the device is held
    /// elsewhere. This front-end waits meanwhile, nobody else does.
    async fn start(&mut self, index: u16, late: Option<Instant>) -> Result<(), Refusal> {
        loop {
            match self.try_start(index) {
                Err(Error::Busy(_)) if late.is_none_or(|late| self.reactor.now() < late) => {
                    self.reactor.sleep(CLAIM_PAUSE).await;
                }
                outcome => return outcome.map_err(Refusal::because),
            }
        }
    }

    /// Starts a ring if everything it needs is there; it waits otherwise.
    fn try_start(&mut self, index: u16) -> Result<(), Error> {
        let Some(setup) = self.setup(index) else { return Ok(()) };
        let mailbox = Mailbox::new(setup.abandonable)?;
        let control = QueueControl::new(Arc::clone(&mailbox));
        let queue = match Queue::new(setup, Arc::clone(self.iommu.space()), mailbox) {
            Ok(queue) => queue,
            Err(error @ StartError::Unmapped { address, .. }) => {
                // Wholly outside: its region may still come. Over the end of one: never right.
                if self.memory.user_to_guest(address, 1).is_some() {
                    return Err(Error::refused(error.to_string()));
                }
                debug!(queue = index, "ring waits: {error}");
                return Ok(());
            }
            Err(error) => return Err(Error::refused(error.to_string())),
        };
        self.channel.set_suspended(false);
        queue.call_after_kill();
        let parked = queue.is_parked();
        if let Err(error) = self.device.start_queue(index, queue) {
            self.channel.set_suspended(self.running().is_empty());
            return Err(error);
        }
        self.state.ring_started();
        if let Some(ring) = self.rings.get_mut(usize::from(index)) {
            ring.control = Some(control);
        }
        self.backend.ring_event(index, RingEvent::Started);
        if parked {
            self.backend.ring_event(index, RingEvent::Parked);
        }
        info!(queue = index, "ring started");
        Ok(())
    }

    /// What a start needs; None while something is missing.
    fn setup(&self, index: u16) -> Option<Setup> {
        let ring = self.backend.ring(index)?;
        let host = self.rings.get(usize::from(index))?;
        let spec = self.device.queues().get(usize::from(index))?;
        if !self.backend.features_set()
            || self.memory.regions().is_empty()
            || host.is_running()
            || self.state.holds_rings()
        {
            return None;
        }
        let addresses = ring.addresses?;
        Some(Setup {
            index,
            when_disabled: spec.when_disabled,
            size: ring.size?,
            user: [addresses.desc, addresses.avail, addresses.used],
            features: self.backend.acked_features() & !virtio::LOG_ALL,
            log: self.ring_log(index, self.backend.acked_features()),
            inflight: self.ring_inflight(index),
            abandonable: self.may_abandon(index),
            base: ring.base,
            enabled: ring.enabled,
            kick: host.kick.clone()?,
            // A front-end that notifies by messages may never send a descriptor, nor say so.
            call: host.call.clone().or_else(|| self.call_way(Notifier::Poll, InBand::Call(index))),
            err: host.err.clone().or_else(|| self.call_way(Notifier::Poll, InBand::Err(index))),
            channel: self.channel.clone(),
            counted: Counted::new(&self.options.inspect.branch("rings").branch(index)),
        })
    }

    /// Has a running ring live by a change; nothing to do for one that is stopped.
    pub(super) async fn change(&mut self, index: u16, change: Change) -> Result<(), Refusal> {
        let Some(control) = &self.ring(index)?.control else { return Ok(()) };
        let answer = control.post(change);
        self.await_change(index, answer).await
    }

    /// Waits for a queue to live by a change. A queue that does not answer is broken.
    pub(super) async fn await_change(
        &mut self,
        index: u16,
        answer: oneshot::Receiver<Applied>,
    ) -> Result<(), Refusal> {
        let bound = self.bound;
        let event = match race(answer, self.reactor.sleep(bound)).await {
            Raced::First(Ok(Applied::Serving)) => RingEvent::Resumed,
            Raced::First(Ok(Applied::Parked)) => RingEvent::Parked,
            Raced::First(Err(_)) => {
                self.backend.ring_event(index, RingEvent::Broken);
                return Err(Refusal::because(HostError::WorkerGone(index)));
            }
            Raced::Second(()) => {
                self.backend.ring_event(index, RingEvent::Broken);
                let seconds = bound.as_secs();
                return Err(Refusal::because(HostError::ChangeDeadline { index, seconds }));
            }
        };
        self.backend.ring_event(index, event);
        Ok(())
    }

    /// Posts a change to every running ring at once.
    pub(super) fn post_all(
        &self,
        change: impl Fn(u16) -> Change,
    ) -> Vec<(u16, oneshot::Receiver<Applied>)> {
        (0u16..)
            .zip(&self.rings)
            .filter_map(|(index, ring)| Some((index, ring.control.as_ref()?.post(change(index)))))
            .collect()
    }

    /// Tells the machine of rings that their drivers broke since the last message.
    pub(super) fn note_broken_rings(&mut self) {
        for (index, ring) in (0u16..).zip(&self.rings) {
            if ring.is_broken() {
                self.backend.ring_event(index, RingEvent::Broken);
            }
        }
    }
}
