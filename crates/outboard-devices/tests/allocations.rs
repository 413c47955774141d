//! In the long run a request on the disk allocates nothing: not in the worker, not in the event loop,
//! not in the ring. With io_uring, room is made when more is under way than ever before.
#![expect(clippy::expect_used, reason = "a failed step of a test is its end")]

use std::alloc::System;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use outboard::{LoopKind, Server, WorkerDevice};
use outboard_devices::block::{Block, BlockOptions, EngineKind, Image, ImageOptions};
use outboard_frontend::block::{BlockDevice, BlockOptions as DriverOptions, Operation, Status};
use outboard_frontend::{Buffer, Connection};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region as StatsRegion, StatsAlloc};

/// Counts for all threads; the driver's side allocates nothing either.
#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const DEPTH: u64 = 16;

/// A batch of reads, writes, a discard, zeroes and a flush; all succeed.
fn batch(disk: &mut BlockDevice, data: &Buffer) {
    let queue = disk.queues().first_mut().expect("active");
    for n in 0..DEPTH {
        let piece = [(data.guest() + n * 4096, 4096)];
        let operation = match n {
            0 => Operation::Flush,
            1 => Operation::Discard { sector: 800, sectors: 8 },
            2 => Operation::WriteZeroes { sector: 900, sectors: 8, unmap: true },
            3 => Operation::GetId,
            _ if n % 2 == 0 => Operation::Read { sector: n * 8, data: &piece },
            _ => Operation::Write { sector: n * 8, data: &piece },
        };
        assert!(queue.submit(operation, n).expect("submitted"));
    }
    queue.kick().expect("kicked");
    for _ in 0..DEPTH {
        let done = queue.next(Duration::from_secs(20)).expect("ends");
        assert_eq!(done.status, Status::Ok);
    }
}

#[test]
fn requests_allocate_nothing_in_the_long_run() {
    for (engine, events, direct) in [
        (EngineKind::Sync, LoopKind::Epoll, false),
        (EngineKind::Sync, LoopKind::Uring, false),
        (EngineKind::Uring, LoopKind::Uring, false),
        (EngineKind::Uring, LoopKind::Uring, true),
        (EngineKind::Mmap, LoopKind::Epoll, false),
        (EngineKind::Mmap, LoopKind::Uring, false),
    ] {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a file");
        file.as_file().set_len(1 << 20).expect("room");
        let image = ImageOptions { direct, ..ImageOptions::default() };
        let image = Image::open(file.path(), image).expect("opens");
        let options = BlockOptions { engine, ..BlockOptions::default() };
        let block = Block::new(image, options).expect("a disk");
        let device = WorkerDevice::with_options(block, events.into()).expect("a device");
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let server = Server::from_socket(theirs.into()).expect("a server");
        let server = std::thread::spawn(move || server.serve(device).expect("served"));
        let connection = Connection::from_fd(OwnedFd::from(ours), Duration::from_secs(20));
        let connection = connection.expect("connected");
        let mut disk = BlockDevice::open(connection, DriverOptions::default()).expect("a disk");
        let data = disk.memory().allocate(1 << 20, 4096).expect("room");
        for _ in 0..200 {
            batch(&mut disk, &data);
        }
        let region = StatsRegion::new(ALLOCATOR);
        for _ in 0..200 {
            batch(&mut disk, &data);
        }
        let change = region.change();
        let allocated = change.allocations + change.reallocations;
        let allowed = if engine == EngineKind::Uring { 64 } else { 0 };
        assert!(allocated <= allowed, "{allocated} for {engine:?} on {events:?}, direct {direct}");
        drop((data, disk));
        server.join().expect("ended well");
    }
}
