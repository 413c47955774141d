//! One driver thread: keeps its queues full, counts what comes back, and checks it when asked to.
//!
//! Invariants: a finished request is replaced at once, so that the depth is what was asked for; the
//! clock is read once per batch; when it ends without an error, nothing is under way any more.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use outboard_frontend::block::{BlockQueue, Completion, Status};
use outboard_frontend::{Buffer, Error, SharedMemory, Virtqueue, wait_any};

use super::live::Live;
use super::verify::{Ledger, fill};
use super::workload::{Choice, Sequence, Workload};
use super::{BenchError, Load, operation, sector_of};

/// Whether the driver spins on the used ring or sleeps on the call descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driving {
    /// Spins, calls switched off.
    Poll,
    /// Sleeps until called.
    Sleep,
    /// As [`Self::Sleep`], and a completion whose call does not come is an error. One queue for each
    /// thread.
    Called,
}

/// Empty looks at the rings between two looks at the clock.
const SPINS: u32 = 4096;
/// A request that takes longer is counted as this long.
const LONGEST_NS: u64 = 60_000_000_000;
/// Most requests that are taken back, and put anew, at a time: while the device serves those the driver goes on, where
/// otherwise each of the two would wait for the other one's whole batch.
const SHOWN: u64 = 8;
/// How long nothing may come back before the device counts as stuck.
pub(super) const STUCK: Duration = Duration::from_secs(10);
/// How long the call of a completion that lies there may take.
const CALL: Duration = Duration::from_secs(3);

/// What a thread counted.
#[derive(Clone, Debug)]
pub(super) struct Counts {
    pub(super) reads: u64,
    pub(super) writes: u64,
    pub(super) kicks: u64,
    pub(super) elapsed: Duration,
    /// Longest time in which nothing came back to a thread.
    pub(super) stall: Duration,
    pub(super) latency: Histogram<u64>,
    /// Requests that came back after the same time, one after the other: not yet in `latency`.
    same: (u64, u64),
}

impl Counts {
    pub(super) fn new() -> Result<Self, BenchError> {
        let latency = Histogram::new_with_bounds(1, LONGEST_NS, 3)
            .map_err(|error| BenchError::Load(error.to_string()))?;
        let (elapsed, stall) = (Duration::ZERO, Duration::ZERO);
        Ok(Self { reads: 0, writes: 0, kicks: 0, elapsed, stall, latency, same: (0, 0) })
    }

    /// A request took this long. (What was submitted together mostly comes back together: that is recorded once.)
    fn took(&mut self, nanoseconds: u64) {
        if self.same.0 != nanoseconds {
            self.record();
            self.same.0 = nanoseconds;
        }
        self.same.1 += 1;
    }

    fn record(&mut self) {
        let (nanoseconds, count) = std::mem::take(&mut self.same);
        self.latency.saturating_record_n(nanoseconds, count);
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.reads += other.reads;
        self.writes += other.writes;
        self.kicks += other.kicks;
        self.elapsed = self.elapsed.max(other.elapsed);
        self.stall = self.stall.max(other.stall);
        // Both were made with the same bounds, so that nothing can be out of range.
        let _ = self.latency.add(&other.latency);
    }
}

/// Where choices come from: without end, or each block once.
#[derive(Debug)]
pub(super) enum Source {
    Endless(Sequence),
    Once { write: bool, next: u64, end: u64 },
}

impl Source {
    pub(super) const fn endless(workload: Workload, first: u64, blocks: u64, seed: u64) -> Self {
        Self::Endless(Sequence::new(workload, first, blocks, seed))
    }

    pub(super) const fn once(write: bool, first: u64, blocks: u64) -> Self {
        Self::Once { write, next: first, end: first + blocks }
    }

    /// The next choice that the ledger has no objection to.
    fn choose(&mut self, ledger: Option<&mut Ledger>) -> Option<Choice> {
        match self {
            Self::Once { next, end, .. } if *next >= *end => None,
            Self::Once { write, next, .. } => {
                let choice = Choice { write: *write, block: *next };
                *next += 1;
                if let Some(ledger) = ledger {
                    ledger.claim(choice.block);
                }
                Some(choice)
            }
            Self::Endless(sequence) => {
                let mut choice = sequence.choose();
                if let Some(ledger) = ledger {
                    // There are at least twice as many blocks as requests: this ends soon.
                    while !ledger.claim(choice.block) {
                        choice = sequence.choose();
                    }
                }
                Some(choice)
            }
        }
    }
}

/// One queue with the data buffers and choices of its requests; a request's token is its place in both.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) queue: BlockQueue,
    /// One set of data buffers in each home.
    homes: Vec<Data>,
    /// What each place does, in which home, and since when, in nanoseconds of the drive.
    under_way: Vec<(Choice, usize, u64)>,
}

