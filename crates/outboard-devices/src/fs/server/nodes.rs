//! Operations on nodes: attributes, extended attributes, and forgetting them.
//!
//! Invariant: a value is no longer than the room that the driver left for it.

use std::io;

use rustix::io::Errno;
use virtiofsd::filesystem::{FileSystem, GetxattrReply, ListxattrReply};
use virtiofsd::fuse::{
    AccessIn, Attr, AttrOut, BatchForgetIn, FATTR_FH, ForgetIn, ForgetOne, FsOptions, GETATTR_FH,
    GetattrIn, GetxattrIn, GetxattrOut, Kstatfs, Opcode, SetattrIn, SetattrValid, SetxattrFlags,
    SetxattrIn, SetxattrInCompat,
};

use super::super::ledger::Note;
use super::{Answer, Call, Server, only_word, word};

/// Longest value of an extended attribute, and longest list of their names (xattr(7)), in bytes.
const MOST_VALUE: u32 = 64 << 10;

/// Nodes that one BATCH_FORGET may name.
const MOST_FORGOTTEN: u64 = 64 << 10;

fn attributes(attr: Attr, valid: std::time::Duration) -> Answer {
    Answer::of(&AttrOut {
        attr_valid: valid.as_secs(),
        attr_valid_nsec: valid.subsec_nanos(),
        dummy: 0,
        attr,
    })
}

/// Room for a value: as asked for, if the reply has it.
fn room_for(call: &mut Call<'_>, size: u32) -> io::Result<u32> {
    if u64::from(size) > call.room() {
        return Err(Errno::INVAL.into());
    }
    Ok(size.min(MOST_VALUE))
}

fn counted(size: u32) -> Answer {
    Answer::of(&GetxattrOut { size, ..GetxattrOut::default() })
}

/// A value that has to fit what was asked for.
fn fitting(value: Vec<u8>, size: u32) -> io::Result<Answer> {
    if value.len() as u64 > u64::from(size) {
        return Err(Errno::RANGE.into());
    }
    Ok(Answer::Bytes(value))
}

impl<F: FileSystem> Server<F> {
    pub(super) fn forget(&self, call: &mut Call<'_>, opcode: Opcode) -> io::Result<Answer> {
        if let Opcode::Forget = opcode {
            let ForgetIn { nlookup } = call.take()?;
            if !call.repeated {
                let node = call.header.nodeid;
                self.note(&[Note::Forgotten { node, count: nlookup }]);
                self.fs.forget(call.context(), node.into(), nlookup);
            }
            return Ok(Answer::Nothing);
        }
        let BatchForgetIn { count, .. } = call.take()?;
        let there = call.exchange.left() / size_of::<ForgetOne>() as u64;
        if u64::from(count) > there.min(MOST_FORGOTTEN) {
            return Err(Errno::INVAL.into());
        }
        let nodes = (0..count).map(|_| call.take::<ForgetOne>());
        let nodes = nodes.collect::<io::Result<Vec<_>>>()?;
        // What may have been forgotten already would be forgotten twice: then it is rather kept.
        if call.repeated {
            return Ok(Answer::Nothing);
        }
        if self.ledger.is_some() {
            let notes = nodes.iter().map(|one| (one.nodeid, one.nlookup));
            let notes = notes.map(|(node, count)| Note::Forgotten { node, count });
            self.note(&notes.collect::<Vec<_>>());
        }
        let nodes = nodes.into_iter().map(|one| (one.nodeid.into(), one.nlookup));
        self.fs.batch_forget(call.context(), nodes.collect());
        Ok(Answer::Nothing)
    }

    pub(super) fn getattr(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let GetattrIn { flags, fh, .. } = call.take()?;
        let handle = (flags & GETATTR_FH != 0).then(|| fh.into());
        let node = call.header.nodeid.into();
        let (attr, valid) = self.fs.getattr(call.context(), node, handle)?;
        Ok(attributes(attr, valid))
    }

    pub(super) fn setattr(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let wanted: SetattrIn = call.take()?;
        let handle = (wanted.valid & FATTR_FH != 0).then(|| wanted.fh.into());
        let valid = SetattrValid::from_bits_truncate(wanted.valid);
        let node = call.header.nodeid.into();
        let (attr, valid) = self.fs.setattr(call.context(), node, wanted, handle, valid)?;
        Ok(attributes(attr, valid))
    }

    pub(super) fn readlink(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let room = call.room();
        let target = self.fs.readlink(call.context(), call.header.nodeid.into())?;
        if target.len() as u64 > room {
            return Err(Errno::NAMETOOLONG.into());
        }
        Ok(Answer::Bytes(target))
    }

    pub(super) fn statfs(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let found = self.fs.statfs(call.context(), call.header.nodeid.into())?;
        Ok(Answer::of(&Kstatfs::from(found)))
    }

    pub(super) fn syncfs(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        self.fs.syncfs(call.context(), call.header.nodeid.into())?;
        Ok(Answer::done())
    }

    pub(super) fn access(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let AccessIn { mask, .. } = call.take()?;
        self.fs.access(call.context(), call.header.nodeid.into(), mask)?;
        Ok(Answer::done())
    }

    pub(super) fn setxattr(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let wanted: SetxattrIn = if self.options().contains(FsOptions::SETXATTR_EXT) {
            call.take()?
        } else {
            let SetxattrInCompat { size, flags } = call.take()?;
            SetxattrIn { size, flags, ..SetxattrIn::default() }
        };
        let rest = call.rest()?;
        let (name, value) = word(&rest)?;
        if u64::from(wanted.size) != value.len() as u64 {
            return Err(Errno::INVAL.into());
        }
        let more = SetxattrFlags::from_bits_truncate(wanted.setxattr_flags);
        let node = call.header.nodeid.into();
        self.fs.setxattr(call.context(), node, name, value, wanted.flags, more)?;
        Ok(Answer::done())
    }

    pub(super) fn getxattr(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let GetxattrIn { size, .. } = call.take()?;
        let size = room_for(call, size)?;
        let rest = call.rest()?;
        let node = call.header.nodeid.into();
        match self.fs.getxattr(call.context(), node, only_word(&rest)?, size)? {
            GetxattrReply::Value(value) => fitting(value, size),
            GetxattrReply::Count(count) => Ok(counted(count)),
        }
    }

    pub(super) fn listxattr(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let GetxattrIn { size, .. } = call.take()?;
        let size = room_for(call, size)?;
        match self.fs.listxattr(call.context(), call.header.nodeid.into(), size)? {
            ListxattrReply::Names(names) => fitting(names, size),
            ListxattrReply::Count(count) => Ok(counted(count)),
        }
    }

    pub(super) fn removexattr(&self, call: &mut Call<'_>) -> io::Result<Answer> {
        let rest = call.rest()?;
        self.fs.removexattr(call.context(), call.header.nodeid.into(), only_word(&rest)?)?;
        Ok(Answer::done())
    }
}
