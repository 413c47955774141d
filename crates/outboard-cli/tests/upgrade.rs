//! Live upgrade of `outboard block` as its users type it: `--control` and `--take-over`, under load of
//! which every byte is checked.
#![expect(clippy::expect_used, reason = "a failed step of a test is its end")]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};

/// A running `outboard block`.
struct Disk {
    child: Child,
    log: BufReader<ChildStderr>,
}

impl Disk {
    fn start(args: &[&str], folder: &Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_outboard"))
            .current_dir(folder)
            .arg("block")
            .args(args)
            .env("OUTBOARD_LOG", "info")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("our own program");
        let log = BufReader::new(child.stderr.take().expect("a pipe"));
        Self { child, log }
    }

    /// The first line of the log with this in it; none if the program ended before.
    fn says(&mut self, what: &str) -> Option<String> {
        let mut line = String::new();
        while self.log.read_line(&mut line).expect("text") > 0 {
            if line.contains(what) {
                return Some(line);
            }
            line.clear();
        }
        None
    }

    fn ends(mut self) -> Option<i32> {
        self.child.wait().expect("it ends").code()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn image(folder: &Path) {
    let file = std::fs::File::create(folder.join("disk.img")).expect("an image");
    file.set_len(16 << 20).expect("room");
}

/// Load of which every byte is checked, from another program.
fn load(folder: &Path, seconds: &str) -> Child {
    Command::new(env!("CARGO_BIN_EXE_outboard"))
        .current_dir(folder)
        .args(["bench", "s", "--rw", "randrw", "--verify", "--depth", "8", "--rounds", "1"])
        .args(["--driver", "sleep", "--seconds", seconds])
        .stdout(Stdio::null())
        .spawn()
        .expect("our own program")
}

const NEXT: [&str; 3] = ["--take-over", "c", "disk.img"];

#[test]
fn twelve_live_upgrades_under_checked_load_lose_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    image(folder.path());
    let mut disk =
        Disk::start(&["--socket-path", "s", "--control", "c", "disk.img"], folder.path());
    disk.says("serving").expect("it serves");
    let mut load = load(folder.path(), "4");
    disk.says("ring started").expect("the load began");
    for turn in 0..12 {
        let mut next = Disk::start(&NEXT, folder.path());
        let pause = next.says("taken over").unwrap_or_else(|| panic!("turn {turn}"));
        assert!(pause.contains("stood still for"), "{pause}");
        disk.says("handed over").expect("the old one gives way");
        assert_eq!(disk.ends(), Some(0));
        disk = next;
    }
    assert!(load.wait().expect("it ends").success(), "the load found an error");
}

#[test]
fn a_take_over_that_the_new_side_cannot_carry_leaves_the_old_one_serving() {
    let folder = tempfile::tempdir().expect("a folder");
    image(folder.path());
    let mut disk =
        Disk::start(&["--socket-path", "s", "--control", "c", "disk.img"], folder.path());
    disk.says("serving").expect("it serves");
    let mut load = load(folder.path(), "1");
    disk.says("ring started").expect("the load began");
    for _ in 0..4 {
        let args = ["--take-over", "c", "--without", "VIRTIO_RING_F_EVENT_IDX", "disk.img"];
        let mut next = Disk::start(&args, folder.path());
        let why = next.says("take-over").expect("a reason");
        assert!(why.contains("does not offer features 0x20000000"), "{why}");
        assert_eq!(next.ends(), Some(1));
        disk.says("not handed over").expect("it says why it goes on");
    }
    assert!(load.wait().expect("it ends").success(), "the load found an error");
    drop(disk);
}

#[test]
fn nothing_to_take_over_is_one_line_and_exit_code_2() {
    let folder = tempfile::tempdir().expect("a folder");
    image(folder.path());
    let mut disk = Disk::start(&NEXT, folder.path());
    disk.says("socket c:").expect("the path");
    assert_eq!(disk.ends(), Some(2));
}
