//! The life-cycle of a device under a VMM (contract §4), our front-end against our program in
//! another process: every message kept as a transcript, requests served before and after each step.
//!
//! `BLESS=1` writes the transcripts anew. Two of sixteen queues are activated.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use outboard_frontend::block::{BlockDevice, BlockOptions};
use outboard_frontend::transcript::Transcript;
use outboard_frontend::{Connection, Sharing, Vmm, Wanted};

const PATIENCE: Duration = Duration::from_secs(20);

/// `outboard block` with sixteen queues on an image of 8 MiB.
struct Program {
    child: Child,
    socket: PathBuf,
    _directory: tempfile::TempDir,
}

impl Program {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (image, socket) = (directory.path().join("disk"), directory.path().join("disk.sock"));
        std::fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_outboard"))
            .args(["block", "--num-queues", "16", "--serial", "lifecycle"])
            // Whether that is offered depends on the machine.
            .args(["--without", "VHOST_USER_PROTOCOL_F_PAGEFAULT", "--socket-path"])
            .args([&socket, &image])
            .env("OUTBOARD_LOG", "error")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, socket, _directory: directory }
    }

    fn connect(&self, transcript: &Transcript) -> Connection {
        let mut connection =
            Connection::connect_patiently(&self.socket, PATIENCE, PATIENCE).unwrap();
        connection.record(transcript.clone());
        connection
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Writes, flushes and reads back a few blocks of its own on each queue.
fn serve(disk: &mut BlockDevice, seed: u8) {
    for sector in [0u64, 8, 4096] {
        let text: Vec<u8> = (0..4096u32).map(|at| seed.wrapping_add((at % 251) as u8)).collect();
        disk.write(sector, &text).unwrap();
        disk.flush().unwrap();
        let mut back = vec![0; text.len()];
        disk.read(sector, &mut back).unwrap();
        assert_eq!(back, text, "sector {sector}");
    }
    // The blocking calls use the first queue: one request on each by hand.
    for queue in disk.queues() {
        queue.submit(outboard_frontend::block::Operation::Flush, 1).unwrap();
        queue.kick().unwrap();
        queue.next(PATIENCE).unwrap();
    }
}

fn keep(name: &str, transcript: &Transcript) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/transcripts").join(name);
    let text = transcript.text();
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    for (number, (kept, now)) in kept.lines().zip(text.lines()).enumerate() {
        assert_eq!(kept, now, "{name}, line {}", number + 1);
    }
    assert_eq!(kept.lines().count(), text.lines().count(), "{name}: number of lines");
}

/// Steps 1 to 3, and the stop and wake of step 4.
fn life_cycle(name: &str, sharing: Sharing) {
    let program = Program::start();
    let transcript = Transcript::new();
    transcript.note("1. negotiate, read the configuration; 2. activate two of sixteen queues");
    let options = BlockOptions {
        queues: 2,
        queue_size: 64,
        regions: 2,
        timeout: PATIENCE,
        wanted: Wanted { sharing, ..Wanted::default() },
        ..BlockOptions::default()
    };
    let connection = program.connect(&transcript);
    let mut disk = BlockDevice::open(connection, options).unwrap();
    serve(&mut disk, 1);
    transcript.note("3. reset; activate again");
    disk.reset().unwrap();
    disk.activate().unwrap();
    serve(&mut disk, 2);
    for seed in 3..5 {
        transcript.note("4. sleep; wake");
        let bases = disk.sleep().unwrap().unwrap();
        assert_eq!(bases.len(), 2);
        assert!(bases.iter().all(|(_, base)| *base > 0), "{bases:?}");
        disk.wake().unwrap();
        serve(&mut disk, seed);
    }
    drop(disk);
    keep(name, &transcript);

    let again = Transcript::new();
    let mut disk = BlockDevice::open(program.connect(&again), options).unwrap();
    let mut back = [0; 4096];
    disk.read(8, &mut back).unwrap();
    assert_eq!(back[0], 4, "the next front-end finds what the last one wrote");
}

