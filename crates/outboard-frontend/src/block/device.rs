//! A whole block device behind its socket: opened, configured, and used with plain blocking calls.
//!
//! Invariant: the blocking calls use queue 0 and a buffer of their own, one request at a time; queues
//! that were taken out with [`BlockDevice::take_queues`] are their owner's, and the calls that need
//! them say so until they are back.

use std::path::Path;
use std::time::{Duration, Instant};

use super::config::{BlockConfig, CONFIG_SIZE, SECTOR, features};
use super::queue::BlockQueue;
use super::request::{Operation, Status};
use crate::connection::Connection;
use crate::error::Error;
use crate::memory::{Buffer, DEFAULT_GUEST_BASE, SharedMemory, wide};
use crate::snapshot::VmmSnapshot;
use crate::vmm::{QueueSetup, Vmm, Wanted};

/// How a block device is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockOptions {
    /// Number of queues to drive.
    pub queues: u16,
    /// Descriptors of each queue: a power of two.
    pub queue_size: u16,
    /// Most requests under way on each queue.
    pub depth: u16,
    /// Whether requests go into indirect tables, if the device takes them.
    pub indirect: bool,
    /// Bytes of shared memory for the caller's own buffers ([`BlockDevice::memory`]).
    pub memory: u64,
    /// In how many regions the memory is shared.
    pub regions: u16,
    /// Longest wait for any one answer of the back-end, message or request.
    pub timeout: Duration,
    /// What to negotiate.
    pub wanted: Wanted,
}

impl Default for BlockOptions {
    /// One queue of 256 descriptors, 64 requests under way, 16 MiB in one region, ten seconds.
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 256,
            depth: 64,
            indirect: false,
            memory: 16 << 20,
            regions: 1,
            timeout: Duration::from_secs(10),
            wanted: Wanted::default(),
        }
    }
}

/// Bytes of the buffer that the blocking calls go through.
const BOUNCE: u32 = 1 << 20;
/// Longest request, in segments, that goes into an indirect table.
const INDIRECT_ROOM: u16 = 8;
/// Distance of two regions in guest addresses, as a power of two: 16 GiB.
const REGION_SHIFT: u32 = 34;

/// A block device that is driven over its socket.
#[derive(Debug)]
pub struct BlockDevice {
    // The order is the order of dropping: first the socket closes, then the memory goes.
    vmm: Vmm,
    config: BlockConfig,
    options: BlockOptions,
    queues: Vec<BlockQueue>,
    bounce: Option<Buffer>,
    memory: SharedMemory,
}

impl BlockDevice {
    /// Connects to the socket at `path` and opens the device behind it.
    ///
    /// # Errors
    /// As [`Connection::connect`] and [`Self::open`].
    pub fn connect(path: impl AsRef<Path>, options: BlockOptions) -> Result<Self, Error> {
        Self::open(Connection::connect(path, options.timeout)?, options)
    }

    /// Negotiates, reads the configuration, shares memory and starts the queues.
    ///
    /// # Errors
    /// [`Error::NotOffered`] when the back-end is no modern device, [`Error::Queue`] when it has fewer
    /// queues than asked for, and anything the connection can fail with.
    pub fn open(connection: Connection, options: BlockOptions) -> Result<Self, Error> {
        let mut device = Self::prepare(connection, options, u64::MAX)?;
        device.activate()?;
        Ok(device)
    }

    /// Opens a device that takes up where another one stood ([`Self::snapshot`]), in memory of its own. Its
    /// queues sleep: [`Self::wake`] starts them.
    ///
    /// # Errors
    /// As [`Self::open`] and [`Vmm::restore`].
    pub fn restore(
        connection: Connection,
        options: BlockOptions,
        snapshot: &VmmSnapshot,
    ) -> Result<Self, Error> {
        let mut device = Self::prepare(connection, options, snapshot.features)?;
        for queue in device.vmm.restore(snapshot)? {
            device.queues.push(BlockQueue::new(queue, &device.memory, options.depth)?);
        }
        Ok(device)
    }

