//! CPU time of another process, all of its threads together.
//!
//! `/proc/PID/task/*/schedstat` counts nanoseconds on a CPU for each living thread; `/proc/PID/stat`
//! also has the threads that ended, in steps of 10 ms. Invariant: a figure is either right or `None`;
//! a thread that ends between two readings sends us to the coarser one.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Length of one tick of `/proc/PID/stat`: `USER_HZ` is 100 on every platform that we run on.
const TICK: Duration = Duration::from_millis(10);

/// Reads the CPU time of one process.
#[derive(Clone, Debug)]
pub struct CpuMeter {
    proc: PathBuf,
}

/// One reading of a [`CpuMeter`].
#[derive(Clone, Debug)]
pub struct CpuReading {
    threads: BTreeMap<u32, u64>,
    whole: Duration,
}

impl CpuMeter {
    /// A meter for the process `pid`.
    #[must_use]
    pub fn new(pid: u32) -> Self {
        Self { proc: PathBuf::from(format!("/proc/{pid}")) }
    }

    /// Reads the clock; `None` when the process is gone or hidden from us.
    #[must_use]
    pub fn read(&self) -> Option<CpuReading> {
        let stat = std::fs::read_to_string(self.proc.join("stat")).ok()?;
        let whole = ticks(&stat)?;
        let mut threads = BTreeMap::new();
        for entry in std::fs::read_dir(self.proc.join("task")).ok()?.flatten() {
            let Some(thread) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let Ok(text) = std::fs::read_to_string(entry.path().join("schedstat")) else {
                continue;
            };
            let Some(spent) = text.split(' ').next().and_then(|word| word.parse().ok()) else {
                continue;
            };
            threads.insert(thread, spent);
        }
        Some(CpuReading { threads, whole })
    }
}

impl CpuReading {
    /// CPU time between an earlier reading and this one.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Duration {
        let all_alive = earlier.threads.keys().all(|thread| self.threads.contains_key(thread));
        if !all_alive || self.threads.is_empty() {
            return self.whole.saturating_sub(earlier.whole);
        }
        let spent = self.threads.iter().map(|(thread, now)| {
            now.saturating_sub(earlier.threads.get(thread).copied().unwrap_or(0))
        });
        Duration::from_nanos(spent.sum())
    }
}

/// User and system time out of the text of `/proc/PID/stat`; the name in it may hold anything.
fn ticks(stat: &str) -> Option<Duration> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace().skip(11);
    let user: u32 = fields.next()?.parse().ok()?;
    let system: u32 = fields.next()?.parse().ok()?;
    TICK.checked_mul(user.checked_add(system)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_with_brackets_and_spaces_does_not_shift_the_fields() {
        let stat = "7 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20";
        assert_eq!(ticks(stat), Some(Duration::from_secs(2)));
    }

    #[test]
    fn our_own_work_is_counted() {
        let meter = CpuMeter::new(std::process::id());
        let before = meter.read().expect("we are alive");
        let spent = || meter.read().expect("we are alive").since(&before);
        // However little of a processor we get meanwhile.
        let until = std::time::Instant::now() + Duration::from_secs(60);
        while spent() < Duration::from_millis(1) {
            assert!(std::time::Instant::now() < until, "our work is not counted");
            (0..10_000).for_each(|_| std::hint::spin_loop());
        }
    }

    #[test]
    fn a_process_that_is_gone_has_no_reading() {
        assert!(CpuMeter::new(u32::MAX).read().is_none());
    }
}
