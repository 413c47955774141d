//! Rules of locks and of extended attributes.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::Result;
use rustix::fs::{
    FlockOperation, OFlags, XattrFlags, fcntl_lock, flock, getxattr, listxattr, removexattr,
    setxattr,
};
use rustix::io::Errno;

use crate::rule::{Check, made, opened, refused, rules, same};

pub(crate) const RULES: &[(&str, Check)] = rules![
    a_lock_of_flock_is_had_once_and_goes_with_its_file,
    a_record_lock_keeps_other_processes_out,
    an_attribute_is_set_read_listed_and_removed,
    an_attribute_is_made_or_replaced_as_was_said,
    an_attribute_that_does_not_fit_is_erange,
];

fn a_lock_of_flock_is_had_once_and_goes_with_its_file(dir: &Path) -> Result<()> {
    let at = dir.join("file");
    made(&at, b"")?;
    let (one, two) = (opened(&at, OFlags::RDWR, 0)?, opened(&at, OFlags::RDWR, 0)?);
    flock(&one, FlockOperation::LockExclusive)?;
    refused(flock(&two, FlockOperation::NonBlockingLockExclusive), Errno::WOULDBLOCK)?;
    drop(one);
    flock(&two, FlockOperation::NonBlockingLockExclusive)?;
    flock(&two, FlockOperation::LockShared)?;
    let three = opened(&at, OFlags::RDWR, 0)?;
    Ok(flock(&three, FlockOperation::NonBlockingLockShared)?)
}

fn a_record_lock_keeps_other_processes_out(dir: &Path) -> Result<()> {
    let at = dir.join("file");
    made(&at, b"")?;
    let other = || Command::new(std::env::current_exe()?).arg("lock").arg(&at).status();
    let file = opened(&at, OFlags::RDWR, 0)?;
    fcntl_lock(&file, FlockOperation::LockExclusive)?;
    same(other()?.code(), Some(1))?;
    fcntl_lock(&file, FlockOperation::Unlock)?;
    same(other()?.code(), Some(0))
}

/// Whether a record lock can be had.
pub(crate) fn probe(file: &Path) -> Result<ExitCode> {
    let file = File::options().read(true).write(true).open(file)?;
    match fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(Errno::AGAIN | Errno::ACCESS) => Ok(ExitCode::FAILURE),
        Err(error) => Err(error.into()),
    }
}

/// Locks the whole file, without waiting, until a line comes.
pub(crate) fn keep(file: &Path) -> Result<()> {
    let file = File::options().read(true).write(true).create(true).truncate(false).open(file)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    println!("locked");
    std::io::stdin().read_line(&mut String::new())?;
    Ok(())
}

fn an_attribute_is_set_read_listed_and_removed(dir: &Path) -> Result<()> {
    let at = dir.join("file");
    made(&at, b"")?;
    let mut bytes = [0; 1024];
    for (name, value) in [("user.one", &b"1"[..]), ("user.two", b""), ("user.three", &[0; 300])] {
        setxattr(&at, name, value, XattrFlags::empty())?;
        let length = getxattr(&at, name, &mut bytes[..])?;
        same(&bytes[..length], value)?;
    }
    let length = listxattr(&at, &mut bytes[..])?;
    let names: BTreeSet<_> = bytes[..length].split(|byte| *byte == 0).collect();
    for name in ["user.one", "user.two", "user.three"] {
        same((name, names.contains(name.as_bytes())), (name, true))?;
    }
    removexattr(&at, "user.one")?;
    refused(getxattr(&at, "user.one", &mut bytes[..]), Errno::NODATA)?;
    refused(removexattr(&at, "user.one"), Errno::NODATA)
}

fn an_attribute_is_made_or_replaced_as_was_said(dir: &Path) -> Result<()> {
    let at = dir.join("file");
    made(&at, b"")?;
    refused(setxattr(&at, "user.x", b"1", XattrFlags::REPLACE), Errno::NODATA)?;
    setxattr(&at, "user.x", b"1", XattrFlags::CREATE)?;
    refused(setxattr(&at, "user.x", b"2", XattrFlags::CREATE), Errno::EXIST)?;
    Ok(setxattr(&at, "user.x", b"2", XattrFlags::REPLACE)?)
}

fn an_attribute_that_does_not_fit_is_erange(dir: &Path) -> Result<()> {
    let at = dir.join("file");
    made(&at, b"")?;
    setxattr(&at, "user.x", &[7; 100], XattrFlags::empty())?;
    let mut short = [0; 50];
    refused(getxattr(&at, "user.x", &mut short[..]), Errno::RANGE)?;
    refused(listxattr(&at, &mut short[..3]), Errno::RANGE)?;
    same(rustix::fs::getxattr_query(&at, "user.x")?, 100)
}
