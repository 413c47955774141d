//! A session that nobody waits for: its caller polls it, again and again (contract §2).
//!
//! For a program with a loop of its own, and for tests in which nothing may depend on time. One
//! [`ByHand::turn`] carries out all that can be without waiting.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::Poll;

use super::Ended;
use crate::error::HostError;
use crate::reactor::poll_once;

type Running<'h> = Pin<Box<dyn Future<Output = Result<Ended, HostError>> + 'h>>;

/// A session of [`DeviceRequestHandler::by_hand`](crate::DeviceRequestHandler::by_hand). Dropped
/// before its end, it stops its queues on the spot.
pub struct ByHand<'h>(Option<Running<'h>>);

impl<'h> ByHand<'h> {
    pub(super) fn new(session: impl Future<Output = Result<Ended, HostError>> + 'h) -> Self {
        Self(Some(Box::pin(session)))
    }

    /// Carries out what has come, as far as it can be without waiting for the front-end, for a
    /// queue or for time. Ready once, when the session is over; pending ever after.
    pub fn turn(&mut self) -> Poll<Result<Ended, HostError>> {
        let Some(session) = &mut self.0 else { return Poll::Pending };
        let state = poll_once(session.as_mut());
        if state.is_ready() {
            self.0 = None;
        }
        state
    }
}

impl fmt::Debug for ByHand<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ByHand").field("over", &self.0.is_none()).finish()
    }
}
