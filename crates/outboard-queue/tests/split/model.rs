//! The driver side against the device side: any requests, any sizes, everything answered exactly once, and the quick
//! walk agrees with the careful one.

use std::collections::{HashMap, VecDeque};

use outboard_memory::View;
use outboard_queue::{Chain, DeviceQueue, DriverQueue, QueueLayout};
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
    ]
}

/// What the driver expects of a request it made.
struct Expected {
    readable: Vec<u8>,
    room: u64,
}

struct Model {
    view: View,
    driver: DriverQueue,
    device: DeviceQueue,
    /// By token.
    expected: HashMap<u64, Expected>,
    next_token: u64,
    next_place: u64,
    in_flight: VecDeque<Chain>,
    answered: u64,
}

impl Model {
    fn new(size: u16, features: u64, start: u16) -> Self {
        let view = View::new(memory());
        let (layout, end) = QueueLayout::split_at(0, size).unwrap();
        let mut driver = DriverQueue::starting_at(layout, features, view.clone(), start).unwrap();
        let entries =
            u16::try_from((DATA - end) / 16 / u64::from(size)).unwrap_or(u16::MAX).min(16);
        driver.set_indirect_area(end, entries);
        let device = DeviceQueue::new(layout, features, u32::from(start), view.clone()).unwrap();
        Self {
            view,
            driver,
            device,
            expected: HashMap::new(),
            next_token: 1,
            next_place: DATA,
            in_flight: VecDeque::new(),
            answered: 0,
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
        let indirect = indirect && self.driver.features().indirect;
        let added = if indirect {
            self.driver.add_indirect(&read, &write, token)
        } else {
            self.driver.add(&read, &write, token)
        };
        if added.is_ok() {
            let room = writable.iter().copied().map(u64::from).sum();
            self.expected.insert(token, Expected { readable: bytes, room });
            self.next_token += 1;
        }
    }

    fn take(&mut self) {
        if let Some(chain) = self.device.pop().unwrap() {
            self.in_flight.push_back(chain);
        }
        assert_eq!(usize::from(self.device.in_flight()), self.in_flight.len());
        assert_eq!(self.device.is_idle(), self.in_flight.is_empty());
    }

    /// The device answers with the number of bytes it had to read, so that the driver can tell.
    fn complete(&mut self, at: usize) {
        if self.in_flight.is_empty() {
            return;
        }
        let mut chain = self.in_flight.remove(at % self.in_flight.len()).unwrap();
        let mut bytes = vec![0; usize::try_from(chain.readable().len()).unwrap()];
        chain.readable().read_exact(&mut bytes).unwrap();
        assert!(chain.readable().is_empty());
        let room = chain.writable().len();
        chain.writable().fill_zero(room).unwrap();
        assert_eq!(chain.writable().written(), room);
        let known = self
            .expected
            .values()
            .any(|expected| expected.readable == bytes && expected.room == room);
        assert!(
            known,
            "a request that nobody made: {} bytes to read, {room} to write",
            bytes.len()
        );
        self.device.complete(chain, u32::try_from(bytes.len() as u64 * 1000 + room).unwrap());
    }

    fn answers(&mut self) {
        while let Some((token, written)) = self.driver.pop_used().unwrap() {
            let expected = self.expected.remove(&token).unwrap();
            assert_eq!(u64::from(written), expected.readable.len() as u64 * 1000 + expected.room);
            self.answered += 1;
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Add { readable, writable, indirect } => self.add(readable, writable, *indirect),
            Step::DriverPublishes => drop(self.driver.publish()),
            Step::DeviceTakes => self.take(),
            Step::DeviceCompletes(at) => self.complete(*at),
            Step::DevicePublishes => drop(self.device.publish().unwrap()),
            Step::DriverTakes => self.answers(),
            Step::DeviceArms(true) => drop(self.device.arm()),
            Step::DeviceArms(false) => self.device.disarm(),
            Step::DriverArms(true) => drop(self.driver.arm()),
            Step::DriverArms(false) => self.driver.disarm(),
        }
    }

    /// Everything that was made is answered.
    fn finish(mut self) {
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
        assert_eq!(u32::from(self.driver.next_avail()), self.device.base());
        assert!(!self.device.arm() && !self.driver.arm());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_request_is_answered_exactly_once(
        size in (0..16_u32).prop_map(|power| 1_u16 << power),
        event_idx in any::<bool>(),
        indirect in any::<bool>(),
        start in prop_oneof![Just(0_u16), Just(0xfff8), any::<u16>()],
        steps in prop::collection::vec(step(), 1..300),
    ) {
        let features = if event_idx { EVENT_IDX } else { 0 } | if indirect { INDIRECT_DESC } else { 0 };
        let mut model = Model::new(size, features, start);
        for step in &steps {
            model.step(step);
        }
        model.finish();
    }

    /// Descriptors of any content: whatever the device makes of them, it ends, stays in memory and says so once.
    #[test]
    fn any_descriptors_are_served_or_refused(
        descriptors in prop::collection::vec(
            (prop_oneof![Just(DATA), DATA..END + 64, any::<u64>()],
             prop_oneof![Just(0_u32), Just(16), 0..600_u32, any::<u32>()],
             prop_oneof![0..8_u16, any::<u16>()],
             prop_oneof![0..20_u16, any::<u16>()]), 32),
        heads in prop::collection::vec(prop_oneof![0..16_u16, any::<u16>()], 1..16),
        indirect in any::<bool>(),
    ) {
        let mut rig = Rig::new(16, if indirect { INDIRECT_DESC } else { 0 });
        for (at, &(addr, len, flags, next)) in (0..).zip(&descriptors) {
            // Half of them are the ring's, half lie where indirect tables may point.
            if at < 16 {
                rig.desc(at, addr, len, flags, next);
            } else {
                rig.desc_at(DATA + 16 * u64::from(at - 16), addr, len, flags, next);
            }
        }
        for &head in &heads {
            rig.offer(head);
        }
        let mut refused = 0;
        for _ in 0..heads.len() + 2 {
            match rig.device.pop() {
                Ok(Some(mut chain)) => {
                    let (read, room) = (chain.readable().len(), chain.writable().len());
                    prop_assert!(read + room <= 1 << 32);
                    let mut bytes = vec![0; usize::try_from(read.min(4096)).unwrap()];
                    chain.readable().read_exact(&mut bytes).unwrap();
                    rig.device.complete(chain, 0);
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
