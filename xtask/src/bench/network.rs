//! `cargo xtask bench --net`: our switch and DPDK's net_vhost under the same driver, in turns, as `docs/network.md`.
//!
//! The driver is DPDK's virtio-user in testpmd, on the first processor, and counts; the back-end has the second one. Each
//! round is a new driver and a new back-end, A B A B. Invariant: both back-ends do the same work: packets into a sink (a
//! switch whose other port has nobody, testpmd's rxonly), or from one port to another (the switch, testpmd's io).

use super::Options;
use crate::backend::{Device, socket};
use crate::packages::Root;
use crate::process::Running;
use crate::{paths, process};
use anyhow::{Context as _, Result, ensure};
use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const PAGE: &str = "docs/network.md";
/// How long a driver may take until it has printed its samples.
const PATIENCE: Duration = Duration::from_secs(60);

const HEAD: &str = "# Network cards beside DPDK\n\n\
    Written by `cargo xtask bench --net`: do not edit. The driver is DPDK's virtio-user (testpmd) on the first processor, the\n\
    back-end is on the second: `outboard switch --workers 1 --poll-us always`, or DPDK's net_vhost in a testpmd of its own. In turns, a new\n\
    pair of processes for each round; medians. Millions of packets in a second, as the driver counts them. Only ratios within\n\
    a row mean something.\n\n";

/// One kind of packets.
struct Work {
    name: &'static str,
    bytes: u16,
    /// From one port to another, or into a sink.
    through: bool,
    /// Further parameters of virtio-user.
    ring: &'static str,
}

const WORK: &[Work] = &[
    Work { name: "a guest sends, split ring", bytes: 64, through: false, ring: "" },
    Work { name: "a guest sends, packed ring", bytes: 64, through: false, ring: ",packed_vq=1" },
    Work { name: "a guest sends, split ring", bytes: 1500, through: false, ring: "" },
    Work { name: "from one guest to another, split rings", bytes: 64, through: true, ring: "" },
    Work { name: "from one guest to another, split rings", bytes: 1500, through: true, ring: "" },
];

/// What is compared.
#[derive(Clone, Copy)]
enum Side {
    Outboard,
    Dpdk,
}

/// The programs.
struct Programs {
    outboard: PathBuf,
    testpmd: PathBuf,
}

/// Measures and writes the page.
///
/// # Errors
/// When a program cannot be had, or brings no figures.
pub(super) fn run(options: &Options) -> Result<()> {
    let testpmd = Root::prepare_peers(false)?.wrappers().join("dpdk-testpmd");
    let programs = Programs { outboard: super::outboard()?, testpmd };
    let mut page = HEAD.to_owned();
    let _ = writeln!(page, "Measured on {}.\n", super::machine()?);
    page += "| packets | bytes | outboard | DPDK net_vhost | ratio |\n|---|---|---|---|---|\n";
    for work in WORK {
        println!("bench: {}, {} bytes", work.name, work.bytes);
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..options.rounds_or(5) {
            ours.push(round(work, Side::Outboard, &programs)?);
            theirs.push(round(work, Side::Dpdk, &programs)?);
        }
        let (ours, theirs) = (median(ours)?, median(theirs)?);
        let ratio = ours / theirs;
        let (name, bytes) = (work.name, work.bytes);
        println!("bench: {ours:.2} and {theirs:.2} million/s, {ratio:.2}");
        let _ = writeln!(page, "| {name} | {bytes} | {ours:.2} | {theirs:.2} | **{ratio:.2}** |");
    }
    std::fs::write(paths::workspace().join(PAGE), page + TAIL)?;
    println!("bench: {PAGE}");
    Ok(())
}

fn median(mut rates: Vec<f64>) -> Result<f64> {
    rates.sort_by(f64::total_cmp);
    rates.get(rates.len() / 2).copied().context("no round")
}

/// One back-end and one driver; millions of packets in a second.
fn round(work: &Work, side: Side, programs: &Programs) -> Result<f64> {
    let dir = tempfile::tempdir()?;
    let ports: &[&str] = if work.through { &["two", "one"] } else { &["one"] };
    let mut command = match side {
        Side::Outboard => ours(&programs.outboard, dir.path(), ports, work.through),
        Side::Dpdk => theirs(&programs.testpmd, dir.path(), ports, work.through),
    };
    // The last port in the list is the last one to listen.
    let device = Device::start(&mut command, dir.path(), "one")?;
    let rate = drive(work, &programs.testpmd, dir.path(), ports);
    rate.map_err(|error| anyhow::anyhow!("{error:#}\n{}", device.said()))
}

fn pinned(program: &Path, processor: u32) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", &processor.to_string()]).arg(program);
    command
}

