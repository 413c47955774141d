//! In-order use (VIRTIO_F_IN_ORDER; case B46): what is completed out of order is used in order, on rings of both layouts,
//! and a driver takes batches that the device closed with their last chain alone.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use outboard_memory::{DirtyLog, GuestMemory, Region, View, Window};
use outboard_queue::{
    Chain, DeviceQueue, DriverQueue, InflightArea, QueueFeatures, QueueLayout, RingError, RingLog,
};

const PACKED: u64 = 1 << 34;
const IN_ORDER: u64 = 1 << 35;
const LAYOUTS: [u64; 2] = [IN_ORDER, IN_ORDER | PACKED];
const SIZE: u16 = 8;
const DATA: u64 = 0x8000;

struct Rig {
    view: View,
    layout: QueueLayout,
    features: u64,
    driver: DriverQueue,
    device: DeviceQueue,
}

impl Rig {
    fn new(features: u64) -> Self {
        let region = Arc::new(Region::memfd(0, 0x1_0000).unwrap().0);
        let view = View::new(Arc::new(GuestMemory::new(1, vec![region]).unwrap()));
        let shape = QueueFeatures::from_bits(features);
        assert_eq!(shape.bits(), features);
        let (layout, _) = QueueLayout::at(0, SIZE, shape).unwrap();
        let driver = DriverQueue::new(layout, features, view.clone()).unwrap();
        let device = DeviceQueue::new(layout, features, driver.base(), view.clone()).unwrap();
        Self { view, layout, features, driver, device }
    }

    /// Requests with these tokens, of one readable and one writable buffer; the latter has 64 bytes.
    fn offer(&mut self, tokens: std::ops::Range<u64>) -> Vec<u16> {
        let heads = tokens.map(|token| self.driver.add(&[(DATA, 16)], &[(DATA, 64)], token));
        let heads = heads.collect::<Result<_, _>>().unwrap();
        self.driver.publish();
        heads
    }

    /// Requests with these tokens that have bytes to read only.
    fn offer_to_read(&mut self, tokens: std::ops::Range<u64>) -> Vec<u16> {
        let heads = tokens.map(|token| self.driver.add(&[(DATA, 16)], &[], token));
        let heads = heads.collect::<Result<_, _>>().unwrap();
        self.driver.publish();
        heads
    }

    /// The id and the length that stand in used element `at`; packed: in descriptor `at`.
    fn element(&self, at: u16) -> (u32, u32) {
        let mut bytes = [0; 8];
        let at = u64::from(at % SIZE);
        let packed = self.features & PACKED != 0;
        let place =
            if packed { self.layout.desc + 16 * at + 8 } else { self.layout.used + 4 + 8 * at };
        self.view.read(place, &mut bytes).unwrap();
        let [a, b, c, d, e, f, g, h] = bytes;
        let (first, second) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
        if packed { (second & 0xffff, first) } else { (first, second) }
    }

    fn take(&mut self) -> Vec<Option<Chain>> {
        std::iter::from_fn(|| self.device.pop().unwrap()).map(Some).collect()
    }

    /// What the driver sees after the device has published.
    fn seen(&mut self) -> Vec<(u64, u32)> {
        self.device.publish().unwrap();
        std::iter::from_fn(|| self.driver.pop_used().unwrap()).collect()
    }

    /// Writes by hand that the device is done up to this chain; `done` chains of two descriptors each came before it.
    fn closes(&self, done: u16, batch: u16, last: u16, written: u32) {
        let write = |place, bytes: &[u8]| self.view.write(place, bytes).unwrap();
        if self.features & PACKED == 0 {
            let element = self.layout.used + 4 + 8 * u64::from(done % SIZE);
            write(element, &u32::from(last).to_le_bytes());
            write(element + 4, &written.to_le_bytes());
            write(self.layout.used + 2, &(done + batch).to_le_bytes());
        } else {
            let place = self.layout.desc + 16 * u64::from(2 * done % SIZE);
            write(place + 8, &written.to_le_bytes());
            write(place + 12, &last.to_le_bytes());
            let flags = if (2 * done / SIZE).is_multiple_of(2) { 0x8080_u16 } else { 0 };
            write(place + 14, &flags.to_le_bytes());
        }
    }
}

