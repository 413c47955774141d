//! Requests of one queue that are answered together: buffers that hold one packet (virtio 1.3 §5.1.6.3.1,
//! "merged" receive buffers).
//!
//! Invariant: what is gathered and not enough stays with the queue, in flight, until more comes; it goes
//! back with length 0 when the ring is to stop, when its memory goes away or when all of the ring is too
//! little.

use outboard_queue::Chain;

use super::Queue;
use crate::request::Served;

/// What a queue keeps of requests that are to be answered together.
#[derive(Debug, Default)]
pub(crate) struct Gathering {
    chains: Vec<Chain>,
    /// Bytes that can be written to them.
    room: u64,
    /// Their descriptors, at least.
    pieces: usize,
}

impl Gathering {
    fn add(&mut self, mut chain: Chain) {
        let room = chain.writable();
        self.pieces += room.segments().len().max(1);
        self.room = self.room.saturating_add(room.len());
        self.chains.push(chain);
    }
}

/// What came of [`Request::gather`](crate::Request::gather).
#[derive(Debug)]
pub enum Gather<'a> {
    /// Enough.
    Enough(Gathered<'a>),
    /// The driver has to offer more first. What is there is kept; the next request goes on with it.
    Later(Served),
    /// All that the ring can hold is too little: it went back, with length 0.
    Never(Served),
}

/// Requests that are answered together, in the order in which the driver offered them.
#[derive(Debug)]
pub struct Gathered<'a> {
    queue: &'a mut Queue,
}

impl Gathered<'_> {
    /// How many there are, at least one.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "there is one at least")]
    pub fn len(&self) -> usize {
        self.queue.gathering.chains.len()
    }

    /// Answers all of them: `bytes` go to the front of their room, as far as it goes.
    pub fn done(self, mut bytes: &[u8]) -> Served {
        let mut gathering = std::mem::take(&mut self.queue.gathering);
        for mut chain in gathering.chains.drain(..) {
            let put = chain.writable().place(bytes);
            bytes = bytes.get(put..).unwrap_or_default();
            self.queue.complete(chain, u32::try_from(put).unwrap_or(0));
        }
        // Its room is used again.
        self.queue.gathering.chains = gathering.chains;
        Served::later()
    }
}

impl Queue {
    /// Takes requests, `first` before all others of the ring, until their room is `needed` bytes.
    pub(crate) fn gather(&mut self, first: Chain, needed: u64) -> Gather<'_> {
        self.gathering.add(first);
        loop {
            if self.gathering.room >= needed {
                return Gather::Enough(Gathered { queue: self });
            }
            if self.gathering.pieces >= usize::from(self.size()) {
                self.scatter();
                return Gather::Never(Served::later());
            }
            match self.pop_chain() {
                Some(chain) => self.gathering.add(chain),
                None => return Gather::Later(Served::later()),
            }
        }
    }

    /// What was gathered goes back.
    pub(crate) fn scatter(&mut self) {
        let mut gathering = std::mem::take(&mut self.gathering);
        for chain in gathering.chains.drain(..) {
            self.complete(chain, 0);
        }
        self.gathering.chains = gathering.chains;
    }
}
