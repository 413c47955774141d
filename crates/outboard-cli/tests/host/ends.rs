//! Ends at bad moments: of the device by signals, of its front-end by a kill, of both at once.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use outboard_frontend::block::{BlockDevice, BlockOptions, Operation};
use outboard_frontend::{Connection, Error};
use rustix::process::Signal;

use crate::program::{PATIENCE, Program, folder, serves};

/// Each write has a block of its own.
const BLOCK: usize = 64 << 10;
const SECTORS: u64 = 128;
const BLOCKS: u64 = 64;

// C12: SIGTERM and SIGINT are pending when the process goes on; the second one ends it at once.
#[test]
fn c12_a_second_signal_ends_at_once_and_no_write_is_half_done() {
    // Two threads may take a signal each at the same moment: then both are the first one, and the program finishes.
    let ended = (0..20).any(|_| ends_at_the_second_signal());
    assert!(ended, "a second signal never ended it");
}

/// Whether the second one was taken for the second one.
fn ends_at_the_second_signal() -> bool {
    let folder = folder();
    let program = Program::start(folder.path(), &["--engine", "sync"]);
    let mut disk = program.open(BlockOptions::default());
    for block in 0..BLOCKS {
        disk.write(block * SECTORS, &[1; BLOCK]).expect("written");
    }
    let buffer = disk.memory().allocate(BLOCK, 4096).expect("room");
    buffer.fill(2).expect("ours");
    let queue = disk.queues().first_mut().expect("one queue");
    for block in 0..BLOCKS {
        let (sector, data) = (block * SECTORS, [(buffer.guest(), 64 << 10)]);
        assert!(queue.submit(Operation::Write { sector, data: &data }, block).expect("it fits"));
    }
    queue.kick().expect("a kick");
    program.signal(Signal::STOP);
    program.signal(Signal::TERM);
    program.signal(Signal::INT);
    program.signal(Signal::CONT);
    let (code, said) = program.end();
    // The second signal's code: after the requests under way it is 0.
    assert!(matches!(code, Some(0 | 130 | 143)), "{code:?}: {said}");
    let queue = disk.queues().first_mut().expect("one queue");
    let mut answered = Vec::new();
    while let Some(done) = queue.pop().expect("a sound ring") {
        answered.push(done.token);
    }
    let image = std::fs::read(folder.path().join("disk.img")).expect("the image");
    for (block, bytes) in (0..BLOCKS).zip(image.chunks(BLOCK)) {
        for sector in bytes.chunks(512) {
            let now = sector.first().copied().expect("512 bytes");
            assert!(sector.iter().all(|byte| *byte == now), "half a sector in block {block}");
            assert!(now == 2 || (now == 1 && !answered.contains(&block)), "block {block}: {now}");
        }
    }
    // The socket's file may still be there: the next device takes its place.
    let program = Program::start(folder.path(), &[]);
    serves(&mut program.open(BlockOptions::default()), 3);
    code != Some(0)
}

// C12: a storm of them.
#[test]
fn c12_a_storm_of_signals_ends_the_device_once() {
    let folder = folder();
    let program = Program::start(folder.path(), &[]);
    serves(&mut program.open(BlockOptions::default()), 1);
    let pid = program.pid();
    for _ in 0..1000 {
        // An error says that it has ended, which is what is asked.
        let _ = rustix::process::kill_process(pid, Signal::INT);
    }
    let (code, said) = program.end();
    assert!(matches!(code, Some(0 | 130)), "{code:?}: {said}");
    assert!(!said.contains("panicked"), "{said}");
}

/// The first connection that is served, and how long it took.
fn served_again(program: &Program, since: Instant) -> Duration {
    loop {
        let mut connection = program.connect();
        match connection.get_features() {
            Err(Error::Closed { .. } | Error::Socket(_)) if since.elapsed() < PATIENCE => {}
            served => {
                served.expect("served");
                return since.elapsed();
            }
        }
    }
}

// C13: with requests under way.
#[test]
fn c13_a_front_end_that_is_killed_under_load_makes_room_for_the_next_one() {
    let folder = folder();
    let program = Program::start(folder.path(), &[]);
    serves(&mut program.open(BlockOptions::default()), 1);
    served_again(&program, Instant::now());
    let mut before = None;
    for round in 0..5 {
        let busy = program.cpu() + Duration::from_millis(50);
        let mut load = Command::new(env!("CARGO_BIN_EXE_outboard"))
            .arg("bench")
            .arg(program.socket())
            .args(["--rw", "randrw", "--verify", "--seconds", "60", "--span", "1M"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("our program");
        let started = Instant::now();
        while program.cpu() < busy {
            assert!(started.elapsed() < PATIENCE, "no load");
            std::thread::sleep(Duration::from_millis(5)); // a load is seen by its traces only
        }
        load.kill().expect("it lives");
        let killed = Instant::now();
        let took = served_again(&program, killed);
        load.wait().expect("its end");
        eprintln!("round {round}: the next front-end is served after {took:?}");
        assert!(took < PATIENCE, "{took:?}");
        serves(&mut program.open(BlockOptions::default()), 2);
        served_again(&program, Instant::now());
        let open = program.settled_descriptors();
        assert_eq!(open, *before.get_or_insert(open), "descriptors in round {round}");
    }
}

/// What a front-end sees that connected too late: an end, in time.
fn sees_the_end(mut late: Connection) {
    let error = late.get_features().expect_err("nobody is there");
    assert!(matches!(error, Error::Closed { .. } | Error::Socket(_)), "{error}");
}

// C14: the connection is made, and is in nobody's hands, when the device ends.
#[test]
fn c14_a_connection_to_a_device_that_is_ending_sees_its_end_and_the_next_device_serves() {
    let folder = folder();
    for signal in [Signal::TERM, Signal::KILL] {
        let program = Program::start(folder.path(), &[]);
        serves(&mut program.open(BlockOptions::default()), 1);
        program.signal(Signal::STOP);
        let late = program.connect();
        program.signal(signal);
        program.signal(Signal::CONT);
        let (code, said) = program.end();
        assert_eq!(code, if signal == Signal::TERM { Some(0) } else { None }, "{said}");
        sees_the_end(late);
        let next = Program::start(folder.path(), &[]);
        serves(&mut next.open(BlockOptions::default()), 2);
        next.signal(Signal::TERM);
        assert_eq!(next.end().0, Some(0));
    }
}

// C14: a front-end that tries again and again, as a VMM with `reconnect` does, meets the next device.
#[test]
fn c14_a_front_end_that_tries_again_meets_the_next_device() {
    let folder = folder();
    let first = Program::start(folder.path(), &[]);
    let mut disk = first.open(BlockOptions::default());
    disk.write(64, &[5; 4096]).expect("written");
    first.signal(Signal::TERM);
    let socket = first.socket().to_owned();
    let again = std::thread::spawn(move || {
        let started = Instant::now();
        loop {
            let opened = Connection::connect_patiently(&socket, PATIENCE, PATIENCE)
                .and_then(|connection| BlockDevice::open(connection, BlockOptions::default()));
            match opened {
                Ok(mut disk) => {
                    let mut bytes = [0; 4096];
                    disk.read(64, &mut bytes).expect("read");
                    return bytes;
                }
                Err(error) => assert!(started.elapsed() < PATIENCE, "{error}"),
            }
        }
    });
    let (code, said) = first.end();
    assert_eq!(code, Some(0), "{said}");
    let _second = Program::start(folder.path(), &[]);
    assert_eq!(again.join().expect("it is served"), [5; 4096]);
}
