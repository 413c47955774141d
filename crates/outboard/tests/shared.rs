//! Threads that serve several devices: none holds another one up, whatever it does (contract §1b).

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::guest::{BOTH, Guest, device, echo, number, thread};
use common::{PATIENCE, Ring};
use outboard::{
    Error, FileId, FileOp, LoopKind, QueueSpec, Request, Served, SharedOptions, SharedThread,
    Worker, WorkerContext, WorkerDevice, WorkerOptions,
};

/// Offers requests of four bytes.
fn offer(ring: &mut Ring, count: u16) {
    let guest = ring.data.guest();
    for _ in 0..count {
        ring.driver.add(&[(guest, 4)], &[(guest + 4096, 4)], 7).unwrap();
    }
    ring.driver.publish();
}

#[test]
fn devices_on_one_thread_come_and_go_while_the_others_serve() {
    for kind in BOTH {
        let thread = thread(kind);
        let mut stays = echo(&thread, "stays");
        let mut ring = stays.ring(0, 64);
        for round in 0..20u8 {
            let mut comes = echo(&thread, "comes");
            let mut other = comes.ring(0, 64);
            for step in 0..20 {
                ring.round(&[b'a', round, step]);
                other.round(&[b'b', round, step, 0]);
            }
            assert!(number(&thread, "devices/comes/0/turns").unwrap() > 0);
            comes.leave();
            assert_eq!(number(&thread, "devices/comes/0/turns"), None);
            ring.round(b"still here");
        }
        stays.leave();
    }
}

/// C32: the other device's rings and requests know nothing of it.
#[test]
fn c32_a_worker_that_panics_costs_its_own_rings_and_no_other_device() {
    for kind in BOTH {
        let thread = thread(kind);
        let (mut good, mut bad) = (echo(&thread, "good"), echo(&thread, "bad"));
        let mut ring = good.ring(0, 64);
        let mut broken = bad.ring(0, 64);
        offer(&mut ring, 10);
        broken.offer(b"!");
        broken.kick();
        ring.kick();
        for _ in 0..10 {
            assert_eq!(ring.answered(), 4);
        }
        assert!(common::rang(&broken.err, PATIENCE), "its ring is reported");
        ring.round(b"on and on");
        // Its device is still there: another ring starts.
        bad.front.get_vring_base(0).unwrap();
        bad.front.set_vring_base(0, 0).unwrap();
        bad.ring(0, 64).round(b"again");
        bad.leave();
        ring.round(b"still");
        good.leave();
    }
}

/// Takes its time for each request, and counts them.
struct Slow(Arc<AtomicU64>);

impl Worker for Slow {
    fn serve(&mut self, request: Request<'_>) -> Result<Served, Error> {
        let until = Instant::now() + Duration::from_millis(1);
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(request.done(0))
    }
}

/// Ends a flood, also when a test fails beside it.
struct Stops<'a>(&'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Keeps a ring full until it is told to stop.
fn flood(ring: &mut Ring, stop: &AtomicBool) {
    offer(ring, 200);
    ring.kick();
    while !stop.load(Ordering::Relaxed) {
        let mut again = 0;
        while ring.driver.pop_used().unwrap().is_some() {
            again += 1;
        }
        offer(ring, again);
        ring.kick();
        std::thread::yield_now();
    }
}

/// C22: a guest that always has requests, each of which takes long, beside one that has few.
#[test]
fn c22_a_device_that_never_has_enough_leaves_another_one_its_turns() {
    for kind in BOTH {
        let thread = thread(kind);
        let served = Arc::<AtomicU64>::default();
        let count = Arc::clone(&served);
        let slow = device("slow", &thread, 1, move |_| Ok(Slow(Arc::clone(&count))));
        let (mut slow, mut quick) = (Guest::of(slow.unwrap()), echo(&thread, "quick"));
        let (mut full, mut ring) = (slow.ring(0, 512), quick.ring(0, 64));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| flood(&mut full, &stop));
            let _stops = Stops(&stop);
            while served.load(Ordering::SeqCst) < 200 {
                std::thread::yield_now();
            }
            (0..50).for_each(|_| ring.round(b"quick"));
        });
        quick.leave();
        slow.leave();
    }
}

