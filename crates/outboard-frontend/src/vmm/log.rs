//! The dirty log as a VMM uses it in a migration (vhost-user, "Migration").
//!
//! ```text
//!  start_log  SET_LOG_BASE, SET_FEATURES with LOG_ALL, per active queue SET_VRING_ADDR with the log flag
//!  swap_log   SET_LOG_BASE with a fresh log, for memory that grew
//!  stop_log   per active queue SET_VRING_ADDR without the flag, SET_FEATURES without LOG_ALL
//! ```
//! Invariant: a page that the device writes while the log is on is handed out by the next call that takes pages, or by a
//! later one; it is to be copied after that.

use outboard_memory::DirtyLog;
use outboard_protocol::features::{ProtocolFeatures, virtio};

use super::{Vmm, Wanted};
use crate::error::Error;

impl Wanted {
    /// Also what the dirty log needs.
    #[must_use]
    pub fn with_log(mut self) -> Self {
        self.protocol |= ProtocolFeatures::LOG_SHMFD;
        self
    }
}

impl Vmm {
    /// Has the device note every page of guest memory that it writes, from now on and until [`Self::stop_log`].
    ///
    /// # Errors
    /// [`Error::NotOffered`] without LOG_SHMFD or LOG_ALL, [`Error::State`] when the log is on or there is no
    /// memory, and anything the connection can fail with.
    pub fn start_log(&mut self) -> Result<(), Error> {
        if !self.acked_protocol.contains(ProtocolFeatures::LOG_SHMFD) {
            return Err(Error::NotOffered("LOG_SHMFD"));
        }
        if self.offered & virtio::LOG_ALL == 0 {
            return Err(Error::NotOffered("LOG_ALL"));
        }
        if self.log.is_some() {
            return Err(Error::State("the dirty log is on already"));
        }
        self.log = Some(self.fresh_log()?);
        self.connection.set_features(self.features_now())?;
        self.set_ring_logs()
    }

    /// Puts a fresh log in the place of the present one, as for memory that has grown. Returns the pages of the old one.
    ///
    /// # Errors
    /// [`Error::State`] when the log is off, and anything the connection can fail with.
    pub fn swap_log(&mut self) -> Result<Vec<u64>, Error> {
        if self.log.is_none() {
            return Err(Error::State("the dirty log is off"));
        }
        let fresh = self.fresh_log()?;
        // Answered: nothing is noted in the old one any more.
        let pages = self.dirty_pages();
        self.log = Some(fresh);
        Ok(pages)
    }

    /// The pages of guest memory (address of the first byte of 4096) that were noted since they were last taken.
    pub fn dirty_pages(&mut self) -> Vec<u64> {
        let mut pages = Vec::new();
        if let Some(log) = &self.log {
            log.take(|page| pages.push(page));
        }
        pages
    }

    /// Ends the noting. Returns the last pages. Nothing is sent when the log is off.
    ///
    /// # Errors
    /// Anything the connection can fail with.
    pub fn stop_log(&mut self) -> Result<Vec<u64>, Error> {
        let Some(log) = self.log.take() else { return Ok(Vec::new()) };
        let ended = self.set_ring_logs().and_then(|()| {
            let features = self.features_now();
            self.connection.set_features(features)
        });
        let mut pages = Vec::new();
        log.take(|page| pages.push(page));
        ended.map(|()| pages)
    }

    /// The features of the moment: LOG_ALL is no driver's business.
    pub(super) const fn features_now(&self) -> u64 {
        match self.log {
            Some(_) => self.acked | virtio::LOG_ALL,
            None => self.acked & !virtio::LOG_ALL,
        }
    }

    fn fresh_log(&mut self) -> Result<DirtyLog, Error> {
        let memory = self.memory.as_ref().ok_or(Error::State("no memory was shared"))?;
        let ends = memory.regions().map(|(spec, _)| spec.guest_addr.saturating_add(spec.size));
        let end = ends.max().unwrap_or(0);
        let (log, file) = DirtyLog::memfd(end).map_err(|error| Error::Memory(error.to_string()))?;
        self.connection.set_log_base(&file, log.size(), 0)?;
        Ok(log)
    }

    /// SET_VRING_ADDR of each active queue, with the flag of the moment.
    fn set_ring_logs(&mut self) -> Result<(), Error> {
        let on = self.log.is_some();
        for ring in &self.active {
            let used = on.then_some(ring.layout.used);
            self.connection.set_vring_addr_logged(ring.index, &ring.layout, used)?;
        }
        Ok(())
    }
}
