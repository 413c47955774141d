//! `outboard block` as a process of its own, driven by our front-end: requests and memory laid out in
//! every way, load with every byte checked, stops with requests under way, a killed device, and the demo, which does all of that by itself. (The life-cycle is in `lifecycle.rs`.)
#![expect(clippy::expect_used, reason = "a failed step of a test is its end")]

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use outboard_frontend::block::{BlockDevice, BlockOptions, Operation, SECTOR};
use outboard_frontend::{Connection, Error, Sharing, Wanted};
use outboard_protocol::features::{ProtocolFeatures, virtio};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(10);

/// A running `outboard block`.
struct Disk {
    child: Child,
    folder: tempfile::TempDir,
}

impl Disk {
    fn start(queues: u16) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let image = folder.path().join("disk.img");
        let file = std::fs::File::create(&image).expect("an image");
        file.set_len(16 * MIB).expect("room");
        let child = Command::new(env!("CARGO_BIN_EXE_outboard"))
            .args(["block", "--num-queues", &queues.to_string(), "--socket-path"])
            .args([&folder.path().join("s"), &image])
            .env("OUTBOARD_LOG", "warn")
            .stdin(Stdio::null())
            .spawn()
            .expect("our own program");
        let disk = Self { child, folder };
        drop(disk.connect());
        disk
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    fn connect(&self) -> Connection {
        Connection::connect_patiently(self.socket(), PATIENCE, PATIENCE).expect("it listens")
    }

    fn open(&self, options: BlockOptions) -> BlockDevice {
        BlockDevice::open(self.connect(), options).expect("a disk")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn what_is_under_way_is_finished_before_a_ring_is_stopped() {
    let device = Disk::start(1);
    let mut disk = device.open(BlockOptions::default());
    let buffer = disk.memory().allocate(64 * 65536, 4096).expect("room");
    for turn in 0..20 {
        let queue = disk.queues().first_mut().expect("one queue");
        for at in 0..64 {
            let data = [(buffer.guest() + at * 65536, 65536)];
            let sector = at * (65536 / SECTOR);
            assert!(queue.submit(Operation::Read { sector, data: &data }, at).expect("it fits"));
        }
        queue.kick().expect("a kick");
        let bases = disk.sleep().expect("it stops").expect("it was active");
        let queue = disk.queues().first_mut().expect("one queue");
        let mut finished = 0;
        while queue.pop().expect("a sound ring").is_some() {
            finished += 1;
        }
        let taken = bases[0].1 - 64 * turn;
        assert_eq!(finished, taken, "turn {turn}: what was taken is finished, and nothing else");
        disk.wake().expect("it starts");
        let queue = disk.queues().first_mut().expect("one queue");
        for _ in finished..64 {
            queue.next(PATIENCE).expect("what was not taken is taken now");
        }
    }
}

#[test]
fn every_way_of_laying_out_memory_and_requests_works() {
    let device = Disk::start(2);
    let wanted = Wanted::default();
    let quiet = Wanted { features: wanted.features & !virtio::RING_EVENT_IDX, ..wanted };
    let slots = Wanted { sharing: Sharing::Slots, ..wanted };
    let silent = ProtocolFeatures::CONFIG | ProtocolFeatures::MQ;
    let unacknowledged = Wanted { protocol: silent, ..wanted };
    let plain = BlockOptions::default();
    let ways = [
        BlockOptions { indirect: true, ..plain },
        BlockOptions { regions: 8, ..plain },
        BlockOptions { wanted: quiet, ..plain },
        BlockOptions { wanted: quiet, indirect: true, ..plain },
        BlockOptions { wanted: slots, regions: 8, ..plain },
        BlockOptions { wanted: unacknowledged, ..plain },
        BlockOptions { queue_size: 4, depth: 1, ..plain },
        BlockOptions { queue_size: 1024, depth: 300, queues: 2, ..plain },
    ];
    for (turn, options) in (1u8..).zip(ways) {
        let mut disk = device.open(options);
        let sector = 16 * u64::from(turn);
        disk.write(sector, &[turn; 8192]).expect("a write");
        let mut got = [0; 8192];
        disk.read(sector, &mut got).expect("a read");
        assert!(got == [turn; 8192], "{options:?}");
    }
}

#[test]
fn every_byte_is_right_under_load_on_four_queues() {
    let device = Disk::start(4);
    for how in [["--driver", "sleep"], ["--rw", "randrw,write"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_outboard"))
            .arg("bench")
            .arg(device.socket())
            .args(["--verify", "--queues", "4", "--threads", "2", "--depth", "16"])
            .args(["--seconds", "0.2", "--rounds", "1", "--span", "4M"])
            .args(how)
            .output()
            .expect("our own program");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{how:?}: {errors}");
    }
}

#[test]
fn a_device_that_is_killed_is_an_error_and_the_disk_keeps_what_was_flushed() {
    let mut device = Disk::start(1);
    let timeout = Duration::from_millis(500);
    let mut disk = device.open(BlockOptions { timeout, ..BlockOptions::default() });
    disk.write(64, &[7; 4096]).expect("a write");
    disk.flush().expect("a flush");
    device.child.kill().expect("it lives");
    device.child.wait().expect("it ends");
    let stuck = disk.read(64, &mut [0; 512]).expect_err("nobody answers");
    assert!(matches!(stuck, Error::Stuck { .. }), "{stuck}");
    let image = std::fs::read(device.folder.path().join("disk.img")).expect("the image");
    assert!(image[64 * 512..][..4096] == [7; 4096]);
}

#[test]
fn the_demo_shows_every_step_and_leaves_nothing_behind() {
    let folder = tempfile::tempdir().expect("a folder");
    let output = Command::new(env!("CARGO_BIN_EXE_outboard"))
        .arg("demo")
        .env("TMPDIR", folder.path())
        .output()
        .expect("our own program");
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{errors}\n{said}");
    for step in ["written", "read back", "flushed", "discarded", "image", "random read", "removed"]
    {
        assert!(said.contains(step), "{step}: {said}");
    }
    let left = std::fs::read_dir(folder.path()).expect("the folder").count();
    assert_eq!(left, 0, "the demo left something behind");
}

#[test]
fn a_demo_without_room_fails_in_one_line_with_exit_code_1() {
    let output = Command::new(env!("CARGO_BIN_EXE_outboard"))
        .arg("demo")
        .env("TMPDIR", "/proc")
        .output()
        .expect("our own program");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert_eq!(errors.lines().count(), 1, "{errors}");
}
