//! One request queue of a block device with up to `depth` requests under way.
//!
//! Invariants: each request has a slot (see [`super::request`]) until the device gives it back; memory
//! of requests that the device never gave back is never handed out again; submitting and popping
//! allocate nothing once the lists have their size.

use std::fmt;
use std::time::{Duration, Instant};

use outboard_memory::{Pairs, View};

use super::request::{
    ID_AT, ID_SIZE, Operation, SEGMENT_AT, SLOT_PAIRS, SLOT_SIZE, STATUS_UNSET, Status,
};
use crate::error::Error;
use crate::memory::{Buffer, SharedMemory, wide};
use crate::virtqueue::Virtqueue;

/// Most requests under way on one queue: what one array of pairs has slots for.
const MAX_DEPTH: u16 = 4096;

/// Place of the segment in a slot, in pairs.
const SEGMENT_PAIR: u16 = 2;
/// Place of the status in a slot, in pairs.
const STATUS_PAIR: u16 = 7;
const _: () =
    assert!(SEGMENT_AT == 8 * SEGMENT_PAIR as u64 && SLOT_SIZE == 8 * SLOT_PAIRS as usize);

/// A finished request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The caller's name for it.
    pub token: u64,
    /// How it ended.
    pub status: Status,
    /// Bytes that the device says it wrote, the status byte included.
    pub written: u32,
}

/// One request queue. It can move to another thread; it belongs to one at a time.
pub struct BlockQueue {
    queue: Virtqueue,
    slots: Option<Buffer>,
    slots_at: u64,
    /// What each slot is used for; `None` is free.
    requests: Vec<Option<Pending>>,
    free: Vec<u16>,
    view: View,
    /// The slots, resolved once.
    pairs: Pairs,
    readable: Vec<(u64, u32)>,
    writable: Vec<(u64, u32)>,
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    token: u64,
    room: u64,
}

impl BlockQueue {
    /// A block queue over `queue`, with room for `depth` requests under way.
    ///
    /// # Errors
    /// [`Error::Memory`] when there is no room for the slots, [`Error::Queue`] when the depth is more than
    /// 4096.
    pub fn new(queue: Virtqueue, memory: &SharedMemory, depth: u16) -> Result<Self, Error> {
        if depth == 0 || depth > MAX_DEPTH {
            return Err(Error::Queue(format!("a depth of {depth} is not from 1 to {MAX_DEPTH}")));
        }
        let room = depth.next_power_of_two();
        let slots = memory.allocate(usize::from(room) * SLOT_SIZE, 64)?;
        let view = memory.view();
        let pairs = view.cells(slots.guest(), wide(slots.len()))?.pairs(0, room * SLOT_PAIRS)?;
        Ok(Self {
            queue,
            slots_at: slots.guest(),
            slots: Some(slots),
            requests: vec![None; usize::from(depth)],
            free: (0..depth).rev().collect(),
            view,
            pairs,
            readable: Vec::with_capacity(8),
            writable: Vec::with_capacity(8),
        })
    }

