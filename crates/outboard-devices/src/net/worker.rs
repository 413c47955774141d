//! Serves pairs of queues of a card (virtio 1.3 §5.1.6): even ones receive, odd ones transmit, and one is for
//! commands.
//!
//! Invariant: a receive buffer is taken only when there is a packet for it, a packet of the guest only when
//! the link has room for it.

use std::os::fd::AsFd;
use std::sync::Arc;

use outboard::protocol::virtio;
use outboard::{Error, Gather, Request, Served, Worker, WorkerContext};

use super::card::{Card, Counters, Rules};
use super::config::feature;
use super::control;
use super::frame::{ETHERNET, Frame, HEADER, MOST, OLD_HEADER};
use super::link::{Link, Sent};
use crate::watches::{self, Watches};

/// Packets looked at for one that passes, before other work has its turn.
const LOOKS: u32 = 64;
/// Tokens of what a worker waits for.
const LINKS: u32 = 0;
const BELL: u32 = 1;

fn header_length(features: u64) -> usize {
    if features & (virtio::VERSION_1 | feature::MRG_RXBUF) != 0 { HEADER } else { OLD_HEADER }
}

/// A receive and a transmit queue, and their link.
#[derive(Debug)]
struct Pair {
    /// Among all pairs of the card.
    number: usize,
    link: Option<Link>,
    /// The packet that the guest gets next, when there is one.
    next: Frame,
    /// Buffers were taken for it, and more are needed.
    gathers: bool,
    counters: Counters,
}

/// See the module.
#[derive(Debug)]
pub struct NetWorker {
    card: Arc<Card>,
    watches: Watches,
    /// Workers that the card has.
    workers: usize,
    pairs: Vec<Pair>,
    rules: Arc<Rules>,
    /// Which change of the rules that was.
    seen: u64,
    /// The queue of commands, if it is known and here.
    control: Option<u16>,
    /// A packet of the guest on its way.
    out: Frame,
}

impl NetWorker {
    pub(super) fn new(
        card: Arc<Card>,
        workers: usize,
        context: &mut WorkerContext<'_>,
    ) -> Result<Self, Error> {
        let watches = Watches::new()?;
        context.watch(watches.as_fd(), LINKS)?;
        if context.thread() == 0 {
            context.watch(card.bell.as_fd(), BELL)?;
        }
        let pairs = (context.thread()..card.pairs()).step_by(workers).map(|number| Pair {
            number,
            link: None,
            next: Frame::new(),
            gathers: false,
            counters: card.counters.get(number).cloned().unwrap_or_default(),
        });
        let pairs = pairs.collect();
        let (seen, rules) = (card.changes(), card.rules());
        let (control, out) = (None, Frame::new());
        let mut worker = Self { card, watches, workers, pairs, rules, seen, control, out };
        worker.take_links()?;
        Ok(worker)
    }

    /// Takes the links of its pairs. After a panic the worker before this one still has them: then they come
    /// when a ring starts.
    fn take_links(&mut self) -> Result<(), Error> {
        for pair in self.pairs.iter_mut().filter(|pair| pair.link.is_none()) {
            let Some(mut link) = self.card.take_link(pair.number) else { continue };
            link.watch(&self.watches, pair.number)?;
            pair.link = Some(link);
        }
        Ok(())
    }

    fn pair(&mut self, number: usize) -> Option<&mut Pair> {
        self.pairs.get_mut(number / self.workers.max(1))
    }

    /// Whether there is a packet for the guest.
    fn has_packet(&mut self, number: usize) -> bool {
        let changes = self.card.changes();
        if changes != self.seen {
            (self.seen, self.rules) = (changes, self.card.rules());
        }
        let Self { card, pairs, rules, workers, .. } = self;
        let Some(pair) = pairs.get_mut(number / (*workers).max(1)) else { return false };
        if !pair.next.is_empty() {
            return true;
        }
        let Some(link) = pair.link.as_mut().filter(|_| card.is_active(number)) else {
            return false;
        };
        for _ in 0..LOOKS {
            if !link.receive(&mut pair.next) {
                pair.next.clear();
                pair.counters.too_large.add(link.take_too_long());
                card.flush_capture();
                return false;
            }
            if !rules.filter.passes(rules.mac, pair.next.packet()) {
                pair.counters.filtered.add(1);
            } else if !pair.next.is_understood(card.offloads()) {
                pair.counters.too_large.add(1);
            } else {
                return true;
            }
        }
        pair.next.clear();
        false
    }

