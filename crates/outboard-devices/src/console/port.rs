//! One port: what the guest wrote and the host has not taken yet, what the host sent and the guest has
//! not read yet, and what the driver knows of it.
//!
//! ```text
//!  transmit queue ─▶ output, up to 64 KiB ─▶ host's side         host's side ─▶ input, 4 KiB ─▶ receive queue
//!        ▲ stays in the ring while it is full                          ▲ is not read while there is any
//! ```
//! Output is this process's: killed, it takes that with it. So a port that is no console has none while somebody is
//! there, but for one request; a console has up to 64 KiB.
//!
//! Invariants: with nobody on the host's side the newest 64 KiB are kept and the guest never waits;
//! with somebody there who does not read, it is this port alone that waits (case B71); the guest sees the
//! host's side close after it has got everything that was sent before (case C28).

use std::collections::VecDeque;
use std::path::Path;

use outboard::{Error, Readable, Writable};
use tracing::warn;

use super::PortOptions;
use super::config::Size;
use super::control::{Fact, Untold};
use super::host::{LAST_WORDS, Part, Side};
use crate::watches::{Edge, Watches};

/// Bytes that wait for the host before the guest does.
pub(super) const OUTPUT: usize = 64 << 10;
/// Bytes that one request can add to them. No driver sends more at once; the rest is lost.
pub(super) const REQUEST: u64 = 1 << 20;
/// Bytes that are read ahead of the guest.
const AHEAD: usize = 4096;
/// Bytes that wait for the guest at most.
pub(super) const INPUT: usize = LAST_WORDS + AHEAD;
/// Bytes of a copy.
const PIECE: usize = 4096;

#[derive(Debug)]
pub(super) struct Port {
    pub(super) name: String,
    pub(super) is_console: bool,
    pub(super) side: Side,
    pub(super) output: VecDeque<u8>,
    pub(super) input: VecDeque<u8>,
    /// The driver has made it.
    pub(super) made: bool,
    /// Somebody in the guest has it open.
    pub(super) guest_open: bool,
    /// What the driver was last told of the host's side; None: another process told it.
    pub(super) told_open: Option<bool>,
    pub(super) untold: Untold,
    pub(super) size: Size,
    /// Bytes that found no room since that was last said.
    lost: u64,
}

impl Port {
    /// `awaited`: what another process may give is not opened.
    pub(super) fn open(
        options: &PortOptions,
        size: Size,
        token: u64,
        awaited: bool,
        watches: &Watches,
    ) -> Result<Self, Error> {
        let side = Side::open(&options.host, token, awaited, watches)?;
        Ok(Self {
            name: options.name.clone(),
            is_console: options.console,
            size: side.size().unwrap_or(size),
            side,
            output: VecDeque::new(),
            input: VecDeque::with_capacity(AHEAD),
            made: false,
            guest_open: false,
            told_open: Some(false),
            untold: Untold::default(),
            lost: 0,
        })
    }

    pub(super) fn edge(&mut self, part: Part, edge: Edge, watches: &Watches) {
        let before = self.side.is_present();
        self.side.edge(part, edge, &mut self.input, watches);
        if edge.hung_up {
            // Finds the end, unless there are bytes before it.
            self.has_input();
        }
        if !before && self.side.is_present() && self.lost > 0 {
            warn!("{} bytes were lost while nobody read a port", std::mem::take(&mut self.lost));
        }
    }

    /// Where its pseudo-terminal is, if it has one.
    pub(super) fn terminal(&self) -> Option<&Path> {
        self.side.terminal()
    }

    /// The size of the host's terminal, when it is another one than before.
    pub(super) fn new_size(&self) -> Option<Size> {
        self.side.size().filter(|size| *size != self.size)
    }

    /// Hands the host what waits for it, as far as it takes it.
    pub(super) fn flush(&mut self) {
        loop {
            let (front, _) = self.output.as_slices();
            let put = self.side.write(front).min(front.len());
            if put == 0 {
                return;
            }
            self.output.drain(..put);
        }
    }

