//! The event loop on io_uring(7): doorbells by multishot poll, file operations by vectored
//! requests, one system call to submit and wait.
//!
//! Invariant: a request whose operation the kernel has not finished lives in `flying`, with the
//! guest memory that its vector points into; it leaves only with its completion. A loop that is
//! dropped with operations in flight cancels them and waits for the kernel first.
//!
//! user_data: operations carry their slot number, watches [`WATCH`] plus a serial number that is
//! never used again, everything else (removals) [`IGNORE`].

// UNSAFETY: submission entries hold raw pointers for the kernel; see each SAFETY line.
#![expect(unsafe_code, reason = "io_uring entries are raw pointers by nature")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{CancelBuilder, Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use outboard_memory::Segment;
use outboard_queue::Chain;
use rustix::event::{PollFlags, epoll};

use super::landing::{Landing, Landings};
use super::{Event, EventLoop, FileId, FileOp, Flights};

const ENTRIES: u32 = 256;
const WATCH: u64 = 1 << 62;
const IGNORE: u64 = 1 << 63;
/// Operations after which the kernel hears of them although more may follow at once: a disk works on the first of a
/// batch while the others are being taken. Fewer pay a system call each, more leave the disk waiting (docs/performance.md).
const FEW: usize = 4;
/// readv and writev take at most this many pieces (IOV_MAX); a longer request moves in parts.
const MAX_PIECES: usize = 1024;
/// How many seconds a dropped loop waits for the kernel.
const DROP_ROUNDS: u32 = 5;
const POLL_IN: u32 = PollFlags::IN.bits() as u32;

/// A watched descriptor.
#[derive(Debug)]
struct Watch {
    serial: u64,
    token: u64,
    /// A duplicate: its number stays ours until the watch ends.
    fd: OwnedFd,
    /// The poll was ended by the kernel and must be submitted again.
    rearm: bool,
}

/// A request that the kernel works on.
#[derive(Debug)]
struct Flying {
    queue: u64,
    /// Whether it writes to guest memory.
    into_memory: bool,
    /// Whether its request was left behind.
    abandoned: bool,
    token: u64,
    chain: Chain,
    /// Where the kernel reads to, when that is not the request's memory.
    landing: Option<Landing>,
}

/// See the module.
pub(crate) struct UringLoop {
    ring: IoUring,
    /// Asked whether a descriptor can be waited for; nothing ever stays in it.
    waitable: Arc<File>,
    watches: Vec<Watch>,
    serial: u64,
    files: Vec<Arc<File>>,
    /// Places in it that hold no file, but `waitable`.
    vacant: Vec<FileId>,
    flying: Vec<Option<Flying>>,
    free: Vec<usize>,
    landings: Landings,
}

impl std::fmt::Debug for UringLoop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UringLoop")
            .field("watches", &self.watches.len())
            .field("in_flight", &(self.flying.len() - self.free.len()))
            .finish_non_exhaustive()
    }
}

