//! A file against its model in memory: random reads, writes, cuts, holes and copies, by calls and as memory.
//!
//! Invariant: what is read is what the model has, at any time and through any descriptor or mapping.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use outboard_memory::{MapError, Window};
use rustix::fs::{FallocateFlags, copy_file_range, fallocate};
use rustix::io::Errno;

/// Longest file, in bytes.
const MOST: u64 = 256 << 10;
/// Longest operation, in bytes.
const LONGEST: u64 = 64 << 10;

/// xorshift64*: the same seed goes the same way.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound.max(1)
    }
}

struct Pair<'a> {
    at: &'a Path,
    file: File,
    model: Vec<u8>,
    random: Random,
    /// Reads and writes of mappings, of all that were tried.
    mapped: (u64, u64),
}

fn at(place: u64) -> usize {
    usize::try_from(place).unwrap_or(usize::MAX)
}

impl Pair<'_> {
    /// A place and a length that stay below [`MOST`].
    fn range(&mut self) -> (u64, u64) {
        let from = self.random.below(MOST);
        (from, 1 + self.random.below(LONGEST.min(MOST - from)))
    }

    fn step(&mut self) -> Result<&'static str> {
        let (from, length) = self.range();
        let end = at(from + length);
        match self.random.below(100) {
            0..28 => self.write(from, length).map(|()| "write"),
            28..50 => self.compare(from, length).map(|()| "read"),
            50..63 => self.write_memory(from, length).map(|()| "write to memory"),
            63..75 => self.read_memory(from, length).map(|()| "read from memory"),
            75..82 => {
                self.file.set_len(from)?;
                self.model.resize(at(from), 0);
                Ok("cut")
            }
            82..86 => self.hole(FallocateFlags::PUNCH_HOLE, from, length).map(|()| "punch"),
            86..87 => self.hole(FallocateFlags::ZERO_RANGE, from, length).map(|()| "zero"),
            87..88 => {
                // No message of FUSE's does it: nothing may have happened.
                let done = fallocate(&self.file, FallocateFlags::COLLAPSE_RANGE, 0, 4096);
                ensure!(done == Err(Errno::OPNOTSUPP), "collapsed: {done:?}");
                Ok("collapse")
            }
            88..91 => {
                fallocate(&self.file, FallocateFlags::empty(), from, length)?;
                self.model.resize(self.model.len().max(end), 0);
                Ok("allocate")
            }
            91..94 => self.copy(from, length).map(|()| "copy"),
            94..96 => self.file.sync_all().map(|()| "sync").map_err(Into::into),
            96..98 => self.append(length).map(|()| "append"),
            _ => {
                self.file = File::options().read(true).write(true).open(self.at)?;
                Ok("open")
            }
        }
    }

    fn bytes(&mut self, length: u64) -> Vec<u8> {
        let first = self.random.below(256);
        (first..first + length).map(|byte| byte.to_le_bytes()[0]).collect()
    }

    fn write(&mut self, from: u64, length: u64) -> Result<()> {
        let bytes = self.bytes(length);
        self.file.write_all_at(&bytes, from)?;
        let end = at(from + length);
        self.model.resize(self.model.len().max(end), 0);
        self.model[at(from)..end].copy_from_slice(&bytes);
        Ok(())
    }

    /// A file system of the host may know of no such range: nothing has happened then.
    fn hole(&mut self, kind: FallocateFlags, from: u64, length: u64) -> Result<()> {
        match fallocate(&self.file, kind | FallocateFlags::KEEP_SIZE, from, length) {
            Err(Errno::OPNOTSUPP) => return Ok(()),
            done => done?,
        }
        let end = at(from + length).min(self.model.len());
        if let Some(hole) = self.model.get_mut(at(from)..end) {
            hole.fill(0);
        }
        Ok(())
    }

    /// The file as memory, of which a part of `length` bytes at most is in the file. None: it is empty there, or what is
    /// not cached is not mapped either (kernels before 6.6).
    fn map(&mut self, from: u64, length: u64) -> Result<Option<(Window, usize)>> {
        let size = self.model.len() as u64;
        let Some(there) = size.checked_sub(from).filter(|there| *there > 0) else {
            return Ok(None);
        };
        self.mapped.1 += 1;
        match Window::map(self.file.try_clone()?.into(), 0, size, true) {
            Ok(window) => {
                self.mapped.0 += 1;
                Ok(Some((window, at(length.min(there)))))
            }
            Err(MapError::Host { errno, .. }) if errno == Errno::NODEV.raw_os_error() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn write_memory(&mut self, from: u64, length: u64) -> Result<()> {
        let Some((window, length)) = self.map(from, length)? else { return Ok(()) };
        let bytes = self.bytes(length as u64);
        window.write(from, &bytes)?;
        self.model[at(from)..at(from) + length].copy_from_slice(&bytes);
        Ok(())
    }

    fn read_memory(&mut self, from: u64, length: u64) -> Result<()> {
        let Some((window, length)) = self.map(from, length)? else { return Ok(()) };
        let mut found = vec![0; length];
        window.read(from, &mut found)?;
        same(&found, &self.model[at(from)..at(from) + length], from)
    }

    fn append(&mut self, length: u64) -> Result<()> {
        let bytes = self.bytes(length);
        if (self.model.len() + bytes.len()) as u64 > MOST {
            return Ok(());
        }
        let mut file = File::options().append(true).open(self.at)?;
        std::io::Write::write_all(&mut file, &bytes)?;
        self.model.extend(bytes);
        Ok(())
    }

    /// Within the file, where the two ranges do not touch.
    fn copy(&mut self, from: u64, length: u64) -> Result<()> {
        let to = self.random.below(MOST - LONGEST);
        let size = self.model.len() as u64;
        if from + length > size || from.abs_diff(to) < length || to + length > MOST {
            return Ok(());
        }
        let (mut read, mut written) = (from, to);
        while written < to + length {
            let left = at(to + length - written);
            let (here, there) = (Some(&mut read), Some(&mut written));
            let moved = copy_file_range(&self.file, here, &self.file, there, left)?;
            ensure!(moved > 0, "a copy that ends");
        }
        self.model.resize(self.model.len().max(at(to + length)), 0);
        self.model.copy_within(at(from)..at(from + length), at(to));
        Ok(())
    }

    fn compare(&mut self, from: u64, length: u64) -> Result<()> {
        let size = self.file.metadata()?.len();
        ensure!(size == self.model.len() as u64, "{size} bytes, {} expected", self.model.len());
        let expected = self.model.get(at(from)..).unwrap_or_default();
        let expected = expected.get(..at(length)).unwrap_or(expected);
        let mut found = vec![0; expected.len()];
        self.file.read_exact_at(&mut found, from)?;
        same(&found, expected, from)
    }
}

/// What stands at `from` is what was written there.
fn same(found: &[u8], expected: &[u8], from: u64) -> Result<()> {
    let wrong = found.iter().zip(expected).position(|(found, expected)| found != expected);
    match wrong {
        Some(place) => anyhow::bail!(
            "byte {} is {:#x}, {:#x} was written there",
            from + place as u64,
            found[place],
            expected[place]
        ),
        None => Ok(()),
    }
}

/// See the module. Says how many operations were done.
pub(crate) fn run(dir: &Path, seconds: u64, seed: u64) -> Result<()> {
    let path = dir.join(format!("model-{seed}"));
    let file = File::options().read(true).write(true).create_new(true).open(&path)?;
    let random = Random(seed.wrapping_add(1) * 0x9e37);
    let mut pair = Pair { at: &path, file, model: Vec::new(), random, mapped: (0, 0) };
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut done = Vec::new();
    // A few hundred at least, however slow it is.
    while done.len() < 300 || Instant::now() < end {
        let step = pair.step().with_context(|| {
            let last = done.len().saturating_sub(8);
            format!("operation {} with seed {seed} after {:?}", done.len(), &done[last..])
        })?;
        done.push(step);
    }
    let all = pair.model.len() as u64;
    pair.compare(0, all)?;
    fs::remove_file(&path)?;
    let (mapped, tried) = pair.mapped;
    println!("{} operations on one file, all as its model; {mapped} of {tried} mapped", done.len());
    Ok(())
}
