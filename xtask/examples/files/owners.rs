//! Rules of owners: who may do what, what a new file belongs to, ACLs.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::Path;

use anyhow::{Result, ensure};
use rustix::fs::{AtFlags, CWD};
use rustix::fs::{
    Mode, OFlags, Timespec, Timestamps, UTIME_NOW, XattrFlags, chmod, getxattr, link, mkdir,
    rename, rmdir, setxattr, unlink, utimensat,
};
use rustix::io::Errno;

use crate::rule::{Check, as_user, made, opened, refused, rules, same};

pub(crate) const RULES: &[(&str, Check)] = rules![
    a_new_file_is_its_makers,
    a_file_is_read_and_written_by_whom_its_mode_lets,
    a_supplementary_group_counts,
    a_directory_is_searched_and_changed_by_whom_its_mode_lets,
    in_a_sticky_directory_everybody_removes_his_own,
    only_the_owner_changes_a_mode_and_only_root_an_owner,
    a_file_may_be_given_to_a_group_of_ones_own,
    what_was_opened_stays_open_whatever_its_mode_becomes,
    a_file_may_be_made_with_a_mode_that_forbids_what_it_is_opened_for,
    a_directory_with_the_group_bit_hands_its_group_down,
    a_write_and_a_new_owner_clear_the_bits_of_the_user,
    times_are_set_by_the_owner_and_to_now_by_who_may_write,
    an_acl_lets_one_more_user_in,
    a_default_acl_is_handed_down,
];

const ALICE: u32 = 1000;
const BOB: u32 = 1001;
const TEAM: u32 = 2000;

fn mode(bits: u32) -> fs::Permissions {
    fs::Permissions::from_mode(bits)
}

/// A file of Alice's with this mode.
fn of_alice(path: &Path, bits: u32) -> Result<()> {
    made(path, b"hers")?;
    chown(path, Some(ALICE), Some(ALICE))?;
    Ok(fs::set_permissions(path, mode(bits))?)
}

fn a_new_file_is_its_makers(dir: &Path) -> Result<()> {
    as_user(ALICE, &[TEAM, BOB], || -> Result<()> {
        made(&dir.join("file"), b"x")?;
        mkdir(dir.join("folder"), Mode::RWXU)?;
        Ok(rustix::fs::symlink("x", dir.join("link"))?)
    })??;
    for name in ["file", "folder", "link"] {
        let found = dir.join(name).symlink_metadata()?;
        same((name, found.uid(), found.gid()), (name, ALICE, TEAM))?;
    }
    Ok(())
}

fn a_file_is_read_and_written_by_whom_its_mode_lets(dir: &Path) -> Result<()> {
    let file = dir.join("file");
    let tries = |who, groups: &[u32], flags| as_user(who, groups, || opened(&file, flags, 0));
    of_alice(&file, 0o640)?;
    tries(ALICE, &[ALICE], OFlags::RDWR)??;
    tries(BOB, &[ALICE], OFlags::RDONLY)??;
    refused(tries(BOB, &[ALICE], OFlags::WRONLY)?, Errno::ACCESS)?;
    refused(tries(BOB, &[BOB], OFlags::RDONLY)?, Errno::ACCESS)?;
    fs::set_permissions(&file, mode(0o046))?;
    refused(tries(ALICE, &[ALICE], OFlags::RDONLY)?, Errno::ACCESS)?;
    refused(tries(BOB, &[ALICE], OFlags::RDWR)?, Errno::ACCESS)?;
    tries(BOB, &[BOB], OFlags::RDWR)??;
    Ok(())
}

fn a_supplementary_group_counts(dir: &Path) -> Result<()> {
    let (file, folder) = (dir.join("file"), dir.join("folder"));
    made(&file, b"x")?;
    chown(&file, Some(ALICE), Some(TEAM))?;
    fs::set_permissions(&file, mode(0o660))?;
    fs::create_dir(&folder)?;
    chown(&folder, Some(ALICE), Some(TEAM))?;
    fs::set_permissions(&folder, mode(0o770))?;
    as_user(BOB, &[BOB, TEAM], || opened(&file, OFlags::RDWR, 0))??;
    as_user(BOB, &[BOB, TEAM], || made(&folder.join("new"), b"x"))??;
    refused(as_user(BOB, &[BOB], || opened(&file, OFlags::RDWR, 0))?, Errno::ACCESS)
}

