//! Postcopy: guest memory that comes while the guest runs already (vhost-user messages 28 to 30,
//! "Migration: postcopy").
//!
//! Invariant: nothing of a region is touched before its faults are served; a front-end that leaves
//! in the middle leaves errors behind, never zeros that look like data.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use outboard_memory::{GuestMemory, Region, UserFault};
use outboard_protocol::{Effect, MemRegion, Refusal};
use tracing::{debug, info};

use super::session::Session;
use crate::device::VhostUserDevice;
use crate::reactor::Reactor;

/// What a session holds of it.
#[derive(Debug)]
pub(crate) struct Postcopy {
    fault: UserFault,
    regions: Vec<Arc<Region>>,
}

impl<D: VhostUserDevice, R: Reactor> Session<'_, D, R> {
    /// The messages of postcopy. What is not here is not offered.
    pub(super) async fn carry_out_postcopy(&mut self, effect: Effect<OwnedFd>) {
        match effect {
            Effect::PostcopyAdvise { ticket } => {
                let fault = self.postcopy_advise();
                self.backend.answer(ticket, fault);
            }
            Effect::PostcopyListen { ticket } => self.acknowledge(ticket, Ok(())),
            Effect::PostcopyMap { regions, ticket } => {
                let bases = self.postcopy_map(regions);
                self.backend.answer(ticket, bases);
            }
            Effect::PostcopyRegister { ticket } => {
                let done = self.postcopy_register().await;
                self.acknowledge(ticket, done);
            }
            Effect::PostcopyEnd { ticket } => {
                self.postcopy_end();
                self.acknowledge(ticket, Ok(()));
            }
            other => debug!("{} is not offered", other.name()),
        }
    }

    /// POSTCOPY_ADVISE: a userfaultfd for the front-end to serve.
    fn postcopy_advise(&mut self) -> Result<OwnedFd, Refusal> {
        let fault = UserFault::new().map_err(Refusal::because)?;
        let theirs = fault.descriptor().map_err(Refusal::because)?;
        self.postcopy = Some(Postcopy { fault, regions: Vec::new() });
        Ok(theirs)
    }

    /// SET_MEM_TABLE while listening: mapped, and not touched. Where it is.
    fn postcopy_map(&mut self, regions: Vec<(MemRegion, OwnedFd)>) -> Result<Vec<u64>, Refusal> {
        let mut mapped = Vec::with_capacity(regions.len());
        for (region, fd) in regions {
            mapped.push(Arc::new(self.map(&region, fd)?));
        }
        let bases = mapped.iter().map(|region| region.host().addr() as u64).collect();
        let postcopy = self.postcopy.as_mut().ok_or_else(|| Refusal::because("not advised"))?;
        postcopy.regions = mapped;
        Ok(bases)
    }

    /// The front-end can serve faults: the table comes into use.
    async fn postcopy_register(&mut self) -> Result<(), Refusal> {
        let postcopy = self.postcopy.as_ref().ok_or_else(|| Refusal::because("not advised"))?;
        for region in &postcopy.regions {
            postcopy.fault.register(region).map_err(Refusal::because)?;
        }
        let regions = postcopy.regions.clone();
        let memory = GuestMemory::new(self.memory.generation() + 1, regions);
        self.install(memory.map_err(Refusal::because)?, true).await?;
        info!("postcopy: guest memory comes as it is touched");
        Ok(())
    }

    /// POSTCOPY_END: all pages have come.
    fn postcopy_end(&mut self) {
        self.postcopy = None;
        info!("postcopy: all of guest memory has come");
    }

    /// The session ends before all pages have come. To be called before the rings are stopped:
    /// their requests may wait for one.
    pub(super) fn postcopy_abandon(&mut self) {
        if let Some(Postcopy { fault, regions }) = self.postcopy.take() {
            fault.abandon(&regions);
        }
    }
}
