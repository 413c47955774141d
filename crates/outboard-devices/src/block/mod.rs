//! A disk: the block device of virtio 1.3 §5.2, on a file or a block device of the host.
//!
//! ```text
//!  Request ─▶ request: header checked ─▶ job: what is left to do ─▶ engine: system calls, io_uring
//!                                          ▲                              │
//!                                          └──────── outcome ◀────────────┘ ─▶ status, length
//! ```
//! Invariants: nothing outside the disk is touched and the image never grows; a read-only image is
//! never written; what the driver was told is durable is durable, and a flush that failed once is
//! never said to have succeeded later.
//!
//! ```no_run
//! use outboard::{Server, WorkerDevice};
//! use outboard_devices::block::{Block, BlockOptions, Image, ImageOptions};
//!
//! let image = Image::open("disk.img", ImageOptions::default())?;
//! let device = WorkerDevice::new(Block::new(image, BlockOptions::default())?)?;
//! Server::listen("/run/disk.sock")?.serve(device)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod config;
mod engine;
mod image;
mod job;
mod mapped;
mod order;
mod request;
mod state;
mod turns;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use outboard::{
    BackendChannel, ConfigWrite, Error, Hooks, Inspect, MakeWorker, Model, QueueSpec, Saved,
    Snapshot, WorkerContext,
};

use config::Config;
pub use config::{CONFIG_SIZE, SECTOR, feature};
pub use engine::{Engine, EngineKind, How, Op, SyncEngine};
pub use image::{Geometry, Image, ImageError, ImageOptions};
pub use state::STATE_VERSION;
use state::State;
pub use worker::BlockWorker;

/// Bytes of the answer to GET_ID.
const ID_SIZE: usize = 20;

/// When finished writes are durable (virtio 1.3 §5.2.6.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// After a flush.
    #[default]
    Writeback,
    /// When they are finished.
    Writethrough,
}

/// What an operator can set about a disk.
#[derive(Clone, Debug)]
pub struct BlockOptions {
    /// What GET_ID answers, at most 20 bytes.
    pub serial: String,
    /// Number of request queues, 1 to 256.
    pub num_queues: u16,
    /// Largest ring size: a power of two, 4 to 32768.
    pub queue_size: u16,
    /// Threads that serve the queues; at most one for each is used.
    pub threads: usize,
    /// The cache mode until the driver chooses one.
    pub cache: CacheMode,
    /// How the image is reached.
    pub engine: EngineKind,
}

impl Default for BlockOptions {
    /// One queue of 1024 entries on one thread, write-back.
    fn default() -> Self {
        Self {
            serial: String::new(),
            num_queues: 1,
            queue_size: 1024,
            threads: 1,
            cache: CacheMode::default(),
            engine: EngineKind::default(),
        }
    }
}

/// What the workers of one disk share.
#[derive(Debug)]
struct Disk {
    image: Arc<Image>,
    id: [u8; ID_SIZE],
    cache: CacheMode,
    /// The configuration field of that name; rules when CONFIG_WCE was acknowledged.
    writeback: AtomicBool,
    flush_failed: AtomicBool,
    channel: BackendChannel,
}

/// Has the guest see what its image has grown by, from any thread.
#[derive(Clone, Debug)]
pub struct Resizer(Arc<Disk>);

impl Resizer {
    /// Measures the image anew and tells the driver. Returns the size in bytes.
    ///
    /// # Errors
    /// The image has not grown, not to a whole number of blocks, or is no file.
    pub fn resize(&self) -> Result<u64, ImageError> {
        let size = self.0.image.grow()?;
        self.0.channel.config_changed();
        Ok(size)
    }
}

impl Disk {
    fn image(&self) -> &Arc<Image> {
        &self.image
    }

    fn id(&self) -> &[u8; ID_SIZE] {
        &self.id
    }

