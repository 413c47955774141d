//! Kicks, calls and errors: where they come from and go to.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use outboard_protocol::Notifier;
use rustix::io::Errno;

use super::{Device, size_of};

impl Device {
    /// Descriptors to sleep on.
    pub(crate) fn kicks(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.rings.iter().filter(|ring| ring.queue.is_some()).filter_map(|ring| match &ring.kick {
            Some(Notifier::Fd(fd)) => Some(fd.as_fd()),
            _ => None,
        })
    }

    /// Whether a ring has no kick descriptor.
    pub(crate) fn polls(&self) -> bool {
        !self.is("ignores-poll")
            && self.rings.iter().any(|ring| matches!(ring.kick, Some(Notifier::Poll)))
    }

    pub(super) fn set_kick(&mut self, index: u16, kick: Notifier<OwnedFd>) {
        let early = !self.backend.ring(index).is_some_and(outboard_protocol::Ring::is_configured);
        self.rings[usize::from(index)].forgotten = early && self.is("forgets-early-kicks");
        let runs = self.rings[usize::from(index)].queue.is_some();
        if runs && self.is("keeps-old-kick") {
            return;
        }
        if let (true, Notifier::Fd(kick)) = (self.is("reads-kicks-at-once"), &kick) {
            match readable(kick).then(|| rustix::io::read(kick, &mut [0; 8])) {
                None if rustix::io::read(kick, &mut [0; 0]) == Err(Errno::INVAL) => {
                    std::process::abort()
                }
                _ => {}
            }
        }
        let old = self.rings[usize::from(index)].kick.replace(kick);
        if let (true, Some(Notifier::Fd(old))) = (self.is("leaks-kicks"), old) {
            self.kept.push(old);
        }
    }

    pub(super) fn set_call(&mut self, index: u16, call: Notifier<OwnedFd>) {
        let ring = &mut self.rings[usize::from(index)];
        let (runs, had) = (ring.queue.is_some(), ring.call.is_some());
        let given = matches!(call, Notifier::Fd(_));
        let swaps = given && self.fault == "call-swapped";
        let keeps = runs && had && swaps;
        let late = ring.calls == 0 && self.fault == "call-late";
        let never = runs && !had && late;
        ring.calls += u32::from(given);
        let polls = matches!(call, Notifier::Poll) && self.fault == "calls-although-polled";
        if keeps || never || polls {
            return;
        }
        let old = std::mem::replace(&mut ring.call, descriptor(call));
        if self.is("leaks-calls") {
            self.kept.extend(old);
        }
    }

    /// Kicks that came in.
    pub(crate) fn serve_rings(&mut self) {
        self.perform_held();
        for index in 0..self.rings.len() {
            let kick = match &self.rings[index].kick {
                Some(Notifier::Fd(kick)) if readable(kick) => {
                    let mut count = [0; 8];
                    Some(rustix::io::read(kick, &mut count).map(|_| u64::from_ne_bytes(count)))
                }
                _ => None,
            };
            match kick {
                None | Some(Err(Errno::AGAIN)) => {}
                Some(Ok(count @ 1..)) => self.kicked(index, count),
                // What is no eventfd kicks no more.
                Some(_) if self.is("spins-on-bad-kicks") => {}
                Some(_) if self.aborts_at_kick(index) => std::process::abort(),
                Some(_) => self.rings[index].kick = None,
            }
            if matches!(self.rings[index].kick, Some(Notifier::Poll)) {
                self.look(Some(index));
            }
        }
    }

    /// A kick that is no eventfd ends the process, if it is of one kind.
    fn aborts_at_kick(&self, index: usize) -> bool {
        use rustix::fs::FileType as T;
        let Some(Notifier::Fd(kick)) = &self.rings[index].kick else { return false };
        let kind = rustix::fs::fstat(kick).map(|stat| T::from_raw_mode(stat.st_mode));
        let minded = match self.fault.as_str() {
            "kick-closed-pipe" => T::Fifo,
            "kick-file" => T::RegularFile,
            "kick-socket" => T::Socket,
            "kick-zero" => T::CharacterDevice,
            _ => return false,
        };
        kind == Ok(minded)
    }

