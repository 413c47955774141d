//! What a machine does to a disk while the guest writes to it: a reset, a pause, more memory.

use crate::disk::{FILL, LONG, MOUNT, UNMOUNT, VERIFY, script};
use crate::lab::{Lab, sound};
use anyhow::{Result, ensure};
use serde_json::json;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use xtask::backend::{Device, Disk, check_ext4, image};
use xtask::guest::{Guest, qemu::Machine};

/// Writes without end, each file synced; the first line says that it has begun.
const LOAD: &str = "
echo writing
while :; do dd if=/dev/zero of=/mnt/load bs=64k count=200 conv=fsync 2>/dev/null; done
";

struct Bench {
    lab: Lab,
    image: PathBuf,
    device: Device,
    guest: Guest,
}

impl Bench {
    /// A guest with two queues and a filled disk that is not mounted.
    fn new(machine: Machine) -> Result<Option<Self>> {
        let Some(lab) = Lab::for_disk(Disk::ours())? else { return Ok(None) };
        let image = image(lab.path(), 256)?;
        let device = Disk::ours().serve(&lab.root, lab.path(), &image, 2)?;
        let machine = machine.with_device("vhost-user-blk-pci,num-queues=2", &device.socket);
        let mut guest = sound(machine.boot(&lab.root, lab.path()), &device)?;
        script(&mut guest, &device, &[FILL, UNMOUNT])?;
        Ok(Some(Self { lab, image, device, guest }))
    }

    fn start_load(&mut self) -> Result<()> {
        sound(self.guest.start(&[MOUNT, LOAD].join("\n")), &self.device)?;
        sound(self.guest.expect("writing", LONG), &self.device)
    }

    /// The files of the beginning are all there, and the file system is clean.
    fn verify(mut self) -> Result<()> {
        script(&mut self.guest, &self.device, &[MOUNT, VERIFY, UNMOUNT])?;
        sound(self.guest.power_off(), &self.device)?;
        self.device.terminate()?;
        check_ext4(&self.lab.root, &self.image)
    }
}

fn two_cpus() -> Machine {
    Machine { cpus: 2, ..Machine::default() }
}

#[test]
fn a_machine_reset_in_the_middle_of_writes_leaves_a_disk_that_mounts() -> Result<()> {
    let Some(mut bench) = Bench::new(two_cpus())? else { return Ok(()) };
    for _ in 0..2 {
        bench.start_load()?;
        sound(bench.guest.reset(), &bench.device)?;
    }
    bench.verify()
}

#[test]
fn a_guest_that_is_paused_in_the_middle_of_writes_goes_on_where_it_was() -> Result<()> {
    let Some(mut bench) = Bench::new(two_cpus())? else { return Ok(()) };
    let rounds = "for n in 1 2 3 4 5 6 7 8; do \
                  dd if=/dev/urandom of=/mnt/round.$n bs=64k count=32 conv=fsync 2>/dev/null; \
                  echo round $n; done";
    let sums = "cd /mnt; md5sum round.* >> sums; mv sums s; grep file s > sums; cd /; umount /mnt";
    sound(bench.guest.start(&[MOUNT, rounds, sums].join("\n")), &bench.device)?;
    for round in 1..=6 {
        sound(bench.guest.expect(&format!("round {round}"), LONG), &bench.device)?;
        let mut monitor = bench.guest.monitor()?;
        sound(monitor.execute("stop", &json!({})), &bench.device)?;
        sound(monitor.execute("cont", &json!({})), &bench.device)?;
    }
    sound(bench.guest.finish(LONG), &bench.device)?;
    bench.verify()
}

#[test]
fn memory_is_plugged_in_used_for_requests_and_taken_away_while_the_guest_writes() -> Result<()> {
    let mut machine = two_cpus();
    machine.hot_plug = Some(512);
    let Some(mut bench) = Bench::new(machine)? else { return Ok(()) };
    // Movable: so that it can be taken away again.
    let online = "echo online_movable > /sys/devices/system/memory/auto_online_blocks";
    script(&mut bench.guest, &bench.device, &[online])?;
    bench.guest.start(&[MOUNT, USE_MORE_MEMORY].join("\n"))?;
    sound(bench.guest.expect("writing", LONG), &bench.device)?;
    let mut monitor = bench.guest.monitor()?;
    let backend = json!({ "qom-type": "memory-backend-memfd", "id": "more", "size": 256 << 20,
        "share": true });
    sound(monitor.execute("object-add", &backend), &bench.device)?;
    let module = json!({ "driver": "pc-dimm", "id": "module", "memdev": "more" });
    sound(monitor.execute("device_add", &module), &bench.device)?;
    sound(bench.guest.expect("used", LONG), &bench.device)?;
    sound(monitor.execute("device_del", &json!({ "id": "module" })), &bench.device)?;
    let end = Instant::now() + LONG;
    while monitor.execute("query-memory-devices", &json!({}))? != json!([]) {
        ensure!(Instant::now() < end, "the guest keeps the memory\n{}", bench.device.said());
        std::thread::sleep(Duration::from_millis(100)); // the guest decides when
    }
    sound(bench.guest.finish(LONG), &bench.device)?;
    bench.verify()
}

/// Writes until there is more memory than the guest began with; then a file larger than what was
/// there before goes through memory to the disk and back, so that the new module takes part;
/// writes on until the module is gone.
const USE_MORE_MEMORY: &str = "
total() { sed -n 's/^MemTotal: *\\([0-9]*\\).*/\\1/p' /proc/meminfo; }
load() { dd if=/dev/urandom of=/mnt/load bs=64k count=16 conv=fsync 2>/dev/null; }
before=$(total)
echo writing
n=0
while [ $(total) -le $((before + 200000)) ]; do load; n=$((n + 1)); test $n -lt 2000; done
mkdir /tmp/big
mount -t tmpfs -o size=400m tmpfs /tmp/big
dd if=/dev/urandom of=/tmp/big/x bs=1M count=140 2>/dev/null
dd if=/tmp/big/x of=/mnt/load bs=1M conv=fsync 2>/dev/null
sum=$(md5sum < /tmp/big/x)
rm /tmp/big/x
echo 3 > /proc/sys/vm/drop_caches
test \"$(md5sum < /mnt/load)\" = \"$sum\"
echo 3 > /proc/sys/vm/drop_caches
echo used
n=0
while [ $(total) -gt $((before + 10000)) ]; do load; n=$((n + 1)); test $n -lt 2000; done
for n in 1 2 3 4; do load; done
rm /mnt/load
cd /
umount /mnt
";
