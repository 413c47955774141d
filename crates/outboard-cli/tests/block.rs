//! `outboard block` as an operator and a management program meet it: bad command lines, sockets of
//! every origin, signals, two programs on one image (cases C39, C40).
#![expect(clippy::expect_used, reason = "a failed step of a test is its end")]

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use outboard_frontend::block::{BlockDevice, BlockOptions};
use outboard_frontend::{Connection, Error};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, Signal, kill_process};

const PATIENCE: Duration = Duration::from_secs(20);

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outboard"));
    command
        .arg("block")
        .env("OUTBOARD_LOG", "info")
        .env_remove("LISTEN_FDS")
        .env_remove("NOTIFY_SOCKET");
    command
}

fn run<S: AsRef<OsStr>>(folder: &Path, args: impl IntoIterator<Item = S>) -> Output {
    program().args(args).current_dir(folder).stdin(Stdio::null()).output().expect("our program")
}

/// A folder with an image of 1 MiB.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    image(folder.path(), "disk.img", 1 << 20);
    folder
}

fn image(folder: &Path, name: &str, size: u64) {
    File::create(folder.join(name)).expect("an image").set_len(size).expect("room");
}

/// What is in a folder: names, sizes, kinds.
fn listing(folder: &Path) -> Vec<String> {
    let describe = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.expect("an entry");
        let found = entry.metadata().expect("metadata");
        format!("{:?} {:?} {}", entry.file_name(), found.file_type(), found.len())
    };
    let mut names: Vec<_> = std::fs::read_dir(folder).expect("a folder").map(describe).collect();
    names.sort();
    names
}

/// A running `outboard block`, killed with the test.
struct Running {
    child: Child,
    log: BufReader<std::process::ChildStderr>,
}

impl Running {
    /// Starts it and waits until it serves.
    fn start(folder: &Path, args: &[&str]) -> Self {
        Self::spawn(program().args(args).current_dir(folder).stdin(Stdio::null()))
    }

    fn spawn(command: &mut Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().expect("our program");
        let mut log = BufReader::new(child.stderr.take().expect("piped"));
        let mut said = String::new();
        while !said.contains("serving ") {
            let got = log.read_line(&mut said).expect("its log");
            assert_ne!(got, 0, "it ended: {said}");
        }
        Self { child, log }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("it lives");
    }

