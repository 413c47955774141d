//! The process that is soaked, and what it holds.
//!
//! Invariant: what it holds is read when it stands still: a reading counts when the next one, some
//! milliseconds later, is the same.

use std::ffi::OsString;
use std::time::{Duration, Instant};

use outboard_frontend::block::BlockDevice;
use outboard_frontend::{Connection, RingHandle, SharedMemory, Wanted};
use outboard_protocol::features::{ProtocolFeatures, virtio};

use super::report::Part;
use super::{Options, Progress, SoakError};
use crate::bench::{Driving, Live, Load, Setup, Target, Workload};
use crate::judge::peer::{Life, Peer, Target as Command};
use crate::judge::storm::Random;

/// How long a command may take until it listens, and a process until it stands still.
pub(super) const START: Duration = Duration::from_secs(10);

/// What a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Holdings {
    pub(super) descriptors: u64,
    pub(super) mappings: u64,
    /// KiB.
    pub(super) resident: u64,
}

/// Starts the command.
pub(super) fn start(command: &[OsString]) -> Result<Peer, SoakError> {
    Peer::start(&Command::Command(command.to_vec()), START).map_err(SoakError::NoBackend)
}

/// Memory for the load's data at each of these guest addresses, of `size` bytes, not shared yet.
pub(super) fn homes(places: &[u64], size: u64) -> Result<Vec<SharedMemory>, SoakError> {
    let made = places.iter().map(|&at| SharedMemory::with_regions(&[(at, size)]));
    Ok(made.collect::<Result<_, _>>()?)
}

/// A load on the first queue of the device behind `socket`: reads and writes of 4 KiB over 16 MiB at
/// most, each checked.
pub(super) struct Loaded {
    pub(super) target: Target,
    pub(super) load: Load,
}

impl Loaded {
    pub(super) fn open(
        socket: &std::path::Path,
        options: &Options,
        way: Way,
    ) -> Result<Self, SoakError> {
        let Way { depth, driving, wanted, read_percent } = way;
        let timeout = options.limit;
        let packed = options.packed;
        let wanted = if packed { wanted.with_packed_rings() } else { wanted };
        let setup = Setup { queues: 1, depth, block_size: 4096, indirect: false, packed, timeout };
        let none = |error: String| SoakError::NoBackend(error);
        let connection = Connection::connect_patiently(socket, timeout, START)
            .map_err(|error| none(error.to_string()))?;
        let mut target = Target::negotiated(connection, setup, wanted)
            .map_err(|error| none(error.to_string()))?;
        let span = target.device().config().bytes().min(16 << 20);
        let load = Load {
            workload: Workload { random: true, read_percent },
            depth,
            driving,
            span: Some(span),
            verify: true,
            seed: options.seed,
            ..Load::default()
        };
        Ok(Self { target, load })
    }

    /// Has it do everything that it will do once, so that what it holds afterwards is what it holds.
    pub(super) fn warm_up(&mut self, time: Duration) -> Result<(), SoakError> {
        let load = Load { duration: time, ..self.load.clone() };
        self.target.round(&load)?;
        let vmm = self.target.device().vmm();
        if vmm.protocol_features().contains(ProtocolFeatures::LOG_SHMFD) {
            // The last log stays the back-end's, as the protocol has no word that takes it away.
            vmm.start_log()?;
            vmm.stop_log()?;
        }
        Ok(())
    }
}

/// What the process holds, once that stands still; `wanted` is awaited for a while.
pub(super) fn holdings(peer: &mut Peer, wanted: Option<Holdings>) -> Result<Holdings, SoakError> {
    if let Life::Left | Life::Died(_) = peer.life() {
        return Err(SoakError::Wrong("the back-end's process has ended".to_owned()));
    }
    let until = Instant::now() + Duration::from_secs(5);
    let (mut last, mut same) = (read(peer)?, 0);
    loop {
        let good = wanted.is_none_or(|wanted| {
            last.descriptors <= wanted.descriptors && last.mappings <= wanted.mappings
        });
        if (good && same >= 5) || Instant::now() > until {
            return Ok(last);
        }
        std::thread::sleep(Duration::from_millis(10));
        let now = read(peer)?;
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
}

fn read(peer: &Peer) -> Result<Holdings, SoakError> {
    let count = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
    match (peer.open_fds(), peer.shared_maps(), peer.resident()) {
        (Some(descriptors), Some(mappings), Some(resident)) => {
            Ok(Holdings { descriptors: count(descriptors), mappings: count(mappings), resident })
        }
        _ => Err(SoakError::Wrong("the back-end's /proc entries cannot be read".to_owned())),
    }
}

/// How the load of a part is driven.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    pub(super) depth: u16,
    pub(super) driving: Driving,
    pub(super) wanted: Wanted,
    /// Share of reads.
    pub(super) read_percent: u8,
}

