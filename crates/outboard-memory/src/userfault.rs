//! Page faults served by somebody else: userfaultfd, for postcopy (userfaultfd(2); vhost-user,
//! "Migration: postcopy").
//!
//! ```text
//!  access to a page that has not come yet ─▶ the thread waits ─▶ event on the descriptor ─▶ front-end
//!                                                 ▲                                          brings the page
//!                                                 └──────────────── UFFDIO_WAKE ◀────────────┘
//! ```
//! Why our own: the crate for it runs bindgen when it is built; these are four calls. Invariant: a region is
//! registered before anything touches it, and a front-end that goes away in mid-fault leaves poison, not zeros that
//! look like data.
#![expect(unsafe_code, reason = "ioctls of userfaultfd; rustix has none of them")]

use std::ffi::c_void;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::mm::{UserfaultfdFlags, userfaultfd};

use crate::error::MapError;
use crate::mapping::page_size;
use crate::num::{index, wide};
use crate::region::Region;

/// linux/userfaultfd.h: the version of the interface.
const API: u64 = 0xaa;
const REGISTER_MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;

/// `_IOWR(0xAA, 0x3f, struct uffdio_api)`.
const UFFDIO_API: libc::Ioctl = ioctl(3, 24, 0x3f);
/// `_IOWR(0xAA, 0x00, struct uffdio_register)`.
const UFFDIO_REGISTER: libc::Ioctl = ioctl(3, 32, 0x00);
/// `_IOR(0xAA, 0x02, struct uffdio_range)`.
const UFFDIO_WAKE: libc::Ioctl = ioctl(2, 16, 0x02);
/// `_IOWR(0xAA, 0x08, struct uffdio_poison)`.
const UFFDIO_POISON: libc::Ioctl = ioctl(3, 32, 0x08);

const fn ioctl(direction: libc::Ioctl, size: libc::Ioctl, number: libc::Ioctl) -> libc::Ioctl {
    direction << 30 | size << 16 | 0xaa << 8 | number
}

/// A userfaultfd of this process.
#[derive(Debug)]
pub struct UserFault(OwnedFd);

impl UserFault {
    /// Makes one that serves faults of the kernel too: requests are carried out by it.
    ///
    /// # Errors
    /// The system refuses: it takes CAP_SYS_PTRACE, or `vm.unprivileged_userfaultfd`.
    pub fn new() -> Result<Self, MapError> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: a new descriptor; no memory is registered with it yet.
        let fd = unsafe { userfaultfd(flags) };
        let fd = Self(fd.map_err(|errno| MapError::host("userfaultfd", errno))?);
        call(&fd.0, UFFDIO_API, &mut [API, 0, 0])
            .map_err(|errno| MapError::host("ioctl(UFFDIO_API)", errno))?;
        Ok(fd)
    }

    /// Whether this process may have one.
    #[must_use]
    pub fn is_available() -> bool {
        Self::new().is_ok()
    }

    /// Another descriptor of it, for whoever serves the faults.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }

    /// From now on a touch of a page of `region` that has not come yet is an event.
    ///
    /// # Errors
    /// Its kind of file cannot be served in this way.
    pub fn register(&self, region: &Region) -> Result<(), MapError> {
        let (start, length) = region.mapped();
        region.small_pages()?;
        let mut argument = [wide(start), wide(length), REGISTER_MODE_MISSING, 0];
        call(&self.0, UFFDIO_REGISTER, &mut argument)
            .map_err(|errno| MapError::host("ioctl(UFFDIO_REGISTER)", errno))
    }

    /// Nobody brings pages any more: what is missing of `regions` becomes an error of whoever touches it, and who waits
    /// goes on with that error. Without poison (Linux before 6.6) the region counts as lost, which is found before
    /// anything is published.
    pub fn abandon(self, regions: &[Arc<Region>]) {
        let page = index(page_size());
        for region in regions {
            let (start, length) = region.mapped();
            region.poison();
            for at in (start..start.saturating_add(length)).step_by(page) {
                let mut argument = [wide(at), wide(page), 0, 0];
                match call(&self.0, UFFDIO_POISON, &mut argument) {
                    // A page that is there.
                    Ok(()) | Err(Errno::EXIST | Errno::AGAIN) => {}
                    Err(_) => break,
                }
            }
            let mut argument = [wide(start), wide(length)];
            // Poisoning wakes by itself; without it this does.
            let _ = call(&self.0, UFFDIO_WAKE, &mut argument);
        }
    }
}

/// The other end: reads the faults of a back-end and wakes it.
#[derive(Debug)]
pub struct FaultServer(OwnedFd);

impl FaultServer {
    /// Takes what POSTCOPY_ADVISE returned.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// The address of the next fault, in the back-end's space; `None`: there is none now.
    ///
    /// # Errors
    /// The descriptor is no userfaultfd, or its process is gone.
    pub fn next_fault(&self) -> io::Result<Option<u64>> {
        // struct uffd_msg: u8 event, …, at 8 u64 flags, at 16 u64 address.
        let mut message = [0; 32];
        match rustix::io::readv(&self.0, &mut [IoSliceMut::new(&mut message)]) {
            Ok(32) if message.first() == Some(&EVENT_PAGEFAULT) => {
                let address = message.get(16..24).and_then(|bytes| bytes.try_into().ok());
                Ok(address.map(u64::from_ne_bytes))
            }
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The pages of this range of the back-end's space are there: who waits for them goes on.
    ///
    /// # Errors
    /// The range is not the back-end's.
    pub fn wake(&self, address: u64, length: u64) -> io::Result<()> {
        Ok(call(&self.0, UFFDIO_WAKE, &mut [address, length])?)
    }
}

impl AsFd for FaultServer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// One ioctl whose argument is a struct of `N` words.
fn call<const N: usize>(
    fd: &OwnedFd,
    request: libc::Ioctl,
    argument: &mut [u64; N],
) -> Result<(), Errno> {
    let argument: *mut c_void = argument.as_mut_ptr().cast();
    // SAFETY: each request above reads and writes one struct of exactly the words it is called with (the size is part of
    // the request number); none of them changes memory that Rust has references to: the ranges are guest memory.
    if unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) } >= 0 {
        return Ok(());
    }
    let errno = io::Error::last_os_error().raw_os_error();
    Err(errno.map_or(Errno::IO, Errno::from_raw_os_error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_numbers_are_those_of_the_kernels_header() {
        assert_eq!(UFFDIO_API, 0xc018_aa3f);
        assert_eq!(UFFDIO_REGISTER, 0xc020_aa00);
        assert_eq!(UFFDIO_WAKE, 0x8010_aa02);
        assert_eq!(UFFDIO_POISON, 0xc020_aa08);
    }
}
