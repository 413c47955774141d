//! In the long run a request on the disk allocates nothing: not in the worker, not in the event loop,
//! not in the ring. With io_uring, room is made when more is under way than ever before.
#![expect(clippy::expect_used, reason = "a failed step of a test is its end")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use outboard::{LoopKind, Server, WorkerDevice};
use outboard_devices::block::{Block, BlockOptions, EngineKind, Image, ImageOptions};
use outboard_frontend::block::{BlockDevice, BlockOptions as DriverOptions, Operation, Status};
use outboard_frontend::{Buffer, Connection};

/// The system's allocator, counting what other threads than the driver's do.
struct Counting;

static COUNT: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static DRIVER: Cell<bool> = const { Cell::new(false) };
}

fn count() {
    // A thread that is ending has no thread-locals any more.
    if !DRIVER.try_with(Cell::get).unwrap_or(true) {
        COUNT.fetch_add(1, Ordering::SeqCst);
    }
}

#[expect(unsafe_code, reason = "passes every call on as it is")]
// SAFETY: every call goes to the system's allocator with the same arguments; counting allocates
// nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(place, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

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
    DRIVER.set(true);
    for (engine, events, direct) in [
        (EngineKind::Sync, LoopKind::Epoll, false),
        (EngineKind::Sync, LoopKind::Uring, false),
        (EngineKind::Uring, LoopKind::Uring, false),
        (EngineKind::Uring, LoopKind::Uring, true),
    ] {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a file");
        file.as_file().set_len(1 << 20).expect("room");
        let image = ImageOptions { direct, ..ImageOptions::default() };
        let image = Image::open(file.path(), image).expect("opens");
        let options = BlockOptions { engine, ..BlockOptions::default() };
        let block = Block::new(image, options).expect("a disk");
        let device = WorkerDevice::with_loop(block, events).expect("a device");
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
        let before = COUNT.load(Ordering::SeqCst);
        for _ in 0..200 {
            batch(&mut disk, &data);
        }
        let allocated = COUNT.load(Ordering::SeqCst) - before;
        let allowed = if engine == EngineKind::Sync { 0 } else { 4 * DEPTH };
        assert!(allocated <= allowed, "{allocated} for {engine:?} on {events:?}, direct {direct}");
        drop((data, disk));
        server.join().expect("ended well");
    }
}
