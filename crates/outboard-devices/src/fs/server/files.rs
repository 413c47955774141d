//! Operations on open files.
//!
//! Invariant: data goes between guest memory and the file in one step; a WRITE carries as many bytes as it
//! says, a READ has room for as many as it asks for.

use std::io;

use rustix::fs::OFlags;
use rustix::io::Errno;
use virtiofsd::filesystem::FileSystem;
use virtiofsd::fuse::{
    CopyfilerangeIn, CreateIn, EntryOut, FallocateIn, FlushIn, FsyncIn, LseekIn, LseekOut,
    OPEN_KILL_SUIDGID, OpenIn, OpenOptions, OpenOut, READ_LOCKOWNER, RELEASE_FLOCK_UNLOCK,
    RELEASE_FLUSH, ReadIn, ReleaseIn, WRITE_CACHE, WRITE_KILL_PRIV, WRITE_LOCKOWNER, WriteIn,
    WriteOut,
};

use super::super::ledger::Note;
use super::again::Bytes;
use super::{Answer, Call, MOST_DATA, REPLY, Server, Words, component, extensions, word};
use crate::fs::exchange::{Data, Room};

/// The reply to OPEN and its kind.
pub(super) fn opened(handle: Option<u64>, options: OpenOptions) -> OpenOut {
    OpenOut { fh: handle.unwrap_or(0), open_flags: options.bits(), ..OpenOut::default() }
}

/// The reply to what moves bytes.
fn written(count: usize) -> WriteOut {
    WriteOut { size: u32::try_from(count).unwrap_or(u32::MAX), ..WriteOut::default() }
}

impl<F: FileSystem> Server<F> {
    /// The reply to RELEASE and RELEASEDIR.
    pub(super) fn closed(
        &self,
        call: &Call<'_>,
        handle: u64,
        done: io::Result<()>,
    ) -> io::Result<Answer> {
        match done {
            Err(error) if !call.did(&error, Errno::BADF) => return Err(error),
            _ => {}
        }
        self.note(&[Note::Closed { handle }]);
        Ok(Answer::done())
    }

    /// Appends what does not stand there yet.
    fn append_again(
        &self,
        call: &mut Call<'_>,
        handle: u64,
        offset: u64,
        size: u32,
    ) -> io::Result<Answer> {
        let mut bytes = vec![0; size as usize];
        call.exchange.take(&mut bytes)?;
        if self.has(call, offset, &bytes) {
            return Ok(Answer::of(&written(bytes.len())));
        }
        let (context, node) = (call.context(), call.header.nodeid.into());
        let flags = OFlags::APPEND.bits();
        let data = Bytes(&bytes);
        let taken = self.fs.write(
            context,
            node,
            handle.into(),
            data,
            size,
            offset,
            None,
            false,
            false,
            flags,
        )?;
        Ok(Answer::of(&written(taken)))
    }

    pub(super) fn open(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let OpenIn { flags, open_flags, .. } = call.take()?;
        let kill = open_flags & OPEN_KILL_SUIDGID != 0;
        let node = call.header.nodeid.into();
        let (handle, options) = self.fs.open(call.context(), node, kill, flags)?;
        let handle = handle.map(Into::into);
        self.note_opened(handle, call.header.nodeid, flags);
        Ok(Answer::of(&opened(handle, options)))
    }

    pub(super) fn create(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let CreateIn { mut flags, mode, umask, open_flags, .. } = call.take()?;
        if call.repeated {
            // If it is there, it was made for this request.
            flags &= !OFlags::EXCL.bits();
        }
        let rest = call.rest()?;
        let (name, rest) = word(&rest)?;
        let extensions = extensions::read(self.options(), rest)?;
        let kill = open_flags & OPEN_KILL_SUIDGID != 0;
        let (entry, handle, options) = self.fs.create(
            call.context(),
            call.header.nodeid.into(),
            component(name)?,
            mode,
            kill,
            flags,
            umask,
            extensions,
        )?;
        let handle = handle.map(Into::into);
        self.note_found(call.header.nodeid, name, &entry);
        self.note_opened(handle, entry.inode, flags);
        let words = Words::of(&EntryOut::from(entry)).and(&opened(handle, options));
        Ok(Answer::Words(words))
    }

