//! The life of a queue: how it starts, where it goes on, how its memory changes and goes away.

use std::os::fd::AsFd;
use std::sync::Arc;

use outboard_memory::{AccessError, GuestMemory, MapOptions, Region, RegionSpec, View};
use outboard_queue::{DeviceQueue, QueueLayout, RingError};

use crate::rig::*;

#[test]
fn the_used_index_is_read_from_memory_at_the_start() {
    let view = View::new(memory());
    let (layout, _) = QueueLayout::split_at(0, 8).unwrap();
    view.write(layout.used + 2, &0xfffe_u16.to_le_bytes()).unwrap();
    view.write(layout.avail + 2, &5_u16.to_le_bytes()).unwrap();
    let mut device = DeviceQueue::new(layout, 0, 2, view.clone()).unwrap();
    assert_eq!((device.base(), device.in_flight()), (2, 0));
    // Three are available: base 2, index 5.
    view.write(layout.avail + 4 + 2 * 2, &[2, 0, 3, 0, 4, 0]).unwrap();
    view.write(layout.desc + 2 * 16, &DATA.to_le_bytes()).unwrap();
    let chain = device.pop().unwrap().unwrap();
    assert_eq!((chain.head(), device.in_flight(), device.base()), (2, 1, 3));
    device.complete(chain, 9);
    assert_eq!(device.in_flight(), 0);
    device.publish().unwrap();
    let mut index = [0; 2];
    view.read(layout.used + 2, &mut index).unwrap();
    assert_eq!(u16::from_le_bytes(index), 0xffff);
}

#[test]
fn indices_wrap_at_sixteen_bits() {
    let view = View::new(memory());
    for size in [1, 2, 8] {
        let (layout, _) = QueueLayout::split_at(0, size).unwrap();
        view.write(layout.used + 2, &0xfffa_u16.to_le_bytes()).unwrap();
        view.write(layout.avail + 2, &0xfffa_u16.to_le_bytes()).unwrap();
        let mut device = DeviceQueue::new(layout, 0, 0xfffa, view.clone()).unwrap();
        for index in 0xfffa..0x1_0006_u32 {
            let (entry, next) = (index % u32::from(size), (index + 1) & 0xffff);
            view.write(layout.avail + 4 + 2 * u64::from(entry), &[0, 0]).unwrap();
            view.write(layout.avail + 2, &next.to_le_bytes()[..2]).unwrap();
            let chain = device.pop().unwrap().unwrap();
            assert!(device.pop().unwrap().is_none());
            assert_eq!(device.base(), next);
            device.complete(chain, 0);
            device.publish().unwrap();
        }
        let mut index = [0; 2];
        view.read(layout.used + 2, &mut index).unwrap();
        assert_eq!(u16::from_le_bytes(index), 6);
    }
}

#[test]
fn a_base_of_more_than_sixteen_bits_is_refused() {
    let (layout, _) = QueueLayout::split_at(0, 8).unwrap();
    let refused = DeviceQueue::new(layout, 0, 0x1_0000, View::new(memory())).unwrap_err();
    assert_eq!(refused, RingError::Base { base: 0x1_0000 });
}

#[test]
fn a_size_that_is_no_power_of_two_is_refused() {
    for size in [0, 3, 100, 0x8001, 0xffff] {
        let layout = QueueLayout { size, desc: 0, avail: 0x10_0000, used: 0x18_0000 };
        let refused = DeviceQueue::new(layout, 0, 0, View::new(memory())).unwrap_err();
        assert_eq!(refused, RingError::Size { size });
    }
}

#[test]
fn a49_a_ring_whose_last_entry_leaves_its_region_is_refused() {
    let (desc_len, avail_len, used_len) = QueueLayout::split_sizes(8);
    let whole = QueueLayout { size: 8, desc: 0, avail: 0x1000, used: 0x2000 };
    let cases = [
        ("descriptor table", QueueLayout { desc: SEAM - desc_len + 16, ..whole }),
        ("available ring", QueueLayout { avail: SEAM - avail_len + 2, ..whole }),
        ("used ring", QueueLayout { used: END - used_len + 2 + 4, ..whole }),
        ("used ring", QueueLayout { used: u64::MAX - 3, ..whole }),
    ];
    for (part, layout) in cases {
        let refused = DeviceQueue::new(layout, EVENT_IDX, 0, View::new(memory())).unwrap_err();
        let RingError::Placement { part: named, source } = refused else { panic!("{refused:?}") };
        assert_eq!(named, part);
        assert!(matches!(source, AccessError::Outside { .. }), "{source:?}");
    }
    // Up to the last byte is fine.
    let layout = QueueLayout { desc: SEAM - desc_len, used: END - 4 - 8 * 8, ..whole };
    assert!(DeviceQueue::new(layout, 0, 0, View::new(memory())).is_ok());
}

