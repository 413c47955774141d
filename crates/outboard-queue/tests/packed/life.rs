//! The life of a queue: guest memory that changes, goes, or comes back (cases A35, A38, A39).

use std::os::fd::AsFd as _;
use std::sync::Arc;

use outboard_memory::{GuestMemory, MapOptions, Region, View};
use outboard_queue::{DeviceQueue, DriverQueue, QueueLayout, RingError};

use crate::rig::*;

/// Both sides of a ring in a file that can be cut short or mapped again.
fn on_a_file() -> (DriverQueue, DeviceQueue, Arc<GuestMemory>, std::os::fd::OwnedFd) {
    let (region, file) = Region::memfd(0, END).unwrap();
    let memory = Arc::new(GuestMemory::new(1, vec![Arc::new(region)]).unwrap());
    let view = View::new(Arc::clone(&memory));
    let (layout, _) = QueueLayout::packed_at(0, 6).unwrap();
    let driver = DriverQueue::new(layout, PACKED, view.clone()).unwrap();
    let device = DeviceQueue::new(layout, PACKED, driver.base(), view).unwrap();
    (driver, device, memory, file)
}

#[test]
fn a38_memory_is_replaced_under_chains_in_flight_and_between_completion_and_publication() {
    let (mut driver, mut device, first, file) = on_a_file();
    for token in 0..3 {
        driver.add(&[(DATA, 16)], &[], token).unwrap();
    }
    driver.publish();
    let [one, two] = [(); 2].map(|()| device.pop().unwrap().unwrap());
    device.complete(one, 1);

    let spec = *first.regions()[0].spec();
    let again = Region::map(spec, file, MapOptions::default()).unwrap();
    let second = Arc::new(GuestMemory::new(2, vec![Arc::new(again)]).unwrap());
    device.set_memory(View::new(second)).unwrap();
    assert_eq!((device.view().memory().generation(), device.in_flight()), (2, 1));
    device.complete(two, 2);
    assert_eq!(driver.pop_used().unwrap(), None);
    device.publish().unwrap();
    assert_eq!(driver.pop_used().unwrap(), Some((0, 1)));
    assert_eq!(driver.pop_used().unwrap(), Some((1, 2)));
    let three = device.pop().unwrap().unwrap();
    drop(driver);
    let gone = Arc::downgrade(&first);
    drop(first);
    assert!(gone.upgrade().is_none(), "nothing idle holds an old generation");
    device.complete(three, 0);
}

#[test]
fn a39_memory_without_the_ring_is_refused_and_the_queue_stays_as_it_was() {
    let mut rig = Rig::new(6, 0);
    let elsewhere = Region::memfd(END, 0x1000).unwrap().0;
    let memory = GuestMemory::new(7, vec![Arc::new(elsewhere)]).unwrap();
    let refused = rig.device.set_memory(View::new(Arc::new(memory))).unwrap_err();
    assert!(matches!(refused, RingError::Placement { part: "descriptor ring", .. }));
    rig.offer(2, &[(DATA, 16, 0)]);
    assert_eq!(rig.take().head(), 2);
}

#[test]
fn a35_a_buffer_cut_off_under_a_request_is_not_told_as_served() {
    let (mut driver, mut device, _memory, file) = on_a_file();
    driver.add(&[], &[(DATA, 16)], 1).unwrap();
    driver.publish();
    let mut chain = device.pop().unwrap().unwrap();
    rustix::fs::ftruncate(file.as_fd(), DATA).unwrap();
    chain.writable().write_all(&[1; 16]).unwrap();
    device.complete(chain, 16);
    assert_eq!(device.publish(), Err(RingError::MemoryLost));
    assert!(device.is_broken());
    assert_eq!(device.publish(), Ok(false), "said once");
    assert!(device.pop().unwrap().is_none());
    assert!(!device.arm());
    assert_eq!(driver.pop_used().unwrap(), None);
}

#[test]
fn a35_an_empty_ring_cut_off_is_found_at_the_next_arming() {
    let (_driver, mut device, _memory, file) = on_a_file();
    rustix::fs::ftruncate(file.as_fd(), 0).unwrap();
    assert!(device.pop().unwrap().is_none(), "flags of 0 are an empty ring");
    assert!(device.arm(), "there is something to hear");
    assert_eq!(device.pop().unwrap_err(), RingError::MemoryLost);
    assert!(device.pop().unwrap().is_none());
    assert!(!device.arm());
}

#[test]
fn a_chain_keeps_its_memory_when_the_queue_and_the_table_are_gone() {
    let (mut driver, mut device, memory, _file) = on_a_file();
    View::new(Arc::clone(&memory)).write(DATA, &[9; 16]).unwrap();
    driver.add(&[(DATA, 16)], &[], 1).unwrap();
    driver.publish();
    let mut chain = device.pop().unwrap().unwrap();
    let region = Arc::downgrade(&memory.regions()[0]);
    drop((device, driver, memory));
    assert_eq!(chain.readable().read_obj::<[u8; 16]>().unwrap(), [9; 16]);
    drop(chain);
    assert!(region.upgrade().is_none(), "the last chain was the last to hold it");
}

#[test]
fn no_in_flight_region_is_kept_for_a_packed_ring() {
    let mut rig = Rig::new(6, 0);
    let size = outboard_queue::InflightArea::size(6);
    let file = Region::memfd(0, 4096).unwrap().1;
    let window = outboard_memory::Window::map(file, 0, size, true).unwrap();
    let area = outboard_queue::InflightArea::new(&Arc::new(window), 0, 6).unwrap();
    assert!(matches!(rig.device.set_inflight(area), Err(RingError::Inflight { .. })));
    assert_eq!(rig.device.owed(), 0);
    assert!(rig.device.pop_owed().unwrap().is_none());
}

/// A list that leads through its chains must not be dropped by calling itself.
#[test]
fn a_ring_whose_every_descriptor_was_a_request_is_dropped_on_a_small_stack() {
    let mut rig = Rig::new(32_768, 0);
    for id in 0..32_768 {
        rig.offer(id, &[(DATA, 16, 0)]);
    }
    let chains: Vec<_> = (0..32_768).map(|_| rig.take()).collect();
    assert!(!rig.device.is_idle());
    for chain in chains {
        rig.device.complete(chain, 0);
    }
    assert!(rig.device.is_idle());
    let small = std::thread::Builder::new().stack_size(64 << 10);
    small.spawn(move || drop(rig.device)).unwrap().join().unwrap();
}

/// What a front-end says of an earlier process's requests is believed, but they are not this queue's.
#[test]
fn requests_of_an_earlier_process_are_not_in_flight() {
    let mut rig = Rig::new(6, 0);
    let base = 0x8001_8004;
    rig.device = DeviceQueue::new(rig.layout, PACKED, base, rig.view.clone()).unwrap();
    assert_eq!((rig.device.in_flight(), rig.device.is_idle()), (0, true));
    rig.at = 4;
    rig.offer(4, &[(DATA, 16, 0)]);
    let chain = rig.take();
    assert!(!rig.device.is_idle());
    rig.device.complete(chain, 0);
    assert!(rig.device.is_idle());
}
