//! Tickets: the duty to answer one request with one type of value.
//!
//! Invariant: a ticket is used up by [`Backend::answer`](crate::Backend::answer), so nothing is
//! answered twice; its type says what the answer is, so nothing is answered wrongly; the machine
//! holds a weak reference to it, so a ticket that was dropped is noticed at the next poll and the
//! request is refused.

use std::fmt;
use std::marker::PhantomData;
use std::sync::{Arc, Weak};

use crate::payload::{Inflight, ShmemConfig};
use crate::violation::Refusal;

/// The duty to answer one request.
#[must_use = "a ticket that is dropped refuses the request"]
pub struct Ticket<R> {
    seal: Arc<()>,
    reply: PhantomData<fn() -> R>,
}

impl<R> Ticket<R> {
    pub(crate) fn issue() -> (Self, Weak<()>) {
        let seal = Arc::new(());
        let watch = Arc::downgrade(&seal);
        (Self { seal, reply: PhantomData }, watch)
    }

    pub(crate) fn is_watched_by(&self, watch: &Weak<()>) -> bool {
        std::ptr::eq(Arc::as_ptr(&self.seal), watch.as_ptr())
    }
}

impl<R> fmt::Debug for Ticket<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ticket")
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A type of answer. Sealed: the kinds below are all there are.
pub trait Reply<Fd>: sealed::Sealed {
    /// What the answer consists of.
    type Value;
    /// The value in the machine's own terms.
    #[doc(hidden)]
    fn outcome(value: Self::Value) -> Result<Outcome<Fd>, Refusal>;
}

/// An answer in the machine's own terms.
#[doc(hidden)]
#[derive(Debug)]
pub enum Outcome<Fd> {
    /// It was done.
    Done,
    /// A number.
    Number(u64),
    /// The base of a ring.
    Base(u32),
    /// Bytes.
    Bytes(Vec<u8>),
    /// A descriptor or none.
    Fd(Option<Fd>),
    /// An in-flight region or none.
    Inflight(Option<(Inflight, Fd)>),
    /// A session id.
    Session(i64),
    /// Shared-memory sizes.
    Shmem(Box<ShmemConfig>),
    /// Where the regions of a table are mapped here.
    Bases(Vec<u64>),
}

macro_rules! replies {
    ($($(#[$meta:meta])* $name:ident: $value:ty => |$got:ident| $outcome:expr;)*) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name {}
        impl sealed::Sealed for $name {}
        impl<Fd> Reply<Fd> for $name {
            type Value = Result<$value, Refusal>;
            fn outcome(value: Self::Value) -> Result<Outcome<Fd>, Refusal> {
                value.map(|$got| $outcome)
            }
        }
    )*};
}

replies! {
    /// Done, or refused. The table says whether and in what form the peer hears of it.
    Ack: () => |_done| Outcome::Done;
    /// The next index of a ring that has stopped (16 bits split, both halves packed).
    Base: u32 => |base| Outcome::Base(base);
    /// Bytes of configuration space; padded with zeros or cut to the length asked for.
    ConfigBytes: Vec<u8> => |bytes| Outcome::Bytes(bytes);
    /// The virtio status byte.
    Status: u8 => |status| Outcome::Number(u64::from(status));
    /// The id of a new crypto session, zero or more.
    SessionId: i64 => |id| Outcome::Session(id);
    /// A descriptor: the userfaultfd of POSTCOPY_ADVISE.
    UserFault: Fd => |fd| Outcome::Fd(Some(fd));
    /// The descriptor of a shared object, if there is such an object.
    SharedObject: Option<Fd> => |fd| Outcome::Fd(fd);
    /// An in-flight region with its descriptor; `None`: not available.
    InflightArea: Option<(Inflight, Fd)> => |area| Outcome::Inflight(area);
    /// Our own descriptor for the transfer of device state; `None`: the front-end's is used.
    StateChannel: Option<Fd> => |fd| Outcome::Fd(fd);
    /// The address of each region's first byte in this process, in the order of the table.
    Bases: Vec<u64> => |bases| Outcome::Bases(bases);
    /// Sizes of the shared-memory regions.
    ShmemSizes: Box<ShmemConfig> => |sizes| Outcome::Shmem(sizes);
}
