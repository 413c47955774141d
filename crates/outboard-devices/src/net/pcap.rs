//! Writes packets to a file as tcpdump and Wireshark read it (libpcap's format, version 2.4).
//!
//! Times count from the beginning of the file: a clock that somebody sets does not bend them. Invariant: a
//! file that cannot be written costs its rest, not a packet.

use std::fs::File;
use std::io::{self, BufWriter, Write};
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
pub(super) struct Capture(Option<Open>);

#[derive(Debug)]
struct Open {
    file: BufWriter<File>,
    /// When its first byte was written; before that what is there is not touched.
    start: Option<Instant>,
}

impl Open {
    /// Begins the capture, in place of what is there.
    fn begin(&mut self) -> io::Result<Instant> {
        if let Some(start) = self.start {
            return Ok(start);
        }
        // Not a pipe, say.
        if self.file.get_ref().metadata()?.is_file() {
            self.file.get_ref().set_len(0)?;
        }
        let mut head = Vec::with_capacity(24);
        head.extend(0xa1b2_c3d4_u32.to_le_bytes());
        head.extend(2_u16.to_le_bytes());
        head.extend(4_u16.to_le_bytes());
        head.extend([0; 8]);
        head.extend(SNAP.to_le_bytes());
        head.extend(ETHERNET.to_le_bytes());
        self.file.write_all(&head)?;
        Ok(*self.start.insert(Instant::now()))
    }

    fn packet(&mut self, packet: &[u8]) -> io::Result<()> {
        let now = self.begin()?.elapsed();
        let length = u32::try_from(packet.len()).unwrap_or(SNAP);
        let seconds = u32::try_from(now.as_secs()).unwrap_or(u32::MAX);
        let head = [seconds, now.subsec_micros(), length, length];
        let mut bytes = [0; 16];
        for (to, field) in bytes.chunks_exact_mut(4).zip(head) {
            to.copy_from_slice(&field.to_le_bytes());
        }
        self.file.write_all(&bytes).and_then(|()| self.file.write_all(packet))
    }
}

impl Capture {
    /// Opens a file, which is begun anew with the first packet or [`Capture::flush`].
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let failed = |error| Error::refused(format!("{}: {error}", path.display()));
        let file = File::options().write(true).create(true).truncate(false).open(path);
        Ok(Self(Some(Open { file: BufWriter::new(file.map_err(failed)?), start: None })))
    }

    /// Adds a packet.
    pub(super) fn packet(&mut self, packet: &[u8]) {
        let Some(open) = &mut self.0 else { return };
        if let Err(error) = open.packet(packet) {
            warn!("no more packets are captured: {error}");
            self.0 = None;
        }
    }

    /// Everything so far is in the file.
    pub(super) fn flush(&mut self) {
        if let Some(open) = &mut self.0 {
            // The next packet tells.
            let _ = open.begin().and_then(|_| open.file.flush());
        }
    }
}
