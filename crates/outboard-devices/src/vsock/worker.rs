//! Serves the queues of the socket device (virtio 1.3 §5.10.2): 0 receives, 1 transmits, 2 is for events.
//!
//! Invariant: a receive buffer is taken only when there is a packet for it, a packet of the guest only when
//! what it may cause has room.

use std::os::fd::AsFd;
use std::sync::Arc;

use outboard::{Error, Request, Served, Worker, WorkerContext};

use super::Shared;

/// Queues.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, as it stands in a buffer.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// See the module.
#[derive(Debug)]
pub struct VsockWorker {
    shared: Arc<Shared>,
}

impl VsockWorker {
    pub(super) fn new(shared: Arc<Shared>, context: &mut WorkerContext<'_>) -> Result<Self, Error> {
        context.watch(shared.lock().as_fd(), 0)?;
        Ok(Self { shared })
    }
}

impl Worker for VsockWorker {
    fn wants(&mut self, queue: u16) -> bool {
        let mut hub = self.shared.lock();
        match queue {
            _ if hub.rests() => false,
            RECEIVE => hub.has_words(),
            TRANSMIT => hub.has_room(),
            _ => hub.owes_reset,
        }
    }

    fn serve(&mut self, mut request: Request<'_>) -> Result<Served, Error> {
        let mut hub = self.shared.lock();
        let written = match request.queue() {
            RECEIVE => hub.speak(request.writable())?,
            TRANSMIT => {
                hub.hear(request.readable());
                0
            }
            _ => {
                // A buffer that is too short comes back empty, and the event waits for another one.
                let told = hub.owes_reset && request.writable().write_all(&TRANSPORT_RESET).is_ok();
                hub.owes_reset &= !told;
                if told { 4 } else { 0 }
            }
        };
        drop(hub);
        Ok(request.done(written))
    }

    fn event(&mut self, _token: u32) -> Result<(), Error> {
        let mut hub = self.shared.lock();
        while hub.look()? {}
        Ok(())
    }
}