/// Reads from a pipe with the kernel's help.
struct Reader(FileId);

impl Worker for Reader {
    fn serve(&mut self, request: Request<'_>) -> Result<Served, Error> {
        request
            .submit(FileOp::Read { file: self.0, offset: 0 }, 0)
            .map_err(|_| Error::refused("no io_uring"))
    }
}

/// Two devices whose queues and files have the same numbers.
#[test]
fn what_the_kernel_does_for_one_device_comes_back_to_that_one() {
    let thread = thread(LoopKind::Uring);
    let reader = |name: &str| {
        let (pipe, writer) = rustix::pipe::pipe().unwrap();
        let pipe = Arc::new(File::from(pipe));
        let make =
            move |context: &mut WorkerContext<'_>| Ok(Reader(context.add_file(Arc::clone(&pipe))));
        (Guest::of(device(name, &thread, 1, make).unwrap()), writer)
    };
    let ((mut one, first), (mut two, second)) = (reader("one"), reader("two"));
    let (mut a, mut b) = (one.ring(0, 64), two.ring(0, 64));
    for ring in [&mut a, &mut b] {
        offer(ring, 1);
        ring.kick();
    }
    rustix::io::write(&second, b"two!").unwrap();
    assert_eq!(b.answered(), 4);
    assert!(a.driver.pop_used().unwrap().is_none());
    rustix::io::write(&first, b"one!").unwrap();
    assert_eq!(a.answered(), 4);
    let mut back = [0; 4];
    a.data.read(4096, &mut back).unwrap();
    assert_eq!(&back, b"one!");
    // A file goes with its device: whoever writes hears that nobody reads any more.
    two.leave();
    assert_eq!(rustix::io::write(&second, b"gone"), Err(rustix::io::Errno::PIPE));
    one.leave();
}

#[test]
fn a_device_that_cannot_be_built_on_a_shared_thread_says_why_and_leaves_nothing() {
    for kind in BOTH {
        let thread = thread(kind);
        let mut stays = echo(&thread, "stays");
        let mut ring = stays.ring(0, 64);
        let refused =
            device::<common::Echo>("no", &thread, 1, |_| Err(Error::refused("not today")));
        assert!(refused.is_err_and(|error| error.to_string().contains("not today")));
        let panicked = device::<common::Echo>("no", &thread, 1, |_| panic!("as the test asked"));
        assert!(panicked.is_err_and(|error| error.to_string().contains("panicked")));
        ring.round(b"on");
        assert_eq!(number(&thread, "devices/no/0/turns"), None);
        stays.leave();
    }
}

struct Loner;

impl outboard::Model for Loner {
    type Worker = common::Echo;

    fn queues(&self) -> Vec<QueueSpec> {
        vec![QueueSpec::new("a", 64)]
    }

    fn make_worker(&self) -> outboard::MakeWorker<common::Echo> {
        Arc::new(|_| Ok(common::Echo))
    }

    fn shares_threads(&self) -> bool {
        false
    }
}

#[test]
fn a_device_whose_workers_change_their_thread_gets_none_that_is_shared() {
    let shared = vec![thread(LoopKind::Auto)];
    let options = WorkerOptions { shared, ..WorkerOptions::default() };
    let refused = WorkerDevice::with_options(Loner, options).err().unwrap().to_string();
    assert!(refused.contains("threads of their own"), "{refused}");
    assert!(WorkerDevice::new(Loner).is_ok());
}

#[test]
fn a_shared_thread_ends_with_its_last_device() {
    let alive = || {
        std::fs::read_dir("/proc/self/task")
            .unwrap()
            .filter(|task| {
                let name = task.as_ref().unwrap().path().join("comm");
                std::fs::read_to_string(name).is_ok_and(|name| name.trim() == "lonely")
            })
            .count()
    };
    let thread = SharedThread::start("lonely", &SharedOptions::default()).unwrap();
    let mut guest = echo(&thread, "last");
    drop(thread);
    guest.ring(0, 64).round(b"served");
    assert_eq!(alive(), 1);
    guest.leave();
    let until = Instant::now() + PATIENCE;
    while alive() > 0 {
        assert!(Instant::now() < until, "it goes on");
        std::thread::yield_now();
    }
}
