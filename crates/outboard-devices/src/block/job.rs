//! What is left to do for a request: a list of operations that shrinks with each outcome.
//!
//! ```text
//!  Read ──▶ Read …                          (short transfers go on, the end of the file is zeros)
//!  Write ─▶ Write … ─▶ Sync                 (Sync: write-through only)
//!  Clear: Discard
//!         [Punch ─▶] Zero ─▶ PunchFirst + Reserve ─▶ Write     each when the one before is not to be had
//! ```
//! Pure: no system call is made here, so that each step can be tested with each outcome. The same
//! job runs on every engine. Invariant: a job whose outcomes are all progress or errors ends.

use std::io;

use super::engine::{How, Op};
use super::request::{Range, Status};

/// See the module.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Job {
    /// Fill the writable bytes from `at` on.
    Read { at: u64 },
    /// Store the readable bytes from `at` on; make them `durable` then.
    Write { at: u64, durable: bool },
    /// Make finished writes durable.
    Sync,
    /// Discard or zero parts of the disk.
    Clear(Clear),
}

/// A part of the disk.
pub(crate) type Bytes = std::ops::Range<u64>;

/// The parts to discard or zero, in order.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Clear {
    /// Not empty; the last one is next.
    ranges: Vec<Range>,
    stage: Stage,
    discard: bool,
    durable: bool,
}

/// How the range at hand is being cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Free it; that is all that a discard asks.
    Discard,
    /// Free it, which makes it read as zeros.
    Punch,
    /// Zero it and keep its space.
    Zero,
    /// The same in two steps: free it …
    PunchFirst,
    /// … and take the space again.
    Reserve,
    /// Write zeros.
    Write,
}

/// How a job goes on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// With the operation that [`Job::op`] says.
    More,
    /// The request is finished.
    Done(Status),
}

impl Job {
    /// Discards (or else zeroes) `ranges`, which are not empty.
    pub(crate) fn clear(mut ranges: Vec<Range>, discard: bool, durable: bool) -> Self {
        ranges.reverse();
        let stage = first_stage(&ranges, discard);
        Self::Clear(Clear { ranges, stage, discard, durable })
    }

    /// The list of a finished discard or write-zeroes, to be used again.
    pub(crate) fn into_ranges(self) -> Option<Vec<Range>> {
        match self {
            Self::Clear(clear) => Some(clear.ranges),
            _ => None,
        }
    }

    /// The bytes of the disk that it changes, all of them between the two ends; `left` data bytes are to be moved.
    pub(crate) fn writes(&self, left: u64) -> Option<Bytes> {
        match self {
            Self::Read { .. } | Self::Sync => None,
            Self::Write { at, .. } => Some(*at..at.saturating_add(left)),
            Self::Clear(clear) => {
                let start = clear.ranges.iter().map(|range| range.offset).min()?;
                let ends =
                    clear.ranges.iter().map(|range| range.offset.saturating_add(range.length));
                Some(start..ends.max()?)
            }
        }
    }

    /// The next operation.
    #[inline]
    pub(crate) fn op(&self) -> Op {
        match self {
            Self::Read { at } => Op::Read { offset: *at },
            Self::Write { at, .. } => Op::Write { offset: *at },
            Self::Sync => Op::Sync,
            Self::Clear(clear) => clear.op(),
        }
    }

    /// Takes the outcome of [`Job::op`] in; `left` data bytes of the request are still to be moved.
    pub(crate) fn next(&mut self, outcome: &io::Result<u64>, left: u64) -> Next {
        if let Self::Clear(clear) = self {
            let (next, durable) = (clear.next(outcome), clear.durable);
            return self.finish(next, durable);
        }
        let moved = match outcome {
            Ok(moved) => *moved,
            Err(_) => return Next::Done(Status::IoError),
        };
        match self {
            // Behind the end of a file that became shorter: what is left is filled with zeros.
            Self::Read { .. } if left == 0 || moved == 0 => Next::Done(Status::Ok),
            Self::Read { at } => {
                *at = at.saturating_add(moved);
                Next::More
            }
            Self::Write { durable, .. } if left == 0 => {
                let durable = *durable;
                self.finish(Next::Done(Status::Ok), durable)
            }
            Self::Write { .. } if moved == 0 => Next::Done(Status::IoError),
            Self::Write { at, .. } => {
                *at = at.saturating_add(moved);
                Next::More
            }
            Self::Sync | Self::Clear(_) => Next::Done(Status::Ok),
        }
    }

