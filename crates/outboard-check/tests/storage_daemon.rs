//! The load generator and the probe against qemu-storage-daemon, a back-end that we did not write. Each
//! test says so and passes when the daemon is not installed; under `CI=true` it fails.
#![expect(clippy::expect_used, clippy::panic, reason = "a failed step of a test is its end")]

#[path = "../../outboard-frontend/tests/common/mod.rs"]
mod common;

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::Daemon;
use outboard_check::bench::{BenchError, Driving, Load, Setup, Target, Workload, compare};
use outboard_check::probe::{DeviceType, probe};

const MIB: u64 = 1 << 20;

fn setup(queues: u16) -> Setup {
    let timeout = Duration::from_secs(10);
    Setup { queues, depth: 16, block_size: 4096, indirect: false, packed: false, timeout }
}

fn load(name: &str) -> Load {
    let workload = Workload::named(name).expect("a workload");
    Load { workload, depth: 16, duration: Duration::from_millis(200), ..Load::default() }
}

#[test]
fn a_probe_says_what_the_daemon_is() {
    let Some(daemon) = Daemon::start(8 * MIB, 3) else { return };
    let offer = probe(daemon.connect(), None).expect("an answer");
    assert_eq!((offer.device, offer.guessed), (Some(DeviceType::Block), true));
    assert_eq!((offer.queues, offer.memory_slots), (Some(3), Some(509)));
    let has = |name: &str| offer.features.set.iter().any(|bit| bit.name == name);
    assert!(has("VERSION_1") && has("FLUSH") && has("EVENT_IDX") && !has("RING_PACKED"));
    let field =
        |name: &str| offer.fields.iter().find(|field| field.name == name).map(|f| f.value.clone());
    assert_eq!(field("capacity").as_deref(), Some("16384 sectors (8388608 bytes)"));
    assert_eq!(field("queues").as_deref(), Some("3"));
    // It served a probe and serves on.
    probe(daemon.connect(), Some(DeviceType::Net)).expect("an answer");
}

#[test]
fn a_round_counts_what_happened() {
    let Some(daemon) = Daemon::start(8 * MIB, 1) else { return };
    let mut target = Target::over(daemon.connect(), setup(1)).expect("a disk");
    for driving in [Driving::Poll, Driving::Sleep] {
        let round = target.round(&Load { driving, ..load("randrw") }).expect("figures");
        let done = round.reads + round.writes;
        assert!(round.reads > 0 && round.writes > 0, "{round:?}");
        let expected = done.to_string().parse::<f64>().expect("a number") / round.seconds;
        assert!((round.iops - expected).abs() < 1.0, "{round:?}");
        assert!((round.mib_per_second - round.iops / 256.0).abs() < 0.01, "{round:?}");
        assert!(round.latency.p50_us <= round.latency.p99_us, "{round:?}");
        assert!(round.latency.p99_us <= round.latency.max_us, "{round:?}");
        assert!(round.backend_cpu_us_per_io.is_some_and(|cpu| cpu > 0.0), "{round:?}");
        assert!(round.kicks_per_io <= 1.0, "{round:?}");
    }
}

#[test]
fn every_workload_holds_what_it_wrote() {
    let Some(daemon) = Daemon::start(8 * MIB, 4) else { return };
    for (queues, threads, driving) in
        [(1, 1, Driving::Poll), (4, 2, Driving::Sleep), (4, 4, Driving::Sleep)]
    {
        let mut target = Target::over(daemon.connect(), setup(queues)).expect("a disk");
        for name in ["randread", "read", "randwrite", "write", "randrw", "rw"] {
            let load = Load { verify: true, threads, driving, ..load(name) };
            let duration = Duration::from_millis(50);
            let load = Load { duration, span: Some(MIB), ..load };
            let round = target.round(&load).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(round.reads + round.writes > 0);
        }
    }
}

#[test]
fn a_block_that_changes_behind_the_device_is_noticed() {
    let Some(daemon) = Daemon::start(8 * MIB, 1) else { return };
    let image = std::fs::OpenOptions::new().write(true).open(daemon.image()).expect("the image");
    let mut target = Target::over(daemon.connect(), setup(1)).expect("a disk");
    let over = AtomicBool::new(false);
    let error = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                image.write_all_at(&[0x55; 512], 5 * 4096 + 512).expect("the image");
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let outcome = target.round(&Load { verify: true, ..load("randread") });
        over.store(true, Ordering::Relaxed);
        outcome.expect_err("block 5 was spoilt")
    });
    let BenchError::Mismatch(mismatch) = error else { panic!("{error}") };
    assert_eq!((mismatch.block, mismatch.at), (5, 512));
}

#[test]
fn two_targets_are_compared_in_turns() {
    let Some(first) = Daemon::start(8 * MIB, 1) else { return };
    let Some(second) = Daemon::start(8 * MIB, 1) else { return };
    let mut rounds = [Vec::new(), Vec::new()];
    let mut targets =
        [&first, &second].map(|daemon| Target::over(daemon.connect(), setup(1)).expect("a disk"));
    for _ in 0..3 {
        for (target, rounds) in targets.iter_mut().zip(&mut rounds) {
            rounds.push(target.round(&load("randread")).expect("figures"));
        }
    }
    let comparison = compare(&rounds[0], &rounds[1]).expect("three rounds each");
    assert_eq!((comparison.a.rounds, comparison.b.rounds), (3, 3));
    let ratio = comparison.a.median.iops / comparison.b.median.iops;
    assert!((comparison.iops_ratio - ratio).abs() < 1e-9);
}

#[test]
fn a_load_that_does_not_fit_is_refused_in_words() {
    let Some(daemon) = Daemon::start(MIB, 1) else { return };
    let mut target = Target::over(daemon.connect(), setup(1)).expect("a disk");
    let mut refused = |load: Load| target.round(&load).expect_err("it does not fit").to_string();
    let plain = load("randread");
    assert!(refused(Load { block_size: 700, ..plain.clone() }).contains("no multiple"));
    assert!(refused(Load { depth: 17, ..plain.clone() }).contains("prepared"));
    assert!(refused(Load { depth: 0, ..plain.clone() }).contains("depth"));
    assert!(refused(Load { span: Some(100), ..plain.clone() }).contains("0 blocks"));
    let small = Load { verify: true, span: Some(4096 * 31), ..plain.clone() };
    assert!(refused(small).contains("31 blocks, 32 are needed"));
    target.round(&plain).expect("and then one that fits");
}