#[test]
fn b46_what_is_completed_out_of_order_is_used_in_order() {
    for features in LAYOUTS {
        let mut rig = Rig::new(features);
        // Odd numbers, so that the ring is gone round at different places.
        for round in (0..30).step_by(3) {
            rig.offer(round..round + 3);
            let mut chains = rig.take();
            let mut complete = |rig: &mut Rig, at: usize| {
                let number = u32::try_from(at).unwrap();
                rig.device.complete(chains[at].take().unwrap(), 10 + number);
                rig.seen()
            };
            assert_eq!(complete(&mut rig, 2), []);
            assert_eq!(rig.device.in_flight(), 3, "what waits is in flight");
            assert_eq!(complete(&mut rig, 0), [(round, 10)]);
            assert_eq!(rig.device.in_flight(), 2);
            assert_eq!(complete(&mut rig, 1), [(round + 1, 11), (round + 2, 12)]);
            assert_eq!((rig.device.in_flight(), rig.driver.free()), (0, SIZE));
            assert_eq!(rig.device.base(), rig.driver.base());
        }
    }
}

#[test]
fn b46_order_is_kept_while_a_log_comes_and_goes() {
    for features in LAYOUTS {
        let mut rig = Rig::new(features);
        let log = Arc::new(DirtyLog::memfd(0x1_0000).unwrap().0);
        let notes = || RingLog { log: Arc::clone(&log), used: None, notify: None };
        // What is in flight when the log comes was taken without it, and the other way round.
        for round in (0..30).step_by(3) {
            rig.offer(round..round + 3);
            let mut chains = rig.take();
            let mut complete = |rig: &mut Rig, at: usize| {
                rig.device.complete(chains[at].take().unwrap(), 1);
                rig.seen().into_iter().map(|(token, _)| token).collect::<Vec<_>>()
            };
            let logs = round % 2 == 0;
            assert_eq!(complete(&mut rig, 1), []);
            rig.device.set_log(logs.then(notes));
            assert_eq!(complete(&mut rig, 2), []);
            assert_eq!(complete(&mut rig, 0), [round, round + 1, round + 2]);
            assert_eq!((rig.device.in_flight(), rig.driver.free()), (0, SIZE));
        }
    }
}

#[test]
fn without_the_feature_a_queue_gives_back_at_once() {
    for features in LAYOUTS {
        let mut rig = Rig::new(features & !IN_ORDER);
        rig.offer(0..2);
        let mut chains = rig.take();
        rig.device.complete(chains[1].take().unwrap(), 0);
        assert_eq!(rig.seen(), [(1, 0)]);
    }
}

#[test]
fn a_driver_uses_descriptors_in_the_order_of_the_table() {
    let mut rig = Rig::new(IN_ORDER);
    let mut at = 0;
    for round in 0..20 {
        for head in rig.offer(round..round + 1 + round % 3) {
            assert_eq!(head, at);
            let next = rig.view.clone();
            let mut bytes = [0; 2];
            next.read(rig.layout.desc + 16 * u64::from(at) + 14, &mut bytes).unwrap();
            assert_eq!(u16::from_le_bytes(bytes), (at + 1) % SIZE);
            at = (at + 2) % SIZE;
        }
        for chain in rig.take().into_iter().rev() {
            rig.device.complete(chain.unwrap(), 0);
        }
        assert_eq!(rig.seen().len() as u64, 1 + round % 3);
    }
}

#[test]
fn b46_a_batch_that_was_closed_with_its_last_chain_is_taken_whole() {
    for features in LAYOUTS {
        let mut rig = Rig::new(features);
        for round in 0..6_u16 {
            let first = u64::from(3 * round);
            let heads = rig.offer(first..first + 3);
            rig.closes(3 * round, 3, heads[2], 7);
            assert_eq!(rig.driver.pop_used().unwrap(), Some((first, 64)), "skipped: all of it");
            assert!(rig.driver.arm(), "more is there");
            assert_eq!(rig.driver.pop_used().unwrap(), Some((first + 1, 64)));
            assert_eq!(rig.driver.pop_used().unwrap(), Some((first + 2, 7)));
            assert_eq!(rig.driver.pop_used().unwrap(), None);
            assert_eq!(rig.driver.free(), SIZE);
        }
    }
}

#[test]
fn what_has_nothing_to_write_is_skipped_and_the_last_one_of_a_batch_closes_it() {
    for features in LAYOUTS {
        let mut rig = Rig::new(features);
        let mut at = 0;
        for round in (0..30).step_by(3) {
            let heads = rig.offer_to_read(round..round + 3);
            let behind = [rig.element(at + 1), rig.element(at + 2)];
            // Out of order, which makes no difference.
            let mut chains = rig.take();
            for which in [1, 0, 2] {
                rig.device.complete(chains[which].take().unwrap(), 0);
            }
            assert_eq!(rig.seen(), [(round, 0), (round + 1, 0), (round + 2, 0)]);
            assert_eq!(rig.element(at), (heads[2].into(), 0), "the last one closes the batch");
            assert_eq!([rig.element(at + 1), rig.element(at + 2)], behind, "none of their own");
            assert_eq!((rig.device.in_flight(), rig.driver.free()), (0, SIZE));
            assert_eq!(rig.device.base(), rig.driver.base());
            at += 3;
        }
    }
}

