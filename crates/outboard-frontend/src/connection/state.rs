//! The transfer of device state, over a pipe of ours or a descriptor of the back-end's (vhost-user,
//! "Migrating back-end state"; messages 42 and 43).
//!
//! Invariant: the back-end is not trusted: the state that it sends is bounded in size and time, and no
//! read or write here waits for it without a bound.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use outboard_protocol::{Answer, Request, StateDirection};
use rustix::event::PollFlags;
use rustix::io::{Errno, ReadWriteFlags, preadv2, pwritev2};
use rustix::pipe::{PipeFlags, pipe_with};

use super::{Connection, deadline};
use crate::error::Error;
use crate::socket::wait_fd;

/// The longest device state that is taken, in bytes.
const LONGEST: usize = 256 << 20;

impl Connection {
    /// SET_DEVICE_STATE_FD: a descriptor of the back-end, if that is to be used instead.
    ///
    /// # Errors
    /// [`Error::Refused`] with the back-end's word, else as [`Self::call`].
    pub fn set_device_state_fd(
        &mut self,
        direction: StateDirection,
        fd: OwnedFd,
    ) -> Result<Option<OwnedFd>, Error> {
        const REQUEST: &str = "SET_DEVICE_STATE_FD";
        match self.answer(Request::SetDeviceStateFd(direction, fd))? {
            Answer::DeviceState(Ok(theirs)) => Ok(theirs),
            Answer::DeviceState(Err(code)) => Err(Error::Refused { request: REQUEST, code }),
            _ => Err(Error::WrongAnswer { request: REQUEST }),
        }
    }

    /// CHECK_DEVICE_STATE: waits for the end of the transfer.
    ///
    /// # Errors
    /// [`Error::Refused`] when it failed, else as [`Self::call`].
    pub fn check_device_state(&mut self) -> Result<(), Error> {
        self.acknowledged(Request::CheckDeviceState)
    }

    /// Saves the state of a device without running queues, over a pipe.
    ///
    /// # Errors
    /// As [`Self::set_device_state_fd`] and [`Self::check_device_state`]; [`Error::Snapshot`] when the
    /// state has no end.
    pub fn save_state(&mut self) -> Result<Vec<u8>, Error> {
        let (ours, theirs) = pipe()?;
        let ours = self.set_device_state_fd(StateDirection::Save, theirs)?.unwrap_or(ours);
        let bytes = read_to_end(&ours, self.timeout);
        drop(ours);
        // The device's own word first: it knows why nothing came.
        self.check_device_state()?;
        bytes
    }

    /// Loads a state into a device without running queues, over a pipe.
    ///
    /// # Errors
    /// As [`Self::set_device_state_fd`] and [`Self::check_device_state`].
    pub fn load_state(&mut self, state: &[u8]) -> Result<(), Error> {
        let (theirs, ours) = pipe()?;
        let ours = self.set_device_state_fd(StateDirection::Load, theirs)?.unwrap_or(ours);
        let written = write_all(&ours, state, self.timeout);
        drop(ours);
        // A device that has seen enough closes its end, and says why here.
        self.check_device_state()?;
        written
    }
}

/// The read end and the write end.
fn pipe() -> Result<(OwnedFd, OwnedFd), Error> {
    pipe_with(PipeFlags::CLOEXEC).map_err(|errno| Error::host("pipe", errno))
}

fn read_to_end(from: &OwnedFd, time: Duration) -> Result<Vec<u8>, Error> {
    let until = deadline(time);
    let mut bytes = Vec::new();
    let mut piece = vec![0; 64 << 10];
    while bytes.len() <= LONGEST {
        match patiently(from, PollFlags::IN, until, || {
            let into = &mut [IoSliceMut::new(&mut piece)];
            preadv2(from, into, u64::MAX, ReadWriteFlags::NOWAIT)
        })? {
            0 => return Ok(bytes),
            count => bytes.extend_from_slice(piece.get(..count).unwrap_or_default()),
        }
    }
    Err(Error::Snapshot(format!("a device state of more than {LONGEST} bytes")))
}

fn write_all(to: &OwnedFd, bytes: &[u8], time: Duration) -> Result<(), Error> {
    let until = deadline(time);
    let mut rest = bytes;
    while !rest.is_empty() {
        let count = patiently(to, PollFlags::OUT, until, || {
            let piece = [IoSlice::new(rest.get(..64 << 10).unwrap_or(rest))];
            pwritev2(to, &piece, u64::MAX, ReadWriteFlags::NOWAIT)
        })?;
        rest = rest.get(count..).unwrap_or_default();
    }
    Ok(())
}

fn patiently(
    fd: &OwnedFd,
    flags: PollFlags,
    until: Instant,
    mut attempt: impl FnMut() -> Result<usize, Errno>,
) -> Result<usize, Error> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::Snapshot("a device state that never ends".to_owned()));
        }
        let ready = wait_fd(fd.as_fd(), flags, left);
        if !ready.map_err(|errno| Error::host("poll", errno))? {
            continue;
        }
        match attempt() {
            Ok(count) => return Ok(count),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(errno) => return Err(Error::host("device state", errno)),
        }
    }
}
