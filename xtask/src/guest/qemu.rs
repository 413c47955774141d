//! A guest in QEMU: a Debian kernel under emulation, so no KVM is needed.
//!
//! Serial port 0 is the console (kept in a file), port 1 the agent's (QEMU's own standard input
//! and output). The guest's memory is a shared memfd, as vhost-user needs it. From start to
//! ready: 3 to 7 s.

use super::{BASE_MODULES, Guest, initramfs};
use crate::packages::Root;
use crate::process::Running;
use anyhow::{Context as _, Result};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// What the guest is made of.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Virtual CPUs.
    pub cpus: u16,
    /// Memory in MiB.
    pub memory: u32,
    /// Room for memory to be plugged in later, in MiB.
    pub hot_plug: Option<u32>,
    /// Further arguments for QEMU: the devices.
    pub arguments: Vec<String>,
    /// Modules to load besides those of every guest.
    pub modules: Vec<&'static str>,
    /// Programs of the packages besides those of every guest, as in `usr/bin/socat`.
    pub programs: Vec<&'static str>,
    /// Programs of ours, where they lie on this machine.
    pub ours: Vec<PathBuf>,
    /// SeaBIOS instead of qboot: it drives a disk itself before Linux does.
    pub seabios: bool,
    /// Further arguments for the kernel.
    pub kernel: Vec<&'static str>,
}

/// What emulates fastest: everything but wide vectors, hashing and a fifth level of page tables.
const CPU: &str = "max,-avx2,-avx,-sha-ni,-la57";

/// Pages are not cleared when they are handed out: what a device writes there is all that is written, so
/// that a migration that misses it can be told.
const COMMAND_LINE: &str =
    "console=ttyS0 panic=-1 mitigations=off nokaslr init_on_alloc=0 agent=ttyS1";

impl Default for Machine {
    fn default() -> Self {
        Self {
            cpus: 1,
            memory: 256,
            hot_plug: None,
            arguments: Vec::new(),
            modules: Vec::new(),
            programs: Vec::new(),
            ours: Vec::new(),
            seabios: false,
            kernel: Vec::new(),
        }
    }
}

impl Machine {
    /// With further arguments for QEMU.
    #[must_use]
    pub fn with(mut self, arguments: &[&str]) -> Self {
        self.arguments.extend(arguments.iter().map(|word| (*word).to_owned()));
        self
    }

    /// With a vhost-user device behind `socket`, e.g. `vhost-user-blk-pci,num-queues=4`.
    #[must_use]
    pub fn with_device(self, device: &str, socket: &Path) -> Self {
        let place = self.arguments.len();
        let chardev = format!("socket,id=device{place},path={}", socket.display());
        let device = format!("{device},chardev=device{place}");
        self.with(&["-chardev", &chardev, "-device", &device])
    }

    /// Starts the guest; `dir` takes its console and monitor. Gives it when its agent is ready.
    ///
    /// # Errors
    /// When QEMU does not start or the guest does not come up: with the end of its console.
    pub fn boot(&self, root: &Root, dir: &Path) -> Result<Guest> {
        let (child, logs, monitor) = self.start(root, dir)?;
        Guest::new(child, logs, Some(monitor))
    }

    /// Starts the same machine without a guest: one comes over a migration's stream that QEMU
    /// takes on the socket `stream`. `dir` is not that of the machine it comes from.
    ///
    /// # Errors
    /// When QEMU does not start.
    pub fn receive(&self, root: &Root, dir: &Path, stream: &Path) -> Result<Guest> {
        let incoming = format!("unix:{}", stream.display());
        let machine = self.clone().with(&["-incoming", &incoming]);
        let (child, logs, monitor) = machine.start(root, dir)?;
        Guest::arriving(child, logs, monitor, stream)
    }

    /// QEMU, the files that it and its guest write to, and its monitor.
    fn start(&self, root: &Root, dir: &Path) -> Result<(Child, Vec<PathBuf>, PathBuf)> {
        let release = root.kernel_release()?;
        let modules: Vec<_> = BASE_MODULES.iter().chain(&self.modules).copied().collect();
        let folder = root.path(&format!("lib/modules/{release}"));
        let archive = initramfs::build(root, &folder, &modules, &self.programs, &self.ours)?;
        let (initrd, console) = (dir.join("initramfs"), dir.join("console"));
        std::fs::write(&initrd, archive)?;
        let mut command = self.hardware(root);
        command.arg("-kernel").arg(root.path(&format!("boot/vmlinuz-{release}")));
        command.arg("-initrd").arg(&initrd);
        let plain = [COMMAND_LINE];
        let words: Vec<_> = plain.iter().chain(&self.kernel).copied().collect();
        command.arg("-append").arg(words.join(" "));
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command.args(["-chardev", "stdio,id=agent,signal=off", "-serial", "chardev:agent"]);
        let monitor = dir.join("monitor");
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor.display()));
        command.args(&self.arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let log = std::fs::File::create(dir.join("qemu.log"))?;
        let child = command.stderr(log).spawn().context("cannot start QEMU")?;
        Ok((child, vec![console, dir.join("qemu.log")], monitor))
    }

    /// Starts the machine without a kernel: its firmware boots from a disk. Gives the machine and
    /// the file that its first serial port writes to.
    ///
    /// # Errors
    /// When QEMU does not start.
    pub fn boot_disk(&self, root: &Root, dir: &Path) -> Result<(Running, PathBuf)> {
        let console = dir.join("firmware");
        std::fs::write(&console, "")?;
        let mut command = self.hardware(root);
        command.arg("-serial").arg(format!("file:{}", console.display()));
        let log = std::fs::File::create(dir.join("qemu.log"))?;
        command.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        Ok((Running(command.spawn().context("cannot start QEMU")?), console))
    }

    /// QEMU with processors, memory and firmware, without devices.
    fn hardware(&self, root: &Root) -> Command {
        let mut command = root.command("usr/bin/qemu-system-x86_64");
        command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        command.args(["-machine", "q35,accel=tcg", "-cpu", CPU, "-smp", &self.cpus.to_string()]);
        let room = self.hot_plug.map_or(0, |more| self.memory + more);
        let room = if room > 0 { format!(",slots=4,maxmem={room}M") } else { String::new() };
        command.arg("-m").arg(format!("{}M{room}", self.memory));
        let memory = format!("memory-backend-memfd,id=memory,size={}M,share=on", self.memory);
        command.args(["-object", &memory, "-numa", "node,memdev=memory"]);
        for data in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(root.path(data));
        }
        if !self.seabios {
            command.args(["-bios", "qboot.rom"]);
        }
        command
    }
}