    pub(super) fn read(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let ReadIn { fh, offset, size, read_flags, lock_owner, flags, .. } = call.take()?;
        let room = call.room();
        if size > MOST_DATA || u64::from(size) > room {
            return Err(Errno::INVAL.into());
        }
        // More room than was asked for stays as it is, behind the data.
        if room > u64::from(size) {
            call.exchange.set_aside(room - u64::from(size))?;
        }
        if size > 0 {
            call.exchange.set_aside(size.into())?;
        }
        debug_assert_eq!(call.exchange.room(), REPLY, "the header's room is left");
        let owner = (read_flags & READ_LOCKOWNER != 0).then_some(lock_owner);
        let (context, node) = (call.context(), call.header.nodeid.into());
        let room = Room(call.exchange);
        let got = self.fs.read(context, node, fh.into(), room, size, offset, owner, flags)?;
        Ok(Answer::Aside(got))
    }

    pub(super) fn write(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let WriteIn { fh, offset, size, write_flags, lock_owner, flags, .. } = call.take()?;
        if size > MOST_DATA || u64::from(size) != call.exchange.left() {
            return Err(Errno::INVAL.into());
        }
        let owner = (write_flags & WRITE_LOCKOWNER != 0).then_some(lock_owner);
        let delayed = write_flags & WRITE_CACHE != 0;
        let kill = write_flags & WRITE_KILL_PRIV != 0;
        let (context, node) = (call.context(), call.header.nodeid.into());
        if call.repeated && !delayed && flags & OFlags::APPEND.bits() != 0 {
            return self.append_again(call, fh, offset, size);
        }
        let data = Data(call.exchange);
        let taken = self.fs.write(
            context,
            node,
            fh.into(),
            data,
            size,
            offset,
            owner,
            delayed,
            kill,
            flags,
        )?;
        Ok(Answer::of(&written(taken)))
    }

    pub(super) fn release(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let ReleaseIn { fh, flags, release_flags, lock_owner } = call.take()?;
        let flush = release_flags & RELEASE_FLUSH != 0;
        let unlock = release_flags & RELEASE_FLOCK_UNLOCK != 0;
        let owner = (flush || unlock).then_some(lock_owner);
        let node = call.header.nodeid.into();
        let done = self.fs.release(call.context(), node, flags, fh.into(), flush, unlock, owner);
        self.closed(call, fh, done)
    }

    pub(super) fn flush(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let FlushIn { fh, lock_owner, .. } = call.take()?;
        self.fs.flush(call.context(), call.header.nodeid.into(), fh.into(), lock_owner)?;
        Ok(Answer::done())
    }

    pub(super) fn fsync(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let FsyncIn { fh, fsync_flags, .. } = call.take()?;
        let data_only = fsync_flags & 1 != 0;
        self.fs.fsync(call.context(), call.header.nodeid.into(), data_only, fh.into())?;
        Ok(Answer::done())
    }

    pub(super) fn fallocate(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let FallocateIn { fh, offset, length, mode, .. } = call.take()?;
        let node = call.header.nodeid.into();
        self.fs.fallocate(call.context(), node, fh.into(), mode, offset, length)?;
        Ok(Answer::done())
    }

    pub(super) fn lseek(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let LseekIn { fh, offset, whence, .. } = call.take()?;
        let node = call.header.nodeid.into();
        let offset = self.fs.lseek(call.context(), node, fh.into(), offset, whence)?;
        Ok(Answer::of(&LseekOut { offset }))
    }

    pub(super) fn copy_file_range(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let CopyfilerangeIn { fh_in, off_in, nodeid_out, fh_out, off_out, len, flags } =
            call.take()?;
        let count = self.fs.copyfilerange(
            call.context(),
            call.header.nodeid.into(),
            fh_in.into(),
            off_in,
            nodeid_out.into(),
            fh_out.into(),
            off_out,
            // The reply has 32 bits for what was copied.
            len.min(1 << 30),
            flags,
        )?;
        Ok(Answer::of(&written(count)))
    }
}
