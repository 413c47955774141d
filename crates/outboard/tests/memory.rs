//! Guest memory that changes while rings run (messages 5, 36 to 38; cases A22–A44, D-7, D-18).

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{FEATURES, PATIENCE, Rig, Ring, rang, serve};
use outboard::memory::RegionSpec;
use outboard::{
    DeviceRequestHandler, Error, HandlerOptions, Hooks, LoopKind, MakeWorker, Model, QueueSpec,
    WorkerDevice,
};
use outboard_frontend::{Connection, Error as FrontError, SharedMemory};
use outboard_queue::QueueLayout;

const MOMENT: Duration = Duration::from_millis(60);

#[test]
fn a38_the_table_is_replaced_500_times_under_load_and_no_request_is_lost() {
    let mut rig = Rig::bare(LoopKind::Auto, HandlerOptions::default());
    rig.negotiate(FEATURES);
    // A size of its own, so that its mappings can be counted.
    rig.memory = SharedMemory::with_size(0x13_3000).unwrap();
    rig.front.set_mem_table(rig.memory.regions()).unwrap();
    let mut ring = rig.started(0);
    let maps = || mappings_of(0x13_3000);
    let before = maps();
    let stop = Arc::new(AtomicBool::new(false));
    let enough = Arc::clone(&stop);
    let load = std::thread::spawn(move || {
        let mut rounds = 0;
        while !enough.load(Ordering::Relaxed) {
            ring.round(b"under load");
            rounds += 1;
        }
        rounds
    });
    for _ in 0..500 {
        rig.front.set_mem_table(rig.memory.regions()).unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    assert!(load.join().unwrap() > 0);
    assert_eq!(maps(), before, "mappings after 500 tables");
}

#[test]
fn a39_a_ring_whose_memory_goes_is_parked_and_goes_on_when_it_is_back() {
    for kind in [LoopKind::Uring, LoopKind::Epoll] {
        let mut rig = Rig::ready(kind);
        let mut ring = rig.started(0);
        ring.round(b"here");
        rig.front.set_mem_table(std::iter::empty()).unwrap();
        ring.offer(b"gone");
        ring.kick();
        assert!(ring.silent_for(MOMENT), "a parked ring is not looked at");
        assert!(!rang(&ring.err, Duration::ZERO), "parked is not broken");
        rig.front.set_mem_table(rig.memory.regions()).unwrap();
        ring.expect(b"gone");
    }
}

#[test]
fn a_ring_that_cannot_start_keeps_neither_the_new_memory_nor_the_other_rings_away() {
    let mut rig = Rig::bare(LoopKind::Auto, HandlerOptions::default());
    rig.negotiate(FEATURES);
    // Kicked before there is memory; its used ring lies over the end of what will come.
    let bad = rig.ring(0);
    let end = rig.memory.regions().map(|(spec, _)| spec.guest_addr + spec.size).max().unwrap();
    rig.set_up(&bad);
    rig.front.set_vring_addr(0, &QueueLayout { used: end - 4, ..bad.layout }).unwrap();
    rig.front.set_vring_kick(0, &bad.kick).unwrap();
    let mut good = rig.ring(1);
    rig.set_up(&good);
    rig.front.set_vring_kick(1, &good.kick).unwrap();
    rig.front.set_vring_enable(1, true).unwrap();
    rig.front.set_mem_table(rig.memory.regions()).unwrap();
    good.round(b"it has started");
    rig.front.set_mem_table(std::iter::empty()).unwrap();
    rig.front.set_mem_table(rig.memory.regions()).unwrap();
    good.round(b"and both sides still know the same table");
}

#[test]
fn a44_slots_are_removed_and_added_while_the_ring_runs() {
    let mut rig = Rig::bare(LoopKind::Auto, HandlerOptions::default());
    rig.negotiate(FEATURES);
    assert_eq!(rig.front.get_max_mem_slots().unwrap(), 509);
    rig.memory = SharedMemory::with_regions(&[(1 << 20, 1 << 20), (1 << 30, 1 << 20)]).unwrap();
    let regions: Vec<(RegionSpec, _)> = rig.memory.regions().collect();
    for (spec, file) in &regions {
        rig.front.add_mem_region(*spec, file.as_fd()).unwrap();
    }
    let mut ring = Ring::new(&rig.memory, 0, FEATURES);
    rig.front.set_vring_num(0, common::SIZE).unwrap();
    rig.front.set_vring_addr(0, &ring.layout).unwrap();
    rig.front.set_vring_call(0, &ring.call).unwrap();
    rig.front.set_vring_kick(0, &ring.kick).unwrap();
    rig.front.set_vring_enable(0, true).unwrap();
    for _ in 0..100 {
        ring.round(b"both there");
        for (spec, file) in &regions {
            rig.front.remove_mem_region(*spec).unwrap();
            rig.front.add_mem_region(*spec, file.as_fd()).unwrap();
        }
    }
    let (spec, file) = &regions[0];
    assert!(matches!(
        rig.front.add_mem_region(*spec, file.as_fd()),
        Err(FrontError::Refused { .. })
    ));
    ring.round(b"a40: a duplicate changed nothing");
}

/// R12: a failure leaves what was there.
#[test]
fn a34_a_file_that_is_too_short_is_refused_and_the_old_table_stays() {
    let mut rig = Rig::ready(LoopKind::Auto);
    let mut ring = rig.started(0);
    let (mut spec, file) = rig.memory.regions().next().unwrap();
    spec.size += 1 << 20;
    let table = std::iter::once((spec, file));
    assert!(matches!(rig.front.set_mem_table(table), Err(FrontError::Refused { .. })));
    ring.round(b"the old one");
}

#[test]
fn a33_descriptors_that_cannot_be_mapped_are_refused() {
    let mut rig = Rig::ready(LoopKind::Auto);
    let (spec, _) = rig.memory.regions().next().unwrap();
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let directory = std::fs::File::open("/").unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    for fd in [pipe.as_fd(), directory.as_fd(), null.as_fd()] {
        let table = std::iter::once((spec, fd));
        assert!(matches!(rig.front.set_mem_table(table), Err(FrontError::Refused { .. })));
    }
    let mut ring = rig.started(0);
    ring.round(b"alive");
}

/// Memory whose file can be cut short: not sealed.
fn cuttable() -> (std::fs::File, RegionSpec) {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(1 << 20).unwrap();
    (file, RegionSpec { guest_addr: 0, user_addr: 1 << 40, size: 1 << 20, offset: 0 })
}

#[test]
fn a35_memory_that_is_cut_off_breaks_the_rings_of_this_front_end_and_a_new_table_serves_again() {
    let mut rig = Rig::ready(LoopKind::Auto);
    rig.started(1).round(b"whole");
    let (file, spec) = cuttable();
    let both = rig.memory.regions().chain(std::iter::once((spec, file.as_fd())));
    rig.front.set_mem_table(both).unwrap();
    let victim = rig.ring(0);
    rig.front.set_vring_num(0, common::SIZE).unwrap();
    rig.front
        .call(outboard_protocol::Request::SetVringAddr(outboard_protocol::VringAddr {
            index: 0,
            flags: 0,
            desc: spec.user_addr,
            avail: spec.user_addr + 4096,
            used: spec.user_addr + 8192,
            log_guest_addr: 0,
        }))
        .unwrap();
    rig.front.set_vring_err(0, &victim.err).unwrap();
    rig.front.set_vring_kick(0, &victim.kick).unwrap();
    rig.front.set_vring_enable(0, true).unwrap();
    file.set_len(0).unwrap();
    victim.kick();
    assert!(rang(&victim.err, PATIENCE), "the error descriptor says so");
    rig.front.get_vring_base(0).unwrap();
    rig.front.get_vring_base(1).unwrap();
    rig.front.set_mem_table(rig.memory.regions()).unwrap();
    let mut again = rig.started(0);
    again.round(b"set up anew");
}

/// A device that keeps its memory from children.
struct Private;

impl Model for Private {
    type Worker = common::Echo;

    fn queues(&self) -> Vec<QueueSpec> {
        vec![QueueSpec::new("a", 64)]
    }

    fn make_worker(&self) -> MakeWorker<common::Echo> {
        Arc::new(|_| Ok::<_, Error>(common::Echo))
    }

    fn hooks(&mut self) -> Option<&mut dyn Hooks> {
        Some(self)
    }
}

impl Hooks for Private {
    fn unmap_guest_memory_on_fork(&self) -> bool {
        true
    }
}

/// The lines of smaps that belong to mappings of `size` bytes of this process.
fn smaps_of(size: u64) -> Vec<String> {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    let belongs = |line: &&str| {
        let range = line.split(' ').next().and_then(|first| first.split_once('-'));
        let number = |text| u64::from_str_radix(text, 16).ok();
        if let Some((Some(start), Some(end))) = range.map(|(s, e)| (number(s), number(e))) {
            inside = end - start == size;
        }
        inside
    };
    smaps.lines().filter(belongs).map(str::to_owned).collect()
}

fn mappings_of(size: u64) -> usize {
    smaps_of(size).iter().filter(|line| line.starts_with("VmFlags:")).count()
}

#[test]
fn guest_memory_is_kept_from_core_dumps_and_from_children_when_the_device_asks() {
    let device = WorkerDevice::new(Private).unwrap();
    let handler = DeviceRequestHandler::new(device, HandlerOptions::default()).unwrap();
    let (ours, _thread) = serve(handler);
    let mut front = Connection::from_fd(ours.into(), PATIENCE).unwrap();
    front.get_features().unwrap();
    front.get_protocol_features().unwrap();
    let wanted = outboard::protocol::ProtocolFeatures::REPLY_ACK
        | outboard::protocol::ProtocolFeatures::CONFIGURE_MEM_SLOTS;
    front.set_protocol_features(wanted).unwrap();
    front.set_features(FEATURES).unwrap();
    // A size of its own, so that the mapping is found again; the front-end has none of its own.
    let size = 0x7_5000;
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(size).unwrap();
    let spec = RegionSpec { guest_addr: 0, user_addr: 1 << 40, size, offset: 0 };
    front.add_mem_region(spec, file.as_fd()).unwrap();
    let flags: String =
        smaps_of(size).into_iter().filter(|line| line.starts_with("VmFlags:")).collect();
    assert!(flags.contains(" dc"), "MADV_DONTFORK: {flags}");
    assert!(flags.contains(" dd"), "MADV_DONTDUMP: {flags}");
}
