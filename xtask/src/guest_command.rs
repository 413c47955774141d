//! `cargo xtask guest`: a guest to try things in, by hand or by script.

use anyhow::{Context as _, Result, ensure};
use std::io::{BufRead as _, Write as _};
use std::path::PathBuf;
use std::time::Duration;
use xtask::backend::{Device, Disk};
use xtask::guest::{Guest, qemu::Machine, uml};
use xtask::packages::Root;

/// How long one line or script may take.
const LONG: Duration = Duration::from_secs(3600);

/// What to boot and what to run in it.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// A raw image for the guest's /dev/vda, served by `outboard block`
    #[arg(long, value_name = "IMAGE")]
    disk: Option<PathBuf>,
    /// Serve the disk with qemu-storage-daemon instead
    #[arg(long, requires = "disk")]
    storage_daemon: bool,
    /// Queues of the disk, and virtual CPUs
    #[arg(long, default_value_t = 1, value_name = "N")]
    queues: u16,
    /// A vhost-user device that listens already: QEMU's device name and the socket's path;
    /// with --uml the virtio device number and the path (repeatable)
    #[arg(long, value_name = "DEVICE=SOCKET")]
    device: Vec<String>,
    /// A kernel module to load besides those of every guest (repeatable)
    #[arg(long, value_name = "NAME")]
    module: Vec<String>,
    /// A further argument for the guest's kernel (repeatable)
    #[arg(long, value_name = "WORD", conflicts_with = "uml")]
    kernel: Vec<String>,
    /// Boot User-mode Linux instead of QEMU
    #[arg(long)]
    uml: bool,
    /// Boot through SeaBIOS, which drives disks itself, instead of qboot
    #[arg(long, conflicts_with = "uml")]
    seabios: bool,
    /// A shell script to run; without one, lines are read from the terminal and run one by one
    #[arg(long, value_name = "FILE")]
    script: Option<PathBuf>,
    /// Further arguments for QEMU
    #[arg(last = true)]
    qemu: Vec<String>,
}

/// Boots, runs, turns off.
pub(crate) fn run(options: &Options) -> Result<()> {
    let root = Root::prepare(false)?;
    let dir = tempfile::tempdir()?;
    let maker = if options.storage_daemon { Disk::StorageDaemon } else { Disk::Outboard };
    let image = options.disk.as_ref().map(|image| image.canonicalize().context("the disk's image"));
    let served = |image: Result<PathBuf>| maker.serve(&root, dir.path(), &image?, options.queues);
    let disk = image.map(served).transpose()?;
    println!("guest: booting");
    let begun = std::time::Instant::now();
    let mut guest = boot(options, &root, dir.path(), disk.as_ref())?;
    println!("guest: Linux {} is up after {:.1?}", guest.release(), begun.elapsed());
    match &options.script {
        Some(file) => print!("{}", guest.run(&std::fs::read_to_string(file)?, LONG)?),
        None => converse(&mut guest)?,
    }
    guest.power_off()
}

fn boot(
    options: &Options,
    root: &Root,
    dir: &std::path::Path,
    disk: Option<&Device>,
) -> Result<Guest> {
    let mut devices = Vec::new();
    for device in &options.device {
        let pair = device.rsplit_once('=').context("--device wants DEVICE=SOCKET")?;
        devices.push((pair.0.to_owned(), PathBuf::from(pair.1)));
    }
    if options.uml {
        let mut numbered = Vec::new();
        numbered.extend(disk.map(|disk| (disk.socket.as_path(), 2)));
        for (number, socket) in &devices {
            numbered.push((socket.as_path(), number.parse().context("a virtio device number")?));
        }
        return uml::boot(root, dir, &numbered);
    }
    ensure!(options.queues > 0, "--queues wants at least 1");
    let modules = options.module.iter().map(|name| &*name.clone().leak()).collect();
    let (cpus, seabios) = (options.queues, options.seabios);
    let kernel = options.kernel.iter().map(|word| &*word.clone().leak()).collect();
    let mut machine = Machine { cpus, seabios, modules, kernel, ..Machine::default() };
    if let Some(disk) = disk {
        let device = format!("vhost-user-blk-pci,num-queues={}", options.queues);
        machine = machine.with_device(&device, &disk.socket);
    }
    for (device, socket) in &devices {
        machine = machine.with_device(device, socket);
    }
    let more: Vec<_> = options.qemu.iter().map(String::as_str).collect();
    machine.with(&more).boot(root, dir)
}

/// Each line is one script; its output follows. The end of input ends the guest.
fn converse(guest: &mut Guest) -> Result<()> {
    println!("guest: each line is run by its shell; control-D turns it off");
    loop {
        print!("guest# ");
        std::io::stdout().flush()?;
        let mut line = String::new();
        if std::io::stdin().lock().read_line(&mut line)? == 0 {
            println!();
            return Ok(());
        }
        guest.start(&format!("set +e\n{line}"))?;
        let outcome = guest.outcome(LONG)?;
        print!("{}", outcome.output);
        if outcome.status != 0 {
            println!("guest: exit {}", outcome.status);
        }
    }
}
