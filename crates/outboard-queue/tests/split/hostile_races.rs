//! A guest that changes what it wrote while it is read (B30, B32, B33).

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use outboard_memory::View;

use crate::rig::*;

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

/// How often each race is tried. The soak runs more.
fn tries() -> u32 {
    std::env::var("OUTBOARD_RACES").ok().and_then(|count| count.parse().ok()).unwrap_or(30_000)
}

/// R6: what is shared is read once.
#[test]
fn b30_only_the_old_or_the_new_value_of_a_descriptor_is_seen() {
    let mut rig = Rig::new(8, 0);
    let head = rig.layout.desc;
    rig.desc(0, DATA, 0x1000, NEXT, 1);
    rig.desc(1, DATA, 16, WRITE, 0);
    rig.desc(2, DATA, 32, WRITE, 0);
    let view = rig.view.clone();
    let flip = |view: &View, round: u64| {
        let odd = round % 2 == 1;
        let (addr, len, next) = if odd { (DATA, 0x1000, 1) } else { (END - 0x10, 0x10, 2_u16) };
        view.write(head, &addr.to_le_bytes()).unwrap();
        view.write(head + 8, &u32::to_le_bytes(len)).unwrap();
        view.write(head + 14, &next.to_le_bytes()).unwrap();
    };
    while_flipping(&view, flip, || {
        let mut served = 0;
        for _ in 0..tries() {
            rig.offer(0);
            let Ok(Some(mut chain)) = rig.device.pop() else {
                // The address of the one and the length of the other: outside memory, and refused.
                let features = 0;
                let (base, layout, view) = (rig.device.base(), rig.layout, rig.view.clone());
                rig.device =
                    outboard_queue::DeviceQueue::new(layout, features, base + 1, view).unwrap();
                continue;
            };
            let (read, write) = (chain.readable().len(), chain.writable().len());
            assert!(read == 0x1000 || read == 0x10, "{read:#x}");
            assert!(write == 16 || write == 32, "{write}");
            served += 1;
            rig.device.complete(chain, 0);
        }
        assert!(served > 0);
    });
}

#[test]
fn b30_flags_that_flip_never_lead_out_of_the_rules() {
    let mut rig = Rig::new(8, INDIRECT_DESC);
    let head = rig.layout.desc;
    rig.desc(0, DATA, 32, NEXT, 1);
    rig.desc(1, DATA, 16, WRITE, 0);
    rig.desc_at(DATA, DATA + 0x100, 7, NEXT, 1);
    rig.desc_at(DATA + 16, DATA + 0x200, 9, WRITE, 0);
    let view = rig.view.clone();
    let flip = |view: &View, round: u64| {
        let flags = if round.is_multiple_of(2) { NEXT } else { INDIRECT };
        view.write(head + 12, &flags.to_le_bytes()).unwrap();
    };
    while_flipping(&view, flip, || {
        for _ in 0..tries() {
            rig.offer(0);
            let mut chain = rig.device.pop().unwrap().unwrap();
            let lengths = (chain.readable().len(), chain.writable().len());
            assert!(lengths == (32, 16) || lengths == (7, 9), "{lengths:?}");
            rig.device.complete(chain, 0);
        }
    });
}

/// R6: what is shared is read once.
#[test]
fn b32_the_length_of_an_indirect_table_is_read_once() {
    let mut rig = Rig::new(8, INDIRECT_DESC);
    let head = rig.layout.desc;
    rig.desc(0, DATA, 32, INDIRECT, 0);
    for at in 0..16 {
        rig.desc_at(DATA + 16 * at, DATA + 0x1000, 8, NEXT, u16::try_from(at + 1).unwrap());
    }
    rig.desc_at(DATA + 16, DATA + 0x1000, 8, 0, 0);
    let view = rig.view.clone();
    let flip = |view: &View, round: u64| {
        let len = if round.is_multiple_of(2) { 32_u32 } else { 0xffff_fff0 };
        view.write(head + 8, &len.to_le_bytes()).unwrap();
    };
    while_flipping(&view, flip, || {
        for _ in 0..tries() / 10 {
            rig.offer(0);
            match rig.device.pop() {
                Ok(chain) => {
                    let mut chain = chain.unwrap();
                    assert_eq!(chain.readable().len(), 16);
                    rig.device.complete(chain, 0);
                }
                Err(error) => {
                    assert!(
                        matches!(error, outboard_queue::RingError::IndirectLength { .. }),
                        "{error:?}"
                    );
                    let (base, layout, view) = (rig.device.base(), rig.layout, rig.view.clone());
                    rig.device =
                        outboard_queue::DeviceQueue::new(layout, INDIRECT_DESC, base + 1, view)
                            .unwrap();
                }
            }
        }
    });
}

#[test]
fn what_was_read_is_gone_whatever_the_guest_writes_there_later() {
    let mut rig = Rig::new(8, 0);
    rig.view.write(DATA, &[1; 32]).unwrap();
    rig.desc(0, DATA, 32, 0, 0);
    rig.offer(0);
    let mut chain = rig.take();
    let first: [u8; 16] = chain.readable().read_obj().unwrap();
    rig.view.write(DATA, &[2; 32]).unwrap();
    let second: [u8; 16] = chain.readable().read_obj().unwrap();
    assert_eq!((first, second), ([1; 16], [2; 16]));
    assert!(chain.readable().read_obj::<u8>().is_err());
}

/// R6: what was written is not read back.
#[test]
fn b33_a_used_ring_that_the_guest_writes_over_is_not_read_back() {
    let mut rig = Rig::new(8, 0);
    for round in 1..=100_u16 {
        rig.desc(0, DATA, 16, 0, 0);
        rig.offer(0);
        let junk = [0xff; 4 + 64];
        rig.view.write(rig.layout.used, &junk).unwrap();
        let chain = rig.take();
        rig.device.complete(chain, 3);
        // Also the very index that comes next: it would look as if nothing were to be told.
        let index = if round % 2 == 0 { round } else { 0xeeee };
        rig.view.write(rig.layout.used + 2, &index.to_le_bytes()).unwrap();
        assert!(rig.device.publish().unwrap(), "the guest waits for its call");
        assert_eq!(rig.used_idx(), round);
        assert_eq!(rig.used(round - 1), (0, 3));
    }
}
