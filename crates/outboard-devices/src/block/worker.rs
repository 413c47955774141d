//! Serves block requests: parse, run the job on the engine, put the status behind the data.
//!
//! Invariants: a request whose status byte can be had always gets one; the length told to the
//! driver covers every writable byte in front of the status, so bytes that were not filled are
//! zeroed first and the driver may trust all of them; with system calls a read or a write allocates
//! nothing.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use outboard::{Error, Outcome, Request, Served, Worker};
use slab::Slab;
use tracing::{debug, warn};

use super::config::SECTOR;
use super::engine::{Engine, Op};
use super::job::{Job, Next};
use super::order::{Turn, WriteOrder};
use super::request::{Command, Header, Range, Rules, Segment, Status};
use super::{Disk, ID_SIZE};

/// Least time between two lines in the log about a disk that fails.
const QUIET: Duration = Duration::from_secs(1);

/// One worker of a block device; see the module.
pub struct BlockWorker {
    disk: Arc<Disk>,
    rules: Rules,
    engine: Box<dyn Engine>,
    /// Requests that the engine works on, and those that wait for their turn.
    jobs: Slab<Task>,
    /// Used while requests may be repeated by another process.
    order: WriteOrder,
    /// Lists of finished requests, to be filled again.
    spare: Vec<Vec<Range>>,
    log: ErrorLog,
}

/// A request under way.
struct Task {
    job: Job,
    /// Its place among writes, if it has one.
    turn: Option<Turn>,
}

/// What to do with a request.
enum Plan {
    Run(Job),
    Finish(Status),
}

impl BlockWorker {
    pub(super) fn new(disk: Arc<Disk>, engine: Box<dyn Engine>) -> Self {
        let image = disk.image();
        let rules = Rules {
            capacity: image.sectors(),
            read_only: image.read_only(),
            granularity: image.granularity(),
        };
        Self {
            disk,
            rules,
            engine,
            jobs: Slab::new(),
            order: WriteOrder::default(),
            spare: Vec::new(),
            log: ErrorLog::default(),
        }
    }

    /// Parses a request whose status byte is set aside.
    #[inline(always)]
    fn command(&mut self, request: &mut Request<'_>) -> Result<Command, Status> {
        let features = request.features();
        let writable = request.writable().room();
        let mut readable = request.readable();
        let header = readable.read_obj::<Header>().map_err(|_| Status::IoError)?;
        self.rules.capacity = self.disk.image().sectors();
        self.rules.check(&header, readable.len(), writable, features)
    }

    /// What is to be done for a command. Transfers of nothing are over.
    #[inline(always)]
    fn plan(&mut self, command: Command, request: &mut Request<'_>) -> Result<Plan, Status> {
        match command {
            Command::Read { offset } if !request.writable().is_empty() => {
                Ok(Plan::Run(Job::Read { at: offset }))
            }
            Command::Write { offset } if !request.readable().is_empty() => {
                let durable = self.disk.writes_through(request.features());
                Ok(Plan::Run(Job::Write { at: offset, durable }))
            }
            Command::Read { .. } | Command::Write { .. } => Ok(Plan::Finish(Status::Ok)),
            Command::Flush => Ok(Plan::Run(Job::Sync)),
            Command::GetId => self.give_id(request),
            Command::Discard { segments } => {
                let rules = self.rules;
                let ranges = self.ranges(request, segments, |raw| rules.check_discard(raw))?;
                Ok(clear(ranges, true, false))
            }
            Command::WriteZeroes { segments } => {
                let (rules, features) = (self.rules, request.features());
                let check = |raw: &Segment| rules.check_write_zeroes(raw, features);
                let ranges = self.ranges(request, segments, check)?;
                Ok(clear(ranges, false, self.disk.writes_through(features)))
            }
        }
    }

    #[cold]
    fn give_id(&self, request: &mut Request<'_>) -> Result<Plan, Status> {
        let (id, mut to) = (self.disk.id(), request.writable());
        let part = id.get(..usize::try_from(to.room()).unwrap_or(ID_SIZE).min(ID_SIZE));
        to.write_all(part.unwrap_or_default()).map_err(|_| Status::IoError)?;
        Ok(Plan::Finish(Status::Ok))
    }

    /// Copies the segments out and checks each, before anything is done for the first.
    #[inline(never)]
    fn ranges(
        &mut self,
        request: &mut Request<'_>,
        segments: u32,
        check: impl Fn(&Segment) -> Result<Option<Range>, Status>,
    ) -> Result<Vec<Range>, Status> {
        let mut readable = request.readable();
        let mut ranges = self.spare.pop().unwrap_or_default();
        ranges.clear();
        for _ in 0..segments {
            let raw = readable.read_obj::<Segment>().map_err(|_| Status::IoError)?;
            ranges.extend(check(&raw)?);
        }
        Ok(ranges)
    }

