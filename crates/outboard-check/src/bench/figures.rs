//! From counts to figures: one round, the medians of several, and two back-ends side by side.
//!
//! Invariant: a ratio is made of medians over rounds that took turns (A B A B …), so that a machine that
//! gets faster or slower meanwhile does so for both.

use std::time::Duration;

use serde::Serialize;

use super::drive::Counts;

/// Latencies in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Latency {
    /// Mean.
    pub mean_us: f64,
    /// Half of the requests were at most this slow.
    pub p50_us: f64,
    /// 90 of 100.
    pub p90_us: f64,
    /// 99 of 100.
    pub p99_us: f64,
    /// 999 of 1000.
    pub p999_us: f64,
    /// The slowest.
    pub max_us: f64,
}

/// What one round measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Round {
    /// Length in seconds.
    pub seconds: f64,
    /// Reads finished.
    pub reads: u64,
    /// Writes finished.
    pub writes: u64,
    /// Requests per second.
    pub iops: f64,
    /// Data per second, in MiB.
    pub mib_per_second: f64,
    /// From submitting to taking back.
    pub latency: Latency,
    /// Kicks that the device asked for, per request.
    pub kicks_per_io: f64,
    /// CPU time of the back-end's whole process per request, in microseconds.
    pub backend_cpu_us_per_io: Option<f64>,
    /// CPUs that the back-end kept busy.
    pub backend_cpus: Option<f64>,
}

impl Round {
    pub(super) fn of(counts: &Counts, block_size: u32, spent: Option<Duration>) -> Self {
        let total = float(counts.reads + counts.writes);
        let seconds = counts.elapsed.as_secs_f64();
        let us = |quantile: f64| float(counts.latency.value_at_quantile(quantile)) / 1e3;
        let iops = ratio(total, seconds);
        Self {
            seconds,
            reads: counts.reads,
            writes: counts.writes,
            iops,
            mib_per_second: iops * f64::from(block_size) / f64::from(1u32 << 20),
            latency: Latency {
                mean_us: counts.latency.mean() / 1e3,
                p50_us: us(0.5),
                p90_us: us(0.9),
                p99_us: us(0.99),
                p999_us: us(0.999),
                max_us: float(counts.latency.max()) / 1e3,
            },
            kicks_per_io: ratio(float(counts.kicks), total),
            backend_cpu_us_per_io: spent.map(|spent| ratio(spent.as_secs_f64() * 1e6, total)),
            backend_cpus: spent.map(|spent| ratio(spent.as_secs_f64(), seconds)),
        }
    }
}

/// Medians over some rounds, with the range of the rates.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// How many rounds.
    pub rounds: usize,
    /// Each figure's own median (of the counts: the mean).
    pub median: Round,
    /// The slowest round's requests per second.
    pub iops_min: f64,
    /// The fastest round's requests per second.
    pub iops_max: f64,
}

/// The medians of `rounds`; `None` without any.
#[must_use]
pub fn summary(rounds: &[Round]) -> Option<Summary> {
    if rounds.is_empty() {
        return None;
    }
    let rates = || rounds.iter().map(|round| round.iops);
    Some(Summary {
        rounds: rounds.len(),
        median: medians(rounds),
        iops_min: rates().fold(f64::INFINITY, f64::min),
        iops_max: rates().fold(0.0, f64::max),
    })
}

/// A round of medians.
fn medians(rounds: &[Round]) -> Round {
    let of = |get: fn(&Round) -> f64| median(rounds.iter().map(get));
    let optional = |get: fn(&Round) -> Option<f64>| {
        let values: Option<Vec<f64>> = rounds.iter().map(get).collect();
        values.map(|values| median(values.into_iter()))
    };
    let mean = |get: fn(&Round) -> u64| rounds.iter().map(get).sum::<u64>() / count(rounds);
    Round {
        seconds: of(|round| round.seconds),
        reads: mean(|round| round.reads),
        writes: mean(|round| round.writes),
        iops: of(|round| round.iops),
        mib_per_second: of(|round| round.mib_per_second),
        latency: Latency {
            mean_us: of(|round| round.latency.mean_us),
            p50_us: of(|round| round.latency.p50_us),
            p90_us: of(|round| round.latency.p90_us),
            p99_us: of(|round| round.latency.p99_us),
            p999_us: of(|round| round.latency.p999_us),
            max_us: of(|round| round.latency.max_us),
        },
        kicks_per_io: of(|round| round.kicks_per_io),
        backend_cpu_us_per_io: optional(|round| round.backend_cpu_us_per_io),
        backend_cpus: optional(|round| round.backend_cpus),
    }
}