fn a_directory_is_searched_and_changed_by_whom_its_mode_lets(dir: &Path) -> Result<()> {
    let folder = dir.join("folder");
    fs::create_dir(&folder)?;
    of_alice(&folder.join("file"), 0o666)?;
    chown(&folder, Some(ALICE), Some(ALICE))?;
    fs::set_permissions(&folder, mode(0o744))?;
    let bob = |what: &(dyn Fn() -> rustix::io::Result<()> + Sync)| as_user(BOB, &[BOB], what);
    refused(bob(&|| opened(&folder.join("file"), OFlags::RDONLY, 0).map(drop))?, Errno::ACCESS)?;
    ensure!(as_user(BOB, &[BOB], || fs::read_dir(&folder).is_ok())?, "it may be listed");
    fs::set_permissions(&folder, mode(0o755))?;
    bob(&|| opened(&folder.join("file"), OFlags::RDWR, 0).map(drop))??;
    refused(bob(&|| unlink(folder.join("file")))?, Errno::ACCESS)?;
    refused(bob(&|| mkdir(folder.join("new"), Mode::RWXU))?, Errno::ACCESS)?;
    refused(bob(&|| rename(folder.join("file"), dir.join("file")))?, Errno::ACCESS)
}

fn in_a_sticky_directory_everybody_removes_his_own(dir: &Path) -> Result<()> {
    let folder = dir.join("folder");
    fs::create_dir(&folder)?;
    fs::set_permissions(&folder, mode(0o1777))?;
    let (hers, more) = (folder.join("hers"), folder.join("more"));
    of_alice(&hers, 0o666)?;
    of_alice(&more, 0o666)?;
    let bob = |what: &(dyn Fn() -> rustix::io::Result<()> + Sync)| as_user(BOB, &[BOB], what);
    refused(bob(&|| unlink(&hers))?, Errno::PERM)?;
    refused(bob(&|| rename(&hers, folder.join("his")))?, Errno::PERM)?;
    as_user(BOB, &[BOB], || made(&folder.join("his"), b""))??;
    refused(bob(&|| rename(folder.join("his"), &hers))?, Errno::PERM)?;
    bob(&|| unlink(folder.join("his")))??;
    Ok(as_user(ALICE, &[ALICE], || unlink(&hers).and(unlink(&more)))??)
}

fn only_the_owner_changes_a_mode_and_only_root_an_owner(dir: &Path) -> Result<()> {
    let file = dir.join("file");
    of_alice(&file, 0o666)?;
    let all = Mode::from_raw_mode(0o777);
    refused(as_user(BOB, &[BOB], || chmod(&file, all))?, Errno::PERM)?;
    as_user(ALICE, &[ALICE], || chmod(&file, Mode::from_raw_mode(0o751)))??;
    same(file.metadata()?.mode() & 0o7777, 0o751)?;
    let give = |who| rustix::fs::chown(&file, Some(rustix::fs::Uid::from_raw(who)), None);
    refused(as_user(ALICE, &[ALICE], || give(BOB))?, Errno::PERM)?;
    give(BOB)?;
    same(file.metadata()?.uid(), BOB)
}

fn a_file_may_be_given_to_a_group_of_ones_own(dir: &Path) -> Result<()> {
    let file = dir.join("file");
    of_alice(&file, 0o644)?;
    let give = |group| rustix::fs::chown(&file, None, Some(rustix::fs::Gid::from_raw(group)));
    refused(as_user(ALICE, &[ALICE], || give(TEAM))?, Errno::PERM)?;
    as_user(ALICE, &[ALICE, TEAM], || give(TEAM))??;
    same((file.metadata()?.uid(), file.metadata()?.gid()), (ALICE, TEAM))
}

fn what_was_opened_stays_open_whatever_its_mode_becomes(dir: &Path) -> Result<()> {
    let file = dir.join("file");
    of_alice(&file, 0o600)?;
    as_user(ALICE, &[ALICE], || -> Result<()> {
        let open = opened(&file, OFlags::RDWR, 0)?;
        chmod(&file, Mode::empty())?;
        same(rustix::io::write(&open, b"more")?, 4)?;
        refused(opened(&file, OFlags::RDONLY, 0), Errno::ACCESS)
    })??;
    same(fs::read(&file)?, b"more".to_vec())
}

fn a_file_may_be_made_with_a_mode_that_forbids_what_it_is_opened_for(dir: &Path) -> Result<()> {
    let file = dir.join("file");
    as_user(ALICE, &[ALICE], || -> Result<()> {
        let open = opened(&file, OFlags::RDWR | OFlags::CREATE, 0)?;
        same(rustix::io::write(&open, b"x")?, 1)
    })??;
    same((fs::read(&file)?, file.metadata()?.mode() & 0o7777), (b"x".to_vec(), 0))
}

