//! Serves the requests of one queue, on its thread or through the pool.
//!
//! Invariant: the queue of high priority, where nodes are forgotten, waits for no file.

use std::sync::Arc;

use outboard::{Error, Request, Served, Worker};
use rustix::fs::Mode;
use rustix::thread::UnshareFlags;

use super::pool::Pool;
use super::server::Serve;

/// The queue of high priority.
const HIPRIO: u16 = 0;

/// See the module.
pub struct FsWorker {
    server: Arc<dyn Serve>,
    pool: Option<Arc<Pool>>,
    /// What the server was told last.
    returns: Option<bool>,
}

impl std::fmt::Debug for FsWorker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FsWorker").finish_non_exhaustive()
    }
}

impl FsWorker {
    pub(super) fn new(server: Arc<dyn Serve>, pool: Option<Arc<Pool>>) -> Result<Self, Error> {
        own_directory()?;
        Ok(Self { server, pool, returns: None })
    }
}

/// Extended attributes of what is no file are reached through the working directory, and what the guest makes
/// has the mode that the guest says: this thread gets a directory and a umask of its own.
#[expect(deprecated, reason = "only sharing of descriptors makes unshare(2) unsafe")]
pub(super) fn own_directory() -> Result<(), Error> {
    rustix::thread::unshare(UnshareFlags::FS)?;
    rustix::process::umask(Mode::empty());
    Ok(())
}

impl Worker for FsWorker {
    fn serve(&mut self, mut request: Request<'_>) -> Result<Served, Error> {
        if self.returns != Some(request.is_tracked()) {
            self.returns = Some(request.is_tracked());
            self.server.will_return(request.is_tracked());
        }
        match &self.pool {
            Some(pool) if request.queue() != HIPRIO => {
                let repeated = request.is_repeated();
                pool.take(request.defer(), repeated);
                Ok(Served::later())
            }
            _ => {
                let repeated = request.is_repeated();
                let written = self.server.serve(&mut request, repeated);
                Ok(request.done(written))
            }
        }
    }
}
