//! A host whose power goes, and one whose disk stands still (cases C37 and C22), made by an engine
//! that is put in front of the usual one.

use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use outboard::{LoopKind, Request};
use outboard_devices::block::{Block, BlockOptions, CacheMode, Engine, Image, Op, SyncEngine};

use crate::disk::*;

const SECTORS: u64 = 64;
const SECTOR: usize = 512;

/// Where the cache mode stands in the configuration.
const WRITEBACK_AT: u32 = 32;

/// A disk of `image` on an engine of the test's own, one queue for each thread.
fn on<E: Engine + 'static>(
    image: Image,
    cache: CacheMode,
    queues: u16,
    make: impl Fn(SyncEngine, &Arc<Image>) -> E + Send + Sync + 'static,
) -> Driven {
    let make = move |image: &Arc<Image>, _: &mut outboard::WorkerContext<'_>| {
        Ok(Box::new(make(SyncEngine::new(Arc::clone(image)), image)) as Box<dyn Engine>)
    };
    let threads = usize::from(queues);
    let options = BlockOptions { cache, num_queues: queues, threads, ..BlockOptions::default() };
    let block = Block::with_engine(image, options, Arc::new(make)).expect("a disk");
    let mut disk = Driven::asleep(block, LoopKind::Epoll, u64::MAX);
    disk.activate(queues);
    disk
}

/// The file is what the host's memory has; only what was synced is on the disk.
struct Volatile {
    engine: SyncEngine,
    image: Arc<Image>,
    durable: Arc<Mutex<Vec<u8>>>,
}

impl Engine for Volatile {
    fn run(&mut self, op: Op, request: &mut Request<'_>) -> io::Result<u64> {
        let done = self.engine.run(op, request)?;
        if op == Op::Sync {
            *self.durable.lock().expect("not poisoned") = contents(self.image.file());
        }
        Ok(done)
    }
}

/// Numbers that look random and are the same every time.
struct Dice(u64);

impl Dice {
    fn throw(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) % sides
    }
}

/// What the driver was told: what the disk holds, and what of it outlives the power.
struct Promised {
    now: Vec<u8>,
    durable: Vec<u8>,
    through: bool,
}

impl Promised {
    fn store(&mut self, sector: u64, bytes: &[u8]) {
        let at = usize::try_from(sector).expect("small") * SECTOR;
        self.now[at..at + bytes.len()].copy_from_slice(bytes);
        if self.through {
            self.durable.clone_from(&self.now);
        }
    }
}

/// One request, and what it promises once it is answered.
fn step(disk: &mut Driven, promised: &mut Promised, dice: &mut Dice) {
    let sector = dice.throw(SECTORS - 8);
    let length = dice.throw(8) + 1;
    let bytes = usize::try_from(length).expect("small") * SECTOR;
    match dice.throw(8) {
        0..4 => {
            let fill = u8::try_from(dice.throw(255)).expect("small");
            assert_eq!(disk.write(sector, &vec![fill; bytes]), OK);
            promised.store(sector, &vec![fill; bytes]);
        }
        4 => {
            let count = u32::try_from(length).expect("small");
            let answer = disk.run(WRITE_ZEROES, 0, &segment(sector, count, 0), 0);
            assert_eq!(answer.status, OK);
            promised.store(sector, &vec![0; bytes]);
        }
        5 => assert_eq!(disk.read(sector, bytes).len(), bytes),
        _ => {
            assert_eq!(disk.flush(), OK);
            promised.durable.clone_from(&promised.now);
        }
    }
}

// C37: the power goes after each request.
#[test]
fn c37_what_was_flushed_or_written_through_outlives_the_power() {
    for cache in [CacheMode::Writeback, CacheMode::Writethrough] {
        let file = numbered_file(SECTORS);
        let kept = Arc::new(Mutex::new(contents(file.as_file())));
        let durable = Arc::clone(&kept);
        let mut disk = on(open(&file), cache, 1, move |engine, image| {
            let (image, durable) = (Arc::clone(image), Arc::clone(&durable));
            Volatile { engine, image, durable }
        });
        let start = contents(file.as_file());
        let through = matches!(cache, CacheMode::Writethrough);
        let mut promised = Promised { now: start.clone(), durable: start, through };
        let mut dice = Dice(37);
        for turn in 0..600 {
            if turn % 100 == 99 {
                // The driver may choose the cache mode at any time.
                promised.through = !promised.through;
                let mode = [u8::from(!promised.through)];
                disk.vmm.write_config(WRITEBACK_AT, &mode).expect("written");
                assert_eq!(disk.flush(), OK);
                promised.durable.clone_from(&promised.now);
            }
            step(&mut disk, &mut promised, &mut dice);
            let left = kept.lock().expect("not poisoned");
            assert!(*left == promised.durable, "turn {turn}, through: {}", promised.through);
            drop(left);
        }
        end(disk);
    }
}

