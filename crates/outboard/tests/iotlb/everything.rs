//! `examples/everything.rs` behind an IOMMU that a [`Vmm`] keeps: map, misses by themselves, unmap.

use std::time::{Duration, Instant};

use outboard::memory::Permission;
use outboard_frontend::channel::{ChannelEvent, ChannelThread, SharedObjects};
use outboard_frontend::{Connection, Iommu, QueueSetup, SharedMemory, Virtqueue, Vmm, Wanted};

use crate::common::PATIENCE;

/// Examples stand beside the tests' own folder.
fn program() -> std::path::PathBuf {
    let tests = std::env::current_exe().unwrap();
    let built = tests.parent().and_then(|deps| deps.parent()).unwrap();
    built.join("examples/everything")
}

struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Serves the channel until the queue gives a request back or until `enough`; its length.
fn served(
    vmm: &mut Vmm,
    channel: &mut ChannelThread,
    queue: &mut Virtqueue,
    mut enough: impl FnMut(&ChannelEvent) -> bool,
) -> Option<u32> {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some((_, written)) = queue.pop().unwrap() {
            return Some(written);
        }
        assert!(Instant::now() < until, "nothing came back");
        if let Some(event) = vmm.next_event(channel, Duration::from_millis(5)).unwrap()
            && enough(&event)
        {
            return None;
        }
    }
}

#[test]
fn a_vmm_keeps_its_guest_behind_an_iommu() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("everything.sock");
    let _child = Killed(std::process::Command::new(program()).arg(&socket).spawn().unwrap());
    let connection = Connection::connect_patiently(&socket, PATIENCE, PATIENCE).unwrap();
    let mut vmm = Vmm::new(connection, Wanted::default().with_channel().with_iommu()).unwrap();
    let iommu = Iommu::new();
    vmm.put_behind(iommu.clone()).unwrap();
    let mut channel = vmm.open_channel(SharedObjects::new()).unwrap().spawn().unwrap();
    let memory = SharedMemory::with_size(1 << 20).unwrap();
    vmm.share_memory(memory.clone()).unwrap();
    let setup = QueueSetup { index: 0, size: 64, indirect: 0 };
    let mut queue = vmm.activate(&[setup]).unwrap().remove(0);
    let (order, answer) =
        (memory.allocate(4096, 4096).unwrap(), memory.allocate(4096, 4096).unwrap());
    order.write(0, b"told").unwrap();
    let from = iommu.map_anywhere(order.guest(), 4096, Permission::READ).unwrap();
    let to = iommu.map_anywhere(answer.guest(), 4096, Permission::WRITE).unwrap();
    for _ in 0..3 {
        queue.add(&[(from, 4)], &[(to, 256)], 7).unwrap();
        queue.kick().unwrap();
        let written = served(&mut vmm, &mut channel, &mut queue, |_| false).unwrap();
        let mut text = vec![0; written as usize];
        answer.read(0, &mut text).unwrap();
        assert!(text.starts_with(b"mtu "), "{}", String::from_utf8_lossy(&text));
        assert!(vmm.unmap(to).unwrap(), "the device uses it no more");
        assert!(!vmm.unmap(to).unwrap(), "it is gone");
        iommu.map(to, 4096, answer.guest(), Permission::WRITE).unwrap();
    }
    // What is mapped to be read is not written: refused, reported.
    queue.add(&[(from, 4)], &[(from, 256)], 7).unwrap();
    queue.kick().unwrap();
    let failed = |event: &ChannelEvent| matches!(event, ChannelEvent::IotlbAccessFailure { iova, perm: 2, .. } if *iova == from);
    assert_eq!(served(&mut vmm, &mut channel, &mut queue, failed), None);
    let mut bytes = [0; 4];
    order.read(0, &mut bytes).unwrap();
    assert_eq!(&bytes, b"told");
    vmm.reset(vec![queue]).unwrap();
}
