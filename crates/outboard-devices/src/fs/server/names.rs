//! Operations on the entries of a directory, by name.
//!
//! Invariant: every name was looked at before the file system sees it.

use std::ffi::CStr;
use std::io;

use rustix::fs::RenameFlags;
use rustix::io::Errno;
use virtiofsd::filesystem::{Entry, FileSystem};
use virtiofsd::fuse::{LinkIn, MkdirIn, MknodIn, Rename2In, RenameIn};

use super::super::ledger::Note;
use super::{Answer, Call, Server, component, extensions, only_name, word};

impl<F: FileSystem> Server<F> {
    pub(super) fn lookup(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let rest = call.rest()?;
        let parent = call.header.nodeid.into();
        let name = only_name(&rest)?;
        let entry = self.fs.lookup(call.context(), parent, name)?;
        Ok(self.found(call.header.nodeid, name, entry))
    }

    pub(super) fn symlink(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let rest = call.rest()?;
        let (name, rest) = word(&rest)?;
        // What a link says is the guest's affair: only the guest follows it.
        let (target, rest) = word(rest)?;
        let more = extensions::read(self.options(), rest)?;
        let parent = call.header.nodeid.into();
        let made = self.fs.symlink(call.context(), target, parent, component(name)?, more);
        self.named(call, name, made)
    }

    pub(super) fn mknod(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let MknodIn { mode, rdev, umask, .. } = call.take()?;
        let rest = call.rest()?;
        let (name, rest) = word(&rest)?;
        let more = extensions::read(self.options(), rest)?;
        let (context, parent) = (call.context(), call.header.nodeid.into());
        let made = self.fs.mknod(context, parent, component(name)?, mode, rdev, umask, more);
        self.named(call, name, made)
    }

    pub(super) fn mkdir(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let MkdirIn { mode, umask } = call.take()?;
        let rest = call.rest()?;
        let (name, rest) = word(&rest)?;
        let more = extensions::read(self.options(), rest)?;
        let parent = call.header.nodeid.into();
        let made = self.fs.mkdir(call.context(), parent, component(name)?, mode, umask, more);
        self.named(call, name, made)
    }

    pub(super) fn unlink(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let rest = call.rest()?;
        let name = only_name(&rest)?;
        let gone = self.fs.unlink(call.context(), call.header.nodeid.into(), name);
        self.gone(call, name, gone)
    }

    pub(super) fn rmdir(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let rest = call.rest()?;
        let name = only_name(&rest)?;
        let gone = self.fs.rmdir(call.context(), call.header.nodeid.into(), name);
        self.gone(call, name, gone)
    }

    pub(super) fn rename(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let RenameIn { newdir } = call.take()?;
        self.move_entry(call, newdir, 0)
    }

    pub(super) fn rename2(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let Rename2In { newdir, flags, .. } = call.take()?;
        let known = RenameFlags::EXCHANGE | RenameFlags::NOREPLACE | RenameFlags::WHITEOUT;
        self.move_entry(call, newdir, flags & known.bits())
    }

    fn move_entry(&self, call: &mut Call<'_>, to: u64, flags: u32) -> io::Result<Answer> {
        let rest = call.rest()?;
        let (old, rest) = word(&rest)?;
        let (old, new) = (component(old)?, only_name(rest)?);
        let (context, from) = (call.context(), call.header.nodeid.into());
        match self.fs.rename(context, from, old, to.into(), new, flags) {
            Ok(()) => {}
            Err(error) if call.did(&error, Errno::NOENT) && self.is_at(call, to, new) => {}
            Err(error) => return Err(error),
        }
        let exchanged = flags & RenameFlags::EXCHANGE.bits() != 0;
        let (from, to) = ((call.header.nodeid, old.to_bytes()), (to, new.to_bytes()));
        self.note(&[Note::Moved { from, to, exchanged }]);
        Ok(Answer::done())
    }

    pub(super) fn link(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let LinkIn { oldnodeid } = call.take()?;
        let rest = call.rest()?;
        let parent = call.header.nodeid.into();
        let name = only_name(&rest)?;
        let made = self.fs.link(call.context(), oldnodeid.into(), parent, name);
        self.named(call, name, made)
    }

    /// The reply about an entry that was made, now or before.
    fn named(&self, call: &Call<'_>, name: &CStr, made: io::Result<Entry>) -> io::Result<Answer> {
        let entry = self.made(call, name, made)?;
        Ok(self.found(call.header.nodeid, name, entry))
    }

    /// The reply about an entry that was removed, now or before.
    fn gone(&self, call: &Call<'_>, name: &CStr, gone: io::Result<()>) -> io::Result<Answer> {
        match gone {
            Err(error) if !call.did(&error, Errno::NOENT) => return Err(error),
            _ => {}
        }
        self.note(&[Note::Removed { parent: call.header.nodeid, name: name.to_bytes() }]);
        Ok(Answer::done())
    }
}
