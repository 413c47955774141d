//! A User-mode Linux guest: a vhost-user front end written by neither QEMU nor us. Its
//! SET_MEM_TABLE says one region and carries a body for two.

use crate::lab::{Lab, sound};
use anyhow::Result;
use std::time::Duration;
use xtask::backend::{Disk, check_ext4, image};
use xtask::guest::uml;

const LONG: Duration = Duration::from_secs(120);

/// The virtio device number of a disk (virtio 1.3, section 5).
const BLOCK: u32 = 2;

const FILL: &str = "
mkfs.ext4 -q -F /dev/vda
mount -t ext4 /dev/vda /mnt
cd /mnt
for n in 0 1 2 3 4 5 6 7; do dd if=/dev/urandom of=file.$n bs=1M count=1 2>/dev/null; done
md5sum file.* > sums
cd /
umount /mnt
";

const VERIFY: &str = "
mount -t ext4 /dev/vda /mnt
cd /mnt
md5sum -c sums
cd /
umount /mnt
";

fn mounts_and_verifies(disk: Disk) -> Result<()> {
    let Some(lab) = Lab::for_disk(disk)? else { return Ok(()) };
    let image = image(lab.path(), 64)?;
    let device = disk.serve(&lab.root, lab.path(), &image, 1)?;
    // Two guests, one after the other, on one device process: the second is a reconnect.
    for script in [FILL, VERIFY] {
        let devices = [(device.socket.as_path(), BLOCK)];
        let mut guest = sound(uml::boot(&lab.root, lab.path(), &devices), &device)?;
        let said = sound(guest.run(script, LONG), &device)?;
        if script == VERIFY {
            assert_eq!(said.lines().filter(|line| line.ends_with(": OK")).count(), 8, "{said}");
        }
        sound(guest.power_off(), &device)?;
    }
    device.terminate()?;
    check_ext4(&lab.root, &image)
}

#[test]
fn a_user_mode_linux_guest_mounts_our_disk_and_verifies() -> Result<()> {
    mounts_and_verifies(Disk::ours())
}

#[test]
fn a_user_mode_linux_guest_is_content_with_qemu_storage_daemon() -> Result<()> {
    mounts_and_verifies(Disk::StorageDaemon)
}
