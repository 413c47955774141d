//! The model's dirty logs: which bits must be set and which may be (vhost-user, "Migration";
//! contract §2, "dirty log").
//!
//! A request's writable buffers are marked when it is taken and again when it is finished, what is
//! written to a used ring before and after; so that a front-end that takes the marks away at any
//! moment, and copies the pages then, has every write. A ring that broke may mark more.

use std::os::fd::OwnedFd;

use outboard_memory::Window;

use super::guest::{Guest, PAGE};
use super::model::{Given, Model, Msg, No, Ring, Then, Wait, word};
use super::ring::{Change, Live, Notify};
use crate::cover::reached;

/// Bytes of guest memory that a bit stands for.
const LOG_PAGE: u64 = 4096;
/// LOG_ALL.
pub const LOG_ALL: u64 = 1 << 26;

/// One file of bits.
pub struct LogFile {
    fd: OwnedFd,
    window: Window,
    must: Vec<u8>,
    may: Vec<u8>,
}

impl LogFile {
    pub fn new(fd: OwnedFd, window: Window) -> Self {
        Self { fd, window, must: vec![0; PAGE], may: vec![0; PAGE] }
    }

    /// To be sent.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// The front-end takes all marks away.
    pub fn take(&mut self) {
        self.must.fill(0);
        self.may.fill(0);
        self.window.write(0, &self.must).expect("inside");
    }

    /// The front-end writes over it.
    pub fn scribble(&mut self, at: usize, bytes: &[u8]) {
        let bytes = &bytes[..bytes.len().min(PAGE - at)];
        for bits in [&mut self.must, &mut self.may] {
            bits[at..at + bytes.len()].copy_from_slice(bytes);
        }
        self.window.write(at as u64, bytes).expect("inside");
    }

    /// All that must be marked is, and nothing else.
    pub fn check(&self, when: &str) {
        let mut real = [0; PAGE];
        self.window.read(0, &mut real).expect("inside");
        if real[..] == self.must[..] {
            return;
        }
        for (at, bits) in real.iter().enumerate() {
            let (must, may) = (self.must[at], self.may[at]);
            let well = bits & must == must && bits & !may == 0;
            assert!(
                well,
                "log, {when}: byte {at:#x} holds {bits:#x}, {must:#x} to {may:#x} wanted"
            );
        }
    }
}

/// The part of a file that is a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogBase {
    file: usize,
    offset: u64,
    size: u64,
}

impl LogBase {
    fn covers(&self, guest: u64, len: u64) -> bool {
        guest.checked_add(len).is_some_and(|end| end.div_ceil(LOG_PAGE) <= self.size * 8)
    }
}

/// Where one ring notes its writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogTo {
    base: LogBase,
    used: Option<u64>,
    notify: Option<Notify>,
}

impl LogTo {
    /// A guest-physical range is written.
    fn mark(&self, guest: &mut Guest, start: u64, len: u64) {
        let Some(more) = len.checked_sub(1) else { return };
        let LogBase { file, offset, size } = self.base;
        let (first, last) = (start / LOG_PAGE, start.saturating_add(more) / LOG_PAGE);
        let log = &mut guest.logs[file];
        for page in first..=last.min((size * 8).saturating_sub(1)) {
            reached("conversation page marked".into());
            let (at, bit) = ((offset + page / 8) as usize, 1 << (page % 8));
            log.must[at] |= bit;
            log.may[at] |= bit;
        }
        if last >= size * 8 {
            reached("conversation page without a bit".into());
        }
    }

    /// Anything of it may be marked.
    fn blur(&self, guest: &mut Guest) {
        let LogBase { file, offset, size } = self.base;
        guest.logs[file].may[offset as usize..(offset + size) as usize].fill(0xff);
    }

    fn mark_used(&self, guest: &mut Guest, offset: u64, len: u64) {
        if let Some(used) = self.used {
            reached("conversation used ring marked".into());
            self.mark(guest, used.saturating_add(offset), len);
        }
    }
}

impl Live {
    fn log(&self) -> Option<LogTo> {
        self.setup.log
    }

