//! The in-flight region: kept by the queue (`outboard_queue::InflightArea`), spoilt by faults before a ring
//! takes it up and after it has stopped.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use outboard_memory::Window;
use outboard_protocol::features::ProtocolFeatures as P;
use outboard_protocol::payload::Inflight;
use outboard_queue::{DeviceQueue, InflightArea};

use super::{Device, size_of};

const VERSION: u64 = 8;
const LAST_BATCH_HEAD: u64 = 12;
const USED_IDX: u64 = 14;
const HEAD: u64 = 16;

/// A region that the front-end gave.
pub(super) struct Region {
    description: Inflight,
    file: OwnedFd,
    window: Arc<Window>,
}

impl Region {
    fn area(&self, index: usize, packed: bool) -> Option<InflightArea> {
        let entries = self.description.queue_size;
        let bytes =
            if packed { InflightArea::packed_size(entries) } else { InflightArea::size(entries) };
        let at = u64::try_from(index).expect("small") * bytes;
        let make = if packed { InflightArea::packed } else { InflightArea::new };
        let inside = index < usize::from(self.description.num_queues);
        make(&self.window, at, entries).filter(|_| inside)
    }

    fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let _ = rustix::io::pread(&self.file, &mut bytes, self.description.mmap_offset + at);
        bytes
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let _ = rustix::io::pwrite(&self.file, bytes, self.description.mmap_offset + at);
    }

    fn word(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.read(at))
    }

    fn entry(head: u16) -> u64 {
        HEAD + 16 * u64::from(head)
    }

    fn mark(&self, head: u16, value: u8) {
        self.write(Self::entry(head), &[value]);
    }

    fn counter(&self, head: u16) -> u64 {
        u64::from_le_bytes(self.read(Self::entry(head) + 8))
    }

    /// Heads that are marked, oldest first.
    fn marked(&self) -> Vec<u16> {
        let heads = 0..self.description.queue_size;
        let mut marked: Vec<_> =
            heads.filter(|&head| self.read(Self::entry(head)) != [0]).collect();
        marked.sort_by_key(|&head| self.counter(head));
        marked
    }
}

impl Device {
    /// Takes a region; whether it can.
    pub(super) fn set_inflight(&mut self, description: Inflight, fd: OwnedFd) -> bool {
        let Inflight { mmap_offset, mmap_size, .. } = description;
        let mut first = [0; 8];
        let _ = rustix::io::pread(&fd, &mut first, mmap_offset);
        if self.is("follows-inflight-noise") && first != [0; 8] && first != [0xff; 8] {
            std::process::abort();
        }
        let file = fd.try_clone().expect("a descriptor");
        let Ok(window) = Window::map(fd, mmap_offset, mmap_size, true) else { return false };
        self.region = Some(Region { description, file, window: Arc::new(window) });
        true
    }

    /// A ring that starts takes its area up; whether it can.
    pub(super) fn take_up(&self, index: usize, queue: &mut DeviceQueue) -> bool {
        let Some(region) = &self.region else { return true };
        let packed = queue.features().packed;
        let Some(area) = region.area(index, packed) else { return true };
        let used_before = region.word(VERSION) == 1;
        if used_before && packed && self.is("packed-resubmitted") {
            return true;
        }
        if used_before && !packed {
            self.spoil_start(region, queue);
        }
        queue.set_inflight(area).is_ok()
    }

    fn spoil_start(&self, region: &Region, queue: &DeviceQueue) {
        let size = region.description.queue_size;
        let marked = region.marked();
        match self.fault.as_str() {
            "inflight-ignores-last-batch" => {
                let mut used = [0; 2];
                let _ = queue.view().read(queue.layout().used + 2, &mut used);
                region.write(USED_IDX, &used);
            }
            "inflight-by-head" => {
                for head in marked {
                    region.write(Region::entry(head) + 8, &u64::from(head).to_le_bytes());
                }
            }
            "inflight-loses-the-oldest" => match marked[..] {
                [oldest, _, _] if region.counter(oldest) >= 1000 => region.mark(oldest, 0),
                _ => {}
            },
            "aborts-on-odd-lists" if region.word(LAST_BATCH_HEAD) >= size => std::process::abort(),
            "aborts-on-full-regions" if marked.len() == usize::from(size) => std::process::abort(),
            _ => {}
        }
    }

    /// A ring has stopped, and its area stays as it is.
    pub(super) fn spoil_stop(&self) {
        let Some(region) = &self.region else { return };
        if region.description.queue_size == 5 && self.is("packed-inflight") {
            region.write(VERSION, &[0; 2]);
        }
        if region.description.queue_size != 16 {
            return;
        }
        match self.fault.as_str() {
            "inflight-without-version" => region.write(VERSION, &[0; 2]),
            // No head of anybody's.
            "inflight-leaves-marks" => region.mark(1, 1),
            "inflight-lists-nothing" => region.write(LAST_BATCH_HEAD, &[0; 2]),
            "inflight-counts-nothing" => {
                (0..16).for_each(|head| region.write(Region::entry(head) + 8, &[0; 8]));
            }
            _ => {}
        }
    }

    /// A request is about to be served.
    pub(super) fn looks_at_region(&self) {
        let cut = self.region.as_ref().is_some_and(|region| size_of(&region.file) == 0);
        if cut && self.is("writes-into-cut-regions") {
            std::process::abort();
        }
    }

    /// A slow disk that shows each request as used, and clears the marks when there is nothing more to do.
    pub(super) fn clears_late(&self, done: &mut Vec<u16>, head: u16, queue: &mut DeviceQueue) {
        let Some(region) = self.region.as_ref().filter(|_| self.is("inflight-clears-late")) else {
            return;
        };
        if region.description.queue_size < 64 {
            return;
        }
        let _ = queue.publish();
        done.push(head);
        done.iter().for_each(|&head| region.mark(head, 1));
        std::thread::sleep(std::time::Duration::from_millis(5));
    }

    /// Waits with many requests for a stop that loses them.
    pub(super) fn puts_off(&self, queue: &DeviceQueue) -> bool {
        if queue.features().packed {
            return false;
        }
        let mut avail = [0; 2];
        let _ = queue.view().read(queue.layout().avail + 2, &mut avail);
        let base = u16::try_from(queue.base()).expect("a split ring's");
        let many = u16::from_le_bytes(avail).wrapping_sub(base) > 8;
        many && self.region.is_some() && self.is("skip-drain-loses") && self.skips_drains()
    }

    fn skips_drains(&self) -> bool {
        self.state().acked_protocol_features().contains(P::SKIP_DRAIN)
    }

    /// A stop without a drain that takes what is there and notes nothing of it.
    pub(super) fn loses(&mut self, index: u16) {
        let (true, Some(region)) = (self.is("skip-drain-loses"), &self.region) else { return };
        let Some(queue) = &mut self.rings[usize::from(index)].queue else { return };
        while let Ok(Some(chain)) = queue.pop() {
            region.mark(chain.head(), 0);
        }
    }

    /// A stop without a drain is answered with another base.
    pub(super) fn miscounts(&self) -> bool {
        self.region.is_none() && self.is("skip-drain-off-by-one")
    }

    /// Nothing more to do.
    pub(super) fn clears_now(&self, done: Vec<u16>) {
        let Some(region) = &self.region else { return };
        done.into_iter().for_each(|head| region.mark(head, 0));
    }
}