    /// Waits for its end; its exit code, and the rest of what it said.
    fn end(mut self) -> (Option<i32>, String) {
        let code = self.child.wait().expect("its end").code();
        let mut said = String::new();
        self.log.read_to_string(&mut said).expect("its log");
        (code, said)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Opens the disk. While another test starts a program, a connection that was closed here stays
/// open in it for a moment, and the next one is turned away.
fn connect(socket: &Path) -> BlockDevice {
    let started = Instant::now();
    loop {
        let connection = Connection::connect_patiently(socket, PATIENCE, PATIENCE);
        let connection = connection.expect("it listens");
        match BlockDevice::open(connection, BlockOptions::default()) {
            Err(Error::Closed { .. }) if started.elapsed() < PATIENCE => {}
            opened => return opened.expect("a disk"),
        }
    }
}

fn write_and_read(disk: &mut BlockDevice, fill: u8) {
    disk.write(3, &[fill; 4096]).expect("written");
    let mut bytes = [0; 4096];
    disk.read(3, &mut bytes).expect("read");
    assert_eq!(bytes, [fill; 4096]);
    disk.flush().expect("flushed");
}

// C39: nothing is made or removed.
#[test]
fn what_is_wrong_is_one_line_and_exit_code_2_and_nothing_is_made_or_removed() {
    let folder = folder();
    let path = folder.path();
    image(path, "odd.img", 513);
    image(path, "empty.img", 0);
    image(path, "blocks.img", 4096 + 512);
    std::fs::create_dir(path.join("directory")).expect("a directory");
    std::fs::write(path.join("plain"), "no socket").expect("a file");
    let _live = UnixListener::bind(path.join("live")).expect("a socket");
    let long = "s".repeat(108);
    let with = |args: &str| format!("--socket-path s {args}");
    let table = [
        ("".to_owned(), "no image"),
        ("disk.img".to_owned(), "no socket"),
        ("--socket-path s".to_owned(), "no image"),
        (with("none.img"), "none.img: No such file"),
        (with("none/none.img"), "No such file"),
        (with("directory"), "neither a regular file nor a block device"),
        (with("/dev/null"), "neither a regular file nor a block device"),
        (with("odd.img"), "513 bytes, no multiple of the block size 512"),
        (with("empty.img"), "is empty"),
        (with("blocks.img --block-size 4096"), "no multiple of the block size 4096"),
        (with("disk.img --block-size 513"), "must be 512 or 4096"),
        (with("disk.img --blk-file disk.img"), "cannot be used with"),
        (with("disk.img --fd 0"), "cannot be used with"),
        (with("disk.img --num-queues 0"), "--num-queues"),
        (with("disk.img --num-queues 257"), "--num-queues"),
        (with("disk.img --queue-size 100"), "power of two"),
        (with("disk.img --queue-size 65536"), "65536"),
        (with("disk.img --serial 123456789012345678901"), "21 bytes"),
        (with("disk.img --cache none"), "writethrough"),
        (with("disk.img --engine threads"), "uring"),
        (with("disk.img --engine uring --event-loop epoll"), "io_uring"),
        (with("disk.img --drain-deadline 0"), "--drain-deadline"),
        (with("disk.img --without what"), "no such feature"),
        (with("disk.img --reed-only"), "--read-only"),
        ("--socket-path live disk.img".to_owned(), "another program serves this socket"),
        ("--socket-path plain disk.img".to_owned(), "no socket"),
        ("--socket-path directory disk.img".to_owned(), "no socket"),
        ("--socket-path none/s disk.img".to_owned(), "No such file"),
        (format!("--socket-path {long} disk.img"), "108 bytes"),
        ("--connect none disk.img".to_owned(), "No such file"),
        ("--connect plain disk.img".to_owned(), "refused"),
        ("--fd 0 disk.img".to_owned(), "not a Unix stream socket"),
        ("--fd 99 disk.img".to_owned(), "Bad file descriptor"),
        ("--fd=-1 disk.img".to_owned(), "Bad file descriptor"),
    ];
    let before = listing(path);
    for (args, word) in table {
        let output = run(path, args.split_whitespace());
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args}: {errors}");
        assert_eq!(errors.lines().count(), 1, "{args}: {errors}");
        assert!(errors.starts_with("outboard: ") && errors.contains(word), "{args}: {errors}");
        assert!(output.stdout.is_empty(), "{args}");
        assert_eq!(listing(path), before, "{args}");
    }
    UnixStream::connect(path.join("live")).expect("the live socket still answers");
}

#[test]
fn capabilities_are_printed_without_anything_else() {
    let folder = tempfile::tempdir().expect("a folder");
    for args in [&["--print-capabilities"][..], &["--print-capabilities", "none.img"]] {
        let output = run(folder.path(), args);
        assert_eq!(output.status.code(), Some(0));
        let expected = "{\"type\":\"block\",\"features\":[\"read-only\",\"blk-file\"]}\n";
        assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
        assert!(output.stderr.is_empty());
    }
}

#[test]
fn the_help_has_a_line_for_each_vmm() {
    let output = run(Path::new("/"), ["--help"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0));
    for word in ["Examples:\n  outboard block", "vhost-user-blk-pci,chardev=", "vhost_user=true"] {
        assert!(text.contains(word), "{word}");
    }
}

// C11: drained, exit code 0, the socket unlinked; the limit is an option.
#[test]
fn both_signals_end_it_well_under_load_and_remove_the_socket() {
    for signal in [Signal::TERM, Signal::INT] {
        let folder = folder();
        let socket = folder.path().join("s");
        let device = Running::start(folder.path(), &["--socket-path", "s", "disk.img"]);
        let connection = Connection::connect(&socket, PATIENCE).expect("it listens");
        // The last request may never end: the device is gone.
        let timeout = Duration::from_secs(1);
        let options = BlockOptions { timeout, ..BlockOptions::default() };
        let mut disk = BlockDevice::open(connection, options).expect("a disk");
        write_and_read(&mut disk, 0x5a);
        let loader = std::thread::spawn(move || {
            let mut done = 0_u32;
            while disk.write(u64::from(done % 64), &[1; 512]).is_ok() {
                done += 1;
            }
            done
        });
        std::thread::sleep(Duration::from_millis(50));
        device.signal(signal);
        let (code, said) = device.end();
        assert_eq!(code, Some(0), "{said}");
        assert!(!socket.exists());
        assert!(loader.join().expect("ends") > 0);
    }
}

#[test]
fn c3_a_device_that_is_interrupted_all_the_time_fails_and_repeats_nothing() {
    for engine in ["sync", "uring"] {
        let folder = folder();
        let args = ["--socket-path", "s", "--engine", engine, "disk.img"];
        let device = Running::start(folder.path(), &args);
        let mut disk = connect(&folder.path().join("s"));
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    device.signal(Signal::STOP);
                    device.signal(Signal::CONT);
                }
            });
            for round in 0..200_u8 {
                write_and_read(&mut disk, round);
            }
            done.store(true, Ordering::Relaxed);
        });
        device.signal(Signal::TERM);
        assert_eq!(device.end().0, Some(0));
    }
}

