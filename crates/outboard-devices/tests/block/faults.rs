//! A host that fails: full and broken disks, transfers cut short, files that shrink. The faults come
//! from an engine that is put in front of the usual one (cases C1 to C6).

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use outboard::{LoopKind, Request};
use outboard_devices::block::{
    Block, BlockOptions, CacheMode, Engine, Image, Op, SyncEngine, feature,
};
use rustix::io::Errno;

use crate::disk::*;

const SECTORS: u64 = 64;

/// What goes wrong, and what was asked for.
#[derive(Default)]
struct Faults {
    write: Mutex<Option<Errno>>,
    read: Mutex<Option<Errno>>,
    sync: Mutex<Option<Errno>>,
    allocate: Mutex<Option<Errno>>,
    /// Most bytes of one transfer; 0 is no bound.
    piece: AtomicU32,
    syncs: AtomicU32,
    transfers: AtomicU32,
}

impl Faults {
    fn of(&self, op: Op) -> Option<Errno> {
        let place = match op {
            Op::Read { .. } => &self.read,
            Op::Write { .. } => &self.write,
            Op::Sync => &self.sync,
            Op::Allocate { .. } | Op::WriteZeros { .. } => &self.allocate,
        };
        *place.lock().expect("not poisoned")
    }

    fn set(place: &Mutex<Option<Errno>>, errno: impl Into<Option<Errno>>) {
        *place.lock().expect("not poisoned") = errno.into();
    }
}

struct Failing {
    faults: Arc<Faults>,
    image: Arc<Image>,
    engine: SyncEngine,
}

impl Failing {
    /// Moves at most `piece` bytes.
    fn transfer(&self, op: Op, piece: u64, request: &mut Request<'_>) -> io::Result<u64> {
        let file = self.image.file();
        match op {
            Op::Read { offset } => {
                let part = request.writable().len().min(piece) as usize;
                let mut bytes = vec![0; part];
                let got = file.read_at(&mut bytes, offset)?;
                request.writable().write_all(&bytes[..got]).map_err(io::Error::other)?;
                Ok(got as u64)
            }
            Op::Write { offset } => {
                let part = request.readable().len().min(piece) as usize;
                let mut bytes = vec![0; part];
                request.readable().read_exact(&mut bytes).map_err(io::Error::other)?;
                file.write_all_at(&bytes, offset)?;
                Ok(part as u64)
            }
            Op::WriteZeros { offset, length } => {
                let part = length.min(piece) as usize;
                file.write_all_at(&vec![0; part], offset)?;
                Ok(part as u64)
            }
            Op::Sync | Op::Allocate { .. } => Err(Errno::INVAL.into()),
        }
    }
}

impl Engine for Failing {
    fn run(&mut self, op: Op, request: &mut Request<'_>) -> io::Result<u64> {
        match op {
            Op::Sync => &self.faults.syncs,
            _ => &self.faults.transfers,
        }
        .fetch_add(1, Ordering::SeqCst);
        if let Some(errno) = self.faults.of(op)
            && !matches!(op, Op::WriteZeros { .. })
        {
            return Err(errno.into());
        }
        match self.faults.piece.load(Ordering::SeqCst) {
            0 => self.engine.run(op, request),
            _ if matches!(op, Op::Sync | Op::Allocate { .. }) => self.engine.run(op, request),
            piece => self.transfer(op, piece.into(), request),
        }
    }
}

fn failing(image: Image, cache: CacheMode, mask: u64) -> (Arc<Faults>, Driven) {
    let faults = Arc::new(Faults::default());
    let theirs = Arc::clone(&faults);
    let make = move |image: &Arc<Image>, _: &mut outboard::WorkerContext<'_>| {
        let engine = SyncEngine::new(Arc::clone(image));
        let faults = Arc::clone(&theirs);
        let engine = Failing { faults, image: Arc::clone(image), engine };
        Ok(Box::new(engine) as Box<dyn Engine>)
    };
    let options = BlockOptions { cache, ..BlockOptions::default() };
    let block = Block::with_engine(image, options, Arc::new(make)).expect("a disk");
    let mut disk = Driven::asleep(block, LoopKind::Epoll, mask);
    disk.activate(1);
    (faults, disk)
}

