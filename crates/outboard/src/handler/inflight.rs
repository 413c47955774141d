//! The in-flight region of a session: GET_INFLIGHT_FD, SET_INFLIGHT_FD (vhost-user, "Inflight I/O tracking").
//!
//! ```text
//!  GET_INFLIGHT_FD ─▶ a sealed file of zeros, which the front-end keeps and gives to every back-end that follows
//!  SET_INFLIGHT_FD ─▶ mapped ─▶ at each start of a ring its area goes to its queue, which takes up what is there
//! ```
//! Invariant: nothing of the file is looked at before its length was checked; what it says is checked by the ring that
//! takes it up (`outboard_queue::InflightArea`).

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use outboard_memory::Window;
use outboard_protocol::payload::Inflight;
use outboard_protocol::{Refusal, Request, virtio};
use outboard_queue::InflightArea;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use tracing::{info, warn};

use super::session::Session;
use crate::device::VhostUserDevice;
use crate::reactor::Reactor;

/// What a session knows of its region.
#[derive(Debug, Default)]
pub(super) struct SessionInflight {
    region: Option<Region>,
}

#[derive(Debug)]
struct Region {
    /// As it came.
    description: Inflight,
    /// For a process that takes over.
    file: OwnedFd,
    window: Arc<Window>,
    /// Whether it was said that the file was cut short.
    told: bool,
}

impl SessionInflight {
    /// Says once that notes are lost: the file was cut short.
    pub(super) fn look(&mut self) {
        if let Some(region) = self.region.as_mut().filter(|r| !r.told && r.window.is_poisoned()) {
            region.told = true;
            warn!("the file of the in-flight region was cut short: a crash would lose requests");
        }
    }

    /// What the front-end said of the region, to be said again to a process that takes over.
    pub(super) fn again(&self) -> io::Result<Option<Request<OwnedFd>>> {
        let Some(Region { description, file, .. }) = &self.region else { return Ok(None) };
        Ok(Some(Request::SetInflightFd(*description, file.try_clone()?)))
    }

    /// The area of one ring; `None` when the region has none for it.
    pub(super) fn area(&self, index: u16, packed: bool) -> Option<InflightArea> {
        let Region { description, window, .. } = self.region.as_ref()?;
        let entries = description.queue_size;
        if index >= description.num_queues {
            return None;
        }
        let offset = u64::from(index) * area_size(entries, packed);
        match packed {
            true => InflightArea::packed(window, offset, entries),
            false => InflightArea::new(window, offset, entries),
        }
    }

    /// Whether a ring of this size has a place in the region.
    fn check(&self, index: u16, size: u16) -> Result<(), Refusal> {
        let Some(Region { description, .. }) = &self.region else { return Ok(()) };
        let Inflight { num_queues, queue_size, .. } = *description;
        if index < num_queues && size > queue_size {
            return Err(Refusal::because(format_args!(
                "ring {index} of {size} entries: the in-flight region is for {queue_size}"
            )));
        }
        Ok(())
    }
}

impl<D: VhostUserDevice, R: Reactor> Session<'_, D, R> {
    /// Whether rings are packed, whose areas are others.
    fn rings_are_packed(&self) -> bool {
        self.backend.acked_features() & virtio::RING_PACKED != 0
    }

    /// The area of a ring, when its requests are kept track of.
    pub(super) fn ring_inflight(&self, index: u16) -> Option<InflightArea> {
        self.inflight.area(index, self.rings_are_packed())
    }

    /// GET_INFLIGHT_FD: a fresh region, which nobody but the front-end keeps.
    pub(super) fn get_inflight_fd(
        &self,
        num_queues: u16,
        queue_size: u16,
    ) -> Result<Option<(Inflight, OwnedFd)>, Refusal> {
        let mmap_size = u64::from(num_queues) * area_size(queue_size, self.rings_are_packed());
        let file = sealed_file(mmap_size).map_err(Refusal::because)?;
        let description =
            Inflight { mmap_size, mmap_offset: 0, num_queues, queue_size, ..Inflight::default() };
        Ok(Some((description, file)))
    }

    /// SET_INFLIGHT_FD: for the rings that start from now on; none runs.
    pub(super) fn set_inflight_fd(
        &mut self,
        description: Inflight,
        file: OwnedFd,
    ) -> Result<(), Refusal> {
        let Inflight { mmap_size, mmap_offset, num_queues, queue_size, .. } = description;
        if !mmap_offset.is_multiple_of(8) {
            return Err(Refusal::because(format_args!("in-flight region at byte {mmap_offset}")));
        }
        let kept = file.try_clone().map_err(Refusal::because)?;
        // All of what is announced must be there, also what no ring needs.
        let window = Window::map(file, mmap_offset, mmap_size, true).map_err(Refusal::because)?;
        let region = Region { description, file: kept, window: Arc::new(window), told: false };
        let new = SessionInflight { region: Some(region) };
        for (index, ring) in (0u16..).zip(self.backend.rings()) {
            new.check(index, ring.size.unwrap_or(0))?;
        }
        self.inflight = new;
        info!("in-flight region for {num_queues} rings of {queue_size} entries");
        Ok(())
    }

    /// SET_VRING_NUM: the ring must fit its area.
    pub(super) fn check_ring_inflight(&self, index: u16) -> Result<(), Refusal> {
        let size = self.backend.ring(index).and_then(|ring| ring.size);
        self.inflight.check(index, size.unwrap_or(0))
    }
}

/// Bytes of the area of one ring.
fn area_size(entries: u16, packed: bool) -> u64 {
    if packed { InflightArea::packed_size(entries) } else { InflightArea::size(entries) }
}

/// A file of zeros whose length cannot be changed.
fn sealed_file(size: u64) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = memfd_create("outboard-inflight", flags)?;
    ftruncate(&file, size)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Another implementation may have made the region, or may take it up.
    #[test]
    fn areas_lie_where_other_implementations_have_them() {
        for packed in [false, true] {
            for entries in (1..=1024).chain([32_767, 32_768]) {
                assert_eq!(area_size(entries, packed), Inflight::area_size(entries, packed));
            }
        }
    }
}
