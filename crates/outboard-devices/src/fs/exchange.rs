//! A request and the room for its reply, wherever it is served: on its queue's thread or on another one.
//!
//! Invariant: what is too short for the request is EINVAL, and nothing of it was taken or written.

use std::fs::File;
use std::io;

use outboard::{Deferred, Request, ShortBuffer};
use rustix::io::Errno;
use virtiofsd::filesystem::{ZeroCopyReader, ZeroCopyWriter};
use virtiofsd::oslib::{ReadvFlags, WritevFlags};

/// See the module.
pub(super) trait Exchange {
    /// Bytes of the request that are left.
    fn left(&mut self) -> u64;
    /// Takes bytes of the request.
    fn take(&mut self, to: &mut [u8]) -> io::Result<()>;
    /// Writes what is left to a file, in one call.
    fn take_to_file(&mut self, file: &File, at: Option<u64>) -> io::Result<usize>;
    /// Bytes that the reply may have in front of what is set aside.
    fn room(&mut self) -> u64;
    /// Sets the last bytes of the room aside, in place of what was before.
    fn set_aside(&mut self, bytes: u64) -> io::Result<()>;
    /// Writes a part of the reply.
    fn put(&mut self, from: &[u8]) -> io::Result<()>;
    /// Fills what was set aside from a file, in one call.
    fn put_from_file(&mut self, file: &File, at: u64) -> io::Result<usize>;
}

fn short(_: ShortBuffer) -> io::Error {
    Errno::INVAL.into()
}

macro_rules! exchange {
    ($($kind:ty),*) => {$(
        impl Exchange for $kind {
            fn left(&mut self) -> u64 {
                self.readable().len()
            }

            fn take(&mut self, to: &mut [u8]) -> io::Result<()> {
                self.readable().read_exact(to).map_err(short)
            }

            fn take_to_file(&mut self, file: &File, at: Option<u64>) -> io::Result<usize> {
                match at {
                    Some(at) => self.readable().write_to_file_at(file, at),
                    None => self.readable().append_to_file(file),
                }
            }

            fn room(&mut self) -> u64 {
                self.writable().len()
            }

            fn set_aside(&mut self, bytes: u64) -> io::Result<()> {
                let bytes = usize::try_from(bytes).map_err(|_| Errno::INVAL)?;
                self.reserve_tail(bytes).map_err(short)
            }

            fn put(&mut self, from: &[u8]) -> io::Result<()> {
                self.writable().write_all(from).map_err(short)
            }

            fn put_from_file(&mut self, file: &File, at: u64) -> io::Result<usize> {
                self.tail().read_from_file_at(file, at)
            }
        }
    )*};
}

exchange!(Request<'_>, Deferred);

/// The data of a WRITE, on its way into a file without a copy of ours.
pub(super) struct Data<'a>(pub(super) &'a mut dyn Exchange);

impl ZeroCopyReader for Data<'_> {
    fn write_to_file_at(
        &mut self,
        file: &File,
        count: usize,
        offset: u64,
        flags: Option<WritevFlags>,
    ) -> io::Result<usize> {
        let append = flags.is_some_and(|flags| flags.contains(WritevFlags::RWF_APPEND));
        moved(count, offset, |at| self.0.take_to_file(file, (!append).then_some(at)))
    }
}

/// The data of a READ, on its way out of a file.
pub(super) struct Room<'a>(pub(super) &'a mut dyn Exchange);

impl ZeroCopyWriter for Room<'_> {
    fn read_from_file_at(
        &mut self,
        file: &File,
        count: usize,
        offset: u64,
        _flags: Option<ReadvFlags>,
    ) -> io::Result<usize> {
        moved(count, offset, |at| self.0.put_from_file(file, at))
    }
}

/// Goes on until all is moved or nothing more is; what was moved before an error counts.
fn moved(
    count: usize,
    offset: u64,
    mut step: impl FnMut(u64) -> io::Result<usize>,
) -> io::Result<usize> {
    let mut done = 0;
    while done < count {
        let at = offset.checked_add(done as u64).ok_or(Errno::FBIG)?;
        match step(at) {
            Ok(0) => break,
            Ok(more) => done += more,
            Err(error) if done == 0 => return Err(error),
            Err(_) => break,
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_goes_on_until_it_is_whole_and_keeps_what_it_had_before_an_error() {
        let mut asked = Vec::new();
        let whole = moved(10, 100, |at| {
            asked.push(at);
            Ok(4.min(110 - usize::try_from(at).expect("small")))
        });
        assert_eq!((whole.expect("moved"), asked), (10, vec![100, 104, 108]));
        let cut = moved(10, 0, |at| if at < 5 { Ok(5) } else { Err(Errno::NOSPC.into()) });
        assert_eq!(cut.expect("in part"), 5);
        let none = moved(10, 0, |_| Err(Errno::NOSPC.into())).expect_err("nothing was moved");
        assert_eq!(none.raw_os_error(), Some(Errno::NOSPC.raw_os_error()));
        assert!(moved(10, u64::MAX, |_| Ok(1)).is_err(), "behind the last offset");
    }
}
