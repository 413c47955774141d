//! Too few descriptors, too little memory, no thread, hardly any processor time.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use outboard_frontend::block::{BlockDevice, BlockOptions, Operation};
use outboard_frontend::{Connection, Error};
use rustix::process::{Resource, Signal};

use crate::program::{PATIENCE, Program, command, folder, serves};

/// How long a device is watched for signs of spinning; it may want to run for half of that.
const WATCHED: Duration = Duration::from_secs(1);

fn rests(program: &Program) {
    let before = program.wanted();
    std::thread::sleep(WATCHED);
    let wanted = program.wanted() - before;
    assert!(wanted < WATCHED / 2, "it wants {wanted:?} of {WATCHED:?} with nothing to do");
}

#[test]
fn a96_a_front_end_for_which_there_is_no_descriptor_waits_and_is_served_later() {
    let folder = folder();
    let program = Program::start(folder.path(), &[]);
    program.take_descriptors_away();
    let waiting = program.connect();
    rests(&program);
    program.limit(Resource::Nofile, None);
    let mut disk = BlockDevice::open(waiting, BlockOptions::default()).expect("served at last");
    serves(&mut disk, 1);
}

#[test]
fn a96_a_second_front_end_for_which_there_is_no_descriptor_makes_nothing_spin() {
    let folder = folder();
    let program = Program::start(folder.path(), &[]);
    let mut disk = program.open(BlockOptions::default());
    serves(&mut disk, 1);
    program.take_descriptors_away();
    let mut second = program.connect();
    rests(&program);
    serves(&mut disk, 2);
    program.limit(Resource::Nofile, None);
    let told = second.get_features().expect_err("there is one already");
    assert!(matches!(told, Error::Closed { .. }), "{told}");
    serves(&mut disk, 3);
}

/// A read of so many sectors, each into a piece of memory of its own.
fn read_in_pieces(disk: &mut BlockDevice, pieces: u64) -> Result<(), Error> {
    let buffer = disk.memory().allocate(512, 512)?;
    let data: Vec<_> = (0..pieces).map(|_| (buffer.guest(), 512)).collect();
    let queue = disk.queues().first_mut().expect("one queue");
    assert!(queue.submit(Operation::Read { sector: 0, data: &data }, 7)?, "it fits");
    queue.kick()?;
    queue.next(Duration::from_secs(3)).map(drop)
}

// C20: no guest's size ends the process.
#[test]
fn c20_a_request_that_needs_more_memory_than_there_is_costs_its_ring_alone() {
    let folder = folder();
    let program = Program::start(folder.path(), &["--queue-size", "32768", "--engine", "sync"]);
    let options = BlockOptions { queue_size: 32768, depth: 4, ..BlockOptions::default() };
    let mut disk = program.open(options);
    serves(&mut disk, 1);
    // What the list of so many pieces takes is twice that.
    let most = program.status("VmData") * 1024 + (256 << 10);
    program.limit(Resource::Data, Some(most));
    let refused = read_in_pieces(&mut disk, 32_000).expect_err("there is no memory for it");
    assert!(matches!(refused, Error::Stuck { .. }), "{refused}");
    drop(disk);
    let mut disk = program.open(options);
    serves(&mut disk, 2);
    program.limit(Resource::Data, None);
    read_in_pieces(&mut disk, 32_000).expect("with memory");
    serves(&mut disk, 3);
}

/// How a device starts under a limit of the shell: it serves, or one line says why not.
fn starts_or_says_why(limit: &str, args: &[&str]) -> bool {
    let folder = folder();
    let device = command(folder.path(), args);
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("ulimit {limit} && exec \"$@\""), "sh"]);
    shell.arg(device.get_program()).args(device.get_args()).current_dir(folder.path());
    shell.stdin(Stdio::null()).stderr(Stdio::piped()).env("OUTBOARD_LOG", "info");
    let mut child = shell.spawn().expect("a shell");
    let mut log = BufReader::new(child.stderr.take().expect("piped"));
    let mut said = String::new();
    while !said.contains("serving ") && log.read_line(&mut said).expect("its log") != 0 {}
    if !said.contains("serving ") {
        let code = child.wait().expect("its end").code();
        assert!(matches!(code, Some(1 | 2)), "ulimit {limit}: {code:?}: {said}");
        let lines = said.lines().filter(|line| !line.contains(" INFO ")).count();
        assert_eq!(lines, 1, "ulimit {limit}: {said}");
        return false;
    }
    let program = Program::of(child, log, folder.path());
    // It may have to turn a front-end away; it must not end of it.
    let options = BlockOptions { timeout: PATIENCE, ..BlockOptions::default() };
    // It listens already, or has given up.
    let connected = Connection::connect(program.socket(), options.timeout);
    let opened = connected.and_then(|connection| BlockDevice::open(connection, options));
    let served = opened.map(|mut disk| serves(&mut disk, 9));
    program.terminate();
    let (code, said) = program.end();
    let one_line = said.lines().filter(|line| line.starts_with("outboard: ")).count() == 1;
    // The last thing that it needs, it needs once it serves.
    let gave_up = code == Some(1) && one_line && served.is_err();
    assert!(code == Some(0) || gave_up, "ulimit {limit}: {code:?}: {served:?}: {said}");
    assert!(!said.contains("panicked"), "ulimit {limit}: {said}");
    served.is_ok()
}

