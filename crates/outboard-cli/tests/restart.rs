//! A device that is killed and started again behind the same socket, its front-end going on with the new
//! process (vhost-user, "Inflight I/O tracking"; the big count is `cargo xtask soak kill`).

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use outboard_frontend::block::{BlockDevice, BlockOptions};
use outboard_frontend::{Connection, Wanted};

const PATIENCE: Duration = Duration::from_secs(20);

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(socket: &Path, image: &Path) -> Killed {
    let mut program = Command::new(env!("CARGO_BIN_EXE_outboard"));
    program.args(["block", "--socket-path"]).arg(socket).arg(image);
    Killed(program.env("OUTBOARD_LOG", "error").stdin(Stdio::null()).spawn().unwrap())
}

fn connect(socket: &Path) -> Connection {
    Connection::connect_patiently(socket, PATIENCE, PATIENCE).unwrap()
}

#[test]
fn a_front_end_goes_on_with_the_process_that_follows_a_killed_one() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, image) = (folder.path().join("s"), folder.path().join("disk"));
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let mut program = start(&socket, &image);
    let wanted = Wanted::default().with_inflight();
    let options = BlockOptions { timeout: PATIENCE, wanted, ..BlockOptions::default() };
    let mut disk = BlockDevice::open(connect(&socket), options).unwrap();
    for round in 0..5u8 {
        let text = [round; 4096];
        disk.write(8, &text).unwrap();
        drop(program);
        program = start(&socket, &image);
        disk.reconnect(connect(&socket)).unwrap();
        let mut back = [0xff; 4096];
        disk.read(8, &mut back).unwrap();
        assert_eq!(back, text);
    }
}