#[test]
fn what_has_bytes_to_write_is_told_with_its_length_wherever_it_stands_in_a_batch() {
    for features in LAYOUTS {
        for kinds in 0..16_u64 {
            let mut rig = Rig::new(features);
            let mut next = 0;
            for _ in 0..5 {
                let mut expected = Vec::new();
                for kind in 0..4 {
                    let writes = kinds >> kind & 1 != 0 && next % 3 != 1;
                    if writes {
                        rig.offer(next..next + 1);
                    } else {
                        rig.offer_to_read(next..next + 1);
                    }
                    let written = if writes { u32::try_from(7 * next % 64).unwrap() } else { 0 };
                    expected.push((next, written));
                    next += 1;
                    if rig.driver.free() < 2 {
                        break;
                    }
                }
                for (chain, (_, written)) in rig.take().into_iter().zip(&expected) {
                    rig.device.complete(chain.unwrap(), *written);
                }
                assert_eq!(rig.seen(), expected, "{features:#x} {kinds:#b}");
                assert_eq!(rig.driver.free(), SIZE);
                assert_eq!(rig.device.base(), rig.driver.base());
            }
        }
    }
}

#[test]
fn without_the_feature_nothing_is_skipped() {
    for features in LAYOUTS {
        let mut rig = Rig::new(features & !IN_ORDER);
        let heads = rig.offer_to_read(0..2);
        for chain in rig.take() {
            rig.device.complete(chain.unwrap(), 0);
        }
        assert_eq!(rig.seen(), [(0, 0), (1, 0)]);
        assert_eq!([rig.element(0).0, rig.element(1).0], [heads[0].into(), heads[1].into()]);
    }
}

#[test]
fn b46_a_batch_of_what_is_not_in_flight_is_refused() {
    for features in LAYOUTS {
        let mut rig = Rig::new(features);
        let heads = rig.offer(0..3);
        rig.closes(0, 3, SIZE - 1, 7);
        assert!(matches!(rig.driver.pop_used(), Err(RingError::UsedHead { id: 7 })));
        assert!(rig.driver.pop_used().is_err(), "said each time");
        rig.closes(0, 3, heads[0], 7);
        assert_eq!(rig.driver.pop_used().unwrap(), Some((0, 7)));
    }
    // Its last chain lies behind what the used index covers.
    let mut rig = Rig::new(IN_ORDER);
    let heads = rig.offer(0..3);
    rig.closes(0, 2, heads[2], 7);
    assert!(matches!(rig.driver.pop_used(), Err(RingError::UsedHead { .. })));
}

/// A process that was killed had completed the second of three: it was not used, so it is owed like the others.
#[test]
fn b46_what_waited_for_its_turn_when_the_process_died_is_owed() {
    for features in LAYOUTS {
        let length = InflightArea::size(SIZE).max(InflightArea::packed_size(SIZE));
        let file = rustix::fs::memfd_create("region", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, length).unwrap();
        let window = Arc::new(Window::map(file, 0, length, true).unwrap());
        let area = || {
            let packed = features & PACKED != 0;
            let make = if packed { InflightArea::packed } else { InflightArea::new };
            make(&window, 0, SIZE).unwrap()
        };
        let mut rig = Rig::new(features);
        rig.device.set_inflight(area()).unwrap();
        rig.offer(0..3);
        let mut chains = rig.take();
        rig.device.complete(chains[1].take().unwrap(), 0);
        assert_eq!(rig.seen(), []);
        let (base, view) = (rig.device.base(), rig.view.clone());
        rig.device = DeviceQueue::new(rig.layout, features, base, view).unwrap();
        rig.device.set_inflight(area()).unwrap();
        assert_eq!(rig.device.owed(), 3);
        let owed: Vec<_> = std::iter::from_fn(|| rig.device.pop_owed().unwrap()).collect();
        for chain in owed.into_iter().rev() {
            rig.device.complete(chain, 0);
        }
        assert_eq!(rig.seen(), [(0, 0), (1, 0), (2, 0)]);
    }
}