    /// What was done well is made durable where that is asked for.
    fn finish(&mut self, next: Next, durable: bool) -> Next {
        if next != Next::Done(Status::Ok) || !durable {
            return next;
        }
        *self = Self::Sync;
        Next::More
    }
}

impl Clear {
    fn op(&self) -> Op {
        let Some(&Range { offset, length, .. }) = self.ranges.last() else { return Op::Sync };
        let allocate = |how| Op::Allocate { how, offset, length };
        match self.stage {
            Stage::Discard | Stage::Punch | Stage::PunchFirst => allocate(How::Punch),
            Stage::Zero => allocate(How::Zero),
            Stage::Reserve => allocate(How::Reserve),
            Stage::Write => Op::WriteZeros { offset, length },
        }
    }

    fn next(&mut self, outcome: &io::Result<u64>) -> Next {
        let error = match outcome {
            Ok(moved) => return self.advance(*moved),
            Err(error) => error,
        };
        if !unsupported(error) {
            return Next::Done(Status::IoError);
        }
        self.stage = match self.stage {
            Stage::Discard => return Next::Done(Status::Unsupported),
            Stage::Write => return Next::Done(Status::IoError),
            Stage::Punch => Stage::Zero,
            Stage::Zero => Stage::PunchFirst,
            Stage::PunchFirst | Stage::Reserve => Stage::Write,
        };
        Next::More
    }

    fn advance(&mut self, moved: u64) -> Next {
        match (self.stage, self.ranges.last_mut()) {
            (Stage::PunchFirst, _) => {
                self.stage = Stage::Reserve;
                return Next::More;
            }
            (Stage::Write, Some(_)) if moved == 0 => return Next::Done(Status::IoError),
            (Stage::Write, Some(range)) if moved < range.length => {
                range.offset = range.offset.saturating_add(moved);
                range.length -= moved;
                return Next::More;
            }
            _ => {}
        }
        self.ranges.pop();
        if self.ranges.is_empty() {
            return Next::Done(Status::Ok);
        }
        self.stage = first_stage(&self.ranges, self.discard);
        Next::More
    }
}

fn first_stage(ranges: &[Range], discard: bool) -> Stage {
    match ranges.last() {
        _ if discard => Stage::Discard,
        Some(range) if range.unmap => Stage::Punch,
        _ => Stage::Zero,
    }
}

