//! Messages of the dirty log: SET_LOG_BASE, SET_LOG_FD, and ring addresses with the log flag (vhost-user,
//! "Migration").

use std::os::fd::AsFd;

use outboard_protocol::payload::{Log, VRING_F_LOG, VringAddr};
use outboard_protocol::{Answer, Request};
use outboard_queue::QueueLayout;

use super::{Connection, duplicate};
use crate::error::Error;
use crate::memory::SharedMemory;

impl Connection {
    /// SET_LOG_BASE: the log is the `size` bytes of `file` from `offset` on; the descriptor stays the caller's.
    ///
    /// # Errors
    /// As [`Self::call`]. The message has no form for a refusal: any answer is taken for a good one.
    pub fn set_log_base(&mut self, file: impl AsFd, size: u64, offset: u64) -> Result<(), Error> {
        let log = Log { mmap_size: size, mmap_offset: offset };
        let fd = duplicate(file.as_fd())?;
        match self.answer(Request::SetLogBase(log, fd))? {
            Answer::LogBase => Ok(()),
            _ => Err(Error::WrongAnswer { request: "SET_LOG_BASE" }),
        }
    }

    /// SET_LOG_FD: an eventfd that is signalled after writes were noted; it stays the caller's.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn set_log_fd(&mut self, fd: impl AsFd) -> Result<(), Error> {
        let fd = duplicate(fd.as_fd())?;
        self.acknowledged(Request::SetLogFd(fd))
    }

    /// SET_VRING_ADDR as [`Self::set_vring_addr`], with writes to the used ring noted at this guest-physical address, or
    /// not.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn set_vring_addr_logged(
        &mut self,
        index: u16,
        layout: &QueueLayout,
        log: Option<u64>,
    ) -> Result<(), Error> {
        self.acknowledged(Request::SetVringAddr(VringAddr {
            index: u32::from(index),
            flags: if log.is_some() { VRING_F_LOG } else { 0 },
            desc: SharedMemory::user_address(layout.desc),
            used: SharedMemory::user_address(layout.used),
            avail: SharedMemory::user_address(layout.avail),
            log_guest_addr: log.unwrap_or(0),
        }))
    }

    /// As [`Self::set_vring_addr_logged`], for a ring at these I/O addresses.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn set_vring_addr_io(
        &mut self,
        index: u16,
        layout: &QueueLayout,
        log: Option<u64>,
    ) -> Result<(), Error> {
        let &QueueLayout { desc, used, avail, .. } = layout;
        self.acknowledged(Request::SetVringAddr(VringAddr {
            index: u32::from(index),
            flags: if log.is_some() { VRING_F_LOG } else { 0 },
            desc,
            used,
            avail,
            log_guest_addr: log.unwrap_or(0),
        }))
    }
}
