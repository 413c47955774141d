//! The IOMMU of a session (vhost-user, "IOMMU support": IOTLB_MSG; VIRTIO_F_ACCESS_PLATFORM).
//!
//! ```text
//!  update ─▶ Iotlb ─▶ next generation ─▶ every running queue takes it ─▶ acknowledged
//!  invalidate ─▶ Iotlb ─▶ next generation, drained: what is in flight is finished first ─▶ acknowledged
//! ```
//! It is on when the front-end has acknowledged ACCESS_PLATFORM and BACKEND_REQ and has given a channel:
//! then every address of rings and requests is an I/O address. A front-end that acknowledges the feature
//! without a channel could not be asked for anything; its addresses are taken as without an IOMMU, and
//! the channel it gives later (its rings may run) turns the IOMMU on, with an empty table.
//!
//! Invariants: after the answer to an invalidation no queue and no request uses the range. A miss is
//! never waited for here: the queue that has it rests. The table is empty when no ring runs, because
//! front-ends send invalidations only while their device is started, and when a memory region went away.

use std::sync::Arc;

use outboard_memory::{GuestMemory, Iotlb, Permission};
use outboard_protocol::payload::{IOTLB_UPDATE, Iotlb as Message};
use outboard_protocol::{ProtocolFeatures, Refusal, virtio};
use tracing::info;

use super::session::Session;
use crate::device::VhostUserDevice;
use crate::mailbox::Change;
use crate::reactor::Reactor;

/// The IOTLB, and what queues see of guest memory.
#[derive(Debug)]
pub(crate) struct Iommu {
    on: bool,
    /// The front-end has given a channel.
    has_channel: bool,
    table: Iotlb,
    generation: u64,
    space: Arc<GuestMemory>,
    /// A queue was not done in time with what went away: who asks next waits for it again.
    overdue: bool,
}

impl Iommu {
    /// Off.
    pub(super) fn new(memory: &Arc<GuestMemory>) -> Self {
        let space = Arc::clone(memory);
        let table = Iotlb::new();
        Self { on: false, has_channel: false, table, generation: 0, space, overdue: false }
    }

    /// What queues see.
    pub(super) fn space(&self) -> &Arc<GuestMemory> {
        &self.space
    }

    /// Makes what queues see anew: memory or the table has changed.
    pub(super) fn renew(&mut self, memory: &Arc<GuestMemory>) -> Arc<GuestMemory> {
        self.space = if self.on {
            self.generation += 1;
            Arc::new(self.table.view(self.generation, memory))
        } else {
            Arc::clone(memory)
        };
        Arc::clone(&self.space)
    }

    /// Forgets every entry.
    pub(super) fn flush(&mut self) {
        self.table.clear();
    }
}

impl<D: VhostUserDevice, R: Reactor> Session<'_, D, R> {
    /// IOTLB_MSG: an entry is put in, or what lies in a range is taken away.
    pub(super) async fn iotlb_message(&mut self, message: &Message) -> Result<(), Refusal> {
        let &Message { iova, size, uaddr, perm, kind, .. } = message;
        let drain = if kind == IOTLB_UPDATE {
            let permission = Permission::from_bits(perm);
            let permission = permission.ok_or_else(|| Refusal::because("no such permission"))?;
            let table = &mut self.iommu.table;
            let updated = table.update(&self.memory, iova, size, uaddr, permission);
            updated.map_err(Refusal::because)?
        } else {
            let any = self.iommu.table.invalidate(iova, size);
            if !any && !self.iommu.overdue {
                // No queue ever saw it, or all are done with it.
                return Ok(());
            }
            true
        };
        if !self.iommu.on {
            return Ok(());
        }
        let done = self.install_space(drain).await;
        if drain {
            self.iommu.overdue = done.is_err();
        }
        done
    }

    /// A channel was given: misses that could not be asked for are asked.
    pub(super) async fn channel_given(&mut self) -> Result<(), Refusal> {
        self.iommu.has_channel = true;
        self.turn_iommu().await?;
        if self.iommu.on {
            drop(self.post_all(|_| Change::Ask));
        }
        Ok(())
    }

    /// Features or the channel have changed: the IOMMU is turned on or off.
    pub(super) async fn turn_iommu(&mut self) -> Result<(), Refusal> {
        let acked = self.backend.acked_features() & virtio::ACCESS_PLATFORM != 0;
        let protocol = self.backend.acked_protocol_features();
        let on =
            acked && protocol.contains(ProtocolFeatures::BACKEND_REQ) && self.iommu.has_channel;
        if std::mem::replace(&mut self.iommu.on, on) == on {
            return Ok(());
        }
        info!("IOMMU {}", if on { "on: addresses are I/O addresses" } else { "off" });
        self.iommu.flush();
        self.install_space(true).await
    }

    /// The last ring has stopped: the front-end sends no invalidations any more.
    pub(super) fn flush_iotlb(&mut self) {
        self.iommu.flush();
        self.iommu.renew(&self.memory);
    }
}