    /// All of [`Self::open`] up to the queues, with no more than these features.
    fn prepare(
        mut connection: Connection,
        options: BlockOptions,
        features: u64,
    ) -> Result<Self, Error> {
        connection.set_timeout(options.timeout);
        let mut vmm = Vmm::new(connection, options.wanted)?;
        vmm.mask_features(features);
        if vmm.features() & outboard_protocol::features::virtio::VERSION_1 == 0 {
            return Err(Error::NotOffered("VIRTIO_F_VERSION_1"));
        }
        let config = vmm.read_config(0, CONFIG_SIZE)?;
        let config = BlockConfig::parse(&config, vmm.features())?;
        check_queues(&mut vmm, &config, options.queues)?;
        let memory = shared_memory(&options)?;
        let bounce = memory.allocate(BOUNCE as usize, 4096)?;
        vmm.share_memory(memory.clone())?;
        Ok(Self { vmm, config, options, queues: Vec::new(), bounce: Some(bounce), memory })
    }

    /// The configuration that was read when the device was opened.
    #[must_use]
    pub const fn config(&self) -> &BlockConfig {
        &self.config
    }

    /// Reads the configuration again, for a disk that was resized.
    ///
    /// # Errors
    /// As [`Vmm::read_config`].
    pub fn refresh_config(&mut self) -> Result<&BlockConfig, Error> {
        let bytes = self.vmm.read_config(0, CONFIG_SIZE)?;
        self.config = BlockConfig::parse(&bytes, self.vmm.features())?;
        Ok(&self.config)
    }

    /// The VMM's side below, for what no call here stands for.
    pub fn vmm(&mut self) -> &mut Vmm {
        &mut self.vmm
    }

    /// The shared memory: requests' data must lie in it.
    #[must_use]
    pub const fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// The queues that are here.
    pub fn queues(&mut self) -> &mut [BlockQueue] {
        &mut self.queues
    }

    /// Hands the queues out, to be driven by the caller's own threads.
    #[must_use]
    pub fn take_queues(&mut self) -> Vec<BlockQueue> {
        std::mem::take(&mut self.queues)
    }

    /// Takes queues back.
    pub fn put_queues(&mut self, queues: Vec<BlockQueue>) {
        self.queues.extend(queues);
        self.queues.sort_by_key(BlockQueue::index);
    }

    /// Starts the queues on fresh rings.
    ///
    /// # Errors
    /// As [`Vmm::activate`].
    pub fn activate(&mut self) -> Result<(), Error> {
        let BlockOptions { queue_size: size, .. } = self.options;
        let indirect = if self.options.indirect { INDIRECT_ROOM } else { 0 };
        let setups: Vec<_> =
            (0..self.options.queues).map(|index| QueueSetup { index, size, indirect }).collect();
        for queue in self.vmm.activate(&setups)? {
            self.queues.push(BlockQueue::new(queue, &self.memory, self.options.depth)?);
        }
        Ok(())
    }

    /// Stops the queues for good and gives up what was under way; [`Self::activate`] makes new ones.
    ///
    /// # Errors
    /// As [`Vmm::reset`].
    pub fn reset(&mut self) -> Result<(), Error> {
        self.vmm.reset(Vec::new())?;
        for queue in &mut self.queues {
            // Stopped queues are finished ones: this empties them, so that their memory is free again.
            while let Some(_done) = queue.pop()? {}
        }
        self.queues.clear();
        Ok(())
    }

    /// Stops the queues and keeps their places; answers the base of each, `None` when none was active.
    ///
    /// # Errors
    /// As [`Vmm::sleep`].
    pub fn sleep(&mut self) -> Result<Option<Vec<(u16, u32)>>, Error> {
        self.vmm.sleep()
    }

    /// What another process needs to go on, of a device that sleeps ([`Self::sleep`]).
    ///
    /// # Errors
    /// As [`Vmm::snapshot`]; [`Error::State`] while finished requests are still to be popped.
    pub fn snapshot(&mut self) -> Result<VmmSnapshot, Error> {
        if self.queues.iter().any(|queue| queue.in_flight() > 0) {
            return Err(Error::State("requests are under way: wait for them and pop them first"));
        }
        self.vmm.snapshot()
    }

