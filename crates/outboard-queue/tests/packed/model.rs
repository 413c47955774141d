//! The driver side against the device side: any requests, rings of any size, everything answered exactly once, and in
//! order when that was promised; and a split ring and a packed one behave alike.

use std::collections::{HashMap, VecDeque};

use outboard_memory::View;
use outboard_queue::{Chain, DeviceQueue, DriverQueue, QueueFeatures, QueueFull, QueueLayout};
use proptest::prelude::*;

use crate::rig::*;

/// A step of one side or the other.
#[derive(Clone, Debug)]
enum Step {
    /// A request of so many readable and writable pieces of these sizes, in a table or not.
    Add {
        readable: Vec<u16>,
        writable: Vec<u16>,
        indirect: bool,
    },
    DriverPublishes,
    DeviceTakes,
    /// Gives back the one at this place among those in flight.
    DeviceCompletes(usize),
    DevicePublishes,
    DriverTakes,
    DeviceArms(bool),
    DriverArms(bool),
    /// Another process takes over, when nothing is in flight.
    DeviceIsReplaced,
}

fn step() -> impl Strategy<Value = Step> {
    let sizes = || prop::collection::vec(prop_oneof![4 => 1..300_u16, 1 => Just(0_u16)], 0..5);
    prop_oneof![
        6 => (sizes(), sizes(), any::<bool>())
            .prop_map(|(readable, writable, indirect)| Step::Add { readable, writable, indirect }),
        3 => Just(Step::DriverPublishes),
        5 => Just(Step::DeviceTakes),
        5 => any::<usize>().prop_map(Step::DeviceCompletes),
        2 => Just(Step::DevicePublishes),
        3 => Just(Step::DriverTakes),
        1 => any::<bool>().prop_map(Step::DeviceArms),
        1 => any::<bool>().prop_map(Step::DriverArms),
        1 => Just(Step::DeviceIsReplaced),
    ]
}

/// What one side saw of a step: the same on rings of both layouts.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Added(Result<(), QueueFull>),
    /// Bytes to read, and room, of the chain that was taken.
    Taken(Option<(Vec<u8>, u64)>),
    Answered(Vec<(u64, u32)>),
    Counts {
        in_flight: u16,
        free: u16,
    },
    /// Whether the last look found something.
    Armed(bool),
}

struct Model {
    view: View,
    layout: QueueLayout,
    features: u64,
    driver: DriverQueue,
    device: DeviceQueue,
    /// By token: what is to be read, and the room.
    expected: HashMap<u64, (Vec<u8>, u64)>,
    next_token: u64,
    next_place: u64,
    in_flight: VecDeque<(Chain, u32)>,
    answered: u64,
    seen: Vec<Seen>,
}

impl Model {
    fn new(size: u16, features: u64, start: u16) -> Self {
        let view = View::new(memory());
        let shape = QueueFeatures::from_bits(features);
        let (layout, end) = QueueLayout::at(0, size, shape).unwrap();
        let start = if shape.packed { (start & 0x8000) | ((start & 0x7fff) % size) } else { start };
        let mut driver = DriverQueue::starting_at(layout, features, view.clone(), start).unwrap();
        let entries =
            u16::try_from((DATA - end) / 16 / u64::from(size)).unwrap_or(u16::MAX).min(16);
        driver.set_indirect_area(end, entries);
        let device = DeviceQueue::new(layout, features, driver.base(), view.clone()).unwrap();
        Self {
            view,
            layout,
            features,
            driver,
            device,
            expected: HashMap::new(),
            next_token: 1,
            next_place: DATA,
            in_flight: VecDeque::new(),
            answered: 0,
            seen: Vec::new(),
        }
    }

    /// Guest memory for a buffer, not used before. Some straddle the seam of two regions.
    fn place(&mut self, len: u16) -> u64 {
        assert!(self.next_place + u64::from(len) <= END, "more buffers than memory");
        let place = self.next_place;
        self.next_place += u64::from(len) + 997;
        place
    }

