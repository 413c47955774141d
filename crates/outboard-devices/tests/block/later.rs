//! A disk of a later program, for tests: state version 2, which also says how much was discarded. It
//! reads versions 1 and 2, and writes 2, or 1 for an earlier program that is to have the disk back.

use outboard::{ConfigWrite, Error, MakeWorker, Model, QueueSpec, Saved, Snapshot};
use outboard_devices::block::{Block, BlockWorker, STATE_VERSION, feature};
use serde::{Deserialize, Serialize};

/// The configuration's capacity, block size and writeback fields (virtio 1.3 §5.2.4).
const CAPACITY: u32 = 0;
const BLOCK_SIZE: u32 = 20;
const WRITEBACK: u32 = 32;

pub(crate) struct Later {
    pub(crate) disk: Block,
    pub(crate) discarded: u64,
    /// The version that it writes.
    pub(crate) writes: u32,
}

#[derive(Serialize, Deserialize)]
struct Version2 {
    sectors: u64,
    block_size: u32,
    read_only: bool,
    writeback: bool,
    flush_failed: bool,
    discarded: u64,
}

impl Later {
    pub(crate) fn new(disk: Block, discarded: u64) -> Self {
        Self { disk, discarded, writes: 2 }
    }

    fn config<const N: usize>(&self, offset: u32) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        self.disk.read_config(offset, &mut bytes)?;
        Ok(bytes)
    }
}

impl Model for Later {
    type Worker = BlockWorker;

    fn queues(&self) -> Vec<QueueSpec> {
        self.disk.queues()
    }

    fn make_worker(&self) -> MakeWorker<BlockWorker> {
        self.disk.make_worker()
    }

    fn threads(&self) -> usize {
        self.disk.threads()
    }

    fn features(&self) -> u64 {
        self.disk.features()
    }

    fn ack_features(&mut self, features: u64) -> Result<(), Error> {
        self.disk.ack_features(features)
    }

    fn device_type(&self) -> String {
        self.disk.device_type()
    }

    fn config_size(&self) -> u32 {
        self.disk.config_size()
    }

    fn read_config(&self, offset: u32, bytes: &mut [u8]) -> Result<(), Error> {
        self.disk.read_config(offset, bytes)
    }

    fn write_config(
        &mut self,
        offset: u32,
        bytes: &[u8],
        origin: ConfigWrite,
    ) -> Result<(), Error> {
        self.disk.write_config(offset, bytes, origin)
    }

    fn resume(&mut self) -> Result<(), Error> {
        self.disk.resume()
    }

    fn suspend(&mut self) -> Result<(), Error> {
        self.disk.suspend()
    }

    fn reset(&mut self) -> Result<(), Error> {
        self.discarded = 0;
        self.disk.reset()
    }

    fn snapshot(&mut self) -> Result<Snapshot, Error> {
        if self.writes == STATE_VERSION {
            return self.disk.snapshot();
        }
        let state = Version2 {
            sectors: u64::from_le_bytes(self.config(CAPACITY)?),
            block_size: u32::from_le_bytes(self.config(BLOCK_SIZE)?),
            read_only: self.features() & feature::RO != 0,
            writeback: self.config(WRITEBACK)? != [0],
            flush_failed: false,
            discarded: self.discarded,
        };
        Ok(Snapshot::of(2, state))
    }

    /// Version 1 lacks a field and says the rest as version 2 does.
    fn restore(&mut self, saved: Saved<'_>) -> Result<(), Error> {
        saved.up_to(2)?;
        let discarded = match saved.version() {
            1 => 0,
            _ => saved.read::<Version2>(2)?.discarded,
        };
        self.disk.restore(Saved::new(1, saved.bytes(), saved.features()))?;
        self.discarded = discarded;
        Ok(())
    }
}
