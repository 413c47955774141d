//! A guest's memory behind an IOMMU, as its VMM keeps it (VIRTIO_F_ACCESS_PLATFORM; vhost-user, "IOMMU
//! support").
//!
//! ```text
//!  Iommu::map ─▶ table ◀─ Channel: is it mapped, and for that? ── miss ◀── back-end
//!                  └───▶ Vmm::answer_miss ── IOTLB_MSG update ──────────────▶
//!  Vmm::unmap ─▶ out of the table, then IOTLB_MSG invalidate ──▶ the back-end is done with it
//! ```
//! Invariants: mappings do not overlap; the back-end is told nothing that it did not ask for, and nothing
//! that is not in the table at that moment; after [`Vmm::unmap`] it uses the range no more. Rings are
//! mapped by [`Vmm::activate`] itself; buffers are mapped by the caller, who puts I/O addresses into
//! requests. Indirect tables are not used.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use outboard_memory::{Permission, page_size};
use outboard_protocol::features::{ProtocolFeatures, virtio};
use outboard_queue::QueueLayout;

use super::{Vmm, Wanted};
use crate::channel::{ChannelEvent, ChannelThread};
use crate::error::Error;
use crate::memory::SharedMemory;
use crate::virtqueue::RingShare;

/// Where [`Iommu::map_anywhere`] begins: no guest address is that high.
const FIRST: u64 = 1 << 40;

/// One mapping; its I/O address is its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mapped {
    size: u64,
    guest: u64,
    permission: Permission,
}

/// What a device may reach. Cloning it makes another handle to the same table.
#[derive(Clone, Debug, Default)]
pub struct Iommu(Arc<Mutex<BTreeMap<u64, Mapped>>>);

impl Iommu {
    /// A table without mappings.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Mapped>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps `size` bytes at guest address `guest` to I/O address `iova`.
    ///
    /// # Errors
    /// [`Error::State`] when it is empty, wraps or overlaps another mapping.
    pub fn map(
        &self,
        iova: u64,
        size: u64,
        guest: u64,
        permission: Permission,
    ) -> Result<(), Error> {
        let wraps = Error::State("an empty range, or one that wraps, cannot be mapped");
        let Some(end) = iova.checked_add(size).filter(|_| size > 0) else { return Err(wraps) };
        if guest.checked_add(size).is_none() {
            return Err(wraps);
        }
        let mut table = self.lock();
        let before = table.range(..end).next_back();
        if before.is_some_and(|(at, mapped)| at.saturating_add(mapped.size) > iova) {
            return Err(Error::State("this I/O range is mapped already"));
        }
        table.insert(iova, Mapped { size, guest, permission });
        Ok(())
    }

    /// Maps the pages that hold `size` bytes at guest address `guest`, wherever there is room; the I/O
    /// address of the first of the bytes.
    ///
    /// # Errors
    /// As [`Self::map`].
    pub fn map_anywhere(
        &self,
        guest: u64,
        size: u64,
        permission: Permission,
    ) -> Result<u64, Error> {
        let page = page_size();
        let within = guest % page;
        let size = size.saturating_add(within).div_ceil(page).saturating_mul(page);
        let iova = {
            let table = self.lock();
            let last = table.range(FIRST..).next_back();
            // A page is left out between two, so that whoever runs over the end meets nothing.
            last.map_or(FIRST, |(at, mapped)| at.saturating_add(mapped.size).saturating_add(page))
        };
        self.map(iova, size, guest - within, permission)?;
        Ok(iova.saturating_add(within))
    }

    /// Takes the mapping that begins at `iova` away; its size. The back-end may still know it: see
    /// [`Vmm::unmap`].
    fn take(&self, iova: u64) -> Option<u64> {
        self.lock().remove(&iova).map(|mapped| mapped.size)
    }

    /// The mapping that holds `iova`, with its I/O address, if it permits `access`.
    fn find(&self, iova: u64, access: Permission) -> Option<(u64, Mapped)> {
        let table = self.lock();
        let (&at, &mapped) = table.range(..=iova).next_back()?;
        (iova - at < mapped.size && mapped.permission.allows(access)).then_some((at, mapped))
    }

    /// Whether a device may do that at this I/O address.
    #[must_use]
    pub fn permits(&self, iova: u64, perm: u8) -> bool {
        Permission::from_bits(perm).is_some_and(|access| self.find(iova, access).is_some())
    }
}

impl Wanted {
    /// Also an IOMMU, and the channel that it needs: see [`Vmm::put_behind`].
    #[must_use]
    pub fn with_iommu(mut self) -> Self {
        self.features |= virtio::ACCESS_PLATFORM;
        self.protocol |= ProtocolFeatures::BACKEND_REQ | ProtocolFeatures::REPLY_ACK;
        self
    }
}