#[test]
fn the_life_cycle_with_a_memory_table_is_as_kept() {
    life_cycle("lifecycle-table.txt", Sharing::Table);
}

#[test]
fn the_life_cycle_with_memory_slots_is_as_kept() {
    life_cycle("lifecycle-slots.txt", Sharing::Slots);
}

#[test]
fn sleep_before_activate_sends_nothing_and_answers_none() {
    let program = Program::start();
    let transcript = Transcript::new();
    let mut vmm = Vmm::new(program.connect(&transcript), Wanted::default()).unwrap();
    let before = transcript.text();
    assert_eq!(vmm.sleep().unwrap(), None);
    assert_eq!(transcript.text(), before);
}

/// Descriptors, mappings and resident KiB of a process.
fn footprint(pid: u32) -> (usize, usize, u64) {
    let folder = PathBuf::from(format!("/proc/{pid}"));
    let descriptors = std::fs::read_dir(folder.join("fd")).unwrap().count();
    let maps = std::fs::read_to_string(folder.join("maps")).unwrap().lines().count();
    let status = std::fs::read_to_string(folder.join("status")).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let resident = resident.and_then(|text| text.split_whitespace().next()?.parse().ok());
    (descriptors, maps, resident.unwrap())
}

#[test]
fn a_hundred_connections_leave_nothing_behind_in_the_process() {
    let program = Program::start();
    let pid = program.child.id();
    let options =
        BlockOptions { queues: 2, queue_size: 64, timeout: PATIENCE, ..BlockOptions::default() };
    let visit = |seed| {
        let until = std::time::Instant::now() + PATIENCE;
        loop {
            // Until the last session is closed, a new front-end is turned away.
            let connection = program.connect(&Transcript::new());
            match BlockDevice::open(connection, options) {
                Ok(mut disk) => return serve(&mut disk, seed),
                Err(error) => assert!(std::time::Instant::now() < until, "{error}"),
            }
        }
    };
    (0..10).for_each(visit);
    let idle = || {
        // A connection that was taken up is proof that the last one is gone.
        let until = std::time::Instant::now() + PATIENCE;
        loop {
            let mut connection = program.connect(&Transcript::new());
            if connection.get_features().is_ok() {
                break;
            }
            assert!(std::time::Instant::now() < until);
        }
        let mut last = footprint(pid);
        for _ in 0..200 {
            std::thread::sleep(Duration::from_millis(5));
            let now = footprint(pid);
            if now == last {
                break;
            }
            last = now;
        }
        last
    };
    let before = idle();
    (0..100).for_each(visit);
    let after = idle();
    assert_eq!(after.0, before.0, "descriptors");
    assert_eq!(after.1, before.1, "mappings");
    assert!(after.2 < before.2 + 1024, "RSS: {} KiB before, {} after", before.2, after.2);
}

/// Context switches of all threads of a process so far.
fn switches(pid: u32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let statuses = tasks.map(|task| task.unwrap().path().join("status"));
    let texts: Vec<_> = statuses.map(|path| std::fs::read_to_string(path).unwrap()).collect();
    let lines = texts.iter().flat_map(|text| text.lines());
    lines
        .filter_map(|line| line.split_once("ctxt_switches:"))
        .map(|(_, count)| count.trim().parse::<u64>().unwrap())
        .sum()
}

#[test]
fn an_idle_device_with_sixteen_queues_does_not_wake_up() {
    let program = Program::start();
    let options =
        BlockOptions { queues: 16, queue_size: 64, timeout: PATIENCE, ..BlockOptions::default() };
    let mut disk = BlockDevice::open(program.connect(&Transcript::new()), options).unwrap();
    serve(&mut disk, 1);
    // What the last request left behind (a window of polling, freed memory) is over by then.
    std::thread::sleep(Duration::from_millis(500));
    let before = switches(program.child.id());
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(switches(program.child.id()), before, "context switches in two idle seconds");
}