impl UringLoop {
    /// Makes the ring; only the calling thread may use it.
    pub(crate) fn new() -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_cqsize(4 * ENTRIES)
            .dontfork()
            .build(ENTRIES)?;
        if !ring.params().is_feature_nodrop() || !ring.params().is_feature_ext_arg() {
            return Err(io::Error::from(io::ErrorKind::Unsupported));
        }
        Ok(Self {
            ring,
            waitable: Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?.into()),
            watches: Vec::new(),
            serial: 0,
            files: Vec::new(),
            vacant: Vec::new(),
            flying: Vec::new(),
            free: Vec::new(),
            landings: Landings::default(),
        })
    }

    /// Queues an entry, submitting the others first when the queue is full.
    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: what the entry points to (a request's vector, a buffer of our own, nothing
            // for polls and syncs) is owned by `flying` until the completion is seen.
            let pushed = unsafe { self.ring.submission().push(entry) };
            if pushed.is_ok() {
                return Ok(());
            }
            self.ring.submit()?;
        }
    }

    /// Starts or restarts the poll of a descriptor.
    fn arm(&mut self, serial: u64, fd: RawFd) -> io::Result<()> {
        let poll = opcode::PollAdd::new(Fd(fd), POLL_IN).multi(true);
        self.push(&poll.build().user_data(WATCH | serial))
    }

    /// Restarts the polls that the kernel ended although nothing is wrong with them.
    fn rearm(&mut self) -> io::Result<()> {
        while let Some(watch) = self.watches.iter_mut().find(|watch| watch.rearm) {
            watch.rearm = false;
            let (serial, fd) = (watch.serial, watch.fd.as_raw_fd());
            self.arm(serial, fd)?;
        }
        Ok(())
    }

    fn entry(&self, op: FileOp, chain: &mut Chain) -> Option<squeue::Entry> {
        let fd = |files: &[Arc<File>], id: FileId| {
            files.get(id.0 as usize).map(|file| Fd(file.as_raw_fd()))
        };
        Some(match op {
            FileOp::Read { file, offset } => {
                let cursor = chain.writable();
                let pieces = cursor.segments();
                opcode::Readv::new(fd(&self.files, file)?, pieces.as_ptr().cast(), count(pieces))
                    .offset(offset)
                    .build()
            }
            FileOp::Write { file, offset } => {
                let cursor = chain.readable();
                let pieces = cursor.segments();
                opcode::Writev::new(fd(&self.files, file)?, pieces.as_ptr().cast(), count(pieces))
                    .offset(offset)
                    .build()
            }
            FileOp::Sync { file } => {
                opcode::Fsync::new(fd(&self.files, file)?).flags(FsyncFlags::DATASYNC).build()
            }
            FileOp::Allocate { file, mode, offset, length } => {
                opcode::Fallocate::new(fd(&self.files, file)?, length)
                    .offset(offset)
                    .mode(mode)
                    .build()
            }
        })
    }

    /// A read into memory of our own.
    fn entry_apart(&self, file: FileId, offset: u64, to: &mut Landing) -> Option<squeue::Entry> {
        let file = self.files.get(file.0 as usize)?;
        let room = to.room();
        let length = u32::try_from(room.len()).ok()?;
        let read = opcode::Read::new(Fd(file.as_raw_fd()), room.as_mut_ptr(), length);
        Some(read.offset(offset).build())
    }

    /// Turns one completion into an event, if it is one.
    fn completion(&mut self, user_data: u64, result: i32, more: bool, events: &mut Vec<Event>) {
        if user_data & IGNORE != 0 {
            return;
        }
        if user_data & WATCH != 0 {
            let serial = user_data & !WATCH;
            if let Some(watch) = self.watches.iter_mut().find(|watch| watch.serial == serial) {
                // An error or a hang-up without input ends the watch; anything else goes on.
                let input = result > 0 && result.cast_unsigned() & POLL_IN != 0;
                watch.rearm |= !more && input;
                if input {
                    events.push(Event::Ready(watch.token));
                }
            }
            return;
        }
        let slot = usize::try_from(user_data).unwrap_or(usize::MAX);
        if let Some(flying) = self.flying.get_mut(slot).and_then(Option::take) {
            self.free.push(slot);
            let outcome = u32::try_from(result)
                .map_err(|_| io::Error::from_raw_os_error(result.saturating_neg()));
            let Flying { queue, token, mut chain, landing, abandoned, .. } = flying;
            if let Some(landing) = landing {
                if let (Ok(count), false) = (usize::try_from(result), abandoned) {
                    chain.writable().place(landing.filled(count));
                }
                self.landings.give_back(landing);
            }
            events.push(Event::Done { queue, token, chain, outcome });
        }
    }

    /// Whether the kernel is to be entered although nothing is waited for: it has entries to take, or
    /// holds completions back until then. A look that finds neither is two loads, no system call.
    fn has_errand(&mut self) -> bool {
        let queue = self.ring.submission();
        !queue.is_empty() || queue.taskrun() || queue.cq_overflow()
    }

    fn reap(&mut self, events: &mut Vec<Event>) {
        loop {
            let next = self.ring.completion().next();
            let Some(entry) = next else { return };
            let more = cqueue::more(entry.flags());
            self.completion(entry.user_data(), entry.result(), more, events);
        }
    }
}

fn is_of(flying: &Option<Flying>, queue: u64) -> bool {
    flying.as_ref().is_some_and(|flying| flying.queue == queue)
}

/// How many pieces one operation moves.
fn count(pieces: &[Segment]) -> u32 {
    u32::try_from(pieces.len().min(MAX_PIECES)).unwrap_or(0)
}

/// Whether waiting again is the answer.
fn transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN | libc::ETIME))
}

