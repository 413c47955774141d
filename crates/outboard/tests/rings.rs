//! Ring states over a real socket: every order of messages, changes while running, stops
//! (vhost-user, "Ring states"; protocol facts (d); cases A38–A62).

mod common;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::{FEATURES, PATIENCE, Rig, Ring, SIZE, doorbell, rang};
use outboard::protocol::{Notifier, virtio};
use outboard::{Ended, HandlerOptions, LoopKind};
use outboard_frontend::Error;

const LOOPS: [LoopKind; 2] = [LoopKind::Uring, LoopKind::Epoll];
const MOMENT: Duration = Duration::from_millis(60);

#[test]
fn a_request_is_answered_on_both_event_loops() {
    for kind in LOOPS {
        let mut rig = Rig::ready(kind);
        let mut ring = rig.started(0);
        for _ in 0..100 {
            ring.round(b"hello");
        }
        assert!(matches!(rig.leave().0, Ok(Ended::Left)));
    }
}

#[test]
fn a56_a_ring_starts_whatever_comes_last() {
    // The steps of a start, each one once as the last.
    for last in 0..6 {
        let mut rig = Rig::bare(LoopKind::Auto, HandlerOptions::default());
        rig.front.set_owner().unwrap();
        let offered = rig.front.get_features().unwrap();
        assert_ne!(offered & virtio::PROTOCOL_FEATURES, 0);
        let mut ring = rig.ring(0);
        ring.offer(b"early");
        let step = |number: u32, rig: &mut Rig| match number {
            0 => rig.front.set_features(FEATURES & !virtio::PROTOCOL_FEATURES).unwrap(),
            1 => rig.front.set_mem_table(rig.memory.regions()).unwrap(),
            2 => rig.front.set_vring_num(0, SIZE).unwrap(),
            3 => rig.front.set_vring_addr(0, &ring.layout).unwrap(),
            4 => rig.front.set_vring_base(0, 0).unwrap(),
            _ => rig.front.set_vring_kick(0, &ring.kick).unwrap(),
        };
        for number in (0..6).filter(|number| *number != last) {
            step(number, &mut rig);
        }
        step(last, &mut rig);
        rig.front.set_vring_call(0, &ring.call).unwrap();
        ring.expect(b"early");
    }
}

#[test]
fn a_kick_before_enable_is_not_lost() {
    for kind in LOOPS {
        let mut rig = Rig::ready(kind);
        let mut ring = rig.ring(0);
        rig.set_up(&ring);
        rig.front.set_vring_kick(0, &ring.kick).unwrap();
        ring.offer(b"waiting");
        ring.kick();
        assert!(ring.silent_for(MOMENT), "a disabled ring holds its requests");
        rig.front.set_vring_enable(0, true).unwrap();
        ring.expect(b"waiting");
    }
}

#[test]
fn enable_may_come_before_kick_and_call_after_it() {
    let mut rig = Rig::ready(LoopKind::Auto);
    let mut ring = rig.ring(0);
    rig.front.set_vring_enable(0, true).unwrap();
    rig.front.set_vring_num(0, SIZE).unwrap();
    rig.front.set_vring_addr(0, &ring.layout).unwrap();
    ring.offer(b"before");
    rig.front.set_vring_kick(0, &ring.kick).unwrap();
    rig.front.set_vring_call(0, &ring.call).unwrap();
    assert!(rang(&ring.call, PATIENCE), "a call descriptor that comes late is signalled once");
    ring.expect(b"before");
}

#[test]
fn without_protocol_features_a_ring_is_enabled_at_once() {
    let mut rig = Rig::bare(LoopKind::Auto, HandlerOptions::default());
    rig.front.get_features().unwrap();
    rig.front.set_features(FEATURES & !virtio::PROTOCOL_FEATURES).unwrap();
    rig.front.set_mem_table(rig.memory.regions()).unwrap();
    let mut ring = rig.ring(0);
    rig.set_up(&ring);
    rig.front.set_vring_kick(0, &ring.kick).unwrap();
    ring.round(b"no enable needed");
}