// C39: a stale socket file.
#[test]
fn a_stale_socket_is_replaced_and_its_image_is_free_after_a_kill() {
    let folder = folder();
    let socket = folder.path().join("s");
    for round in 1..4 {
        let device = Running::start(folder.path(), &["--socket-path", "s", "--file", "disk.img"]);
        let mut disk = connect(&socket);
        write_and_read(&mut disk, round);
        device.signal(Signal::KILL);
        assert_eq!(device.end().0, None);
        assert!(socket.exists(), "nobody was left to remove it");
    }
}

#[test]
fn front_ends_are_served_one_after_the_other() {
    let folder = folder();
    let socket = folder.path().join("s");
    let device = Running::start(folder.path(), &["--socket-path", "s", "--blk-file=disk.img"]);
    for round in 1..20 {
        write_and_read(&mut connect(&socket), round);
    }
    device.signal(Signal::TERM);
    assert_eq!(device.end().0, Some(0));
}

// C40: listening and connected descriptors are told apart.
#[test]
fn an_inherited_socket_may_be_listening_or_connected() {
    let folder = folder();
    let socket: PathBuf = folder.path().join("inherited");
    let listener = UnixListener::bind(&socket).expect("a socket");
    let spawn = |fd: OwnedFd| {
        let args = ["--fd", "0", "disk.img"];
        Running::spawn(program().args(args).current_dir(folder.path()).stdin(fd))
    };
    let device = spawn(listener.into());
    for round in 1..4 {
        write_and_read(&mut connect(&socket), round);
    }
    device.signal(Signal::TERM);
    assert_eq!(device.end().0, Some(0));
    assert!(socket.exists(), "it is not ours to remove");

    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let device = spawn(theirs.into());
    let connection = Connection::from_fd(ours.into(), PATIENCE).expect("connected");
    let mut disk = BlockDevice::open(connection, BlockOptions::default()).expect("a disk");
    write_and_read(&mut disk, 9);
    drop(disk);
    assert_eq!(device.end().0, Some(0), "its only front-end has left");
}

// C40: a listening one from activation.
#[test]
fn a_socket_passed_by_activation_is_served() {
    let folder = folder();
    let socket = folder.path().join("activated");
    let listener = UnixListener::bind(&socket).expect("a socket");
    let mut shell = Command::new("sh");
    shell
        .args(["-c", "exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec \"$0\" block disk.img"])
        .arg(env!("CARGO_BIN_EXE_outboard"))
        .current_dir(folder.path())
        .stdin(OwnedFd::from(listener));
    let device = Running::spawn(&mut shell);
    write_and_read(&mut connect(&socket), 4);
    device.signal(Signal::INT);
    assert_eq!(device.end().0, Some(0));
}

