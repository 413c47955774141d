//! QEMU migrates a guest that writes and verifies, between two processes of our device on one image
//! ([state], Build 4 to 6 and 8): the dirty log, the image lock, the rings' places, postcopy.
//!
//! `OUTBOARD_ROUNDS=20` moves it there and back so many times.

use crate::disk::{FILL, LONG, UNMOUNT, VERIFY, script};
use crate::lab::{Lab, sound};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use xtask::backend::{Device, check_ext4, image, outboard_block_named};
use xtask::guest::{Guest, qemu::Machine, qmp::Monitor};

/// Writes and syncs files in turn, their sums taken before they go to the disk, and reads the ones
/// before back from the disk, until a word comes over the agent's port; then once more all of them.
/// The files of the beginning are read once while the guest moves and compared afterwards as they
/// stand in its memory: what the device wrote there has to come along. Silent meanwhile: a line
/// might be cut by the move.
const LOAD: &str = r#"
rm -f /tmp/word
{ IFS= read -r word < /dev/ttyS1; echo "$word" > /tmp/word; } &
cd /mnt
echo 3 > /proc/sys/vm/drop_caches
{ for f in file.*; do cat $f > /dev/null; sleep 0.05; done; } &
echo writing
n=0
verify() { cat $@ | md5sum -c > /tmp/verified 2>&1 || { grep -v OK /tmp/verified; exit 1; } }
while [ $n -lt 16 ] || [ ! -e /tmp/word ]; do
    f=moving.$((n % 8))
    dd if=/dev/urandom bs=64k count=8 2>/dev/null | tee $f | md5sum | sed "s/-/$f/" > /tmp/$f
    sync $f
    [ $n = 0 ] || verify /tmp/moving.$(((n - 1) % 8))
    n=$((n + 1))
done
wait
verify sums
sync
echo 3 > /proc/sys/vm/drop_caches
verify /tmp/moving.*
cd /
echo "right after $n"
"#;

/// Two devices on one image, and a guest on the first.
struct Bench {
    lab: Lab,
    image: PathBuf,
    devices: [Device; 2],
    /// On which of them the guest is.
    here: usize,
    guest: Guest,
    moves: usize,
}

impl Bench {
    /// Devices with these arguments.
    fn new(arguments: &[&str]) -> Result<Option<Self>> {
        let Some(lab) = Lab::open(|| xtask::backend::outboard().map(drop))? else {
            return Ok(None);
        };
        let image = image(lab.path(), 256)?;
        let arguments = [&["--num-queues", "2"], arguments].concat();
        let serve = |name| outboard_block_named(name, lab.path(), &image, &arguments);
        let devices = [serve("disk0")?, serve("disk1")?];
        let guest = machine(&devices[0]).boot(&lab.root, &folder(&lab, 0)?);
        let mut guest = sound(guest, &devices[0])?;
        script(&mut guest, &devices[0], &[FILL])?;
        Ok(Some(Self { lab, image, devices, here: 0, guest, moves: 0 }))
    }

    fn start_load(&mut self) -> Result<()> {
        sound(self.guest.start(LOAD), &self.devices[self.here])?;
        sound(self.guest.expect("writing", LONG), &self.devices[self.here])
    }

    /// The guest is told to stop writing; it looks at everything it wrote.
    fn finish_load(&mut self) -> Result<()> {
        self.guest.say("enough")?;
        let said = sound(self.guest.finish(LONG), &self.devices[self.here])?;
        ensure!(said.contains("right after"), "{said}");
        eprintln!("{}", said.trim());
        Ok(())
    }

    /// A QEMU on the other device that waits for the guest, and where it listens.
    fn other_side(&mut self) -> Result<(Guest, PathBuf)> {
        self.moves += 1;
        let dir = folder(&self.lab, self.moves)?;
        let (device, stream) = (&self.devices[1 - self.here], dir.join("stream"));
        let waiting = machine(device).receive(&self.lab.root, &dir, &stream);
        Ok((sound(waiting, device)?, stream))
    }

    /// The guest goes to the other device.
    fn go(&mut self) -> Result<()> {
        let (there, stream) = self.other_side()?;
        let begun = Instant::now();
        let mut monitor = self.guest.monitor()?;
        // Slow enough for several passes over the memory while the guest runs.
        let bounds = json!({ "downtime-limit": 300, "max-bandwidth": 48 << 20 });
        monitor.execute("migrate-set-parameters", &bounds)?;
        monitor.execute("migrate", &json!({ "uri": format!("unix:{}", stream.display()) }))?;
        let done = sound(outcome(&mut monitor), &self.devices[1 - self.here])?;
        ensure!(done["status"] == "completed", "{done}\n{}", self.devices[self.here].said());
        let passes = done["ram"]["dirty-sync-count"].as_u64().unwrap_or(0);
        let (took, pause) = (begun.elapsed(), &done["downtime"]);
        eprintln!("moved in {took:.1?}: {passes} passes over memory, downtime {pause} ms");
        ensure!(passes > 1, "memory was copied while the guest stood still: {done}");
        self.guest = there;
        self.here = 1 - self.here;
        Ok(())
    }

