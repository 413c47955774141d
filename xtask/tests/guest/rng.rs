//! `outboard rng` and the example device of the crate `outboard`, read as /dev/hwrng in a guest.

use crate::lab::{Lab, sound};
use anyhow::Result;
use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;
use xtask::backend::{self, Device};
use xtask::guest::qemu::Machine;

/// 64 reads of 64 bytes from the device that the kernel chose, each as one line of hex digits.
const READ: &str = "
cat /sys/class/misc/hw_random/rng_current
dd if=/dev/hwrng bs=64 count=64 iflag=fullblock 2>/dev/null | xxd -p -c 64
";

/// A guest reads from the device, reboots, reads again.
fn is_read_as_hwrng(lab: &Lab, device: &Device) -> Result<()> {
    let machine = Machine { modules: vec!["virtio_rng"], ..Machine::default() };
    let machine = machine.with_device("vhost-user-rng-pci", &device.socket);
    let mut guest = sound(machine.boot(&lab.root, lab.path()), device)?;
    for _ in 0..2 {
        let said = sound(guest.run(READ, Duration::from_secs(60)), device)?;
        let (current, digits) = said.split_once('\n').unwrap_or_default();
        assert!(current.starts_with("virtio_rng"), "the kernel reads from {current}");
        let lines: BTreeSet<_> = digits.lines().collect();
        assert_eq!(lines.len(), 64, "64 different lines of random bytes:\n{digits}");
        assert!(lines.iter().all(|line| line.len() == 128), "{digits}");
        sound(guest.reboot(), device)?;
    }
    sound(guest.power_off(), device)
}

#[test]
fn the_example_rng_is_read_as_hwrng_in_a_guest() -> Result<()> {
    let Some(lab) = Lab::open(|| backend::rng_example().map(drop))? else { return Ok(()) };
    let mut command = Command::new(backend::rng_example()?);
    command.arg(backend::socket(lab.path(), "rng"));
    is_read_as_hwrng(&lab, &Device::start(&mut command, lab.path(), "rng")?)
}

#[test]
fn our_rng_with_a_limit_is_read_as_hwrng_in_a_guest() -> Result<()> {
    let Some(lab) = Lab::open(|| backend::outboard().map(drop))? else { return Ok(()) };
    let mut command = Command::new(backend::outboard()?);
    command.args(["rng", "--max-bytes", "8192", "--period", "100", "--socket-path"]);
    command.arg(backend::socket(lab.path(), "rng"));
    let device = Device::start(&mut command, lab.path(), "rng")?;
    is_read_as_hwrng(&lab, &device)?;
    device.terminate()
}