#[test]
fn a51_a_ring_that_is_not_aligned_is_refused() {
    let whole = QueueLayout { size: 8, desc: 0, avail: 0x1000, used: 0x2000 };
    for layout in [
        QueueLayout { desc: 8, ..whole },
        QueueLayout { avail: 0x1001, ..whole },
        QueueLayout { used: 0x2002, ..whole },
    ] {
        let refused = DeviceQueue::new(layout, 0, 0, View::new(memory())).unwrap_err();
        let RingError::Placement { source: AccessError::Misaligned { .. }, .. } = refused else {
            panic!("{refused:?}");
        };
    }
}

#[test]
fn the_largest_ring_works() {
    let mut rig = Rig::new(32_768, EVENT_IDX);
    for head in [0, 1, 32_767] {
        rig.desc(head, DATA, 16, 0, 0);
        rig.offer(head);
        assert_eq!(rig.take().head(), head);
    }
}

#[test]
fn chains_are_given_back_in_any_order_and_told_in_batches() {
    let mut rig = Rig::new(8, 0);
    for head in 0..4 {
        rig.desc(head, DATA, 16, 0, 0);
        rig.offer(head);
    }
    let chains: Vec<_> = std::iter::from_fn(|| rig.device.pop().unwrap()).collect();
    assert_eq!((rig.device.in_flight(), rig.device.base()), (4, 4));
    for chain in chains.into_iter().rev() {
        rig.device.complete(chain, 7);
        assert_eq!(rig.used_idx(), 0, "nothing shows before it is published");
    }
    rig.device.publish().unwrap();
    assert_eq!(rig.used_idx(), 4);
    assert_eq!([0, 1, 2, 3].map(|at| rig.used(at)), [(3, 7), (2, 7), (1, 7), (0, 7)]);
}

#[test]
fn a_chain_moves_to_another_thread_and_back() {
    let mut rig = Rig::new(8, 0);
    rig.view.write(DATA, b"over there").unwrap();
    rig.desc(0, DATA, 10, NEXT, 1);
    rig.desc(1, DATA + 100, 10, WRITE, 0);
    rig.offer(0);
    let mut chain = rig.take();
    let chain = std::thread::spawn(move || {
        let bytes: [u8; 10] = chain.readable().read_obj().unwrap();
        chain.writable().write_all(&bytes).unwrap();
        chain
    });
    rig.device.complete(chain.join().unwrap(), 10);
    let mut seen = [0; 10];
    rig.view.read(DATA + 100, &mut seen).unwrap();
    assert_eq!(&seen, b"over there");
}

#[test]
fn a_chain_keeps_its_memory_when_the_queue_and_the_table_are_gone() {
    let memory = memory();
    let region = Arc::downgrade(&memory.regions()[0]);
    let view = View::new(memory);
    let (layout, _) = QueueLayout::split_at(0, 8).unwrap();
    view.write(layout.desc, &DATA.to_le_bytes()).unwrap();
    view.write(layout.desc + 8, &[16]).unwrap();
    view.write(layout.avail + 2, &[1]).unwrap();
    view.write(DATA, &[9; 16]).unwrap();
    let mut device = DeviceQueue::new(layout, 0, 0, view).unwrap();
    let mut chain = device.pop().unwrap().unwrap();
    drop(device);
    assert!(region.upgrade().is_some());
    assert_eq!(chain.readable().read_obj::<[u8; 16]>().unwrap(), [9; 16]);
    drop(chain);
    assert!(region.upgrade().is_none(), "the last chain was the last to hold it");
}

#[test]
fn a38_memory_is_replaced_under_chains_in_flight() {
    let (region, file) = Region::memfd(0, END).unwrap();
    let spec = *region.spec();
    let first = Arc::new(GuestMemory::new(1, vec![Arc::new(region)]).unwrap());
    let view = View::new(Arc::clone(&first));
    let (layout, _) = QueueLayout::split_at(0, 8).unwrap();
    let mut device = DeviceQueue::new(layout, 0, 0, view.clone()).unwrap();
    view.write(layout.desc + 8, &[16]).unwrap();
    view.write(layout.avail + 2, &[1]).unwrap();
    let chain = device.pop().unwrap().unwrap();

    let again = Region::map(spec, file, MapOptions::default()).unwrap();
    let second = Arc::new(GuestMemory::new(2, vec![Arc::new(again)]).unwrap());
    device.set_memory(View::new(Arc::clone(&second))).unwrap();
    assert_eq!(device.view().memory().generation(), 2);
    drop(view);
    let gone = Arc::downgrade(&first);
    drop(first);
    assert!(gone.upgrade().is_some(), "the chain in flight holds it");
    device.complete(chain, 5);
    device.publish().unwrap();
    assert!(gone.upgrade().is_none(), "nothing idle holds an old generation");

    let view = View::new(second);
    view.write(layout.avail + 2, &[2]).unwrap();
    assert_eq!(device.pop().unwrap().unwrap().head(), 0);
    let mut used = [0; 2];
    view.read(layout.used + 2, &mut used).unwrap();
    assert_eq!(used, [1, 0]);
}

