//! A driver-side queue with its two eventfds: what the front-end puts requests into.
//!
//! Carries out the driver's half of virtio 1.3 §2.7 and §2.8 through [`outboard_queue::DriverQueue`] and the
//! eventfd half of vhost-user's SET_VRING_KICK and SET_VRING_CALL. Invariant: after [`Virtqueue::wait`]
//! says that there is nothing, a completion published later has made the call descriptor readable.

use std::fmt;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use outboard_protocol::features::virtio;
use outboard_queue::{DriverQueue, QueueFeatures, QueueLayout};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use crate::error::Error;
use crate::memory::{Buffer, SharedMemory};
use crate::socket::wait_fd;
use crate::vmm::QueueSetup;

/// Where a ring lies and what notifies its two sides; the VMM and the queue share it.
#[derive(Debug)]
pub(crate) struct RingShare {
    pub(crate) index: u16,
    pub(crate) layout: QueueLayout,
    /// Behind a lock because [`RingHandle`] changes it under a driver at work.
    kick: Mutex<OwnedFd>,
    pub(crate) call: OwnedFd,
    /// Keeps the ring's memory from being handed out again.
    pub(crate) memory: Buffer,
    /// Indirect tables: one of this many entries for each head.
    pub(crate) tables: Option<(Buffer, u16)>,
}

impl RingShare {
    /// Lays out a zeroed ring of `size` entries in `memory`, split or packed by these features.
    pub(crate) fn new(
        memory: &SharedMemory,
        setup: QueueSetup,
        features: u64,
    ) -> Result<Arc<Self>, Error> {
        let QueueSetup { index, size, indirect } = setup;
        let features = QueueFeatures::from_bits(features);
        if size == 0 || size > 32768 || !(features.packed || size.is_power_of_two()) {
            return Err(Error::Queue(format!(
                "queue size {size} is not from 1 to 32768, or no power of two"
            )));
        }
        let entries = usize::from(size);
        // Descriptors, then what the driver writes, then what the device writes on a cache line of its own.
        let bytes = |len: u64| usize::try_from(len).unwrap_or(usize::MAX);
        let (desc, avail, used) = QueueLayout::sizes(size, features);
        let avail_at = bytes(desc);
        let used_at = (avail_at + bytes(avail)).next_multiple_of(64);
        let buffer = memory.allocate(used_at + bytes(used), 4096)?;
        buffer.fill(0)?;
        let at = |offset: usize| buffer.guest().wrapping_add(crate::memory::wide(offset));
        let layout = QueueLayout { size, desc: at(0), avail: at(avail_at), used: at(used_at) };
        let tables = match usize::from(indirect) {
            0 => None,
            room => Some((memory.allocate(16 * room * entries, 4096)?, indirect)),
        };
        let (kick, call) = (eventfd()?, eventfd()?);
        let kick = Mutex::new(kick);
        Ok(Arc::new(Self { index, layout, kick, call, memory: buffer, tables }))
    }

    /// What it was made of.
    pub(crate) fn setup(&self) -> QueueSetup {
        let indirect = self.tables.as_ref().map_or(0, |(_, room)| *room);
        QueueSetup { index: self.index, size: self.layout.size, indirect }
    }

    pub(crate) fn used_index(&self) -> Result<u16, Error> {
        self.index_at(self.layout.used)
    }

    /// The index of the available or used ring that lies there.
    fn index_at(&self, ring: u64) -> Result<u16, Error> {
        let mut bytes = [0; 2];
        self.memory.memory().view().read(ring.wrapping_add(2), &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    pub(crate) fn kick(&self) -> MutexGuard<'_, OwnedFd> {
        self.kick.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a VMM can do to a queue whose driver is at work elsewhere.
#[derive(Clone, Debug)]
pub struct RingHandle(Arc<RingShare>);

impl RingHandle {
    /// Number of the queue.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.0.index
    }

    /// Where the ring lies.
    #[must_use]
    pub fn layout(&self) -> QueueLayout {
        self.0.layout
    }

    /// The descriptor that the driver is called through.
    #[must_use]
    pub fn call(&self) -> BorrowedFd<'_> {
        self.0.call.as_fd()
    }

    /// Has the driver kick through `kick` from now on; the old descriptor, in which kicks may be left that
    /// the back-end did not take.
    #[must_use]
    pub fn replace_kick(&self, kick: OwnedFd) -> OwnedFd {
        std::mem::replace(&mut *self.0.kick(), kick)
    }

    /// How many requests the driver has offered, modulo 2^16: the available index as it is in memory. A packed ring has
    /// none, and what is read there means nothing.
    ///
    /// # Errors
    /// Never, as the ring lies in shared memory.
    pub fn available_index(&self) -> Result<u16, Error> {
        self.0.index_at(self.0.layout.avail)
    }

    /// How many requests the device has given back, modulo 2^16: the used index as it is in memory. A packed ring has
    /// none.
    ///
    /// # Errors
    /// Never, as the ring lies in shared memory.
    pub fn used_index(&self) -> Result<u16, Error> {
        self.0.used_index()
    }
}

/// A queue as the driver sees it. It can move to another thread; it belongs to one at a time.
pub struct Virtqueue {
    share: Arc<RingShare>,
    driver: DriverQueue,
    /// Longest chain that goes into an indirect table; 0 without them.
    table_room: usize,
    kicks: u64,
}

impl Virtqueue {
    pub(crate) fn new(share: Arc<RingShare>, features: u64) -> Result<Self, Error> {
        let packed = QueueFeatures::from_bits(features).packed;
        Self::starting_at(share, features, if packed { 0x8000 } else { 0 })
    }

