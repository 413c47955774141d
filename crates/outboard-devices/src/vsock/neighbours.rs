//! The guests of one process, who reach each other by their addresses.
//!
//! A connection between two of them is a pair of sockets: each guest has its end as if it were a host's. Who
//! is called answers with one byte when its guest has accepted, and closes its end when not.
//! Invariants: a guest is called by members of its groups only; calls that wait are bounded.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outboard::Error;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::packet::{Address, Kind};
use crate::bell::Bell;

/// Calls that wait for one guest.
const CALLS: usize = 1024;

/// A connection that another guest asks for.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) from: Address,
    pub(super) port: u32,
    pub(super) kind: Kind,
    pub(super) socket: OwnedFd,
}

/// Where one guest is called.
#[derive(Debug)]
pub(super) struct Gate {
    groups: Vec<String>,
    calls: Mutex<Vec<Call>>,
    /// Rings when there are calls.
    pub(super) bell: Bell,
}

impl Gate {
    pub(super) fn new(groups: Vec<String>) -> Result<Self, Error> {
        Ok(Self { groups, calls: Mutex::default(), bell: Bell::new()? })
    }

    /// The calls that wait.
    pub(super) fn take(&self) -> Vec<Call> {
        self.bell.take();
        std::mem::take(&mut *lock(&self.calls))
    }
}

/// The guests of a process, by address. A clone is the same.
#[derive(Clone, Debug, Default)]
pub struct Neighbours(Arc<Mutex<HashMap<u64, Arc<Gate>>>>);

impl Neighbours {
    /// Nobody yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes a guest known, for as long as the answer lives.
    pub(super) fn join(&self, cid: u64, gate: &Arc<Gate>) -> Result<Membership, Error> {
        let mut guests = lock(&self.0);
        if guests.contains_key(&cid) {
            return Err(Error::refused(format!("two guests have the address {cid}")));
        }
        guests.insert(cid, Arc::clone(gate));
        Ok(Membership { cid, neighbours: self.clone() })
    }

    /// Calls `to` for a guest of `groups`: its end of the connection, on which a byte says that it was
    /// accepted. None: there is no such guest for this one, or it cannot be called now.
    pub(super) fn call(
        &self,
        groups: &[String],
        from: Address,
        to: Address,
        kind: Kind,
    ) -> Option<OwnedFd> {
        if from.cid == to.cid {
            // A guest reaches itself without us.
            return None;
        }
        let gate = Arc::clone(lock(&self.0).get(&to.cid)?);
        if !gate.groups.iter().any(|group| groups.contains(group)) {
            return None;
        }
        let of_type = match kind {
            Kind::Stream => SocketType::STREAM,
            Kind::Seqpacket => SocketType::SEQPACKET,
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, of_type, flags, None).ok()?;
        let mut calls = lock(&gate.calls);
        if calls.len() >= CALLS {
            return None;
        }
        calls.push(Call { from, port: to.port, kind, socket: theirs });
        drop(calls);
        gate.bell.ring();
        Some(ours)
    }
}

/// A guest is known while this lives.
#[derive(Debug)]
pub(super) struct Membership {
    cid: u64,
    neighbours: Neighbours,
}

impl Drop for Membership {
    fn drop(&mut self) {
        lock(&self.neighbours.0).remove(&self.cid);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