impl EventLoop for UringLoop {
    fn watch(&mut self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        // A file that cannot be waited for (a regular file, /dev/zero) would be "ready" at once and
        // for ever. epoll knows such files and refuses them (EPERM).
        epoll::add(&*self.waitable, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        epoll::delete(&*self.waitable, fd)?;
        let fd = fd.try_clone_to_owned()?;
        let (serial, raw) = (self.serial, fd.as_raw_fd());
        self.serial += 1;
        self.watches.push(Watch { serial, token, fd, rearm: false });
        self.arm(serial, raw)
    }

    fn unwatch(&mut self, token: u64) {
        while let Some(at) = self.watches.iter().position(|watch| watch.token == token) {
            let watch = self.watches.swap_remove(at);
            let remove = opcode::PollRemove::new(WATCH | watch.serial).build().user_data(IGNORE);
            // If the kernel takes no entry now, the poll lives until the ring is closed; its events
            // find no watch and are ignored.
            if self.push(&remove).is_ok() {
                let _ = self.ring.submit();
            }
        }
    }

    fn add_file(&mut self, file: Arc<File>) -> FileId {
        if let Some(vacant) = self.vacant.pop()
            && let Some(place) = self.files.get_mut(vacant.0 as usize)
        {
            *place = file;
            return vacant;
        }
        self.files.push(file);
        FileId(u32::try_from(self.files.len() - 1).unwrap_or(u32::MAX))
    }

    fn remove_file(&mut self, file: FileId) {
        if let Some(place) = self.files.get_mut(file.0 as usize) {
            *place = Arc::clone(&self.waitable);
            self.vacant.push(file);
        }
    }

    fn can_submit(&self) -> bool {
        true
    }

    fn submit(
        &mut self,
        op: FileOp,
        (queue, token): (u64, u64),
        apart: bool,
        mut chain: Chain,
    ) -> Result<(), Chain> {
        let reads = matches!(op, FileOp::Read { .. });
        let mut landing =
            if apart && reads { self.landings.take(chain.writable().len()) } else { None };
        let entry = match (op, &mut landing) {
            (FileOp::Read { file, offset }, Some(landing)) => {
                self.entry_apart(file, offset, landing)
            }
            _ => self.entry(op, &mut chain),
        };
        let Some(entry) = entry else { return Err(chain) };
        let into_memory = reads && landing.is_none();
        let slot = self.free.pop().unwrap_or_else(|| {
            self.flying.push(None);
            self.flying.len() - 1
        });
        // In `flying` before the kernel hears of it.
        if let Some(place) = self.flying.get_mut(slot) {
            *place = Some(Flying { queue, into_memory, abandoned: false, token, chain, landing });
        }
        if self.push(&entry.user_data(slot as u64)).is_ok() {
            if self.ring.submission().len() >= FEW {
                // Refused for the moment: the next look at events tells the kernel.
                let _ = self.ring.submit();
            }
            return Ok(());
        }
        self.free.push(slot);
        match self.flying.get_mut(slot).and_then(Option::take) {
            Some(Flying { chain, landing, .. }) => {
                landing.into_iter().for_each(|landing| self.landings.give_back(landing));
                Err(chain)
            }
            None => Ok(()),
        }
    }

    fn cancel(&mut self, queue: u64) {
        for slot in 0..self.flying.len() {
            // One that cannot be asked for ends by itself, or not: as one that the kernel cannot end.
            if let Some(Some(flying)) = self.flying.get_mut(slot).filter(|f| is_of(f, queue)) {
                flying.abandoned = true;
                let cancel = opcode::AsyncCancel::new(slot as u64).build().user_data(IGNORE);
                let _ = self.push(&cancel);
            }
        }
        let _ = self.ring.submit();
    }

    fn flying(&self, queue: u64) -> Flights {
        let mut flights = Flights::default();
        for flying in self.flying.iter().flatten().filter(|flying| flying.queue == queue) {
            flights.all += 1;
            flights.into_memory += usize::from(flying.into_memory);
        }
        flights
    }

    fn has_news(&mut self) -> bool {
        self.has_errand() || !self.ring.completion().is_empty()
    }

    fn wait(&mut self, timeout: Option<Duration>, events: &mut Vec<Event>) -> io::Result<()> {
        self.rearm()?;
        self.reap(events);
        let want = usize::from(events.is_empty() && timeout != Some(Duration::ZERO));
        if want == 0 && !self.has_errand() {
            return Ok(());
        }
        let entered = match timeout {
            Some(timeout) if want > 0 => {
                let timeout = Timespec::from(timeout);
                let args = SubmitArgs::new().timespec(&timeout);
                self.ring.submitter().submit_with_args(want, &args)
            }
            _ => self.ring.submitter().submit_and_wait(want),
        };
        match entered {
            Ok(_) => {}
            Err(error) if transient(&error) => {}
            Err(error) => return Err(error),
        }
        self.reap(events);
        Ok(())
    }
}

impl Drop for UringLoop {
    fn drop(&mut self) {
        let _ = self.ring.submitter().register_sync_cancel(None, CancelBuilder::any());
        let mut events = Vec::new();
        for _ in 0..DROP_ROUNDS {
            if self.flying.len() == self.free.len() {
                return;
            }
            let second = Timespec::new().sec(1);
            let args = SubmitArgs::new().timespec(&second);
            let _ = self.ring.submitter().submit_with_args(1, &args);
            self.reap(&mut events);
            events.clear();
        }
        // The disk does not answer. What the kernel may still write to stays mapped for good.
        std::mem::forget(std::mem::take(&mut self.flying));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notify::Waker;
    use outboard_frontend::SharedMemory;
    use outboard_queue::{DeviceQueue, DriverQueue, QueueLayout};
    use std::os::fd::AsFd;

    fn ready(ring: &mut UringLoop) -> Vec<u64> {
        let mut events = Vec::new();
        ring.wait(Some(Duration::from_millis(200)), &mut events).unwrap();
        let token = |event| if let Event::Ready(token) = event { Some(token) } else { None };
        events.into_iter().filter_map(token).collect()
    }

    #[test]
    fn news_show_without_a_wait_and_are_over_once_they_were_taken() {
        let mut ring = UringLoop::new().unwrap();
        let waker = Waker::new().unwrap();
        ring.watch(waker.as_fd(), 7).unwrap();
        assert!(ready(&mut ring).is_empty());
        for _ in 0..3 {
            assert!(!ring.has_news());
            waker.wake();
            assert!(ring.has_news());
            assert_eq!(ready(&mut ring), [7]);
            waker.drain();
        }
    }

    #[test]
    fn a_watched_descriptor_is_reported_each_time_it_is_written() {
        let mut ring = UringLoop::new().unwrap();
        let waker = Waker::new().unwrap();
        ring.watch(waker.as_fd(), 7).unwrap();
        for _ in 0..3 {
            waker.wake();
            assert_eq!(ready(&mut ring), [7]);
            waker.drain();
            assert!(ready(&mut ring).is_empty());
        }
    }

    #[test]
    fn what_is_no_longer_watched_is_not_reported() {
        let mut ring = UringLoop::new().unwrap();
        let waker = Waker::new().unwrap();
        ring.watch(waker.as_fd(), 7).unwrap();
        ring.unwatch(7);
        waker.wake();
        assert!(ready(&mut ring).is_empty());
        ring.watch(waker.as_fd(), 8).unwrap();
        assert_eq!(ready(&mut ring), [8], "ready when it is watched: reported at once");
    }

    /// A request with room for `room` bytes of 0xee.
    fn request(memory: &SharedMemory, room: u32) -> (Chain, outboard_frontend::Buffer) {
        let area = memory.allocate(4096, 4096).unwrap();
        area.fill(0).unwrap();
        let data = memory.allocate(8192, 4096).unwrap();
        data.fill(0xee).unwrap();
        let (layout, _) = QueueLayout::split_at(area.guest(), 16).unwrap();
        let features = 1 << 32;
        let mut driver = DriverQueue::new(layout, features, memory.view()).unwrap();
        // In two pieces, which do not touch.
        let pieces = [(data.guest(), 3), (data.guest() + 4096, room - 3)];
        driver.add(&[], &pieces, 0).unwrap();
        driver.publish();
        let mut device = DeviceQueue::new(layout, features, 0, memory.view()).unwrap();
        (device.pop().unwrap().unwrap(), data)
    }

    fn done(ring: &mut UringLoop) -> (Chain, io::Result<u32>) {
        let mut events = Vec::new();
        loop {
            ring.wait(None, &mut events).unwrap();
            if let Some(Event::Done { queue, token, chain, outcome }) = events.pop() {
                assert_eq!((queue, token), (3, 9));
                return (chain, outcome);
            }
        }
    }

    fn byte(data: &outboard_frontend::Buffer, at: usize) -> u8 {
        let mut byte = [0];
        data.read(at, &mut byte).unwrap();
        byte[0]
    }

    /// A disk that does not answer, and does in the end: whether the kernel can be told to give up or not.
    #[test]
    fn what_is_read_apart_comes_to_its_request_unless_that_was_left_behind() {
        let memory = SharedMemory::with_size(1 << 20).unwrap();
        for (apart, left) in [(true, false), (true, true), (false, false)] {
            let mut ring = UringLoop::new().unwrap();
            let (reader, writer) = rustix::pipe::pipe().unwrap();
            let file = ring.add_file(Arc::new(File::from(reader)));
            let (chain, data) = request(&memory, 5);
            let read = FileOp::Read { file, offset: u64::MAX };
            ring.submit(read, (3, 9), apart, chain).unwrap();
            ring.wait(Some(Duration::ZERO), &mut Vec::new()).unwrap();
            let flights = Flights { all: 1, into_memory: usize::from(!apart) };
            assert_eq!((ring.flying(3), ring.flying(2)), (flights, Flights::default()));
            if left {
                // As `cancel`, of an operation that cannot be cancelled.
                ring.flying.iter_mut().flatten().for_each(|flying| flying.abandoned = true);
            }
            rustix::io::write(&writer, b"abcd").unwrap();
            let (mut chain, outcome) = done(&mut ring);
            assert_eq!((outcome.unwrap(), chain.writable().len()), (4, 5), "still to be consumed");
            let found = [0, 1, 2, 4096, 4097].map(|at| byte(&data, at));
            assert_eq!(&found, if left { b"\xee\xee\xee\xee\xee" } else { b"abcd\xee" });
            assert_eq!(ring.flying(3), Flights::default());
        }
    }

    #[test]
    fn the_kernel_hears_of_a_few_operations_before_the_batch_is_over() {
        let memory = SharedMemory::with_size(1 << 20).unwrap();
        let mut ring = UringLoop::new().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        rustix::io::write(&writer, &[7; 5 * (FEW + 1)]).unwrap();
        let waiting = reader.try_clone().unwrap();
        let file = ring.add_file(Arc::new(File::from(reader)));
        let mut left = Vec::new();
        let mut kept = Vec::new();
        for _ in 0..=FEW {
            let (chain, data) = request(&memory, 5);
            kept.push(data);
            let read = FileOp::Read { file, offset: u64::MAX };
            ring.submit(read, (3, 9), false, chain).unwrap();
            left.push(usize::try_from(rustix::io::ioctl_fionread(&waiting).unwrap()).unwrap());
        }
        let mut wanted = vec![5 * (FEW + 1); FEW - 1];
        wanted.extend([5, 5]);
        assert_eq!(left, wanted);
    }

    #[test]
    fn what_is_cancelled_ends_and_other_queues_go_on() {
        let memory = SharedMemory::with_size(1 << 20).unwrap();
        let mut ring = UringLoop::new().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let file = ring.add_file(Arc::new(File::from(reader)));
        let read = FileOp::Read { file, offset: u64::MAX };
        let (chain, mine) = request(&memory, 5);
        ring.submit(read, (3, 9), false, chain).unwrap();
        let (chain, theirs) = request(&memory, 5);
        ring.submit(read, (4, 9), false, chain).unwrap();
        ring.wait(Some(Duration::ZERO), &mut Vec::new()).unwrap();
        ring.cancel(3);
        assert!(done(&mut ring).1.is_err());
        assert_eq!((ring.flying(3).all, ring.flying(4).all), (0, 1));
        rustix::io::write(&writer, b"abcd").unwrap();
        let mut events = Vec::new();
        while events.is_empty() {
            ring.wait(None, &mut events).unwrap();
        }
        assert_eq!((byte(&mine, 0), byte(&theirs, 0)), (0xee, b'a'));
    }

    #[test]
    fn r20_a_hung_up_pipe_ends_its_watch_instead_of_spinning() {
        let mut ring = UringLoop::new().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        ring.watch(reader.as_fd(), 7).unwrap();
        drop(writer);
        assert!(ready(&mut ring).len() <= 1);
        for _ in 0..3 {
            assert!(ready(&mut ring).is_empty());
        }
    }

    #[test]
    fn c25_more_watches_than_the_ring_has_entries_are_all_served() {
        let mut ring = UringLoop::new().unwrap();
        let wakers: Vec<_> = (0..400u64).map(|_| Waker::new().unwrap()).collect();
        for (token, waker) in (0..).zip(&wakers) {
            ring.watch(waker.as_fd(), token).unwrap();
        }
        wakers.iter().for_each(Waker::wake);
        let mut seen = Vec::new();
        while seen.len() < wakers.len() {
            let more = ready(&mut ring);
            assert!(!more.is_empty(), "{} of {} reported", seen.len(), wakers.len());
            seen.extend(more);
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..400).collect::<Vec<_>>());
    }
}