    /// As if requests had been made and finished already, so that the next one is at `index` (packed: with the wrap
    /// counter in bit 15).
    pub(crate) fn starting_at(
        share: Arc<RingShare>,
        features: u64,
        index: u16,
    ) -> Result<Self, Error> {
        let view = share.memory.memory().view();
        let mut driver = DriverQueue::starting_at(share.layout, features, view, index)
            .map_err(|error| Error::Ring { queue: share.index, reason: error.to_string() })?;
        let mut table_room = 0;
        if let Some((tables, room)) = &share.tables
            && features & virtio::RING_INDIRECT_DESC != 0
        {
            driver.set_indirect_area(tables.guest(), *room);
            table_room = usize::from(*room);
        }
        Ok(Self { share, driver, table_room, kicks: 0 })
    }

    /// Number of the queue.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.share.index
    }

    /// A handle for what is done to the ring while this is driven.
    #[must_use]
    pub fn handle(&self) -> RingHandle {
        RingHandle(Arc::clone(&self.share))
    }

    /// What SET_VRING_BASE tells the device where this goes on.
    pub(crate) fn base(&self) -> u32 {
        self.driver.base()
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.share.layout.size
    }

    /// How often the device was kicked through the eventfd.
    #[must_use]
    pub const fn kicks(&self) -> u64 {
        self.kicks
    }

    /// Adds a request: guest ranges that the device reads, then ranges that it writes. It is not seen by
    /// the device before [`Self::kick`]. False when the ring is too full for it.
    ///
    /// # Errors
    /// [`Error::BadRequest`] when no ring of this size could ever hold it.
    #[inline]
    pub fn add(
        &mut self,
        readable: &[(u64, u32)],
        writable: &[(u64, u32)],
        token: u64,
    ) -> Result<bool, Error> {
        let needed = readable.len() + writable.len();
        if needed > 1 && needed <= self.table_room {
            return Ok(self.driver.add_indirect(readable, writable, token).is_ok());
        }
        if needed == 0 || needed > usize::from(self.size()) {
            return Err(Error::BadRequest(format!(
                "a request of {needed} segments does not fit a queue of {}",
                self.size()
            )));
        }
        Ok(self.driver.add(readable, writable, token).is_ok())
    }

    /// Shows the added requests to the device, and kicks it when it wants that. True when it was kicked.
    ///
    /// # Errors
    /// [`Error::Host`] when the eventfd cannot be written.
    pub fn kick(&mut self) -> Result<bool, Error> {
        if !self.driver.publish() {
            return Ok(false);
        }
        self.kicks = self.kicks.wrapping_add(1);
        signal(self.share.kick().as_fd()).map_err(|errno| Error::host("write to a kick", errno))?;
        Ok(true)
    }

    /// The next finished request: its token, and how many bytes the device says it wrote.
    ///
    /// # Errors
    /// [`Error::Ring`] when the device put something impossible into the used ring.
    #[inline]
    pub fn pop(&mut self) -> Result<Option<(u64, u32)>, Error> {
        self.driver
            .pop_used()
            .map_err(|error| Error::Ring { queue: self.share.index, reason: error.to_string() })
    }

    /// Asks for a call at the next completion; true when there is one to pop already.
    pub fn arm(&mut self) -> bool {
        self.driver.arm()
    }

    /// Wants no calls: for a driver that polls.
    pub fn disarm(&mut self) {
        self.driver.disarm();
    }