impl Way {
    /// Sleeping, each call watched.
    pub(super) fn asleep(depth: u16) -> Self {
        Self { depth, driving: Driving::Called, wanted: Wanted::default(), read_percent: 50 }
    }

    /// Looking at the ring all the time.
    pub(super) fn polling(depth: u16) -> Self {
        Self { driving: Driving::Poll, ..Self::asleep(depth) }
    }

    /// Without EVENT_IDX: notifications are switched off and on by flags.
    pub(super) fn by_flags(mut self) -> Self {
        self.wanted.features &= !virtio::RING_EVENT_IDX;
        self
    }
}

impl std::fmt::Display for Way {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let how = if self.driving == Driving::Poll { "polling" } else { "sleeping" };
        let flags = self.wanted.features & virtio::RING_EVENT_IDX == 0;
        let index = if flags { ", no EVENT_IDX" } else { "" };
        write!(out, "{how}, depth {}{index}", self.depth)
    }
}

/// What a soak works with while the load runs.
pub(super) struct Site<'a> {
    pub(super) peer: &'a mut Peer,
    pub(super) device: &'a mut BlockDevice,
    pub(super) live: &'a Live,
    pub(super) ring: &'a RingHandle,
    /// Packed rings have no indices in memory to look at.
    pub(super) packed: bool,
    pub(super) random: Random,
    pub(super) part: &'a mut Part,
    progress: &'a Progress<'a>,
    total: u64,
}

impl Site<'_> {
    /// The connection of the device under load.
    pub(super) fn connection(&mut self) -> &mut Connection {
        self.device.vmm().connection()
    }

    /// One more is done.
    pub(super) fn done(&mut self) {
        self.part.count += 1;
        (self.progress)(&self.part.what, self.part.count, self.total);
    }

    /// Whether there is more to do.
    pub(super) const fn more(&self) -> bool {
        self.part.count < self.total
    }

    /// Lets a moment pass that is not always the same: up to so many microseconds.
    pub(super) fn moment(&mut self, longest: usize) {
        let until = Instant::now() + Duration::from_micros(number(self.random.below(longest)));
        while Instant::now() < until {
            std::hint::spin_loop();
        }
    }
}

fn number(value: usize) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

/// One part of a soak: a fresh process, a load on it, and `work` beside the load.
pub(super) fn part(
    what: &str,
    way: Way,
    command: &[OsString],
    options: &Options,
    homes: &[SharedMemory],
    progress: &Progress<'_>,
    work: impl FnOnce(&mut Site<'_>) -> Result<(), SoakError>,
) -> Result<Part, SoakError> {
    let mut part = Part::new(format!("{what} ({way})"));
    let mut peer = start(command)?;
    let mut loaded = Loaded::open(peer.socket(), options, way)?;
    let begun = Instant::now();
    let end = soaked(&mut part, &mut peer, &mut loaded, options, homes, progress, work);
    part.ended(begun.elapsed(), end)
}

fn soaked(
    part: &mut Part,
    peer: &mut Peer,
    loaded: &mut Loaded,
    options: &Options,
    homes: &[SharedMemory],
    progress: &Progress<'_>,
    work: impl FnOnce(&mut Site<'_>) -> Result<(), SoakError>,
) -> Result<(), SoakError> {
    loaded.warm_up(Duration::from_millis(300))?;
    let before = holdings(peer, None)?;
    let ring = loaded.target.device().queues().first().map(|queue| queue.as_virtqueue().handle());
    let ring = &ring.ok_or_else(|| SoakError::Wrong("it has no queue".to_owned()))?;
    let random = Random::new(options.seed);
    let (load, ()) = loaded.target.during(&loaded.load, homes, |device, live| {
        let total = options.count;
        let (peer, part, packed) = (&mut *peer, &mut *part, options.packed);
        work(&mut Site { peer, device, live, ring, packed, random, part, progress, total })
    })?;
    part.load(&load);
    let twice = match options.packed {
        true => more_answers(loaded)?,
        false => ring.used_index()?.wrapping_sub(ring.available_index()?),
    };
    part.bounded("requests finished twice", f64::from(twice), "", 0.0);
    part.holdings(before, holdings(peer, Some(before))?);
    Ok(())
}

/// What comes back although everything has come back. An answer to nothing is an error of the driver's.
fn more_answers(loaded: &mut Loaded) -> Result<u16, SoakError> {
    let mut more = 0;
    for queue in loaded.target.device().queues() {
        while queue.pop()?.is_some() {
            more += 1;
        }
    }
    Ok(more)
}
