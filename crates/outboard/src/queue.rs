//! A virtqueue as a device owns it: the ring, its doorbells, its own view of guest memory and its
//! control mailbox (contract §1, virtio 1.3 §2.6).
//!
//! A `Queue` has exactly one owner: the handler while the ring is stopped, a worker while it is
//! started. It moves and is never shared; what changes meanwhile comes through the mailbox and is
//! carried out by [`Queue::poll_control`], between two requests. Invariant: guest memory of a
//! generation that may go away is let go only when no request uses it.
//!
//! ```text
//!            Change ──▶ mailbox ──▶ poll_control ──▶ call, kick, enable: at once
//!                                                └─▶ memory: when nothing is in flight,
//!                                                    then the ring is found again or parked
//! ```
//! Behind an IOMMU a queue may lack a translation: see `translation.rs`.

mod abandon;
pub(crate) mod gather;
mod setup;
mod translation;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use futures_channel::oneshot;
use outboard_memory::{GuestMemory, View};
use outboard_queue::{Chain, DeviceQueue};
use tracing::{debug, warn};

use self::setup::find_ring;
pub(crate) use self::setup::{Counted, Setup, StartError};
use self::translation::{Translation, find_or_wait};
use crate::mailbox::{Applied, Change, Mailbox};
use crate::notify::{Kick, drain};
use crate::request::Request;

/// What happens to requests on a ring that is started but disabled
/// (vhost-user, "Ring states": such a ring is processed without side effects).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenDisabled {
    /// They wait in the ring: requests that want an answer, and receive buffers.
    #[default]
    Hold,
    /// They are taken and dropped: packets and bytes that the driver transmits.
    Discard,
}

/// A queue of a device, as its author declares it.
#[derive(Clone, Copy, Debug)]
pub struct QueueSpec {
    /// For logs and the inspect tree: "requests", "rx0".
    pub name: &'static str,
    /// The largest ring size that the device takes, a power of two up to 32768.
    pub max_size: u16,
    /// What a disabled ring does.
    pub when_disabled: WhenDisabled,
}

impl QueueSpec {
    /// A queue whose requests wait while it is disabled.
    #[must_use]
    pub const fn new(name: &'static str, max_size: u16) -> Self {
        Self { name, max_size, when_disabled: WhenDisabled::Hold }
    }

    /// A queue whose requests are dropped while it is disabled: it transmits packets that may be lost, as a network's.
    #[must_use]
    pub const fn transmit(name: &'static str, max_size: u16) -> Self {
        Self { name, max_size, when_disabled: WhenDisabled::Discard }
    }
}

/// What [`Queue::poll_control`] changed that its owner's event loop has to know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// [`Queue::kick_fd`] is another one now.
    pub kick: bool,
    /// The ring may hold requests that no kick will announce: look at it.
    pub look: bool,
    /// Guest memory is another generation.
    pub memory: bool,
}

/// A virtqueue, owned by whoever serves it.
#[derive(Debug)]
pub struct Queue {
    setup: Setup,
    /// None while parked: the ring lies in no region of guest memory.
    ring: Option<DeviceQueue>,
    memory: Arc<GuestMemory>,
    mailbox: Arc<Mailbox>,
    /// A generation that waits for what is in flight.
    next_memory: Option<(Arc<GuestMemory>, oneshot::Sender<Applied>)>,
    /// Who waits until everything that was in the ring is finished.
    processing: Vec<oneshot::Sender<Applied>>,
    broken: bool,
    /// Nothing is taken: the ring is broken, or the front-end was asked for a translation.
    resting: bool,
    /// What an earlier process had taken is served first: nothing else is taken before all of it is
    /// finished.
    recovering: bool,
    /// Requests that their worker has set aside, by its tokens.
    held: Vec<(u64, Chain)>,
    gathering: gather::Gathering,
    translation: Translation,
    /// Finished requests that have not been counted.
    uncounted: u32,
}

