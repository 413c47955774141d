//! Memory, the dirty log, the in-flight region, the IOTLB and postcopy (vhost-user, "Memory
//! access", "Migration", "IOMMU support", "Inflight I/O tracking").
//!
//! Invariant: every range that leaves here was added up without wrapping, and no count from the
//! wire is larger than a constant.

use super::rings::{parse, wrong_size};
use super::{Backend, Commit, Handled, Inbound, Postcopy};
use crate::effect::Effect;
use crate::features::virtio;
use crate::payload::{
    Inflight, Iotlb, Log, MAX_REGIONS, MemTableHead, SingleRegion, TOLERATED_SLOTS,
    decode_inflight, decode_mem_table,
};
use crate::regions::{check_overlap, check_range, check_region, check_table, wide};
use crate::violation::Violation;

const IOTLB_UPDATE: u8 = 2;
const IOTLB_INVALIDATE: u8 = 3;

impl<Fd> Backend<Fd> {
    pub(super) fn set_mem_table(&mut self, m: Inbound<Fd>) -> Handled<Fd> {
        let message = m.name();
        let head: MemTableHead = parse(&m)?;
        if self.postcopy == Postcopy::Mapped {
            return self.postcopy_ready(&m);
        }
        let count = u64::from(head.count);
        if count > wide(MAX_REGIONS) {
            return Err(Violation::Regions { message, count, max: wide(MAX_REGIONS) });
        }
        let regions = decode_mem_table(&m.payload).ok_or_else(|| wrong_size(&m))?;
        let slots = m.payload.len().saturating_sub(size_of::<MemTableHead>()) / 32;
        if slots > regions.len().max(TOLERATED_SLOTS) {
            return Err(wrong_size(&m));
        }
        if m.fds.len() != regions.len() {
            return Err(Violation::FdCount { message, got: m.fds.len() });
        }
        check_table(message, &regions)?;
        if self.postcopy == Postcopy::Listening {
            let ticket = self.ticket(&m, Commit::MapTable(regions.clone()));
            let regions = regions.into_iter().zip(m.fds).collect();
            return Ok(Some(Effect::PostcopyMap { regions, ticket }));
        }
        let ticket = self.ticket(&m, Commit::Table(regions.clone()));
        let regions = regions.into_iter().zip(m.fds).collect();
        Ok(Some(Effect::SetMemTable { regions, ticket }))
    }

    /// Eight bytes of zeros: the front-end knows our addresses and can serve page faults now.
    fn postcopy_ready(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        if m.payload != [0; 8] || !m.fds.is_empty() {
            return Err(Violation::PostcopyOrder { message: m.name() });
        }
        let ticket = self.ticket(m, Commit::RegisterTable);
        Ok(Some(Effect::PostcopyRegister { ticket }))
    }

    pub(super) fn add_mem_reg(&mut self, mut m: Inbound<Fd>) -> Handled<Fd> {
        let SingleRegion { region, .. } = parse(&m)?;
        let message = m.name();
        check_region(message, &region)?;
        let (count, max) = (wide(self.regions.len()) + 1, self.offer.mem_slots);
        if count > max {
            return Err(Violation::Regions { message, count, max });
        }
        check_overlap(&self.regions, &region)?;
        let fd = take_fd(&mut m)?;
        let ticket = self.ticket(&m, Commit::AddRegion(region));
        Ok(Some(Effect::AddMemRegion { region, fd, ticket }))
    }

    pub(super) fn rem_mem_reg(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        let SingleRegion { region, .. } = parse(m)?;
        let Some(region) = self.regions.iter().find(|old| old.same_slot(&region)).copied() else {
            let (guest_addr, user_addr) = (region.guest_addr, region.user_addr);
            return Err(Violation::RegionUnknown { guest_addr, user_addr, size: region.size });
        };
        let ticket = self.ticket(m, Commit::RemRegion(region));
        Ok(Some(Effect::RemMemRegion { region, ticket }))
    }

    pub(super) fn set_log_base(&mut self, mut m: Inbound<Fd>) -> Handled<Fd> {
        // Eight bytes are well formed only without LOG_SHMFD, and then the gate is shut.
        let log: Log = parse(&m)?;
        check_range(m.name(), "log offset", log.mmap_offset, log.mmap_size)?;
        if log.mmap_size == 0 {
            return Err(Violation::TooSmall { message: m.name(), have: 0, need: 1 });
        }
        // The bits are counted in words; a page of the file the log may begin anywhere in.
        if !log.mmap_offset.is_multiple_of(8) {
            let (what, value) = ("log offset", log.mmap_offset);
            return Err(Violation::Value { message: m.name(), what, value });
        }
        let fd = take_fd(&mut m)?;
        let ticket = self.ticket(&m, Commit::Nothing);
        Ok(Some(Effect::SetLogBase { log, fd, ticket }))
    }