fn ours(outboard: &Path, dir: &Path, ports: &[&str], through: bool) -> Command {
    let mut command = pinned(outboard, 1);
    // One thread for all ports: it shares its processor with nobody.
    command.args(["switch", "--workers", "1", "--poll-us", "always"]);
    if !through {
        // Nobody is there: what is sent goes nowhere.
        command.arg("--port").arg(socket(dir, "nobody"));
    }
    for port in ports {
        command.arg("--port").arg(socket(dir, port));
    }
    command
}

/// What every testpmd is told, before its devices.
fn testpmd(program: &Path, processor: u32) -> Command {
    let mut command = pinned(program, processor);
    command.arg(format!("--lcores=0@{processor},1@{processor}"));
    command.args(["--no-huge", "-m", "512", "--no-pci", "--no-telemetry", "--no-shconf"]);
    command
}

fn theirs(program: &Path, dir: &Path, ports: &[&str], through: bool) -> Command {
    let mut command = testpmd(program, 1);
    for (at, port) in ports.iter().enumerate() {
        let path = socket(dir, port);
        command.arg(format!("--vdev=net_vhost{at},iface={},queues=1", path.display()));
    }
    command.args(["--", "--auto-start", "--stats-period=3600", "--total-num-mbufs=16384"]);
    command.args([
        "--nb-cores=1",
        if through { "--forward-mode=io" } else { "--forward-mode=rxonly" },
    ]);
    command
}

/// The driver's samples of a second each; the median of those in which packets flowed all the time.
fn drive(work: &Work, program: &Path, dir: &Path, ports: &[&str]) -> Result<f64> {
    let mut command = testpmd(program, 0);
    for (at, port) in ports.iter().enumerate() {
        let (path, ring) = (socket(dir, port), work.ring);
        let device = format!("net_virtio_user{at},path={},queues=1,queue_size=256", path.display());
        command.arg(format!("--vdev={device}{ring}"));
    }
    command.args(["--", "--auto-start", "--stats-period=1", "--total-num-mbufs=16384"]);
    command.args(["--nb-cores=1", &format!("--txpkts={}", work.bytes)]);
    command.arg(if work.through { "--forward-mode=flowgen" } else { "--forward-mode=txonly" });
    let log = dir.join("driver.log");
    let file = File::create(&log)?;
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    let child = command.spawn().context(process::shown(&command))?;
    let mut driver = Running(child);
    let (end, field) =
        (Instant::now() + PATIENCE, if work.through { "Rx-pps:" } else { "Tx-pps:" });
    loop {
        std::thread::sleep(Duration::from_millis(200)); // it prints once in a second
        let said = std::fs::read_to_string(&log)?;
        let samples = samples(&said, field, ports.len());
        // The first one starts before the packets do.
        if let Some(samples) = samples.get(2..).filter(|samples| samples.len() >= 3) {
            return median(samples.to_vec());
        }
        if let Some(status) = driver.0.try_wait()? {
            anyhow::bail!("the driver ended with {status}\n{}", crate::guest::tail(&log, 20));
        }
        ensure!(Instant::now() < end, "no figures\n{}", crate::guest::tail(&log, 20));
    }
}

/// What testpmd printed of all ports, in millions, one sum for each second.
fn samples(said: &str, field: &str, ports: usize) -> Vec<f64> {
    let counts = said.lines().filter_map(|line| {
        let after = line.split_once(field)?.1;
        after.split_whitespace().next()?.parse::<f64>().ok()
    });
    let counts: Vec<_> = counts.collect();
    counts.chunks_exact(ports).map(|ports| ports.iter().sum::<f64>() / 1e6).collect()
}

const TAIL: &str = "\n## Why\n\
    - Where a guest sends, DPDK's net_vhost takes what it gets in vectors and drops it; the switch copies each packet, for it may\n\
    go to a port, and learns where it came from. The driver asks for order by itself, which costs our side 1.3 to 1.7 times the\n\
    instructions in the ring (PROMISES.md); without it (`in_order=0`) the rates were no others than the machine's own ups and downs.\n\
    - From one guest to another both move both ports on one thread. The driver's packets have addresses that nobody has, so the\n\
    switch makes a copy of each for every other port, as a switch must; DPDK knows no addresses and passes on what it got.\n\
    - What does not arrive between testpmd's ports is dropped where the other port's 384 places are full, and counted: on split and packed\n\
    rings what the cards sent, with copies for floods, was what they received and `dropped-…` in `outboard ctl stats switch/NAME`, but for the packet that a card had in hand.\n";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ports_of_a_second_are_added_up() {
        let said = "  Rx-pps:      1000000          Rx-bps: 1\n  Tx-pps:   3   Tx-bps: 1\n\
                    Rx-pps: 500000  Rx-bps: 1\n  Rx-pps: 7 Rx-bps: 1\n";
        assert_eq!(samples(said, "Rx-pps:", 2), [1.5]);
        assert_eq!(samples(said, "Rx-pps:", 1), [1.0, 0.5, 0.000_007]);
    }
}