    /// Runs the job, whose writes nobody waits for. Most transfers are over with their first operation; what is not
    /// becomes a task.
    #[inline(always)]
    fn run(&mut self, job: Job, mut request: Request<'_>) -> Result<Served, Error> {
        let now = self.attempt(job.op(), &mut request);
        if matches!(now, Some(Ok(_))) && is_whole(&job, &mut request) {
            return finish(request, Status::Ok);
        }
        self.go_on(Task { job, turn: None }, now, request)
    }

    /// The outcome of an operation that needs no waiting.
    #[inline(always)]
    fn attempt(&mut self, op: Op, request: &mut Request<'_>) -> Option<io::Result<u64>> {
        if self.refuses(op) { Some(Err(lost())) } else { self.engine.now(op, request) }
    }

    /// Runs the job to its end, or to the first operation that the engine starts.
    fn advance(&mut self, task: Task, mut request: Request<'_>) -> Result<Served, Error> {
        let now = self.attempt(task.job.op(), &mut request);
        self.go_on(task, now, request)
    }

    /// As [`advance`](Self::advance), from the outcome of the operation at hand on, if it has one.
    fn go_on(
        &mut self,
        mut task: Task,
        mut now: Option<io::Result<u64>>,
        mut request: Request<'_>,
    ) -> Result<Served, Error> {
        loop {
            let op = task.job.op();
            let outcome = match now {
                Some(outcome) => outcome,
                None => {
                    let token = self.jobs.insert(task);
                    request = match self.engine.start(op, request, token as u64) {
                        Ok(served) => return Ok(served),
                        Err(request) => request,
                    };
                    task = self.jobs.remove(token);
                    self.engine.run(op, &mut request)
                }
            };
            if let Next::Done(status) = self.step(&mut task.job, &outcome, &mut request) {
                self.over(task);
                return finish(request, status);
            }
            now = self.attempt(task.job.op(), &mut request);
        }
    }

    /// Begins a job that may be repeated by another process, or lets it wait for older writes to the same bytes.
    fn begin(&mut self, job: Job, mut request: Request<'_>) -> Result<Served, Error> {
        let Some(bytes) = job.writes(request.readable().len()) else {
            return self.run(job, request);
        };
        let (turn, now) = self.order.enter(bytes, self.jobs.vacant_key());
        let task = Task { job, turn: Some(turn) };
        if now {
            return self.advance(task, request);
        }
        Ok(request.hold(self.jobs.insert(task) as u64))
    }

    /// A request ends.
    fn over(&mut self, task: Task) {
        if let Some(turn) = task.turn {
            self.order.leave(turn);
        }
        self.spare.extend(task.job.into_ranges());
    }

    /// A flush that failed stays failed: the kernel forgets the error and the data with it, so a
    /// later flush that succeeds would be a lie.
    fn refuses(&self, op: Op) -> bool {
        op == Op::Sync && self.disk.flush_failed()
    }

    /// Takes an outcome into the job.
    fn step(
        &mut self,
        job: &mut Job,
        outcome: &io::Result<u64>,
        request: &mut Request<'_>,
    ) -> Next {
        let op = job.op();
        let left = match op {
            Op::Read { .. } => request.writable().len(),
            Op::Write { .. } => request.readable().len(),
            _ => 0,
        };
        let next = job.next(outcome, left);
        if let Err(error) = outcome {
            if op == Op::Sync {
                self.disk.set_flush_failed();
            }
            if next == Next::Done(Status::IoError) {
                self.log.report(op, error);
            }
        }
        next
    }
}

impl Worker for BlockWorker {
    fn serve(&mut self, mut request: Request<'_>) -> Result<Served, Error> {
        if let Err(short) = request.reserve_tail(1) {
            debug!("no room for a status: {short}");
            return Ok(request.done(0));
        }
        let command = self.command(&mut request);
        match command.and_then(|command| self.plan(command, &mut request)) {
            Ok(Plan::Run(job)) if request.is_tracked() => self.begin(job, request),
            Ok(Plan::Run(job)) => self.run(job, request),
            Ok(Plan::Finish(status)) => finish(request, status),
            Err(status) => {
                debug!(?status, "request refused");
                finish(request, status)
            }
        }
    }

