//! Writes packets to a file as tcpdump and Wireshark read it (libpcap's format, version 2.4).
//!
//! Times count from the beginning of the file: a clock that somebody sets does not bend them. Invariant: a
//! file that cannot be written costs its rest, not a packet.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Instant;

use outboard::Error;
use tracing::warn;

/// Bytes of a packet that are kept: all.
const SNAP: u32 = 262_144;
/// The kind of link: Ethernet.
const ETHERNET: u32 = 1;

/// See the module.
#[derive(Debug)]
pub(super) struct Capture(Option<(BufWriter<File>, Instant)>);

impl Capture {
    /// Begins a file, in place of one that is there.
    pub(super) fn create(path: &Path) -> Result<Self, Error> {
        let failed = |error| Error::refused(format!("{}: {error}", path.display()));
        let mut file = BufWriter::new(File::create(path).map_err(failed)?);
        let mut head = Vec::with_capacity(24);
        head.extend(0xa1b2_c3d4_u32.to_le_bytes());
        head.extend(2_u16.to_le_bytes());
        head.extend(4_u16.to_le_bytes());
        head.extend([0; 8]);
        head.extend(SNAP.to_le_bytes());
        head.extend(ETHERNET.to_le_bytes());
        file.write_all(&head).and_then(|()| file.flush()).map_err(failed)?;
        Ok(Self(Some((file, Instant::now()))))
    }

    /// Adds a packet.
    pub(super) fn packet(&mut self, packet: &[u8]) {
        let Some((file, start)) = &mut self.0 else { return };
        let now = start.elapsed();
        let length = u32::try_from(packet.len()).unwrap_or(SNAP);
        let seconds = u32::try_from(now.as_secs()).unwrap_or(u32::MAX);
        let head = [seconds, now.subsec_micros(), length, length];
        let mut bytes = [0; 16];
        for (to, field) in bytes.chunks_exact_mut(4).zip(head) {
            to.copy_from_slice(&field.to_le_bytes());
        }
        if let Err(error) = file.write_all(&bytes).and_then(|()| file.write_all(packet)) {
            warn!("no more packets are captured: {error}");
            self.0 = None;
        }
    }

    /// Everything so far is in the file.
    pub(super) fn flush(&mut self) {
        if let Some((file, _)) = &mut self.0 {
            // The next packet tells.
            let _ = file.flush();
        }
    }
}
