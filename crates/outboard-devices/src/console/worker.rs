//! Serves the console's queues (virtio 1.3 §5.3.6).
//!
//! ```text
//!  0 receive, 1 transmit of port 0   2 control receive, 3 control transmit   4, 5 of port 1   6, 7 of port 2 …
//! ```
//! Invariant: a receive buffer is taken only when there is something to put into it, a transmit request
//! only when there is room for it.

use std::os::fd::AsFd;
use std::sync::Arc;

use outboard::{Error, Request, Served, Worker, WorkerContext};

use super::Shared;
use super::control::{HEADER, Said};
use crate::watches;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Receive(usize),
    Transmit(usize),
    ControlReceive,
    ControlTransmit,
}

impl Role {
    /// Of queue `index` (§5.3.2).
    pub(super) fn of(index: u16) -> Self {
        let pair = usize::from(index / 2);
        match (pair, index % 2) {
            (1, 0) => Self::ControlReceive,
            (1, _) => Self::ControlTransmit,
            (pair, even) => {
                let port = pair.saturating_sub(1);
                if even == 0 { Self::Receive(port) } else { Self::Transmit(port) }
            }
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct ConsoleWorker {
    shared: Arc<Shared>,
}

impl ConsoleWorker {
    pub(super) fn new(shared: Arc<Shared>, context: &mut WorkerContext<'_>) -> Result<Self, Error> {
        context.watch(shared.watches.as_fd(), 0)?;
        Ok(Self { shared })
    }
}

impl Worker for ConsoleWorker {
    fn wants(&mut self, queue: u16) -> bool {
        let mut hub = self.shared.lock();
        match Role::of(queue) {
            _ if hub.rests => false,
            Role::Receive(port) => hub.has_input(port),
            Role::Transmit(port) => hub.has_room(port),
            Role::ControlReceive => hub.next_message().is_some(),
            Role::ControlTransmit => true,
        }
    }

    fn serve(&mut self, mut request: Request<'_>) -> Result<Served, Error> {
        let mut hub = self.shared.lock();
        let mut written = 0;
        match Role::of(request.queue()) {
            Role::Receive(port) if hub.has_input(port) => {
                if let Some(port) = hub.ports.get_mut(port) {
                    written = port.receive(request.writable())?;
                }
            }
            Role::Transmit(port) => {
                if let Some(port) = hub.ports.get_mut(port) {
                    port.transmit(request.readable())?;
                }
            }
            Role::ControlReceive => {
                // A buffer that is too short comes back empty, and the message waits for another one.
                if let Some((port, fact, bytes)) = hub.next_message()
                    && request.writable().write_all(&bytes).is_ok()
                {
                    hub.told(port, fact);
                    written = u32::try_from(bytes.len()).unwrap_or(0);
                }
            }
            Role::ControlTransmit => {
                let mut header = [0; HEADER];
                if request.readable().read_exact(&mut header).is_ok()
                    && let Some(said) = Said::read(header)
                {
                    hub.hear(said);
                }
            }
            Role::Receive(_) => {}
        }
        drop(hub);
        Ok(request.done(written))
    }

    fn event(&mut self, _token: u32) -> Result<(), Error> {
        loop {
            let edges = self.shared.watches.look()?;
            // Fewer than there is room for are all.
            let all = edges.len() < watches::BATCH;
            let mut hub = self.shared.lock();
            for edge in edges {
                hub.edge(edge, &self.shared);
            }
            if all {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_are_numbered_as_the_specification_has_them() {
        let roles: Vec<_> = (0..8).map(Role::of).collect();
        let expected = [
            Role::Receive(0),
            Role::Transmit(0),
            Role::ControlReceive,
            Role::ControlTransmit,
            Role::Receive(1),
            Role::Transmit(1),
            Role::Receive(2),
            Role::Transmit(2),
        ];
        assert_eq!(roles, expected);
    }
}
