//! `cargo xtask bench --peers`: our disk and other people's on the same work, in turns, as `docs/performance.md`.
//!
//! Each row is `outboard bench OURS --vs PEER --json`: A B A B, medians and ratios of that one run, the driver on the
//! first processor, both devices on the second. Invariants: the page and the plot are made of
//! `docs/performance.json` alone, and a figure that is not of an interleaved run has no place there.

mod network;
mod page;
mod plot;
mod shares;
mod sockets;
mod table;

use crate::backend::{Device, socket};
use crate::packages::Root;
use crate::{paths, process};
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use table::{Row, SCENES, Scene};

/// What was measured.
const FIGURES: &str = "docs/performance.json";
const PAGE: &str = "docs/performance.md";
const PLOT: &str = "docs/performance.svg";

/// Bytes of each image.
const IMAGE: u64 = 512 << 20;

/// What to measure, and for how long.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// Measure beside the peers; without it the page is only made anew from its JSON
    #[arg(long)]
    peers: bool,
    /// Measure the switch beside DPDK instead, as docs/network.md
    #[arg(long, conflicts_with_all = ["peers", "only"])]
    net: bool,
    /// Measure shared directories beside virtiofsd instead, as part of docs/shares.md
    #[arg(long, conflicts_with_all = ["peers", "only", "net"])]
    shares: bool,
    /// Measure sockets beside vhost-device-vsock instead, as docs/vsock.md
    #[arg(long, conflicts_with_all = ["peers", "only", "net", "shares"])]
    sockets: bool,
    /// Only scenes whose name has this in it; the others' figures stay
    #[arg(long)]
    only: Option<String>,
    /// Length of one round
    #[arg(long, default_value_t = 0.5)]
    seconds: f64,
    /// Rounds of each; 9 beside disks' peers, 5 otherwise
    #[arg(long)]
    rounds: Option<u32>,
}

impl Options {
    fn rounds_or(&self, usual: u32) -> u32 {
        self.rounds.unwrap_or(usual)
    }
}

/// The programs to measure.
struct Programs {
    outboard: PathBuf,
    framework: PathBuf,
    storage_daemon: PathBuf,
}

/// Measures and writes the page.
///
/// # Errors
/// When a program does not build, start or answer.
pub fn run(options: &Options) -> Result<()> {
    if options.net {
        return network::run(options);
    }
    if options.shares {
        return shares::run(options);
    }
    if options.sockets {
        return sockets::run(options);
    }
    let file = paths::workspace().join(FIGURES);
    let mut figures: Value = match std::fs::read_to_string(&file) {
        Ok(text) => serde_json::from_str(&text)?,
        Err(_) => json!({ "machine": "", "rows": [] }),
    };
    if options.peers {
        let programs = programs()?;
        figures["machine"] = json!(machine()?);
        for scene in SCENES {
            if options.only.as_ref().is_some_and(|only| !scene.name.contains(only.as_str())) {
                continue;
            }
            let rows = measure(scene, &programs, options).context(scene.name)?;
            let all = figures["rows"].as_array_mut().context("no rows")?;
            all.retain(|row| row["scene"] != scene.name);
            all.extend(rows);
        }
        let known = |row: &Value| SCENES.iter().position(|scene| row["scene"] == scene.name);
        let all = figures["rows"].as_array_mut().context("no rows")?;
        all.retain(|row| known(row).is_some());
        all.sort_by_key(known);
        std::fs::write(&file, serde_json::to_string_pretty(&figures)? + "\n")?;
    }
    std::fs::write(paths::workspace().join(PAGE), page::page(&figures))?;
    std::fs::write(paths::workspace().join(PLOT), plot::plot(&figures))?;
    println!("bench: {PAGE}, {PLOT}");
    Ok(())
}

/// Our program, built as it is shipped.
fn outboard() -> Result<PathBuf> {
    let mut build = Command::new("cargo");
    build.args(["build", "--release", "-p", "outboard-cli"]).current_dir(paths::workspace());
    process::run(&mut build)?;
    Ok(paths::target()?.join("release/outboard"))
}

