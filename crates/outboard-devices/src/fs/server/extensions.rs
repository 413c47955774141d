//! Extensions of requests that make an entry: the security context and the groups it is made with
//! (`fuse_ext_header`).
//!
//! Invariant: they are there only when they were negotiated, each at most once, and whole.

use std::io;

use rustix::io::Errno;
use virtiofsd::filesystem::{Extensions, SecContext};
use virtiofsd::fuse::{ExtHeader, ExtType, FsOptions, Secctx, SuppGroups};
use vm_memory::ByteValued;

use super::word;

fn wrong<T>() -> io::Result<T> {
    Err(Errno::INVAL.into())
}

/// Splits off a structure.
fn take<'a, T: ByteValued + Default>(bytes: &mut &'a [u8]) -> io::Result<T> {
    let (head, rest) = bytes.split_at_checked(size_of::<T>()).ok_or(Errno::INVAL)?;
    let mut value = T::default();
    value.as_mut_slice().copy_from_slice(head);
    let rest: &'a [u8] = rest;
    *bytes = rest;
    Ok(value)
}

/// Reads what follows the names.
pub(super) fn read(options: FsOptions, mut bytes: &[u8]) -> io::Result<Extensions> {
    let mut found = Extensions::default();
    let context = options.contains(FsOptions::SECURITY_CTX);
    let groups = options.contains(FsOptions::CREATE_SUPP_GROUP);
    if !context && !groups {
        return Ok(found);
    }
    let mut told = false;
    while !bytes.is_empty() {
        let header: ExtHeader = take(&mut bytes)?;
        let size =
            (header.size as usize).checked_sub(size_of::<ExtHeader>()).ok_or(Errno::INVAL)?;
        let (body, rest) = bytes.split_at_checked(size).ok_or(Errno::INVAL)?;
        bytes = rest;
        match ExtType::try_from(header.ext_type) {
            Ok(ExtType::SecCtx(count)) if context && !told => {
                told = true;
                found.secctx = security_context(count, body)?;
            }
            Ok(ExtType::SupGroups) if groups && found.sup_gids.is_empty() => {
                found.sup_gids = supplementary_groups(body)?.into_iter().map(Into::into).collect();
            }
            _ => return wrong(),
        }
    }
    // Linux sends it with every such request once it is negotiated.
    if context && !told { wrong() } else { Ok(found) }
}

fn security_context(count: u32, mut body: &[u8]) -> io::Result<Option<SecContext>> {
    match count {
        0 => return Ok(None),
        1 => {}
        _ => return wrong(),
    }
    let Secctx { size, .. } = take(&mut body)?;
    let (name, value) = word(body)?;
    match value.get(..size as usize) {
        Some(value) if size > 0 => {
            Ok(Some(SecContext { name: name.to_owned(), secctx: value.to_vec() }))
        }
        _ => wrong(),
    }
}

fn supplementary_groups(mut body: &[u8]) -> io::Result<Vec<u32>> {
    let SuppGroups { nr_groups } = take(&mut body)?;
    if body.len() as u64 / 4 < u64::from(nr_groups) {
        return wrong();
    }
    (0..nr_groups).map(|_| take(&mut body)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extension(kind: u32, body: &[u8]) -> Vec<u8> {
        let size = u32::try_from(size_of::<ExtHeader>() + body.len()).expect("short");
        [&size.to_le_bytes()[..], &kind.to_le_bytes(), body].concat()
    }

    #[test]
    fn groups_are_read_once_and_whole() {
        let options = FsOptions::CREATE_SUPP_GROUP;
        let body = [1u32.to_le_bytes(), 77u32.to_le_bytes()].concat();
        let good = extension(32, &body);
        assert_eq!(read(options, &good).expect("sound").sup_gids, [77.into()]);
        assert!(read(options, &[good.clone(), good.clone()].concat()).is_err(), "twice");
        assert!(read(FsOptions::SECURITY_CTX, &good).is_err(), "not negotiated");
        assert!(read(FsOptions::empty(), &good).expect("not looked at").sup_gids.is_empty());
        let many = extension(32, &[u32::MAX.to_le_bytes(), [0; 4]].concat());
        assert!(read(options, &many).is_err(), "more groups than bytes");
        for end in 1..good.len() {
            assert!(read(options, &good[..end]).is_err(), "{end} bytes");
        }
        let mut short = good;
        short[0] = 7;
        assert!(read(options, &short).is_err(), "shorter than its header");
    }

    #[test]
    fn a_security_context_has_a_name_and_a_value() {
        let options = FsOptions::SECURITY_CTX;
        let body = [&5u32.to_le_bytes()[..], &[0; 4], b"security.selinux\0label\0\0"].concat();
        let found = read(options, &extension(1, &body)).expect("sound").secctx.expect("there");
        assert_eq!(
            (found.name.to_bytes(), &found.secctx[..]),
            (&b"security.selinux"[..], &b"label"[..])
        );
        assert!(read(options, &extension(0, &[])).expect("sound").secctx.is_none());
        assert!(read(options, &[]).is_err(), "it has to be told");
        assert!(read(options, &extension(2, &body)).is_err(), "two of them");
        let long = [&50u32.to_le_bytes()[..], &[0; 4], b"name\0label"].concat();
        assert!(read(options, &extension(1, &long)).is_err(), "longer than what is there");
    }
}