    /// Whether a write is durable when it ends, for a driver that acknowledged `features`: it
    /// chose so, it cannot flush, or the operator wants it so.
    fn writes_through(&self, features: u64) -> bool {
        if features & feature::CONFIG_WCE != 0 {
            !self.writeback.load(Ordering::Acquire)
        } else {
            features & feature::FLUSH == 0 || self.cache == CacheMode::Writethrough
        }
    }

    fn flush_failed(&self) -> bool {
        self.flush_failed.load(Ordering::Acquire)
    }

    fn set_flush_failed(&self) {
        self.flush_failed.store(true, Ordering::Release);
    }
}

/// Makes the engine of a worker, on its thread.
pub type MakeEngine =
    dyn Fn(&Arc<Image>, &mut WorkerContext<'_>) -> Result<Box<dyn Engine>, Error> + Send + Sync;

/// The model of a disk; [`outboard::WorkerDevice`] makes a whole device of it.
pub struct Block {
    disk: Arc<Disk>,
    config: Config,
    options: BlockOptions,
    make_engine: Arc<MakeEngine>,
    /// What the driver had acknowledged before its state came here, until it does so again.
    restored: Option<u64>,
}

impl Block {
    /// A disk on `image`.
    ///
    /// # Errors
    /// The serial number is too long, or the queues are too many or of a size that no ring has.
    pub fn new(image: Image, options: BlockOptions) -> Result<Self, Error> {
        let kind = options.engine;
        Self::with_engine(image, options, Arc::new(move |image, context| kind.make(image, context)))
    }

    /// A disk on `image` that is reached by an engine of the caller's own, whatever the options
    /// say.
    ///
    /// # Errors
    /// As [`Block::new`].
    pub fn with_engine(
        image: Image,
        options: BlockOptions,
        make_engine: Arc<MakeEngine>,
    ) -> Result<Self, Error> {
        check_options(&options)?;
        let mut id = [0; ID_SIZE];
        for (to, from) in id.iter_mut().zip(options.serial.bytes()) {
            *to = from;
        }
        let config = Config::new(&image, options.num_queues, options.queue_size);
        let disk = Arc::new(Disk {
            image: Arc::new(image),
            id,
            cache: options.cache,
            writeback: AtomicBool::new(options.cache == CacheMode::Writeback),
            flush_failed: AtomicBool::new(false),
            channel: BackendChannel::new(),
        });
        Ok(Self { disk, config, options, make_engine, restored: None })
    }

    /// The image.
    #[must_use]
    pub fn image(&self) -> &Image {
        self.disk.image()
    }

    /// Has the guest see what the image has grown by.
    #[must_use]
    pub fn resizer(&self) -> Resizer {
        Resizer(Arc::clone(&self.disk))
    }

    /// The configuration space of the moment.
    fn config(&self) -> Config {
        self.config.with_capacity(self.image().sectors())
    }

    fn set_writeback(&self, writeback: bool) {
        self.disk.writeback.store(writeback, Ordering::Release);
    }

    fn writeback(&self) -> bool {
        self.disk.writeback.load(Ordering::Acquire)
    }
}

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Block")
            .field("disk", &self.disk)
            .field("config", &self.config)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

fn check_options(options: &BlockOptions) -> Result<(), Error> {
    let BlockOptions { num_queues, queue_size, serial, .. } = options;
    if !(1..=256).contains(num_queues) {
        return Err(Error::refused(format!("{num_queues} queues: a disk has 1 to 256")));
    }
    if !queue_size.is_power_of_two() || !(4..=32768).contains(queue_size) {
        return Err(Error::refused(format!(
            "queue size {queue_size}: it must be a power of two from 4 to 32768"
        )));
    }
    if serial.len() > ID_SIZE {
        let length = serial.len();
        return Err(Error::refused(format!("serial of {length} bytes: it may have {ID_SIZE}")));
    }
    Ok(())
}

impl Model for Block {
    type Worker = BlockWorker;

    fn queues(&self) -> Vec<QueueSpec> {
        let queue = QueueSpec::new("requests", self.options.queue_size);
        vec![queue; usize::from(self.options.num_queues)]
    }

    fn make_worker(&self) -> MakeWorker<BlockWorker> {
        let (disk, make_engine) = (Arc::clone(&self.disk), Arc::clone(&self.make_engine));
        Arc::new(move |context| {
            let engine = make_engine(disk.image(), context)?;
            let chosen = disk.image().engine();
            context.inspect().set("image/engine", *chosen.get().unwrap_or(&"its own"));
            Ok(BlockWorker::new(Arc::clone(&disk), engine))
        })
    }

    fn shows(&mut self, inspect: &Inspect) {
        let image = inspect.branch("image");
        image.set("path", self.image().path().display().to_string());
        image.set("bytes", self.image().geometry().size);
        image.set("read-only", self.image().read_only());
    }

    fn threads(&self) -> usize {
        self.options.threads
    }

    fn features(&self) -> u64 {
        self.config.features
    }

    fn ack_features(&mut self, features: u64) -> Result<(), Error> {
        // §5.2.5.2: a driver that chooses the mode but cannot flush starts with write-through. A
        // driver whose state was restored has started long ago.
        let moved = self.restored.take() == Some(features);
        if !moved && features & feature::CONFIG_WCE != 0 && features & feature::FLUSH == 0 {
            self.set_writeback(false);
        }
        Ok(())
    }

    fn config_size(&self) -> u32 {
        CONFIG_SIZE
    }

    fn read_config(&self, offset: u32, bytes: &mut [u8]) -> Result<(), Error> {
        self.config().read(self.writeback(), offset, bytes);
        Ok(())
    }

    fn write_config(
        &mut self,
        offset: u32,
        bytes: &[u8],
        _origin: ConfigWrite,
    ) -> Result<(), Error> {
        match self.config().write(self.writeback(), offset, bytes) {
            Ok(writeback) => {
                self.set_writeback(writeback);
                Ok(())
            }
            Err(at) => Err(Error::refused(format!("configuration byte {at} cannot be changed"))),
        }
    }

    fn resume(&mut self) -> Result<(), Error> {
        // A killed process keeps its claim for as long as the kernel works on what it asked for:
        // whoever has it then knows that none of those writes is still under way.
        self.disk.image.lock().map_err(|error| Error::busy(error.to_string()))
    }

    fn suspend(&mut self) -> Result<(), Error> {
        self.disk.image.unlock();
        Ok(())
    }

    /// Back to the operator's cache mode. The driver starts anew, so it also takes note of flushes
    /// that failed.
    fn reset(&mut self) -> Result<(), Error> {
        // After a reset either mode is right (virtio 1.3 §5.2.5), and QEMU goes on showing its guest
        // the one that it has seen last: a driver that reads "write through" will not flush.
        if self.disk.cache == CacheMode::Writethrough {
            self.set_writeback(false);
        }
        self.disk.flush_failed.store(false, Ordering::Release);
        self.restored = None;
        Ok(())
    }

    fn device_type(&self) -> String {
        "block".to_owned()
    }

    fn hooks(&mut self) -> Option<&mut dyn Hooks> {
        Some(self)
    }

    fn snapshot(&mut self) -> Result<Snapshot, Error> {
        if self.image().is_volatile() {
            return Err(Error::refused("what a disk of memory holds stays with its process"));
        }
        Ok(State::new(self.image(), self.writeback(), self.disk.flush_failed()).save())
    }

    fn restore(&mut self, saved: Saved<'_>) -> Result<(), Error> {
        let state = State::read(saved, self.image())?;
        self.set_writeback(state.writeback);
        self.disk.flush_failed.store(state.flush_failed, Ordering::Release);
        self.restored = saved.features().map(|features| features & self.features());
        Ok(())
    }
}

impl Hooks for Block {
    fn back_end_channel(&self) -> Option<BackendChannel> {
        Some(self.disk.channel.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(cache: CacheMode) -> Block {
        let geometry = Geometry { size: 1 << 20, block_size: 512, physical_block_size: 512 };
        let image = Image::for_tests(geometry, false);
        Block::new(image, BlockOptions { cache, ..BlockOptions::default() }).expect("a disk")
    }

    #[test]
    fn a_claim_that_another_has_is_asked_for_again_by_the_handler() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(1 << 20).expect("room");
        let open = || Image::open(file.path(), ImageOptions::default()).expect("opens");
        let other = open();
        let mut block = Block::new(open(), BlockOptions::default()).expect("a disk");
        other.lock().expect("free");
        let error = block.resume().expect_err("the other one runs");
        assert!(matches!(&error, Error::Busy(why) if why.contains("in use by another")), "{error}");
        other.unlock();
        block.resume().expect("free again");
    }

    #[test]
    fn options_that_no_disk_has_are_refused() {
        let geometry = Geometry { size: 512, block_size: 512, physical_block_size: 512 };
        let refused = |options: BlockOptions| {
            let image = Image::for_tests(geometry, false);
            Block::new(image, options).expect_err("refused").to_string()
        };
        let good = BlockOptions::default;
        assert!(refused(BlockOptions { num_queues: 0, ..good() }).contains("0 queues"));
        assert!(refused(BlockOptions { num_queues: 257, ..good() }).contains("257 queues"));
        for queue_size in [0, 1, 2, 3, 5, 1000, 40000] {
            assert!(refused(BlockOptions { queue_size, ..good() }).contains("power of two"));
        }
        let serial = "x".repeat(21);
        assert!(refused(BlockOptions { serial, ..good() }).contains("21 bytes"));
    }

    #[test]
    fn writes_are_durable_when_the_driver_chose_so_or_cannot_flush() {
        let (flush, wce) = (feature::FLUSH, feature::CONFIG_WCE);
        let mut block = block(CacheMode::Writeback);
        assert!(block.disk.writes_through(0), "a driver that knows no flush");
        assert!(!block.disk.writes_through(flush));
        assert!(!block.disk.writes_through(flush | wce));
        block.write_config(32, &[0], ConfigWrite::Guest).expect("writable");
        assert!(block.disk.writes_through(flush | wce), "chosen");
        assert!(!block.disk.writes_through(flush), "the field means nothing then");
        block.reset().expect("resets");
        assert!(block.disk.writes_through(flush | wce), "what a front-end may still be showing");
        block.write_config(32, &[1], ConfigWrite::Guest).expect("writable");
        assert!(!block.disk.writes_through(flush | wce), "chosen anew");
        block.ack_features(wce).expect("taken");
        let mut field = [9];
        block.read_config(32, &mut field).expect("readable");
        assert_eq!(field, [0], "a driver that cannot flush starts with write-through");
    }

    #[test]
    fn a_state_that_is_restored_is_not_undone_by_the_features_that_come_again() {
        let (mut source, wce) = (block(CacheMode::Writeback), feature::CONFIG_WCE);
        source.ack_features(wce).expect("taken");
        source.write_config(32, &[1], ConfigWrite::Guest).expect("writable");
        source.disk.set_flush_failed();
        let (version, bytes) = source.snapshot().expect("a state").into_bytes().expect("bytes");
        let mut target = block(CacheMode::Writethrough);
        target.restore(Saved::new(version, &bytes, Some(wce))).expect("fits");
        target.ack_features(wce).expect("taken");
        assert!(target.writeback(), "chosen before it moved");
        assert!(target.disk.flush_failed(), "what was lost stays lost");
        target.ack_features(wce).expect("taken");
        assert!(!target.writeback(), "another driver");
    }

    #[test]
    fn an_operator_who_wants_write_through_gets_it_until_the_driver_chooses() {
        let mut block = block(CacheMode::Writethrough);
        assert!(block.disk.writes_through(feature::FLUSH));
        assert!(block.disk.writes_through(feature::FLUSH | feature::CONFIG_WCE));
        block.write_config(32, &[1], ConfigWrite::Guest).expect("writable");
        assert!(!block.disk.writes_through(feature::FLUSH | feature::CONFIG_WCE));
    }
}
