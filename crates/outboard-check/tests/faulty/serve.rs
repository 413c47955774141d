//! The socket side of the faulty back-end: one thread, one poll loop, whole messages.
//!
//! Invariant: without a fault this is a sound back-end; every fault is asked for by its name.

use std::ffi::OsStr;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use outboard_protocol::header::{HEADER_SIZE, Header};
use outboard_protocol::payload::read;
use outboard_protocol::{Frame, Step};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use crate::device::Device;
use crate::faults::{Action, Message, after, before};

/// One connection.
struct Peer {
    stream: UnixStream,
    device: Device,
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// A message that a fault holds back.
    late: Option<Message>,
    /// A fault listens no more.
    deaf: bool,
}

/// Serves front-ends until the process is killed.
pub(crate) fn serve(path: &OsStr, fault: &str) {
    let listener = UnixListener::bind(path).expect("a socket");
    listener.set_nonblocking(true).expect("a flag");
    let mut peer: Option<Peer> = None;
    let mut kept = None;
    let mut crowd = 0;
    let mut ghost: Option<Device> = None;
    loop {
        wait(&listener, peer.as_ref(), fault);
        ghost.iter_mut().for_each(Device::serve_rings);
        if let Some(one) = &mut peer {
            if !one.turn(fault) {
                one.device.is_left(one.bytes.len(), &mut one.fds);
                let left = peer.take().map(|peer| peer.device);
                kept = left.as_ref().map(Device::base).filter(|_| fault == "inherits");
                ghost = left.filter(|_| fault == "serves-who-has-left");
                if fault == "serves-once" {
                    return;
                }
            } else if one.bytes.is_empty() || fault != "stalls-with-front-ends" {
                one.device.serve_rings();
            }
        }
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                // No descriptor is left: the front-end waits in the backlog, and so does this; for so long that a
                // machine on which every wake-up waits for a processor sees it rest.
                let none_left = error.kind() != std::io::ErrorKind::WouldBlock;
                if none_left && fault != "spins-without-descriptors" {
                    std::thread::sleep(std::time::Duration::from_millis(400));
                }
                continue;
            }
        };
        crowd = if one_of_many(&listener, &stream) { crowd + 1 } else { 0 };
        if fault == "tires-of-crowds" && crowd > 10 {
            std::process::abort();
        }
        // The first may have left since it was looked at.
        let stays = peer.as_mut().is_some_and(|one| one.turn(fault));
        if stays && fault != "second-replaces" {
            continue;
        }
        let left = peer.take().map(|peer| peer.device.base()).filter(|_| fault == "inherits");
        kept = kept.or(left);
        stream.set_nonblocking(true).expect("a flag");
        let mut device = Device::new(fault);
        device.begin_at(kept.take().unwrap_or(0));
        peer = Some(Peer {
            stream,
            device,
            bytes: Vec::new(),
            fds: Vec::new(),
            late: None,
            deaf: false,
        });
    }
}

/// Whether a front-end has something to say while another waits already.
fn one_of_many(listener: &UnixListener, stream: &UnixStream) -> bool {
    let mut head = [0; HEADER_SIZE];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let spoke =
        rustix::net::recv(stream, &mut head, flags).is_ok_and(|(_, len)| len == HEADER_SIZE);
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let waits = rustix::event::poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&now));
    spoke && waits == Ok(1)
}

/// Sleeps until there is something to do.
fn wait(listener: &UnixListener, peer: Option<&Peer>, fault: &str) {
    let mut set = vec![PollFd::new(listener, PollFlags::IN)];
    let mut polls = fault == "spins" || (fault == "idle-alone" && peer.is_none());
    let ghostly = fault == "serves-who-has-left";
    if let Some(peer) = peer {
        set.push(PollFd::new(&peer.stream, PollFlags::IN));
        set.extend(peer.device.kicks().map(|kick| PollFd::from_borrowed_fd(kick, PollFlags::IN)));
        polls |= peer.bytes.is_empty() && peer.device.is_restless();
        polls |= peer.bytes.len() > HEADER_SIZE && fault == "spins-in-a-message";
    }
    let short = Timespec { tv_sec: 0, tv_nsec: if polls { 0 } else { 1_000_000 } };
    let busy = peer.is_some_and(|peer| peer.device.polls() || peer.device.is_slow());
    let asleep = !polls && !ghostly && !busy;
    let _ = rustix::event::poll(&mut set, (!asleep).then_some(&short));
}

