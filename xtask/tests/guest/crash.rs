//! A device that is killed under a guest and started again: QEMU connects anew (`reconnect-ms`), gives the
//! in-flight region back, and the guest notices nothing ([state], Build 1 and 2).
//!
//! `OUTBOARD_ROUNDS=100` kills it so many times.

use crate::disk::{FILL, LONG, UNMOUNT, VERIFY, script};
use crate::lab::{Lab, sound};
use anyhow::{Result, ensure};
use std::path::Path;
use std::time::{Duration, Instant};
use xtask::backend::{check_ext4, image, outboard_block, socket};
use xtask::guest::qemu::Machine;

/// Six writers that sync each file, and readers of the files of the beginning past the guest's memory, so that
/// requests are in flight at any moment and finish out of order; beside them rounds of files that are read back and
/// compared. Ends at a word over the agent's port.
const LOAD: &str = r#"
rm -f /tmp/word
{ IFS= read -r word < /dev/ttyS1; echo "$word" > /tmp/word; } &
cd /mnt
for w in 1 2 3 4 5 6; do
    while [ ! -e /tmp/word ]; do
        dd if=/dev/zero of=load.$w bs=4k count=64 conv=fsync 2>/dev/null
    done &
done
while [ ! -e /tmp/word ]; do
    for f in file.*; do cat $f > /dev/null; done
    echo 1 > /proc/sys/vm/drop_caches
done &
n=0
while [ ! -e /tmp/word ]; do
    dd if=/dev/urandom bs=64k count=8 2>/dev/null | tee crash | md5sum | sed "s/-/crash/" > /tmp/crash
    sync crash
    echo 3 > /proc/sys/vm/drop_caches
    md5sum -c /tmp/crash > /tmp/verified 2>&1 || { cat /tmp/verified; exit 1; }
    n=$((n + 1))
    echo "round $n"
done
wait
cd /
! dmesg | grep -i 'i/o error' || exit 1
echo "right after $n"
"#;

/// A guest's disk behind a socket that QEMU connects to again.
fn machine(socket: &Path, rings: &str) -> Machine {
    let chardev = format!("socket,id=disk,path={},reconnect-ms=20", socket.display());
    let device = format!("vhost-user-blk-pci,num-queues=2,chardev=disk{rings}");
    let machine = Machine { cpus: 2, ..Machine::default() };
    machine.with(&["-chardev", &chardev, "-device", &device])
}

fn rounds() -> usize {
    std::env::var("OUTBOARD_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(5)
}

#[test]
fn c7_a_device_killed_under_a_guest_that_writes_and_verifies_is_followed_by_another() -> Result<()>
{
    killed_and_followed("")
}

#[test]
fn c7_a_device_killed_under_a_guest_on_packed_rings_is_followed_by_another() -> Result<()> {
    killed_and_followed(",packed=on")
}

fn killed_and_followed(rings: &str) -> Result<()> {
    let Some(lab) = Lab::open(|| xtask::backend::outboard().map(drop))? else { return Ok(()) };
    let disk = image(lab.path(), 256)?;
    let serve = || outboard_block(lab.path(), &disk, &["--num-queues", "2", "--direct"]);
    let mut device = serve()?;
    let guest = machine(&socket(lab.path(), "disk"), rings).boot(&lab.root, lab.path());
    let mut guest = sound(guest, &device)?;
    script(&mut guest, &device, &[FILL])?;
    sound(guest.start(LOAD), &device)?;
    let mut slowest = Duration::ZERO;
    for round in 1..=rounds() {
        // In the midst of a round, each time somewhere else.
        sound(guest.expect(&format!("round {round}"), LONG), &device)?;
        std::thread::sleep(Duration::from_millis(37 * u64::try_from(round % 13)?));
        let begun = Instant::now();
        drop(device);
        device = serve()?;
        slowest = slowest.max(begun.elapsed());
    }
    guest.say("enough")?;
    let said = sound(guest.finish(LONG), &device)?;
    ensure!(said.contains("right after"), "{said}");
    eprintln!("{} kills, the slowest start took {slowest:.1?}", rounds());
    script(&mut guest, &device, &[VERIFY, UNMOUNT])?;
    sound(guest.power_off(), &device)?;
    device.terminate()?;
    check_ext4(&lab.root, &disk)
}
