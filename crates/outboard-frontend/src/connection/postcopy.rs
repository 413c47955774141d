//! Postcopy, the front-end's side: the guest runs while its memory still comes
//! (vhost-user messages 28 to 30; [`FaultServer`] serves the faults).

use std::os::fd::BorrowedFd;

use outboard_memory::{FaultServer, RegionSpec};
use outboard_protocol::{Answer, MemRegion, Request};

use super::{Connection, duplicate, wire_region};
use crate::error::Error;

impl Connection {
    /// POSTCOPY_ADVISE: the faults of the back-end, to be served from now on.
    ///
    /// # Errors
    /// [`Error::WrongAnswer`] when it gives none, else as [`Self::call`].
    pub fn postcopy_advise(&mut self) -> Result<FaultServer, Error> {
        match self.answer(Request::PostcopyAdvise)? {
            Answer::UserFault(Some(fd)) => Ok(FaultServer::new(fd)),
            _ => Err(Error::WrongAnswer { request: "POSTCOPY_ADVISE" }),
        }
    }

    /// POSTCOPY_LISTEN: the next table is the one that comes page by page.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn postcopy_listen(&mut self) -> Result<(), Error> {
        self.acknowledged(Request::PostcopyListen)
    }

    /// SET_MEM_TABLE while listening; the descriptors stay the caller's. The regions with the
    /// back-end's own addresses, in which it will report its faults. Nothing is touched before
    /// [`Self::postcopy_ready`].
    ///
    /// # Errors
    /// [`Error::WrongAnswer`] when other regions come back, else as [`Self::call`].
    pub fn postcopy_mem_table<'a>(
        &mut self,
        regions: impl Iterator<Item = (RegionSpec, BorrowedFd<'a>)>,
    ) -> Result<Vec<MemRegion>, Error> {
        let regions: Result<Vec<_>, Error> =
            regions.map(|(spec, file)| Ok((wire_region(&spec), duplicate(file)?))).collect();
        let regions = regions?;
        let asked: Vec<_> = regions.iter().map(|(region, _)| *region).collect();
        match self.answer(Request::PostcopyMemTable(regions))? {
            Answer::PostcopyTable(there) if there.len() == asked.len() => Ok(there),
            _ => Err(Error::WrongAnswer { request: "SET_MEM_TABLE" }),
        }
    }

    /// The word that faults in that table can be served.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn postcopy_ready(&mut self) -> Result<(), Error> {
        self.acknowledged(Request::PostcopyReady)
    }

    /// POSTCOPY_END: all pages have come.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn postcopy_end(&mut self) -> Result<(), Error> {
        self.acknowledged(Request::PostcopyEnd)
    }
}
