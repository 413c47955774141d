//! Guests: small Linux systems that are booted with our devices and run scripts.
//!
//! A guest has one file system in memory ([`initramfs`]) with busybox, modules and an agent that
//! takes shell scripts over a serial line ([`agent`]). [`qemu`] and [`uml`] start one.
//! Invariant: a guest ends with the value that stands for it; every wait has a bound, and what
//! goes wrong is told with the end of the guest's console.

pub mod agent;
pub mod cpio;
pub mod initramfs;
pub mod modules;
pub mod qemu;
pub mod qmp;
pub mod uml;

use crate::process::Running;
use agent::{Agent, Outcome};
use anyhow::{Context as _, Result, anyhow, bail};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

/// Modules of every QEMU guest. ext4's checksums are a module of their own.
pub const BASE_MODULES: &[&str] = &["virtio_pci", "virtio_blk", "crc32c_generic", "ext4"];

/// The bound for a start: 3 to 7 s where nothing else runs.
const START: Duration = Duration::from_secs(150);

/// A guest that runs.
#[derive(Debug)]
pub struct Guest {
    agent: Agent,
    child: Running,
    logs: Vec<PathBuf>,
    monitor: Option<PathBuf>,
    release: String,
}

impl Guest {
    /// A guest whose agent speaks over the child's standard input and output.
    fn new(child: Child, logs: Vec<PathBuf>, monitor: Option<PathBuf>) -> Result<Self> {
        let mut guest = Self::silent(child, logs, monitor)?;
        guest.wait_ready()?;
        Ok(guest)
    }

    /// A guest that runs elsewhere and is to come through the socket `stream`, which is there.
    fn arriving(child: Child, logs: Vec<PathBuf>, monitor: PathBuf, stream: &Path) -> Result<Self> {
        let mut guest = Self::silent(child, logs, Some(monitor))?;
        let end = std::time::Instant::now() + START;
        while !stream.exists() {
            let alive = guest.child.0.try_wait()?.is_none() && std::time::Instant::now() < end;
            guest.explain(alive.then_some(()).context("QEMU does not start"))?;
            std::thread::sleep(Duration::from_millis(10)); // a socket's birth sends no event
        }
        Ok(guest)
    }

    fn silent(mut child: Child, logs: Vec<PathBuf>, monitor: Option<PathBuf>) -> Result<Self> {
        let to_guest = child.stdin.take().context("the guest has no input")?;
        let from_guest = child.stdout.take().context("the guest has no output")?;
        let agent = Agent::new(Box::new(to_guest), from_guest);
        Ok(Self { agent, child: Running(child), logs, monitor, release: String::new() })
    }

    /// Says one line to a script that reads from the agent's port.
    ///
    /// # Errors
    /// When the guest is gone.
    pub fn say(&mut self, line: &str) -> Result<()> {
        let said = self.agent.say(line);
        self.explain(said)
    }

    /// The release of the guest's kernel.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.release
    }

    /// The process that runs the guest.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.0.id()
    }

    /// Waits until the guest is up (again).
    ///
    /// # Errors
    /// When it does not come up: with the end of its console.
    pub fn wait_ready(&mut self) -> Result<()> {
        let found = self.agent.ready(START);
        self.release = self.explain(found)?;
        Ok(())
    }

    /// Runs a script (`sh -eu`) and gives what it printed.
    ///
    /// # Errors
    /// When it exits with anything but 0, takes longer than `within`, or the guest falls over.
    pub fn run(&mut self, script: &str, within: Duration) -> Result<String> {
        self.start(script)?;
        self.finish(within)
    }

    /// Starts a script; [`Self::finish`] waits for it.
    ///
    /// # Errors
    /// When the guest is gone.
    pub fn start(&mut self, script: &str) -> Result<()> {
        let started = self.agent.start(script);
        self.explain(started)
    }

    /// Waits for the script that was started, and gives what it printed.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn finish(&mut self, within: Duration) -> Result<String> {
        let Outcome { status, output } = self.outcome(within)?;
        if status != 0 {
            return self.explain(Err(anyhow!("the script exited with {status}:\n{output}")));
        }
        Ok(output)
    }

    /// Waits for the script that was started, however it exits.
    ///
    /// # Errors
    /// When it takes longer than `within`, or the guest falls over.
    pub fn outcome(&mut self, within: Duration) -> Result<Outcome> {
        let outcome = self.agent.finish(within);
        self.explain(outcome)
    }

    /// Waits until the script that was started prints the line `text`; it runs on.
    ///
    /// # Errors
    /// When it ends or `within` passes first.
    pub fn expect(&mut self, text: &str, within: Duration) -> Result<()> {
        let seen = self.agent.expect(text, within);
        self.explain(seen)
    }

    /// The guest restarts itself (the devices are reset by the machine, the process goes on).
    ///
    /// # Errors
    /// When it does not come up again.
    pub fn reboot(&mut self) -> Result<()> {
        self.start("reboot -f")?;
        self.wait_ready()
    }

    /// The machine's reset button, whatever the guest is doing (QEMU only).
    ///
    /// # Errors
    /// When there is no monitor, or the guest does not come up again.
    pub fn reset(&mut self) -> Result<()> {
        self.monitor()?.execute("system_reset", &serde_json::json!({}))?;
        self.wait_ready()
    }

    /// QEMU's monitor.
    ///
    /// # Errors
    /// When this guest has none.
    pub fn monitor(&self) -> Result<qmp::Monitor> {
        let path = self.monitor.as_deref().context("this guest has no monitor")?;
        qmp::Monitor::connect(path)
    }

    /// Turns the guest off and waits for its process to end with 0.
    ///
    /// # Errors
    /// When it does not end in time, or not well.
    pub fn power_off(mut self) -> Result<()> {
        self.start("poweroff -f")?;
        let end = std::time::Instant::now() + Duration::from_secs(60);
        while std::time::Instant::now() < end {
            if let Some(status) = self.child.0.try_wait()? {
                let ended = status.success().then_some(());
                return self.explain(ended.with_context(|| format!("the guest ended: {status}")));
            }
            std::thread::sleep(Duration::from_millis(10)); // std has no wait with a bound
        }
        self.explain(Err(anyhow!("the guest does not turn itself off")))
    }

    /// Adds the end of the guest's console to an error.
    fn explain<T>(&self, result: Result<T>) -> Result<T> {
        let Err(error) = result else { return result };
        let tails: String = self.logs.iter().map(|log| tail(log, 40)).collect();
        bail!("{error:#}\n{tails}");
    }
}

/// The last lines of a file, under its name.
#[must_use]
pub fn tail(file: &Path, count: usize) -> String {
    let bytes = std::fs::read(file).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().collect();
    let last = lines.get(lines.len().saturating_sub(count)..).unwrap_or_default();
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    format!("--- the end of {name} ---\n{}\n", last.join("\n"))
}
