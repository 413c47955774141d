//! The sockets of a conversation: bytes with descriptors, both ways, without any wait.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Messages, as far as a line takes them.
pub fn frames(mut bytes: &[u8]) -> String {
    let mut all = Vec::new();
    while let Some((head, rest)) = bytes.split_at_checked(12) {
        let size = usize::from(head[8]) | usize::from(head[9]) << 8;
        let (payload, rest) = rest.split_at(size.min(rest.len()));
        all.push(format!("{}: {:02x?}", head[0], &payload[..size.min(payload.len()).min(8)]));
        bytes = rest;
    }
    all.join("; ")
}

/// Sends bytes with descriptors; a peer that is gone already is no matter.
pub fn put(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(40))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "room for descriptors");
    }
    let _ = sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
}

/// All bytes and descriptors that have come.
pub fn received(socket: &UnixStream) -> (Vec<u8>, Vec<OwnedFd>) {
    let (mut bytes, mut fds, mut buffer) = (Vec::new(), Vec::new(), [0; 4096]);
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let room = &mut [IoSliceMut::new(&mut buffer)];
        let count = match recvmsg(socket, room, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(message) if message.bytes > 0 => message.bytes,
            Ok(_) | Err(Errno::AGAIN) => break,
            // It left with our bytes unread.
            Err(Errno::CONNRESET) => break,
            Err(error) => panic!("the socket: {error}"),
        };
        bytes.extend(&buffer[..count]);
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = message {
                fds.extend(more);
            }
        }
    }
    (bytes, fds)
}

/// An in-flight region that the back-end made: how long it is, for ever, all zero.
pub fn check_region(fd: &OwnedFd) -> u64 {
    let seals = fcntl_get_seals(fd).expect("a memory file");
    assert!(seals.contains(SealFlags::SHRINK | SealFlags::GROW), "sealed: {seals:?}");
    let size = fstat(fd).expect("a file").st_size as usize;
    let mut bytes = vec![1; size];
    assert_eq!(rustix::io::pread(fd, &mut bytes, 0), Ok(size));
    assert!(bytes.iter().all(|byte| *byte == 0), "a fresh region is all zero");
    size as u64
}