impl Queue {
    /// Finds the ring in `memory`; behind an IOMMU it may be parked at first.
    ///
    /// # Errors
    /// The ring lies outside guest memory, or its size or alignment is no ring's.
    pub(crate) fn new(
        setup: Setup,
        memory: Arc<GuestMemory>,
        mailbox: Arc<Mailbox>,
    ) -> Result<Self, StartError> {
        let ring = find_or_wait(&setup, &memory)?;
        let recovering = ring.as_ref().is_some_and(|ring| ring.owed() != 0);
        Ok(Self {
            setup,
            ring,
            memory,
            mailbox,
            next_memory: None,
            processing: Vec::new(),
            broken: false,
            resting: false,
            recovering,
            held: Vec::new(),
            gathering: gather::Gathering::default(),
            translation: Translation::default(),
            uncounted: 0,
        })
    }

    /// Calls the driver of a ring with an in-flight region, once: a process that was killed may have shown
    /// answers and not have called.
    pub(crate) fn call_after_kill(&self) {
        if let (Some(_), Some(call)) = (&self.setup.inflight, &self.setup.call) {
            call.signal();
        }
    }

    /// Which of the device's queues this is.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.setup.index
    }

    /// Number of entries of the ring.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.setup.size
    }

    /// The feature bits that the driver acknowledged, as they were when the ring started.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.setup.features
    }

    /// Whether every request that was taken from the ring is finished.
    #[must_use]
    #[inline]
    pub fn is_idle(&self) -> bool {
        self.ring.as_ref().is_none_or(DeviceQueue::is_idle)
    }

    /// Requests taken from the ring and not finished, counted.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.ring.as_ref().map_or(0, DeviceQueue::in_flight)
    }

    /// The next index, as GET_VRING_BASE reports it.
    #[must_use]
    pub fn base(&self) -> u32 {
        self.ring.as_ref().map_or(self.setup.base, DeviceQueue::base)
    }

    /// Whether the driver broke the ring: it is retired until it is stopped and set up anew.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Whether the ring waits for its memory to come back.
    #[must_use]
    pub fn is_parked(&self) -> bool {
        self.ring.is_none()
    }

    /// The doorbell to wait for; none when the ring is to be polled.
    #[must_use]
    pub fn kick_fd(&self) -> Option<&Arc<OwnedFd>> {
        match &self.setup.kick {
            Kick::Fd(fd) => Some(fd),
            Kick::Poll | Kick::Message => None,
        }
    }

    /// Whether nothing announces requests: the ring is to be looked at again and again.
    #[must_use]
    pub fn is_polled(&self) -> bool {
        matches!(self.setup.kick, Kick::Poll)
    }

    /// The descriptor that becomes readable when [`Queue::poll_control`] has something to do.
    #[must_use]
    pub fn control_fd(&self) -> BorrowedFd<'_> {
        self.mailbox.as_fd()
    }

    /// The guest memory of this queue.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Empties the doorbell; to be called once per wake, before looking at the ring.
    pub fn drain_kick(&self) {
        if let Kick::Fd(fd) = &self.setup.kick {
            drain(fd.as_fd());
        }
    }

    /// The next request, if the ring is enabled and holds one.
    ///
    /// A ring that its driver broke is retired here: reported once on its error descriptor, then
    /// silent.
    pub fn pop(&mut self) -> Option<Request<'_>> {
        let chain = self.pop_chain()?;
        Some(Request::new(chain, self, None))
    }

    /// As [`Queue::pop`], for the library's own workers.
    pub(crate) fn pop_chain(&mut self) -> Option<Chain> {
        if !self.looks() {
            return self.pop_owed();
        }
        let Some(ring) = self.ring.as_mut() else {
            self.seek_ring();
            return None;
        };
        loop {
            match ring.pop() {
                Ok(Some(chain)) if self.setup.enabled => return Some(chain),
                Ok(Some(chain)) => ring.complete(chain, 0),
                Ok(None) => return None,
                Err(error) => {
                    self.failed(&error);
                    return None;
                }
            }
        }
    }

    /// The next request that an earlier process had taken, in its order.
    #[cold]
    fn pop_owed(&mut self) -> Option<Chain> {
        if !self.recovering || !self.may_look() {
            return None;
        }
        let ring = self.ring.as_mut()?;
        loop {
            match ring.pop_owed() {
                Ok(Some(chain)) if self.setup.enabled => return Some(chain),
                Ok(Some(chain)) => ring.complete(chain, 0),
                Ok(None) if ring.is_idle() => break,
                Ok(None) => return None,
                Err(error) => {
                    self.failed(&error);
                    return None;
                }
            }
        }
        self.recovering = false;
        self.pop_chain()
    }

    /// Whether requests of an earlier process can be served now: the ring does not stop before.
    pub(crate) fn owes(&self) -> bool {
        let owed = self.ring.as_ref().is_some_and(|ring| ring.owed() != 0);
        owed && self.recovering && self.may_look()
    }

    /// The requests of an earlier process may be finished now.
    fn recovered(&mut self, changed: &mut Changed) {
        let owed = self.ring.as_ref().map_or(0, DeviceQueue::owed);
        if self.recovering && owed == 0 && self.is_idle() {
            self.recovering = false;
            changed.look = true;
        }
    }

    /// Whether new requests are taken from the ring now.
    #[inline(always)]
    fn looks(&self) -> bool {
        !self.recovering && self.may_look()
    }

    /// Whether requests are taken from the ring at all now.
    #[inline(always)]
    fn may_look(&self) -> bool {
        !self.resting
            && self.next_memory.is_none()
            && (self.setup.enabled || self.setup.when_disabled == WhenDisabled::Discard)
    }

    /// Whether requests reach the worker.
    pub(crate) fn is_enabled(&self) -> bool {
        self.setup.enabled
    }

    /// Whether requests are taken and dropped: the ring is disabled, and transmits.
    pub(crate) fn discards(&self) -> bool {
        !self.setup.enabled && self.setup.when_disabled == WhenDisabled::Discard
    }

    /// Whether a request waits in the ring: a look that takes nothing, for polling.
    pub(crate) fn has_requests(&self) -> bool {
        self.looks() && self.ring.as_ref().is_some_and(DeviceQueue::has_available)
    }

    /// Puts a finished request into the batch; `written` bytes count from the first writable one.
    pub(crate) fn complete(&mut self, chain: Chain, written: u32) {
        if let Some(ring) = &mut self.ring {
            ring.complete(chain, written);
            self.uncounted = self.uncounted.wrapping_add(1);
        }
    }

    /// Shows the driver all finished requests, and calls it if it asked for that.
    pub fn publish(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        match ring.publish() {
            Ok(true) => {
                if let Some(call) = &self.setup.call {
                    call.signal();
                    self.setup.counted.calls.add(1);
                }
            }
            Ok(false) => {}
            Err(error) => self.retire(&error),
        }
        if self.uncounted != 0 {
            self.setup.counted.finished.add(self.uncounted.into());
            self.uncounted = 0;
        }
    }

    /// Asks the driver for a kick and takes a last look: true when there is work after all.
    pub fn arm(&mut self) -> bool {
        let looks = self.looks();
        self.ring.as_mut().is_some_and(|ring| looks && ring.arm())
    }

    /// Tells the driver that no kick is needed: we are looking.
    pub fn disarm(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.disarm();
        }
    }

    /// Ring errors latch (rule R10): no more requests are taken, the driver hears of it once.
    pub(crate) fn retire(&mut self, why: &dyn std::fmt::Display) {
        if self.broken {
            return;
        }
        (self.broken, self.resting) = (true, true);
        warn!(queue = self.setup.index, "ring retired: {why}");
        self.mailbox.set_broken();
        self.setup.counted.ring.set("broken", why.to_string());
        self.setup.counted.ring.set("state", "broken");
        if let Some(err) = &self.setup.err {
            err.signal();
        }
    }

    /// Carries out the changes that the front-end made since the last call, takes back requests
    /// that were finished elsewhere, and answers whoever waits for it. Call it when
    /// [`Queue::control_fd`] is readable and after requests were finished; it never blocks.
    pub fn poll_control(&mut self) -> Changed {
        let mut changed = Changed::default();
        self.take_returns();
        loop {
            if self.next_memory.is_some() {
                self.scatter();
                self.settle(&mut changed);
            }
            // What comes behind a generation that waits has had its wake-up: it is taken right after it.
            if self.next_memory.is_some() {
                break;
            }
            let Some(posted) = self.mailbox.take() else { break };
            match posted.change {
                Change::Memory { memory, drain } => {
                    if drain || self.ring.is_none() {
                        self.next_memory = Some((memory, posted.done));
                    } else {
                        self.extend_memory(memory, posted.done);
                        changed.memory = true;
                        self.look_again(&mut changed);
                    }
                }
                Change::Process => {
                    changed.look = true;
                    self.processing.push(posted.done);
                }
                other => {
                    self.change(other, &mut changed);
                    let _ = posted.done.send(self.state());
                }
            }
        }
        self.recovered(&mut changed);
        changed
    }

    /// Empties the mailbox's wake-ups; to be called once per wake, before `poll_control`.
    pub fn drain_control(&self) {
        self.mailbox.drain_wakes();
    }

    /// Whether something waits until nothing is in flight: a generation of memory, or new requests.
    pub(crate) fn waits(&self) -> bool {
        self.next_memory.is_some() || self.recovering
    }

    /// The way back for a request that leaves the queue's thread.
    pub(crate) fn mailbox(&self) -> &Arc<Mailbox> {
        &self.mailbox
    }

    fn take_returns(&mut self) {
        if !self.mailbox.has_returns() {
            return;
        }
        for (chain, written) in self.mailbox.take_returns() {
            self.complete(chain, written);
        }
        self.publish();
    }

    fn change(&mut self, change: Change, changed: &mut Changed) {
        match change {
            Change::Call(call) => {
                self.setup.call = call;
                // A call may have gone to the old descriptor while the new one came: one call too
                // many is harmless, one too few hangs the guest.
                if let Some(call) = &self.setup.call {
                    call.signal();
                }
            }
            Change::Kick(kick) => {
                self.setup.kick = kick;
                changed.kick = true;
                changed.look = true;
            }
            Change::Err(err) => self.setup.err = err,
            Change::Log(log) => {
                self.setup.log.clone_from(&log);
                if let Some(ring) = &mut self.ring {
                    ring.set_log(log);
                }
            }
            Change::Enable(enabled) => {
                changed.look |= enabled && !self.setup.enabled;
                self.setup.enabled = enabled;
            }
            Change::Translated { number, told } => self.answered(number, told, changed),
            Change::Ask => self.ask_again(changed),
            Change::Memory { .. } | Change::Process => {}
        }
    }

    /// Takes a map that keeps every region of the old one: nothing has to be drained.
    fn extend_memory(&mut self, memory: Arc<GuestMemory>, done: oneshot::Sender<Applied>) {
        self.memory = Arc::clone(&memory);
        if let Some(ring) = &mut self.ring
            && let Err(error) = ring.set_memory(View::new(memory))
        {
            self.retire(&error);
        }
        let _ = done.send(self.state());
    }

    /// Takes the next generation of memory once nothing is in flight.
    fn settle(&mut self, changed: &mut Changed) {
        if !self.is_idle() {
            return;
        }
        let Some((memory, done)) = self.next_memory.take() else { return };
        self.publish();
        self.setup.base = self.base();
        self.ring = None;
        match find_ring(&self.setup, self.setup.base, &memory) {
            Ok(ring) => {
                self.recovering = ring.owed() != 0;
                self.ring = Some(ring);
                self.translation.ring_found();
                changed.look = true;
            }
            Err(error) => {
                debug!(queue = self.setup.index, "ring parked: {error}");
                // Behind an IOMMU the look asks for the parts.
                changed.look |= memory.is_behind_iommu();
            }
        }
        self.memory = memory;
        changed.memory = true;
        self.look_again(changed);
        let _ = done.send(self.state());
    }

    /// Answers in-band kicks, once the ring was looked at and nothing of it is in flight.
    pub fn processed(&mut self) {
        self.processed_but(false);
    }

    /// As [`Queue::processed`]; when the queue's owner wants nothing of the ring (`resting`), what waits
    /// there does not count.
    pub(crate) fn processed_but(&mut self, resting: bool) {
        if self.processing.is_empty() {
            return;
        }
        self.scatter();
        // What an earlier process had taken waits on a ring that is disabled or broken: nobody waits for it here.
        let recovers = self.recovering && self.may_look();
        if self.is_idle() && (resting || (!recovers && !self.has_requests())) {
            let state = self.state();
            for done in self.processing.drain(..) {
                let _ = done.send(state);
            }
        }
    }

    fn state(&self) -> Applied {
        if self.ring.is_some() { Applied::Serving } else { Applied::Parked }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.mailbox.close();
    }
}
