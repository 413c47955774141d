//! The shared objects (dma-buf by UUID) that a VMM can hand out: SHARED_OBJECT_ADD, REMOVE and LOOKUP
//! (vhost-user, "Back-end message types").
//!
//! Invariant: a look-up finds an object only while it stands in the table; its descriptor is duplicated
//! for each finder and never lent.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outboard_protocol::payload::Uuid;

/// A table of shared objects. Cloning it makes another handle to the same table: give one to the channels
/// of all devices of a VM, and what one device exports the others find.
#[derive(Clone, Debug, Default)]
pub struct SharedObjects(Arc<Mutex<BTreeMap<[u8; 16], OwnedFd>>>);

impl SharedObjects {
    /// An empty table.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts an object into the table; the descriptor that had its name is closed.
    pub fn insert(&self, uuid: Uuid, object: OwnedFd) {
        self.lock().insert(uuid.bytes, object);
    }

    /// Takes an object out.
    pub fn remove(&self, uuid: &Uuid) -> Option<OwnedFd> {
        self.lock().remove(&uuid.bytes)
    }

    /// A descriptor of an object, if there is one with this name.
    #[must_use]
    pub fn find(&self, uuid: &Uuid) -> Option<OwnedFd> {
        self.lock().get(&uuid.bytes)?.try_clone().ok()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<[u8; 16], OwnedFd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
