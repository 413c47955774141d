//! Serves requests for entropy (virtio 1.3 §5.4.6.1): a request is one buffer to fill, or a part of
//! it.
//!
//! Invariant: requests are taken from the ring only when there is at least one byte for the first of
//! them; nothing here waits.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::sync::Arc;

use outboard::{Error, Request, Served, Worker, WorkerContext};
use tracing::warn;

use super::{Limit, MOST};
use crate::timer::Timer;

/// Bytes that a look at the source takes.
const PROBE: usize = 256;
/// Tokens of what is waited for.
const SOURCE: u32 = 0;
const PERIOD: u32 = 1;

/// What may still be given away in this period.
#[derive(Debug)]
struct Quota {
    limit: Limit,
    left: u64,
    /// Runs from the first byte of a period to its end.
    timer: Timer,
    running: bool,
}

impl Quota {
    /// `given` bytes went.
    fn take(&mut self, given: u64) -> io::Result<()> {
        self.left = self.left.saturating_sub(given);
        if !self.running {
            self.timer.start(self.limit.period)?;
            self.running = true;
        }
        Ok(())
    }

    fn passed(&mut self) {
        if self.timer.take() {
            self.running = false;
            self.left = self.limit.bytes;
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct RngWorker {
    source: Arc<File>,
    /// Read and not given away.
    probed: Vec<u8>,
    /// The source had nothing to say, and has said nothing since.
    dry: bool,
    /// A source that fails is told about once.
    failed: bool,
    quota: Option<Quota>,
}

impl RngWorker {
    pub(super) fn new(
        source: Arc<File>,
        limit: Option<Limit>,
        context: &mut WorkerContext<'_>,
    ) -> Result<Self, Error> {
        // What cannot be waited for is always readable.
        let _ = context.watch(source.as_fd(), SOURCE);
        let quota = match limit {
            Some(limit) => {
                let timer = Timer::new()?;
                context.watch(timer.as_fd(), PERIOD)?;
                Some(Quota { limit, left: limit.bytes, timer, running: false })
            }
            None => None,
        };
        Ok(Self { source, probed: Vec::with_capacity(PROBE), dry: false, failed: false, quota })
    }

    fn left(&self) -> u64 {
        self.quota.as_ref().map_or(u64::MAX, |quota| quota.left)
    }

    /// Has a few bytes at hand, if the source has any.
    fn probe(&mut self) {
        if !self.probed.is_empty() || self.dry {
            return;
        }
        let mut bytes = [0; PROBE];
        match (&*self.source).read(&mut bytes) {
            Ok(0) => self.run_dry(None),
            Ok(got) => {
                self.failed = false;
                self.probed.extend(bytes.iter().take(got));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.dry = true,
            Err(error) => self.run_dry(Some(&error)),
        }
    }

    fn run_dry(&mut self, error: Option<&io::Error>) {
        self.dry = true;
        if !std::mem::replace(&mut self.failed, true) {
            match error {
                Some(error) => warn!("source of entropy: {error}"),
                None => warn!("source of entropy has come to its end"),
            }
        }
    }
}

impl Worker for RngWorker {
    fn wants(&mut self, _queue: u16) -> bool {
        if self.left() == 0 {
            return false;
        }
        self.probe();
        !self.probed.is_empty()
    }

    fn serve(&mut self, mut request: Request<'_>) -> Result<Served, Error> {
        let most = u32::try_from(self.left()).unwrap_or(u32::MAX).min(MOST);
        let mut room = request.writable();
        let first = u64::from(most).min(room.len()).min(self.probed.len() as u64);
        let first = u32::try_from(first).unwrap_or(0);
        let probed = self.probed.len() - usize::try_from(first).unwrap_or(0);
        room.write_all(self.probed.get(probed..).unwrap_or_default())?;
        self.probed.truncate(probed);
        let more = match room.read_from(&mut &*self.source, most - first) {
            Ok(more) => more,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => {
                self.run_dry(Some(&error));
                0
            }
        };
        let written = first + more;
        if let Some(quota) = &mut self.quota {
            quota.take(written.into())?;
        }
        Ok(request.done(written))
    }

    fn event(&mut self, token: u32) -> Result<(), Error> {
        match (token, &mut self.quota) {
            (PERIOD, Some(quota)) => quota.passed(),
            _ => self.dry = false,
        }
        Ok(())
    }
}
