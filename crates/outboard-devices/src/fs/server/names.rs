//! Operations on the entries of a directory, by name.
//!
//! Invariant: every name was looked at before the file system sees it.

use std::io;

use rustix::fs::RenameFlags;
use virtiofsd::filesystem::{Entry, FileSystem};
use virtiofsd::fuse::{EntryOut, LinkIn, MkdirIn, MknodIn, Rename2In, RenameIn};

use super::{Answer, Call, Server, component, extensions, only_name, word};

fn found(entry: Entry) -> Answer {
    Answer::of(&EntryOut::from(entry))
}

impl<F: FileSystem> Server<F> {
    pub(super) fn lookup(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let rest = call.rest()?;
        let parent = call.header.nodeid.into();
        self.fs.lookup(call.context(), parent, only_name(&rest)?).map(found)
    }

    pub(super) fn symlink(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let rest = call.rest()?;
        let (name, rest) = word(&rest)?;
        // What a link says is the guest's affair: only the guest follows it.
        let (target, rest) = word(rest)?;
        let more = extensions::read(self.options(), rest)?;
        let parent = call.header.nodeid.into();
        self.fs.symlink(call.context(), target, parent, component(name)?, more).map(found)
    }

    pub(super) fn mknod(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let MknodIn { mode, rdev, umask, .. } = call.take()?;
        let rest = call.rest()?;
        let (name, rest) = word(&rest)?;
        let more = extensions::read(self.options(), rest)?;
        let (context, parent) = (call.context(), call.header.nodeid.into());
        self.fs.mknod(context, parent, component(name)?, mode, rdev, umask, more).map(found)
    }

    pub(super) fn mkdir(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let MkdirIn { mode, umask } = call.take()?;
        let rest = call.rest()?;
        let (name, rest) = word(&rest)?;
        let more = extensions::read(self.options(), rest)?;
        let parent = call.header.nodeid.into();
        self.fs.mkdir(call.context(), parent, component(name)?, mode, umask, more).map(found)
    }

    pub(super) fn unlink(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let rest = call.rest()?;
        self.fs.unlink(call.context(), call.header.nodeid.into(), only_name(&rest)?)?;
        Ok(Answer::done())
    }

    pub(super) fn rmdir(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let rest = call.rest()?;
        self.fs.rmdir(call.context(), call.header.nodeid.into(), only_name(&rest)?)?;
        Ok(Answer::done())
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
        self.fs.rename(context, from, old, to.into(), new, flags)?;
        Ok(Answer::done())
    }

    pub(super) fn link(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let LinkIn { oldnodeid } = call.take()?;
        let rest = call.rest()?;
        let parent = call.header.nodeid.into();
        self.fs.link(call.context(), oldnodeid.into(), parent, only_name(&rest)?).map(found)
    }
}
