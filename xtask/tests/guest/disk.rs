//! A Debian-kernel guest in QEMU uses a vhost-user disk as a person would: formats it, fills it,
//! trims it, restarts and finds everything again. The same test runs against
//! qemu-storage-daemon, so that a fault of the guest can be told from one of our device.

use crate::lab::{Lab, sound};
use anyhow::Result;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;
use xtask::backend::{Device, Disk, allocated, check_ext4, image, outboard_block};
use xtask::guest::{Guest, qemu::Machine};

/// Bit of packed rings (virtio 1.3 §6).
const RING_PACKED: usize = 34;

/// The bound for one script: tens of seconds where two guests share two cores.
pub(crate) const LONG: Duration = Duration::from_secs(240);

/// Four writers, 16 files of 1 MiB each, on a fresh file system; the sums are taken from what
/// was written, before it goes to the disk.
pub(crate) const FILL: &str = r#"
mkfs.ext4 -q -F /dev/vda
mount -t ext4 /dev/vda /mnt
cd /mnt
cat > /tmp/writer <<'END'
for n in 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
    dd if=/dev/urandom bs=1M count=1 2>/dev/null | tee file.$1.$n | md5sum |
        sed "s/-/file.$1.$n/" >> sums.$1
done
sync
END
cpus=$(nproc)
for w in 0 1 2 3; do taskset $((1 << (w % cpus))) sh /tmp/writer $w & done
wait
cat sums.* > sums
sync
"#;

/// Reads every file back from the disk, not from memory.
pub(crate) const VERIFY: &str = "
cd /mnt
sync
echo 3 > /proc/sys/vm/drop_caches
md5sum -c sums > /tmp/verified 2>&1 || { cat /tmp/verified; exit 1; }
test $(grep -c ': OK$' /tmp/verified) = 64
";

const TRIM: &str = "
cd /mnt
dd if=/dev/urandom of=junk bs=1M count=32 2>/dev/null
sync
rm junk
sync
fstrim -v /mnt
";

/// A write to a disk that takes none, then four bytes from its middle.
const LOOK: &str = "
dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=fsync 2>/dev/null && echo written || echo refused
dd if=/dev/vda bs=4096 skip=2048 count=1 2>/dev/null | head -c 4 | xxd -p
";

/// Each way of writing once, as the driver says that the device has it.
const CACHE: &str = "
cd /sys/block/vda
for kind in 'write back' 'write through' 'write back'; do
    echo \"$kind\" > cache_type
    cat cache_type
    dd if=/dev/urandom of=/dev/vda bs=64k count=4 conv=fsync 2>/dev/null
done
";

pub(crate) const UNMOUNT: &str = "cd /; umount /mnt; sync";
pub(crate) const MOUNT: &str = "mount -t ext4 /dev/vda /mnt";

/// Runs the parts as one script.
pub(crate) fn script(guest: &mut Guest, device: &Device, parts: &[&str]) -> Result<String> {
    let begun = std::time::Instant::now();
    let said = sound(guest.run(&parts.join("\n"), LONG), device)?;
    eprintln!("script: {:.1?}", begun.elapsed());
    Ok(said)
}

fn formats_fills_trims_restarts_and_finds_all(disk: Disk, queues: u16, rings: &str) -> Result<()> {
    let Some(lab) = Lab::for_disk(disk)? else { return Ok(()) };
    let image = image(lab.path(), 256)?;
    let device = disk.serve(&lab.root, lab.path(), &image, queues)?;
    let machine = Machine { cpus: queues, ..Machine::default() };
    let blk = format!("vhost-user-blk-pci,num-queues={queues}{rings}");
    let machine = machine.with_device(&blk, &device.socket);
    let mut guest = sound(machine.boot(&lab.root, lab.path()), &device)?;

    let found = script(&mut guest, &device, &["ls /sys/block/vda/mq | wc -l"])?;
    assert_eq!(found.trim(), queues.to_string(), "queues that the guest's driver uses");
    let bits = script(&mut guest, &device, &["cat /sys/block/vda/device/features"])?;
    let packed = bits.trim().as_bytes().get(RING_PACKED) == Some(&b'1');
    assert_eq!(packed, !rings.is_empty(), "bits that the guest's driver took: {bits}");
    script(&mut guest, &device, &[FILL, VERIFY])?;
    let calls = script(&mut guest, &device, &["grep virtio.-req /proc/interrupts"])?;
    assert_every_queue_interrupted(&calls, queues);

    let full = allocated(&image)?;
    assert!(full >= 64 << 20, "the image holds what was written: {full}");
    script(&mut guest, &device, &[TRIM])?;
    let trimmed = allocated(&image)?;
    assert!(trimmed < full + (16 << 20), "trimmed blocks became holes: {full}, then {trimmed}");

    script(&mut guest, &device, &[UNMOUNT])?;
    sound(guest.reboot(), &device)?;
    script(&mut guest, &device, &[MOUNT, VERIFY, UNMOUNT])?;
    sound(guest.power_off(), &device)?;
    device.terminate()?;
    check_ext4(&lab.root, &image)
}

