//! A request goes from the driver to the device and back.

use std::sync::Arc;

use outboard_memory::{GuestMemory, Region, View};
use outboard_queue::{DeviceQueue, DriverQueue, QueueLayout};

use crate::rig::{EVENT_IDX, INDIRECT_DESC};

#[test]
fn a_block_shaped_request_goes_there_and_back() {
    let (region, _fd) = Region::memfd(0x10_0000, 1 << 20).unwrap();
    let memory = Arc::new(GuestMemory::new(1, vec![Arc::new(region)]).unwrap());
    let view = View::new(Arc::clone(&memory));
    for features in [0, EVENT_IDX, INDIRECT_DESC, INDIRECT_DESC | EVENT_IDX] {
        let (layout, end) = QueueLayout::split_at(0x10_0000, 8).unwrap();
        let mut driver = DriverQueue::new(layout, features, view.clone()).unwrap();
        driver.set_indirect_area(end, 8);
        let mut device = DeviceQueue::new(layout, features, 0, view.clone()).unwrap();
        let data = 0x18_0000;
        for round in 0..20_u64 {
            view.write(data, &round.to_le_bytes()).unwrap();
            let (readable, writable) = ([(data, 16)], [(data + 64, 512), (data + 1024, 1)]);
            if features & INDIRECT_DESC != 0 {
                driver.add_indirect(&readable, &writable, round).unwrap();
            } else {
                driver.add(&readable, &writable, round).unwrap();
            }
            driver.publish();
            let mut chain = device.pop().unwrap().unwrap();
            assert!(device.pop().unwrap().is_none());
            let header: [u64; 2] = chain.readable().read_obj().unwrap();
            assert_eq!(header[0], round);
            chain.reserve_tail(1).unwrap();
            chain.writable().write_all(&[7; 512]).unwrap();
            assert!(chain.writable().is_empty());
            chain.write_tail(&[3]).unwrap();
            device.complete(chain, 513);
            assert_eq!(driver.pop_used().unwrap(), None);
            assert_eq!(device.publish().unwrap(), round == 0 || features & EVENT_IDX == 0);
            assert_eq!(driver.pop_used().unwrap(), Some((round, 513)));
            let mut status = [0];
            view.read(data + 1024, &mut status).unwrap();
            assert_eq!(status, [3]);
        }
    }
}
