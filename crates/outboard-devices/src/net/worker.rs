//! Serves the card's queues (virtio 1.3 §5.1.6): 0 receives, 1 transmits, 2 is for commands.
//!
//! Invariant: a receive buffer is taken only when there is a packet for it, a packet of the guest only when
//! the link has room for it.

use std::os::fd::AsFd;
use std::sync::Arc;

use outboard::protocol::virtio;
use outboard::{Error, Request, Served, Worker, WorkerContext};

use super::card::count;
use super::{Shared, control, stream};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Bytes of a header, and of one before virtio 1.
const HEADER: usize = 12;
const OLD_HEADER: usize = 10;
/// Where a header says how many buffers a packet has.
const BUFFERS_AT: usize = 10;
/// Where it says how the packet is to be cut.
const GSO_TYPE_AT: usize = 1;

fn header_length(features: u64) -> usize {
    if features & virtio::VERSION_1 != 0 { HEADER } else { OLD_HEADER }
}

/// See the module.
#[derive(Debug)]
pub struct NetWorker {
    shared: Arc<Shared>,
    /// A packet of the guest on its way.
    packet: Vec<u8>,
}

impl NetWorker {
    pub(super) fn new(shared: Arc<Shared>, context: &mut WorkerContext<'_>) -> Result<Self, Error> {
        context.watch(shared.watches.as_fd(), 0)?;
        Ok(Self { shared, packet: Vec::new() })
    }

    fn receive(&mut self, request: &mut Request<'_>) -> Result<u32, Error> {
        let counters = &self.shared.counters;
        let header = header_length(request.features());
        let mut card = self.shared.lock();
        if !card.has_packet(counters) {
            return Ok(0);
        }
        let packet = card.take_packet();
        let mut room = request.writable();
        let length = header + packet.len();
        if room.len() < length as u64 {
            count(&counters.too_large, 1);
            card.give_back(packet);
            return Ok(0);
        }
        let mut head = [0; HEADER];
        if let Some(buffers) = head.get_mut(BUFFERS_AT) {
            *buffers = 1;
        }
        room.write_all(head.get(..header).unwrap_or_default())?;
        room.write_all(&packet)?;
        card.capture.packet(&packet);
        count(&counters.received, 1);
        count(&counters.received_bytes, packet.len());
        card.give_back(packet);
        Ok(u32::try_from(length).unwrap_or(0))
    }

    fn transmit(&mut self, request: &mut Request<'_>) -> Result<(), Error> {
        let counters = &self.shared.counters;
        let header = header_length(request.features());
        let mut from = request.readable();
        let length = from.len().checked_sub(header as u64);
        let length = length.and_then(|length| usize::try_from(length).ok());
        let Some(length) = length.filter(|length| *length <= stream::MOST) else {
            count(&counters.malformed, 1);
            return Ok(());
        };
        let mut head = [0; HEADER];
        if let Some(head) = head.get_mut(..header) {
            from.read_exact(head)?;
        }
        // No offload was agreed on: a checksum to be filled in is the driver's lie, and so is a packet to be
        // cut, which no link takes.
        if head.get(GSO_TYPE_AT).is_some_and(|kind| *kind != 0) {
            count(&counters.malformed, 1);
            return Ok(());
        }
        self.packet.resize(length, 0);
        from.read_exact(&mut self.packet)?;
        self.shared.lock().send(&self.packet, counters);
        Ok(())
    }

    fn command(&mut self, request: &mut Request<'_>) -> u32 {
        if request.writable().is_empty() {
            // Nobody would hear what came of it.
            return 0;
        }
        let features = request.features();
        let ack = match control::read(request.readable(), features) {
            Some(command) => {
                self.shared.lock().carry_out(command);
                control::OK
            }
            None => control::ERR,
        };
        u32::from(request.writable().write_all(&[ack]).is_ok())
    }
}

impl Worker for NetWorker {
    fn wants(&mut self, queue: u16) -> bool {
        match queue {
            RECEIVE => {
                let wants = self.shared.lock().has_packet(&self.shared.counters);
                self.shared.notice_link();
                wants
            }
            TRANSMIT => self.shared.lock().link.has_room(),
            _ => true,
        }
    }

    fn serve(&mut self, mut request: Request<'_>) -> Result<Served, Error> {
        let written = match request.queue() {
            RECEIVE => self.receive(&mut request)?,
            TRANSMIT => {
                self.transmit(&mut request)?;
                0
            }
            _ => self.command(&mut request),
        };
        Ok(request.done(written))
    }

    fn event(&mut self, _token: u32) -> Result<(), Error> {
        loop {
            let edges = self.shared.watches.look()?;
            if edges.is_empty() {
                break;
            }
            let mut card = self.shared.lock();
            for edge in edges {
                card.link.edge(edge, &self.shared.watches);
            }
        }
        self.shared.notice_link();
        Ok(())
    }
}