fn programs() -> Result<Programs> {
    let target = paths::target()?;
    let outboard = outboard()?;
    let peers = target.join("peers");
    let manifest = paths::workspace().join("benches/peers/Cargo.toml");
    let mut build = Command::new("cargo");
    build.args(["build", "--release", "--locked", "--manifest-path"]).arg(manifest);
    process::run(build.env("CARGO_TARGET_DIR", &peers))?;
    let storage_daemon = match process::find("qemu-storage-daemon") {
        Some(found) => found,
        None => Root::prepare(false)?.path("usr/bin/qemu-storage-daemon"),
    };
    ensure!(storage_daemon.exists(), "there is no qemu-storage-daemon");
    Ok(Programs { outboard, framework: peers.join("release/outboard-peers"), storage_daemon })
}

/// Processors, kernel and versions, in one line.
fn machine() -> Result<String> {
    let cpu = std::fs::read_to_string("/proc/cpuinfo")?;
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1));
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let processors = std::thread::available_parallelism()?;
    let release = kernel.split(['-', '+']).next().unwrap_or_default().trim();
    let load = std::fs::read_to_string("/proc/loadavg")?;
    let load = load.split(' ').next().unwrap_or_default();
    let model = model.unwrap_or("unknown");
    Ok(format!(
        "{processors} processors ({model}), Linux {release}, load average {load} at the start"
    ))
}

/// A scratch folder for a scene's images: in memory, or on the disk of the target directory.
fn scratch(scene: &Scene) -> Result<tempfile::TempDir> {
    let dir = if scene.in_memory { PathBuf::from("/dev/shm") } else { paths::target()? };
    Ok(tempfile::Builder::new().prefix("outboard-bench").tempdir_in(dir)?)
}

/// Images without holes, written in turns, so that none lies better in memory or on the disk than the others: where it
/// does, it is 1.1 to 1.2 times as fast.
fn make_images(dir: &Path) -> Result<()> {
    let create = |name: &str| std::fs::File::create(image(dir, name));
    let mut files = [create("ours")?, create("storage-daemon")?, create("framework")?];
    let block: Vec<u8> = (0..1_u32 << 18).flat_map(|n| (n ^ 0x5bd1_e995).to_le_bytes()).collect();
    for _ in 0..IMAGE / block.len() as u64 {
        files.iter_mut().try_for_each(|file| file.write_all(&block))?;
    }
    Ok(files.iter().try_for_each(std::fs::File::sync_all)?)
}

fn image(dir: &Path, device: &str) -> PathBuf {
    dir.join(device).with_extension("img")
}

fn measure(scene: &Scene, programs: &Programs, options: &Options) -> Result<Vec<Value>> {
    let dir = scratch(scene)?;
    let at = dir.path();
    if !scene.null {
        make_images(at)?;
    }
    let mut command = pinned(&programs.outboard);
    command.arg("block").arg("--socket-path").arg(socket(at, "ours")).args(scene.ours);
    command.arg(if scene.null { "null:1G".into() } else { image(at, "ours") });
    let ours = Device::start(&mut command, at, "ours")?;
    let mut rows = Vec::new();
    for peer in scene.peers {
        for row in scene.rows {
            if let Some(floor) = row.floor(peer) {
                // Anew for each row: the framework's program ends with its first front-end.
                let theirs = start(peer, scene, programs, at)?;
                println!("bench: {}, {}, against {peer}", scene.name, row.title());
                let answer = compare(&ours, &theirs, row, programs, options)?;
                rows.push(shown(scene, row, peer, floor, &answer)?);
            }
        }
    }
    Ok(rows)
}

/// A device's command, on the second processor.
fn pinned(program: &Path) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", "1"]).arg(program);
    command
}