    /// Number of the queue.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.queue.index()
    }

    /// Requests under way.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.requests.len() - self.free.len()
    }

    /// Most requests that can be under way, ring permitting.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.requests.len()
    }

    /// The queue below, for kicks and calls.
    pub fn virtqueue(&mut self) -> &mut Virtqueue {
        &mut self.queue
    }

    /// The queue below, to look at.
    #[must_use]
    pub const fn as_virtqueue(&self) -> &Virtqueue {
        &self.queue
    }

    /// Adds a request under the caller's name `token`; the device sees it at the next [`Self::kick`].
    /// False when the queue is full. The data ranges must stay untouched until it comes back.
    ///
    /// # Errors
    /// [`Error::BadRequest`] when the ring could never hold it.
    pub fn submit(&mut self, operation: Operation<'_>, token: u64) -> Result<bool, Error> {
        let Some(&slot) = self.free.last() else { return Ok(false) };
        let at = self.slot_address(slot);
        let first = slot * SLOT_PAIRS;
        self.store(first, operation.header());
        if let Some(segment) = operation.segment() {
            self.store(first + SEGMENT_PAIR, segment);
        }
        self.pairs.store(first + STATUS_PAIR, STATUS_UNSET.0, STATUS_UNSET.1);
        operation.chain(at, &mut self.readable, &mut self.writable);
        let room = operation.room();
        if !self.queue.add(&self.readable, &self.writable, u64::from(slot))? {
            return Ok(false);
        }
        self.free.pop();
        if let Some(request) = self.request(slot) {
            *request = Some(Pending { token, room });
        }
        Ok(true)
    }

    /// Shows what was submitted to the device; true when that took a kick.
    ///
    /// # Errors
    /// [`Error::Host`] when the eventfd cannot be written.
    pub fn kick(&mut self) -> Result<bool, Error> {
        self.queue.kick()
    }

    /// The next finished request.
    ///
    /// # Errors
    /// [`Error::Ring`] when the device gave back something impossible: an unknown request, a status that
    /// does not exist, more bytes than there was room for.
    pub fn pop(&mut self) -> Result<Option<Completion>, Error> {
        let Some((slot, written)) = self.queue.pop()? else { return Ok(None) };
        let slot = u16::try_from(slot).unwrap_or(u16::MAX);
        let Some(pending) = self.request(slot).and_then(Option::take) else {
            return Err(self.broken(format!("slot {slot} was given back and is not in use")));
        };
        self.free.push(slot);
        if u64::from(written) > pending.room {
            let room = pending.room;
            return Err(self.broken(format!("{written} bytes written where {room} had room")));
        }
        match Status::from_pair(self.pairs.load(slot * SLOT_PAIRS + STATUS_PAIR)) {
            Ok(status) => Ok(Some(Completion { token: pending.token, status, written })),
            Err(byte) => Err(self.broken(format!("status {byte:#x} does not exist"))),
        }
    }

    /// The next finished request, sleeping on the call descriptor for at most `timeout`.
    ///
    /// # Errors
    /// [`Error::Stuck`] when none comes, and as [`Self::pop`].
    pub fn next(&mut self, timeout: Duration) -> Result<Completion, Error> {
        let deadline = Instant::now().checked_add(timeout);
        loop {
            if let Some(done) = self.pop()? {
                return Ok(done);
            }
            let left = deadline.map_or(timeout, |at| at.saturating_duration_since(Instant::now()));
            if left.is_zero() || !self.queue.wait(left)? {
                let in_flight = self.in_flight();
                return Err(Error::Stuck { queue: self.index(), in_flight, after: timeout });
            }
        }
    }

    /// The id string that a finished [`Operation::GetId`] left, up to its first zero byte. Only valid
    /// while nothing else was submitted since.
    pub(super) fn last_id(&mut self) -> Result<Vec<u8>, Error> {
        let Some(&slot) = self.free.last() else {
            return Err(Error::State("no request has been finished"));
        };
        let mut id = vec![0; ID_SIZE as usize];
        self.view.read(self.slot_address(slot).wrapping_add(ID_AT), &mut id)?;
        let end = id.iter().position(|&byte| byte == 0).unwrap_or(id.len());
        id.truncate(end);
        Ok(id)
    }

    fn slot_address(&self, slot: u16) -> u64 {
        self.slots_at.wrapping_add(u64::from(slot) * wide(SLOT_SIZE))
    }

    fn request(&mut self, slot: u16) -> Option<&mut Option<Pending>> {
        self.requests.get_mut(usize::from(slot))
    }

    fn store(&self, first: u16, [a, b]: [(u32, u32); 2]) {
        self.pairs.store(first, a.0, a.1);
        self.pairs.store(first + 1, b.0, b.1);
    }

    fn broken(&self, reason: String) -> Error {
        Error::Ring { queue: self.index(), reason }
    }
}

impl Drop for BlockQueue {
    fn drop(&mut self) {
        // The device may still write into the slots of what is under way.
        if self.in_flight() > 0
            && let Some(slots) = self.slots.take()
        {
            slots.leak();
        }
    }
}

impl fmt::Debug for BlockQueue {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "BlockQueue({}, {} of {})", self.index(), self.in_flight(), self.depth())
    }
}
