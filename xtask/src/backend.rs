//! The devices that guests use: our own program, and qemu-storage-daemon as a second opinion, so
//! that a test of the guest can be told from a test of our device.

use crate::packages::Root;
use crate::process::{self, Running};
use anyhow::{Context as _, Result, bail, ensure};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A device process that listens on a socket. It is killed when this is dropped.
#[derive(Debug)]
pub struct Device {
    /// Where it listens.
    pub socket: PathBuf,
    child: Running,
    log: PathBuf,
}

impl Device {
    /// Starts `command`, its output kept in `dir/NAME.log`, and waits until it listens on
    /// `dir/NAME.sock` (which the command must have been told).
    ///
    /// # Errors
    /// When it ends, or does not listen within 30 s: with what it said.
    pub fn start(command: &mut Command, dir: &Path, name: &str) -> Result<Self> {
        let (log, socket) = (dir.join(format!("{name}.log")), socket(dir, name));
        let file = File::create(&log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().context(format!("cannot start {}", process::shown(command)))?;
        let mut device = Self { socket, child: Running(child), log };
        let end = Instant::now() + Duration::from_secs(30);
        while !listens(&device.socket, device.pid())? {
            if let Some(status) = device.child.0.try_wait()? {
                bail!("{name} ended with {status}\n{}", device.said());
            }
            ensure!(Instant::now() < end, "{name} does not listen\n{}", device.said());
            std::thread::sleep(Duration::from_millis(5)); // a socket's birth sends no event
        }
        Ok(device)
    }

    /// The process's number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.0.id()
    }

    /// True while the process lives.
    ///
    /// # Errors
    /// When the system cannot tell.
    pub fn lives(&mut self) -> Result<bool> {
        Ok(self.child.0.try_wait()?.is_none())
    }

    /// The end of what it printed.
    #[must_use]
    pub fn said(&self) -> String {
        crate::guest::tail(&self.log, 40)
    }

    /// Ends it with SIGTERM and waits.
    ///
    /// # Errors
    /// As [`Self::ended`].
    pub fn terminate(self) -> Result<()> {
        self.child.terminate()?;
        self.ended()
    }

    /// Waits until it has ended by itself: another one has taken its place.
    ///
    /// # Errors
    /// When it does not end with 0 within 30 s: with what it said.
    pub fn ended(mut self) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(status) = self.child.0.try_wait()? {
                ensure!(status.success(), "the device ended with {status}\n{}", self.said());
                return Ok(());
            }
            ensure!(Instant::now() < end, "the device does not end\n{}", self.said());
            std::thread::sleep(Duration::from_millis(5)); // std has no wait with a bound
        }
    }
}

/// The socket's path for a device of that name.
#[must_use]
pub fn socket(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.sock"))
}

/// True when some process listens on the socket, in the network that process `pid` is in or in ours (a device
/// may go into another one with its socket made). Connecting would use up the device's one connection, so the
/// system is asked.
fn listens(socket: &Path, pid: u32) -> Result<bool> {
    // Num RefCount Protocol Flags Type St Inode Path; 0x10000 is SO_ACCEPTCON.
    let read = |process: &str| std::fs::read_to_string(format!("/proc/{process}/net/unix"));
    let table = read(&pid.to_string()).unwrap_or_default() + &read("self")?;
    Ok(table.lines().any(|line| {
        let mut words = line.split_ascii_whitespace().skip(3);
        words.next() == Some("00010000")
            && words.nth(3).is_some_and(|path| Path::new(path) == socket)
    }))
}

/// Who serves a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk {
    /// `outboard block`.
    Outboard,
    /// qemu-storage-daemon's vhost-user-blk export.
    StorageDaemon,
}

impl Disk {
    /// Our disk, or the one that `OUTBOARD_GUEST_DISK=storage-daemon` puts in its place: a test
    /// that fails with either is not the device's fault.
    #[must_use]
    pub fn ours() -> Self {
        let wanted = std::env::var("OUTBOARD_GUEST_DISK").unwrap_or_default();
        if wanted == "storage-daemon" { Self::StorageDaemon } else { Self::Outboard }
    }

