//! The load generator: reads, writes or both against any vhost-user block back-end, and what that cost.
//!
//! [`Target::open`] connects and prepares, [`Target::round`] loads the device for a while and answers
//! figures, [`summary`] and [`compare`] make medians and ratios of several rounds. Invariants: no
//! allocation, no lock and one clock reading per batch while a round is measured; a round that found a
//! wrong byte or lost a request is an error and has no figures.

pub mod cpu;
mod drive;
mod figures;
mod live;
pub mod verify;
pub mod workload;

use std::path::Path;
use std::time::Duration;

use outboard_frontend::block::{BlockDevice, BlockOptions, Operation, SECTOR};
use outboard_frontend::{Connection, SharedMemory, Wanted};
use outboard_protocol::virtio;

pub use drive::Driving;
pub use figures::{Comparison, Latency, Round, Summary, compare, median, summary};
pub use live::{Disturbed, Live};
pub use verify::Mismatch;
pub use workload::Workload;

use cpu::CpuMeter;
use drive::{Counts, Lane, Source};
use verify::Ledger;

/// What the connection is prepared for: upper limits of all rounds over it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setup {
    /// Number of queues.
    pub queues: u16,
    /// Most requests under way on each queue.
    pub depth: u16,
    /// Largest block in bytes.
    pub block_size: u32,
    /// Whether requests go into indirect tables.
    pub indirect: bool,
    /// Whether the rings are packed.
    pub packed: bool,
    /// Longest wait for one answer.
    pub timeout: Duration,
}

/// One load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    /// Reads, writes or both, at random or in order.
    pub workload: Workload,
    /// Bytes of each request: whole blocks of the device.
    pub block_size: u32,
    /// Requests under way on each queue.
    pub depth: u16,
    /// How long.
    pub duration: Duration,
    /// Whether the driver spins or sleeps.
    pub driving: Driving,
    /// Driver threads; queues are dealt out to them.
    pub threads: u16,
    /// CPUs for the driver threads, in turn; none: wherever they are.
    pub cpus: Vec<usize>,
    /// Bytes at the start of the disk that are used; `None` is all of it.
    pub span: Option<u64>,
    /// Write the span first, check every read, and read all of it back at the end.
    pub verify: bool,
    /// Start of the random sequence.
    pub seed: u64,
}