    /// Starts the sleeping queues where they stopped.
    ///
    /// # Errors
    /// As [`Vmm::wake`].
    pub fn wake(&mut self) -> Result<(), Error> {
        self.vmm.wake()
    }

    /// Goes on with a new back-end where the last one left everything; see [`Vmm::reconnect`].
    ///
    /// # Errors
    /// As [`Vmm::reconnect`].
    pub fn reconnect(&mut self, connection: Connection) -> Result<(), Error> {
        self.vmm.reconnect(connection)
    }

    /// Reads from `sector` on; the length must be whole sectors.
    ///
    /// # Errors
    /// [`Error::Request`] when the device fails it, [`Error::Stuck`] when it never ends.
    pub fn read(&mut self, sector: u64, to: &mut [u8]) -> Result<(), Error> {
        check_length(to.len())?;
        let mut sector = sector;
        for piece in to.chunks_mut(self.piece_size()) {
            let data = self.bounce_range(piece.len())?;
            self.run(Operation::Read { sector, data: &[data] })?;
            self.bounce()?.read(0, piece)?;
            sector = sector.wrapping_add(wide(piece.len()) / SECTOR);
        }
        Ok(())
    }

    /// Writes from `sector` on; the length must be whole sectors.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn write(&mut self, sector: u64, from: &[u8]) -> Result<(), Error> {
        check_length(from.len())?;
        let mut sector = sector;
        for piece in from.chunks(self.piece_size()) {
            let data = self.bounce_range(piece.len())?;
            self.bounce()?.write(0, piece)?;
            self.run(Operation::Write { sector, data: &[data] })?;
            sector = sector.wrapping_add(wide(piece.len()) / SECTOR);
        }
        Ok(())
    }

    /// Makes everything written before durable. A device without a cache needs no flush: then this
    /// sends nothing.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn flush(&mut self) -> Result<(), Error> {
        if !self.config.flush {
            return Ok(());
        }
        self.run(Operation::Flush)
    }

    /// Tells the device that `sectors` from `sector` on are not needed any more.
    ///
    /// # Errors
    /// [`Error::NotOffered`] when it does not understand that, else as [`Self::read`].
    pub fn discard(&mut self, sector: u64, sectors: u64) -> Result<(), Error> {
        let limits = self.config.discard.ok_or(Error::NotOffered("VIRTIO_BLK_F_DISCARD"))?;
        self.pieces(sector, sectors, limits.max_sectors, |sector, sectors| Operation::Discard {
            sector,
            sectors,
        })
    }

    /// Makes `sectors` from `sector` on read as zeros; with `unmap` the device may free the space.
    ///
    /// # Errors
    /// [`Error::NotOffered`] when it does not understand that, else as [`Self::read`].
    pub fn write_zeroes(&mut self, sector: u64, sectors: u64, unmap: bool) -> Result<(), Error> {
        let missing = Error::NotOffered("VIRTIO_BLK_F_WRITE_ZEROES");
        let limits = self.config.write_zeroes.ok_or(missing)?;
        self.pieces(sector, sectors, limits.max_sectors, |sector, sectors| Operation::WriteZeroes {
            sector,
            sectors,
            unmap,
        })
    }

    /// The device's id string: at most 20 bytes, chosen by whoever started it.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn id(&mut self) -> Result<Vec<u8>, Error> {
        self.run(Operation::GetId)?;
        self.queue()?.last_id()
    }

    /// Runs one request on queue 0 and waits for its end.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn run(&mut self, operation: Operation<'_>) -> Result<(), Error> {
        match self.execute(operation)? {
            Status::Ok => Ok(()),
            status => Err(Error::Request {
                operation: operation.name(),
                sector: operation.sector(),
                status,
            }),
        }
    }

    /// As [`Self::run`], but a failed request is an answer and no error.
    ///
    /// # Errors
    /// [`Error::Stuck`] when it never ends, [`Error::Ring`] when the ring is broken.
    pub fn execute(&mut self, operation: Operation<'_>) -> Result<Status, Error> {
        let timeout = self.options.timeout;
        let queue = self.queue()?;
        if queue.in_flight() > 0 {
            return Err(Error::State("queue 0 has requests of its own under way"));
        }
        if !queue.submit(operation, 0)? {
            return Err(Error::State("queue 0 is full"));
        }
        queue.kick()?;
        let started = Instant::now();
        let done = queue.next(timeout);
        if done.is_err()
            && started.elapsed() >= timeout
            && let Some(bounce) = self.bounce.take()
        {
            // The device may still write there.
            bounce.leak();
        }
        Ok(done?.status)
    }

    fn pieces<'a>(
        &mut self,
        sector: u64,
        sectors: u64,
        limit: u32,
        operation: impl Fn(u64, u32) -> Operation<'a>,
    ) -> Result<(), Error> {
        // A limit of 0 is how some devices say that there is none; Linux reads it so, too.
        let limit = if limit == 0 { u32::MAX } else { limit };
        let (mut at, mut left) = (sector, sectors);
        while left > 0 {
            let part = u32::try_from(left).unwrap_or(u32::MAX).min(limit);
            self.run(operation(at, part))?;
            at = at.wrapping_add(u64::from(part));
            left -= u64::from(part);
        }
        Ok(())
    }

    fn queue(&mut self) -> Result<&mut BlockQueue, Error> {
        self.queues
            .first_mut()
            .filter(|queue| queue.index() == 0)
            .ok_or(Error::State("queue 0 is not here: not active, or taken out"))
    }

    fn bounce(&self) -> Result<&Buffer, Error> {
        self.bounce.as_ref().ok_or(Error::State("an earlier request never ended"))
    }

    fn bounce_range(&self, len: usize) -> Result<(u64, u32), Error> {
        let len = u32::try_from(len).unwrap_or(BOUNCE);
        Ok((self.bounce()?.guest(), len))
    }

    /// Bytes of one request of the blocking calls: whole sectors, at most one segment.
    fn piece_size(&self) -> usize {
        let limit = self.config.size_max.unwrap_or(BOUNCE).min(BOUNCE);
        (limit - limit % 512).max(512) as usize
    }
}

