//! Split rings: the device's side walks whatever lies in guest memory.
//!
//! The script fills the ring and its surroundings, and changes them while the device pops, copies,
//! completes and publishes. Two neighbouring regions, so that buffers cross a border.

use std::sync::Arc;

use outboard_memory::{GuestMemory, MapOptions, Region, RegionSpec, View};
use outboard_queue::{Chain, DeviceQueue, QueueLayout};

use crate::cover::{reached, wanted};
use crate::input::Input;

const REGION: u64 = 32 << 10;

thread_local! {
    static MEMORY: Arc<GuestMemory> = memory();
}

fn memory() -> Arc<GuestMemory> {
    let regions = (0..2)
        .map(|number| {
            let file = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC)
                .expect("a memory file");
            rustix::fs::ftruncate(&file, REGION).expect("its length");
            let start = number * REGION;
            let spec = RegionSpec { guest_addr: start, user_addr: start, size: REGION, offset: 0 };
            Arc::new(Region::map(spec, file, MapOptions::default()).expect("a mapping"))
        })
        .collect();
    Arc::new(GuestMemory::new(1, regions).expect("two regions"))
}

/// Plays one script.
pub fn run(data: &[u8]) {
    wanted(|| {
        let rules = [
            "AvailIndex",
            "Head",
            "HeadInFlight",
            "Next",
            "ChainLength",
            "Order",
            "Buffer",
            "IndirectNotNegotiated",
            "IndirectNested",
            "IndirectNext",
            "IndirectLength",
            "chain",
        ];
        rules.map(|what| format!("chains {what}")).into()
    });
    MEMORY.with(|memory| play(&mut Input::new(data), View::new(Arc::clone(memory))));
}

fn play(input: &mut Input<'_>, view: View) {
    let size = 1u16 << input.below(6);
    let Some((layout, end)) = QueueLayout::split_at(0, size) else { return };
    view.write(0, &vec![0; end as usize]).expect("the ring is in memory");
    let features = (u64::from(input.byte()) & 3) << 28;
    let fill = input.below(2) * 64 + 16 * input.below(64);
    let (start, used) = (input.number() as u32, layout.used + 2);
    view.write(layout.desc, input.take(fill)).expect("inside");
    view.write(used, &(start as u16).to_le_bytes()).expect("inside");
    let ring = DeviceQueue::new(layout, features, start & 0xffff, view.clone());
    let Ok(mut queue) = ring else { return };
    let (mut held, mut broken) = (Vec::new(), false);
    while !input.is_empty() {
        step(input, &view, &layout, &mut queue, &mut held, &mut broken);
        assert!(queue.in_flight() <= size, "no more in flight than the ring holds");
        assert_eq!(usize::from(queue.in_flight()), held.len());
    }
    for chain in held {
        queue.complete(chain, 0);
    }
    assert_eq!(queue.in_flight(), 0);
}

fn step(
    input: &mut Input<'_>,
    view: &View,
    layout: &QueueLayout,
    queue: &mut DeviceQueue,
    held: &mut Vec<Chain>,
    broken: &mut bool,
) {
    match input.below(8) {
        0 | 1 => match queue.pop() {
            Ok(Some(mut chain)) => {
                assert!(!*broken, "a broken ring yields nothing");
                assert!(chain.head() < layout.size);
                reached("chains chain".to_owned());
                touch(input, &mut chain);
                held.push(chain);
            }
            Ok(None) => {}
            Err(error) => {
                assert!(!std::mem::replace(broken, true), "a ring breaks once");
                let text = format!("{error:?}");
                reached(format!("chains {}", text.split([' ', '{']).next().unwrap_or_default()));
            }
        },
        2 if !held.is_empty() => {
            let chain = held.swap_remove(input.below(held.len()));
            queue.complete(chain, input.number() as u32);
        }
        3 => {
            let _ = queue.publish();
        }
        4 => {
            let _ = queue.arm();
            queue.disarm();
        }
        5 => {
            // One more available head, as a driver would offer it.
            let mut index = [0; 2];
            view.read(layout.avail + 2, &mut index).expect("inside");
            let index = u16::from_le_bytes(index);
            let slot = layout.avail + 4 + 2 * u64::from(index % layout.size);
            let head = u16::from(input.byte()) % (layout.size + 1);
            view.write(slot, &head.to_le_bytes()).expect("inside");
            view.write(layout.avail + 2, &index.wrapping_add(1).to_le_bytes()).expect("inside");
        }
        6 => {
            // One descriptor, plausible.
            let at = layout.desc + 16 * (input.below(usize::from(layout.size)) as u64);
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&(input.number() << input.below(9)).to_le_bytes());
            bytes[8..12].copy_from_slice(&(input.number() as u32).to_le_bytes());
            bytes[12..14].copy_from_slice(&u16::from(input.byte() & 7).to_le_bytes());
            bytes[14..].copy_from_slice(&(input.byte() as u16 % 40).to_le_bytes());
            view.write(at, &bytes).expect("inside");
        }
        _ => {
            let at = input.number() % (2 * REGION - 64);
            let length = input.below(64);
            view.write(at, input.take(length)).expect("inside");
        }
    }
}

/// Uses the chain as a device does.
fn touch(input: &mut Input<'_>, chain: &mut Chain) {
    let (readable, writable) = (chain.readable().len(), chain.writable().len());
    assert!(readable + writable <= 1 << 32);
    let tail = input.below(4);
    let reserved = chain.reserve_tail(tail).is_ok();
    assert_eq!(reserved, tail as u64 <= writable, "a tail is had exactly when there is room");
    let mut header = [0; 16];
    assert_eq!(chain.readable().read_exact(&mut header).is_ok(), readable >= 16);
    let left = chain.writable().len();
    assert_eq!(left, writable - if reserved { tail as u64 } else { 0 });
    let most = left.min(4096) as usize;
    assert!(chain.writable().write_all(&vec![0xa5; most]).is_ok());
    if reserved {
        assert!(chain.write_tail(&[1, 2, 3][..tail.min(3)]).is_ok());
    }
}
