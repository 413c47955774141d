//! The dirty log, the in-flight region, the device's state, postcopy.

use std::io::Read as _;
use std::os::fd::OwnedFd;

use outboard_memory::DirtyLog;
use outboard_protocol::features::virtio;
use outboard_protocol::payload::{Inflight, Log};
use outboard_protocol::{Effect, StateDirection};
use outboard_queue::DeviceQueue;

use super::raw::{Raw, WRITE, flat};
use super::{Device, memfd, refused, size_of};

/// The state of this device, whatever it has done.
const STATE: &[u8] = b"outboard";

/// A transfer of state.
pub(super) enum Transfer {
    Saved,
    Loads(OwnedFd),
}

/// The log of the moment.
pub(super) struct Marks {
    log: Option<DirtyLog>,
    file: OwnedFd,
    size: u64,
}

impl Device {
    /// The messages of migration; the effect, if it is none of them.
    pub(super) fn carry_out_migration(
        &mut self,
        effect: Effect<OwnedFd>,
    ) -> Option<Effect<OwnedFd>> {
        match effect {
            Effect::SetLogBase { log, fd, ticket } => {
                let good = self.set_log(log, fd);
                self.backend.answer(ticket, if good { Ok(()) } else { Err(refused()) });
            }
            Effect::SetLogFd { fd, ticket } => {
                self.log_fd = Some(fd);
                self.backend.answer(ticket, Ok(()));
            }
            Effect::GetInflightFd { num_queues, queue_size, ticket } => {
                let area = self.inflight(num_queues, queue_size);
                self.backend.answer(ticket, Ok(Some(area)));
            }
            Effect::SetInflightFd { inflight, fd, ticket } => {
                let good = self.set_inflight(inflight, fd);
                self.backend.answer(ticket, if good { Ok(()) } else { Err(refused()) });
            }
            Effect::SetDeviceStateFd { direction, fd, ticket } => {
                let again = direction == StateDirection::Save && self.saved;
                if again && self.is("saves-once") {
                    self.backend.answer(ticket, Err(refused()));
                } else {
                    self.transfer(direction, fd);
                    self.backend.answer(ticket, Ok(None));
                }
            }
            Effect::CheckDeviceState { ticket } => {
                let good = self.transferred() || self.is("state-always-good");
                self.backend.answer(ticket, if good { Ok(()) } else { Err(refused()) });
            }
            other => return self.carry_out_postcopy(other),
        }
        None
    }

    fn set_log(&mut self, log: Log, fd: OwnedFd) -> bool {
        if self.is("keeps-old-log") && self.marks.is_some() {
            return true;
        }
        let file = fd.try_clone().expect("a descriptor");
        if self.is("aborts-on-huge-logs") && log.mmap_size > 1 << 40 {
            std::process::abort();
        }
        let mapped = DirtyLog::map(fd, log.mmap_offset, log.mmap_size).ok();
        let good = mapped.is_some() || self.is("trusts-log-sizes");
        if good {
            let size = log.mmap_offset.saturating_add(log.mmap_size);
            self.marks = Some(Marks { log: mapped, file, size });
        }
        good
    }

    /// Marks what a request has written: its buffers, and the used ring where the front-end wants that.
    pub(super) fn mark(&self, index: usize, queue: &DeviceQueue, parts: &[Raw]) {
        let on = self.backend.acked_features() & virtio::LOG_ALL != 0;
        let Some(marks) = &self.marks else { return };
        self.trap.set(self.trap.get() || (on && self.is("marks-after-off")));
        let still = self.is("marks-after-off") && self.trap.get();
        if self.is("packed-log") && queue.features().packed {
            return;
        }
        if self.is("marks-nothing") || !(on || still || self.is("marks-too-early")) {
            return;
        }
        let parts = if self.is("marks-no-tables") { parts.to_vec() } else { flat(queue, parts) };
        for part in parts.iter().filter(|part| part.flags & WRITE != 0) {
            let len = if self.is("marks-first-pages") { 1 } else { part.len };
            self.mark_range(marks, part.addr, u64::from(len));
        }
        let ring = self.backend.ring(u16::try_from(index).expect("small"));
        let addresses = ring.and_then(|ring| ring.addresses).filter(|addr| addr.flags & 1 != 0);
        if let Some(addresses) = addresses {
            let size = 6 + 8 * u64::from(queue.size());
            let in_place = self.is("marks-used-ring-in-place");
            let place = if in_place { queue.layout().used } else { addresses.log_guest_addr };
            self.mark_range(marks, place, size);
        }
    }

    fn mark_range(&self, marks: &Marks, guest: u64, len: u64) {
        let short = size_of(&marks.file) < marks.size;
        let outside = marks.log.as_ref().is_some_and(|log| !log.covers(guest, len));
        match self.fault.as_str() {
            "trusts-log-sizes" if marks.log.is_none() => std::process::abort(),
            "writes-into-cut-logs" if short => std::process::abort(),
            "log-short" if outside && marks.size == 8 => std::process::abort(),
            _ => {}
        }
        if let Some(log) = &marks.log {
            log.mark(guest, len);
        }
    }

    /// A file shorter than the region that it is said to hold.
    fn gives_less(&self, size: u16) -> bool {
        size == 64 && self.is("inflight-given")
    }

    fn inflight(&mut self, queues: u16, size: u16) -> (Inflight, OwnedFd) {
        let packed = self.backend.acked_features() & virtio::RING_PACKED != 0;
        let bytes = Inflight::area_size(size, packed) * u64::from(queues);
        let file = memfd(if self.gives_less(size) { 16 } else { bytes });
        if self.is("leaks-inflight") {
            self.kept.push(file.try_clone().expect("a descriptor"));
        }
        let area = Inflight {
            mmap_size: bytes,
            num_queues: queues,
            queue_size: size,
            ..Inflight::default()
        };
        (area, file)
    }

    /// Saves the state, or keeps the descriptor that it is to come from.
    fn transfer(&mut self, direction: StateDirection, fd: OwnedFd) {
        self.transfer = Some(match direction {
            StateDirection::Save => {
                let _ = rustix::io::write(&fd, &self.own_state());
                self.saved = true;
                if self.is("state-never-ends") {
                    self.kept.push(fd);
                }
                Transfer::Saved
            }
            StateDirection::Load if self.is("waits-for-state") => {
                let _ = std::fs::File::from(fd).read_to_end(&mut Vec::new());
                Transfer::Saved
            }
            StateDirection::Load => Transfer::Loads(fd),
        });
    }

    fn own_state(&self) -> Vec<u8> {
        let mut state = STATE.to_vec();
        if self.is("state-of-this-process") {
            state.extend(std::process::id().to_ne_bytes());
        }
        state
    }

    /// Ends a transfer; whether it worked. The front-end has closed its end.
    fn transferred(&mut self) -> bool {
        match self.transfer.take() {
            None => false,
            Some(Transfer::Saved) => true,
            Some(Transfer::Loads(fd)) => {
                let mut state = Vec::new();
                let _ = std::fs::File::from(fd).read_to_end(&mut state);
                match self.fault.as_str() {
                    "state-noise" => state.len() > 1000,
                    "loads-nothing" => false,
                    "loads-parts" => STATE.starts_with(&state),
                    "loads-tails" => state.starts_with(STATE),
                    "loads-turned-bits" => state.len() == STATE.len(),
                    _ => state == self.own_state(),
                }
            }
        }
    }
}