    /// The descriptor that becomes readable when the device calls.
    #[must_use]
    pub fn call_fd(&self) -> BorrowedFd<'_> {
        self.share.call.as_fd()
    }

    /// Takes the calls that came so far.
    pub fn drain_calls(&self) {
        let mut count = [0; 8];
        let mut into = [IoSliceMut::new(&mut count)];
        // The back-end has the same open file and may have made it blocking: RWF_NOWAIT holds for this
        // read whatever it did. Nothing to take is as good as something taken.
        let _ = rustix::io::preadv2(
            &self.share.call,
            &mut into,
            u64::MAX,
            rustix::io::ReadWriteFlags::NOWAIT,
        );
    }

    /// Sleeps until a completion can be popped; false when there is none after `timeout`.
    ///
    /// # Errors
    /// [`Error::Host`] when the wait itself fails.
    pub fn wait(&mut self, timeout: Duration) -> Result<bool, Error> {
        wait_any(&mut [self], timeout)
    }
}

impl Virtqueue {
    /// As [`Self::wait`], and watches the calls: a completion that lies there after `timeout` must have
    /// had its call, at the latest `patience` after it was seen.
    ///
    /// # Errors
    /// [`Error::NoCall`] when it had none, [`Error::Host`] when the wait itself fails.
    pub fn wait_called(&mut self, timeout: Duration, patience: Duration) -> Result<bool, Error> {
        let deadline = Instant::now().checked_add(timeout);
        loop {
            if self.arm() {
                self.disarm();
                return Ok(true);
            }
            let left = deadline.map_or(timeout, |at| at.saturating_duration_since(Instant::now()));
            if !self.called(left)? {
                if !self.arm() {
                    return Ok(false);
                }
                if !self.called(patience)? {
                    return Err(Error::NoCall { queue: self.index(), after: patience });
                }
            }
            self.drain_calls();
        }
    }

    /// Whether a call comes within `timeout`.
    fn called(&self, timeout: Duration) -> Result<bool, Error> {
        let until = Instant::now() + timeout.min(Duration::from_secs(3600));
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let ready = wait_fd(self.call_fd(), PollFlags::IN, left)
                .map_err(|errno| Error::host("poll", errno))?;
            // An interrupted wait is early.
            if ready || Instant::now() >= until {
                return Ok(ready);
            }
        }
    }
}

/// Sleeps until a completion can be popped from one of `queues`; false when there is none after
/// `timeout`.
///
/// # Errors
/// [`Error::Host`] when the wait itself fails.
pub fn wait_any(queues: &mut [&mut Virtqueue], timeout: Duration) -> Result<bool, Error> {
    let deadline = Instant::now().checked_add(timeout);
    loop {
        let mut found = false;
        for queue in &mut *queues {
            found |= queue.arm();
        }
        if found {
            queues.iter_mut().for_each(|queue| queue.disarm());
            return Ok(true);
        }
        let left = deadline.map_or(timeout, |at| at.saturating_duration_since(Instant::now()));
        if left.is_zero() {
            return Ok(false);
        }
        sleep_on(queues, left.min(Duration::from_secs(3600)))?;
    }
}

fn sleep_on(queues: &[&mut Virtqueue], timeout: Duration) -> Result<(), Error> {
    let failed = |errno| Error::host("poll", errno);
    if let [queue] = queues {
        wait_fd(queue.call_fd(), PollFlags::IN, timeout).map_err(failed)?;
        queue.drain_calls();
        return Ok(());
    }
    let mut set: Vec<_> = queues
        .iter()
        .map(|queue| PollFd::from_borrowed_fd(queue.call_fd(), PollFlags::IN))
        .collect();
    let timeout = Timespec::try_from(timeout).ok();
    match rustix::event::poll(&mut set, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(failed(errno)),
    }
    for (queue, entry) in queues.iter().zip(&set) {
        if !entry.revents().is_empty() {
            queue.drain_calls();
        }
    }
    Ok(())
}

impl fmt::Debug for Virtqueue {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "Virtqueue({} of {})", self.index(), self.size())
    }
}

fn eventfd() -> Result<OwnedFd, Error> {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|errno| Error::host("eventfd", errno))
}

/// Adds one to an eventfd. A counter that is full wakes its reader just as well.
///
/// A back-end that fills the counter up and makes the open file blocking, which is shared with it, could
/// hold this write; the kernel has no write to an eventfd that never waits. It gains what it has already
/// by never finishing a request.
fn signal(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    loop {
        match rustix::io::write(fd, &1u64.to_ne_bytes()) {
            Ok(_) | Err(Errno::AGAIN) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}