/// What a service manager gets: its text, and its descriptor.
fn notice(socket: &UnixDatagram) -> (String, Option<OwnedFd>) {
    let mut text = [0; 1024];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let got = recvmsg(socket, &mut [std::io::IoSliceMut::new(&mut text)], &mut control, flags)
        .expect("a notice");
    let fd = control.drain().find_map(|part| match part {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    (String::from_utf8_lossy(&text[..got.bytes]).into_owned(), fd)
}

// The socket outlives the process: who connects in between is served by the next one.
#[test]
fn a_service_manager_keeps_the_socket_of_a_device_that_is_killed() {
    let folder = folder();
    let manager = UnixDatagram::bind(folder.path().join("notify")).expect("a socket");
    let args = ["--socket-path", "s", "disk.img"];
    let mut device = Running::spawn(
        program()
            .args(args)
            .current_dir(folder.path())
            .env("NOTIFY_SOCKET", folder.path().join("notify"))
            .stdin(Stdio::null()),
    );
    let (text, kept) = notice(&manager);
    assert_eq!(text, "FDSTORE=1\nFDNAME=outboard.socket\nREADY=1\n");
    let kept = kept.expect("the listening socket");
    write_and_read(&mut connect(&folder.path().join("s")), 1);
    device.child.kill().expect("it lives");
    device.child.wait().expect("it ends");
    // Nobody serves now; the connection waits in the queue of the socket that is kept.
    let early = Connection::connect(folder.path().join("s"), PATIENCE).expect("kept");
    let mut shell = Command::new("sh");
    let passed = "LISTEN_FDS=1 LISTEN_FDNAMES=outboard.socket LISTEN_PID=$$";
    let line = format!("exec 3<&0 </dev/null; {passed} exec \"$0\" block --socket-path s disk.img");
    shell
        .args(["-c", &line])
        .arg(env!("CARGO_BIN_EXE_outboard"))
        .current_dir(folder.path())
        .stdin(kept);
    let next = Running::spawn(&mut shell);
    write_and_read(&mut BlockDevice::open(early, BlockOptions::default()).expect("served"), 2);
    next.signal(Signal::TERM);
    assert_eq!(next.end().0, Some(0));
    assert!(!folder.path().join("s").exists(), "its socket file goes with it");
}

#[test]
fn it_connects_to_a_front_end_that_listens() {
    let folder = folder();
    let listener = UnixListener::bind(folder.path().join("vmm")).expect("a socket");
    let device = Running::start(folder.path(), &["--connect", "vmm", "disk.img"]);
    let (socket, _) = listener.accept().expect("it connects");
    let connection = Connection::from_fd(socket.into(), PATIENCE).expect("connected");
    let mut disk = BlockDevice::open(connection, BlockOptions::default()).expect("a disk");
    write_and_read(&mut disk, 5);
    drop(disk);
    assert_eq!(device.end().0, Some(0));
}

#[test]
fn two_programs_may_hold_an_image_but_only_one_may_run_on_it() {
    let folder = folder();
    let path = folder.path();
    let first = Running::start(path, &["--socket-path", "a", "disk.img"]);
    let second = Running::start(path, &["--socket-path", "b", "disk.img"]);
    let mut disk = connect(&path.join("a"));
    write_and_read(&mut disk, 1);
    let connection =
        Connection::connect_patiently(path.join("b"), PATIENCE, PATIENCE).expect("it listens");
    let refused = BlockDevice::open(connection, BlockOptions::default()).expect_err("refused");
    assert!(matches!(refused, Error::Refused { .. }), "{refused}");
    write_and_read(&mut disk, 2);
    drop(disk);
    first.signal(Signal::TERM);
    assert_eq!(first.end().0, Some(0));
    write_and_read(&mut connect(&path.join("b")), 3);
    second.signal(Signal::TERM);
    let (code, said) = second.end();
    assert_eq!(code, Some(0));
    let lines: Vec<_> =
        said.lines().filter(|line| line.contains("disk.img is in use by")).collect();
    assert_eq!(lines.len(), 1, "one clear line: {said}");
}

#[test]
fn readers_share_an_image_and_the_options_reach_the_disk() {
    let folder = folder();
    let path = folder.path();
    let args = ["--serial", "GOLD-7", "--num-queues", "3", "--block-size", "4096"];
    let mut readers = Vec::new();
    for (socket, name) in [("a", "--file=disk.img:read-only"), ("b", "--file=disk.img:read-only")] {
        let mut all = vec!["--socket-path", socket, name];
        all.extend(args);
        readers.push(Running::start(path, &all));
    }
    let mut disks = [connect(&path.join("a")), connect(&path.join("b"))];
    for disk in &mut disks {
        assert_eq!(disk.id().expect("an id"), b"GOLD-7");
        let config = disk.config();
        assert_eq!((config.num_queues, config.block_size), (3, 4096));
        assert!(config.read_only);
        disk.write(0, &[1; 512]).expect_err("read-only");
        disk.read(0, &mut [0; 512]).expect("read");
    }
}

#[test]
fn a_hidden_feature_is_not_offered() {
    let folder = folder();
    let path = folder.path();
    let without = ["--without", "discard", "--without", "EVENT_IDX", "--without", "mem-slots"];
    let bad = run(path, ["--socket-path", "s", "disk.img"].iter().chain(&without));
    assert_eq!(bad.status.code(), Some(2), "mem-slots is no name");
    let mut args = vec!["--socket-path", "s", "disk.img"];
    args.extend(&without[..4]);
    args.extend(["--without", "configure-mem-slots"]);
    let _device = Running::start(path, &args);
    let mut disk = connect(&path.join("s"));
    write_and_read(&mut disk, 6);
    assert!(disk.config().discard.is_none() && disk.config().write_zeroes.is_some());
    let offered = disk.vmm().offered();
    assert_eq!(offered & (1 << 13 | 1 << 29), 0, "{offered:#x}");
    let slots = outboard_protocol::ProtocolFeatures::CONFIGURE_MEM_SLOTS;
    assert!(!disk.vmm().offered_protocol().contains(slots));
}
