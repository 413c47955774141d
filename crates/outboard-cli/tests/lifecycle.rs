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
        Self::with(&[])
    }

    /// The same with more options.
    fn with(more: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (image, socket) = (directory.path().join("disk"), directory.path().join("disk.sock"));
        std::fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_outboard"))
            .args(["block", "--num-queues", "16", "--serial", "lifecycle"])
            // Whether that is offered depends on the machine.
            .args(["--without", "VHOST_USER_PROTOCOL_F_PAGEFAULT", "--socket-path"])
            .args([&socket, &image])
            .args(more)
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

/// The numbers that `read` finds in a file of each thread of a process, added up.
fn of_threads(pid: u32, file: &str, read: impl Fn(&str) -> u64) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let files = tasks.map(|task| task.unwrap().path().join(file));
    files.map(|path| read(&std::fs::read_to_string(path).unwrap())).sum()
}

/// Context switches of the program's own threads so far. The kernel's io_uring workers, which a flush leaves behind, look every
/// 5 s whether they are still needed, and the last one stays.
fn switches(pid: u32) -> u64 {
    of_threads(pid, "status", |text| {
        if text.starts_with("Name:\tiou-wrk") {
            return 0;
        }
        let counts = text.lines().filter_map(|line| line.split_once("ctxt_switches:"));
        counts.map(|(_, count)| count.trim().parse::<u64>().unwrap()).sum()
    })
}

/// Nanoseconds on a processor so far.
fn processor_time(pid: u32) -> u64 {
    of_threads(pid, "schedstat", |text| {
        text.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    })
}

/// Waits until a count has stayed the same for half a second, and returns it.
fn settled(count: impl Fn() -> u64) -> u64 {
    let until = std::time::Instant::now() + PATIENCE;
    let mut last = count();
    loop {
        std::thread::sleep(Duration::from_millis(500));
        let now = count();
        if now == last {
            return now;
        }
        assert!(std::time::Instant::now() < until, "it never comes to rest");
        last = now;
    }
}

/// `OUTBOARD_IDLE_SECONDS` makes it longer.
#[test]
fn an_idle_device_with_sixteen_queues_does_not_wake_up() {
    let seconds = std::env::var("OUTBOARD_IDLE_SECONDS").map_or(2, |text| text.parse().unwrap());
    let program = Program::start();
    let options =
        BlockOptions { queues: 16, queue_size: 64, timeout: PATIENCE, ..BlockOptions::default() };
    let mut disk = BlockDevice::open(program.connect(&Transcript::new()), options).unwrap();
    serve(&mut disk, 1);
    // What the last request left behind (a window of polling, freed memory) is over by then.
    let before = settled(|| switches(program.child.id()));
    std::thread::sleep(Duration::from_secs(seconds));
    assert_eq!(switches(program.child.id()), before, "context switches in {seconds} idle seconds");
}

#[test]
fn polling_after_the_last_request_burns_no_more_than_its_window() {
    let program = Program::with(&["--poll-us", "300000"]);
    let options = BlockOptions { queue_size: 64, timeout: PATIENCE, ..BlockOptions::default() };
    let mut disk = BlockDevice::open(program.connect(&Transcript::new()), options).unwrap();
    // Enough to have the window open as far as it goes.
    (0..100).for_each(|seed| serve(&mut disk, seed));
    let pid = program.child.id();
    let before = processor_time(pid);
    let after = settled(|| processor_time(pid));
    let burnt = Duration::from_nanos(after - before);
    assert!(burnt < Duration::from_millis(400), "{burnt:?} after the last request");
}

/// Which processors the threads that serve queues may run on.
fn processors_of_workers(pid: u32) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let texts =
        tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).unwrap());
    let field = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().to_owned()
    };
    let mut found: Vec<_> = texts
        .map(|text| (field(&text, "Name:"), field(&text, "Cpus_allowed_list:")))
        .filter(|(name, _)| name.starts_with("worker"))
        .collect();
    found.sort();
    found.into_iter().map(|(_, processors)| processors).collect()
}

#[test]
fn workers_are_as_many_as_asked_for_and_run_where_they_are_pinned() {
    // The first processor this test may run on.
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let mine = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
    let first = mine.trim().split([',', '-']).next().unwrap().to_owned();
    let program = Program::with(&["--workers", "3", "--pin", &first]);
    let options =
        BlockOptions { queues: 16, queue_size: 64, timeout: PATIENCE, ..BlockOptions::default() };
    let mut disk = BlockDevice::open(program.connect(&Transcript::new()), options).unwrap();
    serve(&mut disk, 1);
    assert_eq!(processors_of_workers(program.child.id()), vec![first; 3]);
}

#[test]
fn a_driver_that_waits_for_each_answer_needs_no_kick_for_the_next_request() {
    // With so wide a bound any machine's driver comes back in time.
    let program = Program::with(&["--engine", "uring", "--poll-us", "1000000"]);
    drop(program.connect(&Transcript::new()));
    let output = Command::new(env!("CARGO_BIN_EXE_outboard"))
        .arg("bench")
        .arg(&program.socket)
        .args(["--rw", "randwrite", "--depth", "1", "--seconds", "1", "--rounds", "1", "--json"])
        .output()
        .unwrap();
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let median = &answer["cases"][0]["a"]["median"];
    let (writes, kicks) = (median["writes"].as_u64(), median["kicks_per_io"].as_f64());
    // The window opens by steps: some of the first ones are announced.
    let announced = kicks.unwrap() * writes.unwrap() as f64;
    assert!(announced < 100.0 + writes.unwrap() as f64 / 2.0, "{median}");
}
