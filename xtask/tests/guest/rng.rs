//! `outboard rng` and the example device of the crate `outboard`, read as /dev/hwrng in a guest.

use crate::lab::{Lab, sound};
use anyhow::{Result, ensure};
use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, Instant};
use xtask::backend::{self, Device};
use xtask::guest::qemu::Machine;

const LONG: Duration = Duration::from_secs(120);

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

/// Reads on and on, and says so; ends at a word over the agent's port.
const READ_ON: &str = r#"
rm -f /tmp/word
{ IFS= read -r word < /dev/ttyS1; echo "$word" > /tmp/word; } &
n=0
while [ ! -e /tmp/word ]; do
    test $(dd if=/dev/hwrng bs=64 count=4 iflag=fullblock 2>/dev/null | wc -c) -eq 256
    n=$((n + 1))
    echo "round $n"
done
echo "right after $n"
"#;

/// 64 bytes in each period: what the guest reads takes its time.
const LIMIT: [&str; 5] = ["rng", "--max-bytes", "64", "--period", "20"];

/// A kill is not played here: QEMU 10 ends itself when a device of this kind comes back (`vhost_dev_start: Assertion
/// hdev->vhost_ops failed`), and refuses to migrate with one. Both are played by our own front-end.
#[test]
fn a_guest_reads_on_while_its_source_of_entropy_is_upgraded_and_gets_no_more_than_the_limit()
-> Result<()> {
    let Some(lab) = Lab::open(|| backend::outboard().map(drop))? else { return Ok(()) };
    let control = lab.path().join("ctl");
    let mut command = Command::new(backend::outboard()?);
    command.args(LIMIT).arg("--control").arg(&control);
    command.arg("--socket-path").arg(backend::socket(lab.path(), "rng"));
    let mut device = Device::start(&mut command, lab.path(), "rng")?;
    let machine = Machine { modules: vec!["virtio_rng"], ..Machine::default() };
    let machine = machine.with_device("vhost-user-rng-pci", &device.socket);
    let mut guest = sound(machine.boot(&lab.root, lab.path()), &device)?;
    let begun = Instant::now();
    sound(guest.start(READ_ON), &device)?;
    for round in 1..=3 {
        sound(guest.expect(&format!("round {}", 2 * round), LONG), &device)?;
        let mut command = Command::new(backend::outboard()?);
        command.args(LIMIT).arg("--take-over").arg(&control);
        let heir = Device::start(&mut command, lab.path(), "rng")?;
        std::mem::replace(&mut device, heir).ended()?;
    }
    guest.say("enough")?;
    let said = sound(guest.finish(LONG), &device)?;
    ensure!(said.contains("right after"), "{said}");
    // 6 times 256 bytes and more, 64 in a period; each process begins one, and the guest may have had a few at hand.
    let least = Duration::from_millis(20) * (6 * 256 / 64 - 12);
    ensure!(begun.elapsed() >= least, "{:?} for what takes {least:?}", begun.elapsed());
    sound(guest.power_off(), &device)?;
    device.terminate()
}
