//! A look at the ring before the queue takes a request from it: descriptors as they lie there, without a
//! rule kept. What faults about descriptors trip over, and what the dirty log has to mark.

use std::time::{Duration, Instant};

use outboard_queue::DeviceQueue;

use super::Device;
use super::sights::Sight;

/// One descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Raw {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

pub(super) fn word(queue: &DeviceQueue, at: u64) -> u16 {
    let mut bytes = [0; 2];
    let _ = queue.view().read(at, &mut bytes);
    u16::from_le_bytes(bytes)
}

pub(super) fn descriptor(queue: &DeviceQueue, at: u64) -> Option<Raw> {
    let mut bytes = [0; 16];
    queue.view().read(at, &mut bytes).ok()?;
    let part = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    Some(Raw {
        addr: u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")),
        len: u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes")),
        flags: part(12),
        next: part(14),
    })
}

/// The chain that is available next: its head, and its descriptors as far as they can be followed. None
/// when there is none.
pub(super) fn next(queue: &DeviceQueue) -> Option<(u16, Vec<Raw>)> {
    let layout = *queue.layout();
    if queue.features().packed {
        return None;
    }
    let at = u16::try_from(queue.base()).expect("a split ring's");
    if word(queue, layout.avail + 2) == at {
        return None;
    }
    let head = word(queue, layout.avail + 4 + 2 * u64::from(at % layout.size));
    let mut parts = Vec::new();
    let mut next = head;
    while parts.len() < usize::from(layout.size) && next < layout.size {
        let Some(part) = descriptor(queue, layout.desc + 16 * u64::from(next)) else { break };
        parts.push(part);
        if part.flags & NEXT == 0 {
            break;
        }
        next = part.next;
    }
    Some((head, parts))
}

/// The descriptors of a table, where the chain is one.
pub(super) fn flat(queue: &DeviceQueue, parts: &[Raw]) -> Vec<Raw> {
    match parts {
        [table] if table.flags & INDIRECT != 0 => {
            let count = u64::from(table.len / 16).min(64);
            (0..count)
                .filter_map(|at| descriptor(queue, table.addr.wrapping_add(16 * at)))
                .collect()
        }
        parts => parts.to_vec(),
    }
}

impl Device {
    /// What a fault does at the sight of the ring; false when the ring is served no more.
    pub(super) fn trips(&mut self, index: usize, queue: &DeviceQueue) -> bool {
        if queue.features().packed {
            return self.trips_packed(index, queue);
        }
        let layout = *queue.layout();
        if self.is("minds-reserved-flags") && word(queue, layout.avail) > 1 {
            return false;
        }
        let Some((head, parts)) = next(queue) else {
            self.rings[index].last_head = None;
            return true;
        };
        let last = self.rings[index].last_head.replace(head);
        let sight = Sight {
            layout,
            at: u16::try_from(queue.base()).expect("a split ring's"),
            avail: word(queue, layout.avail + 2),
            head,
            parts: &parts,
            table: &flat(queue, &parts),
            memory: &self.memory,
        };
        let aborts = match self.fault.as_str() {
            "aborts-on-heads-twice" => last == Some(head),
            "aborts-on-heads-in-the-middle" => {
                parts.len() == 2 && parts[0].flags & WRITE != 0 && parts[0].len == 512
            }
            "aborts-on-aliases" => {
                let ends = parts.last().is_some_and(|part| part.flags & NEXT == 0);
                ends && parts.len() > 14
                    && parts.windows(2).any(|pair| pair[0].addr == pair[1].addr)
            }
            "aborts-on-empty-parts" => parts.len() == 4 && parts.iter().any(|part| part.len == 0),
            "reads-descriptors-twice" => {
                self.rings[index].requests > 0 && changes(queue, layout.desc + 16)
            }
            "aborts-on-late-tables" => {
                parts.len() > 1 && parts[1..].iter().any(|part| part.flags & INDIRECT != 0)
            }
            "aborts-without-status" => parts.len() == 1 && parts[0].flags == 0,
            fault => sight.trips(fault),
        };
        if aborts {
            std::process::abort();
        }
        self.parts = parts;
        true
    }
}

/// Whether a descriptor changes while it is looked at for a while; a longer one once it has changed, for
/// whoever changes it may have to wait for a processor.
fn changes(queue: &DeviceQueue, at: u64) -> bool {
    let (mut last, mut changes) = (descriptor(queue, at), 0);
    let mut until = Instant::now() + Duration::from_millis(50);
    while Instant::now() < until && changes < 4 {
        let now = descriptor(queue, at);
        if now != last {
            changes += 1;
            until = Instant::now() + Duration::from_millis(300);
        }
        last = now;
        std::thread::yield_now();
    }
    // A front-end that lays out its next request changes it once.
    changes >= 4
}
