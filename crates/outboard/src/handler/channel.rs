//! The session's end of the back-end channel: plugs the front-end's socket in and moves messages,
//! beside the main socket and never in its way (contract §3).
//!
//! The driver runs in the session's own task. While a message of the main socket waits for a
//! queue, the channel goes on: the answer that the queue waits for may come over it.

use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use outboard_protocol::{ProtocolFeatures, Refusal};
use rustix::net::{AddressFamily, SocketType, sockopt};
use tracing::warn;

use super::session::Session;
use crate::channel::BackendChannel;
use crate::connection::{Connection, Received};
use crate::device::VhostUserDevice;
use crate::reactor::{Raced, Reactor, race};

/// The longest reply: header and the largest payload.
const BUFFER: usize = 12 + 4096;

/// The socket of the moment, and how often it has changed.
pub(crate) struct Plug<R: Reactor>(Mutex<(u64, Option<Arc<Connection<R>>>)>);

impl<R: Reactor> Plug<R> {
    /// Nothing is plugged in.
    pub(crate) fn new() -> Self {
        Self(Mutex::new((0, None)))
    }

    pub(super) fn get(&self) -> (u64, Option<Arc<Connection<R>>>) {
        let plugged = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (plugged.0, plugged.1.clone())
    }

    pub(super) fn set(&self, connection: Option<Arc<Connection<R>>>) {
        let mut plugged = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *plugged = (plugged.0 + 1, connection);
    }
}

/// Moves messages for as long as it is polled; never resolves.
pub(crate) async fn drive<R: Reactor>(reactor: R, channel: BackendChannel, plug: Arc<Plug<R>>) {
    loop {
        let (number, connection) = plug.get();
        let changed = poll_fn(|context| {
            channel.is_waiting(context);
            if plug.get().0 == number { Poll::Pending } else { Poll::Ready(()) }
        });
        match connection {
            Some(connection) => {
                let both = race(send(&channel, &connection), receive(&channel, &connection));
                let moved = race(both, expire(&reactor, &channel));
                // First: what is asked of the next socket must not be sent over this one.
                if let Raced::Second(_) = race(changed, moved).await {
                    channel.close();
                    plug.set(None);
                }
            }
            None => changed.await,
        }
    }
}

/// Sends what is asked; resolves when the front-end has closed its end.
async fn send<R: Reactor>(channel: &BackendChannel, connection: &Connection<R>) {
    loop {
        let frame = poll_fn(|context| match channel.transmit(context) {
            Some(frame) => Poll::Ready(frame),
            None => Poll::Pending,
        });
        if let Err(error) = connection.send(frame.await).await {
            warn!("back-end channel: {error}");
            return;
        }
    }
}

/// Takes answers; resolves when the front-end has closed its end or broke the rules.
async fn receive<R: Reactor>(channel: &BackendChannel, connection: &Connection<R>) {
    let mut buffer = vec![0; BUFFER];
    loop {
        let room = buffer.get_mut(..channel.wanted().clamp(1, BUFFER)).unwrap_or_default();
        let taken = match connection.receive(room).await {
            Ok(Received::Bytes(count, fds)) => {
                channel.receive(room.get(..count).unwrap_or_default(), fds)
            }
            Ok(Received::End) => return,
            Err(error) => {
                warn!("back-end channel: {error}");
                return;
            }
        };
        if let Err(violation) = taken {
            warn!("back-end channel closed: {violation}");
            return;
        }
    }
}

/// Gives overdue requests up; never resolves.
async fn expire<R: Reactor>(reactor: &R, channel: &BackendChannel) {
    loop {
        match channel.expire() {
            Some(until) => {
                let left = until.saturating_duration_since(Instant::now());
                reactor.sleep(left.max(Duration::from_millis(1))).await;
            }
            None => {
                poll_fn(
                    |context| {
                        if channel.is_waiting(context) { Poll::Ready(()) } else { Poll::Pending }
                    },
                )
                .await;
            }
        }
    }
}

impl<D: VhostUserDevice, R: Reactor> Session<'_, D, R> {
    /// SET_BACKEND_REQ_FD: the new channel takes over, the old one is closed.
    pub(super) async fn set_channel(&mut self, socket: OwnedFd) -> Result<(), Refusal> {
        let stream = sockopt::socket_domain(&socket) == Ok(AddressFamily::UNIX)
            && sockopt::socket_type(&socket) == Ok(SocketType::STREAM);
        if !stream {
            return Err(Refusal::because("the back-end channel is no Unix stream socket"));
        }
        let connection = Connection::new(self.reactor.clone(), socket);
        let connection = connection.map_err(Refusal::because)?;
        self.plug.set(Some(Arc::new(connection)));
        let protocol = self.backend.acked_protocol_features();
        self.channel.open(protocol, self.backend.acked_features());
        self.channel_given().await
    }

    /// Whether notifications may go as messages.
    pub(super) fn is_in_band(&self) -> bool {
        let protocol = self.backend.acked_protocol_features();
        protocol.contains(ProtocolFeatures::INBAND_NOTIFICATIONS)
    }
}