    pub(super) fn set_log_fd(&mut self, mut m: Inbound<Fd>) -> Handled<Fd> {
        let fd = take_fd(&mut m)?;
        let ticket = self.ticket(&m, Commit::Nothing);
        Ok(Some(Effect::SetLogFd { fd, ticket }))
    }

    pub(super) fn get_inflight_fd(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        let Inflight { num_queues, queue_size, .. } = self.inflight_shape(m)?;
        let ticket = self.ticket(m, Commit::Nothing);
        Ok(Some(Effect::GetInflightFd { num_queues, queue_size, ticket }))
    }

    pub(super) fn set_inflight_fd(&mut self, mut m: Inbound<Fd>) -> Handled<Fd> {
        let inflight = self.inflight_shape(&m)?;
        let message = m.name();
        check_range(message, "file offset", inflight.mmap_offset, inflight.mmap_size)?;
        let packed = self.now.acked & virtio::RING_PACKED != 0;
        let area = Inflight::area_size(inflight.queue_size, packed);
        // At most 65535 areas of about 2 MiB: the product fits.
        let need = u64::from(inflight.num_queues).saturating_mul(area);
        if inflight.mmap_size < need {
            return Err(Violation::TooSmall { message, have: inflight.mmap_size, need });
        }
        let fd = take_fd(&mut m)?;
        let ticket = self.ticket(&m, Commit::Nothing);
        Ok(Some(Effect::SetInflightFd { inflight, fd, ticket }))
    }

    fn inflight_shape(&self, m: &Inbound<Fd>) -> Result<Inflight, Violation> {
        let inflight = decode_inflight(&m.payload).ok_or_else(|| wrong_size(m))?;
        let limits = [
            ("number of rings", inflight.num_queues, self.offer.queues),
            ("ring size", inflight.queue_size, self.offer.max_queue_size),
        ];
        for (what, value, max) in limits {
            if value == 0 || value > max {
                return Err(Violation::Value { message: m.name(), what, value: u64::from(value) });
            }
        }
        Ok(inflight)
    }

    pub(super) fn iotlb(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        let entry: Iotlb = parse(m)?;
        let bad = |what, value: u64| Err(Violation::Value { message: m.name(), what, value });
        if !matches!(entry.kind, IOTLB_UPDATE | IOTLB_INVALIDATE) {
            return bad("kind", u64::from(entry.kind));
        }
        if entry.size == 0 || entry.size == u64::MAX {
            return bad("size", entry.size);
        }
        check_range(m.name(), "I/O address", entry.iova, entry.size)?;
        if entry.kind == IOTLB_UPDATE {
            if !(1..=3).contains(&entry.perm) {
                return bad("permission", u64::from(entry.perm));
            }
            check_range(m.name(), "user address", entry.uaddr, entry.size)?;
        }
        let ticket = self.ticket(m, Commit::Nothing);
        Ok(Some(Effect::Iotlb { message: entry, ticket }))
    }

    pub(super) fn postcopy_advise(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        if !matches!(self.postcopy, Postcopy::Off | Postcopy::Advised) {
            return Err(Violation::PostcopyOrder { message: m.name() });
        }
        let ticket = self.ticket(m, Commit::Postcopy(Postcopy::Advised));
        Ok(Some(Effect::PostcopyAdvise { ticket }))
    }

    pub(super) fn postcopy_listen(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        let ticket = self.ticket(m, Commit::Postcopy(Postcopy::Listening));
        Ok(Some(Effect::PostcopyListen { ticket }))
    }

    pub(super) fn postcopy_end(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        if self.postcopy == Postcopy::Off {
            return Err(Violation::PostcopyOrder { message: m.name() });
        }
        let ticket = self.ticket(m, Commit::Postcopy(Postcopy::Off));
        Ok(Some(Effect::PostcopyEnd { ticket }))
    }
}

/// Takes the one descriptor of a message; the table made sure that there is one.
pub(super) fn take_fd<Fd>(m: &mut Inbound<Fd>) -> Result<Fd, Violation> {
    m.fds.pop().ok_or(Violation::FdCount { message: m.head.info.name, got: 0 })
}
