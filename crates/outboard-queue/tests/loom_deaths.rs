//! A device that dies before each of its stores in turn, and the one that follows it (case C7). Run with
//! `RUSTFLAGS=--cfg=outboard_loom`, under which every store to memory that outlives a process is counted.
//!
//! Whatever happened, each request is answered exactly once to the driver, what was not answered is served again in the
//! order in which it was taken, and nothing that was answered is.
#![cfg(outboard_loom)]
#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::{Arc, Mutex};

use outboard_memory::{DirtyLog, GuestMemory, Region, SharedArea, View, Window, twin};
use outboard_queue::{Chain, DeviceQueue, DriverQueue, InflightArea, QueueLayout, RingLog};

const EVENT_IDX: u64 = 1 << 29;
const PACKED: u64 = 1 << 34;
const DATA: u64 = 0x8000;
const SIZE: u16 = 8;

/// What the device does, a letter each: `t` takes a request and keeps it, `o` gives the oldest one back, `n` the newest
/// one, `p` publishes, `a` arms, `d` disarms.
const SCRIPTS: [&str; 8] = [
    "top",
    "ttoopp",
    "tttnopnp",
    "ttttnnoop",
    "tatodpatop",
    "ttonnpttoopp",
    "ttttttttnnnnoooop",
    "topttnptonpttttonop",
];

struct World {
    view: View,
    layout: QueueLayout,
    features: u64,
    region: Arc<Window>,
    driver: DriverQueue,
    offered: u64,
    answered: Vec<u64>,
    /// Heads in the order in which they were taken by whichever device, those that were given back crossed out.
    taken: Arc<Mutex<Vec<u16>>>,
}

