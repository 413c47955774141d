//! Packed rings: the device's side walks whatever lies in guest memory, and takes up whatever lies
//! in an in-flight region.
//!
//! The script fills the ring and its surroundings, and changes them while the device pops, copies,
//! completes and publishes; a driver of sorts makes chains available where a real one would. Two
//! neighbouring regions, so that buffers cross a border. A queue is replaced by one made with its
//! base, as after a stop, or by one that has only the region, as after a kill.

use std::sync::Arc;

use outboard_memory::{GuestMemory, MapOptions, Region, RegionSpec, SharedArea, View, Window};
use outboard_queue::{Chain, DeviceQueue, InflightArea, QueueLayout, RingError};

use crate::cover::{reached, wanted};
use crate::input::Input;

const REGION: u64 = 32 << 10;
/// Descriptors of the largest ring.
const MOST: u16 = 33;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
const PACKED: u64 = 1 << 34;

thread_local! {
    static MEMORY: (Arc<GuestMemory>, Arc<Window>) = memory();
}

fn memory() -> (Arc<GuestMemory>, Arc<Window>) {
    let file = |length| {
        let file = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC);
        let file = file.expect("a memory file");
        rustix::fs::ftruncate(&file, length).expect("its length");
        file
    };
    let regions = (0..2)
        .map(|number| {
            let start = number * REGION;
            let spec = RegionSpec { guest_addr: start, user_addr: start, size: REGION, offset: 0 };
            let region = Region::map(spec, file(REGION), MapOptions::default());
            Arc::new(region.expect("a mapping"))
        })
        .collect();
    let length = InflightArea::packed_size(MOST);
    let window = Window::map(file(length), 0, length, true).expect("a mapping");
    (Arc::new(GuestMemory::new(1, regions).expect("two regions")), window.into())
}

/// Plays one script.
pub fn run(data: &[u8]) {
    wanted(|| {
        let rules = [
            "PackedBase",
            "Head",
            "HeadInFlight",
            "ChainLength",
            "NotAvailable",
            "Order",
            "Buffer",
            "IndirectNotNegotiated",
            "IndirectNested",
            "IndirectNext",
            "IndirectLength",
            "Inflight",
            "chain",
            "chain of a killed queue",
        ];
        rules.map(|what| format!("packed {what}")).into()
    });
    MEMORY.with(|(memory, window)| {
        let view = View::new(Arc::clone(memory));
        if let Some(mut rig) = Rig::new(&mut Input::new(data), view, window) {
            rig.play(&mut Input::new(data.get(8..).unwrap_or_default()));
        }
    });
}

struct Rig<'a> {
    view: View,
    window: &'a Arc<Window>,
    layout: QueueLayout,
    features: u64,
    queue: DeviceQueue,
    held: Vec<Chain>,
    broken: bool,
    /// Where the driver goes on, with its wrap counter.
    at: (u16, bool),
    tracked: bool,
}

impl<'a> Rig<'a> {
    /// The first bytes of a script say what ring it is.
    fn new(input: &mut Input<'_>, view: View, window: &'a Arc<Window>) -> Option<Self> {
        let size = 1 + input.below(MOST.into()) as u16;
        let (layout, end) = QueueLayout::packed_at(0, size)?;
        view.write(0, &vec![0; end as usize]).expect("the ring is in memory");
        let choices = input.byte();
        let features = PACKED | (u64::from(choices) & 3) << 28;
        let base = if input.one_in(4) { input.number() as u32 } else { 0x8000_8000 };
        let queue = match DeviceQueue::new(layout, features, base, view.clone()) {
            Ok(queue) => queue,
            Err(error) => {
                said(&error);
                return None;
            }
        };
        let base = queue.base() as u16;
        let at = (base & 0x7fff, base & 0x8000 != 0);
        let (held, broken, tracked) = (Vec::new(), false, choices & 4 != 0);
        let mut rig = Self { view, window, layout, features, queue, held, broken, at, tracked };
        if tracked {
            let area = rig.area();
            for place in (0..InflightArea::packed_size(MOST) as usize - 8).step_by(8) {
                rig.shared().store64(place, 0);
            }
            rig.queue.set_inflight(area).expect("an area that nobody used");
        }
        Some(rig)
    }

    fn area(&self) -> InflightArea {
        InflightArea::packed(self.window, 0, MOST).expect("inside")
    }

    fn shared(&self) -> SharedArea {
        SharedArea::new(self.window, 0, InflightArea::packed_size(MOST)).expect("inside")
    }