    fn receive(&mut self, mut request: Request<'_>, number: usize) -> Result<Served, Error> {
        let features = request.features();
        let header = header_length(features);
        let card = Arc::clone(&self.card);
        let Some(pair) = self.pair(number) else { return Ok(request.done(0)) };
        if pair.next.is_empty() {
            return Ok(request.done(0));
        }
        let length = header + pair.next.packet().len();
        // A driver before this one may have begun to gather.
        pair.gathers &= features & feature::MRG_RXBUF != 0;
        let mut room = request.writable();
        let served = if !pair.gathers && room.len() >= length as u64 {
            pair.next.set_buffers(1);
            let bytes = pair.next.bytes();
            if header == HEADER {
                room.write_all(bytes)?;
            } else {
                room.write_all(bytes.get(..header).unwrap_or_default())?;
                room.write_all(pair.next.packet())?;
            }
            request.done(u32::try_from(length).unwrap_or(0))
        } else if features & feature::MRG_RXBUF == 0 {
            pair.counters.too_large.add(1);
            pair.next.clear();
            return Ok(request.done(0));
        } else {
            match request.gather(length as u64) {
                Gather::Enough(gathered) => {
                    pair.next.set_buffers(gathered.len());
                    gathered.done(pair.next.bytes())
                }
                Gather::Later(served) => {
                    pair.gathers = true;
                    return Ok(served);
                }
                Gather::Never(served) => {
                    pair.counters.too_large.add(1);
                    pair.gathers = false;
                    pair.next.clear();
                    return Ok(served);
                }
            }
        };
        pair.gathers = false;
        card.capture(pair.next.packet());
        pair.counters.received.add(1);
        pair.counters.received_bytes.add(pair.next.packet().len() as u64);
        pair.next.clear();
        Ok(served)
    }

    fn transmit(&mut self, request: &mut Request<'_>, number: usize) -> Result<(), Error> {
        let features = request.features();
        let header = header_length(features);
        let Self { card, pairs, out, workers, .. } = self;
        let Some(pair) = pairs.get_mut(number / (*workers).max(1)) else { return Ok(()) };
        let mut from = request.readable();
        let length = from.len().checked_sub(header as u64);
        let length = length.and_then(|length| usize::try_from(length).ok());
        let Some(length) = length.filter(|length| (ETHERNET..=MOST).contains(length)) else {
            pair.counters.malformed.add(1);
            return Ok(());
        };
        let Some(room) = out.room().get_mut(..HEADER + length) else {
            // A switch's frames are as long as its packets.
            pair.counters.refused.add(1);
            return Ok(());
        };
        if header == HEADER {
            from.read_exact(room)?;
        } else {
            let (head, packet) = room.split_at_mut(HEADER);
            from.read_exact(head.get_mut(..header).unwrap_or_default())?;
            from.read_exact(packet)?;
        }
        out.set_length(HEADER + length);
        if !out.is_sendable(features) {
            pair.counters.malformed.add(1);
            return Ok(());
        }
        pair.send(card, out);
        Ok(())
    }

    fn command(&self, request: &mut Request<'_>) -> u32 {
        if request.writable().is_empty() {
            // Nobody would hear what came of it.
            return 0;
        }
        let features = request.features();
        let ack = match control::read(request.readable(), features, self.card.pairs()) {
            Some(command) => {
                self.card.carry_out(command);
                control::OK
            }
            None => control::ERR,
        };
        u32::from(request.writable().write_all(&[ack]).is_ok())
    }

    /// The links have packets, or room again, or are up or down.
    fn look_at_links(&mut self) -> Result<(), Error> {
        loop {
            let edges = self.watches.look()?;
            // Fewer than there is room for are all.
            let all = edges.len() < watches::BATCH;
            for edge in edges {
                let workers = self.workers.max(1);
                let pair = self.pairs.get_mut(Link::number(edge) / workers);
                if let Some(link) = pair.and_then(|pair| pair.link.as_mut()) {
                    link.edge(edge, &self.watches);
                }
            }
            if all {
                break;
            }
        }
        self.notice_link();
        Ok(())
    }