#[test]
fn set_features_with_bit_30_leaves_the_flags_of_running_rings_alone() {
    let mut rig = Rig::ready(LoopKind::Auto);
    let (mut on, mut off) = (rig.started(0), rig.started(1));
    rig.front.set_vring_enable(1, false).unwrap();
    rig.front.set_features(FEATURES).unwrap();
    on.round(b"still enabled");
    off.offer(b"still disabled");
    off.kick();
    assert!(off.silent_for(MOMENT));
    rig.front.set_features(FEATURES & !virtio::PROTOCOL_FEATURES).unwrap();
    off.expect(b"still disabled");
}

#[test]
fn a_disabled_transmit_ring_takes_and_drops_its_requests() {
    let mut rig = Rig::ready(LoopKind::Auto);
    let mut ring = rig.ring(2);
    rig.set_up(&ring);
    rig.front.set_vring_kick(2, &ring.kick).unwrap();
    ring.offer(b"into the void");
    ring.kick();
    assert_eq!(ring.answered(), 0, "taken, nothing written");
    rig.front.set_vring_enable(2, true).unwrap();
    ring.round(b"through");
}

#[test]
fn a57_call_and_kick_are_replaced_while_the_ring_runs() {
    for kind in LOOPS {
        let mut rig = Rig::ready(kind);
        let mut ring = rig.started(0);
        ring.round(b"old");
        for _ in 0..50 {
            let old = std::mem::replace(&mut ring.call, doorbell());
            rig.front.set_vring_call(0, &ring.call).unwrap();
            // What came before the acknowledgement may have gone to the old one.
            rang(&old, Duration::ZERO);
            rang(&ring.call, Duration::ZERO);
            ring.driver.arm();
            ring.offer(b"new call");
            ring.kick();
            assert!(rang(&ring.call, PATIENCE), "the new descriptor is signalled");
            assert!(!rang(&old, Duration::ZERO), "the old one is not any more");
            ring.expect(b"new call");

            let old = std::mem::replace(&mut ring.kick, doorbell());
            rig.front.set_vring_kick(0, &ring.kick).unwrap();
            ring.round(b"new kick");
            drop(old);
        }
    }
}

#[test]
fn a59_a_ring_without_a_kick_descriptor_is_polled() {
    for kind in LOOPS {
        let mut rig = Rig::ready(kind);
        let mut ring = rig.ring(0);
        rig.set_up(&ring);
        let request = outboard_protocol::Request::SetVringKick { index: 0, kick: Notifier::Poll };
        rig.front.call(request).unwrap();
        rig.front.set_vring_enable(0, true).unwrap();
        for _ in 0..3 {
            ring.offer(b"nobody kicks");
            ring.expect(b"nobody kicks");
        }
    }
}

#[test]
fn a58_descriptors_that_are_no_doorbells_do_no_harm() {
    for kind in LOOPS {
        let mut rig = Rig::ready(kind);
        let ring = rig.ring(0);
        rig.set_up(&ring);
        rig.front.set_vring_enable(0, true).unwrap();
        let file = tempfile::tempfile().unwrap();
        let zero = std::fs::File::open("/dev/zero").unwrap();
        let (pipe, writer) = rustix::pipe::pipe().unwrap();
        drop(writer);
        let (socket, other) = UnixStream::pair().unwrap();
        drop(other);
        let doorbells: [OwnedFd; 4] = [file.into(), zero.into(), pipe, socket.into()];
        for doorbell in doorbells {
            rig.front.set_vring_kick(0, &doorbell).unwrap();
            let before = cpu_time();
            std::thread::sleep(Duration::from_millis(300));
            let used = cpu_time() - before;
            assert!(used < Duration::from_millis(150), "{doorbell:?} makes a loop spin: {used:?}");
        }
        let mut ring = ring;
        rig.front.set_vring_kick(0, &ring.kick).unwrap();
        ring.round(b"a real one");
    }
}

fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

#[test]
fn a62_the_base_of_a_ring_that_never_ran_is_the_one_last_set() {
    let mut rig = Rig::ready(LoopKind::Auto);
    assert_eq!(rig.front.get_vring_base(1).unwrap(), 0);
    rig.front.set_vring_base(1, 0x1234).unwrap();
    assert_eq!(rig.front.get_vring_base(1).unwrap(), 0x1234);
    assert_eq!(rig.front.get_vring_base(1).unwrap(), 0x1234, "asked twice");
}

