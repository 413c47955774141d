//! An entropy source: the device of virtio 1.3 §5.4, fed from a file of the host.
//!
//! ```text
//!  source (never blocks) ─▶ probe: a few bytes ─▶ request ◀─ more of the source, up to MOST and the quota
//!      ▲ readable ─ event         └ none: requests stay in the ring
//! ```
//! Invariants: no request gets more than 64 KiB, however long its buffer is; with a limit no period
//! gives more than its quota; a source that has nothing to say stops nobody but who asks it.
//!
//! ```no_run
//! use outboard::{Server, WorkerDevice};
//! use outboard_devices::rng::{Rng, RngOptions};
//!
//! let device = WorkerDevice::new(Rng::new(RngOptions::default())?)?;
//! Server::listen("/run/rng.sock")?.serve(device)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod worker;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use outboard::{Error, MakeWorker, Model, QueueSpec};
use rustix::fs::OFlags;

pub use worker::RngWorker;

/// What one request gets at most, in bytes.
pub const MOST: u32 = 64 << 10;

/// How much may be given away: so many bytes in each period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Bytes of one period, at least one.
    pub bytes: u64,
    /// Not zero.
    pub period: Duration,
}

/// What an operator can set about a source of entropy.
#[derive(Clone, Debug)]
pub struct RngOptions {
    /// Where bytes come from: a device, a FIFO, a file.
    pub source: PathBuf,
    /// How many at most; None: as many as the source has.
    pub limit: Option<Limit>,
    /// Largest ring size: a power of two up to 32768.
    pub queue_size: u16,
}

impl Default for RngOptions {
    /// `/dev/urandom`, without a limit.
    fn default() -> Self {
        Self { source: PathBuf::from("/dev/urandom"), limit: None, queue_size: 256 }
    }
}

/// The model of a source of entropy; [`outboard::WorkerDevice`] makes a whole device of it.
#[derive(Debug)]
pub struct Rng {
    source: Arc<File>,
    options: RngOptions,
}

impl Rng {
    /// Opens the source.
    ///
    /// # Errors
    /// It cannot be opened or is a directory, or the limit or the queue makes no sense.
    pub fn new(options: RngOptions) -> Result<Self, Error> {
        if options.limit.is_some_and(|limit| limit.bytes == 0 || limit.period.is_zero()) {
            return Err(Error::refused("a limit needs at least a byte, and a period that passes"));
        }
        let size = options.queue_size;
        if !size.is_power_of_two() || size > 32768 {
            return Err(Error::refused(format!(
                "queue size {size}: it must be a power of two up to 32768"
            )));
        }
        let path = options.source.display();
        let failed = |why: String| Error::refused(format!("{path}: {why}"));
        // A FIFO without a writer would make the open wait.
        let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
        let opened = OpenOptions::new().read(true).custom_flags(flags).open(&options.source);
        let source = opened.map_err(|error| failed(error.to_string()))?;
        if source.metadata()?.is_dir() {
            return Err(failed("it is a directory".to_owned()));
        }
        Ok(Self { source: Arc::new(source), options })
    }
}

impl Model for Rng {
    type Worker = RngWorker;

    fn queues(&self) -> Vec<QueueSpec> {
        vec![QueueSpec::new("requests", self.options.queue_size)]
    }

    fn make_worker(&self) -> MakeWorker<RngWorker> {
        let (source, limit) = (Arc::clone(&self.source), self.options.limit);
        Arc::new(move |context| RngWorker::new(Arc::clone(&source), limit, context))
    }

    fn device_type(&self) -> String {
        "rng".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_is_none_and_a_limit_that_is_none_are_refused() {
        let refused = |options: RngOptions| Rng::new(options).expect_err("refused").to_string();
        let good = RngOptions::default;
        let source = PathBuf::from("/nonexistent/source");
        assert!(
            refused(RngOptions { source, ..good() }).starts_with("/nonexistent/source: No such")
        );
        assert!(refused(RngOptions { source: "/".into(), ..good() }).contains("is a directory"));
        for (bytes, period) in [(0, Duration::from_secs(1)), (1, Duration::ZERO)] {
            let limit = Some(Limit { bytes, period });
            assert!(refused(RngOptions { limit, ..good() }).contains("at least a byte"));
        }
        for queue_size in [0, 3, 40000] {
            assert!(refused(RngOptions { queue_size, ..good() }).contains("power of two"));
        }
    }
}