impl World {
    fn new(features: u64) -> Self {
        let region = Region::memfd(0, 0x1_0000).unwrap().0;
        let view = View::new(Arc::new(GuestMemory::new(1, vec![Arc::new(region)]).unwrap()));
        let packed = features & PACKED != 0;
        let layout =
            if packed { QueueLayout::packed_at(0, SIZE) } else { QueueLayout::split_at(0, SIZE) };
        let layout = layout.unwrap().0;
        let driver = DriverQueue::new(layout, features, view.clone()).unwrap();
        let file = rustix::fs::memfd_create("region", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let bytes = if packed { InflightArea::packed_size(SIZE) } else { InflightArea::size(SIZE) };
        rustix::fs::ftruncate(&file, bytes).unwrap();
        let region = Window::map(file, 0, bytes, true).unwrap();
        let region = Arc::new(region);
        let (offered, answered, taken) = (0, Vec::new(), Arc::default());
        Self { view, layout, features, region, driver, offered, answered, taken }
    }

    /// Has the driver's free descriptors in no order, so that the order of heads is not that of requests.
    fn shuffle(&mut self) {
        self.offer();
        let mut device = self.device();
        let mut held: Vec<_> = std::iter::from_fn(|| device.pop().unwrap()).collect();
        for at in [5, 2, 5, 0, 2, 2, 1, 0] {
            device.complete(held.remove(at), 0);
        }
        device.publish().unwrap();
        self.collect();
    }

    /// Fills the ring up with requests of one descriptor.
    fn offer(&mut self) {
        while self.driver.add(&[(DATA, 16)], &[], self.offered).is_ok() {
            self.offered += 1;
        }
        self.driver.publish();
    }

    fn collect(&mut self) {
        while let Some((token, _)) = self.driver.pop_used().unwrap() {
            self.answered.push(token);
        }
    }

    fn packed(&self) -> bool {
        self.features & PACKED != 0
    }

    /// What the front-end believes of the base: the used index, or where a packed ring began.
    fn base(&self) -> u32 {
        if self.packed() {
            return 0x8000_8000;
        }
        let used = self.view.cells(self.layout.used, 4).unwrap().u16_at(2).unwrap();
        used.load(std::sync::atomic::Ordering::Relaxed).into()
    }

    /// A device process that takes up what is there.
    fn device(&self) -> DeviceQueue {
        let view = self.view.clone();
        let mut device = DeviceQueue::new(self.layout, self.features, self.base(), view).unwrap();
        let make = if self.packed() { InflightArea::packed } else { InflightArea::new };
        device.set_inflight(make(&self.region, 0, SIZE).unwrap()).unwrap();
        device
    }

    /// The flags of the region's entries.
    fn in_flight(&self) -> impl Iterator<Item = u8> {
        let bytes =
            if self.packed() { InflightArea::packed_size(SIZE) } else { InflightArea::size(SIZE) };
        let area = SharedArea::new(&self.region, 0, bytes).unwrap();
        let entry = if self.packed() { 32 } else { 16 };
        (0..usize::from(SIZE)).map(move |at| area.load8(entry + entry * at).unwrap())
    }
}

/// Plays a script on a device.
fn live(device: &mut DeviceQueue, script: &str, taken: &Mutex<Vec<u16>>) {
    let mut held: Vec<Chain> = Vec::new();
    let give = |device: &mut DeviceQueue, chain: Chain| device.complete(chain, 0);
    for letter in script.chars() {
        match letter {
            't' => {
                let chain = match device.pop_owed().unwrap() {
                    Some(chain) => chain,
                    None => match device.pop().unwrap() {
                        Some(chain) => chain,
                        None => continue,
                    },
                };
                taken.lock().unwrap().push(chain.head());
                held.push(chain);
            }
            'o' if !held.is_empty() => give(device, held.remove(0)),
            'n' => {
                if let Some(chain) = held.pop() {
                    give(device, chain);
                }
            }
            'p' => drop(device.publish().unwrap()),
            'a' => drop(device.arm()),
            'd' => device.disarm(),
            _ => {}
        }
    }
}

/// The second device, which lives to the end, serves everything; its owed requests come in the order of taking.
fn finish(world: &mut World) {
    let mut device = world.device();
    let mut order = Vec::new();
    while let Some(chain) = device.pop_owed().unwrap() {
        order.push(chain.head());
        device.complete(chain, 0);
    }
    let mut expected = world.taken.lock().unwrap().clone();
    expected.retain(|head| order.contains(head));
    // The last time that each of them was taken: a head is used again and again.
    let mut last: Vec<u16> = Vec::new();
    for head in expected {
        last.retain(|other| *other != head);
        last.push(head);
    }
    assert_eq!(order, last, "in the order in which they were taken");
    while let Some(chain) = device.pop().unwrap() {
        device.complete(chain, 0);
    }
    device.publish().unwrap();
    assert_eq!(device.in_flight(), 0);
    world.collect();
    let mut answered = world.answered.clone();
    answered.sort_unstable();
    assert!(answered.into_iter().eq(0..world.offered), "each exactly once");
    assert!(world.in_flight().all(|flag| flag == 0), "nothing is in flight");
}

/// Lives: a script until death at store `first`, then another until death at `second`, then one that finishes. Says
/// whether the first and the second died.
fn lives(scripts: [&'static str; 2], features: u64, logged: bool, deaths: [u64; 2]) -> [bool; 2] {
    let died = Arc::new(Mutex::new([false; 2]));
    let out = Arc::clone(&died);
    loom::model(move || {
        let mut world = World::new(features);
        // The fresh region is prepared in the lives that are watched, or before them.
        if features & EVENT_IDX != 0 {
            world.shuffle();
        }
        world.offer();
        for (life, (steps, script)) in deaths.into_iter().zip(scripts).enumerate() {
            let taken = Arc::clone(&world.taken);
            // Also the taking up of the region is a part of life.
            let ended = twin::dying_after(steps, || {
                let mut device = world.device();
                if logged {
                    let (log, _file) = DirtyLog::memfd(0x1000).unwrap();
                    let log = Arc::new(log);
                    device.set_log(Some(RingLog { log, used: Some(0), notify: None }));
                }
                live(&mut device, script, &taken);
            });
            out.lock().unwrap()[life] = ended.is_none();
            world.collect();
            world.offer();
        }
        finish(&mut world);
    });
    let died = *died.lock().unwrap();
    died
}

#[test]
fn c7_a_device_killed_before_any_store_loses_no_request_and_doubles_none() {
    let mut deaths = 0;
    for features in [0, EVENT_IDX, PACKED, PACKED | EVENT_IDX] {
        for script in SCRIPTS {
            let mut steps = 0;
            // What follows shows one request at first: no more than that is to be found by the driver.
            while lives([script, "top"], features, false, [steps, u64::MAX])[0] {
                steps += 1;
            }
            assert!(steps > 8, "{script}: only {steps} stores");
            deaths += steps;
        }
    }
    println!("{deaths} deaths");
    assert!(deaths > 1000, "{deaths} deaths");
}

#[test]
fn c7_a_device_killed_while_it_takes_up_what_a_killed_one_left_loses_nothing_either() {
    for (script, features) in [
        ("top", EVENT_IDX),
        ("tttnopnp", EVENT_IDX),
        ("ttonnpttoopp", EVENT_IDX),
        ("tttnopnp", EVENT_IDX | PACKED),
        ("ttonnpttoopp", EVENT_IDX | PACKED),
    ] {
        for first in 0.. {
            let mut second = 0;
            let mut first_died = true;
            loop {
                let died = lives([script; 2], features, false, [first, second]);
                first_died &= died[0];
                if !died[1] {
                    break;
                }
                second += 3;
            }
            if !first_died {
                break;
            }
        }
    }
}

#[test]
fn c7_the_dirty_log_and_the_region_get_on_with_each_other() {
    for features in [EVENT_IDX, EVENT_IDX | PACKED] {
        let mut steps = 0;
        while lives(["ttonnpttoopp"; 2], features, true, [steps, u64::MAX])[0] {
            steps += 1;
        }
    }
}
