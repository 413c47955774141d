//! Outliving the back-end: the in-flight region, and a new back-end that goes on where the last one died
//! (vhost-user, "Inflight I/O tracking").
//!
//! ```text
//!  activate   … GET_INFLIGHT_FD once, SET_INFLIGHT_FD, then the rings
//!  reconnect  SET_OWNER, GET_FEATURES, GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, SET_FEATURES, memory,
//!             SET_INFLIGHT_FD with the same region, then the rings, their bases the used indices
//! ```
//! Invariant: drivers notice nothing: what they offered is finished by whichever back-end is there. No call
//! and no kick is made up here: a back-end that needs them loses them, and is seen to.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use outboard_protocol::features::{ProtocolFeatures, virtio};
use outboard_protocol::payload::Inflight;

use super::{Vmm, Wanted};
use crate::connection::Connection;
use crate::error::Error;
use crate::virtqueue::RingShare;

/// The region as the back-end made it.
#[derive(Debug)]
pub(super) struct InflightRegion {
    description: Inflight,
    file: OwnedFd,
}

impl Wanted {
    /// Also the in-flight region, with which [`Vmm::reconnect`] loses no request.
    #[must_use]
    pub fn with_inflight(mut self) -> Self {
        self.protocol |= ProtocolFeatures::INFLIGHT_SHMFD;
        self
    }

    /// Also [`Vmm::park`], which needs the in-flight region.
    #[must_use]
    pub fn with_skip_drain(self) -> Self {
        let mut this = self.with_inflight();
        this.protocol |= ProtocolFeatures::GET_VRING_BASE_INFLIGHT | ProtocolFeatures::SKIP_DRAIN;
        this
    }
}

impl Vmm {
    /// As [`Vmm::sleep`], but requests under way are not waited for (GET_VRING_BASE_SKIP_DRAIN): they stay noted in
    /// the in-flight region, and whoever [`Vmm::wake`] starts the queues with finishes them, this back-end or, after
    /// [`Vmm::reconnect`], another one.
    ///
    /// # Errors
    /// [`Error::NotOffered`] without SKIP_DRAIN, and anything the connection can fail with.
    pub fn park(&mut self) -> Result<Option<Vec<(u16, u32)>>, Error> {
        if !self.acked_protocol.contains(ProtocolFeatures::SKIP_DRAIN) {
            return Err(Error::NotOffered("GET_VRING_BASE_SKIP_DRAIN"));
        }
        self.fall_asleep(true)
    }

    /// Goes on with a new back-end where the last one left everything: at a crash, or a restart. The queues'
    /// drivers need not know. When this fails it can be tried again with another connection. Queues that sleep go on
    /// sleeping until [`Vmm::wake`].
    ///
    /// # Errors
    /// [`Error::NotOffered`] when the new one lacks what the last one had, and anything the connection can fail with.
    pub fn reconnect(&mut self, mut connection: Connection) -> Result<(), Error> {
        connection.set_owner()?;
        let offered = connection.get_features()?;
        if offered & self.acked != self.acked {
            return Err(Error::NotOffered("the features of the last back-end"));
        }
        if offered & virtio::PROTOCOL_FEATURES != 0 {
            if !connection.get_protocol_features()?.contains(self.acked_protocol) {
                return Err(Error::NotOffered("the protocol features of the last back-end"));
            }
            connection.set_protocol_features(self.acked_protocol)?;
        }
        self.connection = connection;
        self.slots_sent = false;
        self.forget_mappings();
        if self.asleep.is_some() {
            return Ok(());
        }
        let lost = std::mem::take(&mut self.active);
        let outcome = self.resume(&lost);
        if outcome.is_err() {
            self.active = lost;
        }
        outcome
    }

    fn resume(&mut self, lost: &[Arc<RingShare>]) -> Result<(), Error> {
        let mut rings = Vec::with_capacity(lost.len());
        for ring in lost {
            // What is not in the used ring is in flight or was never taken: the region knows.
            rings.push((Arc::clone(ring), u32::from(ring.used_index()?)));
        }
        self.start(rings)
    }

    /// Gives the back-end its region: the one there is, else a new one for these rings.
    pub(super) fn send_inflight(&mut self, rings: &[(Arc<RingShare>, u32)]) -> Result<(), Error> {
        if !self.acked_protocol.contains(ProtocolFeatures::INFLIGHT_SHMFD) {
            return Ok(());
        }
        if self.inflight.is_none() {
            let count = rings.iter().map(|(ring, _)| ring.index.saturating_add(1)).max();
            let size = rings.iter().map(|(ring, _)| ring.layout.size).max();
            let (count, size) = (count.unwrap_or(0), size.unwrap_or(0));
            let made = self.connection.get_inflight_fd(count, size)?;
            self.inflight = made.map(|(description, file)| InflightRegion { description, file });
        }
        match &self.inflight {
            Some(region) => self.connection.set_inflight_fd(region.description, &region.file),
            None => Ok(()),
        }
    }
}
