//! The socket between front-end and back-end: bytes and descriptors in, frames out
//! (vhost-user, "Communication"; unix(7), SCM_RIGHTS).
//!
//! A read never goes past the end of the message under way, so that descriptors are always those
//! of the message whose bytes came with them. Nothing blocks: every call carries MSG_DONTWAIT, and
//! waiting is the reactor's. All descriptors of one call are received, owned and counted, however
//! many there are (the kernel's own limit is 253).

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use outboard_protocol::Frame;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::error::HostError;
use crate::reactor::Reactor;

/// SCM_MAX_FD of the kernel.
const MAX_FDS: usize = 253;

/// What one read brought.
#[derive(Debug)]
pub(crate) enum Received {
    /// That many bytes, and descriptors that belong to the first of them.
    Bytes(usize, Vec<OwnedFd>),
    /// The peer has left.
    End,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Connection<R: Reactor> {
    reactor: R,
    socket: R::Source,
}

impl<R: Reactor> Connection<R> {
    pub(crate) fn new(reactor: R, socket: OwnedFd) -> Result<Self, HostError> {
        let socket = reactor.source(socket).map_err(HostError::io("socket"))?;
        Ok(Self { reactor, socket })
    }

    /// Another descriptor of the socket, to look at while the connection is in use.
    pub(crate) fn descriptor(&self) -> Result<OwnedFd, HostError> {
        self.socket.as_fd().try_clone_to_owned().map_err(HostError::io("dup"))
    }

    /// Reads at most `buffer.len()` bytes, waiting for the first.
    pub(crate) async fn receive(&self, buffer: &mut [u8]) -> Result<Received, HostError> {
        loop {
            match receive_now(self.socket.as_fd(), buffer) {
                Ok(received) => return received,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let wait = self.reactor.readable(&self.socket).await;
                    wait.map_err(HostError::io("wait for the front-end"))?;
                }
                // The peer ended without reading all that we sent: it has left all the same.
                Err(Errno::CONNRESET | Errno::PIPE) => return Ok(Received::End),
                Err(error) => return Err(HostError::io("recvmsg")(error.into())),
            }
        }
    }

    /// Sends a frame whole; its descriptors ride with the first byte. Waits while the peer does
    /// not read: that is all the back-pressure there is.
    pub(crate) async fn send(&self, frame: Frame<OwnedFd>) -> Result<(), HostError> {
        let Frame { bytes, mut fds } = frame;
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            match send_now(self.socket.as_fd(), rest, &fds) {
                Ok(sent) => {
                    fds.clear();
                    rest = rest.get(sent..).unwrap_or_default();
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let wait = self.reactor.writable(&self.socket).await;
                    wait.map_err(HostError::io("wait for the front-end"))?;
                }
                Err(error) => return Err(HostError::io("sendmsg")(error.into())),
            }
        }
        Ok(())
    }
}

fn receive_now(socket: impl AsFd, buffer: &mut [u8]) -> Result<Result<Received, HostError>, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags)?;
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(more) = part {
            fds.extend(more);
        }
    }
    if message.flags.contains(ReturnFlags::CTRUNC) {
        return Ok(Err(HostError::Truncated));
    }
    if message.bytes == 0 {
        return Ok(Ok(Received::End));
    }
    Ok(Ok(Received::Bytes(message.bytes, fds)))
}

fn send_now(socket: impl AsFd, bytes: &[u8], fds: &[OwnedFd]) -> Result<usize, Errno> {
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(Errno::INVAL);
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)
}
