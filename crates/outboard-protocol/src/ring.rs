//! One ring's record and its run states (vhost-user, "Ring states"; protocol facts d).
//!
//! ```text
//!             kick                 started            parked
//!  Stopped ─────────▶ Waiting ─────────────▶ Running ◀──────▶ Parked
//!     ▲  ╲─────────── started ─────────────────▲ │   resumed    │
//!     │                                          ╰──▶ Broken ◀──╯
//!     ╰────────────── stopped, from everywhere ───────────────────
//! ```
//! Invariant: every change of a run state goes through [`RunState::after`], the one transition
//! table. The enable flag is independent of it. No descriptor lives here: a record says only that
//! one was given.

use crate::payload::VringAddr;

/// Whether a ring runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RunState {
    /// No kick has come since the last stop.
    #[default]
    Stopped,
    /// A kick has come, but the ring cannot run yet (no size, addresses, memory or features).
    Waiting,
    /// A worker serves it (if enabled) or discards (if disabled).
    Running,
    /// Its memory vanished; it goes on by itself when the memory is back.
    Parked,
    /// Its contents broke a rule; only a stop helps.
    Broken,
}

impl RunState {
    /// Every state.
    pub const ALL: [Self; 5] =
        [Self::Stopped, Self::Waiting, Self::Running, Self::Parked, Self::Broken];

    /// Whether a worker holds the queue, so that size, base and addresses must not change.
    #[must_use]
    pub const fn is_live(self) -> bool {
        matches!(self, Self::Running | Self::Parked | Self::Broken)
    }

    /// Whether the ring is started in the sense of the specification.
    #[must_use]
    pub const fn is_started(self) -> bool {
        !matches!(self, Self::Stopped)
    }

    /// The state after `event`; `None` when it cannot happen here.
    #[must_use]
    pub const fn after(self, event: RingEvent) -> Option<Self> {
        use RingEvent as E;
        Some(match (self, event) {
            (_, E::Stopped) => Self::Stopped,
            (Self::Stopped | Self::Waiting, E::Kicked) => Self::Waiting,
            (state, E::Kicked) => state,
            (Self::Stopped | Self::Waiting | Self::Running | Self::Parked, E::Started)
            | (Self::Running | Self::Parked, E::Resumed) => Self::Running,
            (Self::Running | Self::Parked, E::Parked) => Self::Parked,
            (Self::Waiting, E::Parked | E::Resumed) => Self::Waiting,
            (Self::Waiting | Self::Running | Self::Parked | Self::Broken, E::Broken)
            | (Self::Broken, E::Parked | E::Resumed) => Self::Broken,
            (Self::Stopped, E::Parked | E::Resumed | E::Broken) | (Self::Broken, E::Started) => {
                return None;
            }
        })
    }
}

/// What happens to a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RingEvent {
    /// SET_VRING_KICK or VRING_KICK was accepted.
    Kicked,
    /// A worker took the queue.
    Started,
    /// The ring's memory vanished.
    Parked,
    /// The ring's memory is back.
    Resumed,
    /// The ring broke a rule and was retired.
    Broken,
    /// The queue came back; the kick is forgotten.
    Stopped,
}

impl RingEvent {
    /// Every event.
    pub const ALL: [Self; 6] =
        [Self::Kicked, Self::Started, Self::Parked, Self::Resumed, Self::Broken, Self::Stopped];
}

/// Whether a descriptor was given for kick, call or err.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Given {
    /// The message has not come.
    #[default]
    Nothing,
    /// It came with a descriptor.
    Fd,
    /// It came without one: poll, or do not signal.
    Poll,
}

/// What the front-end said about one ring, and how it runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ring {
    /// Entries, checked against the largest size; `None` before SET_VRING_NUM.
    pub size: Option<u16>,
    /// Addresses as received, alignment and flags checked; `None` before SET_VRING_ADDR.
    pub addresses: Option<VringAddr>,
    /// Next index: 16 bits for a split ring, both halves for a packed one.
    pub base: u32,
    /// A kick has come since the last stop: the ring is started or waits to be.
    pub kicked: bool,
    /// How it came.
    pub kick: Given,
    /// SET_VRING_CALL.
    pub call: Given,
    /// SET_VRING_ERR.
    pub err: Given,
    /// The enable flag, whatever the run state.
    pub enabled: bool,
    /// Legacy ring in big-endian order (SET_VRING_ENDIAN).
    pub big_endian: bool,
    /// The run state.
    pub run: RunState,
}

impl Ring {
    /// Whether size and addresses are known, so that the ring could run once it is kicked.
    #[must_use]
    pub const fn is_configured(&self) -> bool {
        self.size.is_some() && self.addresses.is_some()
    }

    /// Applies an event; `false`, and no change, when it cannot happen in this state.
    pub(crate) fn apply(&mut self, event: RingEvent) -> bool {
        let Some(next) = self.run.after(event) else { return false };
        self.run = next;
        match event {
            RingEvent::Kicked => self.kicked = true,
            RingEvent::Stopped => {
                self.kicked = false;
                self.kick = Given::Nothing;
            }
            RingEvent::Started | RingEvent::Parked | RingEvent::Resumed | RingEvent::Broken => {}
        }
        true
    }
}