impl Default for Load {
    /// Random reads of 4 KiB, 32 under way, two seconds, spinning.
    fn default() -> Self {
        Self {
            workload: Workload { random: true, read_percent: 100 },
            block_size: 4096,
            depth: 32,
            duration: Duration::from_secs(2),
            driving: Driving::Poll,
            threads: 1,
            cpus: Vec::new(),
            span: None,
            verify: false,
            seed: 1,
        }
    }
}

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The front-end or the device failed.
    #[error(transparent)]
    Frontend(#[from] outboard_frontend::Error),
    /// The device gave back other bytes than were written.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// The load does not fit the device.
    #[error("{0}")]
    Load(String),
    /// A driver thread could not be started or pinned.
    #[error("{call} failed: {source}")]
    Host {
        /// The call.
        call: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}

/// A device under load.
#[derive(Debug)]
pub struct Target {
    device: BlockDevice,
    setup: Setup,
    cpu: Option<CpuMeter>,
}

impl Target {
    /// Connects to the block device at `path`.
    ///
    /// # Errors
    /// As [`BlockDevice::connect`].
    pub fn open(path: &Path, setup: Setup) -> Result<Self, BenchError> {
        Self::over(Connection::connect(path, setup.timeout)?, setup)
    }

    /// Prepares a connected device.
    ///
    /// # Errors
    /// As [`BlockDevice::open`].
    pub fn over(connection: Connection, setup: Setup) -> Result<Self, BenchError> {
        let wanted = Wanted::default();
        let wanted = if setup.packed { wanted.with_packed_rings() } else { wanted };
        Self::negotiated(connection, setup, wanted)
    }

    /// As [`Self::over`], with a say in what is negotiated.
    ///
    /// # Errors
    /// As [`BlockDevice::open`].
    pub fn negotiated(
        connection: Connection,
        setup: Setup,
        wanted: Wanted,
    ) -> Result<Self, BenchError> {
        let cpu = connection.peer_pid().map(CpuMeter::new);
        let each = u64::from(setup.block_size).next_multiple_of(4096);
        let data = each * u64::from(setup.depth) * u64::from(setup.queues);
        // Room for three descriptors each, so that the ring never limits the depth.
        let queue_size = u32::from(setup.depth.max(16)) * 4;
        let queue_size = queue_size.next_power_of_two().min(32768);
        let options = BlockOptions {
            queues: setup.queues,
            queue_size: u16::try_from(queue_size).unwrap_or(32768),
            depth: setup.depth,
            indirect: setup.indirect,
            memory: data + (1 << 20),
            timeout: setup.timeout,
            wanted,
            ..BlockOptions::default()
        };
        let mut device = BlockDevice::open(connection, options)?;
        if setup.packed && device.vmm().features() & virtio::RING_PACKED == 0 {
            return Err(BenchError::Load("the device does not offer packed rings".to_owned()));
        }
        Ok(Self { device, setup, cpu })
    }

    /// The device, for calls between rounds.
    pub const fn device(&mut self) -> &mut BlockDevice {
        &mut self.device
    }

    /// Loads the device once. With `verify` the span is written before and read back after; only what
    /// lies between is measured.
    ///
    /// # Errors
    /// [`BenchError::Load`] when the load does not fit, [`BenchError::Mismatch`] on a wrong byte, else
    /// what the device did.
    pub fn round(&mut self, load: &Load) -> Result<Round, BenchError> {
        let blocks = self.check(load)?;
        let threads = usize::from(load.threads.clamp(1, self.setup.queues));
        let mut teams = self.deal(load, threads, blocks, &[])?;
        let live = Live::new(0);
        if load.verify {
            run_teams(&mut teams, load, &live, filling)?;
        }
        let before = self.cpu.as_ref().and_then(CpuMeter::read);
        let counts = run_teams(&mut teams, load, &live, |team| team.endless(load))?;
        let after = self.cpu.as_ref().and_then(CpuMeter::read);
        if load.verify {
            run_teams(&mut teams, load, &live, reading_back)?;
        }
        let spent = before.zip(after).map(|(before, after)| after.since(&before));
        self.collect(teams);
        Ok(Round::of(&counts, load.block_size, spent))
    }

    fn collect(&mut self, teams: Vec<Team>) {
        for team in teams {
            self.device.put_queues(team.lanes.into_iter().map(|lane| lane.queue).collect());
        }
    }

    /// How many blocks the load goes over.
    fn check(&self, load: &Load) -> Result<u64, BenchError> {
        let config = self.device.config();
        let say = |text: String| Err(BenchError::Load(text));
        if load.block_size == 0 || !load.block_size.is_multiple_of(config.block_size) {
            return say(format!(
                "block size {} is no multiple of the device's {}",
                load.block_size, config.block_size
            ));
        }
        if load.block_size > self.setup.block_size || load.depth > self.setup.depth {
            return say("the load is larger than the connection was prepared for".to_owned());
        }
        if let Some(limit) = config.size_max.filter(|&limit| limit < load.block_size) {
            return say(format!("the device takes at most {limit} bytes in one piece"));
        }
        if load.depth == 0 {
            return say("a depth of 0 does nothing".to_owned());
        }
        if load.driving == Driving::Called && load.threads < self.setup.queues {
            return say("watching each call takes a thread for each queue".to_owned());
        }
        if config.read_only && (load.workload.writes() || load.verify) {
            return say("the device is read-only".to_owned());
        }
        let span = load.span.unwrap_or_else(|| config.bytes()).min(config.bytes());
        let blocks = span / u64::from(load.block_size);
        let all = u64::from(load.depth) * u64::from(self.setup.queues);
        let least = if load.verify { 2 * all } else { 1 };
        if blocks < least {
            return say(format!("{span} bytes are only {blocks} blocks, {least} are needed"));
        }
        Ok(blocks)
    }

    /// Deals the queues and the blocks out to `threads` teams.
    fn deal(
        &mut self,
        load: &Load,
        threads: usize,
        blocks: u64,
        homes: &[SharedMemory],
    ) -> Result<Vec<Team>, BenchError> {
        let share = blocks / u64::try_from(threads).unwrap_or(1);
        let mut teams: Vec<_> = (0..threads)
            .map(|at| {
                // Random reads and writes may go everywhere; a ledger and an order need blocks of their own.
                let own = load.verify || !load.workload.random;
                let first = if own { share * u64::try_from(at).unwrap_or(0) } else { 0 };
                let blocks = if own { share } else { blocks };
                let cpu = load.cpus.get(at % load.cpus.len().max(1)).copied();
                Team { lanes: Vec::new(), first, blocks, cpu, ledger: None }
            })
            .collect();
        if load.verify {
            for team in &mut teams {
                let count = usize::try_from(team.blocks).unwrap_or(usize::MAX);
                team.ledger = Some(Ledger::new(team.first, count));
            }
        }
        for (at, queue) in self.device.take_queues().into_iter().enumerate() {
            let lane = Lane::new(queue, self.device.memory(), homes, load)?;
            if let Some(team) = teams.get_mut(at % threads) {
                team.lanes.push(lane);
            }
        }
        Ok(teams)
    }
}

/// What one driver thread has.
#[derive(Debug)]
struct Team {
    lanes: Vec<Lane>,
    first: u64,
    blocks: u64,
    cpu: Option<usize>,
    ledger: Option<Ledger>,
}

impl Team {
    /// What the measured part does.
    const fn endless(&self, load: &Load) -> Source {
        let seed = load.seed ^ (self.first << 20);
        Source::endless(load.workload, self.first, self.blocks, seed)
    }
}

/// Writes every block once.
const fn filling(team: &Team) -> Source {
    Source::once(true, team.first, team.blocks)
}

/// Reads every block once.
const fn reading_back(team: &Team) -> Source {
    Source::once(false, team.first, team.blocks)
}

/// Runs each team on a thread of its own and adds their counts up.
fn run_teams(
    teams: &mut [Team],
    load: &Load,
    live: &Live,
    source: impl Fn(&Team) -> Source,
) -> Result<Counts, BenchError> {
    run_beside(teams, load, live, source, || ()).0
}

/// The same, and `beside` on this thread at the same time.
fn run_beside<T>(
    teams: &mut [Team],
    load: &Load,
    live: &Live,
    source: impl Fn(&Team) -> Source,
    beside: impl FnOnce() -> T,
) -> (Result<Counts, BenchError>, T) {
    std::thread::scope(|scope| {
        let mut running = Vec::with_capacity(teams.len());
        for team in teams {
            let source = source(team);
            let thread = std::thread::Builder::new().name("outboard-bench".to_owned());
            let run = move || {
                let _ended = live.running();
                drive::pin(team.cpu)?;
                drive::drive(&mut team.lanes, source, team.ledger.as_mut(), load, live)
            };
            let started = thread.spawn_scoped(scope, run);
            running.push(started.map_err(|source| BenchError::Host { call: "a thread", source }));
        }
        let done = beside();
        let mut total = Counts::new();
        for handle in running {
            let counts = handle.and_then(|handle| match handle.join() {
                Ok(counts) => counts,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            match (&mut total, counts) {
                (Ok(total), Ok(counts)) => total.add(&counts),
                (Ok(_), Err(error)) => total = Err(error),
                (Err(_), _) => {}
            }
        }
        (total, done)
    })
}

/// The operation of one choice.
fn operation<'a>(write: bool, sector: u64, data: &'a [(u64, u32)]) -> Operation<'a> {
    if write { Operation::Write { sector, data } } else { Operation::Read { sector, data } }
}

/// First sector of a block.
const fn sector_of(block: u64, block_size: u32) -> u64 {
    block * (block_size as u64 / SECTOR)
}