fn start(peer: &str, scene: &Scene, programs: &Programs, dir: &Path) -> Result<Device> {
    let at = socket(dir, peer);
    let mut command = match peer {
        "framework" | "framework-spin" => {
            let mut command = pinned(&programs.framework);
            command.arg(&at);
            let null = format!("null:{}", 1_u64 << 30).into();
            command.arg(if scene.null { null } else { image(dir, "framework") });
            command.args((peer == "framework-spin").then_some("50"));
            command
        }
        "storage-daemon" => {
            let mut command = pinned(&programs.storage_daemon);
            let blockdev = if scene.null {
                format!("driver=null-co,size={},read-zeroes=off,node-name=d", 1_u64 << 30)
            } else {
                let (file, direct) = (image(dir, "storage-daemon"), scene.peer_direct);
                format!(
                    "driver=file,filename={},aio=io_uring,cache.direct={direct},discard=unmap,node-name=d",
                    file.display()
                )
            };
            let export = format!(
                "type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={},writable=on,\
                 num-queues=1,iothread=io0",
                at.display()
            );
            command.args(["--object", "iothread,id=io0", "--blockdev", &blockdev]);
            command.args(["--export", &export]);
            command
        }
        "one-worker" => {
            let mut command = pinned(&programs.outboard);
            command.args(["block", "--num-queues", "2", "--workers", "1", "--socket-path"]);
            command.arg(&at).arg("null:1G");
            command
        }
        "split" => {
            let mut command = pinned(&programs.outboard);
            command.args(["block", "--socket-path"]).arg(&at).arg("null:1G");
            command
        }
        other => bail!("no peer {other}"),
    };
    Device::start(&mut command, dir, peer)
}

fn compare(
    ours: &Device,
    theirs: &Device,
    row: &Row,
    programs: &Programs,
    options: &Options,
) -> Result<Value> {
    let mut command = Command::new(&programs.outboard);
    command.arg("bench").arg(&ours.socket).arg("--vs").arg(&theirs.socket);
    command.args(["--rw", row.load, "--bs", row.block, "--cpu", "0", "--json"]);
    command.args(["--depth", &row.depth.to_string(), "--queues", &row.queues.to_string()]);
    command.args(["--driver", if row.sleeps { "sleep" } else { "poll" }]);
    command.args(row.how);
    command.args(["--seconds", &options.seconds.to_string()]);
    command.args(["--rounds", &options.rounds_or(9).to_string()]);
    Ok(serde_json::from_str(&process::output(&mut command)?)?)
}

/// What the page keeps of an answer.
fn shown(scene: &Scene, row: &Row, peer: &str, floor: f64, answer: &Value) -> Result<Value> {
    let case = &answer["cases"][0];
    let rate = |one: &Value| one.as_f64().map(|rate| (rate * 1e3).round() / 1e3);
    let side = |side: &Value| {
        let median = &side["median"];
        json!({
            "iops": rate(&median["iops"]).map(f64::round),
            "p50_us": rate(&median["latency"]["p50_us"]),
            "p99_us": rate(&median["latency"]["p99_us"]),
            "cpu_us": rate(&median["backend_cpu_us_per_io"]),
        })
    };
    Ok(json!({
        "scene": scene.name,
        "work": row.title(),
        "peer": peer,
        "floor": floor,
        "ratio": rate(&case["iops_ratio"]).context("no ratio")?,
        "cpu_ratio": rate(&case["cpu_ratio"]),
        "ours": side(&case["a"]),
        "theirs": side(&case["b"]),
        "rounds": case["a"]["rounds"],
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_and_the_plot_are_those_of_the_figures() {
        let read = |name: &str| std::fs::read_to_string(paths::workspace().join(name)).unwrap();
        let figures: Value = serde_json::from_str(&read(FIGURES)).unwrap();
        assert!(read(PAGE) == page::page(&figures), "`cargo xtask bench` makes {PAGE} anew");
        assert!(read(PLOT) == plot::plot(&figures), "`cargo xtask bench` makes {PLOT} anew");
    }
}
