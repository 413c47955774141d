//! Disks in memory: files of tmpfs through their mapping, `ram:` and `null:`.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Instant;

use outboard::{Fact, LoopKind, WorkerOptions};
use outboard_devices::block::{Block, BlockOptions, EngineKind, Image, ImageOptions};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::disk::*;

const SECTORS: u64 = 256;

/// A file on tmpfs, empty or numbered, and a disk on it.
fn disk_in_memory(numbered: bool) -> (File, Driven) {
    let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).expect("a memfd"));
    file.set_len(SECTORS * 512).expect("room");
    if numbered {
        for sector in 0..SECTORS {
            file.write_all_at(&[number(sector); 512], sector * 512).expect("written");
        }
    }
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let image = Image::open(path, ImageOptions::default()).expect("opens");
    assert!(image.in_memory());
    // What `auto` takes: a mapping.
    let disk = Driven::new(image, (EngineKind::Auto, LoopKind::Uring));
    (file, disk)
}

/// Bytes that the file takes.
fn taken(file: &File) -> u64 {
    file.metadata().expect("there").blocks() * 512
}

#[test]
fn reading_a_hole_of_a_file_in_memory_takes_no_memory_for_it() {
    let (file, mut disk) = disk_in_memory(false);
    for _ in 0..2 {
        for sector in (0..SECTORS).step_by(8) {
            assert_eq!(disk.read(sector, 4096), [0; 4096]);
        }
    }
    assert_eq!(taken(&file), 0, "holes stay holes");
    assert_eq!(disk.write(8, &[7; 512]), OK);
    assert_eq!(disk.write(9, &[8; 512]), OK);
    assert_eq!(disk.read(8, 4096), [&[7; 512][..], &[8; 512], &[0; 3072]].concat());
    assert_eq!(taken(&file), 4096, "one page");
    assert_eq!(disk.read(0, 65536 / 2).iter().filter(|byte| **byte != 0).count(), 1024);
    assert_eq!(taken(&file), 4096, "a read across data and holes");
    end(disk);
}

#[test]
fn what_was_discarded_is_free_and_stays_so_when_it_is_read() {
    let (file, mut disk) = disk_in_memory(true);
    let all = taken(&file);
    for sector in (0..SECTORS).step_by(8) {
        assert_eq!(disk.read(sector, 512), [number(sector); 512], "known to be there");
    }
    assert_eq!(disk.run(DISCARD, 0, &segment(64, 64, 0), 0).status, OK);
    assert_eq!(disk.run(WRITE_ZEROES, 0, &segment(128, 8, 1), 0).status, OK);
    assert_eq!(disk.run(WRITE_ZEROES, 0, &segment(160, 8, 0), 0).status, OK);
    assert_eq!(disk.read(64, 64 * 512), [0; 64 * 512]);
    assert_eq!(disk.read(128, 4096), [0; 4096]);
    assert_eq!(disk.read(160, 4096), [0; 4096]);
    assert_eq!(taken(&file), all - 64 * 512 - 4096, "zeros that keep their space do");
    assert_eq!(disk.read(136, 512), [number(136); 512]);
    end(disk);
}

#[test]
fn c5_a_file_cut_short_under_its_mapping_answers_as_it_does_to_system_calls() {
    let (file, mut disk) = disk_in_memory(true);
    for sector in (0..SECTORS).step_by(8) {
        disk.read(sector, 4096);
    }
    file.set_len(16 * 512).expect("shortened");
    // What the next ones touch is no longer there.
    assert_eq!(disk.read(64, 4096), [0; 4096]);
    assert_eq!(disk.read(8, 4096), (8..16).flat_map(|n| [number(n); 512]).collect::<Vec<_>>());
    assert_eq!(disk.flush(), IOERR, "writes into the part of a page may be lost");
    assert_eq!(disk.write(32, &[9; 512]), OK);
    assert_eq!(contents(&file)[32 * 512..33 * 512], [9; 512], "in the file, not beside it");
    assert_eq!(disk.read(32, 1024), [[9; 512], [0; 512]].concat());
    assert_eq!(disk.read(0, 512), [number(0); 512]);
    end(disk);
}

#[test]
fn c5_a_write_that_meets_the_hole_is_in_the_file() {
    let (file, mut disk) = disk_in_memory(true);
    for sector in (0..SECTORS).step_by(8) {
        disk.read(sector, 4096);
    }
    file.set_len(16 * 512).expect("shortened");
    assert_eq!(disk.write(33, &[9; 1024]), OK);
    assert_eq!(contents(&file)[33 * 512..], [9; 1024], "as with any other engine");
    end(disk);
}