    fn play(&mut self, input: &mut Input<'_>) {
        while !input.is_empty() {
            self.step(input);
            let in_flight = self.queue.in_flight();
            assert!(in_flight <= self.layout.size, "no more in flight than the ring holds");
            assert_eq!(usize::from(in_flight), self.held.len());
        }
        for chain in self.held.drain(..) {
            self.queue.complete(chain, 0);
        }
        assert_eq!(self.queue.in_flight(), 0);
        let _ = self.queue.publish();
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.below(12) {
            0..=2 => self.take(input),
            3 if !self.held.is_empty() => {
                let chain = self.held.swap_remove(input.below(self.held.len()));
                self.queue.complete(chain, input.number() as u32);
            }
            4 => {
                let _ = self.queue.publish();
            }
            5 => {
                let _ = self.queue.arm();
                self.queue.disarm();
            }
            6 | 7 => self.offer(input),
            8 => self.replace(input.one_in(3)),
            9 if self.tracked => {
                let place = 2 * input.below(InflightArea::packed_size(MOST) as usize / 2 - 1);
                self.shared().store16(place, input.number() as u16);
            }
            _ => {
                let at = input.number() % (2 * REGION - 64);
                let length = input.below(64);
                self.view.write(at, input.take(length)).expect("inside");
            }
        }
    }

    fn take(&mut self, input: &mut Input<'_>) {
        let owed = self.queue.owed() > 0;
        let popped = if owed { self.queue.pop_owed() } else { self.queue.pop() };
        match popped {
            Ok(Some(mut chain)) => {
                assert!(!self.broken, "a broken ring yields nothing");
                assert!(chain.head() < self.layout.size);
                let same = self.held.iter().any(|held| held.head() == chain.head());
                assert!(!same, "an id in flight is not taken again");
                reached("packed chain".to_owned());
                if owed {
                    reached("packed chain of a killed queue".to_owned());
                }
                touch(input, &mut chain);
                self.held.push(chain);
            }
            Ok(None) => {}
            Err(error) => {
                assert!(!std::mem::replace(&mut self.broken, true), "a ring breaks once");
                said(&error);
            }
        }
    }

    /// A chain, as a driver makes it available, of plausible descriptors.
    fn offer(&mut self, input: &mut Input<'_>) {
        let (first, count) = (self.at, 1 + input.below(4));
        let mut first_flags = 0;
        for number in 0..count {
            let (at, wrap) = self.at;
            let place = self.layout.desc + 16 * u64::from(at);
            let mut flags = u16::from(input.byte()) & 7;
            if flags & 4 != 0 && input.one_in(2) {
                flags = 4;
            }
            if number + 1 < count && flags != 4 {
                flags |= 1;
            }
            flags |= if wrap { AVAIL } else { USED };
            let mut body = [0; 14];
            body[..8].copy_from_slice(&(input.number() << input.below(9)).to_le_bytes());
            body[8..12].copy_from_slice(&(input.number() as u32).to_le_bytes());
            body[12..].copy_from_slice(&u16::from(input.byte() % (MOST as u8 + 1)).to_le_bytes());
            self.view.write(place, &body).expect("inside");
            if number == 0 {
                first_flags = flags;
            } else {
                self.view.write(place + 14, &flags.to_le_bytes()).expect("inside");
            }
            let turned = at + 1 == self.layout.size;
            self.at = if turned { (0, !wrap) } else { (at + 1, wrap) };
        }
        let place = self.layout.desc + 16 * u64::from(first.0) + 14;
        self.view.write(place, &first_flags.to_le_bytes()).expect("inside");
    }

    /// Another queue goes on: one that was told where, or one that finds it in the region.
    fn replace(&mut self, killed: bool) {
        if !killed || !self.tracked {
            for chain in self.held.drain(..) {
                self.queue.complete(chain, 0);
            }
            let _ = self.queue.publish();
        }
        let base = self.queue.base();
        let made = DeviceQueue::new(self.layout, self.features, base, self.view.clone());
        // A ring that is not broken goes on where the one before it says.
        let mut queue = made.expect("a base that a queue gave");
        if self.tracked
            && let Err(error) = queue.set_inflight(self.area())
        {
            said(&error);
            return self.untracked(base);
        }
        assert!(queue.owed() <= self.layout.size, "no more owed than the ring holds");
        self.held.clear();
        (self.queue, self.broken) = (queue, false);
    }

    /// Nothing was taken up from a region that makes no sense: a ring without one.
    fn untracked(&mut self, base: u32) {
        let queue = DeviceQueue::new(self.layout, self.features, base, self.view.clone());
        self.queue = queue.expect("as before");
        self.held.clear();
        (self.tracked, self.broken) = (false, false);
    }
}

/// Counts the rule that was broken.
fn said(error: &RingError) {
    let text = format!("{error:?}");
    reached(format!("packed {}", text.split([' ', '{']).next().unwrap_or_default()));
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
    let most = left.min(4096) as usize;
    assert!(chain.writable().write_all(&vec![0xa5; most]).is_ok());
}