    /// A request may write there.
    pub(super) fn mark_ranges(&self, guest: &mut Guest, ranges: &[(u64, u64)]) {
        let Some(log) = self.log() else { return };
        for &(start, len) in ranges {
            log.mark(guest, start, len);
        }
    }

    /// Element `index` of the used ring.
    pub(super) fn mark_element(&self, guest: &mut Guest, index: u16) {
        let Some(log) = self.log() else { return };
        log.mark_used(guest, 4 + 8 * u64::from(index % self.setup.size), 8);
    }

    /// Elements `old..new`, and the used index.
    pub(super) fn mark_batch(&self, guest: &mut Guest, old: u16, new: u16) {
        let Some(log) = self.log() else { return };
        let mut index = old;
        while index != new {
            self.mark_element(guest, index);
            index = index.wrapping_add(1);
        }
        log.mark_used(guest, 2, 2);
    }

    /// The field by which the device says whether it wants kicks.
    pub(super) fn mark_wish(&self, guest: &mut Guest, event_idx: bool) {
        let Some(log) = self.log() else { return };
        let offset = if event_idx { 4 + 8 * u64::from(self.setup.size) } else { 0 };
        log.mark_used(guest, offset, 2);
    }

    /// A batch was noted.
    pub(super) fn tell_log(&mut self) {
        if let Some(log) = self.log() {
            self.signals.extend(log.notify);
        }
    }

    /// Another log, or none: what is in flight is marked in it too.
    pub(super) fn set_log(&mut self, log: Option<LogTo>, guest: &mut Guest) {
        let before = std::mem::replace(&mut self.setup.log, log);
        if self.is_parked() {
            return;
        }
        match (before, log) {
            (Some(_), Some(_)) => reached("conversation log changed".into()),
            (None, Some(_)) => {
                // Taken before there was a log: the descriptors are looked at again.
                let again: Vec<_> =
                    self.held.iter().map(|taken| self.ranges_of(taken.head, guest)).collect();
                for (taken, ranges) in self.held.iter_mut().zip(again) {
                    taken.note = ranges;
                }
            }
            _ => {}
        }
        if let Some(log) = log {
            if self.is_retired() {
                log.blur(guest);
            }
            for at in 0..self.held.len() {
                reached("conversation request in flight marked in a new log".into());
                let note = self.held[at].note.clone();
                self.mark_ranges(guest, &note);
            }
        }
        if before.is_none() || log.is_none() {
            self.look_at_index_again();
        }
    }
}

impl Ring {
    /// Whether the log has bits for its used ring, if that is to be noted.
    pub(super) fn fits(&self, base: Option<LogBase>) -> bool {
        let (Some(base), Some(used)) = (base, self.log) else { return true };
        base.covers(used, 6 + 8 * u64::from(self.size.unwrap_or(1)))
    }
}

impl Model {
    /// SET_LOG_BASE, SET_LOG_FD: every ring that runs hears of it.
    pub(super) fn set_log(&mut self, msg: &Msg, wait: &mut Wait) -> Result<Then, No> {
        if msg.id == 7 {
            self.log_bell = self.notify_way(msg.fds.first().copied());
            self.spread_log(self.acked, wait);
            return Ok(Then::Nothing);
        }
        let (size, offset) = (word(&msg.payload, 0), word(&msg.payload, 8));
        let end = offset.checked_add(size).ok_or(No)?;
        let Some(&Given::Log(file)) = msg.fds.first() else { return Err(No) };
        if size == 0 || !offset.is_multiple_of(8) || end > PAGE as u64 {
            return Err(No);
        }
        self.log = Some(LogBase { file, offset, size });
        self.spread_log(self.acked, wait);
        Ok(Then::Echo)
    }

    pub(super) fn spread_log(&mut self, features: u64, wait: &mut Wait) {
        for ring in self.live() {
            let log = self.ring_log(ring, features);
            self.post(ring, Change::Log(log), wait);
        }
    }

    pub(super) fn ring_log(&self, ring: usize, features: u64) -> Option<LogTo> {
        let base = self.log.filter(|_| features & LOG_ALL != 0)?;
        Some(LogTo { base, used: self.rings[ring].log, notify: self.log_bell })
    }
}
