//! A guest with a thousand open files: the device under it is replaced by a newer program, and the guest moves to
//! another QEMU with a device of its own on the same directory.
//!
//! Every tenth of the files has lost its name, every tenth has another one by then. `OUTBOARD_ROUNDS=20` does it
//! so often.

use crate::lab::{Lab, sound};
use crate::migrate::{folder, outcome, rounds};
use crate::share::{self, MINUTE};
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use xtask::backend::{self, Device};
use xtask::guest::Guest;
use xtask::guest::qemu::Machine;

/// Holds the files, and beside them works on others, until a word comes over the agent's port.
const LOAD: &str = r#"
rm -f /tmp/word
{ IFS= read -r word < /dev/ttyS1; echo "$word" > /tmp/word; } &
mkdir /mnt/work /mnt/more
(
    n=0
    while [ ! -e /tmp/word ]; do
        mkdir /mnt/more/$n
        dd if=/dev/urandom bs=4k count=4 2>/dev/null | tee /mnt/more/$n/a | md5sum > /tmp/sum
        mv /mnt/more/$n/a /mnt/more/$n/b
        [ "$(md5sum < /mnt/more/$n/b)" = "$(cat /tmp/sum)" ] || { echo "WRONG in $n"; break; }
        rm -r /mnt/more/$n
        n=$((n + 1))
    done
) > /tmp/more 2>&1 &
files hold /mnt/work 1000
cat /tmp/more
wait
rm -r /mnt/work /mnt/more
! dmesg | grep -i "fuse.*error"
"#;

fn lab() -> Result<Option<Lab>> {
    Lab::open(|| backend::files_example().and_then(|_| backend::outboard()).map(drop))
}

fn machine(device: &Device) -> Result<Machine> {
    let ours = vec![backend::files_example()?];
    let machine = share::machine(device, 2);
    Ok(Machine { ours, memory: 192, ..machine })
}

/// Whether what has no name any more can be handed on: by a handle, which not every file system has and which
/// root alone may open. Elsewhere the guest keeps names, and what it loses is its error.
fn hands_on(share: &Path) -> Result<bool> {
    const KNOW_HANDLES: [u32; 4] = [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994];
    let kind = rustix::fs::statfs(share)?.f_type;
    let known = KNOW_HANDLES.iter().any(|known| i64::from(*known) == kind);
    Ok(known && rustix::process::geteuid().is_root())
}

/// The arguments of every device here.
fn arguments(share: &Path) -> Result<Vec<&'static str>> {
    let mut words = vec!["--num-request-queues", "2"];
    if !hands_on(share)? {
        words.extend(["--migration-on-error", "guest-error"]);
    }
    Ok(words)
}

/// The guest works with its files open.
fn begin(guest: &mut Guest, device: &Device, share: &Path) -> Result<()> {
    sound(guest.run("mount -t virtiofs share /mnt", MINUTE), device)?;
    let named = if hands_on(share)? { "" } else { "export NAMED=1" };
    sound(guest.start(&[named, LOAD].join("\n")), device)?;
    sound(guest.expect("held", 3 * MINUTE), device)
}

/// It is told to end, and has found everything as it was.
fn finish(guest: &mut Guest, device: &Device) -> Result<()> {
    guest.say("enough")?;
    let said = sound(guest.finish(3 * MINUTE), device)?;
    ensure!(said.contains("right after") && !said.contains("WRONG"), "{said}");
    eprintln!("{}", said.trim());
    Ok(())
}

/// A newer program asks on the control socket, and the old one ends.
fn take_over(lab: &Lab, device: &mut Device, share: &Path) -> Result<()> {
    let control = lab.path().join("control");
    let mut command = Command::new(backend::outboard()?);
    command.arg("fs").args(arguments(share)?).arg("--shared-dir").arg(share);
    command.arg("--take-over").arg(&control);
    command.arg("--recovery-file").arg(lab.path().join("notes"));
    let next = Device::start(&mut command, lab.path(), "fs")?;
    let mut old = std::mem::replace(device, next);
    let end = Instant::now() + MINUTE;
    while old.lives()? {
        ensure!(Instant::now() < end, "the old program does not end\n{}", device.said());
        std::thread::sleep(std::time::Duration::from_millis(10)); // std has no wait with a bound
    }
    Ok(())
}

