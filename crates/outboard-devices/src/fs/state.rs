//! What a file system tells its next process: version 1.
//!
//! ```text
//!  options of FUSE │ what PassthroughFs says of its nodes and handles, by path or by file handle
//! ```
//! Invariant: a share that nobody has mounted keeps nothing; a state that cannot be taken whole leaves nothing
//! open.

use std::sync::Arc;

use outboard::{Error, Saved, Snapshot};

use super::server::Serve;

/// The newest version that this program reads, and the one that it writes.
pub const STATE_VERSION: u32 = 1;

/// Made on the thread of the transfer: finding paths takes its time.
pub(super) fn save(server: &Arc<dyn Serve>) -> Snapshot {
    let server = Arc::clone(server);
    Snapshot::later(STATE_VERSION, move || {
        let (options, state) = server.save()?;
        Ok([&options.to_le_bytes()[..], &state].concat())
    })
}

pub(super) fn load(server: &dyn Serve, saved: Saved<'_>) -> Result<(), Error> {
    saved.up_to(STATE_VERSION)?;
    let (options, state) = saved
        .bytes()
        .split_first_chunk()
        .ok_or_else(|| Error::refused("state: shorter than its options"))?;
    let loaded = server.load(u64::from_le_bytes(*options), state);
    loaded.map_err(|error| Error::refused(format!("state: {error}")))
}
