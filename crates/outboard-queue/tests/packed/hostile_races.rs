//! A guest that changes what it wrote while it is read (B30, B32, B33).

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use outboard_memory::View;
use outboard_queue::DeviceQueue;

use crate::rig::*;

/// How often each race is tried. The soak runs more.
fn tries() -> u32 {
    std::env::var("OUTBOARD_RACES").ok().and_then(|count| count.parse().ok()).unwrap_or(30_000)
}

/// Runs `flip` on a thread of its own, over and over, while `serve` runs.
fn while_flipping(view: &View, flip: impl Fn(&View, u64) + Sync, serve: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    let own = view.clone();
    let (flip, stop) = (&flip, &stop);
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut round = 0;
            while !stop.load(Ordering::Relaxed) {
                flip(&own, round);
                round += 1;
            }
        });
        serve();
        stop.store(true, Ordering::Relaxed);
    });
}

/// R6: what is shared is read once.
#[test]
fn b30_b32_whatever_flips_only_what_is_legal_is_served() {
    let mut rig = Rig::new(7, INDIRECT_DESC);
    rig.entry(DATA, DATA + 0x100, 7, 0);
    rig.entry(DATA + 16, DATA + 0x200, 9, WRITE);
    let view = rig.view.clone();
    let desc = rig.layout.desc;
    let flip = |view: &View, round: u64| {
        let at = desc + 16 * (round % 7);
        let (len, id, flags) = match round / 7 % 4 {
            0 => (16_u32, 0_u16, NEXT | AVAIL),
            1 => (32, 6, INDIRECT | AVAIL),
            2 => (17, 7, INDIRECT | NEXT | AVAIL),
            _ => (48, 3, WRITE | USED),
        };
        view.write(at, &DATA.to_le_bytes()).unwrap();
        view.write(at + 8, &len.to_le_bytes()).unwrap();
        view.write(at + 12, &id.to_le_bytes()).unwrap();
        view.write(at + 14, &flags.to_le_bytes()).unwrap();
    };
    while_flipping(&view, flip, || {
        for _ in 0..tries() {
            match rig.device.pop() {
                Ok(Some(mut chain)) => {
                    assert!(chain.head() < 7);
                    let (read, write) = (chain.readable().len(), chain.writable().len());
                    // At most seven descriptors of at most 48 bytes, or one table of at most three entries.
                    assert!(read <= 7 * 48 && write <= 7 * 48, "{read} {write}");
                    assert!(rig.device.in_flight() == 1);
                    rig.device.complete(chain, 0);
                    rig.device.publish().unwrap();
                }
                Ok(None) => {}
                Err(_) => assert!(rig.device.is_broken()),
            }
            if rig.device.is_broken() {
                let layout = rig.layout;
                let features = PACKED | INDIRECT_DESC;
                rig.device = DeviceQueue::new(layout, features, FRESH, rig.view.clone()).unwrap();
            }
        }
    });
}

#[test]
fn b33_a_driver_that_rewrites_used_descriptors_moves_nothing() {
    let mut rig = Rig::new(4, 0);
    for round in 0..40_u16 {
        let at = rig.at;
        rig.offer(1, &[(DATA, 16, 0)]);
        let chain = rig.take();
        rig.desc(at, u64::MAX, u32::MAX, 0xffff, 0xffff);
        rig.device.complete(chain, u32::from(round));
        rig.device.publish().unwrap();
        let (id, len, _) = rig.used(at);
        assert_eq!((id, len), (1, u32::from(round)));
        rig.desc(at, u64::MAX, u32::MAX, 0xffff, AVAIL ^ USED ^ rig.available());
    }
    assert!(!rig.device.is_broken());
}
