//! `outboard fs`, mounted in a guest with vhost-user-fs.

use crate::lab::{Lab, sound};
use anyhow::{Result, ensure};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use xtask::backend::{self, Device};
use xtask::guest::qemu::Machine;

pub(crate) const MINUTE: Duration = Duration::from_secs(60);

/// Everything a shell does with files, and what it finds.
const USE: &str = "
set -e
mount -t virtiofs share /mnt
cd /mnt
cat hello
mkdir -p a/b
dd if=/dev/urandom of=a/b/random bs=64k count=40 2>/dev/null
cp a/b/random copy
sha256sum < a/b/random > sum
mv a/b/random a/moved
ln -s moved a/link
ln a/moved hard
chmod 640 a/moved
chown 1000:1001 a/moved
truncate -s 12345 copy
touch gone; rm gone; rmdir a/b
echo one >> grows; echo two >> grows
mkfifo pipe
sha256sum < a/link
cat sum
echo $(ls -A . | sort)
cd /
umount /mnt
";

/// `outboard fs` on a directory, with further arguments.
pub(crate) fn start(lab: &Lab, share: &Path, more: &[&str]) -> Result<Device> {
    start_named(lab, "fs", share, more)
}

/// The same by another name, for a second one in the lab.
pub(crate) fn start_named(lab: &Lab, name: &str, share: &Path, more: &[&str]) -> Result<Device> {
    let mut command = Command::new(backend::outboard()?);
    command.arg("fs").arg("--socket-path").arg(backend::socket(lab.path(), name));
    command.arg("--shared-dir").arg(share).args(more);
    Device::start(&mut command, lab.path(), name)
}

/// A machine with the share under the tag "share".
pub(crate) fn machine(device: &Device, queues: u16) -> Machine {
    let machine = Machine { modules: vec!["virtiofs"], cpus: queues, ..Machine::default() };
    let kind = format!("vhost-user-fs-pci,tag=share,num-request-queues={queues}");
    machine.with_device(&kind, &device.socket)
}

/// A directory with one file in it.
pub(crate) fn shared(lab: &Lab) -> Result<PathBuf> {
    let share = lab.path().join("share");
    fs::create_dir(&share)?;
    fs::write(share.join("hello"), "from the host\n")?;
    Ok(share)
}

/// Files that are open in a guest when its VMM is killed.
const MANY: usize = 60;

/// Opens them, each by a process of its own that stays.
const OPEN_MANY: &str = "
for at in $(seq 60); do sleep 1000 < /mnt/hello 9> /mnt/open & done
while [ $(ls -l /proc/*/fd 2> /dev/null | grep -c /mnt/hello) -lt 60 ]; do sleep 0.1; done
echo x > /mnt/open
echo open
wait
";

/// Descriptors that the device's process has open.
fn descriptors(device: &Device) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{}/fd", device.pid()))?.count())
}

/// Waits until no more of them are open than that.
fn falls_to(idle: usize, device: &Device) -> Result<()> {
    let end = Instant::now() + MINUTE;
    while descriptors(device)? > idle {
        ensure!(Instant::now() < end, "{} descriptors, {idle} before", descriptors(device)?);
        std::thread::sleep(Duration::from_millis(10)); // what is closed elsewhere sends no event
    }
    Ok(())
}

/// What the host finds of what the guest made with [`USE`].
fn is_as_the_guest_left_it(share: &Path) -> Result<()> {
    let moved = share.join("a/moved").metadata()?;
    assert_eq!(moved.len(), 40 << 16);
    assert_eq!((moved.permissions().mode() & 0o777, moved.nlink()), (0o640, 2));
    assert_eq!((moved.uid(), moved.gid()), (1000, 1001));
    assert_eq!(fs::read_link(share.join("a/link"))?, Path::new("moved"));
    assert_eq!(share.join("copy").metadata()?.len(), 12345);
    assert_eq!(fs::read(share.join("copy"))?, fs::read(share.join("hard"))?[..12345]);
    assert_eq!(fs::read_to_string(share.join("grows"))?, "one\ntwo\n");
    Ok(())
}

#[test]
fn a_guest_uses_a_shared_directory_and_so_does_the_next_one() -> Result<()> {
    let Some(lab) = Lab::open(|| backend::outboard().map(drop))? else { return Ok(()) };
    let share = shared(&lab)?;
    let device = start(&lab, &share, &["--num-request-queues", "2"])?;
    let mut guest = sound(machine(&device, 2).boot(&lab.root, lab.path()), &device)?;
    let said = sound(guest.run(USE, MINUTE), &device)?;
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines[0], "from the host", "{said}");
    assert_eq!(lines[1], lines[2], "what was written is what is read: {said}");
    assert_eq!(lines[3].trim(), "a copy grows hard hello pipe sum", "{said}");
    is_as_the_guest_left_it(&share)?;
    // Its VMM is killed, with many files open; nothing of that is left, and the next one finds the device as new.
    let idle = descriptors(&device)?;
    sound(guest.start(&format!("mount -t virtiofs share /mnt{OPEN_MANY}")), &device)?;
    sound(guest.expect("open", MINUTE), &device)?;
    assert!(descriptors(&device)? > idle + MANY, "{MANY} files are open: {idle}");
    drop(guest);
    falls_to(idle, &device)?;
    let again = lab.path().join("again");
    fs::create_dir(&again)?;
    let mut guest = sound(machine(&device, 2).boot(&lab.root, &again), &device)?;
    let script = "mount -t virtiofs share /mnt && cat /mnt/open /mnt/grows";
    assert_eq!(sound(guest.run(script, MINUTE), &device)?.trim(), "x\none\ntwo");
    sound(guest.run("umount /mnt", MINUTE), &device)?;
    falls_to(idle, &device)?;
    sound(guest.power_off(), &device)?;
    device.terminate()?;
    assert!(!backend::socket(lab.path(), "fs").exists(), "the socket is removed from inside");
    Ok(())
}