#[test]
fn d11_a_stopped_ring_reports_its_index_and_starts_again_with_a_kick_alone() {
    let mut rig = Rig::ready(LoopKind::Auto);
    let mut ring = rig.started(0);
    for _ in 0..5 {
        ring.round(b"one");
    }
    assert_eq!(rig.front.get_vring_base(0).unwrap(), 5);
    ring.offer(b"stopped");
    ring.kick();
    assert!(ring.silent_for(MOMENT), "a stopped ring is not looked at");
    rig.front.set_vring_kick(0, &ring.kick).unwrap();
    ring.expect(b"stopped");
    assert_eq!(rig.front.get_vring_base(0).unwrap(), 6);
}

/// R9: a ring is what it was when it started.
#[test]
fn a47_size_and_base_of_a_started_ring_cannot_change() {
    let mut rig = Rig::ready(LoopKind::Auto);
    let mut ring = rig.started(0);
    for size in [0, 8, 32] {
        assert!(matches!(rig.front.set_vring_num(0, size), Err(Error::Refused { .. })));
    }
    assert!(matches!(rig.front.set_vring_base(0, 3), Err(Error::Refused { .. })));
    ring.round(b"unimpressed");
}

#[test]
fn a48_a_ring_outside_memory_waits_and_a49_one_over_the_end_is_refused() {
    let mut rig = Rig::ready(LoopKind::Auto);
    let mut ring = rig.ring(0);
    let mut outside = ring.layout;
    outside.desc += 1 << 40;
    rig.front.set_vring_num(0, SIZE).unwrap();
    rig.front.set_vring_addr(0, &outside).unwrap();
    rig.front.set_vring_kick(0, &ring.kick).unwrap();
    rig.front.set_vring_enable(0, true).unwrap();
    let mut over = ring.layout;
    let (spec, _) = rig.memory.regions().next().unwrap();
    over.desc = spec.guest_addr + spec.size - 16;
    assert!(matches!(rig.front.set_vring_addr(0, &over), Err(Error::Refused { .. })));
    ring.offer(b"found at last");
    rig.front.set_vring_addr(0, &ring.layout).unwrap();
    rig.front.set_vring_call(0, &ring.call).unwrap();
    ring.expect(b"found at last");
}

#[test]
fn rings_are_independent_of_each_other() {
    let mut rig = Rig::ready(LoopKind::Auto);
    let (mut a, mut b) = (rig.started(0), rig.started(1));
    a.round(b"a");
    assert_eq!(rig.front.get_vring_base(0).unwrap(), 1);
    b.round(b"b runs on");
    assert_eq!(rig.seen.suspended.load(std::sync::atomic::Ordering::SeqCst), 1, "at construction");
    assert_eq!(rig.front.get_vring_base(1).unwrap(), 1);
    assert_eq!(rig.seen.suspended.load(std::sync::atomic::Ordering::SeqCst), 2);
}

#[test]
fn a91_reset_device_stops_and_disables_and_keeps_memory() {
    let mut rig = Rig::ready(LoopKind::Auto);
    let mut ring = rig.started(0);
    ring.round(b"before");
    rig.front.reset_device().unwrap();
    assert_eq!(rig.seen.reset.load(std::sync::atomic::Ordering::SeqCst), 1);
    rig.front.set_features(FEATURES).unwrap();
    let mut ring: Ring = rig.started(0);
    ring.round(b"after, same memory");
}

#[test]
fn a91_reset_owner_disables_rings_and_nothing_else() {
    let mut rig = Rig::ready(LoopKind::Auto);
    let mut ring = rig.started(0);
    ring.round(b"before");
    rig.front.call(outboard_protocol::Request::ResetOwner).unwrap();
    ring.offer(b"held");
    ring.kick();
    assert!(ring.silent_for(MOMENT));
    rig.front.set_vring_enable(0, true).unwrap();
    ring.expect(b"held");
}

/// What is no eventfd holds every kick until it is read.
#[test]
fn r20_a_pipe_for_a_doorbell_is_never_full() {
    for kind in LOOPS {
        let mut rig = Rig::ready(kind);
        let mut ring = rig.ring(0);
        let (theirs, ours) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
        let room = rustix::pipe::fcntl_setpipe_size(&ours, 4096).unwrap();
        ring.kick = ours;
        rig.set_up(&ring);
        rig.front.set_vring_kick(0, &theirs).unwrap();
        rig.front.set_vring_enable(0, true).unwrap();
        for _ in 0..room / 8 * 4 {
            // It does not block: one that is full is an error.
            ring.round(b"kicked by a pipe");
        }
    }
}