    /// Whether the guest may transmit. Linux waits for a console with a processor, and is spared that for 64 KiB;
    /// what another port has taken is with the host's side before more is taken.
    pub(super) fn has_room(&mut self) -> bool {
        let most = if self.is_console { OUTPUT } else { 1 };
        if self.output.len() >= most {
            self.flush();
        }
        self.output.len() < most || !self.side.is_present()
    }

    /// Takes what the guest transmits.
    pub(super) fn transmit(&mut self, mut from: Readable<'_>) -> Result<(), Error> {
        let mut left = from.len();
        let mut taken = 0;
        let mut piece = [0; PIECE];
        while left > 0 && taken < REQUEST {
            let length = left.min(PIECE as u64).min(REQUEST - taken);
            let room = usize::try_from(length).unwrap_or(PIECE);
            let Some(bytes) = piece.get_mut(..room) else { break };
            from.read_exact(bytes)?;
            self.push(bytes);
            (left, taken) = (left - length, taken + length);
        }
        if left > 0 {
            warn!("{left} bytes of a request of a port were left out");
        }
        Ok(())
    }

    /// Adds bytes behind what waits for the host.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.output.extend(bytes);
        self.flush();
        let over = self.output.len().saturating_sub(OUTPUT);
        if over > 0 && !self.side.is_present() {
            self.output.drain(..over);
            self.lost = self.lost.saturating_add(over as u64);
        }
    }

    /// Whether there is something for the guest to read; reads ahead.
    pub(super) fn has_input(&mut self) -> bool {
        if self.input.is_empty() {
            let mut bytes = [0; AHEAD];
            let got = self.side.read(&mut bytes);
            self.input.extend(bytes.iter().take(got));
        }
        !self.input.is_empty()
    }

    /// Gives the guest what there is, up to the room.
    pub(super) fn receive(&mut self, mut to: Writable<'_>) -> Result<u32, Error> {
        let mut written = 0;
        while self.has_input() {
            let (front, _) = self.input.as_slices();
            let room = usize::try_from(to.len()).unwrap_or(usize::MAX);
            let length = front.len().min(room);
            if length == 0 {
                break;
            }
            to.write_all(front.get(..length).unwrap_or_default())?;
            self.input.drain(..length);
            written += u32::try_from(length).unwrap_or(0);
        }
        Ok(written)
    }

    /// What the driver is to be told first.
    pub(super) fn next_fact(&mut self) -> Option<Fact> {
        let open = self.is_open();
        self.untold.open = self.made && self.told_open != Some(open);
        self.untold.next(open)
    }

    pub(super) fn told(&mut self, fact: Fact) {
        self.untold.told(fact);
        if let Fact::Open(open) = fact {
            self.told_open = Some(open);
        }
    }

    /// Whether the host's side is open as far as the guest is concerned: a terminal that was left, with what was
    /// typed before, is until that was read; of a socket's client the end is only found behind its bytes.
    pub(super) fn is_open(&self) -> bool {
        self.side.is_open() || !self.input.is_empty()
    }

    /// A driver made it under another process, which was killed.
    pub(super) fn driver_returns(&mut self) {
        (self.made, self.guest_open, self.told_open) = (true, true, None);
        self.untold.size = self.is_console;
    }

    /// A driver has started and knows nothing yet.
    pub(super) fn introduce(&mut self) {
        self.forget_driver();
        self.untold.add = true;
    }

    /// The driver has made the port, or could not.
    pub(super) fn ready(&mut self, made: bool) {
        self.forget_driver();
        if made {
            self.made = true;
            self.untold = Untold {
                add: false,
                console: self.is_console,
                name: !self.name.is_empty(),
                size: self.is_console,
                open: false,
            };
        }
    }

    /// No driver is there. What it wrote still goes to the host.
    pub(super) fn forget_driver(&mut self) {
        (self.made, self.guest_open, self.told_open) = (false, false, Some(false));
        self.untold = Untold::default();
    }
}