// C37: QEMU shows its guest the mode that it read last, also after a reset; a driver that believes
// in "write through" sends no flush.
#[test]
fn c37_a_reset_does_not_make_finished_writes_less_durable_than_the_driver_believes() {
    for (cache, chosen) in [(CacheMode::Writeback, 0), (CacheMode::Writethrough, 1)] {
        let file = numbered_file(SECTORS);
        let mut disk = on(open(&file), cache, 1, |engine, _| engine);
        disk.vmm.write_config(WRITEBACK_AT, &[chosen]).expect("written");
        disk.vmm.reset(Vec::new()).expect("stopped");
        disk.vmm.connection().reset_device().expect("reset");
        disk.activate(1);
        assert_eq!(disk.vmm.read_config(WRITEBACK_AT, 1).expect("read"), [0], "{cache:?}");
        end(disk);
    }
}

/// Whether reads of the first sector stand still, and whoever waits for that to end.
#[derive(Default)]
struct Gate {
    /// A read stands here.
    held: Mutex<(bool, bool)>,
    changed: Condvar,
}

impl Gate {
    fn stand(&self) {
        let mut state = self.held.lock().expect("not poisoned");
        state.1 = true;
        self.changed.notify_all();
        drop(self.changed.wait_while(state, |state| !state.0).expect("not poisoned"));
    }

    fn await_stall(&self) {
        let state = self.held.lock().expect("not poisoned");
        drop(self.changed.wait_while(state, |state| !state.1).expect("not poisoned"));
    }

    fn open(&self) {
        self.held.lock().expect("not poisoned").0 = true;
        self.changed.notify_all();
    }
}

struct Stalling {
    engine: SyncEngine,
    gate: Arc<Gate>,
}

impl Engine for Stalling {
    fn run(&mut self, op: Op, request: &mut Request<'_>) -> io::Result<u64> {
        if op == (Op::Read { offset: 0 }) {
            self.gate.stand();
        }
        self.engine.run(op, request)
    }
}

// C22: the disk stands still under one queue for as long as the test wants it to.
#[test]
fn c22_a_disk_that_stands_still_holds_its_queue_and_nobody_else() {
    let file = numbered_file(SECTORS);
    let gate = Arc::new(Gate::default());
    let theirs = Arc::clone(&gate);
    let mut disk = on(open(&file), CacheMode::Writeback, 2, move |engine, _| {
        let gate = Arc::clone(&theirs);
        Stalling { engine, gate }
    });
    let other = numbered_file(SECTORS);
    let mut neighbour = Driven::new(open(&other), ENGINES[0]);
    let pieces = [disk.arena.guest(), disk.arena.guest() + 4096, disk.arena.guest() + 8192];
    disk.store(&[(pieces[0], 16)], &header(IN, 0));
    let (head, room) = ([(pieces[0], 16)], [(pieces[1], 512), (pieces[2], 1)]);
    let stuck = disk.queues.first_mut().expect("two queues");
    assert!(stuck.add(&head, &room, 1).expect("fits"));
    stuck.kick().expect("kicked");
    gate.await_stall();

    let asked = Instant::now();
    for _ in 0..100 {
        disk.vmm.connection().get_features().expect("answered");
        disk.vmm.read_config(0, 8).expect("answered");
        disk.vmm.connection().set_vring_enable(1, true).expect("answered");
    }
    let longest = asked.elapsed() / 300;
    eprintln!("a message is answered in {longest:?} while the disk stands still");
    assert!(longest < Duration::from_millis(10), "{longest:?}");
    // The other queue of the same disk, and a disk beside it.
    disk.queues.swap(0, 1);
    assert_eq!(disk.read(9, 512), [number(9); 512]);
    assert_eq!(neighbour.read(3, 512), [number(3); 512]);

    // A stop waits for the request under way: the base is told when it is finished.
    let (vmm, queues) = (&mut disk.vmm, &mut disk.queues);
    std::thread::scope(|scope| {
        let stopping = scope.spawn(|| vmm.connection().get_vring_base(0).expect("stopped"));
        for _ in 0..50 {
            assert_eq!(neighbour.read(5, 512), [number(5); 512]);
        }
        assert!(!stopping.is_finished(), "the request is still under way");
        let stuck = queues.last_mut().expect("two queues");
        assert_eq!(stuck.pop().expect("whole"), None);
        gate.open();
        assert_eq!(stopping.join().expect("answered"), 1);
        assert_eq!(stuck.pop().expect("whole"), Some((1, 513)));
    });
    end(disk);
    end(neighbour);
}
