//! The back-end under test: a running one behind a socket, or a fresh process for each case.
//!
//! Invariant: a process that was started here is killed here, with everything it started, and its
//! socket and log are gone with it; a back-end that was found running is never killed.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, Resource, Rlimit, Signal};

use super::finding::{Finding, Outcome, Verdict};
use super::wire::Wire;

/// What is judged.
#[derive(Clone, Debug)]
pub enum Target {
    /// A back-end that listens on this socket already.
    Socket(PathBuf),
    /// A program and its arguments; `{socket}` in them becomes the path to listen on.
    Command(Vec<OsString>),
}

/// How a back-end process is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    Alive,
    /// It ended by itself with exit code 0.
    Left,
    /// It ended in another way, in words.
    Died(String),
}

/// One back-end.
#[derive(Debug)]
pub(crate) struct Peer {
    socket: PathBuf,
    process: Option<Process>,
    pid: Option<u32>,
    /// Somebody has been connected to it.
    met: bool,
}

#[derive(Debug)]
struct Process {
    words: Vec<OsString>,
    child: Child,
    folder: PathBuf,
    ended: Option<ExitStatus>,
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

impl Peer {
    /// Starts the program, or takes the socket; waits until somebody listens there.
    pub(crate) fn start(target: &Target, patience: Duration) -> Result<Self, String> {
        match target {
            Target::Socket(path) => {
                Ok(Self { socket: path.clone(), process: None, pid: None, met: false })
            }
            Target::Command(words) => Self::spawn(words, patience),
        }
    }

