//! TAP interfaces of the host: the ioctls of `/dev/net/tun` (linux/if_tun.h).
//!
//! Invariants: every packet on a descriptor from here stands behind a header of [`Tap::HEADER`] bytes, as
//! virtio 1.3 §5.1.6 has it; no call waits.
#![expect(unsafe_code, reason = "ioctls of TUN; rustix has none of them")]

use std::ffi::{CString, c_void};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use rustix::fs::OFlags;
use rustix::io::Errno;

const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_ATTACH_QUEUE: u16 = 0x0200;
const IFF_DETACH_QUEUE: u16 = 0x0400;

/// `_IOW('T', 202, int)`; its argument is a `struct ifreq`.
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
/// `_IOR('T', 210, unsigned int)`; its argument is a `struct ifreq`.
const TUNGETIFF: libc::Ioctl = 0x8004_54d2;
/// `_IOW('T', 208, unsigned int)`; its argument is the number itself.
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
/// `_IOW('T', 216, int)`.
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;
/// `_IOW('T', 217, int)`; its argument is a `struct ifreq`.
const TUNSETQUEUE: libc::Ioctl = 0x4004_54d9;

/// Bytes of a name, with the zero at its end (IFNAMSIZ).
const NAME: usize = 16;

/// `struct ifreq`: the name, then the flags.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Request {
    name: [u8; NAME],
    flags: u16,
    rest: [u8; 22],
}

impl Request {
    fn new(name: &str, flags: u16) -> io::Result<Self> {
        let mut request = Self { name: [0; NAME], flags, rest: [0; 22] };
        let room = request.name.get_mut(..name.len()).filter(|room| room.len() < NAME);
        let room = room.ok_or_else(|| io::Error::from(Errno::NAMETOOLONG))?;
        room.copy_from_slice(name.as_bytes());
        Ok(request)
    }

    fn name(&self) -> String {
        let name = self.name.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(name).into_owned()
    }
}

/// One queue of a TAP interface. Dropped, the queue is gone; with the last one an interface that was made
/// for it.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    /// How it was attached.
    flags: u16,
    /// What was set last, for an interface that comes back.
    offloads: AtomicU32,
    /// Packets come to this queue, as far as we have said.
    attached: AtomicBool,
}

impl Tap {
    /// Bytes in front of each packet.
    pub const HEADER: usize = 12;

    /// Attaches a queue to the interface `name`, which is made if it is not there and may be made; an empty
    /// name makes one with a name of its own. An interface that is made here can have several queues, also of
    /// several processes, one of which follows the other. `several`: one with a single queue will not do.
    ///
    /// # Errors
    /// There is no `/dev/net/tun`, the name is too long, this process may not, somebody else has it.
    pub fn open(name: &str, several: bool) -> io::Result<Self> {
        let attach = |several: bool| {
            let flags = OFlags::NONBLOCK.bits().cast_signed();
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(flags)
                .open("/dev/net/tun")?;
            let many = if several { IFF_MULTI_QUEUE } else { 0 };
            let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | many;
            let mut request = Request::new(name, flags)?;
            with_request(file.as_fd(), TUNSETIFF, &mut request)?;
            Self::ready(file, request.name(), flags)
        };
        match attach(true) {
            // Somebody has made it with one queue, and one is enough.
            Err(error) if !several && is(&error, Errno::INVAL) => attach(false),
            result => result,
        }
    }

    /// Takes a descriptor that somebody else has attached.
    ///
    /// # Errors
    /// It is no TAP interface, or has no header in front of its packets.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let mut request = Request::new("", 0)?;
        with_request(fd.as_fd(), TUNGETIFF, &mut request)?;
        let needed = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        if request.flags & needed != needed {
            let why = "no TAP interface with IFF_NO_PI and IFF_VNET_HDR";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        rustix::io::ioctl_fionbio(&fd, true)?;
        let flags = request.flags & (needed | IFF_MULTI_QUEUE);
        Self::ready(File::from(fd), request.name(), flags)
    }