    /// Serves `image` on a socket in `dir`, with so many queues.
    ///
    /// # Errors
    /// When the program is not there or does not start.
    pub fn serve(self, root: &Root, dir: &Path, image: &Path, queues: u16) -> Result<Device> {
        let at = socket(dir, "disk");
        let mut command = match self {
            Self::Outboard => {
                let queues = queues.to_string();
                return outboard_block(dir, image, &["--num-queues", &queues]);
            }
            Self::StorageDaemon => {
                let mut command = root.command("usr/bin/qemu-storage-daemon");
                let (image, at) = (image.display(), at.display());
                command.arg("--blockdev");
                command.arg(format!("driver=file,filename={image},discard=unmap,node-name=disk"));
                command.arg("--export").arg(format!(
                    "type=vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path={at},\
                     writable=on,num-queues={queues}"
                ));
                command
            }
        };
        Device::start(&mut command, dir, "disk")
    }
}

/// `outboard block` with further arguments, on a socket in `dir`.
///
/// # Errors
/// When the program is not there or does not start.
pub fn outboard_block(dir: &Path, image: &Path, arguments: &[&str]) -> Result<Device> {
    outboard_block_named("disk", dir, image, arguments)
}

/// The same by another name than `disk`, for a second one in the folder.
///
/// # Errors
/// As [`outboard_block`].
pub fn outboard_block_named(
    name: &str,
    dir: &Path,
    image: &Path,
    arguments: &[&str],
) -> Result<Device> {
    let mut command = Command::new(outboard()?);
    command.arg("block").args(arguments).arg("--socket-path").arg(socket(dir, name)).arg(image);
    Device::start(&mut command, dir, name)
}

/// Our program: `$OUTBOARD_BIN`, else the newest of the target directory's builds.
///
/// # Errors
/// When there is none, or none that has a disk.
pub fn outboard() -> Result<PathBuf> {
    let file = built("OUTBOARD_BIN", "outboard")?;
    let help = process::output(Command::new(&file).args(["block", "--help"]));
    let has_disk = help.is_ok_and(|text| text.contains("--socket-path"));
    ensure!(has_disk, "{} has no `block --socket-path` yet", file.display());
    Ok(file)
}

/// `examples/rng` of the crate `outboard`: `$OUTBOARD_RNG`, else the newest build.
///
/// # Errors
/// When there is none.
pub fn rng_example() -> Result<PathBuf> {
    built("OUTBOARD_RNG", "examples/rng")
}

/// `examples/growing` of the crate `outboard`: `$OUTBOARD_GROWING`, else the newest build.
///
/// # Errors
/// When there is none.
pub fn growing_example() -> Result<PathBuf> {
    built("OUTBOARD_GROWING", "examples/growing")
}

/// `examples/files` of the crate `xtask`, a program for guests: `$OUTBOARD_FILES`, else the newest build.
///
/// # Errors
/// When there is none.
pub fn files_example() -> Result<PathBuf> {
    built("OUTBOARD_FILES", "examples/files")
}

fn built(variable: &str, name: &str) -> Result<PathBuf> {
    if let Some(file) = std::env::var_os(variable) {
        return Ok(PathBuf::from(file));
    }
    let target = crate::paths::target()?;
    let builds = ["release", "debug"].map(|profile| target.join(profile).join(name));
    let dated =
        builds.into_iter().filter_map(|file| Some((file.metadata().ok()?.modified().ok()?, file)));
    let newest = dated.max().map(|(_, file)| file);
    newest.with_context(|| format!("{name} is not built (`cargo xtask test` builds it)"))
}

/// Makes an empty image of so many MiB.
///
/// # Errors
/// When the disk is full.
pub fn image(dir: &Path, mebibytes: u64) -> Result<PathBuf> {
    let path = dir.join("disk.img");
    File::create(&path)?.set_len(mebibytes << 20)?;
    Ok(path)
}

/// How many bytes of the image hold data; holes do not count.
///
/// # Errors
/// When the image is gone.
pub fn allocated(image: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    Ok(image.metadata()?.blocks() * 512)
}

/// Checks the file system in the image, as the host sees it.
///
/// # Errors
/// When e2fsck finds anything to mend: with its words.
pub fn check_ext4(root: &Root, image: &Path) -> Result<()> {
    process::output(root.command("sbin/e2fsck").args(["-f", "-n"]).arg(image)).map(drop)
}
