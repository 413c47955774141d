//! Capabilities of the calling thread (capabilities(7)): the part of the crate `capng` that the library
//! of `virtiofsd` uses, made of system calls.
//!
//! The crate of that name binds the C library libcap-ng, which would have to be there, with its
//! development files, wherever Outboard is built. This one takes its place in this workspace
//! (`[patch.crates-io]`); a build outside of it gets the other, and the C library.
//!
//! Invariant: what is changed is what the kernel has for this thread now, not what it had when somebody
//! looked first: a change of the effective user in between is not undone.

use std::cell::Cell;
use std::fmt;

use bitflags::bitflags;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

/// What went wrong.
#[derive(Debug)]
pub enum Error {
    /// The kernel does not say what the thread may.
    Get,
    /// The kernel refused the new sets.
    Apply,
    /// No capability has this name.
    Unknown(String),
}

impl std::error::Error for Error {}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Get => write!(f, "failed to get the thread's capabilities"),
            Self::Apply => write!(f, "failed to set the thread's capabilities"),
            Self::Unknown(name) => write!(f, "there is no capability {name}"),
        }
    }
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

bitflags! {
    /// Sets of a thread.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Type: u32 {
        /// What the kernel checks.
        const EFFECTIVE = 1;
        /// What may become effective.
        const PERMITTED = 2;
        /// What outlives execve(2).
        const INHERITABLE = 4;
    }

    /// What a call is about.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Set: u32 {
        /// The sets of [`Type`].
        const CAPS = 16;
        /// The bounding set; left as it is.
        const BOUNDS = 32;
        /// All.
        const BOTH = Self::CAPS.bits() | Self::BOUNDS.bits();
    }
}

/// What becomes of a capability.
#[derive(Clone, Copy, Debug)]
pub enum Action {
    /// It goes.
    DROP,
    /// It comes.
    ADD,
}

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability(CapabilitySet);

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

/// A change, not yet applied.
#[derive(Clone, Copy, Debug)]
pub struct CUpdate {
    /// What becomes of it.
    pub action: Action,
    /// In which sets.
    pub cap_type: Type,
    /// Which.
    pub capability: Capability,
}

thread_local! {
    /// What [`apply`] will set.
    static CHANGED: Cell<Option<CapabilitySets>> = const { Cell::new(None) };
}

/// What was changed and not applied, or what the kernel has.
fn current() -> Result<CapabilitySets> {
    match CHANGED.get() {
        Some(sets) => Ok(sets),
        None => capabilities(None).map_err(|_| Error::Get),
    }
}

/// Nothing is left, once applied.
pub fn clear(set: Set) {
    if set.contains(Set::CAPS) {
        let none = CapabilitySet::empty();
        let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
        CHANGED.set(Some(sets));
    }
}

/// Starts again from what the kernel has.
///
/// # Errors
/// It does not say.
pub fn get_caps_process() -> Result<()> {
    CHANGED.set(None);
    current().map(drop)
}

/// Notes changes, to be applied.
///
/// # Errors
/// The kernel does not say what the thread has.
pub fn update(updates: Vec<CUpdate>) -> Result<()> {
    let mut sets = current()?;
    for CUpdate { action, cap_type, capability } in updates {
        for (kind, set) in [
            (Type::EFFECTIVE, &mut sets.effective),
            (Type::PERMITTED, &mut sets.permitted),
            (Type::INHERITABLE, &mut sets.inheritable),
        ] {
            if cap_type.contains(kind) {
                set.set(capability.0, matches!(action, Action::ADD));
            }
        }
    }
    CHANGED.set(Some(sets));
    Ok(())
}

/// Has the kernel take what was changed.
///
/// # Errors
/// It refuses.
pub fn apply(set: Set) -> Result<()> {
    match CHANGED.take() {
        Some(sets) if set.contains(Set::CAPS) => {
            set_capabilities(None, sets).map_err(|_| Error::Apply)
        }
        _ => Ok(()),
    }
}

/// Whether the thread has it in all of these sets.
#[must_use]
pub fn have_capability(which: Type, capability: Capability) -> bool {
    current().is_ok_and(|sets| {
        [
            (Type::EFFECTIVE, sets.effective),
            (Type::PERMITTED, sets.permitted),
            (Type::INHERITABLE, sets.inheritable),
        ]
        .into_iter()
        .all(|(kind, set)| !which.contains(kind) || set.contains(capability.0))
    })
}

/// The capability that a name stands for, without `CAP_`.
///
/// # Errors
/// None does.
pub fn name_to_capability(name: &str) -> Result<Capability> {
    let found = CapabilitySet::from_name(&name.to_ascii_uppercase());
    found.map(Capability).ok_or_else(|| Error::Unknown(name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(action: Action, capability: Capability) {
        update(vec![CUpdate { action, cap_type: Type::EFFECTIVE, capability }]).expect("noted");
        apply(Set::CAPS).expect("applied");
    }

    #[test]
    fn a_capability_that_was_dropped_is_gone_until_it_is_added() {
        let fsetid = name_to_capability("fsetid").expect("known");
        if !have_capability(Type::PERMITTED, fsetid) {
            return;
        }
        std::thread::spawn(move || {
            change(Action::DROP, fsetid);
            assert!(!have_capability(Type::EFFECTIVE, fsetid));
            change(Action::ADD, fsetid);
            assert!(have_capability(Type::EFFECTIVE, fsetid));
        })
        .join()
        .expect("thread");
        assert!(name_to_capability("everything").is_err());
    }
}