    fn spawn(words: &[OsString], patience: Duration) -> Result<Self, String> {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("outboard-check-{}-{number}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&folder)
            .map_err(|error| format!("{}: {error}", folder.display()))?;
        let socket = folder.join("s");
        let child = launch(words, &socket, &folder)?;
        let process = Process { words: words.to_vec(), child, folder, ended: None };
        let mut peer = Self { socket, process: Some(process), pid: None, met: false };
        peer.await_socket(patience)?;
        Ok(peer)
    }

    fn await_socket(&mut self, patience: Duration) -> Result<(), String> {
        let until = Instant::now() + patience;
        while !self.socket.exists() {
            if let Life::Left | Life::Died(_) = self.life() {
                return Err(format!("the command ended before it listened{}", self.last_words()));
            }
            if Instant::now() > until {
                let secs = patience.as_secs();
                return Err(format!("the command does not listen on {{socket}} after {secs} s"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Whether the process is the judge's own.
    pub(crate) const fn was_started_here(&self) -> bool {
        self.process.is_some()
    }

    /// Kills the process and starts another one in its place; waits until it listens.
    pub(crate) fn replace(&mut self, patience: Duration) -> Result<(), String> {
        self.kill();
        // Not every program takes the socket of a dead one.
        let _ = std::fs::remove_file(&self.socket);
        self.restart()?;
        self.await_socket(patience)
    }

    /// Where it listens.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// A new process in place of one that serves one front-end and has met it.
    pub(crate) fn renew(&mut self) -> Outcome {
        let Some(process) = self.process.as_ref().filter(|_| self.met) else { return Ok(()) };
        let words = process.words.clone();
        if let Life::Died(how) = self.life() {
            return Err(Finding::new(Verdict::Crashes, how));
        }
        let new = Self::spawn(&words, Duration::from_secs(10));
        *self = new.map_err(|why| Finding::new(Verdict::NotJudged, why))?;
        Ok(())
    }

    /// Ends the process at once, wherever it is, and sees its end.
    pub(crate) fn kill(&mut self) {
        if let Some(process) = &mut self.process {
            // Both fail only when it has ended already.
            let _ = process.child.kill();
            process.ended = process.child.wait().ok();
        }
    }

    /// Starts the program again, with the same socket, after [`Self::kill`].
    pub(crate) fn restart(&mut self) -> Result<(), String> {
        let process = self.process.as_mut().ok_or("it was not started here")?;
        process.child = launch(&process.words, &self.socket, &process.folder)?;
        (process.ended, self.pid, self.met) = (None, None, false);
        Ok(())
    }

    /// A new connection.
    pub(crate) fn connect(&mut self, limit: Duration) -> Outcome<Wire> {
        let until = Instant::now() + limit;
        loop {
            match Wire::connect(&self.socket, limit) {
                Ok(wire) => {
                    self.met = true;
                    self.pid = wire.peer_pid().or(self.pid);
                    return Ok(wire);
                }
                // Between bind and listen, or between two sessions.
                Err(Errno::CONNREFUSED | Errno::NOENT)
                    if Instant::now() < until && self.life() == Life::Alive =>
                {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(Errno::AGAIN) => return Err(Finding::hangs("it accepts no connection")),
                Err(errno) => {
                    return Err(Finding::hangs(format!("nobody listens any more: {errno}")));
                }
            }
        }
    }

    pub(crate) fn life(&mut self) -> Life {
        let Some(process) = &mut self.process else {
            return match self.pid {
                Some(pid) if !Path::new(&format!("/proc/{pid}")).exists() => {
                    Life::Died("the process that served is gone".to_owned())
                }
                _ => Life::Alive,
            };
        };
        if process.ended.is_none() {
            process.ended = process.child.try_wait().ok().flatten();
        }
        match process.ended {
            None => Life::Alive,
            Some(status) if status.success() => Life::Left,
            Some(status) => {
                let how = match (status.signal(), status.code()) {
                    (Some(signal), _) => format!("killed by {}", signal_name(signal)),
                    (None, Some(code)) => format!("exit code {code}"),
                    (None, None) => "ended".to_owned(),
                };
                Life::Died(format!("{how}{}", self.last_words()))
            }
        }
    }

    /// Sends SIGTERM to a process that was started here; false where there is none.
    pub(crate) fn terminate(&self) -> bool {
        let child = self.process.as_ref().map(|process| Pid::from_child(&process.child));
        child.is_some_and(|pid| rustix::process::kill_process(pid, Signal::TERM).is_ok())
    }

    /// Sets how many descriptors the process may have; what it was before. `None` when that cannot be done.
    pub(crate) fn limit_fds(&self, most: Option<u64>) -> Option<Option<u64>> {
        let pid = Pid::from_raw(i32::try_from(self.pid?).ok()?)?;
        let now = read_limit(self.pid?)?;
        let new = Rlimit { current: most, maximum: now.maximum };
        let old = rustix::process::prlimit(Some(pid), Resource::Nofile, new).ok()?;
        Some(old.current)
    }

    /// The lowest number that no descriptor of the process has.
    pub(crate) fn free_fd(&self) -> Option<u64> {
        let entries = std::fs::read_dir(format!("/proc/{}/fd", self.pid?)).ok()?;
        let taken: BTreeSet<u64> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect();
        (0..).find(|number| !taken.contains(number))
    }

    /// The last line that the program wrote.
    fn last_words(&self) -> String {
        let Some(process) = &self.process else { return String::new() };
        let text = std::fs::read(process.folder.join("log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        match text.lines().rev().find(|line| !line.trim().is_empty()) {
            Some(line) => format!(": {}", line.chars().take(160).collect::<String>()),
            None => String::new(),
        }
    }

    /// The process behind the last connection, else the one that was started.
    fn pid(&self) -> Option<u32> {
        self.pid.or_else(|| self.process.as_ref().map(|process| process.child.id()))
    }

    /// How much the program has written so far, in bytes.
    pub(crate) fn log_size(&self) -> u64 {
        let log = self.process.as_ref().map(|process| process.folder.join("log"));
        log.and_then(|path| path.metadata().ok()).map_or(0, |data| data.len())
    }

    /// Descriptors that the process has open.
    pub(crate) fn open_fds(&self) -> Option<usize> {
        let pid = self.pid()?;
        std::fs::read_dir(format!("/proc/{pid}/fd")).ok().map(Iterator::count)
    }

    /// Resident memory in KiB.
    pub(crate) fn resident(&self) -> Option<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.pid()?)).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.split_whitespace().next()?.parse().ok()
    }

    /// Mappings of the judge's own memory that the process holds.
    pub(crate) fn shared_maps(&self) -> Option<usize> {
        let text = std::fs::read_to_string(format!("/proc/{}/maps", self.pid()?)).ok()?;
        Some(text.lines().filter(|line| line.contains("outboard-frontend")).count())
    }

    /// Whether it has nothing to do: within one of the windows it uses no more than `most` of a processor and
    /// no thread of it waits for one at the end. A thread that spins is always ready to run, also where
    /// it gets no processor. `None` when that cannot be seen.
    pub(crate) fn settles(&self, windows: &[u64], most: f64) -> Option<Result<(), f64>> {
        let mut least = f64::MAX;
        let (start, before) = (Instant::now(), self.ran()?);
        // One that wanted a processor and had none has not shown what it does with it: it gets more time.
        let starved = std::iter::repeat_with(|| 150).take_while(|_| {
            let ran = self.ran().unwrap_or(u64::MAX).saturating_sub(before);
            ran < PROOF && start.elapsed() < Duration::from_secs(10)
        });
        for window in windows.iter().copied().chain(starved) {
            let load = self.load(Duration::from_millis(window))?;
            if load <= most && !self.ready_to_run() {
                return Some(Ok(()));
            }
            least = least.min(load);
        }
        Some(Err(least))
    }

    /// Waits until it has read what was just sent, which is when it sleeps again; no longer than `most`, as some
    /// never do.
    pub(crate) fn digests(&self, most: Duration) {
        let until = Instant::now() + most;
        while self.ready_to_run() && Instant::now() < until {
            std::thread::yield_now();
        }
    }

    /// Nanoseconds of processor that its threads have had.
    fn ran(&self) -> Option<u64> {
        Some(schedules(self.pid()?)?.values().map(|[ran, _]| ran).sum())
    }

    /// Whether a thread of it runs or waits for a processor.
    pub(crate) fn ready_to_run(&self) -> bool {
        let tasks = self.pid.and_then(|pid| std::fs::read_dir(format!("/proc/{pid}/task")).ok());
        let state = |path: PathBuf| std::fs::read_to_string(path.join("stat")).unwrap_or_default();
        tasks.into_iter().flatten().flatten().any(|task| {
            // The state stands behind the name, which may hold anything.
            state(task.path()).rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('R'))
        })
    }

    /// Share of one processor that it uses, or would use if there was one free, during `time`.
    pub(crate) fn load(&self, time: Duration) -> Option<f64> {
        let pid = self.pid()?;
        let (start, before) = (Instant::now(), wanted_time(pid)?);
        std::thread::sleep(time);
        let after = wanted_time(pid)?;
        let spent = after
            .iter()
            .map(|(thread, now)| now.saturating_sub(before.get(thread).copied().unwrap_or(0)));
        Some(Duration::from_nanos(spent.sum()).as_secs_f64() / start.elapsed().as_secs_f64())
    }
}

/// Nanoseconds of processor after which a back-end that has nothing to do is said to spin.
const PROOF: u64 = 60_000_000;

/// The limit of descriptors of a process.
fn read_limit(pid: u32) -> Option<Rlimit> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    let mut words = line.split_whitespace().map(|word| word.parse().ok());
    Some(Rlimit { current: words.next()?, maximum: words.next()? })
}

/// For each thread, the nanoseconds in which it ran or waited for a processor: on a busy machine a thread
/// that spins is told from one that rests by its waiting.
fn wanted_time(pid: u32) -> Option<BTreeMap<OsString, u64>> {
    let all = schedules(pid)?.into_iter();
    Some(all.map(|(thread, [ran, waited])| (thread, ran.saturating_add(waited))).collect())
}

/// For each thread, the nanoseconds in which it ran, and in which it waited for a processor.
fn schedules(pid: u32) -> Option<BTreeMap<OsString, [u64; 2]>> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
        // A thread that has just ended has no file any more.
        let Ok(text) = std::fs::read_to_string(entry.path().join("schedstat")) else { continue };
        let mut words = text.split(' ').map(|word| word.trim().parse().unwrap_or(0));
        all.insert(entry.file_name(), [words.next().unwrap_or(0), words.next().unwrap_or(0)]);
    }
    Some(all)
}

/// Starts the program with its output in a file.
fn launch(words: &[OsString], socket: &Path, folder: &Path) -> Result<Child, String> {
    let log = File::create(folder.join("log")).map_err(|error| error.to_string())?;
    let copy = log.try_clone().map_err(|error| error.to_string())?;
    let filled: Vec<_> = words.iter().map(|word| fill(word, socket)).collect();
    let (program, arguments) = filled.split_first().ok_or("the command is empty")?;
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(copy)
        .stderr(log)
        .process_group(0)
        .spawn()
        .map_err(|error| format!("{}: {error}", program.display()))
}

impl Drop for Peer {
    fn drop(&mut self) {
        let Some(process) = &mut self.process else { return };
        if let Ok(id) = i32::try_from(process.child.id())
            && let Some(group) = Pid::from_raw(id)
        {
            // The group is ours: it was made with the child, which has not been waited for by others.
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
        let _ = process.child.kill();
        let _ = process.child.wait();
        let _ = std::fs::remove_dir_all(&process.folder);
    }
}

fn fill(word: &OsString, socket: &Path) -> OsString {
    match word.to_str() {
        Some(text) => text.replace("{socket}", &socket.display().to_string()).into(),
        None => word.clone(),
    }
}

fn signal_name(signal: i32) -> String {
    match signal {
        4 => "SIGILL".to_owned(),
        6 => "SIGABRT".to_owned(),
        7 => "SIGBUS".to_owned(),
        8 => "SIGFPE".to_owned(),
        9 => "SIGKILL".to_owned(),
        11 => "SIGSEGV".to_owned(),
        13 => "SIGPIPE".to_owned(),
        15 => "SIGTERM".to_owned(),
        31 => "SIGSYS".to_owned(),
        other => format!("signal {other}"),
    }
}
