//! Our disk under a front-end that we did not write: the `blkio` crate, which is what libblkio and
//! QEMU's own block layer drive vhost-user disks with. It insists on memory slots.

#![expect(clippy::expect_used, reason = "a failed step of a test is its end")]

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use outboard::{LoopKind, Server, StopHandle, WorkerDevice};
use outboard_devices::block::{Block, BlockOptions, EngineKind, Image, ImageOptions};

const MIB: usize = 1 << 20;
const DISK: usize = 16 * MIB;

/// A running device, stopped with the test.
struct Device {
    stop: StopHandle,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Device {
    fn start(socket: &Path, image: &Path, options: BlockOptions, events: LoopKind) -> Self {
        let image = Image::open(image, ImageOptions::default()).expect("opens");
        let block = Block::new(image, options).expect("a disk");
        let device = WorkerDevice::with_options(block, events.into()).expect("a device");
        let server = Server::listen(socket).expect("listens");
        let stop = server.stop_handle();
        let thread = std::thread::spawn(move || server.serve(device).expect("served"));
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the device ends well");
        }
    }
}

/// A connected disk with memory for its data.
struct Disk {
    queues: Vec<Blkioq>,
    region: MemoryRegion,
    memory: File,
    blkio: Blkio,
}

impl Disk {
    fn connect(socket: &Path, queues: i32) -> Self {
        let mut blkio = Blkio::new("virtio-blk-vhost-user").expect("the driver");
        blkio.set_str("path", socket.to_str().expect("text")).expect("path");
        blkio.connect().expect("connects");
        blkio.set_i32("num-queues", queues).expect("queues");
        blkio.set_i32("queue-size", 128).expect("queue size");
        let started = blkio.start().expect("starts");
        let region = blkio.alloc_mem_region(4 * MIB).expect("memory");
        blkio.map_mem_region(&region).expect("shared");
        let memory = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/self/fd/{}", region.fd))
            .expect("the memory's file");
        Self { queues: started.queues, region, memory, blkio }
    }

    fn fill(&self, at: usize, bytes: &[u8]) {
        let start = u64::try_from(self.region.fd_offset).expect("an offset") + at as u64;
        self.memory.write_all_at(bytes, start).expect("filled");
    }

    fn look(&self, at: usize, length: usize) -> Vec<u8> {
        let start = u64::try_from(self.region.fd_offset).expect("an offset") + at as u64;
        let mut bytes = vec![0; length];
        self.memory.read_exact_at(&mut bytes, start).expect("read");
        bytes
    }

    fn address(&self, at: usize) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.region.addr + at)
    }

    /// Submits by `submit` on queue `index` and answers how each of `count` requests ended.
    fn run(&mut self, index: usize, count: usize, submit: impl FnOnce(&mut Blkioq)) -> Vec<i32> {
        let queue = &mut self.queues[index];
        submit(queue);
        let mut ended: Vec<_> = (0..count).map(|_| MaybeUninit::<Completion>::uninit()).collect();
        let mut patience = Duration::from_secs(20);
        let got = queue.do_io(&mut ended, count, Some(&mut patience), None).expect("served");
        assert_eq!(got, count);
        let result = |completion: MaybeUninit<Completion>| {
            #[expect(unsafe_code, reason = "blkio hands completions out this way")]
            // SAFETY: `do_io` says that it wrote all `count` of them.
            let completion = unsafe { completion.assume_init() };
            completion.ret
        };
        ended.into_iter().map(result).collect()
    }
}

fn pattern(seed: usize, length: usize) -> Vec<u8> {
    (0..length).map(|at| u8::try_from((at / 7 + seed * 31 + at) % 251).unwrap_or(0)).collect()
}

