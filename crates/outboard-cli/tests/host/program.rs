//! A running `outboard block`, looked at from outside.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

use outboard_frontend::block::{BlockDevice, BlockOptions};
use outboard_frontend::{Connection, Error};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Sectors of every disk here.
pub(crate) const SECTORS: u64 = 16 << 11;

/// A folder with a disk of 16 MiB.
pub(crate) fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let image = File::create(folder.path().join("disk.img")).expect("an image");
    image.set_len(SECTORS * 512).expect("room");
    folder
}

/// `outboard block` on the folder's disk, behind the folder's socket.
pub(crate) fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outboard"));
    command.arg("block").args(args).args(["--socket-path", "s", "disk.img"]);
    command.current_dir(folder).stdin(Stdio::null());
    command.env("OUTBOARD_LOG", "info").env_remove("LISTEN_FDS");
    command
}

/// A device process; killed with this.
pub(crate) struct Program {
    child: Child,
    log: Option<BufReader<ChildStderr>>,
    socket: PathBuf,
}

impl Program {
    /// Starts the device and waits until it serves.
    pub(crate) fn start(folder: &Path, args: &[&str]) -> Self {
        let mut child = command(folder, args).stderr(Stdio::piped()).spawn().expect("our program");
        let mut log = BufReader::new(child.stderr.take().expect("piped"));
        let mut said = String::new();
        while !said.contains("serving ") {
            assert_ne!(log.read_line(&mut said).expect("its log"), 0, "it ended: {said}");
        }
        Self::of(child, log, folder)
    }

    /// A device that serves already.
    pub(crate) fn of(child: Child, log: BufReader<ChildStderr>, folder: &Path) -> Self {
        Self { child, log: Some(log), socket: folder.join("s") }
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("it lives");
    }

    /// Has it end, if it has not already.
    pub(crate) fn terminate(&self) {
        // An error says that it has ended.
        let _ = kill_process(self.pid(), Signal::TERM);
    }

    /// A connection, whether or not anybody serves it.
    pub(crate) fn connect(&self) -> Connection {
        Connection::connect_patiently(&self.socket, PATIENCE, PATIENCE).expect("it listens")
    }

    /// The disk. A device that is still closing the last session turns the next one away.
    pub(crate) fn open(&self, options: BlockOptions) -> BlockDevice {
        let started = Instant::now();
        loop {
            match BlockDevice::open(self.connect(), options) {
                Err(Error::Closed { .. }) if started.elapsed() < PATIENCE => {}
                opened => return opened.expect("a disk"),
            }
        }
    }

    /// Lets the process have only so much of something from now on.
    pub(crate) fn limit(&self, what: Resource, most: Option<u64>) {
        // It was started with our own limits.
        let maximum = getrlimit(what).maximum;
        prlimit(Some(self.pid()), what, Rlimit { current: most.or(maximum), maximum })
            .expect("a limit");
    }

    /// The descriptors that are open.
    pub(crate) fn descriptors(&self) -> Vec<u64> {
        let entries = std::fs::read_dir(self.proc("fd")).expect("descriptors");
        let name = |entry: std::io::Result<std::fs::DirEntry>| {
            entry.expect("a descriptor").file_name().to_string_lossy().parse().expect("a number")
        };
        let mut all: Vec<u64> = entries.map(name).collect();
        all.sort_unstable();
        all
    }

    /// How many are open once nothing changes any more.
    pub(crate) fn settled_descriptors(&self) -> usize {
        let mut last = self.descriptors().len();
        let mut same = 0;
        for _ in 0..400 {
            std::thread::sleep(Duration::from_millis(5));
            let now = self.descriptors().len();
            same = if now == last { same + 1 } else { 0 };
            last = now;
            if same == 20 {
                break;
            }
        }
        last
    }

    /// The lowest number that a new descriptor would get.
    fn free_descriptor(&self) -> u64 {
        let open = self.descriptors();
        let free = (0..).zip(&open).find(|(number, open)| number != *open);
        free.map_or(open.len() as u64, |(number, _)| number)
    }

    /// No new descriptor can be had from now on. (A process that has just said that it serves may
    /// still open some.)
    pub(crate) fn take_descriptors_away(&self) {
        let mut free = self.free_descriptor();
        for _ in 0..10 {
            std::thread::sleep(Duration::from_millis(10));
            free = free.max(self.free_descriptor());
        }
        assert_eq!(self.free_descriptor(), free, "it opens and closes with nothing to do");
        self.limit(Resource::Nofile, Some(free));
    }

    /// Processor time of all its threads so far.
    pub(crate) fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(self.proc("stat")).expect("figures");
        let (_, after_name) = stat.rsplit_once(") ").expect("figures");
        let fields: Vec<u64> =
            after_name.split(' ').skip(11).take(2).map_while(|word| word.parse().ok()).collect();
        // Clock ticks: a hundred in a second, on every Linux.
        Duration::from_millis(fields.iter().sum::<u64>() * 10)
    }

    /// How long its threads have wanted to run so far, whether or not they could: on a busy machine
    /// one that spins has little processor time, but wants all of it.
    pub(crate) fn wanted(&self) -> Duration {
        let tasks = std::fs::read_dir(self.proc("task")).expect("threads");
        let time = |task: std::io::Result<std::fs::DirEntry>| {
            let path = task.expect("a thread").path().join("schedstat");
            let text = std::fs::read_to_string(path).expect("figures");
            let figures = text.split_whitespace().take(2).map(|word| word.parse::<u64>());
            figures.map(|figure| figure.expect("nanoseconds")).sum::<u64>()
        };
        Duration::from_nanos(tasks.map(time).sum())
    }

    /// A line of /proc/PID/status, in KiB or as a count.
    pub(crate) fn status(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(self.proc("status")).expect("figures");
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("such a line");
        let word = line.trim_start_matches(':').split_whitespace().next().expect("a figure");
        word.parse().expect("a number")
    }

    fn proc(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.child.id()))
    }

    /// Takes what it says: the reader is the caller's.
    pub(crate) fn take_log(&mut self) -> BufReader<ChildStderr> {
        self.log.take().expect("taken once")
    }

    /// Waits for its end; its exit code, and the rest of what it said.
    pub(crate) fn end(mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        if let Some(mut log) = self.log.take() {
            log.read_to_string(&mut said).expect("its log");
        }
        (self.child.wait().expect("its end").code(), said)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Writes and reads back.
pub(crate) fn serves(disk: &mut BlockDevice, fill: u8) {
    disk.write(8, &[fill; 4096]).expect("written");
    let mut bytes = [0; 4096];
    disk.read(8, &mut bytes).expect("read");
    assert_eq!(bytes, [fill; 4096]);
}