impl Vmm {
    /// From now on the device sees guest memory through `iommu`. Before [`Self::open_channel`].
    ///
    /// # Errors
    /// [`Error::NotOffered`] when the back-end knows no IOMMU, [`Error::State`] when queues are active.
    pub fn put_behind(&mut self, iommu: Iommu) -> Result<(), Error> {
        if self.acked & virtio::ACCESS_PLATFORM == 0 {
            return Err(Error::NotOffered("ACCESS_PLATFORM"));
        }
        if !self.active.is_empty() || self.asleep.is_some() {
            return Err(Error::State("active queues cannot be put behind an IOMMU"));
        }
        self.iommu = Some(iommu);
        Ok(())
    }

    /// The next event of the channel, within `timeout`; a miss is answered with the mapping that holds it.
    /// (One that is not mapped was refused by the channel and is a [`ChannelEvent::Refused`].)
    ///
    /// # Errors
    /// Anything the channel or the connection can fail with.
    pub fn next_event(
        &mut self,
        channel: &mut ChannelThread,
        timeout: Duration,
    ) -> Result<Option<ChannelEvent>, Error> {
        let event = channel.next_event(timeout)?;
        if let Some(ChannelEvent::IotlbMiss { iova, perm }) = event {
            self.answer_miss(iova, perm)?;
        }
        Ok(event)
    }

    /// Tells the back-end the mapping that holds `iova`. False: there is none (any more).
    ///
    /// # Errors
    /// Anything the connection can fail with.
    pub fn answer_miss(&mut self, iova: u64, perm: u8) -> Result<bool, Error> {
        let access = Permission::from_bits(perm);
        let found = self.iommu.as_ref().zip(access).and_then(|(iommu, to)| iommu.find(iova, to));
        let Some((at, Mapped { size, guest, permission })) = found else { return Ok(false) };
        let user = SharedMemory::user_address(guest);
        self.connection.iotlb_update(at, size, user, permission.bits())?;
        Ok(true)
    }

    /// Takes the mapping that begins at `iova` away. When this returns the back-end uses it no more:
    /// requests that did are finished. False: there was none.
    ///
    /// # Errors
    /// Anything the connection can fail with.
    pub fn unmap(&mut self, iova: u64) -> Result<bool, Error> {
        let Some(size) = self.iommu.as_ref().and_then(|iommu| iommu.take(iova)) else {
            return Ok(false);
        };
        self.connection.iotlb_invalidate(iova, size)?;
        Ok(true)
    }

    /// Where the device finds a ring, and that these are I/O addresses. The ring is mapped if it is not.
    pub(super) fn ring_addresses(&self, ring: &RingShare) -> Result<Option<QueueLayout>, Error> {
        let Some(iommu) = &self.iommu else { return Ok(None) };
        let (start, len) = (ring.memory.guest(), crate::memory::wide(ring.memory.len()));
        let known = iommu.lock().iter().find_map(|(at, mapped)| {
            let within = start.checked_sub(mapped.guest)?;
            let whole = within.checked_add(len)? <= mapped.size;
            (whole && mapped.permission == Permission::BOTH).then_some(at + within)
        });
        let iova = match known {
            Some(iova) => iova,
            None => iommu.map_anywhere(start, len, Permission::BOTH)?,
        };
        let at = |guest: u64| iova.wrapping_add(guest.wrapping_sub(start));
        let QueueLayout { size, desc, avail, used } = ring.layout;
        Ok(Some(QueueLayout { size, desc: at(desc), avail: at(avail), used: at(used) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_do_not_overlap_and_permit_what_they_say() {
        let iommu = Iommu::new();
        iommu.map(0x1000, 0x2000, 0x4000, Permission::READ).expect("free");
        for (iova, size) in [(0x1000, 1), (0xfff, 2), (0x2fff, 1), (0, u64::MAX)] {
            let refused = iommu.map(iova, size, 0, Permission::BOTH);
            assert!(matches!(refused, Err(Error::State(_))), "{iova:#x} + {size:#x}");
        }
        assert!(iommu.map(0x3000, 0, 0, Permission::BOTH).is_err());
        assert!(iommu.map(u64::MAX, 2, 0, Permission::BOTH).is_err());
        assert!(iommu.permits(0x2fff, 1));
        assert!(
            !iommu.permits(0x2fff, 2) && !iommu.permits(0x3000, 1) && !iommu.permits(0x1000, 0)
        );
        assert_eq!(iommu.take(0x1000), Some(0x2000));
        assert!(!iommu.permits(0x1000, 1));
    }

    #[test]
    fn room_is_found_for_whole_pages_and_keeps_the_place_in_the_page() {
        let iommu = Iommu::new();
        let page = page_size();
        let first = iommu.map_anywhere(page + 10, 20, Permission::BOTH).expect("room");
        let second = iommu.map_anywhere(page, page + 1, Permission::BOTH).expect("room");
        assert_eq!(first % page, 10);
        assert!(second >= first - 10 + 2 * page, "a page between them");
        assert!(iommu.permits(second + 2 * page - 1, 3) && !iommu.permits(second + 2 * page, 1));
    }
}