/// Whether the file system or the disk does not do this; a disk also says EINVAL to parts of its
/// blocks.
fn unsupported(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS | Errno::NODEV))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;

    fn run(mut job: Job, outcomes: &[(Op, Result<u64, Errno>, u64)]) -> Status {
        for (index, (op, outcome, left)) in outcomes.iter().enumerate() {
            assert_eq!(job.op(), *op, "operation {index}");
            match job.next(&outcome.map_err(io::Error::from), *left) {
                Next::More => assert_ne!(index + 1, outcomes.len(), "goes on with {:?}", job.op()),
                Next::Done(status) => {
                    assert_eq!(index + 1, outcomes.len(), "done after operation {index}");
                    return status;
                }
            }
        }
        panic!("no operations");
    }

    fn range(offset: u64, length: u64, unmap: bool) -> Range {
        Range { offset, length, unmap }
    }

    fn allocate(how: How, offset: u64, length: u64) -> Op {
        Op::Allocate { how, offset, length }
    }

    #[test]
    fn c4_short_transfers_go_on_where_they_stopped() {
        let reads = [
            (Op::Read { offset: 512 }, Ok(1), 511),
            (Op::Read { offset: 513 }, Ok(510), 1),
            (Op::Read { offset: 1023 }, Ok(1), 0),
        ];
        assert_eq!(run(Job::Read { at: 512 }, &reads), Status::Ok);
        let writes =
            [(Op::Write { offset: 512 }, Ok(500), 12), (Op::Write { offset: 1012 }, Ok(12), 0)];
        assert_eq!(run(Job::Write { at: 512, durable: false }, &writes), Status::Ok);
    }

    #[test]
    fn c5_a_read_behind_the_end_of_the_file_ends_well_and_a_write_of_nothing_does_not() {
        assert_eq!(run(Job::Read { at: 0 }, &[(Op::Read { offset: 0 }, Ok(0), 512)]), Status::Ok);
        let write = Job::Write { at: 0, durable: false };
        assert_eq!(run(write, &[(Op::Write { offset: 0 }, Ok(0), 512)]), Status::IoError);
    }

    #[test]
    fn a_write_through_is_durable_before_it_ends() {
        let job = || Job::Write { at: 0, durable: true };
        let good = [(Op::Write { offset: 0 }, Ok(512), 0), (Op::Sync, Ok(0), 0)];
        assert_eq!(run(job(), &good), Status::Ok);
        let bad = [(Op::Write { offset: 0 }, Ok(512), 0), (Op::Sync, Err(Errno::IO), 0)];
        assert_eq!(run(job(), &bad), Status::IoError);
        let full = [(Op::Write { offset: 0 }, Err(Errno::NOSPC), 512)];
        assert_eq!(run(job(), &full), Status::IoError);
    }

    #[test]
    fn c1_c2_errors_of_the_host_are_errors_of_the_request() {
        for errno in [Errno::IO, Errno::NOSPC, Errno::FAULT, Errno::FBIG, Errno::OPNOTSUPP] {
            for job in [Job::Read { at: 0 }, Job::Write { at: 0, durable: true }, Job::Sync] {
                assert_eq!(run2(job, Err(errno)), Next::Done(Status::IoError), "{errno}");
            }
        }
        for (discard, errno) in [(true, Errno::IO), (false, Errno::NOSPC), (false, Errno::IO)] {
            let job = Job::clear(vec![range(0, 512, true)], discard, true);
            assert_eq!(run2(job, Err(errno)), Next::Done(Status::IoError), "{errno}");
        }
    }

    fn run2(mut job: Job, outcome: Result<u64, Errno>) -> Next {
        job.next(&outcome.map_err(io::Error::from), 512)
    }

    #[test]
    fn a_discard_frees_each_range_and_may_be_unsupported() {
        let job = Job::clear(vec![range(0, 512, true), range(4096, 8192, true)], true, false);
        let steps = [
            (allocate(How::Punch, 0, 512), Ok(0), 0),
            (allocate(How::Punch, 4096, 8192), Ok(0), 0),
        ];
        assert_eq!(run(job, &steps), Status::Ok);
        let job = Job::clear(vec![range(0, 512, true)], true, false);
        let steps = [(allocate(How::Punch, 0, 512), Err(Errno::OPNOTSUPP), 0)];
        assert_eq!(run(job, &steps), Status::Unsupported);
    }

    #[test]
    fn zeroes_are_had_in_every_way_down_to_writing_them() {
        let not = Err(Errno::OPNOTSUPP);
        let at = |how| allocate(how, 512, 1024);
        let job = |unmap| Job::clear(vec![range(512, 1024, unmap)], false, false);
        assert_eq!(run(job(true), &[(at(How::Punch), Ok(0), 0)]), Status::Ok);
        assert_eq!(run(job(false), &[(at(How::Zero), Ok(0), 0)]), Status::Ok);
        let in_two =
            [(at(How::Zero), not, 0), (at(How::Punch), Ok(0), 0), (at(How::Reserve), Ok(0), 0)];
        assert_eq!(run(job(false), &in_two), Status::Ok);
        let full = [
            (at(How::Zero), not, 0),
            (at(How::Punch), Ok(0), 0),
            (at(How::Reserve), Err(Errno::NOSPC), 0),
        ];
        assert_eq!(run(job(false), &full), Status::IoError);
        let written = [
            (at(How::Punch), not, 0),
            (at(How::Zero), Err(Errno::INVAL), 0),
            (at(How::Punch), not, 0),
            (Op::WriteZeros { offset: 512, length: 1024 }, Ok(1000), 0),
            (Op::WriteZeros { offset: 1512, length: 24 }, Ok(24), 0),
        ];
        assert_eq!(run(job(true), &written), Status::Ok);
    }

    #[test]
    fn what_a_job_changes_lies_between_its_first_and_its_last_byte() {
        assert_eq!(Job::Write { at: 512, durable: true }.writes(1024), Some(512..1536));
        assert_eq!((Job::Read { at: 512 }.writes(1024), Job::Sync.writes(0)), (None, None));
        let ranges = vec![range(4096, 512, false), range(512, 1024, true), range(2048, 512, true)];
        assert_eq!(Job::clear(ranges, true, false).writes(0), Some(512..4608));
    }

    #[test]
    fn each_range_starts_with_its_own_way_and_all_are_durable_at_the_end() {
        let job = Job::clear(vec![range(0, 512, false), range(512, 512, true)], false, true);
        let steps = [
            (allocate(How::Zero, 0, 512), Ok(0), 0),
            (allocate(How::Punch, 512, 512), Ok(0), 0),
            (Op::Sync, Ok(0), 0),
        ];
        assert_eq!(run(job, &steps), Status::Ok);
    }
}