    /// Remembers that the memory has had contents.
    pub(super) fn look_for_holes(&self) {
        if self.is("minds-holes") {
            let full = |file: &OwnedFd| size_of(file) > 0 && !is_hole(file);
            self.trap.set(self.trap.get() || self.kept.iter().any(full));
        }
    }

    /// One ring was kicked, so often.
    fn kicked(&mut self, index: usize, count: u64) {
        let ring = &mut self.rings[index];
        ring.kicks = ring.kicks.saturating_add(count);
        let (huge, tired) = (count > i64::MAX.unsigned_abs(), ring.kicks > 5000);
        match self.fault.as_str() {
            "takes-huge-kicks-for-errors" if huge => {
                ring.kick = None;
                return;
            }
            "tires-of-kicks" if tired && !huge => {
                ring.kick = None;
                return;
            }
            "trusts-sizes" if self.kept.iter().any(|file| size_of(file) == 0) => {
                let _ = rustix::process::kill_process(
                    rustix::process::getpid(),
                    rustix::process::Signal::BUS,
                );
            }
            "minds-holes" if self.trap.get() && self.kept.iter().any(is_hole) => {
                std::process::abort();
            }
            "finishes-nothing" if ring.kicks > 50 => {
                let Some(queue) = &ring.queue else { return };
                let at = queue.layout().used + 2;
                let mut used = [0; 2];
                let _ = queue.view().read(at, &mut used);
                let next = u16::from_le_bytes(used).wrapping_add(1);
                let _ = queue.view().write(at, &next.to_le_bytes());
            }
            _ => {}
        }
        self.look(Some(index));
        if self.is("calls-on-every-kick") {
            self.call(index);
        }
    }

    pub(super) fn call(&self, index: usize) {
        let Some(call) = &self.rings[index].call else { return };
        let nonblocking = || {
            rustix::fs::fcntl_getfl(call)
                .is_ok_and(|flags| flags.contains(rustix::fs::OFlags::NONBLOCK))
        };
        if self.is("waits-to-call") && nonblocking() {
            let mut set = [rustix::event::PollFd::new(call, rustix::event::PollFlags::OUT)];
            let _ = rustix::event::poll(&mut set, None);
        }
        if self.is("blocks-on-calls") {
            let _ = rustix::io::write(call, &1u64.to_ne_bytes());
            return;
        }
        let minded = match self.fault.as_str() {
            "call-closed-pipe" => Some(Errno::PIPE),
            "call-dev-full" => Some(Errno::NOSPC),
            "call-read-only" => Some(Errno::BADF),
            _ => None,
        };
        if minded.is_some() & (add_one(call).err() == minded) {
            std::process::abort();
        }
    }
}

pub(super) fn descriptor(notifier: Notifier<OwnedFd>) -> Option<OwnedFd> {
    match notifier {
        Notifier::Fd(fd) => Some(fd),
        Notifier::Poll => None,
    }
}

/// Whether a file has a size and no contents.
fn is_hole(file: &OwnedFd) -> bool {
    rustix::fs::fstat(file).is_ok_and(|stat| stat.st_size > 0 && stat.st_blocks == 0)
}

pub(super) fn readable(fd: &OwnedFd) -> bool {
    let mut set = [rustix::event::PollFd::new(fd, rustix::event::PollFlags::IN)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(rustix::event::poll(&mut set, Some(&now)), Ok(1..))
}

/// Signals without ever blocking.
pub(super) fn add_one(fd: &OwnedFd) -> Result<(), Errno> {
    let mut set = [rustix::event::PollFd::new(fd, rustix::event::PollFlags::OUT)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    match rustix::event::poll(&mut set, Some(&now)) {
        Ok(1..) => rustix::io::write(fd, &1u64.to_ne_bytes()).map(|_| ()),
        _ => Ok(()),
    }
}