    fn add(&mut self, readable: &[u16], writable: &[u16], indirect: bool) {
        let token = self.next_token;
        let mut bytes = Vec::new();
        let mut read = Vec::new();
        for &len in readable {
            let place = self.place(len);
            let piece = pattern(usize::from(len), u8::try_from(token % 256).unwrap());
            self.view.write(place, &piece).unwrap();
            bytes.extend(piece);
            read.push((place, u32::from(len)));
        }
        let write: Vec<_> = writable.iter().map(|&len| (self.place(len), u32::from(len))).collect();
        let added = if indirect && self.driver.features().indirect {
            self.driver.add_indirect(&read, &write, token)
        } else {
            self.driver.add(&read, &write, token)
        };
        if added.is_ok() {
            let room = writable.iter().copied().map(u64::from).sum();
            self.expected.insert(token, (bytes, room));
            self.next_token += 1;
        }
        self.seen.push(Seen::Added(added.map(drop)));
    }

    /// The device answers with what it had to read and write, so that the driver can tell.
    fn take(&mut self) {
        let taken = self.device.pop().unwrap().map(|mut chain| {
            let mut bytes = vec![0; usize::try_from(chain.readable().len()).unwrap()];
            chain.readable().read_exact(&mut bytes).unwrap();
            let room = chain.writable().len();
            chain.writable().fill_zero(room).unwrap();
            let known = self.expected.values().any(|expected| *expected == (bytes.clone(), room));
            assert!(known, "a request that nobody made: {} bytes, {room}", bytes.len());
            let answer = u32::try_from(bytes.len() as u64 * 1000 + room).unwrap();
            self.in_flight.push_back((chain, answer));
            (bytes, room)
        });
        self.seen.push(Seen::Taken(taken));
        let in_flight = usize::from(self.device.in_flight());
        assert_eq!(self.device.is_idle(), in_flight == 0);
        // What was completed before its turn is in flight still.
        assert!(in_flight == self.in_flight.len() || self.is_ordered());
        assert!(in_flight >= self.in_flight.len());
    }

    fn is_ordered(&self) -> bool {
        self.features & IN_ORDER != 0
    }

    fn complete(&mut self, at: usize) {
        if !self.in_flight.is_empty() {
            let (chain, answer) = self.in_flight.remove(at % self.in_flight.len()).unwrap();
            self.device.complete(chain, answer);
        }
    }

    fn answers(&mut self) {
        let mut answers = Vec::new();
        while let Some((token, written)) = self.driver.pop_used().unwrap() {
            let (readable, room) = self.expected.remove(&token).unwrap();
            assert_eq!(u64::from(written), readable.len() as u64 * 1000 + room);
            self.answered += 1;
            assert!(token == self.answered || !self.is_ordered(), "{token} out of turn");
            answers.push((token, written));
        }
        self.seen.push(Seen::Answered(answers));
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Add { readable, writable, indirect } => self.add(readable, writable, *indirect),
            Step::DriverPublishes => drop(self.driver.publish()),
            Step::DeviceTakes => self.take(),
            Step::DeviceCompletes(at) => self.complete(*at),
            Step::DevicePublishes => drop(self.device.publish().unwrap()),
            Step::DriverTakes => self.answers(),
            Step::DeviceArms(true) => {
                let found = self.device.arm();
                assert_eq!(found, self.device.has_available());
                self.seen.push(Seen::Armed(found));
            }
            Step::DeviceArms(false) => self.device.disarm(),
            Step::DriverArms(true) => self.seen.push(Seen::Armed(self.driver.arm())),
            Step::DriverArms(false) => self.driver.disarm(),
            Step::DeviceIsReplaced => {
                if self.in_flight.is_empty() {
                    self.device.publish().unwrap();
                    let (base, view) = (self.device.base(), self.view.clone());
                    self.device = DeviceQueue::new(self.layout, self.features, base, view).unwrap();
                }
            }
        }
        let (in_flight, free) = (self.driver.in_flight(), self.driver.free());
        self.seen.push(Seen::Counts { in_flight, free });
    }

    /// Everything that was made is answered.
    fn finish(mut self) -> Vec<Seen> {
        self.driver.publish();
        loop {
            self.take();
            if self.in_flight.is_empty() {
                break;
            }
            self.complete(0);
        }
        self.device.publish().unwrap();
        self.answers();
        assert!(self.expected.is_empty(), "{} were never answered", self.expected.len());
        assert_eq!(self.answered, self.next_token - 1);
        assert_eq!((self.driver.in_flight(), self.device.in_flight()), (0, 0));
        assert_eq!(self.driver.free(), self.driver.layout().size);
        assert_eq!(self.driver.base(), self.device.base());
        assert!(!self.device.arm() && !self.driver.arm());
        self.seen
    }
}

