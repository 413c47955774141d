//! A peer that does the same wrong thing again and again must not fill the disk with log lines.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::program::{PATIENCE, Program, folder};

/// Messages of each kind. (A million of each takes minutes in a debug build and shows no more.)
const MANY: usize = 20_000;

/// Lines of one kind in a second that are still no flood.
const MOST: u64 = 10;

/// Lines are counted over a second; somewhat more, so that two of them begin in it.
const WINDOW: Duration = Duration::from_millis(2100);

fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).expect("short");
    let mut bytes = [request, flags, size].map(u32::to_le_bytes).concat();
    bytes.extend(payload);
    bytes
}

/// Sends `bytes` so often, and waits until all of it was looked at.
fn repeat(socket: &mut UnixStream, bytes: &[u8], times: usize) {
    let many = bytes.repeat(1000);
    for _ in 0..times / 1000 {
        socket.write_all(&many).expect("it reads");
    }
    socket.write_all(&message(1, 1, &[])).expect("it reads");
    socket.read_exact(&mut [0; 20]).expect("GET_FEATURES is answered");
}

// C41: each kind of bad message, and front-ends that come, are wrong and are sent away.
#[test]
fn c41_a_flood_of_bad_messages_is_ten_lines_a_second() {
    let folder = folder();
    let mut program = Program::start(folder.path(), &[]);
    let mut log = program.take_log();
    let reader = std::thread::spawn(move || {
        let mut said = String::new();
        log.read_to_string(&mut said).expect("its log");
        said
    });
    let begun = Instant::now();
    let mut socket = UnixStream::connect(program.socket()).expect("it listens");
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let kinds = [
        message(777, 1, &[]),
        message(8, 1, &[0, 0, 0, 0, 3, 0, 0, 0]),
        message(8, 1, &[0, 0]),
        message(9, 1, &[0xff; 40]),
        message(18, 1, &[0; 8]),
        message(2, 1, &[0xff; 8]),
    ];
    for kind in &kinds {
        repeat(&mut socket, kind, MANY);
    }
    drop(socket);
    // What was left out is told with the first line of a later second, so the flood lasts into one.
    let late = Instant::now() + WINDOW;
    let mut visits = 0;
    while visits < 1000 || Instant::now() < late {
        let mut socket = UnixStream::connect(program.socket()).expect("it listens");
        socket.write_all(&message(1, 7, &[])).expect("it reads");
        // A stream that is out of step ends the session: the end is seen here.
        let _ = socket.read(&mut [0; 20]);
        visits += 1;
    }
    let lasted = begun.elapsed();
    drop(program);
    let said = reader.join().expect("a reader");
    let lines = said.lines().filter(|line| line.contains("front-end: ")).count() as u64;
    assert!(lines > 0, "nothing at all was said");
    let seconds = lasted.as_secs() + 2;
    assert!(lines <= MOST * seconds, "{lines} lines in {lasted:?}");
    // The kinds there are: connected, left, turned down, ended, turned away.
    let all = said.lines().filter(|line| !line.starts_with('(')).count() as u64;
    assert!(all <= 6 * MOST * seconds, "{all} lines in {lasted:?}");
    assert!(said.contains("lines like the next were left out"), "what is missing is counted");
    assert!(lasted < Duration::from_secs(60), "{lasted:?}");
}