fn usual(image: Image) -> (Arc<Faults>, Driven) {
    failing(image, CacheMode::Writeback, u64::MAX)
}

#[test]
fn c1_a_full_disk_fails_the_request_once_and_the_next_ones_are_served() {
    let file = numbered_file(SECTORS);
    let (faults, mut disk) = usual(open(&file));
    Faults::set(&faults.write, Errno::NOSPC);
    assert_eq!(disk.write(0, &[1; 512]), IOERR);
    assert_eq!(faults.transfers.load(Ordering::SeqCst), 1, "no storm of retries");
    assert_eq!(disk.read(0, 512), [number(0); 512]);
    Faults::set(&faults.write, None);
    assert_eq!(disk.write(0, &[1; 512]), OK);
    assert_eq!(disk.read(0, 512), [1; 512]);
    Faults::set(&faults.allocate, Errno::NOSPC);
    assert_eq!(disk.run(WRITE_ZEROES, 0, &segment(0, 1, 0), 0).status, IOERR);
    assert_eq!(disk.run(DISCARD, 0, &segment(0, 1, 0), 0).status, IOERR);
    assert_eq!(disk.read(1, 512), [number(1); 512]);
    end(disk);
}

#[test]
fn c2_errors_of_the_disk_are_errors_of_the_request() {
    let file = numbered_file(SECTORS);
    let (faults, mut disk) = usual(open(&file));
    Faults::set(&faults.read, Errno::IO);
    let read = disk.run(IN, 0, &[], 1024);
    assert_eq!((read.status, read.used, read.data), (IOERR, 1025, vec![0; 1024]));
    Faults::set(&faults.read, None);
    Faults::set(&faults.write, Errno::IO);
    assert_eq!(disk.write(0, &[1; 512]), IOERR);
    Faults::set(&faults.write, None);
    assert_eq!(disk.read(0, 512), [number(0); 512]);
    end(disk);
}

#[test]
fn c2_a_flush_that_failed_is_never_said_to_have_succeeded_until_the_driver_resets() {
    let file = numbered_file(SECTORS);
    let (faults, mut disk) = usual(open(&file));
    assert_eq!(disk.write(0, &[1; 512]), OK);
    assert_eq!(disk.flush(), OK);
    Faults::set(&faults.sync, Errno::IO);
    assert_eq!(disk.flush(), IOERR);
    // As the kernel has it: the error is reported once, the next fdatasync succeeds.
    Faults::set(&faults.sync, None);
    let syncs = faults.syncs.load(Ordering::SeqCst);
    for _ in 0..3 {
        assert_eq!(disk.flush(), IOERR);
    }
    assert_eq!(faults.syncs.load(Ordering::SeqCst), syncs, "the disk is not asked again");
    assert_eq!(disk.write(1, &[2; 512]), OK, "writes promise nothing");
    disk.vmm.sleep().expect("sleeps");
    disk.vmm.wake().expect("wakes");
    assert_eq!(disk.flush(), IOERR, "a pause is no reset");
    disk.vmm.reset(Vec::new()).expect("stopped");
    disk.vmm.connection().reset_device().expect("reset");
    disk.activate(1);
    assert_eq!(disk.flush(), OK);
    end(disk);
}

