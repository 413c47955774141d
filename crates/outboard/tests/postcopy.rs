//! Postcopy: the guest runs here while its memory still comes (vhost-user, "Migration: postcopy").
//!
//! The front-end of these tests keeps the guest's old memory aside and serves the back-end's faults
//! from it. Where userfaultfd is not allowed, PAGEFAULT is not offered, and the tests are skipped.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use common::{FEATURES, Rig, Ring};
use outboard::memory::FaultServer;
use outboard::protocol::{MemRegion, ProtocolFeatures};
use outboard::{HandlerOptions, LoopKind};
use outboard_frontend::SharedMemory;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const PAGE: usize = 4096;
const PROTOCOL: ProtocolFeatures =
    ProtocolFeatures::REPLY_ACK.union(ProtocolFeatures::PAGEFAULT).union(ProtocolFeatures::MQ);

/// A device and a front-end that have negotiated postcopy; none where it is not offered.
fn advised(kind: LoopKind) -> Option<(Rig, FaultServer, MemRegion)> {
    let mut rig = Rig::bare(kind, HandlerOptions::default());
    rig.front.set_owner().unwrap();
    rig.front.get_features().unwrap();
    if !offered(&mut rig) {
        return None;
    }
    rig.front.set_protocol_features(PROTOCOL).unwrap();
    rig.front.set_features(FEATURES).unwrap();
    let faults = rig.front.postcopy_advise().unwrap();
    rig.front.postcopy_listen().unwrap();
    let there = rig.front.postcopy_mem_table(rig.memory.regions()).unwrap();
    rig.front.postcopy_ready().unwrap();
    // Everything before it has been carried out when this is answered.
    rig.front.get_features().unwrap();
    let (spec, _) = rig.memory.regions().next().unwrap();
    assert_eq!(there.len(), 1);
    assert_eq!((there[0].guest_addr, there[0].size), (spec.guest_addr, spec.size));
    assert_ne!(there[0].user_addr, spec.user_addr);
    Some((rig, faults, there[0]))
}

/// Whether postcopy can be had here; a skip is said aloud.
fn offered(rig: &mut Rig) -> bool {
    let offered = rig.front.get_protocol_features().unwrap();
    if offered.contains(ProtocolFeatures::PAGEFAULT) {
        return true;
    }
    // As `xtask` reads it.
    let line = "SKIPPED postcopy: userfaultfd is not allowed here";
    eprintln!("{line}");
    if let Some(list) = std::env::var_os("OUTBOARD_SKIPS") {
        let mut list = std::fs::OpenOptions::new().append(true).create(true).open(list).unwrap();
        writeln!(list, "{line}").unwrap();
    }
    assert!(std::env::var_os("OUTBOARD_NO_SKIPS").is_none(), "{line}");
    false
}

fn start(rig: &mut Rig) -> Ring {
    let ring = rig.ring(0);
    rig.set_up(&ring);
    rig.front.set_vring_kick(0, &ring.kick).unwrap();
    rig.front.set_vring_enable(0, true).unwrap();
    ring
}

/// Brings pages: each is full of its own number.
struct Source {
    served: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Source {
    fn serve(faults: FaultServer, memory: &SharedMemory, there: MemRegion) -> Self {
        let (_, file) = memory.regions().next().unwrap();
        let file: std::fs::File = file.try_clone_to_owned().unwrap().into();
        let (served, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, stopped) = (Arc::clone(&served), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let wait = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
                let _ = poll(&mut [PollFd::new(&faults, PollFlags::IN)], Some(&wait));
                while let Some(address) = faults.next_fault().unwrap() {
                    let page = (address - there.user_addr) & !(PAGE as u64 - 1);
                    let number = u8::try_from(page / PAGE as u64 % 200).unwrap() + 1;
                    file.write_all_at(&[number; PAGE], page).unwrap();
                    faults.wake(there.user_addr + page, PAGE as u64).unwrap();
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Self { served, stop, thread }
    }

    fn end(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        self.served.load(Ordering::Relaxed)
    }
}

fn both_loops(test: impl Fn(LoopKind)) {
    for kind in [LoopKind::Epoll, LoopKind::Auto] {
        test(kind);
    }
}

#[test]
fn c18_a_request_waits_for_the_page_it_touches_and_finds_its_contents() {
    both_loops(|kind| {
        let Some((mut rig, faults, there)) = advised(kind) else { return };
        let source = Source::serve(faults, &rig.memory, there);
        let mut ring = start(&mut rig);
        ring.round(b"a page that is here");
        for _ in 0..20 {
            let away = rig.memory.allocate(PAGE, PAGE as u64).unwrap();
            let page = away.guest() - rig.memory.regions().next().unwrap().0.guest_addr;
            let back = ring.data.guest() + 4096;
            ring.driver.add(&[(away.guest(), 100)], &[(back, 100)], 7).unwrap();
            ring.driver.publish();
            ring.kick();
            assert_eq!(ring.answered(), 100);
            let mut got = [0; 100];
            ring.data.read(4096, &mut got).unwrap();
            assert_eq!(got, [u8::try_from(page / 4096 % 200).unwrap() + 1; 100]);
            away.leak();
        }
        rig.front.postcopy_end().unwrap();
        assert!(source.end() >= 20, "pages were brought");
        ring.round(b"and after the end");
        assert!(rig.leave().0.is_ok());
    });
}

#[test]
fn c19_a_front_end_that_leaves_in_mid_fault_leaves_an_error_and_no_thread_that_waits() {
    both_loops(|kind| {
        let Some((mut rig, faults, _)) = advised(kind) else { return };
        let mut ring = start(&mut rig);
        let away = rig.memory.allocate(PAGE, PAGE as u64).unwrap();
        let back = ring.data.guest() + 4096;
        ring.driver.add(&[(away.guest(), 100)], &[(back, 100)], 7).unwrap();
        ring.driver.publish();
        ring.kick();
        let wait = Timespec::try_from(common::PATIENCE).unwrap();
        assert!(poll(&mut [PollFd::new(&faults, PollFlags::IN)], Some(&wait)).unwrap() > 0);
        let Rig { front, thread, memory: _memory, .. } = rig;
        drop(front);
        // Ends, and does not wait for a page that never comes.
        let (_, handler) = thread.join().unwrap();
        assert!(ring.driver.pop_used().unwrap().is_none(), "zeros were taken for data");
        drop(faults);
        drop(handler);
        away.leak();
    });
}

#[test]
fn a_ring_does_not_start_before_its_memory_may_be_touched() {
    let mut rig = Rig::bare(LoopKind::Auto, HandlerOptions::default());
    rig.front.set_owner().unwrap();
    rig.front.get_features().unwrap();
    if !offered(&mut rig) {
        return;
    }
    rig.front.set_protocol_features(PROTOCOL).unwrap();
    rig.front.set_features(FEATURES).unwrap();
    let _faults = rig.front.postcopy_advise().unwrap();
    rig.front.postcopy_listen().unwrap();
    rig.front.postcopy_mem_table(rig.memory.regions()).unwrap();
    let mut ring = start(&mut rig);
    ring.offer(b"too early");
    ring.kick();
    assert!(ring.silent_for(Duration::from_millis(50)));
    rig.front.postcopy_ready().unwrap();
    ring.expect(b"too early");
}
