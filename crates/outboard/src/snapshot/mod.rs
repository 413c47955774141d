//! Device state: what a device says about itself when it is suspended, and the frame that carries
//! it to another process (vhost-user, "Migrating back-end state").
//!
//! ```text
//!  Snapshot: version, value ─▶ DeviceState: frame, kind, features ─▶ bytes ─▶ DeviceState ─▶ Saved
//! ```
//! The value is the device's own, in a version of its own; a device that keeps no state has an
//! empty one. Ring indices are not in it: the front-end carries those (GET_VRING_BASE).
//!
//! Invariant: a state is taken as a whole or not at all, and what is wrong with it is said in
//! numbers.

mod error;
mod frame;

use std::fmt;

use crate::error::Error;
use crate::queue::QueueSpec;

pub use error::StateError;
pub use frame::{DeviceState, STATE_FORMAT, STATE_HEADER, STATE_MAGIC};
pub(crate) use frame::{Fit, PASSING};

/// Bytes of the name of a device's kind.
const TYPE_SIZE: usize = 32;

/// The device's own state, to be saved.
pub struct Snapshot {
    version: u32,
    value: Value,
}

enum Value {
    Bytes(Vec<u8>),
    Later(Box<dyn FnOnce() -> Result<Vec<u8>, Error> + Send>),
}

impl Snapshot {
    /// Of a device that keeps no state of its own.
    #[must_use]
    pub fn none() -> Self {
        Self::new(0, Vec::new())
    }

    /// These bytes, in this version of the device's own.
    #[must_use]
    pub fn new(version: u32, bytes: Vec<u8>) -> Self {
        Self { version, value: Value::Bytes(bytes) }
    }

    /// Bytes that take their time: made on the thread of the transfer.
    pub fn later(
        version: u32,
        make: impl FnOnce() -> Result<Vec<u8>, Error> + Send + 'static,
    ) -> Self {
        Self { version, value: Value::Later(Box::new(make)) }
    }

    /// A value that describes itself (CBOR, maps with the fields' names), made into bytes on the
    /// thread of the transfer.
    #[cfg(feature = "state")]
    pub fn of<T: serde::Serialize + Send + 'static>(version: u32, value: T) -> Self {
        Self::later(version, move || {
            let mut bytes = Vec::new();
            let made = ciborium::into_writer(&value, &mut bytes);
            made.map_err(|error| Error::refused(format!("state: {error}")))?;
            Ok(bytes)
        })
    }

    /// The bytes and their version.
    ///
    /// # Errors
    /// The device could not make them.
    pub fn into_bytes(self) -> Result<(u32, Vec<u8>), Error> {
        let bytes = match self.value {
            Value::Bytes(bytes) => bytes,
            Value::Later(make) => make()?,
        };
        Ok((self.version, bytes))
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot").field("version", &self.version).finish_non_exhaustive()
    }
}

/// The device's own state, to be restored. It passed its checksum, and is the peer's all the same.
#[derive(Clone, Copy)]
pub struct Saved<'a> {
    version: u32,
    bytes: &'a [u8],
    features: Option<u64>,
}

impl<'a> Saved<'a> {
    /// A state with this value, as a test or another container would have it.
    #[must_use]
    pub const fn new(version: u32, bytes: &'a [u8], features: Option<u64>) -> Self {
        Self { version, bytes, features }
    }

    /// Version of the value.
    #[must_use]
    pub const fn version(&self) -> u32 {
        self.version
    }

    /// The value.
    #[must_use]
    pub const fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Feature bits that the driver had acknowledged, ring and transport bits included; None: it
    /// had not come that far.
    #[must_use]
    pub const fn features(&self) -> Option<u64> {
        self.features
    }

    /// Refuses versions that are newer than `newest`.
    ///
    /// # Errors
    /// The state is of a later program; says both numbers.
    pub fn up_to(&self, newest: u32) -> Result<(), Error> {
        if self.version <= newest {
            return Ok(());
        }
        let found = self.version;
        Err(Error::refused(format!("state version {found}, this program knows up to {newest}")))
    }

    /// Refuses every value but the empty one.
    ///
    /// # Errors
    /// There is a value.
    pub fn nothing(&self) -> Result<(), Error> {
        if self.version == 0 && self.bytes.is_empty() {
            return Ok(());
        }
        let (bytes, version) = (self.bytes.len(), self.version);
        Err(Error::refused(format!(
            "{bytes} bytes of state version {version}, this device keeps none"
        )))
    }

    /// The value of [`Snapshot::of`], in a version up to `newest`.
    ///
    /// # Errors
    /// The version is later, or the bytes are no such value.
    #[cfg(feature = "state")]
    pub fn read<T: serde::de::DeserializeOwned>(&self, newest: u32) -> Result<T, Error> {
        self.up_to(newest)?;
        let mut rest = self.bytes;
        let version = self.version;
        let bad = |why: String| Error::refused(format!("state version {version}: {why}"));
        let value = ciborium::from_reader(&mut rest).map_err(|error| bad(error.to_string()))?;
        match rest.len() {
            0 => Ok(value),
            more => Err(bad(format!("{more} bytes behind the value"))),
        }
    }
}

impl fmt::Debug for Saved<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { version, bytes, features } = self;
        write!(f, "Saved(version {version}, {} bytes, features {features:x?})", bytes.len())
    }
}

/// The kind of a device that does not say: by its queues.
pub(crate) fn named_by(queues: &[QueueSpec]) -> String {
    let mut names: Vec<&str> = queues.iter().map(|queue| queue.name).collect();
    names.dedup();
    let mut name = names.join("+");
    while name.len() > TYPE_SIZE {
        name.pop();
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_without_state_takes_only_the_empty_value() {
        let (version, bytes) = Snapshot::none().into_bytes().expect("bytes");
        Saved::new(version, &bytes, None).nothing().expect("empty");
        let error = Saved::new(3, b"abc", None).nothing().expect_err("refused").to_string();
        assert_eq!(error, "3 bytes of state version 3, this device keeps none");
    }

    #[cfg(feature = "state")]
    #[test]
    fn a_value_describes_itself_and_later_versions_are_refused() {
        let (version, bytes) = Snapshot::of(2, ("a".to_owned(), 5u8)).into_bytes().expect("bytes");
        let saved = Saved::new(version, &bytes, None);
        let back: (String, u8) = saved.read(2).expect("read");
        assert_eq!(back, ("a".to_owned(), 5));
        let says = |saved: Saved<'_>, newest| {
            saved.read::<(String, u8)>(newest).expect_err("refused").to_string()
        };
        assert_eq!(says(saved, 1), "state version 2, this program knows up to 1");
        let longer = [&bytes[..], &[0]].concat();
        assert!(says(Saved::new(2, &longer, None), 2).ends_with("1 bytes behind the value"));
        for end in 0..bytes.len() {
            assert!(says(Saved::new(2, &bytes[..end], None), 2).starts_with("state version 2: "));
        }
    }
}