#[test]
fn a_write_through_write_fails_when_it_cannot_be_made_durable() {
    let file = numbered_file(SECTORS);
    let (faults, mut disk) = failing(open(&file), CacheMode::Writethrough, u64::MAX);
    let syncs = |expected| assert_eq!(faults.syncs.load(Ordering::SeqCst), expected);
    assert_eq!(disk.write(0, &[1; 512]), OK);
    syncs(1);
    assert_eq!(disk.run(WRITE_ZEROES, 0, &segment(0, 8, 0), 0).status, OK);
    syncs(2);
    assert_eq!(disk.read(0, 512), [0; 512]);
    syncs(2);
    Faults::set(&faults.sync, Errno::IO);
    assert_eq!(disk.write(0, &[1; 512]), IOERR);
    syncs(3);
    end(disk);
}

#[test]
fn a_driver_that_knows_no_flush_gets_durable_writes() {
    let file = numbered_file(SECTORS);
    let mask = !(feature::FLUSH | feature::CONFIG_WCE);
    let (faults, mut disk) = failing(open(&file), CacheMode::Writeback, mask);
    assert_eq!(disk.write(0, &[1; 512]), OK);
    assert_eq!(faults.syncs.load(Ordering::SeqCst), 1);
    end(disk);
    let (faults, mut disk) = usual(open(&file));
    assert_eq!(disk.write(0, &[1; 512]), OK);
    assert_eq!(faults.syncs.load(Ordering::SeqCst), 0, "this one flushes by itself");
    end(disk);
}

#[test]
fn c4_transfers_of_one_byte_at_a_time_are_completed() {
    let file = numbered_file(SECTORS);
    let (faults, mut disk) = usual(open(&file));
    for piece in [1, 100, 511, 513] {
        faults.piece.store(piece, Ordering::SeqCst);
        let fill = u8::try_from(piece % 250).expect("small") + 1;
        assert_eq!(disk.write(3, &[fill; 1024]), OK, "{piece}");
        assert_eq!(disk.read(3, 1024), [fill; 1024], "{piece}");
        assert_eq!(disk.read(2, 512), [number(2); 512], "{piece}");
        assert_eq!(disk.read(5, 512), [number(5); 512], "{piece}");
    }
    assert!(faults.transfers.load(Ordering::SeqCst) >= 2048);
    end(disk);
}

#[test]
fn zeroes_are_written_where_the_file_system_has_no_other_way() {
    let file = numbered_file(SECTORS);
    let (faults, mut disk) = usual(open(&file));
    Faults::set(&faults.allocate, Errno::OPNOTSUPP);
    for (unmap, piece) in [(0, 0), (1, 0), (0, 1000)] {
        faults.piece.store(piece, Ordering::SeqCst);
        assert_eq!(disk.write(9, &[1; 20 * 512]), OK);
        let answer = disk.run(WRITE_ZEROES, 0, &segment(10, 17, unmap), 0);
        assert_eq!(answer.status, OK, "{unmap} {piece}");
        assert_eq!(disk.read(9, 512), [1; 512]);
        assert_eq!(disk.read(10, 17 * 512), [0; 17 * 512]);
        assert_eq!(disk.read(27, 1024), [1; 1024]);
    }
    assert_eq!(disk.run(DISCARD, 0, &segment(27, 1, 0), 0).status, UNSUPP);
    assert_eq!(disk.read(27, 512), [1; 512]);
    end(disk);
}

#[test]
fn c5_c6_a_file_that_shrank_reads_as_zeros_and_one_put_in_its_place_is_not_looked_at() {
    for engine in ENGINES {
        let file = numbered_file(SECTORS);
        let mut disk = Driven::new(open(&file), engine);
        file.as_file().set_len(10 * 512 + 100).expect("shortened");
        let read = disk.read(9, 3 * 512);
        assert_eq!(read[..512], [number(9); 512]);
        assert_eq!(read[512..612], [number(10); 100]);
        assert_eq!(read[612..], [0; 924], "never what the buffer held before");
        assert_eq!(disk.read(60, 512), [0; 512]);
        let other = numbered_file(SECTORS);
        std::fs::rename(other.path(), file.path()).expect("replaced");
        assert_eq!(disk.read(60, 512), [0; 512]);
        end(disk);
    }
}