#[test]
fn a_newer_program_takes_a_share_over_with_a_thousand_open_files() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let share = share::shared(&lab)?;
    let control = lab.path().join("control");
    let control = control.to_str().context("a path that is text")?;
    // Both note what is open in one file: the one that takes over begins anew there.
    let notes = lab.path().join("notes");
    let notes = notes.to_str().context("a path that is text")?;
    let more = ["--control", control, "--recovery-file", notes];
    let more = [&arguments(&share)?[..], &more].concat();
    let mut device = share::start(&lab, &share, &more)?;
    let mut guest = sound(machine(&device)?.boot(&lab.root, lab.path()), &device)?;
    begin(&mut guest, &device, &share)?;
    for _ in 0..2 * rounds() {
        take_over(&lab, &mut device, &share)?;
    }
    finish(&mut guest, &device)?;
    sound(guest.run("cat /mnt/hello; ls /mnt; umount /mnt", MINUTE), &device)?;
    sound(guest.power_off(), &device)?;
    device.terminate()
}

/// Two devices on one directory, and a guest on the first.
struct Bench {
    lab: Lab,
    devices: [Device; 2],
    here: usize,
    guest: Guest,
    moves: usize,
}

impl Bench {
    fn new(mode: &str) -> Result<Option<Self>> {
        let Some(lab) = lab()? else { return Ok(None) };
        let share = share::shared(&lab)?;
        let more = [&arguments(&share)?[..], &["--migration-mode", mode]].concat();
        let start = |name| share::start_named(&lab, name, &share, &more);
        let devices = [start("fs0")?, start("fs1")?];
        let booted = machine(&devices[0])?.boot(&lab.root, &folder(&lab, 0)?);
        let guest = sound(booted, &devices[0])?;
        Ok(Some(Self { lab, devices, here: 0, guest, moves: 0 }))
    }

    /// A QEMU on the other device that waits for the guest, and where it listens.
    fn other_side(&mut self) -> Result<(Guest, PathBuf)> {
        self.moves += 1;
        let dir = folder(&self.lab, self.moves)?;
        let (device, stream) = (&self.devices[1 - self.here], dir.join("stream"));
        let waiting = machine(device)?.receive(&self.lab.root, &dir, &stream);
        Ok((sound(waiting, device)?, stream))
    }

    fn go(&mut self) -> Result<()> {
        let (there, stream) = self.other_side()?;
        let begun = Instant::now();
        let mut monitor = sound(self.guest.monitor(), &self.devices[self.here])?;
        monitor.execute("migrate", &json!({ "uri": format!("unix:{}", stream.display()) }))?;
        let done = sound(outcome(&mut monitor), &self.devices[1 - self.here])?;
        ensure!(done["status"] == "completed", "{done}\n{}", self.devices[self.here].said());
        // What has no name any more lives as long as somebody has it open: the source stays until the guest runs.
        sound(runs(&there), &self.devices[1 - self.here])?;
        eprintln!("moved in {:.1?}, downtime {} ms", begun.elapsed(), done["downtime"]);
        self.guest = there;
        self.here = 1 - self.here;
        Ok(())
    }
}

/// Waits until the guest runs that was to arrive.
fn runs(guest: &Guest) -> Result<()> {
    let (mut monitor, end) = (guest.monitor()?, Instant::now() + MINUTE);
    while monitor.execute("query-status", &json!({}))?["status"] != "running" {
        ensure!(Instant::now() < end, "the guest does not arrive");
        std::thread::sleep(std::time::Duration::from_millis(10)); // it sends no event here
    }
    Ok(())
}

fn moves(mode: &str) -> Result<()> {
    let Some(mut bench) = Bench::new(mode)? else { return Ok(()) };
    let share = bench.lab.path().join("share");
    begin(&mut bench.guest, &bench.devices[0], &share)?;
    for _ in 0..2 * rounds() {
        bench.go()?;
    }
    let device = &bench.devices[bench.here];
    finish(&mut bench.guest, device)?;
    sound(bench.guest.run("cat /mnt/hello; umount /mnt", MINUTE), device)?;
    sound(bench.guest.power_off(), device)?;
    let left = fs::read_dir(share)?.count();
    ensure!(left == 1, "{left} entries are left");
    bench.devices.into_iter().try_for_each(Device::terminate)
}

#[test]
fn a_guest_moves_with_a_thousand_open_files_by_their_paths() -> Result<()> {
    moves("find-paths")
}

#[test]
fn a_guest_moves_with_a_thousand_open_files_by_their_handles() -> Result<()> {
    moves("file-handles")
}
