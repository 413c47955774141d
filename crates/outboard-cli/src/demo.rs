//! `outboard demo`: the whole system at work in a few seconds, on nothing but a temporary folder.
//!
//! It starts `outboard block` as a process of its own, drives it over its socket with the embedded
//! front-end, checks every byte (also by reading the image as a plain file), measures it, and removes
//! everything. Invariant: a step that is reported was checked; the first that fails ends the demo with
//! its reason and exit code 1, and nothing stays behind either way.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use outboard_check::bench::verify::fill;
use outboard_check::bench::workload::Random;
use outboard_check::bench::{Load, Round, Setup, Target, Workload};
use outboard_frontend::block::SECTOR;
use outboard_frontend::{Connection, Error, SocketError};

use crate::Failure;
use crate::report::{Table, bytes, maybe, micros, parse_size, say, short, spinner};

const EXAMPLES: &str = "\
Examples:
  outboard demo                    a 64 MiB disk, four seconds of load
  outboard demo --size 1G --seconds 5

What it does by itself you can do by hand:
  truncate -s 64M disk.img
  outboard block --socket-path disk.sock disk.img &
  outboard probe disk.sock
  outboard bench disk.sock";

/// See it work: start a disk, drive it, verify every byte, measure it, clean up.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Size of the disk: at least 64M.
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = parse_disk)]
    size: u64,
    /// Length of each measurement in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
}

const MIB: u64 = 1 << 20;
/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(10);
/// Where the range lies that is discarded, and how long it is.
const DISCARDED: (u64, u64) = (8 * MIB, 2 * MIB);

/// Runs the command.
pub(crate) fn run(args: Args) -> Result<(), Failure> {
    say(format!("outboard demo: a disk of {} in a process of its own\n", bytes(args.size)));
    let folder =
        Folder::create().map_err(|error| Failure::Failed(format!("temporary folder: {error}")))?;
    let image = folder.0.join("disk.img");
    let disk = File::create_new(&image).and_then(|file| file.set_len(args.size).map(|()| file));
    let disk = disk.map_err(|error| Failure::Failed(format!("temporary image: {error}")))?;
    let mut device = Device::start(&folder.0, &image)?;
    let outcome = drive(&args, &mut device, &disk, &folder.0);
    match outcome {
        Ok(()) => device.stop()?,
        Err(failure) => return Err(device.explain(failure)),
    }
    drop((disk, folder));
    step("removed", "process, socket and image");
    Ok(())
}

fn drive(args: &Args, device: &mut Device, disk: &File, folder: &Path) -> Result<(), Failure> {
    let setup = Setup {
        queues: 1,
        depth: 32,
        block_size: 4096,
        indirect: false,
        packed: false,
        timeout: PATIENCE,
    };
    let connection = device.connect(&folder.join("disk.sock"))?;
    let mut target = Target::over(connection, setup).map_err(Failure::failed)?;
    let config = *target.device().config();
    expect(config.bytes() == args.size, "the device says another size than the image has")?;
    let features = target.device().vmm().features().count_ones();
    step(
        "negotiated",
        &format!(
            "{features} features, {} sectors, blocks of {} bytes",
            config.capacity, config.block_size
        ),
    );
    check_bytes(&mut target, disk).map_err(|error| match error {
        Failed::Frontend(error) => Failure::failed(error),
        Failed::Wrong(what) => Failure::Failed(what.to_owned()),
        Failed::Image(error) => Failure::Failed(format!("reading the image: {error}")),
    })?;
    measure(args, &mut target)
}

/// Why a check ended.
enum Failed {
    Frontend(Error),
    Wrong(&'static str),
    Image(std::io::Error),
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Frontend(error)
    }
}

/// Writes, reads back, flushes, discards, and looks at the image behind the device's back.
fn check_bytes(target: &mut Target, disk: &File) -> Result<(), Failed> {
    let device = target.device();
    let mut random = Random::new(0x6f62);
    let mut pieces = Vec::new();
    let (mut total, mut at) = (0, 0);
    // Requests of one sector to 256 KiB, one after another with gaps, over the first 24 MiB.
    while at < 24 * MIB {
        let len = SECTOR << random.below(10);
        let mut data = vec![0; usize::try_from(len).unwrap_or(512)];
        fill(at, 1, &mut data);
        device.write(at / SECTOR, &data)?;
        pieces.push((at, data));
        total += len;
        at += len + SECTOR * random.below(64);
    }
    step("written", &format!("{} in {} requests of 512 B to 256 KiB", bytes(total), pieces.len()));
    for (at, sent) in &pieces {
        let mut got = vec![0; sent.len()];
        device.read(at / SECTOR, &mut got)?;
        if got != *sent {
            return Err(Failed::Wrong("the device reads back other bytes than were written"));
        }
    }
    step("read back", "every byte as written");
    let start = Instant::now();
    device.flush()?;
    step("flushed", &format!("in {} µs", start.elapsed().as_micros()));
    let (from, len) = DISCARDED;
    device.discard(from / SECTOR, len / SECTOR)?;
    let mut got = vec![1; usize::try_from(len).unwrap_or(0)];
    device.read(from / SECTOR, &mut got)?;
    if got.iter().any(|&byte| byte != 0) {
        return Err(Failed::Wrong("a discarded range does not read as zeros"));
    }
    step("discarded", &format!("{}, which reads back as zeros", bytes(len)));
    device.flush()?;
    for (at, sent) in &mut pieces {
        forget_discarded(*at, sent);
        let mut got = vec![0; sent.len()];
        disk.read_exact_at(&mut got, *at).map_err(Failed::Image)?;
        if got != *sent {
            return Err(Failed::Wrong("the image holds other bytes than the device was given"));
        }
    }
    step("image", "re-read as a plain file: the same bytes, and the zeros");
    Ok(())
}