impl Peer {
    /// Everything that came in; false when the connection is over.
    fn turn(&mut self, fault: &str) -> bool {
        loop {
            let wanted = self.wanted();
            let mut buffer = vec![0; wanted];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let mut into = [IoSliceMut::new(&mut buffer)];
            let got = match rustix::net::recvmsg(&self.stream, &mut into, &mut control, flags) {
                Ok(message) => message.bytes,
                Err(rustix::io::Errno::AGAIN) => return true,
                Err(_) => return false,
            };
            let mut came = Vec::new();
            for part in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = part {
                    came.extend(rights);
                }
            }
            let first = self.bytes.is_empty();
            let short = got < wanted && first;
            if got == 0 || (fault == "in-pieces" && got == 1) {
                return false;
            }
            if self.deaf {
                continue;
            }
            match fault {
                "drops-fds-of-pieces" if short => {}
                "leaks-fds-of-bodies" if !first => came.into_iter().for_each(std::mem::forget),
                _ if first => self.fds = came,
                _ => {}
            }
            self.bytes.extend(&buffer[..got]);
            if self.wanted() == 0 && !self.message(fault) {
                return false;
            }
        }
    }

    /// Bytes missing from the message, or from its header; nothing more of one that is too long.
    fn wanted(&self) -> usize {
        match read::<Header>(&self.bytes) {
            None => HEADER_SIZE - self.bytes.len(),
            Some(header) if header.size > 4096 => 0,
            Some(header) => {
                HEADER_SIZE + usize::try_from(header.size).expect("small") - self.bytes.len()
            }
        }
    }

    fn message(&mut self, fault: &str) -> bool {
        let bytes = std::mem::take(&mut self.bytes);
        let mut message = Message::new(&bytes, std::mem::take(&mut self.fds));
        let action = before(fault, &mut message, &self.device);
        self.device.seen.push(message.seen());
        match action {
            Action::Pass => {}
            Action::Close => return false,
            Action::Swallow => return true,
            Action::Deaf => {
                self.deaf = true;
                return true;
            }
            Action::Abort => std::process::abort(),
            Action::Answer(frame) => return self.send(frame),
            Action::Late => match self.late.replace(message) {
                Some(earlier) => message = earlier,
                None => return true,
            },
        }
        self.perform(message, fault)
    }

    fn perform(&mut self, message: Message, fault: &str) -> bool {
        let request = message.clone_head();
        let backend = self.device.backend();
        backend.receive(&message.bytes(), message.fds);
        loop {
            match self.device.backend().poll() {
                Ok(Some(Step::Effect(effect))) => self.device.carry_out(effect),
                Ok(Some(Step::Violation(_))) => {}
                Ok(None) => break,
                Err(_) => return false,
            }
        }
        self.device.settle();
        while let Some(frame) = self.device.backend().transmit() {
            for frame in after(fault, frame, &request, &self.device) {
                if !self.send(frame) {
                    return false;
                }
            }
        }
        if fault == "busy-after-stop" && request.id == 11 {
            self.device.finish_held();
        }
        true
    }

    fn send(&self, frame: Frame<OwnedFd>) -> bool {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<_> = frame.fds.iter().map(AsFd::as_fd).collect();
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let flags = SendFlags::NOSIGNAL;
        let stream = self.stream.as_fd();
        loop {
            match rustix::net::sendmsg(stream, &[IoSlice::new(&frame.bytes)], &mut control, flags) {
                Ok(_) => break,
                Err(rustix::io::Errno::AGAIN) if self.device.is("keeps-replies") => {
                    // Eight KiB for each, and nobody ever gets them.
                    std::mem::forget(vec![1u8; 8192]);
                    return true;
                }
                Err(rustix::io::Errno::AGAIN) => {
                    let mut set = [PollFd::new(&stream, PollFlags::OUT | PollFlags::HUP)];
                    let _ = rustix::event::poll(&mut set, None);
                }
                Err(_) => return false,
            }
        }
        true
    }
}