/// Two back-ends under the same load, in turns.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The first one.
    pub a: Summary,
    /// The second one.
    pub b: Summary,
    /// Requests per second of the first over those of the second: above 1 the first is faster.
    pub iops_ratio: f64,
    /// Median latency of the first over that of the second: below 1 the first is faster.
    pub p50_ratio: f64,
    /// Back-end CPU per request of the first over that of the second: below 1 the first is cheaper.
    pub cpu_ratio: Option<f64>,
}

/// The comparison of two sets of rounds; `None` when one is empty.
#[must_use]
pub fn compare(a: &[Round], b: &[Round]) -> Option<Comparison> {
    let (a, b) = (summary(a)?, summary(b)?);
    let cpu = a.median.backend_cpu_us_per_io.zip(b.median.backend_cpu_us_per_io);
    Some(Comparison {
        iops_ratio: ratio(a.median.iops, b.median.iops),
        p50_ratio: ratio(a.median.latency.p50_us, b.median.latency.p50_us),
        cpu_ratio: cpu.map(|(a, b)| ratio(a, b)),
        a,
        b,
    })
}

/// The middle value, or the mean of the two middle ones; 0 of nothing.
#[must_use]
pub fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let high = values.get(middle).copied().unwrap_or(0.0);
    if values.len().is_multiple_of(2) && middle > 0 {
        let low = values.get(middle - 1).copied().unwrap_or(high);
        return f64::midpoint(low, high);
    }
    high
}

/// 0 instead of a division by nothing.
fn ratio(value: f64, by: f64) -> f64 {
    if by > 0.0 { value / by } else { 0.0 }
}

fn count(rounds: &[Round]) -> u64 {
    u64::try_from(rounds.len()).unwrap_or(1).max(1)
}

/// Exact up to 2^53, far above any count here.
fn float(value: u64) -> f64 {
    let high = u32::try_from(value >> 32).unwrap_or(u32::MAX);
    let low = u32::try_from(value & 0xffff_ffff).unwrap_or(u32::MAX);
    f64::from(high) * 4_294_967_296.0 + f64::from(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(iops: f64, cpu: Option<f64>) -> Round {
        let latency = Latency {
            mean_us: 1.0,
            p50_us: 2.0,
            p90_us: 3.0,
            p99_us: 4.0,
            p999_us: 5.0,
            max_us: 6.0,
        };
        Round {
            seconds: 1.0,
            reads: 10,
            writes: 0,
            iops,
            mib_per_second: iops,
            latency,
            kicks_per_io: 0.5,
            backend_cpu_us_per_io: cpu,
            backend_cpus: cpu,
        }
    }

    #[test]
    fn the_median_is_the_middle_whatever_the_order() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), 2.5);
        assert_eq!(median([7.0].into_iter()), 7.0);
        assert_eq!(median(std::iter::empty()), 0.0);
    }

    #[test]
    fn a_ratio_is_made_of_medians_and_one_outlier_does_not_move_it() {
        let a = [round(200.0, None), round(210.0, None), round(1.0, None)];
        let b = [round(100.0, None), round(90.0, None), round(9999.0, None)];
        let comparison = compare(&a, &b).expect("there are rounds");
        assert_eq!(comparison.iops_ratio, 2.0);
        assert_eq!(comparison.cpu_ratio, None);
        assert_eq!((comparison.b.iops_min, comparison.b.iops_max), (90.0, 9999.0));
    }

    #[test]
    fn no_rounds_make_no_summary() {
        assert_eq!(summary(&[]), None);
        assert_eq!(compare(&[], &[round(1.0, None)]), None);
    }

    #[test]
    fn numbers_become_floats_without_loss() {
        assert_eq!(float(u64::from(u32::MAX) + 1), 4_294_967_296.0);
        assert_eq!(float(12_345), 12_345.0);
    }
}
