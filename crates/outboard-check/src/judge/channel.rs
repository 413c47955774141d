//! The judge's end of the back-end channel: requests of the back-end, read one at a time and answered
//! (vhost-user, "Back-end communication", SET_BACKEND_REQ_FD).
//!
//! Invariant: every wait is bounded; what comes is noted and judged by the caller.

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use outboard_protocol::header::{FLAG_NEED_REPLY, HEADER_SIZE, Header, REPLY_FLAGS};
use outboard_protocol::payload::read;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use zerocopy::IntoBytes as _;

use super::conformance::optional::pair;
use super::finding::{Finding, Outcome, ensure};
use super::wire::wait;

/// Longest request that a back-end has, with room to spare.
const LONGEST: u32 = 4096;

/// One request of the back-end.
#[derive(Debug)]
pub(crate) struct Asked {
    header: Header,
    pub(crate) payload: Vec<u8>,
}

impl Asked {
    pub(crate) const fn id(&self) -> u32 {
        self.header.request
    }
}

/// Our end.
#[derive(Debug)]
pub(crate) struct Channel {
    fd: OwnedFd,
    incoming: Vec<u8>,
}

impl Channel {
    /// A channel, and the end that goes to the back-end.
    pub(crate) fn new() -> Outcome<(Self, OwnedFd)> {
        let (ours, theirs) = pair()?;
        Ok((Self { fd: ours.into(), incoming: Vec::new() }, theirs.into()))
    }

    /// The next request; none came within `time`, or the back-end closed its end.
    pub(crate) fn next(&mut self, time: Duration) -> Outcome<Option<Asked>> {
        let until = Instant::now() + time;
        loop {
            if let Some(asked) = self.take()? {
                return Ok(Some(asked));
            }
            let mut buffer = [0; 4096];
            match rustix::net::recv(&self.fd, &mut buffer, RecvFlags::DONTWAIT) {
                Ok((0, _)) | Err(Errno::CONNRESET) => return Ok(None),
                Ok((count, _)) => self.incoming.extend(buffer.iter().take(count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Ok(None);
                    }
                    wait(self.fd.as_fd(), PollFlags::IN, left);
                }
                Err(errno) => return Err(Finding::own("read the back-end channel", errno)),
            }
        }
    }

    fn take(&mut self) -> Outcome<Option<Asked>> {
        let Some(header) = read::<Header>(&self.incoming) else { return Ok(None) };
        let Header { request, size, .. } = header;
        ensure!(size <= LONGEST, "its request {request} on the channel announces {size} bytes");
        let end = HEADER_SIZE + usize::try_from(size).unwrap_or(0);
        let Some(payload) = self.incoming.get(HEADER_SIZE..end) else { return Ok(None) };
        let payload = payload.to_vec();
        self.incoming.drain(..end);
        Ok(Some(Asked { header, payload }))
    }

    /// Answers where an answer is asked for: 0 is yes.
    pub(crate) fn answer(&self, asked: &Asked, code: u64) -> Outcome {
        if asked.header.flags & FLAG_NEED_REPLY == 0 {
            return Ok(());
        }
        let header = Header { request: asked.id(), flags: REPLY_FLAGS, size: 8 };
        let bytes = [header.as_bytes(), code.as_bytes()].concat();
        match rustix::net::send(&self.fd, &bytes, SendFlags::NOSIGNAL) {
            Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => Ok(()),
            Err(errno) => Err(Finding::own("answer on the back-end channel", errno)),
        }
    }
}
