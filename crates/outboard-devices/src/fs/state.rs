//! What a file system tells its next process: version 1, and with a window that is in use version 2.
//!
//! ```text
//!  1  options of FUSE │ what PassthroughFs says of its nodes and handles, by path or by file handle
//!  2  options of FUSE │ count │ count × (place, length, node, offset, writable) │ as in 1      (64 bits each)
//! ```
//! Invariant: a share that nobody has mounted keeps nothing; a state that cannot be taken whole leaves nothing
//! open.

use std::io;
use std::sync::Arc;

use outboard::{Error, Saved, Snapshot};
use rustix::io::Errno;

use super::server::Serve;
use super::window::{Piece, Window};

/// The newest version that this program reads and writes.
pub const STATE_VERSION: u32 = 2;
/// The version of a state without mappings.
const PLAIN: u32 = 1;

/// Made on the thread of the transfer: finding paths takes its time.
pub(super) fn save(server: &Arc<dyn Serve>, window: Option<&Window>) -> Snapshot {
    let server = Arc::clone(server);
    let pieces = window.map(Window::pieces).unwrap_or_default();
    let version = if pieces.is_empty() { PLAIN } else { STATE_VERSION };
    Snapshot::later(version, move || {
        let (options, state) = server.save()?;
        let mut bytes = options.to_le_bytes().to_vec();
        if version > PLAIN {
            bytes.extend((pieces.len() as u64).to_le_bytes());
            for Piece { at, length, node, offset, writable, .. } in pieces {
                let words = [at, length, node, offset, u64::from(writable)];
                bytes.extend(words.into_iter().flat_map(u64::to_le_bytes));
            }
        }
        bytes.extend(state);
        Ok(bytes)
    })
}

fn word(bytes: &mut &[u8]) -> Result<u64, Error> {
    let (word, rest) =
        bytes.split_first_chunk().ok_or_else(|| Error::refused("state: shorter than it says"))?;
    *bytes = rest;
    Ok(u64::from_le_bytes(*word))
}

pub(super) fn load(
    server: &dyn Serve,
    window: Option<&Window>,
    saved: Saved<'_>,
) -> Result<(), Error> {
    saved.up_to(STATE_VERSION)?;
    let mut bytes = saved.bytes();
    let options = word(&mut bytes)?;
    let mut places = Vec::new();
    let count = if saved.version() > PLAIN { word(&mut bytes)? } else { 0 };
    for _ in 0..count {
        let mut place = [0; 5];
        for one in &mut place {
            *one = word(&mut bytes)?;
        }
        places.push(place);
    }
    let refused = |error: io::Error| Error::refused(format!("state: {error}"));
    if let Some(window) = window {
        window.is_gone();
    }
    server.load(options, bytes).map_err(refused)?;
    if places.is_empty() {
        return Ok(());
    }
    let mapped = map_again(server, window, &places);
    mapped.inspect_err(|_| server.destroy()).map_err(refused)
}

fn map_again(server: &dyn Serve, window: Option<&Window>, places: &[[u64; 5]]) -> io::Result<()> {
    let window = window.ok_or(Errno::NXIO)?;
    let piece = |&[at, length, node, offset, writable]: &[u64; 5]| {
        let writable = writable != 0;
        let file = Arc::new(server.file(node, writable)?);
        Ok(Piece { at, length, node, file, offset, writable })
    };
    window.restore(places.iter().map(piece).collect::<io::Result<_>>()?)
}