/// `/proc/interrupts`: number, one count for each CPU, …, name.
fn assert_every_queue_interrupted(table: &str, queues: u16) {
    let counts = table.lines().map(|line| {
        let counts =
            line.split_ascii_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok());
        counts.sum::<u64>()
    });
    let counts: Vec<_> = counts.collect();
    assert_eq!(counts.len(), usize::from(queues), "{table}");
    assert!(counts.iter().all(|count| *count > 0), "{table}");
}

#[test]
fn a_guest_finds_its_files_again_after_a_reboot_with_one_queue() -> Result<()> {
    formats_fills_trims_restarts_and_finds_all(Disk::ours(), 1, "")
}

#[test]
fn a_guest_finds_its_files_again_after_a_reboot_with_four_queues() -> Result<()> {
    formats_fills_trims_restarts_and_finds_all(Disk::ours(), 4, "")
}

#[test]
fn a_guest_finds_its_files_again_after_a_reboot_on_packed_rings() -> Result<()> {
    formats_fills_trims_restarts_and_finds_all(Disk::ours(), 2, ",packed=on")
}

#[test]
fn the_same_guest_is_content_with_qemu_storage_daemon() -> Result<()> {
    formats_fills_trims_restarts_and_finds_all(Disk::StorageDaemon, 4, "")
}

#[test]
fn a_read_only_disk_shows_its_serial_and_takes_no_write() -> Result<()> {
    let Some(lab) = Lab::for_disk(Disk::Outboard)? else { return Ok(()) };
    let image = image(lab.path(), 16)?;
    std::fs::OpenOptions::new().write(true).open(&image)?.write_all_at(&[0xa5; 4096], 8 << 20)?;
    let device = outboard_block(lab.path(), &image, &["--read-only", "--serial", "spare wheel"])?;
    let machine = Machine::default().with_device("vhost-user-blk-pci", &device.socket);
    let mut guest = sound(machine.boot(&lab.root, lab.path()), &device)?;
    let said = script(
        &mut guest,
        &device,
        &[
            "cat /sys/block/vda/serial; echo",
            "cat /sys/block/vda/ro",
            "cat /sys/block/vda/size",
            LOOK,
        ],
    )?;
    let lines: Vec<_> = said.lines().filter(|line| !line.is_empty()).collect();
    assert_eq!(lines, ["spare wheel", "1", "32768", "refused", "a5a5a5a5"]);
    sound(guest.power_off(), &device)?;
    device.terminate()
}

#[test]
fn the_guest_turns_the_write_cache_off_and_on_again() -> Result<()> {
    let Some(lab) = Lab::for_disk(Disk::ours())? else { return Ok(()) };
    let image = image(lab.path(), 16)?;
    let device = Disk::ours().serve(&lab.root, lab.path(), &image, 1)?;
    let machine = Machine::default().with_device("vhost-user-blk-pci", &device.socket);
    let mut guest = sound(machine.boot(&lab.root, lab.path()), &device)?;
    let said = script(&mut guest, &device, &[CACHE])?;
    assert_eq!(said, "write back\nwrite through\nwrite back\n");
    sound(guest.power_off(), &device)?;
    device.terminate()
}
