//! What the load generator asks for next: kind and block, repeatable from a seed.
//!
//! Invariants: every block lies inside the span; the same seed gives the same sequence; choosing costs
//! some ten instructions and no allocation.

/// Reads, writes or both, at random or in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Random blocks, or one after the other.
    pub random: bool,
    /// Share of reads in percent: 100 reads only, 0 writes only.
    pub read_percent: u8,
}

impl Workload {
    /// Reads a name as fio has it: `randread`, `read`, `randwrite`, `write`, `randrw`, `rw`.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let (random, read_percent) = match name {
            "randread" => (true, 100),
            "read" => (false, 100),
            "randwrite" => (true, 0),
            "write" => (false, 0),
            "randrw" => (true, 50),
            "rw" => (false, 50),
            _ => return None,
        };
        Some(Self { random, read_percent })
    }

    /// The name of the workload, as [`Self::named`] reads it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match (self.random, self.read_percent) {
            (true, 100) => "randread",
            (false, 100) => "read",
            (true, 0) => "randwrite",
            (false, 0) => "write",
            (true, _) => "randrw",
            (false, _) => "rw",
        }
    }

    /// Whether any write happens.
    #[must_use]
    pub const fn writes(self) -> bool {
        self.read_percent < 100
    }
}

/// One choice of the generator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// A write; else a read.
    pub write: bool,
    /// Which block of the span.
    pub block: u64,
}

/// The sequence of choices over `blocks` blocks, from `first` on.
#[derive(Clone, Debug)]
pub struct Sequence {
    workload: Workload,
    first: u64,
    blocks: u64,
    next: u64,
    random: Random,
}

impl Sequence {
    /// A sequence over the blocks `first .. first + blocks`; none at all is taken as one.
    #[must_use]
    pub const fn new(workload: Workload, first: u64, blocks: u64, seed: u64) -> Self {
        let blocks = if blocks == 0 { 1 } else { blocks };
        Self { workload, first, blocks, next: 0, random: Random(seed) }
    }

    /// The next choice.
    pub fn choose(&mut self) -> Choice {
        let write = match self.workload.read_percent {
            100 => false,
            0 => true,
            share => self.random.below(100) >= u64::from(share),
        };
        let offset = if self.workload.random {
            self.random.below(self.blocks)
        } else {
            let offset = self.next;
            self.next = if offset + 1 < self.blocks { offset + 1 } else { 0 };
            offset
        };
        Choice { write, block: self.first + offset }
    }
}

/// The splitmix64 generator: small, quick, good enough to spread blocks.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator with this seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// A number below `limit` (multiply and shift; `limit` is not 0).
    pub fn below(&mut self, limit: u64) -> u64 {
        let wide = u128::from(self.next()) * u128::from(limit);
        u64::try_from(wide >> 64).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_there_and_back() {
        for name in ["randread", "read", "randwrite", "write", "randrw", "rw"] {
            assert_eq!(Workload::named(name).map(Workload::name), Some(name));
        }
        assert_eq!(Workload::named("trim"), None);
    }

    #[test]
    fn a_sequential_workload_goes_round_its_span() {
        let workload = Workload { random: false, read_percent: 100 };
        let mut sequence = Sequence::new(workload, 10, 3, 1);
        let blocks: Vec<_> = (0..5).map(|_| sequence.choose().block).collect();
        assert_eq!(blocks, [10, 11, 12, 10, 11]);
    }

    #[test]
    fn random_choices_stay_inside_and_reach_both_ends() {
        let workload = Workload { random: true, read_percent: 70 };
        let mut sequence = Sequence::new(workload, 100, 8, 7);
        let choices: Vec<_> = (0..1000).map(|_| sequence.choose()).collect();
        assert!(choices.iter().all(|choice| (100..108).contains(&choice.block)));
        assert!(choices.iter().any(|choice| choice.block == 100));
        assert!(choices.iter().any(|choice| choice.block == 107));
        let writes = choices.iter().filter(|choice| choice.write).count();
        assert!((230..370).contains(&writes), "{writes} writes of 1000 at 70 % reads");
    }
}
