//! Bytes of one host socket on their way into receive buffers: read with one call, given to the guest in as
//! many packets as its buffers and its credit make of them.
//!
//! Invariant: it holds bytes of one connection at a time, and gives them in order.

/// Bytes that it holds at most: the longest message.
pub(super) const ROOM: usize = 256 << 10;
/// Bytes of a stream that are read at once.
pub(super) const CHUNK: usize = 64 << 10;

/// See the module.
#[derive(Debug)]
pub(super) struct Stage {
    bytes: Vec<u8>,
    from: usize,
    to: usize,
    owner: usize,
}

impl Stage {
    pub(super) fn new() -> Self {
        Self { bytes: Vec::new(), from: 0, to: 0, owner: usize::MAX }
    }

    /// Bytes of connection `id`.
    pub(super) fn bytes_of(&self, id: usize) -> &[u8] {
        let bytes = self.bytes.get(self.from..self.to).unwrap_or_default();
        if self.owner == id { bytes } else { &[] }
    }

    /// Room for `most` bytes to be read into, in place of what it holds.
    pub(super) fn room(&mut self, most: usize) -> &mut [u8] {
        (self.from, self.to) = (0, 0);
        let most = most.min(ROOM);
        if self.bytes.len() < most {
            self.bytes.resize(most, 0);
        }
        self.bytes.get_mut(..most).unwrap_or_default()
    }

    /// So many bytes of connection `id` were read.
    pub(super) fn filled(&mut self, id: usize, count: usize) {
        (self.owner, self.from, self.to) = (id, 0, count.min(self.bytes.len()));
    }

    /// So many bytes went.
    pub(super) fn spend(&mut self, count: usize) {
        self.from = (self.from + count).min(self.to);
    }

    /// Connection `id` has no bytes here any more.
    pub(super) fn forget(&mut self, id: usize) {
        if self.owner == id {
            (self.from, self.to) = (0, 0);
        }
    }
}
