//! Writes to the same sectors, and a process that repeats what another one left: the newer data stays.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use outboard::{FileId, FileOp, LoopKind, Request, Served, Server, WorkerDevice};
use outboard_devices::block::{Block, BlockOptions, Engine, Image, Op, SyncEngine};
use outboard_frontend::{Buffer, Connection, QueueSetup, SharedMemory, Virtqueue, Vmm, Wanted};
use tempfile::NamedTempFile;

use crate::disk::*;

const PATIENCE: Duration = Duration::from_secs(20);

/// Does everything at once, but the first write goes to a pipe that nobody reads from.
struct Stuck {
    engine: SyncEngine,
    pipe: FileId,
    armed: Arc<AtomicBool>,
}

impl Engine for Stuck {
    fn run(&mut self, op: Op, request: &mut Request<'_>) -> io::Result<u64> {
        self.engine.run(op, request)
    }

    fn now(&mut self, op: Op, request: &mut Request<'_>) -> Option<io::Result<u64>> {
        if matches!(op, Op::Write { .. }) && self.armed.swap(false, Ordering::SeqCst) {
            return None;
        }
        Some(self.engine.run(op, request))
    }

    fn start<'a>(
        &mut self,
        _: Op,
        request: Request<'a>,
        token: u64,
    ) -> Result<Served, Request<'a>> {
        request.submit(FileOp::Write { file: self.pipe, offset: u64::MAX }, token)
    }
}

/// A pipe that takes no more.
fn full_pipe() -> (OwnedFd, Arc<File>) {
    let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
    let mut writer = File::from(writer);
    rustix::io::ioctl_fionbio(&writer, true).expect("set");
    while writer.write(&[0; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).expect("set");
    (reader, Arc::new(writer))
}

/// A process with the disk; its first write is stuck if that is asked for.
fn process(file: &NamedTempFile, pipe: &Arc<File>, stuck: bool) -> Connection {
    let (armed, pipe) = (Arc::new(AtomicBool::new(stuck)), Arc::clone(pipe));
    let make = move |image: &Arc<Image>, context: &mut outboard::WorkerContext<'_>| {
        let engine = SyncEngine::new(Arc::clone(image));
        let pipe = context.add_file(Arc::clone(&pipe));
        Ok(Box::new(Stuck { engine, pipe, armed: Arc::clone(&armed) }) as Box<dyn Engine>)
    };
    let block =
        Block::with_engine(open(file), BlockOptions::default(), Arc::new(make)).expect("a disk");
    let device = WorkerDevice::with_options(block, LoopKind::Uring.into()).expect("a device");
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let server = Server::from_socket(theirs.into()).expect("a server");
    std::thread::spawn(move || server.serve(device).expect("served to the end"));
    Connection::from_fd(OwnedFd::from(ours), PATIENCE).expect("connected")
}

struct Guest {
    memory: SharedMemory,
    arena: Buffer,
    queue: Virtqueue,
}

impl Guest {
    /// Offers a request in a place of its own. Returns where its status will be.
    fn offer(&mut self, token: u64, header: &[u8], data: &[u8]) {
        let at = self.arena.guest() + token * 8192;
        let view = self.memory.view();
        view.write(at, header).expect("stored");
        view.write(at + 16, data).expect("stored");
        let length = u32::try_from(data.len()).expect("small");
        let readable = [(at, 16), (at + 16, length)];
        let readable = if data.is_empty() { &readable[..1] } else { &readable };
        let queue = &mut self.queue;
        assert!(queue.add(readable, &[(at + 8191, 1)], token).expect("fits"));
        queue.kick().expect("kicked");
    }

    /// The next finished request.
    fn answer(&mut self) -> u64 {
        let queue = &mut self.queue;
        assert!(queue.wait(PATIENCE).expect("waits"), "nothing finishes");
        queue.pop().expect("whole").expect("one").0
    }
}

/// What the sectors hold in the end, each byte once: an older write is stuck, newer requests come behind it; then another process takes over.
fn after_a_hand_over(newer: u32) -> Vec<u8> {
    let file = image_file(64 << 10);
    let (_reader, pipe) = full_pipe();
    let wanted = Wanted::default().with_skip_drain();
    let mut vmm = Vmm::new(process(&file, &pipe, true), wanted).expect("negotiated");
    let memory = SharedMemory::with_size(1 << 20).expect("memory");
    let arena = memory.allocate(256 << 10, 4096).expect("room");
    vmm.share_memory(memory.clone()).expect("shared");
    let setup = QueueSetup { index: 0, size: 64, indirect: 0 };
    let queue = vmm.activate(&[setup]).expect("active").remove(0);
    let mut guest = Guest { memory, arena, queue };
    let data = if newer == OUT { vec![2; 4096] } else { segment(0, 8, 0) };
    guest.offer(1, &header(OUT, 0), &[1; 4096]);
    guest.offer(2, &header(FLUSH, 0), &[]);
    assert_eq!(guest.answer(), 2, "the older write was taken, and is stuck");
    guest.offer(3, &header(newer, 0), &data);
    guest.offer(4, &header(OUT, 8), &[4; 512]);
    // What overlaps nothing goes by; whatever happens to the newer write has happened then.
    let mut done = vec![guest.answer()];
    if done == [3] {
        done.push(guest.answer());
    }
    vmm.park().expect("parked");
    vmm.reconnect(process(&file, &pipe, false)).expect("reconnected");
    vmm.wake().expect("goes on");
    assert_eq!(guest.answer(), 1);
    if !done.contains(&3) {
        assert_eq!(guest.answer(), 3);
    }
    let bytes = contents(file.as_file());
    assert_eq!(bytes[4096..4608], [4; 512]);
    let mut bytes = bytes[..4096].to_vec();
    bytes.dedup();
    bytes
}

/// C7: resubmission in order also where sectors overlap.
#[test]
fn c7_an_older_write_is_not_repeated_after_a_newer_one_to_the_same_sectors() {
    assert_eq!(after_a_hand_over(OUT), [2]);
    assert_eq!(after_a_hand_over(WRITE_ZEROES), [0]);
}