#[test]
fn a_disk_of_memory_keeps_what_was_written_and_one_of_nothing_does_not() {
    let open = |name: &str| Image::open(name, ImageOptions::default()).expect("opens");
    let mut ram = Driven::new(open("ram:128k"), (EngineKind::Auto, LoopKind::Uring));
    assert_eq!(ram.read(0, 4096), [0; 4096]);
    assert_eq!(ram.write(3, &[5; 1024]), OK);
    assert_eq!(ram.flush(), OK);
    assert_eq!(ram.read(2, 2048), [[0; 512], [5; 512], [5; 512], [0; 512]].concat());
    assert_eq!(ram.run(IN, 256, &[], 512).status, IOERR, "behind its end");
    end(ram);
    for engine in ENGINES {
        let mut null = Driven::new(open("null:128k"), engine);
        assert_eq!(null.write(3, &[5; 1024]), OK);
        assert_eq!(null.read(3, 512), [UNTOUCHED; 512]);
        assert_eq!(null.flush(), OK);
        assert_eq!(null.run(DISCARD, 0, &segment(8, 8, 0), 0).status, OK);
        assert_eq!(null.run(WRITE_ZEROES, 0, &segment(8, 8, 0), 0).status, OK);
        assert_eq!(null.run(OUT, 255, &[1; 1024], 0).status, IOERR, "behind its end");
        end(null);
    }
}

#[test]
fn a_disk_of_memory_does_not_leave_its_process_by_a_state_that_lacks_what_it_holds() {
    let image = Image::open("ram:128k", ImageOptions::default()).expect("opens");
    let mut block = Block::new(image, BlockOptions::default()).expect("a disk");
    let error = outboard::Model::snapshot(&mut block).expect_err("refused").to_string();
    assert!(error.contains("stays with its process"), "{error}");
}

#[test]
fn a_worker_that_never_sleeps_serves_and_hears_what_is_changed() {
    for event_loop in [LoopKind::Uring, LoopKind::Epoll] {
        for kind in [EngineKind::Auto, EngineKind::Sync, EngineKind::Uring] {
            if (kind, event_loop) == (EngineKind::Uring, LoopKind::Epoll) {
                continue;
            }
            let file = numbered_file(SECTORS);
            let options = BlockOptions { engine: kind, ..BlockOptions::default() };
            let block = Block::new(open(&file), options).expect("a disk");
            let never = WorkerOptions {
                event_loop,
                poll: WorkerOptions::NEVER_SLEEP,
                ..WorkerOptions::default()
            };
            let mut disk = Driven::asleep(block, never, u64::MAX);
            disk.activate(1);
            for sector in 0..SECTORS {
                assert_eq!(disk.read(sector, 512), [number(sector); 512]);
            }
            disk.vmm.sleep().expect("its rings stop");
            disk.vmm.wake().expect("and start");
            assert_eq!(disk.write(1, &[9; 512]), OK);
            assert_eq!(disk.flush(), OK);
            assert_eq!(disk.read(1, 512), [9; 512]);
            end(disk);
        }
    }
}

/// Requests of one queue that write everything.
const AT_ONCE: u64 = 4;
const BYTES: u32 = 1 << 20;

/// Has each of two queues write the whole image `AT_ONCE` times, and waits for the answers.
fn write_over_each_other(disk: &mut Driven) {
    for round in 0..AT_ONCE {
        for queue in 0..2_u64 {
            let at = disk.arena.guest() + queue * (4 << 20);
            let readable = [(at, 16), (at + 4096, BYTES)];
            let ring = &mut disk.queues[usize::try_from(queue).expect("small")];
            assert!(ring.add(&readable, &[(at + 256 + round, 1)], round).expect("fits"));
        }
    }
    for ring in &mut disk.queues {
        ring.kick().expect("kicked");
    }
    for ring in &mut disk.queues {
        for round in 0..AT_ONCE {
            assert!(ring.wait(PATIENCE).expect("waits"), "never written");
            assert_eq!(ring.pop().expect("whole"), Some((round, 1)));
        }
    }
}

/// Until they have met often enough, which is seen at the counter and hangs on no machine's speed.
#[test]
fn b60_workers_of_a_mapped_image_wait_for_each_others_writes() {
    let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).expect("a memfd"));
    file.set_len(BYTES.into()).expect("room");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let image = Image::open(path, ImageOptions::default()).expect("opens");
    let engine = EngineKind::Mmap;
    let options = BlockOptions { engine, num_queues: 2, threads: 2, ..BlockOptions::default() };
    let (block, workers) = (Block::new(image, options).expect("a disk"), WorkerOptions::default());
    let inspect = workers.inspect.clone();
    let mut disk = Driven::asleep(block, workers, u64::MAX);
    disk.activate(2);
    for (queue, fill) in [(0, 0x11), (1, 0x22)] {
        let at = disk.arena.guest() + queue * (4 << 20);
        disk.store(&[(at, 16)], &header(OUT, 0));
        disk.store(&[(at + 4096, BYTES)], &vec![fill; BYTES as usize]);
    }
    let waits = || match inspect.facts().into_iter().find(|(name, _)| name == "image/write-waits") {
        Some((_, Fact::Number(waits))) => waits,
        other => panic!("a mapped image shows its waits: {other:?}"),
    };
    let until = Instant::now() + 6 * PATIENCE;
    while waits() < 20 {
        assert!(Instant::now() < until, "they never wait for each other: {}", waits());
        write_over_each_other(&mut disk);
        let stored = contents(&file);
        let mixed = stored.chunks(512).any(|sector| sector.iter().any(|byte| *byte != sector[0]));
        assert!(!mixed, "a sector of both");
    }
    end(disk);
}
