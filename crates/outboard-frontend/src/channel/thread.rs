//! A channel that is served by a thread of its own.
//!
//! A back-end may wait for the answer on its channel before it answers on the main socket; a caller that
//! waits for the main socket can then not serve the channel too. Invariant: the thread ends when this is
//! dropped, whatever the back-end does; events that nobody takes make the back-end wait, not memory grow.

use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::Shutdown;

use super::{Channel, ChannelEvent, SharedObjects, SharedRegions};
use crate::error::Error;

/// Events that wait for the caller before the back-end waits too.
const BACKLOG: usize = 256;
/// The thread looks up this often; it is woken by the socket, so this is no delay of anything.
const LONG: Duration = Duration::from_secs(3600);

/// A thread that serves a channel. See the module's text.
#[derive(Debug)]
pub struct ChannelThread {
    events: Option<Receiver<Result<ChannelEvent, Error>>>,
    socket: OwnedFd,
    regions: SharedRegions,
    objects: SharedObjects,
    thread: Option<JoinHandle<()>>,
    over: bool,
}

impl ChannelThread {
    pub(super) fn spawn(channel: Channel, socket: OwnedFd) -> Result<Self, Error> {
        let (sender, events) = sync_channel(BACKLOG);
        let (regions, objects) = (channel.regions().clone(), channel.objects().clone());
        let thread = std::thread::Builder::new()
            .name("outboard-channel".to_owned())
            .spawn(move || serve(channel, &sender))
            .map_err(|source| Error::Host { call: "starting a thread", source })?;
        let (events, thread) = (Some(events), Some(thread));
        Ok(Self { events, socket, regions, objects, thread, over: false })
    }

    /// The next event; `None` when none comes before `timeout`.
    ///
    /// # Errors
    /// The channel is over: why, and then [`Error::GivenUp`].
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<ChannelEvent>, Error> {
        let Some(events) = self.events.as_ref().filter(|_| !self.over) else {
            return Err(Error::GivenUp);
        };
        match events.recv_timeout(timeout) {
            Ok(Ok(event)) => Ok(Some(event)),
            Ok(Err(error)) => {
                self.over = true;
                Err(error)
            }
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(Error::GivenUp),
        }
    }

    /// The shared-memory regions that the back-end maps into.
    #[must_use]
    pub const fn regions(&self) -> &SharedRegions {
        &self.regions
    }

    /// The shared objects that the back-end can look up.
    #[must_use]
    pub const fn objects(&self) -> &SharedObjects {
        &self.objects
    }
}

impl Drop for ChannelThread {
    fn drop(&mut self) {
        // A thread that waits for the socket hears of the first, one that waits for us of the second.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
        self.events = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(mut channel: Channel, events: &SyncSender<Result<ChannelEvent, Error>>) {
    loop {
        let event = match channel.next_event(LONG) {
            Ok(Some(event)) => Ok(event),
            Ok(None) => continue,
            Err(error) => Err(error),
        };
        let last = event.is_err();
        if events.send(event).is_err() || last {
            return;
        }
    }
}