/// Zeros where a piece at `at` lies in the discarded range.
fn forget_discarded(at: u64, piece: &mut [u8]) {
    let (from, len) = DISCARDED;
    for (place, byte) in (at..).zip(piece) {
        if (from..from + len).contains(&place) {
            *byte = 0;
        }
    }
}

/// Random reads and writes at two depths.
fn measure(args: &Args, target: &mut Target) -> Result<(), Failure> {
    let progress = spinner();
    let mut table = Table::new([
        "4 KiB",
        "depth",
        "IOPS",
        "MiB/s",
        "p50 µs",
        "p99 µs",
        "CPU µs/IO of the device",
    ]);
    for (name, read_percent) in [("random read", 100), ("random write", 0)] {
        for depth in [1, 32] {
            progress.set_message(format!("measuring: {name}, depth {depth}"));
            let load = Load {
                workload: Workload { random: true, read_percent },
                depth,
                duration: Duration::from_secs(args.seconds),
                ..Load::default()
            };
            let round = target.round(&load).map_err(Failure::failed)?;
            table.row(row(name, depth, &round));
        }
    }
    progress.finish_and_clear();
    say(format!("\n{table}"));
    Ok(())
}

fn row(name: &str, depth: u16, round: &Round) -> [String; 7] {
    [
        name.to_owned(),
        depth.to_string(),
        short(round.iops),
        short(round.mib_per_second),
        micros(round.latency.p50_us),
        micros(round.latency.p99_us),
        maybe(round.backend_cpu_us_per_io),
    ]
}

/// The device's process.
struct Device {
    child: Child,
    log: PathBuf,
    started: Instant,
}

impl Device {
    fn start(folder: &Path, image: &Path) -> Result<Self, Failure> {
        let failed =
            |error: std::io::Error| Failure::Failed(format!("starting the device: {error}"));
        let program = std::env::current_exe().map_err(failed)?;
        let log = folder.join("log");
        let errors = File::create_new(&log).map_err(failed)?;
        let started = Instant::now();
        let child = Command::new(program)
            .arg("block")
            .arg("--socket-path")
            .arg(folder.join("disk.sock"))
            .arg(image)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .map_err(failed)?;
        Ok(Self { child, log, started })
    }

    /// The connection to use, as soon as the device listens.
    fn connect(&mut self, socket: &Path) -> Result<Connection, Failure> {
        loop {
            match Connection::connect(socket, PATIENCE) {
                Ok(connection) => {
                    let ready = self.started.elapsed().as_millis();
                    step(
                        "started",
                        &format!("process {}, ready after {ready} ms", self.child.id()),
                    );
                    return Ok(connection);
                }
                Err(Error::Socket(SocketError::Connect { .. })) => {}
                Err(error) => return Err(Failure::failed(error)),
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(Failure::Failed(format!("the device ended at once: {status}")));
            }
            if self.started.elapsed() > PATIENCE {
                return Err(Failure::Failed("the device does not listen".to_owned()));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Asks the device to end, as a service manager does, and waits for it.
    fn stop(mut self) -> Result<(), Failure> {
        let start = Instant::now();
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)
            .map_err(Failure::failed)?;
        while start.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait().map_err(Failure::failed)? {
                expect(status.success(), "the device did not end well after SIGTERM")?;
                step("stopped", &format!("{} ms after SIGTERM", start.elapsed().as_millis()));
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(Failure::Failed("the device does not end after SIGTERM".to_owned()))
    }

    /// The failure with the last line that the device said.
    fn explain(&self, failure: Failure) -> Failure {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        match (failure, log.lines().rfind(|line| !line.trim().is_empty())) {
            (Failure::Failed(reason), Some(said)) => {
                Failure::Failed(format!("{reason} (the device said: {})", said.trim()))
            }
            (failure, _) => failure,
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // After a good end there is nothing left to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder of our own that goes with this value.
struct Folder(PathBuf);

impl Folder {
    fn create() -> std::io::Result<Self> {
        use std::hash::{BuildHasher, RandomState};
        use std::os::unix::fs::DirBuilderExt;
        let seed = RandomState::new().hash_one(std::process::id());
        let name = format!("outboard-demo-{}-{seed:x}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn step(name: &str, what: &str) {
    say(format!("  {name:<12}{what}"));
}

fn expect(right: bool, otherwise: &str) -> Result<(), Failure> {
    if right { Ok(()) } else { Err(Failure::Failed(otherwise.to_owned())) }
}

fn parse_disk(text: &str) -> Result<u64, String> {
    let size = parse_size(text)?;
    if size < 64 * MIB || !size.is_multiple_of(4096) {
        return Err(format!("{text} is not at least 64M in whole blocks of 4k"));
    }
    Ok(size)
}
