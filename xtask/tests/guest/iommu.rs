//! A guest that keeps its disk behind an IOMMU (VIRTIO_F_ACCESS_PLATFORM): every address of rings and
//! requests is translated by QEMU's emulated Intel IOMMU or by virtio-iommu, which answer our device's
//! misses and invalidate what the guest unmaps.

use crate::disk::{MOUNT, UNMOUNT, script};
use crate::lab::{Lab, sound};
use anyhow::Result;
use xtask::backend::{Disk, check_ext4, image};
use xtask::guest::qemu::Machine;

/// Eight files of 1 MiB, the sums taken before they go to the disk.
const FILL: &str = "
mkfs.ext4 -q -F /dev/vda
mount -t ext4 /dev/vda /mnt
cd /mnt
for n in 0 1 2 3 4 5 6 7; do
    dd if=/dev/urandom bs=1M count=1 2>/dev/null | tee file.$n | md5sum | sed s/-/file.$n/ >> sums
done
sync
";

/// Reads every file back from the disk, not from memory.
const VERIFY: &str = "
cd /mnt
sync
echo 3 > /proc/sys/vm/drop_caches
md5sum -c sums > /tmp/verified 2>&1 || { cat /tmp/verified; exit 1; }
test $(grep -c ': OK$' /tmp/verified) = 8
";

/// Where the guest's kernel says that the disk's requests are translated.
const TRANSLATED: &str = "
group=$(readlink -f /sys/block/vda/device/../iommu_group)
cat $group/type
";

/// The IOMMU, what the kernel has to be told, the queues of the disk.
fn mounts_fills_reboots_and_verifies(
    iommu: &str,
    kernel: &[&'static str],
    modules: &[&'static str],
    queues: u16,
) -> Result<()> {
    let Some(lab) = Lab::for_disk(Disk::Outboard)? else { return Ok(()) };
    let image = image(lab.path(), 256)?;
    let device = Disk::Outboard.serve(&lab.root, lab.path(), &image, queues)?;
    let (kernel, modules) = (kernel.to_vec(), modules.to_vec());
    let machine = Machine { cpus: queues, kernel, modules, ..Machine::default() };
    let blk = format!(
        "vhost-user-blk-pci,num-queues={queues},disable-legacy=on,iommu_platform=on,ats=on"
    );
    let machine = machine.with(&["-device", iommu]).with_device(&blk, &device.socket);
    let mut guest = sound(machine.boot(&lab.root, lab.path()), &device)?;
    let kind = script(&mut guest, &device, &[TRANSLATED])?;
    assert!(kind.starts_with("DMA"), "the disk is not behind the IOMMU: {kind}");
    let begun = std::time::Instant::now();
    script(&mut guest, &device, &[FILL, VERIFY, UNMOUNT])?;
    sound(guest.reboot(), &device)?;
    script(&mut guest, &device, &[MOUNT, VERIFY, UNMOUNT])?;
    eprintln!("{iommu}, {queues} queues: {:.1?}", begun.elapsed());
    sound(guest.power_off(), &device)?;
    let said = device.said();
    assert!(said.contains("IOMMU on"), "{said}");
    assert!(!said.contains("retired"), "{said}");
    device.terminate()?;
    check_ext4(&lab.root, &image)
}

#[test]
fn a_guest_behind_an_intel_iommu_finds_its_files_again() -> Result<()> {
    let iommu = "intel-iommu,intremap=off,device-iotlb=on,caching-mode=on";
    mounts_fills_reboots_and_verifies(iommu, &["intel_iommu=on"], &[], 1)
}

#[test]
fn a_guest_behind_an_intel_iommu_that_unmaps_at_once_finds_its_files_again() -> Result<()> {
    let iommu = "intel-iommu,intremap=off,device-iotlb=on,caching-mode=on";
    mounts_fills_reboots_and_verifies(iommu, &["intel_iommu=on", "iommu.strict=1"], &[], 4)
}

#[test]
fn a_guest_behind_a_virtio_iommu_finds_its_files_again() -> Result<()> {
    mounts_fills_reboots_and_verifies("virtio-iommu-pci", &[], &["virtio_iommu"], 1)
}
