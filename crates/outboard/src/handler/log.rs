//! The dirty log of a session: SET_LOG_BASE, SET_LOG_FD, LOG_ALL of SET_FEATURES and the log flag of SET_VRING_ADDR
//! (vhost-user, "Migration").
//!
//! ```text
//!  SET_LOG_BASE ─▶ the log ──┐
//!  SET_FEATURES ─▶ on or off ┼─▶ RingLog of each ring ─▶ Change::Log ─▶ its queue ─▶ then the answer
//!  SET_VRING_ADDR ─▶ used? ──┘
//! ```
//! Invariant: whoever is answered may count on it: each running queue notes its writes as was asked for, and a log that
//! was replaced is touched no more. What is wrong with a log costs the migration, never a ring.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use outboard_memory::DirtyLog;
use outboard_protocol::payload::{Log, VRING_F_LOG};
use outboard_protocol::{Refusal, Request, virtio};
use outboard_queue::{QueueFeatures, QueueLayout, RingLog};
use tracing::{info, warn};

use super::session::Session;
use crate::device::VhostUserDevice;
use crate::mailbox::Change;
use crate::notify::Call;
use crate::reactor::Reactor;

/// What a session knows of its log.
#[derive(Debug, Default)]
pub(super) struct SessionLog {
    base: Option<Arc<DirtyLog>>,
    /// As it came, for a process that takes over.
    given: Option<(Log, OwnedFd)>,
    notify: Option<Arc<Call>>,
    /// Whether it was said that the file was cut short.
    told: bool,
}

impl SessionLog {
    /// Says once that marks are lost: the file was cut short.
    pub(super) fn look(&mut self) {
        if !self.told && self.is_lost() {
            self.told = true;
            warn!("the file of the dirty log was cut short: marks are lost");
        }
    }

    fn is_lost(&self) -> bool {
        self.base.as_ref().is_some_and(|base| base.is_poisoned())
    }

    /// The present log goes.
    fn leave(&mut self) {
        self.look();
        if let Some(old) = self.base.take().filter(|old| old.outside() > 0) {
            let (marks, bytes) = (old.outside(), old.size());
            warn!("{marks} writes had no bit in the dirty log of {bytes} bytes");
        }
        self.told = false;
        self.given = None;
    }

    /// What the front-end said of the log, to be said again to a process that takes over.
    pub(super) fn again(&self) -> io::Result<Vec<Request<OwnedFd>>> {
        let mut requests = Vec::new();
        if let Some((log, fd)) = &self.given {
            requests.push(Request::SetLogBase(*log, fd.try_clone()?));
        }
        if let Some(fd) = self.notify.as_ref().and_then(|call| call.descriptor()) {
            requests.push(Request::SetLogFd(fd.try_clone()?));
        }
        Ok(requests)
    }
}

impl Drop for SessionLog {
    fn drop(&mut self) {
        self.leave();
    }
}

impl<D: VhostUserDevice, R: Reactor> Session<'_, D, R> {
    /// SET_LOG_BASE: the new log is in use, and the old one is not, before it is answered.
    pub(super) async fn set_log_base(&mut self, log: Log, fd: OwnedFd) -> Result<(), Refusal> {
        let Log { mmap_size, mmap_offset } = log;
        let kept = fd.try_clone().map_err(Refusal::because)?;
        let base = DirtyLog::map(fd, mmap_offset, mmap_size).map_err(Refusal::because)?;
        self.log.leave();
        self.log.given = Some((log, kept));
        self.log.base = Some(Arc::new(base));
        info!("dirty log of {mmap_size} bytes");
        self.spread_log(self.backend.acked_features()).await
    }

    /// SET_LOG_FD: an eventfd to signal after writes were noted.
    pub(super) async fn set_log_fd(&mut self, fd: OwnedFd) -> Result<(), Refusal> {
        self.log.notify = Some(Arc::new(Call::new(Arc::new(fd))));
        self.spread_log(self.backend.acked_features()).await
    }

    /// SET_FEATURES: LOG_ALL on or off, while rings run.
    pub(super) async fn set_log_all(&mut self, features: u64) -> Result<(), Refusal> {
        if (self.backend.acked_features() ^ features) & virtio::LOG_ALL == 0 {
            return Ok(());
        }
        if features & virtio::LOG_ALL != 0 && self.log.is_lost() {
            return Err(Refusal::because("the file of the dirty log was cut short"));
        }
        self.spread_log(features).await
    }

    /// SET_VRING_ADDR of a running ring: its used ring is noted or not.
    pub(super) async fn set_ring_log(&mut self, index: u16) -> Result<(), Refusal> {
        self.check_ring_log(index)?;
        if !self.is_running(index) {
            return Ok(());
        }
        let log = self.ring_log(index, self.backend.acked_features());
        self.change(index, Change::Log(log)).await
    }

    /// Whether the log has bits for the whole used ring, when they are asked for.
    fn check_ring_log(&self, index: u16) -> Result<(), Refusal> {
        let (Some(base), Some(guest)) = (&self.log.base, self.used_log(index)) else {
            return Ok(());
        };
        if self.backend.acked_features() & virtio::ACCESS_PLATFORM != 0 {
            // An I/O address: the ring is noted where it lies.
            return Ok(());
        }
        if self.log.is_lost() {
            return Err(Refusal::because("the file of the dirty log was cut short"));
        }
        let size = self.backend.ring(index).and_then(|ring| ring.size).unwrap_or(1);
        let features = QueueFeatures::from_bits(self.backend.acked_features());
        let (_, _, len) = QueueLayout::sizes(size, features);
        if base.covers(guest, len) {
            return Ok(());
        }
        let bytes = base.size();
        Err(Refusal::because(format_args!(
            "used ring logged at {guest:#x}, {len} bytes: beyond a log of {bytes} bytes"
        )))
    }

    /// The address under which writes to a used ring are noted, when they are to be.
    fn used_log(&self, index: u16) -> Option<u64> {
        let addresses = self.backend.ring(index)?.addresses?;
        (addresses.flags & VRING_F_LOG != 0).then_some(addresses.log_guest_addr)
    }

    /// Where a ring notes its writes under these features.
    pub(super) fn ring_log(&self, index: u16, features: u64) -> Option<RingLog> {
        if features & virtio::LOG_ALL == 0 {
            return None;
        }
        let log = Arc::clone(self.log.base.as_ref()?);
        let notify = self.log.notify.as_ref().map(Arc::clone);
        let notify =
            notify.map(|call| -> Arc<dyn Fn() + Send + Sync> { Arc::new(move || call.signal()) });
        Some(RingLog { log, used: self.used_log(index), notify })
    }

    /// Has every running queue note its writes as it is to be now.
    async fn spread_log(&mut self, features: u64) -> Result<(), Refusal> {
        let mut result = Ok(());
        for (index, answer) in self.post_all(|index| Change::Log(self.ring_log(index, features))) {
            result = result.and(self.await_change(index, answer).await);
        }
        result
    }
}
