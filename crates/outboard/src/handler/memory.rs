//! Guest memory of a session: SET_MEM_TABLE, ADD_MEM_REG, REM_MEM_REG, also while rings run.
//!
//! A change makes a new generation: mapped and checked whole before anything is touched, taken by
//! every running queue, and only then acknowledged; a change that fails leaves the old one (rule
//! R12). What went away is unmapped when the last request that uses it is finished.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use outboard_memory::{GuestMemory, MapOptions, Region, RegionSpec};
use outboard_protocol::{MemRegion, ProtocolFeatures, Refusal};

use super::session::Session;
use crate::device::VhostUserDevice;
use crate::mailbox::Change;
use crate::reactor::Reactor;

impl<D: VhostUserDevice, R: Reactor> Session<'_, D, R> {
    /// With GPA_ADDRESSES ring addresses are guest-physical: both spaces are one.
    fn spec(&self, region: &MemRegion) -> RegionSpec {
        let protocol = self.backend.acked_protocol_features();
        let guest_only = protocol.contains(ProtocolFeatures::GPA_ADDRESSES);
        RegionSpec {
            guest_addr: region.guest_addr,
            user_addr: if guest_only { region.guest_addr } else { region.user_addr },
            size: region.size,
            offset: region.offset,
        }
    }

    pub(super) fn map(&mut self, region: &MemRegion, fd: OwnedFd) -> Result<Region, Refusal> {
        let hooks = self.device.hooks();
        let dont_fork = hooks.is_some_and(|hooks| hooks.unmap_guest_memory_on_fork());
        let options = MapOptions { dont_fork, keep_file: self.options.hand_over };
        Region::map(self.spec(region), fd, options).map_err(Refusal::because)
    }

    /// SET_MEM_TABLE: a whole new map.
    pub(super) async fn set_mem_table(
        &mut self,
        regions: Vec<(MemRegion, OwnedFd)>,
    ) -> Result<(), Refusal> {
        let mut mapped = Vec::with_capacity(regions.len());
        for (region, fd) in regions {
            mapped.push(Arc::new(self.map(&region, fd)?));
        }
        let memory = GuestMemory::new(self.memory.generation() + 1, mapped);
        self.install(memory.map_err(Refusal::because)?, true).await
    }

    /// ADD_MEM_REG: one more region; nothing goes away, so no request has to be finished first.
    pub(super) async fn add_mem_region(
        &mut self,
        region: MemRegion,
        fd: OwnedFd,
    ) -> Result<(), Refusal> {
        let region = self.map(&region, fd)?;
        let memory = self.memory.with_region(region).map_err(Refusal::because)?;
        self.install(memory, false).await
    }

    /// REM_MEM_REG: a region goes away once nothing uses it.
    pub(super) async fn rem_mem_region(&mut self, region: MemRegion) -> Result<(), Refusal> {
        let memory = self.memory.without_region(&self.spec(&region)).map_err(Refusal::because)?;
        self.install(memory, true).await
    }

    /// Has every running queue live in `memory`, then starts the rings that waited for it. Behind an
    /// IOMMU they live in what the IOTLB has of it; that is flushed when memory goes away.
    pub(super) async fn install(
        &mut self,
        memory: GuestMemory,
        drain: bool,
    ) -> Result<(), Refusal> {
        self.memory = Arc::new(memory);
        if drain {
            self.iommu.flush();
        }
        let installed = self.install_space(drain).await;
        self.start_all_ready().await;
        installed
    }

    /// Has every running queue take what is to be seen of guest memory now.
    pub(super) async fn install_space(&mut self, drain: bool) -> Result<(), Refusal> {
        self.channel.iotlb_changes();
        let space = self.iommu.renew(&self.memory);
        let answers = self.post_all(|_| Change::Memory { memory: Arc::clone(&space), drain });
        let mut result = Ok(());
        for (index, answer) in answers {
            result = result.and(self.await_change(index, answer).await);
        }
        result
    }
}