fn a_directory_with_the_group_bit_hands_its_group_down(dir: &Path) -> Result<()> {
    let folder = dir.join("folder");
    fs::create_dir(&folder)?;
    chown(&folder, None, Some(TEAM))?;
    fs::set_permissions(&folder, mode(0o2777))?;
    as_user(ALICE, &[ALICE], || -> Result<()> {
        made(&folder.join("file"), b"")?;
        Ok(mkdir(folder.join("below"), Mode::RWXU)?)
    })??;
    let (file, below) = (folder.join("file").metadata()?, folder.join("below").metadata()?);
    same((file.gid(), below.gid(), below.mode() & 0o2000), (TEAM, TEAM, 0o2000))
}

fn a_write_and_a_new_owner_clear_the_bits_of_the_user(dir: &Path) -> Result<()> {
    let file = dir.join("file");
    of_alice(&file, 0o6777)?;
    same(file.metadata()?.mode() & 0o7777, 0o6777)?;
    as_user(BOB, &[BOB], || {
        opened(&file, OFlags::WRONLY, 0).and_then(|fd| rustix::io::write(&fd, b"x"))
    })??;
    same(file.metadata()?.mode() & 0o7777, 0o777)?;
    fs::set_permissions(&file, mode(0o6777))?;
    chown(&file, Some(BOB), Some(BOB))?;
    same(file.metadata()?.mode() & 0o7777, 0o777)
}

fn times_are_set_by_the_owner_and_to_now_by_who_may_write(dir: &Path) -> Result<()> {
    let file = dir.join("file");
    of_alice(&file, 0o666)?;
    let set = |tv_sec, tv_nsec| {
        let time = Timespec { tv_sec, tv_nsec };
        let times = Timestamps { last_access: time, last_modification: time };
        utimensat(CWD, &file, &times, AtFlags::empty())
    };
    refused(as_user(BOB, &[BOB], || set(5, 0))?, Errno::PERM)?;
    as_user(BOB, &[BOB], || set(0, UTIME_NOW))??;
    as_user(ALICE, &[ALICE], || set(5, 0))??;
    same(file.metadata()?.mtime(), 5)
}

/// An ACL as Linux stores it: the owner and the group may read and write, `user` may do `bits`.
fn acl(user: u32, bits: u16) -> Vec<u8> {
    let none = u32::MAX;
    let entries = [(1, 6, none), (2, bits, user), (4, 0, none), (0x10, 7, none), (0x20, 0, none)];
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, bits, id) in entries {
        bytes.extend(u16::to_le_bytes(tag));
        bytes.extend(u16::to_le_bytes(bits));
        bytes.extend(u32::to_le_bytes(id));
    }
    bytes
}

fn an_acl_lets_one_more_user_in(dir: &Path) -> Result<()> {
    let file = dir.join("file");
    of_alice(&file, 0o600)?;
    refused(as_user(BOB, &[BOB], || opened(&file, OFlags::RDONLY, 0))?, Errno::ACCESS)?;
    setxattr(&file, "system.posix_acl_access", &acl(BOB, 4), XattrFlags::empty())?;
    as_user(BOB, &[BOB], || opened(&file, OFlags::RDONLY, 0))??;
    refused(as_user(BOB, &[BOB], || opened(&file, OFlags::RDWR, 0))?, Errno::ACCESS)?;
    refused(as_user(TEAM, &[TEAM], || opened(&file, OFlags::RDONLY, 0))?, Errno::ACCESS)?;
    let mut back = [0; 256];
    let length = getxattr(&file, "system.posix_acl_access", &mut back[..])?;
    same(&back[..length], acl(BOB, 4).as_slice())
}

fn a_default_acl_is_handed_down(dir: &Path) -> Result<()> {
    let folder = dir.join("folder");
    fs::create_dir(&folder)?;
    fs::set_permissions(&folder, mode(0o777))?;
    setxattr(&folder, "system.posix_acl_default", &acl(BOB, 6), XattrFlags::empty())?;
    as_user(ALICE, &[ALICE], || made(&folder.join("file"), b"x"))??;
    as_user(BOB, &[BOB], || opened(&folder.join("file"), OFlags::RDWR, 0))??;
    refused(
        as_user(TEAM, &[TEAM], || opened(&folder.join("file"), OFlags::RDONLY, 0))?,
        Errno::ACCESS,
    )?;
    link(folder.join("file"), folder.join("again"))?;
    unlink(folder.join("again"))?;
    unlink(folder.join("file"))?;
    Ok(rmdir(&folder)?)
}
