//! A look at a packed ring before the queue takes a request from it, and the faults that trip over what lies there:
//! each has the name of the check that it breaks.

use outboard_queue::DeviceQueue;

use super::Device;
use super::raw::{INDIRECT, NEXT, Raw, descriptor, word};

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// Whether a device with this fault offers packed rings: what is wrong with split ones is found on split ones.
pub(super) fn are_offered(fault: &str) -> bool {
    fault.is_empty() || fault == "serves-once" || fault.starts_with("packed-")
}

/// One more than the other descriptors of a chain have: `next` is its buffer id.
fn packed(queue: &DeviceQueue, at: u16) -> Option<Raw> {
    let raw = descriptor(queue, queue.layout().desc + 16 * u64::from(at))?;
    Some(Raw { flags: raw.next, next: raw.flags, ..raw })
}

/// The chain that is available next, and whether all of it is. None when there is none.
fn next(queue: &DeviceQueue) -> Option<(Vec<Raw>, bool)> {
    let size = queue.size();
    let [low, high, ..] = queue.base().to_le_bytes();
    let place = u16::from_le_bytes([low, high]);
    let (mut at, mut wrap) = (place & 0x7fff, place & 0x8000 != 0);
    let (mut parts, mut whole) = (Vec::new(), true);
    loop {
        let part = packed(queue, at)?;
        let is_available = part.flags & (AVAIL | USED) == if wrap { AVAIL } else { USED };
        if parts.is_empty() && !is_available {
            return None;
        }
        whole &= is_available;
        parts.push(part);
        if part.flags & NEXT == 0 || parts.len() == usize::from(size) {
            return Some((parts, whole));
        }
        at += 1;
        if at == size {
            (at, wrap) = (0, !wrap);
        }
    }
}

/// The descriptors of the chain that is available next.
pub(super) fn parts(queue: &DeviceQueue) -> Vec<Raw> {
    next(queue).map(|(parts, _)| parts).unwrap_or_default()
}

impl Device {
    /// What a fault does at the sight of a packed ring; false when the ring is served no more.
    pub(super) fn trips_packed(&self, index: usize, queue: &DeviceQueue) -> bool {
        let Some((parts, whole)) = next(queue) else { return true };
        let old = self.rings[index].requests > 11;
        let id = parts.last().map_or(0, |part| part.next);
        let tables =
            |is: fn(&Raw) -> bool| parts.iter().any(|part| part.flags & INDIRECT != 0 && is(part));
        let full = parts.len() == usize::from(queue.size());
        let aborts = match self.fault.as_str() {
            "packed-served" => return !(old && parts.len() == 3),
            "packed-together" => return !(old && parts.len() == 2),
            "packed-indirect" => return !(self.rings[index].requests > 6 && tables(|_| true)),
            "packed-odd-events" => word(queue, queue.layout().avail + 2) == 3,
            "packed-id-outside" => id >= queue.size(),
            "packed-not-available" => !whole && parts.len() < usize::from(queue.size()),
            "packed-endless" => full && parts.iter().all(|part| part.flags & NEXT != 0),
            "packed-data-outside" => {
                parts.len() == 3 && queue.view().read(parts[1].addr, &mut [0]).is_err()
            }
            // Nobody else lays a request out beyond the memory that there is.
            "packed-iotlb" => self.translates() && parts.len() == 3,
            "packed-table-next" => tables(|part| part.flags & NEXT != 0),
            "packed-table-empty" => tables(|part| part.len == 0),
            _ => false,
        };
        if aborts {
            std::process::abort();
        }
        true
    }
}