fn features((event_idx, indirect, in_order): (bool, bool, bool)) -> u64 {
    let bits = [(event_idx, EVENT_IDX), (indirect, INDIRECT_DESC), (in_order, IN_ORDER)];
    bits.iter().filter(|(chosen, _)| *chosen).map(|(_, bit)| bit).sum()
}

fn play(size: u16, features: u64, start: u16, steps: &[Step]) -> Vec<Seen> {
    let mut model = Model::new(size, features, start);
    for step in steps {
        model.step(step);
    }
    model.finish()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn b42_every_request_is_answered_exactly_once(
        size in prop_oneof![4 => 1..40_u16, 1 => 1..3000_u16],
        chosen in any::<(bool, bool, bool)>(),
        start in prop_oneof![Just(0x8000_u16), any::<u16>()],
        steps in prop::collection::vec(step(), 1..300),
    ) {
        play(size, PACKED | features(chosen), start, &steps);
    }

    #[test]
    fn a_split_ring_and_a_packed_one_behave_alike(
        size in (0..8_u32).prop_map(|power| 1_u16 << power),
        chosen in any::<(bool, bool, bool)>(),
        start in any::<u16>(),
        steps in prop::collection::vec(step(), 1..300),
    ) {
        let features = features(chosen);
        let split = play(size, features, start, &steps);
        let packed = play(size, PACKED | features, start, &steps);
        prop_assert_eq!(split, packed);
    }

    /// Descriptors of any content: whatever the device makes of them, it ends, stays in memory and says so once.
    #[test]
    fn b39_any_descriptors_are_served_or_refused(
        descriptors in prop::collection::vec(
            (prop_oneof![Just(DATA), DATA..END + 64, any::<u64>()],
             prop_oneof![Just(0_u32), Just(16), 0..600_u32, any::<u32>()],
             prop_oneof![6 => 0..13_u16, 1 => any::<u16>()],
             prop_oneof![4 => (0..8_u16).prop_map(|flags| flags | AVAIL), 1 => any::<u16>()]), 29),
        worn in any::<bool>(),
        indirect in any::<bool>(),
    ) {
        WORN.set(worn);
        let mut rig = Rig::new(13, if indirect { INDIRECT_DESC } else { 0 });
        WORN.set(false);
        for (at, &(addr, len, id, flags)) in (0_u16..).zip(&descriptors) {
            // Half of them are the ring's, half lie where indirect tables may point.
            if at < 13 {
                rig.desc(at, addr, len, id, flags);
            } else {
                rig.entry(DATA + 16 * u64::from(at - 13), addr, len, flags);
            }
        }
        let mut refused = 0;
        for _ in 0..30 {
            match rig.device.pop() {
                Ok(Some(mut chain)) => {
                    let (read, room) = (chain.readable().len(), chain.writable().len());
                    prop_assert!(read + room <= 1 << 32 && chain.head() < 13);
                    let mut bytes = vec![0; usize::try_from(read.min(4096)).unwrap()];
                    chain.readable().read_exact(&mut bytes).unwrap();
                    rig.device.complete(chain, 0);
                    rig.device.publish().unwrap();
                }
                Ok(None) => {}
                Err(_) => refused += 1,
            }
        }
        prop_assert!(refused <= 1);
        prop_assert_eq!(refused == 1, rig.device.is_broken());
        prop_assert_eq!(rig.device.in_flight(), 0);
    }
}