impl Lane {
    pub(super) fn new(
        queue: BlockQueue,
        memory: &SharedMemory,
        homes: &[SharedMemory],
        load: &Load,
    ) -> Result<Self, BenchError> {
        let mut data = vec![Data::new(memory, load)?];
        for home in homes {
            data.push(Data::new(home, load)?);
        }
        let idle = (Choice { write: false, block: 0 }, 0, 0);
        Ok(Self { queue, homes: data, under_way: vec![idle; usize::from(load.depth)] })
    }

    fn home(&self, home: usize) -> Result<&Buffer, Error> {
        let Some(buffer) = self.homes.get(home).and_then(|data| data.buffer.as_ref()) else {
            return Err(Error::State("the data buffers are gone"));
        };
        Ok(buffer)
    }
}

/// The data buffers of a lane. Never handed out again while the device may still write there, which is
/// so after an error.
#[derive(Debug)]
struct Data {
    buffer: Option<Buffer>,
    in_use: bool,
}

impl Data {
    fn new(memory: &SharedMemory, load: &Load) -> Result<Self, BenchError> {
        let depth = usize::from(load.depth);
        let size = usize::try_from(load.block_size).unwrap_or(usize::MAX);
        let buffer = memory.allocate(depth.saturating_mul(size), 4096)?;
        let mut pattern = vec![0; size];
        for at in 0..depth {
            fill(u64::try_from(at).unwrap_or(0), 0, &mut pattern);
            buffer.write(at * size, &pattern).map_err(Error::from)?;
        }
        Ok(Self { buffer: Some(buffer), in_use: false })
    }
}

impl Drop for Data {
    fn drop(&mut self) {
        if self.in_use
            && let Some(buffer) = self.buffer.take()
        {
            buffer.leak();
        }
    }
}

/// A thread's work: its source, its ledger and the places to put bytes that are looked at.
struct Work<'a> {
    load: &'a Load,
    live: &'a Live,
    source: Source,
    ledger: Option<&'a mut Ledger>,
    staging: Vec<u8>,
    scratch: Vec<u8>,
    counts: Counts,
}

/// Drives `lanes` from `source` until it is empty, the load's time is over or `live` says stop, then until
/// nothing is under way.
pub(super) fn drive(
    lanes: &mut [Lane],
    source: Source,
    ledger: Option<&mut Ledger>,
    load: &Load,
    live: &Live,
) -> Result<Counts, BenchError> {
    let size = usize::try_from(load.block_size).unwrap_or(0);
    let counts = Counts::new()?;
    let (staging, scratch) = (vec![0; size], Vec::with_capacity(size));
    let mut work = Work { load, live, source, ledger, staging, scratch, counts };
    let kicks = |lanes: &[Lane]| lanes.iter().map(|lane| lane.queue.as_virtqueue().kicks()).sum();
    let before: u64 = kicks(lanes);
    let start = Instant::now();
    let end = start.checked_add(load.duration);
    for lane in &mut *lanes {
        lane.homes.iter_mut().for_each(|data| data.in_use = true);
        lane.queue.virtqueue().disarm();
        for place in 0..usize::from(load.depth) {
            work.submit(lane, place, 0)?;
        }
        lane.queue.kick()?;
    }
    let last = work.pump(lanes, start, end)?;
    work.counts.record();
    lanes.iter_mut().flat_map(|lane| &mut lane.homes).for_each(|data| data.in_use = false);
    work.counts.kicks = kicks(lanes).wrapping_sub(before);
    work.counts.elapsed = last.saturating_duration_since(start);
    Ok(work.counts)
}

