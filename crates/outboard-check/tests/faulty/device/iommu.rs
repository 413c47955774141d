//! A device behind an IOMMU: entries come by IOTLB_MSG, what is missing is asked for over the channel
//! (vhost-user, "IOMMU support").
//!
//! Invariant: requests are performed where they are taken, so that an invalidation finds nothing under
//! way, but for the fault that is about that.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use outboard_memory::{AccessError, GuestMemory, Iotlb, Permission};
use outboard_protocol::features::virtio;
use outboard_protocol::header::Header;
use outboard_protocol::payload::Iotlb as Message;
use outboard_queue::{Chain, DeviceQueue, RingError};
use zerocopy::IntoBytes as _;

use super::{Device, no_memory};

const PAGE: u64 = 4096;
const MISS: u8 = 1;
const UPDATE: u8 = 2;
const ACCESS_FAILURE: u8 = 4;

/// What the device knows of its IOMMU.
pub(super) struct Iommu {
    table: Iotlb,
    space: Arc<GuestMemory>,
    generation: u64,
    /// What was asked for last, and in which generation.
    asked: Option<(u64, u64)>,
    /// Entries that a fault has taken for more than they permit.
    lies: Vec<u64>,
}

impl Iommu {
    pub(super) fn new() -> Self {
        let (table, space) = (Iotlb::new(), no_memory());
        Self { table, space, generation: 0, asked: None, lies: Vec::new() }
    }
}

/// A request that a fault has taken and not performed, and when it will.
pub(super) struct Held {
    index: usize,
    chain: Chain,
    due: Instant,
}

impl Device {
    /// Whether addresses are I/O addresses.
    pub(super) fn translates(&self) -> bool {
        self.backend.acked_features() & virtio::ACCESS_PLATFORM != 0 && self.channel.is_some()
    }

    /// What the rings see.
    pub(super) fn space(&self) -> Arc<GuestMemory> {
        Arc::clone(if self.translates() { &self.iommu.space } else { &self.memory })
    }

    /// Guest memory is another: its entries are gone.
    pub(super) fn flush_iotlb(&mut self) {
        self.iommu.table.clear();
        self.renew_space();
    }

    fn renew_space(&mut self) {
        self.iommu.generation += 1;
        self.iommu.space = Arc::new(self.iommu.table.view(self.iommu.generation, &self.memory));
    }

    /// An update or an invalidation; whether it can be.
    pub(super) fn iotlb(&mut self, message: &Message) -> bool {
        let &Message { iova, size, uaddr, perm, kind, .. } = message;
        let known = self.entry(iova);
        if kind == UPDATE {
            let Some(permission) = Permission::from_bits(perm) else { return false };
            if self.is("iotlb-keeps-entries") && known == Some(perm) {
                self.renew_space();
                return true;
            }
            let lies = perm != 3 && self.is("iotlb-writes-and-tells");
            if lies {
                self.iommu.lies.push(iova);
            }
            let permission = if lies { Permission::BOTH } else { permission };
            let table = &mut self.iommu.table;
            if table.update(&self.memory, iova, size, uaddr, permission).is_err() {
                return false;
            }
        } else if !(self.is("iotlb-keeps-invalidated") && size > PAGE && self.is_idle()) {
            // What is in the ring by now is under way.
            if let Some(mut queue) = self.rings[0].queue.take() {
                let _ = self.holds(0, &mut queue);
                self.rings[0].queue = Some(queue);
            }
            self.iommu.table.invalidate(iova, size);
        }
        self.renew_space();
        true
    }

    /// What the entry of a page permits.
    fn entry(&self, iova: u64) -> Option<u8> {
        let view = outboard_memory::View::new(Arc::clone(&self.iommu.space));
        view.read(iova, &mut [0]).ok()?;
        Some(if view.cells(iova, 1).is_ok() { 3 } else { 1 })
    }

    /// Whether ring 0 holds nothing new.
    fn is_idle(&self) -> bool {
        self.rings[0].queue.as_ref().is_none_or(|queue| !queue.has_available())
    }

    /// An access that is not translated is asked for, or told when it was asked for in vain. True: the error is
    /// none of that.
    pub(super) fn need(&mut self, index: usize, error: &RingError) -> bool {
        let source = match error {
            RingError::Untranslated { source, .. } | RingError::Placement { source, .. } => source,
            _ => return true,
        };
        let (iova, access, denied) = match *source {
            AccessError::Miss { iova, access, .. } => (iova, access, false),
            AccessError::Denied { iova, access, .. } => (iova, access, true),
            _ => return true,
        };
        let generation = self.iommu.generation;
        match self.iommu.asked {
            Some((before, then)) if before == iova && then == generation => return false,
            Some((before, _)) if before == iova && denied => {
                if !self.is("iotlb-fails-silently") {
                    self.send_iotlb(iova, access.bits(), ACCESS_FAILURE);
                }
                self.broke(index);
                return false;
            }
            _ => {}
        }
        self.iommu.asked = Some((iova, generation));
        if !(self.is("iotlb-asks-nobody") && self.iommu.table.is_empty()) {
            self.send_iotlb(iova, access.bits(), MISS);
        }
        false
    }

    fn send_iotlb(&self, iova: u64, perm: u8, kind: u8) {
        let body = Message { iova, size: 0, uaddr: 0, perm, kind, padding: [0; 6] };
        let header = Header { request: 1, flags: 1, size: 32 };
        let Some(channel) = &self.channel else { return };
        let _ = rustix::io::write(channel, &[header.as_bytes(), body.as_bytes()].concat());
    }

    /// A fault has done what it should not have, and says so now.
    pub(super) fn confess(&mut self) {
        for iova in std::mem::take(&mut self.iommu.lies) {
            self.send_iotlb(iova, 2, ACCESS_FAILURE);
        }
    }

    /// Takes all requests to perform them later, whatever becomes of memory meanwhile; true: it did.
    pub(super) fn holds(
        &mut self,
        index: usize,
        queue: &mut DeviceQueue,
    ) -> Result<bool, RingError> {
        if !(self.is("iotlb-answers-too-early") && self.translates()) {
            return Ok(false);
        }
        let due = Instant::now() + Duration::from_millis(60);
        loop {
            while let Some(chain) = queue.pop()? {
                self.held.push(Held { index, chain, due });
            }
            if !queue.arm() {
                return Ok(true);
            }
        }
    }

    /// Whether something is held.
    pub(crate) fn is_slow(&self) -> bool {
        !self.held.is_empty()
    }

    /// Performs what is due.
    pub(crate) fn perform_held(&mut self) {
        let now = Instant::now();
        let (due, later): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.held).into_iter().partition(|one| one.due <= now);
        self.held = later;
        for Held { index, mut chain, .. } in due {
            let Some(mut queue) = self.rings[index].queue.take() else { continue };
            let written = self.request(&mut chain);
            queue.complete(chain, written);
            let _ = queue.publish();
            self.rings[index].queue = Some(queue);
            self.call(index);
        }
    }

    /// The end of the channel that is ours.
    pub(super) fn channel_is(&mut self, channel: OwnedFd) {
        self.channel = Some(channel);
        self.flush_iotlb();
    }
}
