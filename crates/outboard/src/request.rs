//! Requests: what a driver put into a ring, as the device's worker gets it (contract §1b).
//!
//! A request is answered exactly once. [`Request::done`] answers now, [`Request::defer`] later and
//! from any thread, [`Request::submit`] when the event loop's file operation has finished; a
//! request that is dropped goes back with length 0. Nothing borrows guest bytes: the cursors copy
//! values out of guest memory and into it, and what was read once cannot be read again.

use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use outboard_queue::{Chain, Readable, ShortBuffer, Writable};

use crate::events::{EventLoop, FileOp};
use crate::mailbox::Mailbox;
use crate::queue::Queue;
use crate::queue::gather::Gather;

/// Proof that a request found its way: answered, deferred or submitted.
#[derive(Debug)]
#[must_use = "return it from `serve`"]
pub struct Served(());

impl Served {
    /// The request will be answered later, through its [`Deferred`].
    pub fn later() -> Self {
        Self(())
    }
}

/// One request, on its queue's own thread.
#[derive(Debug)]
pub struct Request<'a> {
    chain: Option<Chain>,
    queue: &'a mut Queue,
    events: Option<&'a mut dyn EventLoop>,
}

impl<'a> Request<'a> {
    pub(crate) fn new(
        chain: Chain,
        queue: &'a mut Queue,
        events: Option<&'a mut dyn EventLoop>,
    ) -> Self {
        Self { chain: Some(chain), queue, events }
    }

    /// The queue it came from.
    #[must_use]
    pub fn queue(&self) -> u16 {
        self.queue.index()
    }

    /// The feature bits in force.
    #[must_use]
    #[inline]
    pub fn features(&self) -> u64 {
        self.queue.features()
    }

    /// What the driver wrote for the device: a cursor that copies values out.
    #[inline]
    pub fn readable(&mut self) -> Readable<'_> {
        self.chain_mut().readable()
    }

    /// What the device may write for the driver: a cursor that copies values in.
    #[inline]
    pub fn writable(&mut self) -> Writable<'_> {
        self.chain_mut().writable()
    }

    /// Sets the last `length` writable bytes aside, wherever they lie: a status that follows data
    /// of any length.
    ///
    /// # Errors
    /// The driver offered fewer writable bytes.
    #[inline]
    pub fn reserve_tail(&mut self, length: usize) -> Result<(), ShortBuffer> {
        self.chain_mut().reserve_tail(length)
    }

    /// Writes into what [`Request::reserve_tail`] set aside.
    ///
    /// # Errors
    /// `bytes` is longer than that.
    #[inline]
    pub fn write_tail(&mut self, bytes: &[u8]) -> Result<(), ShortBuffer> {
        self.chain_mut().write_tail(bytes)
    }

    /// What [`Request::reserve_tail`] set aside, as a cursor: for data that is written before the header
    /// in front of it.
    pub fn tail(&mut self) -> Writable<'_> {
        self.chain_mut().tail()
    }

    /// Answers: the device wrote the first `written` bytes.
    #[inline]
    pub fn done(mut self, written: u32) -> Served {
        if let Some(chain) = self.chain.take() {
            self.queue.complete(chain, written);
        }
        Served(())
    }

    /// Takes the request away from its queue, to be answered later, in any order, on any thread.
    #[must_use]
    pub fn defer(mut self) -> Deferred {
        Deferred { chain: self.chain.take(), home: Arc::clone(self.queue.mailbox()) }
    }

    /// Whether [`Request::submit`] can be had: the event loop is an io_uring.
    #[must_use]
    pub fn can_submit(&self) -> bool {
        self.events.as_ref().is_some_and(|events| events.can_submit())
    }

    /// Hands the request to the kernel: the operation reads into the writable bytes that are left,
    /// or writes the readable ones. [`crate::Worker::completed`] gets it back with `token`.
    ///
    /// # Errors
    /// The request itself, when the loop cannot carry operations or has no room: serve it in
    /// another way.
    pub fn submit(mut self, op: FileOp, token: u64) -> Result<Served, Self> {
        let (Some(events), Some(chain)) = (self.events.as_deref_mut(), self.chain.take()) else {
            return Err(self);
        };
        let apart = self.queue.is_abandonable();
        match events.submit(op, (self.queue.index().into(), token), apart, chain) {
            Ok(()) => Ok(Served(())),
            Err(chain) => {
                self.chain = Some(chain);
                Err(self)
            }
        }
    }

    /// Sets the request aside, begun or not, until [`crate::Worker::release`] says `token`;
    /// [`crate::Worker::resumed`] gets it back. What is set aside needs something else that is under
    /// way, or it stays there for good.
    pub fn hold(mut self, token: u64) -> Served {
        if let Some(chain) = self.chain.take() {
            self.queue.hold(token, chain);
        }
        Served(())
    }

    /// Takes further requests of this queue along with this one, in their order, until `needed` bytes can be
    /// written to them all: buffers that are to hold one packet. To be called before anything is written; what
    /// comes back stands for the request from then on.
    #[must_use]
    pub fn gather(&mut self, needed: u64) -> Gather<'_> {
        match self.chain.take() {
            Some(chain) => self.queue.gather(chain, needed),
            None => Gather::Later(Served(())),
        }
    }

    /// Whether another process may get this request again, after a crash of this one or when it is
    /// left behind: an in-flight region is in use.
    #[must_use]
    #[inline]
    pub fn is_tracked(&self) -> bool {
        self.queue.is_tracked()
    }

    /// Whether an earlier process took this request and did not answer it: what it asks for may have
    /// been done, in whole, in part or not at all. A device for which twice is wrong answers an error
    /// here instead of doing it again.
    #[must_use]
    pub fn is_repeated(&self) -> bool {
        self.queue.is_recovering()
    }

    fn chain_mut(&mut self) -> &mut Chain {
        chain_of(&mut self.chain)
    }
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        if let Some(chain) = self.chain.take() {
            self.queue.complete(chain, 0);
        }
    }
}