    /// The same as postcopy: the guest goes on over there while most of its memory is still here.
    fn go_ahead(&mut self) -> Result<()> {
        let (there, stream) = self.other_side()?;
        let mut monitor = self.guest.monitor()?;
        let postcopy = json!({ "capabilities": [{ "capability": "postcopy-ram", "state": true }] });
        there.monitor()?.execute("migrate-set-capabilities", &postcopy)?;
        monitor.execute("migrate-set-capabilities", &postcopy)?;
        // Too slow for an end, while the guest writes; then as fast as it goes.
        monitor.execute("migrate-set-parameters", &json!({ "max-bandwidth": 4 << 20 }))?;
        monitor.execute("migrate", &json!({ "uri": format!("unix:{}", stream.display()) }))?;
        under_way(&mut monitor)?;
        monitor.execute("migrate-start-postcopy", &json!({}))?;
        let device = &self.devices[1 - self.here];
        let done = sound(outcome(&mut monitor), device)?;
        ensure!(done["status"] == "completed", "{done}\n{}", device.said());
        let asked = done["ram"]["postcopy-requests"].as_u64().unwrap_or(0);
        ensure!(asked > 0, "no page was asked for: {done}");
        let said = device.said();
        for line in ["guest memory comes as it is touched", "all of guest memory has come"] {
            ensure!(said.contains(line), "the device was not told of postcopy: {said}");
        }
        eprintln!("moved: {asked} pages were asked for, downtime {} ms", done["downtime"]);
        self.guest = there;
        self.here = 1 - self.here;
        Ok(())
    }

    fn verify(mut self) -> Result<()> {
        let device = &self.devices[self.here];
        script(&mut self.guest, device, &[VERIFY, UNMOUNT])?;
        sound(self.guest.power_off(), device)?;
        for device in self.devices {
            device.terminate()?;
        }
        check_ext4(&self.lab.root, &self.image)
    }
}

fn machine(device: &Device) -> Machine {
    let machine = Machine { cpus: 2, memory: 192, ..Machine::default() };
    machine.with_device("vhost-user-blk-pci,num-queues=2", &device.socket)
}

pub(crate) fn folder(lab: &Lab, number: usize) -> Result<PathBuf> {
    let dir = lab.path().join(format!("qemu{number}"));
    std::fs::create_dir(&dir)?;
    Ok(dir)
}

/// Waits until some of the memory has been sent.
fn under_way(monitor: &mut Monitor) -> Result<()> {
    let end = Instant::now() + LONG;
    loop {
        let now = monitor.execute("query-migrate", &json!({}))?;
        if now["ram"]["transferred"].as_u64().unwrap_or(0) > 4 << 20 {
            ensure!(now["status"] == "active", "{now}");
            return Ok(());
        }
        ensure!(Instant::now() < end, "the migration does not begin: {now}");
        std::thread::sleep(Duration::from_millis(20)); // it sends no event here
    }
}

/// How a migration ends.
pub(crate) fn outcome(monitor: &mut Monitor) -> Result<Value> {
    let end = Instant::now() + LONG;
    loop {
        let now = monitor.execute("query-migrate", &json!({}))?;
        let status = now["status"].as_str().context("a migration without a status")?;
        if matches!(status, "completed" | "failed" | "cancelled") {
            return Ok(now);
        }
        ensure!(Instant::now() < end, "the migration does not end: {now}");
        std::thread::sleep(Duration::from_millis(20)); // its end sends no event here
    }
}

pub(crate) fn rounds() -> usize {
    std::env::var("OUTBOARD_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

#[test]
fn a_guest_moves_there_and_back_while_it_writes_and_verifies() -> Result<()> {
    let Some(mut bench) = Bench::new(&[])? else { return Ok(()) };
    for _ in 0..2 * rounds() {
        bench.start_load()?;
        bench.go()?;
        bench.finish_load()?;
    }
    bench.verify()
}

// Postcopy is not for memory slots (vhost-user, "Postcopy migration").
#[test]
fn a_guest_moves_ahead_of_its_memory_and_the_device_asks_for_the_pages_that_it_needs() -> Result<()>
{
    let Some(mut bench) = Bench::new(&["--without", "CONFIGURE_MEM_SLOTS"])? else {
        return Ok(());
    };
    for _ in 0..2 {
        bench.start_load()?;
        bench.go_ahead()?;
        bench.finish_load()?;
    }
    bench.verify()
}

#[test]
fn a_guest_goes_on_when_the_other_side_is_killed_in_mid_migration() -> Result<()> {
    let Some(mut bench) = Bench::new(&[])? else { return Ok(()) };
    for _ in 0..rounds() {
        bench.start_load()?;
        let (there, stream) = bench.other_side()?;
        let mut monitor = bench.guest.monitor()?;
        // Slow enough to be in the middle of it.
        monitor.execute("migrate-set-parameters", &json!({ "max-bandwidth": 4 << 20 }))?;
        monitor.execute("migrate", &json!({ "uri": format!("unix:{}", stream.display()) }))?;
        under_way(&mut monitor)?;
        drop(there);
        let failed = outcome(&mut monitor)?;
        ensure!(failed["status"] == "failed", "{failed}");
        bench.finish_load()?;
    }
    // And then it does move.
    bench.start_load()?;
    bench.go()?;
    bench.finish_load()?;
    bench.verify()
}
