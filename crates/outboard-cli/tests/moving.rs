//! A disk that moves from one process to another: the state in a file, both processes with the image
//! open all the time, and never two that write (contract §4 and §6; [state], Build 5 and 7).

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use outboard_frontend::block::{BlockDevice, BlockOptions};
use outboard_frontend::{Connection, Error, VmmSnapshot};
use outboard_protocol::StateDirection;

const PATIENCE: Duration = Duration::from_secs(20);
const OPTIONS: fn() -> BlockOptions =
    || BlockOptions { queues: 2, queue_size: 64, timeout: PATIENCE, ..BlockOptions::default() };
/// `writeback` in the configuration space.
const WCE: u32 = 32;

/// One `outboard block`; its log is kept.
struct Program {
    child: Child,
    socket: PathBuf,
}

impl Program {
    fn start(folder: &Path, name: &str, more: &[&str]) -> Self {
        let socket = folder.join(format!("{name}.sock"));
        let child = Command::new(env!("CARGO_BIN_EXE_outboard"))
            .args(["block", "--socket-path"])
            .args([&socket, &folder.join("disk.img")])
            .args(more)
            .env("OUTBOARD_LOG", "warn")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self { child, socket }
    }

    fn connect(&self) -> Connection {
        Connection::connect_patiently(&self.socket, PATIENCE, PATIENCE).unwrap()
    }

    /// Ends it; what it had said.
    fn log(mut self) -> String {
        self.child.kill().unwrap();
        let mut log = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        log
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn folder(bytes: u64) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let image = std::fs::File::create(folder.path().join("disk.img")).unwrap();
    image.set_len(bytes).unwrap();
    folder
}

/// Writes and reads back a block of its own, on top of the last one's.
fn serve(disk: &mut BlockDevice, last: u8, now: u8) {
    let mut bytes = [0; 4096];
    disk.read(64, &mut bytes).unwrap();
    assert_eq!(bytes, [last; 4096], "what the last one wrote");
    disk.write(64, &[now; 4096]).unwrap();
    disk.flush().unwrap();
    disk.read(64, &mut bytes).unwrap();
    assert_eq!(bytes, [now; 4096]);
}

fn sleep_into(disk: &mut BlockDevice, file: &Path) {
    disk.sleep().unwrap().unwrap();
    std::fs::write(file, disk.snapshot().unwrap().to_bytes()).unwrap();
}

fn snapshot_in(file: &Path) -> VmmSnapshot {
    VmmSnapshot::parse(&std::fs::read(file).unwrap()).unwrap()
}

#[test]
fn a_disk_moves_there_and_back_and_never_two_processes_write() {
    let folder = folder(8 << 20);
    let file = folder.path().join("snapshot");
    let queues = ["--num-queues", "16"];
    let here = Program::start(folder.path(), "here", &queues);
    let there = Program::start(folder.path(), "there", &queues);
    let mut first = BlockDevice::open(here.connect(), OPTIONS()).unwrap();
    first.vmm().write_config(WCE, &[0]).unwrap();
    serve(&mut first, 0, 1);
    // The image is open in both processes, and one of them runs.
    let too_early = BlockDevice::open(there.connect(), OPTIONS()).unwrap_err();
    assert!(matches!(too_early, Error::Refused { request: "SET_VRING_KICK", .. }), "{too_early}");
    serve(&mut first, 1, 2);
    for (turn, last) in (0..3).zip([2u8, 12, 22]) {
        sleep_into(&mut first, &file);
        let mut second =
            BlockDevice::restore(there.connect(), OPTIONS(), &snapshot_in(&file)).unwrap();
        let wce = second.vmm().read_config(WCE, 1).unwrap();
        assert_eq!(wce, [0], "what the guest chose, turn {turn}");
        second.wake().unwrap();
        serve(&mut second, last, last + 5);
        // The first one sleeps on, whatever its front-end wants.
        let refused = first.wake().unwrap_err();
        assert!(matches!(refused, Error::Refused { request: "SET_VRING_KICK", .. }), "{refused}");
        serve(&mut second, last + 5, last + 9);
        sleep_into(&mut second, &file);
        drop(second);
        // Its state comes back into the process that it left.
        let state = snapshot_in(&file).state;
        first.vmm().connection().load_state(&state).unwrap();
        first.wake().unwrap();
        serve(&mut first, last + 9, last + 10);
    }
    drop(first);
    let busy = "disk.img is in use by another running device";
    for (program, refused) in [(here, 3), (there, 1)] {
        let log = program.log();
        let lines: Vec<_> = log.lines().collect();
        let said = lines.iter().filter(|line| line.contains(busy)).count();
        assert_eq!((said, lines.len()), (refused, refused), "one clear line for each: {log}");
    }
}

#[test]
fn readers_share_an_image_that_nobody_writes() {
    let folder = folder(1 << 20);
    let programs = ["a", "b"].map(|name| Program::start(folder.path(), name, &["--read-only"]));
    let writer = Program::start(folder.path(), "writer", &[]);
    let options = BlockOptions { queues: 1, ..OPTIONS() };
    let mut disks =
        programs.each_ref().map(|one| BlockDevice::open(one.connect(), options).unwrap());
    for disk in &mut disks {
        disk.read(0, &mut [0; 512]).unwrap();
    }
    BlockDevice::open(writer.connect(), options).unwrap_err();
    drop(disks);
    drop(programs);
    BlockDevice::open(writer.connect(), options).unwrap().write(0, &[1; 512]).unwrap();
}

fn golden(name: &str) -> Vec<u8> {
    let devices = Path::new(env!("CARGO_MANIFEST_DIR")).join("../outboard-devices");
    std::fs::read(devices.join("tests/block/golden").join(name)).unwrap()
}

#[test]
fn kept_states_of_both_versions_are_taken_or_refused_by_the_program() {
    let folder = folder(1 << 20);
    let program = Program::start(folder.path(), "disk", &[]);
    let negotiated = || {
        let mut front = program.connect();
        front.set_owner().unwrap();
        front.get_features().unwrap();
        let protocol = front.get_protocol_features().unwrap();
        front.set_protocol_features(protocol & BlockOptions::default().wanted.protocol).unwrap();
        front
    };
    let mut front = negotiated();
    front.load_state(&golden("block-2.state")).unwrap_err();
    assert_eq!(front.get_config(WCE, 1).unwrap(), [1]);
    front.load_state(&golden("block-1.state")).unwrap();
    assert_eq!(front.get_config(WCE, 1).unwrap(), [0]);
    let mut cut = golden("block-1.state");
    cut.pop();
    front.load_state(&cut).unwrap_err();
    let mut foreign = golden("block-1.state");
    foreign[16..21].copy_from_slice(b"fiber");
    front.load_state(&foreign).unwrap_err();
    drop(front);
    // And it serves.
    let options = BlockOptions { queues: 1, ..OPTIONS() };
    let mut disk = BlockDevice::open(program.connect(), options).unwrap();
    disk.write(0, &[7; 512]).unwrap();
    // Not while it runs.
    let (reader, _writer) = std::io::pipe().unwrap();
    let front = disk.vmm().connection();
    let refused = front.set_device_state_fd(StateDirection::Load, reader.into()).unwrap_err();
    assert!(matches!(refused, Error::Refused { code: 0x101, .. }), "{refused}");
    drop(disk);
    let log = program.log();
    for line in [
        "state version 2, this program knows up to 1",
        "device state ends after 141 bytes of 142",
        "device state is damaged: checksum 0x",
    ] {
        assert_eq!(log.lines().filter(|said| said.contains(line)).count(), 1, "{line}: {log}");
    }
}
