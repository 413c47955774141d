//! A load that runs while somebody else does something to the device: messages, storms, restarts.
//!
//! Invariants: while [`Target::during`]'s closure runs, requests fly, and all of them are checked; memory
//! that [`Live::move_to`] has left holds no request's data any more.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use outboard_frontend::SharedMemory;
use outboard_frontend::block::BlockDevice;
use serde::Serialize;

use super::cpu::CpuMeter;
use super::drive::STUCK;
use super::{BenchError, Load, Round, Target, filling, reading_back, run_beside, run_teams};

/// What a load and whoever disturbs it meanwhile know of each other.
#[derive(Debug)]
pub struct Live {
    stop: AtomicBool,
    completed: AtomicU64,
    /// A driver thread has ended: before its time, when nobody said stop.
    ended: AtomicBool,
    /// Where the data of new requests is.
    home: AtomicUsize,
    /// Requests with their data in each home.
    users: Vec<AtomicUsize>,
}

/// Notes the end of a thread, whichever way it ends.
pub(super) struct Running<'a>(&'a Live);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::SeqCst);
    }
}

/// Ends the load, also when what ran beside it panics.
struct Stop<'a>(&'a Live);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::SeqCst);
    }
}

impl Live {
    pub(super) fn new(homes: usize) -> Self {
        Self {
            stop: AtomicBool::new(false),
            completed: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            home: AtomicUsize::new(0),
            users: (0..=homes).map(|_| AtomicUsize::new(0)).collect(),
        }
    }

    /// Requests finished so far.
    #[must_use]
    pub fn completed(&self) -> u64 {
        self.completed.load(Ordering::SeqCst)
    }

    /// Whether the load has ended by itself, which it does only when something is wrong.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// Waits until `more` further requests are finished.
    ///
    /// # Errors
    /// [`BenchError::Load`] when the load has ended or stands still.
    pub fn progress(&self, more: u64) -> Result<(), BenchError> {
        let wanted = self.completed().saturating_add(more);
        self.wait_until("finished no request", || self.completed() >= wanted)
    }

    /// Has the data of new requests in home `home` (0 is the device's own memory, 1 the first of those
    /// that [`Target::during`] was given), and waits until no other home holds any.
    ///
    /// # Errors
    /// [`BenchError::Load`] when there is no such home, or the load has ended or stands still.
    pub fn move_to(&self, home: usize) -> Result<(), BenchError> {
        if home >= self.users.len() {
            return Err(BenchError::Load(format!("there is no home {home}")));
        }
        self.home.store(home, Ordering::SeqCst);
        self.wait_until("left requests behind", || {
            let left = self.users.iter().enumerate().filter(|&(at, _)| at != home);
            left.map(|(_, users)| users.load(Ordering::SeqCst)).sum::<usize>() == 0
        })
    }

    fn wait_until(&self, what: &str, done: impl Fn() -> bool) -> Result<(), BenchError> {
        let start = Instant::now();
        let mut looks = 0u32;
        while !done() {
            if self.failed() {
                return Err(BenchError::Load("the load has ended".to_owned()));
            }
            if start.elapsed() > STUCK {
                let seconds = STUCK.as_secs();
                return Err(BenchError::Load(format!("the load {what} in {seconds} s")));
            }
            looks = looks.saturating_add(1);
            if looks < 100 {
                std::thread::yield_now();
            } else {
                // The processor is the load's and the device's.
                std::thread::sleep(Duration::from_micros(20));
            }
        }
        Ok(())
    }

    pub(super) const fn running(&self) -> Running<'_> {
        Running(self)
    }

    pub(super) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    pub(super) fn count(&self, finished: u64) {
        self.completed.fetch_add(finished, Ordering::SeqCst);
    }

    /// The home of one more request.
    pub(super) fn enter(&self) -> usize {
        if self.users.len() == 1 {
            return 0;
        }
        loop {
            let home = self.home.load(Ordering::SeqCst);
            if let Some(users) = self.users.get(home) {
                users.fetch_add(1, Ordering::SeqCst);
                // Whoever moves the home looks at the users after that: one of the two sees the other.
                if self.home.load(Ordering::SeqCst) == home {
                    return home;
                }
                users.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }

    /// A request that [`Self::enter`] counted is finished.
    pub(super) fn leave(&self, home: usize) {
        if self.users.len() > 1
            && let Some(users) = self.users.get(home)
        {
            users.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// A load that was disturbed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Disturbed {
    /// Its figures.
    pub round: Round,
    /// Longest time in which none of its requests came back, in milliseconds.
    pub stall_ms: f64,
}

impl Target {
    /// Loads the device for as long as `beside` takes, which may use the device's connection meanwhile.
    /// The requests' data is in the device's own memory or in one of `homes`, as [`Live::move_to`] says;
    /// sharing those with the back-end is the caller's. The load's duration means nothing here.
    ///
    /// # Errors
    /// What the load found wrong, as [`Self::round`]; else what `beside` answers.
    pub fn during<T, E: From<BenchError>>(
        &mut self,
        load: &Load,
        homes: &[SharedMemory],
        beside: impl FnOnce(&mut BlockDevice, &Live) -> Result<T, E>,
    ) -> Result<(Disturbed, T), E> {
        let load = &Load { duration: Duration::MAX, ..load.clone() };
        let blocks = self.check(load)?;
        let threads = usize::from(load.threads.clamp(1, self.setup.queues));
        let mut teams = self.deal(load, threads, blocks, homes)?;
        let before = Live::new(homes.len());
        if load.verify {
            run_teams(&mut teams, load, &before, filling)?;
        }
        let live = Live::new(homes.len());
        let spent = self.cpu.as_ref().and_then(CpuMeter::read);
        let device = &mut self.device;
        let (counts, done) = run_beside(
            &mut teams,
            load,
            &live,
            |team| team.endless(load),
            || {
                let _stop = Stop(&live);
                beside(device, &live)
            },
        );
        let counts = counts?;
        let done = done?;
        let now = self.cpu.as_ref().and_then(CpuMeter::read);
        let spent = spent.zip(now).map(|(before, after)| after.since(&before));
        if load.verify {
            run_teams(&mut teams, load, &live, reading_back)?;
        }
        self.collect(teams);
        let round = Round::of(&counts, load.block_size, spent);
        Ok((Disturbed { round, stall_ms: counts.stall.as_secs_f64() * 1e3 }, done))
    }
}
