//! What each block must hold: a pattern of its number and of how often it was written.
//!
//! Invariant: a block is never read while a write to it is under way, and never written twice at a time,
//! so that there is always exactly one right answer. A
//! block that was never written may hold anything. Two blocks, or two versions of one, differ in every
//! 8-byte word: a misplaced, torn or stale block is noticed.

use super::workload::Random;

/// The expected contents of a span of blocks.
#[derive(Clone, Debug)]
pub struct Ledger {
    first: u64,
    blocks: Vec<Entry>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    version: Option<u32>,
    busy: bool,
}

/// A block that did not hold what it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "block {block} does not hold what was written: differs from byte {at} on (version {version})"
)]
pub struct Mismatch {
    /// Number of the block.
    pub block: u64,
    /// First byte that is wrong.
    pub at: usize,
    /// How often the block had been written.
    pub version: u32,
}

impl Ledger {
    /// A ledger for the blocks `first .. first + count`, none of them written yet.
    #[must_use]
    pub fn new(first: u64, count: usize) -> Self {
        Self { first, blocks: vec![Entry::default(); count] }
    }

    fn entry(&mut self, block: u64) -> Option<&mut Entry> {
        let at = usize::try_from(block.checked_sub(self.first)?).ok()?;
        self.blocks.get_mut(at)
    }

    /// Claims a block for one request; false when another one has it.
    pub fn claim(&mut self, block: u64) -> bool {
        match self.entry(block) {
            Some(entry) if !entry.busy => {
                entry.busy = true;
                true
            }
            _ => false,
        }
    }

    /// Fills `data` with what the next write to `block` carries.
    pub fn next_version(&mut self, block: u64, data: &mut [u8]) {
        if let Some(entry) = self.entry(block) {
            let version = entry.next();
            fill(block, version, data);
        }
    }

    /// A write to the claimed `block` is done: it counts, and the claim ends.
    pub fn written(&mut self, block: u64) {
        if let Some(entry) = self.entry(block) {
            entry.version = Some(entry.next());
            entry.busy = false;
        }
    }

    /// A read of the claimed `block` brought `data`; the claim ends.
    ///
    /// # Errors
    /// The [`Mismatch`] when it is not what was last written.
    pub fn read(&mut self, block: u64, data: &[u8], scratch: &mut Vec<u8>) -> Result<(), Mismatch> {
        let Some(entry) = self.entry(block) else { return Ok(()) };
        entry.busy = false;
        let Some(version) = entry.version else { return Ok(()) };
        scratch.resize(data.len(), 0);
        fill(block, version, scratch);
        match data.iter().zip(scratch.iter()).position(|(got, wanted)| got != wanted) {
            None => Ok(()),
            Some(at) => Err(Mismatch { block, at, version }),
        }
    }
}

impl Entry {
    const fn next(&self) -> u32 {
        match self.version {
            Some(version) => version.wrapping_add(1),
            None => 0,
        }
    }
}

/// The pattern of a block at a version.
pub fn fill(block: u64, version: u32, data: &mut [u8]) {
    let seed = block.wrapping_mul(0x0001_0000_0001_b3d5) ^ (u64::from(version) << 40) ^ 0x6f75_7462;
    let mut random = Random::new(seed);
    for word in data.chunks_mut(8) {
        let bytes = random.next().to_le_bytes();
        for (to, from) in word.iter_mut().zip(bytes) {
            *to = from;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_block_and_a_misplaced_block_are_noticed() {
        let mut ledger = Ledger::new(10, 4);
        let mut scratch = Vec::new();
        let (mut old, mut new) = (vec![0; 512], vec![0; 512]);
        for data in [&mut old, &mut new] {
            assert!(ledger.claim(11));
            ledger.next_version(11, data);
            ledger.written(11);
        }
        ledger.written(12);
        assert_eq!(ledger.read(11, &new, &mut scratch), Ok(()));
        let stale = ledger.read(11, &old, &mut scratch);
        assert_eq!(stale, Err(Mismatch { block: 11, at: 0, version: 1 }));
        assert!(ledger.read(12, &new, &mut scratch).is_err());
    }

    #[test]
    fn a_torn_block_is_noticed_where_it_tears() {
        let mut ledger = Ledger::new(0, 1);
        let mut data = vec![0; 4096];
        ledger.next_version(0, &mut data);
        ledger.written(0);
        data[2048] ^= 1;
        let torn = ledger.read(0, &data, &mut Vec::new());
        assert_eq!(torn, Err(Mismatch { block: 0, at: 2048, version: 0 }));
    }

    #[test]
    fn a_block_under_way_cannot_be_claimed_again() {
        let mut ledger = Ledger::new(0, 2);
        assert!(ledger.claim(1));
        assert!(!ledger.claim(1));
        ledger.written(1);
        assert!(ledger.claim(1));
        assert!(!ledger.claim(2), "outside of the span");
    }
}