// C21: descriptors.
#[test]
fn c21_with_few_descriptors_a_device_serves_or_says_in_one_line_why_not() {
    let served: Vec<_> =
        (4..=40).filter(|most| starts_or_says_why(&format!("-n {most}"), &[])).collect();
    assert!(!served.contains(&4) && served.contains(&40), "served with {served:?}");
    assert!(served.iter().zip(served.iter().skip(1)).all(|(a, b)| a + 1 == *b), "{served:?}");
}

// C21, C33: address space, and so room for the stacks of threads.
#[test]
fn c21_c33_without_room_for_its_threads_a_device_says_so_in_one_line() {
    let args = ["--num-queues", "64", "--workers", "64", "--engine", "sync"];
    assert!(!starts_or_says_why("-v 1000000", &args), "64 threads do not fit into 1 GB");
    assert!(starts_or_says_why("-v 16000000", &args));
}

// C33: starting a queue takes no thread, so none can be missing.
#[test]
fn c33_queues_start_and_stop_where_no_thread_can_be_had() {
    let folder = folder();
    let program = Program::start(folder.path(), &["--num-queues", "4", "--engine", "sync"]);
    let mut disk = program.open(BlockOptions { queues: 4, ..BlockOptions::default() });
    serves(&mut disk, 1);
    let threads = program.status("Threads");
    // Less than the stack of a thread.
    program.limit(Resource::As, Some(program.status("VmSize") * 1024 + (512 << 10)));
    for fill in 2..5 {
        for queue in 0..4 {
            let front = disk.vmm().connection();
            front.get_vring_base(queue).expect("stopped");
            // What it was started with is still there; a doorbell is not, so it is polled.
            front.set_vring_kick_polled(queue).expect("started");
        }
        serves(&mut disk, fill);
        assert_eq!(program.status("Threads"), threads);
    }
}

// C35: a twentieth of a processor, in slices; every byte is checked.
#[test]
fn c35_a_device_that_hardly_runs_misses_no_kick_and_gives_nothing_up() {
    let folder = folder();
    let program = Program::start(folder.path(), &["--num-queues", "2"]);
    let mut bench = Command::new(env!("CARGO_BIN_EXE_outboard"));
    bench.arg("bench").arg(program.socket());
    bench.args(["--rw", "randrw", "--verify", "--queues", "2", "--threads", "2", "--depth", "4"]);
    bench.args(["--driver", "sleep", "--seconds", "2", "--rounds", "1", "--span", "256k"]);
    let load = bench.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("our program");
    let mut load = Load(load);
    let mut slices = 0;
    let status = loop {
        program.signal(Signal::STOP);
        std::thread::sleep(Duration::from_millis(19));
        program.signal(Signal::CONT);
        std::thread::sleep(Duration::from_millis(1));
        slices += 1;
        if let Some(status) = load.0.try_wait().expect("our own child") {
            break status;
        }
        assert!(slices < 3000, "the load never ends");
    };
    let mut said = String::new();
    load.0.stderr.take().expect("piped").read_to_string(&mut said).expect("its words");
    assert_eq!(status.code(), Some(0), "after {slices} slices: {said}");
    // However long one takes on this machine.
    assert!(slices >= 5, "{slices} slices are no load");
    serves(&mut program.open(BlockOptions::default()), 7);
    program.signal(Signal::TERM);
    let (code, said) = program.end();
    assert_eq!(code, Some(0), "{said}");
    assert!(!said.contains("retired"), "{said}");
}

/// A load that ends with its test.
struct Load(Child);

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