impl Work<'_> {
    /// The loop proper: answers when the last request came back.
    fn pump(
        &mut self,
        lanes: &mut [Lane],
        start: Instant,
        end: Option<Instant>,
    ) -> Result<Instant, BenchError> {
        let endless = matches!(self.source, Source::Endless(_));
        let (mut last, mut spins, mut over) = (start, 0, false);
        while lanes.iter().any(|lane| lane.queue.in_flight() > 0) {
            let mut came = false;
            for lane in &mut *lanes {
                let Some(done) = lane.queue.pop()? else { continue };
                let now = Instant::now();
                over =
                    over || (endless && (self.live.stopped() || end.is_some_and(|end| now >= end)));
                self.batch(lane, done, nanos(now, start), over)?;
                lane.queue.kick()?;
                self.counts.stall = self.counts.stall.max(now.saturating_duration_since(last));
                (came, last) = (true, now);
            }
            if came {
                spins = 0;
            } else if self.load.driving != Driving::Poll {
                sleep(lanes, last, self.load.driving)?;
            } else {
                spins += 1;
                std::hint::spin_loop();
                if spins % SPINS == 0 && last.elapsed() > STUCK {
                    return Err(stuck(lanes));
                }
            }
        }
        Ok(last)
    }

    /// Takes `done` and what else came back with it, and puts new requests in their places.
    fn batch(
        &mut self,
        lane: &mut Lane,
        done: Completion,
        now: u64,
        over: bool,
    ) -> Result<(), BenchError> {
        let (mut next, mut count) = (Some(done), 0);
        while let Some(done) = next {
            let place = usize::try_from(done.token).unwrap_or(usize::MAX);
            self.finish(lane, place, done, now)?;
            count += 1;
            if !over {
                self.submit(lane, place, now)?;
            }
            next = if count < SHOWN { lane.queue.pop()? } else { None };
        }
        self.live.count(count);
        Ok(())
    }

    fn submit(&mut self, lane: &mut Lane, place: usize, now: u64) -> Result<(), BenchError> {
        let Some(choice) = self.source.choose(self.ledger.as_deref_mut()) else { return Ok(()) };
        let (size, home) = (self.load.block_size, self.live.enter());
        let buffer = lane.home(home)?;
        if choice.write
            && let Some(ledger) = &mut self.ledger
        {
            ledger.next_version(choice.block, &mut self.staging);
            buffer.write(place * self.staging.len(), &self.staging).map_err(Error::from)?;
        }
        let token = u64::try_from(place).unwrap_or(u64::MAX);
        let data = [(buffer.guest() + token * u64::from(size), size)];
        let sector = sector_of(choice.block, size);
        if !lane.queue.submit(operation(choice.write, sector, &data), token)? {
            return Err(BenchError::Load(format!("the ring is too small for {place} requests")));
        }
        if let Some(entry) = lane.under_way.get_mut(place) {
            *entry = (choice, home, now);
        }
        Ok(())
    }

    fn finish(
        &mut self,
        lane: &Lane,
        place: usize,
        done: Completion,
        now: u64,
    ) -> Result<(), BenchError> {
        let Some(&(choice, home, began)) = lane.under_way.get(place) else {
            return Err(Error::State("a token came back that was never given out").into());
        };
        if done.status != Status::Ok {
            let sector = sector_of(choice.block, self.load.block_size);
            let operation = operation(choice.write, sector, &[]).name();
            return Err(Error::Request { operation, sector, status: done.status }.into());
        }
        self.counts.took(now.saturating_sub(began));
        if choice.write {
            self.counts.writes += 1;
        } else {
            self.counts.reads += 1;
        }
        if let Some(ledger) = &mut self.ledger {
            if choice.write {
                ledger.written(choice.block);
            } else {
                let at = place * self.staging.len();
                lane.home(home)?.read(at, &mut self.staging).map_err(Error::from)?;
                ledger.read(choice.block, &self.staging, &mut self.scratch)?;
            }
        }
        self.live.leave(home);
        Ok(())
    }
}

/// Nanoseconds from `start` to `now`.
fn nanos(now: Instant, start: Instant) -> u64 {
    let since = now.saturating_duration_since(start);
    since.as_secs().saturating_mul(1_000_000_000).saturating_add(u64::from(since.subsec_nanos()))
}

/// Sleeps until some lane has something.
fn sleep(lanes: &mut [Lane], last: Instant, driving: Driving) -> Result<(), BenchError> {
    let left = STUCK.saturating_sub(last.elapsed());
    let found = match &mut *lanes {
        [lane] if driving == Driving::Called => lane.queue.virtqueue().wait_called(left, CALL)?,
        [lane] => lane.queue.virtqueue().wait(left)?,
        _ => {
            let mut queues: Vec<&mut Virtqueue> =
                lanes.iter_mut().map(|lane| lane.queue.virtqueue()).collect();
            wait_any(&mut queues, left)?
        }
    };
    if found { Ok(()) } else { Err(stuck(lanes)) }
}

fn stuck(lanes: &[Lane]) -> BenchError {
    let stuck = lanes.iter().find(|lane| lane.queue.in_flight() > 0);
    let (queue, in_flight) =
        stuck.map_or((0, 0), |lane| (lane.queue.index(), lane.queue.in_flight()));
    Error::Stuck { queue, in_flight, after: STUCK }.into()
}

/// Pins this thread to a CPU.
pub(super) fn pin(cpu: Option<usize>) -> Result<(), BenchError> {
    let Some(cpu) = cpu else { return Ok(()) };
    let failed = |source| BenchError::Host { call: "pinning the driver to its cpu", source };
    if cpu >= rustix::thread::CpuSet::MAX_CPU {
        return Err(failed(std::io::ErrorKind::InvalidInput.into()));
    }
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set).map_err(|errno| failed(errno.into()))
}