    fn ready(file: File, name: String, flags: u16) -> io::Result<Self> {
        let (offloads, attached) = (AtomicU32::new(0), AtomicBool::new(true));
        let tap = Self { file, name, flags, offloads, attached };
        tap.have_headers()?;
        Ok(tap)
    }

    /// [`Tap::HEADER`] bytes in front of each packet.
    fn have_headers(&self) -> io::Result<()> {
        let mut size = libc::c_int::try_from(Self::HEADER).unwrap_or(libc::c_int::MAX);
        let argument: *mut c_void = (&raw mut size).cast();
        // SAFETY: TUNSETVNETHDRSZ reads one int.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETVNETHDRSZ, argument) })
    }

    /// After its interface was deleted: attaches the queue to one that somebody has made again under the same name,
    /// with the offloads as they were. It makes none.
    ///
    /// # Errors
    /// There is none, or it is another kind of interface, or this process may not.
    pub fn again(&self) -> io::Result<()> {
        let name = CString::new(self.name.as_str()).map_err(io::Error::other)?;
        // SAFETY: the name is a string with a zero at its end, and is only read.
        if unsafe { libc::if_nametoindex(name.as_ptr()) } == 0 {
            return Err(io::Error::last_os_error());
        }
        let attach = |flags| {
            let outcome = Request::new(&self.name, flags)
                .and_then(|mut request| with_request(self.file.as_fd(), TUNSETIFF, &mut request));
            match outcome {
                // It was never gone, or somebody else was as quick.
                Err(error) if is(&error, Errno::EXIST) => Ok(()),
                outcome => outcome,
            }
        };
        match attach(self.flags) {
            // Made with one queue where the old one had several, or the other way round.
            Err(error) if is(&error, Errno::INVAL) => attach(self.flags ^ IFF_MULTI_QUEUE)?,
            outcome => outcome?,
        }
        self.have_headers()?;
        self.set_offloads(self.offloads.load(Ordering::Relaxed))?;
        match self.is_attached() {
            true => Ok(()),
            false => self.attach(false),
        }
    }

    /// Whether packets come to this queue, as far as [`Tap::attach`] was told.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.attached.load(Ordering::Relaxed)
    }

    /// The interface's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which offloads who reads here understands: `TUN_F_*`, for all queues of the interface.
    ///
    /// # Errors
    /// The kernel does not know one of them; nothing has changed.
    pub fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        // SAFETY: the argument is a number, not an address.
        check(unsafe {
            libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(offloads))
        })?;
        self.offloads.store(offloads, Ordering::Relaxed);
        Ok(())
    }

    /// Whether packets come to this queue: one of an interface with several.
    ///
    /// # Errors
    /// It is so already, or the interface has one queue only.
    pub fn attach(&self, comes: bool) -> io::Result<()> {
        let flags = if comes { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
        with_request(self.file.as_fd(), TUNSETQUEUE, &mut Request::new("", flags)?)?;
        self.attached.store(comes, Ordering::Relaxed);
        Ok(())
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn with_request(fd: BorrowedFd<'_>, number: libc::Ioctl, request: &mut Request) -> io::Result<()> {
    let argument: *mut c_void = std::ptr::from_mut(request).cast();
    // SAFETY: each request that comes here reads, and may write, one `struct ifreq`, whose size this has.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), number, argument) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result >= 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

const _: () = assert!(size_of::<Request>() == size_of::<libc::ifreq>());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_too_long_is_refused_before_the_kernel_cuts_it() {
        assert!(Request::new("fifteen_letters", 0).is_ok_and(|it| it.name() == "fifteen_letters"));
        assert!(Request::new("sixteen_letters_", 0).is_err());
    }

    #[test]
    fn a_descriptor_that_is_no_interface_is_refused() {
        let file = File::open("/dev/null").expect("there");
        assert!(Tap::from_fd(file.into()).is_err());
    }
}