/// A cursor of a [`Deferred`] request. Its ring does not stop, nor leave the request behind, while
/// this lives.
#[derive(Debug)]
pub struct Held<'a, C> {
    cursor: C,
    /// Whom to tell at the end.
    home: Option<&'a Mailbox>,
}

impl<C> Deref for Held<'_, C> {
    type Target = C;

    fn deref(&self) -> &C {
        &self.cursor
    }
}

impl<C> DerefMut for Held<'_, C> {
    fn deref_mut(&mut self) -> &mut C {
        &mut self.cursor
    }
}

impl<C> Drop for Held<'_, C> {
    fn drop(&mut self) {
        if let Some(home) = self.home {
            home.go();
        }
    }
}

/// A request that left its queue's thread. It keeps its guest memory mapped and its ring from
/// stopping until it is answered or dropped.
///
/// With an in-flight region the ring may leave it behind
/// ([`VhostUserDevice::abandon_queue`](crate::VhostUserDevice::abandon_queue)): then there is nothing
/// left to read and no room to write, and an answer goes nowhere; the next process serves the request.
#[derive(Debug)]
pub struct Deferred {
    chain: Option<Chain>,
    home: Arc<Mailbox>,
}

impl Deferred {
    /// What the driver wrote for the device.
    pub fn readable(&mut self) -> Held<'_, Readable<'_>> {
        let home = self.enter();
        let home = home.then_some(&*self.home);
        Held { cursor: chain_of(&mut self.chain).readable(), home }
    }

    /// What the device may write for the driver.
    pub fn writable(&mut self) -> Held<'_, Writable<'_>> {
        let home = self.enter();
        let home = home.then_some(&*self.home);
        Held { cursor: chain_of(&mut self.chain).writable(), home }
    }

    /// Whether the ring was stopped and left this request behind: nothing that is done for it now
    /// reaches the driver, and somebody else will serve it.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        match self.home.come() {
            Some(true) => self.home.go(),
            Some(false) => {}
            None => return true,
        }
        false
    }

    /// Where guest memory can be reached; or nowhere, with nothing in reach. True: to be left again.
    fn enter(&mut self) -> bool {
        self.home.come().unwrap_or_else(|| {
            chain_of(&mut self.chain).close();
            false
        })
    }

    /// As [`Request::reserve_tail`].
    ///
    /// # Errors
    /// The driver offered fewer writable bytes.
    pub fn reserve_tail(&mut self, length: usize) -> Result<(), ShortBuffer> {
        chain_of(&mut self.chain).reserve_tail(length)
    }

    /// As [`Request::write_tail`].
    ///
    /// # Errors
    /// `bytes` is longer than what was set aside.
    pub fn write_tail(&mut self, bytes: &[u8]) -> Result<(), ShortBuffer> {
        let home = self.enter();
        let _held = Held { cursor: (), home: home.then_some(&*self.home) };
        chain_of(&mut self.chain).write_tail(bytes)
    }

    /// As [`Request::tail`].
    pub fn tail(&mut self) -> Held<'_, Writable<'_>> {
        let home = self.enter();
        let home = home.then_some(&*self.home);
        Held { cursor: chain_of(&mut self.chain).tail(), home }
    }

    /// Answers: the device wrote the first `written` bytes.
    pub fn done(mut self, written: u32) {
        if let Some(chain) = self.chain.take() {
            self.home.give_back(chain, written);
        }
    }
}

/// The chain of a request, which `done`, `defer` and `submit` take, and they consume the request.
fn chain_of(chain: &mut Option<Chain>) -> &mut Chain {
    match chain {
        Some(chain) => chain,
        None => unreachable!("a request holds its chain until it is consumed"),
    }
}

impl Drop for Deferred {
    fn drop(&mut self) {
        if let Some(chain) = self.chain.take() {
            self.home.give_back(chain, 0);
        }
    }
}

/// How a file operation ended: bytes moved, or the kernel's error.
pub type Outcome = io::Result<u32>;