#[test]
fn a39_memory_without_the_ring_is_refused_and_the_queue_stays_as_it_was() {
    let mut rig = Rig::new(8, 0);
    let elsewhere = Region::memfd(END, 0x1000).unwrap().0;
    let memory = GuestMemory::new(7, vec![Arc::new(elsewhere)]).unwrap();
    let refused = rig.device.set_memory(View::new(Arc::new(memory))).unwrap_err();
    assert!(matches!(refused, RingError::Placement { part: "descriptor table", .. }));
    rig.desc(0, DATA, 16, 0, 0);
    rig.offer(0);
    assert_eq!(rig.take().head(), 0);
}

/// A device on a ring in a file that can be cut short.
fn on_a_file() -> (DeviceQueue, View, QueueLayout, std::os::fd::OwnedFd) {
    let (region, file) = Region::memfd(0, END).unwrap();
    let view = View::new(Arc::new(GuestMemory::new(1, vec![Arc::new(region)]).unwrap()));
    let (layout, _) = QueueLayout::split_at(0, 8).unwrap();
    view.write(layout.desc, &DATA.to_le_bytes()).unwrap();
    view.write(layout.desc + 8, &[16, 0, 0, 0, 2, 0]).unwrap();
    view.write(layout.avail + 2, &[1]).unwrap();
    let device = DeviceQueue::new(layout, 0, 0, view.clone()).unwrap();
    (device, view, layout, file)
}

#[test]
fn a35_a_buffer_cut_off_under_a_request_is_not_told_as_served() {
    let (mut device, view, layout, file) = on_a_file();
    let mut chain = device.pop().unwrap().unwrap();
    rustix::fs::ftruncate(file.as_fd(), DATA).unwrap();
    chain.writable().write_all(&[1; 16]).unwrap();
    device.complete(chain, 16);
    assert_eq!(device.publish(), Err(RingError::MemoryLost));
    assert!(device.is_broken());
    assert_eq!(device.publish(), Ok(false), "said once");
    assert!(device.pop().unwrap().is_none());
    assert!(!device.arm());
    let mut used = [0; 2];
    view.read(layout.used + 2, &mut used).unwrap();
    assert_eq!(used, [0, 0]);
}

#[test]
fn a35_a_ring_cut_off_while_idle_is_found_at_the_next_arming() {
    let (mut device, _view, _layout, file) = on_a_file();
    let chain = device.pop().unwrap().unwrap();
    device.complete(chain, 0);
    device.publish().unwrap();
    rustix::fs::ftruncate(file.as_fd(), 0).unwrap();
    // The available index reads as 0 in the hole: behind us by one, which breaks the ring with the true reason.
    assert_eq!(device.pop().unwrap_err(), RingError::MemoryLost);
    assert!(device.pop().unwrap().is_none());
}

#[test]
fn a35_an_empty_ring_cut_off_is_found_at_the_next_arming() {
    let (region, file) = Region::memfd(0, END).unwrap();
    let view = View::new(Arc::new(GuestMemory::new(1, vec![Arc::new(region)]).unwrap()));
    let (layout, _) = QueueLayout::split_at(0, 8).unwrap();
    let mut device = DeviceQueue::new(layout, 0, 0, view).unwrap();
    rustix::fs::ftruncate(file.as_fd(), 0).unwrap();
    assert!(device.pop().unwrap().is_none(), "an index of 0 is an empty ring");
    assert!(device.arm(), "there is something to hear");
    assert_eq!(device.pop().unwrap_err(), RingError::MemoryLost);
    assert!(device.pop().unwrap().is_none());
    assert!(!device.arm());
}

#[test]
fn a_spec_is_a_plain_value() {
    let spec = RegionSpec { guest_addr: 1, user_addr: 2, size: 3, offset: 4 };
    assert_eq!(spec, spec.clone());
}
