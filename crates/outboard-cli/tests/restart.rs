//! A device that is killed and started again behind the same socket, its front-end going on with the new
//! process (vhost-user, "Inflight I/O tracking"; the big count is `cargo xtask soak kill`).

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use outboard_frontend::block::{BlockDevice, BlockOptions, Operation, Status};
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

/// GET_VRING_BASE_SKIP_DRAIN under load: two processes of one disk take turns, and each finds what the other one left
/// under way in the in-flight region.
#[test]
fn two_processes_take_turns_without_draining_and_no_request_is_lost() {
    const SIZE: u32 = 64 << 10;
    const DEPTH: u64 = 32;
    let places = tempfile::tempdir().unwrap();
    let sockets = ["a", "b"].map(|name| places.path().join(name));
    // On a file system that has a disk below.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = folder.path().join("disk");
    std::fs::File::create(&image).unwrap().set_len(DEPTH * u64::from(SIZE)).unwrap();
    let _programs = [start(&sockets[0], &image), start(&sockets[1], &image)];
    let wanted = Wanted::default().with_skip_drain();
    let options = BlockOptions { timeout: PATIENCE, wanted, ..BlockOptions::default() };
    let mut disk = BlockDevice::open(connect(&sockets[0]), options).unwrap();
    let data =
        disk.memory().allocate(usize::try_from(DEPTH * u64::from(SIZE)).unwrap(), 4096).unwrap();
    let mut queues = disk.take_queues();
    for round in 1..=20_u8 {
        data.fill(round).unwrap();
        for part in 0..DEPTH {
            let at = (data.guest() + part * u64::from(SIZE), SIZE);
            let sector = part * u64::from(SIZE) / 512;
            // Every other one is written twice: the second write waits for the first one.
            for token in [part, part + DEPTH].iter().take(if part % 2 == 1 { 2 } else { 1 }) {
                let write = Operation::Write { sector, data: &[at] };
                assert!(queues[0].submit(write, *token).unwrap());
            }
        }
        queues[0].kick().unwrap();
        disk.vmm().park().unwrap().unwrap();
        disk.reconnect(connect(&sockets[usize::from(round) % 2])).unwrap();
        // The other process has the image until what it was asked for has ended.
        let late = Instant::now() + PATIENCE;
        while let Err(error) = disk.wake() {
            assert!(Instant::now() < late, "{error}");
        }
        let mut tokens = Vec::new();
        while queues[0].in_flight() > 0 {
            let done = queues[0].next(PATIENCE).unwrap();
            assert_eq!(done.status, Status::Ok);
            tokens.push(done.token);
        }
        tokens.sort_unstable();
        let expected =
            (0..DEPTH).chain((0..DEPTH).filter(|part| part % 2 == 1).map(|part| part + DEPTH));
        assert_eq!(tokens, expected.collect::<Vec<_>>(), "each once");
        let bytes = std::fs::read(&image).unwrap();
        assert!(bytes.iter().all(|byte| *byte == round), "round {round}");
    }
}
