//! Guest memory that comes while its guest runs already (vhost-user, "Migration: postcopy").

use std::os::fd::OwnedFd;
use std::sync::Arc;

use outboard_memory::{GuestMemory, MapOptions, Region, UserFault};
use outboard_protocol::payload::MemRegion;
use outboard_protocol::{Effect, Refusal};

use super::{Device, refused, spec};

/// What was advised, and what was mapped for it.
#[derive(Default)]
pub(super) struct Incoming {
    fault: Option<UserFault>,
    regions: Vec<Arc<Region>>,
}

impl Device {
    /// The messages of postcopy; the effect, if it is none of them.
    pub(super) fn carry_out_postcopy(
        &mut self,
        effect: Effect<OwnedFd>,
    ) -> Option<Effect<OwnedFd>> {
        match effect {
            Effect::PostcopyAdvise { ticket } => {
                let fd = self.advise();
                self.backend.answer(ticket, fd);
            }
            Effect::PostcopyListen { ticket } => self.backend.answer(ticket, Ok(())),
            Effect::PostcopyMap { regions, ticket } => {
                let bases = self.map_aside(regions);
                self.backend.answer(ticket, bases);
            }
            Effect::PostcopyRegister { ticket } => {
                let done = self.register();
                self.backend.answer(ticket, done);
            }
            Effect::PostcopyEnd { ticket } => {
                self.incoming = Incoming::default();
                if self.is("postcopy-forgets-memory") {
                    self.memory = super::no_memory();
                }
                self.backend.answer(ticket, Ok(()));
            }
            other => return Some(other),
        }
        None
    }

    /// Whether POSTCOPY_ADVISE has come.
    pub(crate) const fn is_advised(&self) -> bool {
        self.incoming.fault.is_some()
    }

    fn advise(&mut self) -> Result<OwnedFd, Refusal> {
        let fault = UserFault::new().map_err(|_| refused())?;
        let fd = fault.descriptor().map_err(|_| refused())?;
        if self.is("leaks-userfaults") {
            std::mem::forget(fd.try_clone().expect("a descriptor"));
        }
        self.incoming.fault = Some(fault);
        Ok(fd)
    }

    fn map_aside(&mut self, regions: Vec<(MemRegion, OwnedFd)>) -> Result<Vec<u64>, Refusal> {
        let options = MapOptions { dont_fork: true, ..MapOptions::default() };
        let mapped: Result<Vec<_>, _> = regions
            .into_iter()
            .map(|(region, fd)| Region::map(spec(&region), fd, options).map(Arc::new))
            .collect();
        self.incoming.regions = mapped.map_err(|_| refused())?;
        let bases = self.incoming.regions.iter().map(|region| region.host().addr() as u64);
        Ok(bases.collect())
    }

    fn register(&mut self) -> Result<(), Refusal> {
        let Incoming { fault, regions } = &self.incoming;
        let fault = fault.as_ref().ok_or_else(refused)?;
        if !self.is("postcopy-registers-nothing") {
            for region in regions {
                fault.register(region).map_err(|_| refused())?;
            }
        }
        let memory = GuestMemory::new(1, regions.clone()).map_err(|_| refused())?;
        self.memory = Arc::new(memory);
        Ok(())
    }
}