    fn completed(
        &mut self,
        mut request: Request<'_>,
        token: u64,
        outcome: Outcome,
    ) -> Result<Served, Error> {
        let job = usize::try_from(token).ok().and_then(|token| self.jobs.try_remove(token));
        let Some(mut task) = job else {
            // A worker that panicked left it behind; what the kernel did is not known.
            return finish(request, Status::IoError);
        };
        let op = task.job.op();
        let outcome = match outcome {
            Ok(moved) => consume(op, &mut request, moved),
            Err(error) if not_now(&error) => self.engine.run(op, &mut request),
            Err(error) => Err(error),
        };
        // One that failed while this one was under way may have taken its error.
        let outcome = if self.refuses(op) { Err(lost()) } else { outcome };
        match self.step(&mut task.job, &outcome, &mut request) {
            Next::More => self.advance(task, request),
            Next::Done(status) => {
                self.over(task);
                finish(request, status)
            }
        }
    }

    fn release(&mut self) -> Option<u64> {
        self.order.ready().map(|token| token as u64)
    }

    fn resumed(&mut self, request: Request<'_>, token: u64) -> Result<Served, Error> {
        let task = usize::try_from(token).ok().and_then(|token| self.jobs.try_remove(token));
        match task {
            Some(task) => self.advance(task, request),
            None => finish(request, Status::IoError),
        }
    }

    fn abandoned(&mut self, token: u64, outcome: Outcome) {
        let job = usize::try_from(token).ok().and_then(|token| self.jobs.try_remove(token));
        let Some(task) = job else { return };
        let ended = |error: &io::Error| not_now(error) || is_cancelled(error);
        if task.job.op() == Op::Sync && outcome.is_err_and(|error| !ended(&error)) {
            self.disk.set_flush_failed();
        }
        self.over(task);
    }
}

impl std::fmt::Debug for BlockWorker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockWorker").field("in_flight", &self.jobs.len()).finish_non_exhaustive()
    }
}

/// Whether the first operation of the job, which ended well, was all there is to do: no data is left to be moved.
#[inline]
fn is_whole(job: &Job, request: &mut Request<'_>) -> bool {
    match job {
        Job::Read { .. } => request.writable().is_empty(),
        Job::Write { durable, .. } => !durable && request.readable().is_empty(),
        Job::Sync | Job::Clear(_) => false,
    }
}

/// Answers with `status`, behind data that is filled with zeros where nothing else was written.
fn finish(mut request: Request<'_>, status: Status) -> Result<Served, Error> {
    let mut data = request.writable();
    if !data.is_empty() {
        data.fill_zero(data.len())?;
    }
    let written = data.room().saturating_add(1);
    request.write_tail(&[status as u8])?;
    Ok(request.done(u32::try_from(written).unwrap_or(u32::MAX)))
}

fn clear(ranges: Vec<Range>, discard: bool, durable: bool) -> Plan {
    if ranges.is_empty() {
        return Plan::Finish(Status::Ok);
    }
    Plan::Run(Job::clear(ranges, discard, durable))
}

fn lost() -> io::Error {
    io::Error::other("an earlier flush failed, and what it lost stays lost")
}

/// The kernel moved bytes by itself: they leave the request.
fn consume(op: Op, request: &mut Request<'_>, moved: u32) -> io::Result<u64> {
    let moved = u64::from(moved);
    match op {
        Op::Read { .. } => request.writable().advance(moved).map_err(io::Error::other)?,
        Op::Write { .. } => request.readable().advance(moved).map_err(io::Error::other)?,
        _ => {}
    }
    Ok(moved)
}

/// Whether the kernel only says that it would have to wait.
fn not_now(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}

/// Whether the kernel only says that it was told to give up.
fn is_cancelled(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::CANCELED.raw_os_error())
}

/// A failing disk is told about once a second, not once per request.
#[derive(Debug, Default)]
struct ErrorLog {
    last: Option<Instant>,
    hidden: u64,
}

impl ErrorLog {
    fn report(&mut self, op: Op, error: &io::Error) {
        if self.last.is_some_and(|last| last.elapsed() < QUIET) {
            self.hidden += 1;
            return;
        }
        self.last = Some(Instant::now());
        let more = std::mem::take(&mut self.hidden);
        let (what, sector) = match op {
            Op::Read { offset } => ("read", offset / SECTOR),
            Op::Write { offset } => ("write", offset / SECTOR),
            Op::Allocate { offset, .. } | Op::WriteZeros { offset, .. } => {
                ("discard or zeroing", offset / SECTOR)
            }
            Op::Sync => ("flush", 0),
        };
        warn!("{what} failed at sector {sector}: {error} ({more} more errors before)");
    }
}