    /// One link that is down takes the card down with it: they are queues of one interface.
    fn notice_link(&self) {
        let mut links = self.pairs.iter().filter_map(|pair| pair.link.as_ref());
        if let Some(link) = links.next() {
            self.card.notice_link(link.is_up());
        }
    }

    /// Sends what the card itself has to say.
    fn run_errands(&mut self) {
        for packet in self.card.errands() {
            let Self { card, pairs, out, .. } = self;
            if let (Some(pair), Some(room)) = (pairs.first_mut(), out.plain(packet.len())) {
                room.copy_from_slice(&packet);
                pair.send(card, out);
                pair.flush();
            }
        }
    }
}

impl Pair {
    fn send(&mut self, card: &Card, frame: &mut Frame) {
        card.capture(frame.packet());
        let length = frame.packet().len();
        let sent = self.link.as_mut().map_or(Sent::Down, |link| link.send(frame));
        match sent {
            Sent::Yes => {
                self.counters.sent.add(1);
                self.counters.sent_bytes.add(length as u64);
            }
            Sent::Down => self.counters.link_down.add(1),
            Sent::Refused => self.counters.refused.add(1),
        }
    }

    /// The receive ring runs, or no more.
    fn runs(&mut self, runs: bool) {
        let Some(link) = &mut self.link else { return };
        link.runs(runs);
        // What waits in a switch is dropped then, and this waits with it.
        if let Link::Port(port) = link
            && !runs
            && !self.gathers
            && !self.next.is_empty()
        {
            self.next.clear();
            port.lose();
        }
    }

    fn flush(&mut self) {
        if let Some(link) = &mut self.link {
            link.flush();
        }
    }
}

impl Worker for NetWorker {
    fn wants(&mut self, queue: u16) -> bool {
        if Some(queue) == self.control {
            return true;
        }
        let number = usize::from(queue / 2);
        if queue.is_multiple_of(2) {
            let wants = self.has_packet(number);
            if !wants {
                self.notice_link();
            }
            return wants;
        }
        let link = self.pair(number).and_then(|pair| pair.link.as_mut());
        link.is_none_or(Link::has_room)
    }

    fn wants_at_last(&mut self, queue: u16) -> bool {
        if self.wants(queue) {
            return true;
        }
        // Packets that did not pass may have others behind them, which nothing announces.
        let number = usize::from(queue / 2);
        let active = self.card.is_active(number);
        let link = self.pair(number).and_then(|pair| pair.link.as_ref());
        queue.is_multiple_of(2) && active && link.is_some_and(Link::is_readable)
    }

    fn serve(&mut self, mut request: Request<'_>) -> Result<Served, Error> {
        let queue = request.queue();
        let number = usize::from(queue / 2);
        if Some(queue) == self.control {
            let written = self.command(&mut request);
            return Ok(request.done(written));
        }
        if queue.is_multiple_of(2) {
            return self.receive(request, number);
        }
        self.transmit(&mut request, number)?;
        Ok(request.done(0))
    }

    fn turned(&mut self, queue: u16) {
        if queue % 2 == 1
            && let Some(pair) = self.pair(usize::from(queue / 2))
        {
            pair.flush();
        }
    }

    fn serves(&mut self, queue: u16, reach: bool) {
        let control = self.card.control_queue();
        if control == Some(queue) {
            self.control = control.filter(|_| reach);
            self.card.is_controlled();
            return;
        }
        if self.control == Some(queue) {
            self.control = None;
        }
        if let Err(error) = self.take_links() {
            tracing::warn!("a link cannot be watched: {error}");
        }
        if queue.is_multiple_of(2) {
            self.card.runs(usize::from(queue / 2), reach);
            if let Some(pair) = self.pair(usize::from(queue / 2)) {
                pair.runs(reach);
            }
        } else if let Some(pair) = self.pair(usize::from(queue / 2)) {
            pair.flush();
        }
    }

    fn event(&mut self, token: u32) -> Result<(), Error> {
        if token == BELL {
            self.run_errands();
            return Ok(());
        }
        self.look_at_links()
    }
}

impl Drop for NetWorker {
    fn drop(&mut self) {
        for pair in &mut self.pairs {
            pair.counters.stopped.add(u64::from(!pair.next.is_empty()));
            if let Some(link) = pair.link.take() {
                self.card.put_link(pair.number, link);
            }
        }
    }
}