#[test]
fn blkio_reads_writes_flushes_zeroes_and_discards_our_disk() {
    for (engine, events) in [
        (EngineKind::Sync, LoopKind::Epoll),
        (EngineKind::Sync, LoopKind::Uring),
        (EngineKind::Uring, LoopKind::Uring),
        (EngineKind::Mmap, LoopKind::Uring),
    ] {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let (image, socket) = (folder.path().join("disk.img"), folder.path().join("s"));
        let file = File::create_new(&image).expect("an image");
        file.set_len(DISK as u64).expect("room");
        let options = BlockOptions { engine, ..BlockOptions::default() };
        let device = Device::start(&socket, &image, options, events);
        let mut disk = Disk::connect(&socket, 1);
        assert_eq!(disk.blkio.get_u64("capacity").expect("known"), DISK as u64);
        assert_eq!(disk.blkio.get_i32("max-segments").expect("known"), 126);

        let data = pattern(1, MIB);
        disk.fill(0, &data);
        let (from, to) = (disk.address(0), disk.address(2 * MIB));
        let flags = ReqFlags::empty();
        assert_eq!(disk.run(0, 1, |queue| queue.write(4096, from, MIB, 1, flags)), [0]);
        assert_eq!(disk.run(0, 1, |queue| queue.flush(2, flags)), [0]);
        let mut stored = vec![0; MIB];
        std::fs::File::open(&image).expect("there").read_exact_at(&mut stored, 4096).expect("read");
        assert!(stored == data, "the image holds what was written");
        assert_eq!(disk.run(0, 1, |queue| queue.read(4096, to, MIB, 3, flags)), [0]);
        assert!(disk.look(2 * MIB, MIB) == data, "and it is read back");

        assert_eq!(disk.run(0, 1, |queue| queue.discard(8192, 65536, 4, flags)), [0]);
        assert_eq!(disk.run(0, 1, |queue| queue.write_zeroes(131_072, 8192, 5, flags)), [0]);
        let kept = ReqFlags::NO_UNMAP;
        assert_eq!(disk.run(0, 1, |queue| queue.write_zeroes(262_144, 512, 6, kept)), [0]);
        let mut wanted = data.clone();
        for (start, length) in [(8192, 65536), (131_072, 8192), (262_144, 512)] {
            wanted[start - 4096..start - 4096 + length].fill(0);
        }
        assert_eq!(disk.run(0, 1, |queue| queue.read(4096, to, MIB, 7, flags)), [0]);
        assert!(disk.look(2 * MIB, MIB) == wanted, "zeros where they belong");
        let outside = DISK as u64;
        assert!(disk.run(0, 1, |queue| queue.read(outside, to, 512, 8, flags))[0] < 0);
        drop(disk);
        drop(device);
        assert!(!socket.exists(), "the socket is gone with the device");
    }
}

#[test]
fn blkio_keeps_two_queues_full_of_requests() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let (image, socket) = (folder.path().join("disk.img"), folder.path().join("s"));
    File::create_new(&image).expect("an image").set_len(DISK as u64).expect("room");
    let options = BlockOptions { num_queues: 2, threads: 2, ..BlockOptions::default() };
    let device = Device::start(&socket, &image, options, LoopKind::Auto);
    let mut disk = Disk::connect(&socket, 2);
    let flags = ReqFlags::empty();
    for round in 0..20 {
        for queue in 0..2 {
            let data = pattern(round * 2 + queue, 32 * 4096);
            disk.fill(queue * MIB, &data);
            let base = disk.address(queue * MIB).addr();
            let at = |n: usize| std::ptr::with_exposed_provenance_mut(base + n * 4096);
            let start = (queue * 8 * MIB) as u64;
            let results = disk.run(queue, 32, |ring| {
                for n in 0..32 {
                    ring.write(start + 4096 * n as u64, at(n), 4096, n, flags);
                }
            });
            assert_eq!(results, [0; 32]);
            disk.fill(queue * MIB, &vec![0; 32 * 4096]);
            let results = disk.run(queue, 32, |ring| {
                for n in (0..32).rev() {
                    ring.read(start + 4096 * n as u64, at(n), 4096, n, flags);
                }
            });
            assert_eq!(results, [0; 32]);
            assert!(disk.look(queue * MIB, 32 * 4096) == data, "round {round}, queue {queue}");
        }
    }
    drop(disk);
    drop(device);
}