fn check_length(len: usize) -> Result<(), Error> {
    if wide(len).is_multiple_of(SECTOR) {
        return Ok(());
    }
    Err(Error::BadRequest(format!("{len} bytes are no whole number of sectors of 512")))
}

fn check_queues(vmm: &mut Vmm, config: &BlockConfig, wanted: u16) -> Result<(), Error> {
    let mut limit = config.num_queues;
    if vmm.features() & features::MQ != 0
        && let Some(count) = vmm.queue_count()?
    {
        limit = limit.min(u16::try_from(count).unwrap_or(u16::MAX));
    }
    if wanted == 0 || wanted > limit {
        return Err(Error::Queue(format!("{wanted} queues asked for, the device has {limit}")));
    }
    Ok(())
}

/// Memory for the rings, the slots, the bounce buffer and the caller's own.
fn shared_memory(options: &BlockOptions) -> Result<SharedMemory, Error> {
    let tables = if options.indirect { 16 * u64::from(INDIRECT_ROOM) } else { 0 };
    let per_queue =
        (32 + tables) * u64::from(options.queue_size) + 64 * u64::from(options.depth) + 16384;
    let rings = per_queue.saturating_mul(u64::from(options.queues.max(1)));
    let total = options.memory.saturating_add(rings).saturating_add(2 * u64::from(BOUNCE));
    let count = u64::from(options.regions.max(1));
    // Each region must have room for the largest single piece.
    let each = (total / count).max(u64::from(BOUNCE) + per_queue);
    let regions: Vec<_> =
        (0..count).map(|at| (DEFAULT_GUEST_BASE + (at << REGION_SHIFT), each)).collect();
    SharedMemory::with_regions(&regions)
}
