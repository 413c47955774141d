//! What a device and QEMU tell each other beside requests: a changed configuration reaches the
//! guest, a reset of the machine reaches the device.
//!
//! What QEMU 10.0.2 has not cannot be tried with it: shared-memory regions (SHMEM), GPU_MAP and
//! EXTERNAL_MAP, in-band notifications. Linux resets no single ring of a disk.

use crate::lab::{Lab, sound};
use anyhow::Result;
use std::process::Command;
use std::time::Duration;
use xtask::backend::{self, Device, Disk};
use xtask::guest::qemu::Machine;

const SOON: Duration = Duration::from_secs(60);

/// Its size, a write, and its size once the guest's kernel has heard that it grew.
const GROW: &str = "
size() { cat /sys/block/vda/size; }
size
dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=fsync 2>/dev/null
n=0
while [ $(size) = 32768 ]; do n=$((n + 1)); test $n -lt 300; sleep 0.1; done
size
dd if=/dev/vda bs=512 skip=32768 count=1 2>/dev/null | wc -c
";

#[test]
fn a_guest_sees_a_disk_grow_under_it() -> Result<()> {
    let Some(lab) = Lab::open(|| backend::growing_example().map(drop))? else { return Ok(()) };
    let mut command = Command::new(backend::growing_example()?);
    command.arg(backend::socket(lab.path(), "growing"));
    let device = Device::start(&mut command, lab.path(), "growing")?;
    let machine = Machine::default();
    let machine = machine.with_device("vhost-user-blk-pci,num-queues=1", &device.socket);
    let mut guest = sound(machine.boot(&lab.root, lab.path()), &device)?;
    let said = sound(guest.run(GROW, SOON), &device)?;
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines.first(), Some(&"32768"), "{said}");
    let grown: u64 = lines.get(1).and_then(|line| line.parse().ok()).unwrap_or(0);
    assert!(grown > 32768 && grown.is_multiple_of(2048), "{said}");
    assert_eq!(lines.last(), Some(&"512"), "a sector that was not there before: {said}");
    sound(guest.power_off(), &device)
}

/// The names of the messages in the device's log.
fn messages(lab: &Lab) -> Result<Vec<String>> {
    let log = std::fs::read_to_string(lab.path().join("disk.log"))?;
    let name = |line: &str| line.split_once("DEBUG ").map(|(_, name)| name.trim().to_owned());
    Ok(log.lines().filter_map(name).collect())
}

/// Where the names stand in this order, with others between them.
fn stands(all: &[String], order: &[&str]) -> bool {
    let mut all = all.iter();
    order.iter().all(|wanted| all.any(|name| name == wanted))
}

#[test]
fn a_machine_reset_tells_the_device_its_status_and_resets_it() -> Result<()> {
    let Some(lab) = Lab::for_disk(Disk::Outboard)? else { return Ok(()) };
    let image = backend::image(lab.path(), 16)?;
    let mut command = Command::new(backend::outboard()?);
    command.args(["block", "--socket-path"]).arg(backend::socket(lab.path(), "disk")).arg(&image);
    let device = Device::start(command.env("OUTBOARD_LOG", "debug"), lab.path(), "disk")?;
    let machine = Machine::default().with_device("vhost-user-blk-pci", &device.socket);
    let mut guest = sound(machine.boot(&lab.root, lab.path()), &device)?;
    let chosen = "cd /sys/block/vda; echo 'write through' > cache_type; cat cache_type";
    assert_eq!(sound(guest.run(chosen, SOON), &device)?, "write through\n");
    let before = messages(&lab)?.len();
    sound(guest.reset(), &device)?;
    let since = messages(&lab)?.split_off(before);
    let order = ["GET_VRING_BASE", "SET_STATUS", "RESET_DEVICE", "SET_FEATURES", "SET_VRING_KICK"];
    assert!(stands(&since, &order), "{since:?}");
    // QEMU shows what it has read last; the device keeps to that (its own tests say so).
    let shown = sound(guest.run("cat /sys/block/vda/cache_type", SOON), &device)?;
    assert_eq!(shown, "write through\n");
    sound(guest.power_off(), &device)?;
    device.terminate()
}
