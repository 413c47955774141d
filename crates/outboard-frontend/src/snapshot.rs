//! A device's state and its sleeping queues as a value that another process can take up
//! (vhost-user, "Migrating back-end state"; messages 42 and 43).
//!
//! ```text
//!  snapshot  SET_DEVICE_STATE_FD (save), read to the end, CHECK_DEVICE_STATE
//!  restore   SET_FEATURES, SET_DEVICE_STATE_FD (load), write and close, CHECK_DEVICE_STATE
//! ```
//! The device's part is opaque here; ours is the features, and where each queue stands. Guest memory
//! is its owner's to keep. Invariant: nothing is taken up before the back-end has confirmed it.

use std::io::Read;
use std::sync::Arc;

use outboard_protocol::features::ProtocolFeatures;

use crate::error::Error;
use crate::memory::wide;
use crate::virtqueue::{RingShare, Virtqueue};
use crate::vmm::{QueueSetup, Vmm};

/// The first bytes of a snapshot in a file.
const MAGIC: [u8; 8] = *b"OUTBDVMM";
/// Its format.
const FORMAT: u32 = 1;

/// What [`Vmm::snapshot`] makes: everything of the device but guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmmSnapshot {
    /// Feature bits that were negotiated.
    pub features: u64,
    /// The queues that sleep, each with its base.
    pub queues: Vec<(QueueSetup, u32)>,
    /// The device's own part.
    pub state: Vec<u8>,
}

impl VmmSnapshot {
    /// As bytes, for a file.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(FORMAT.to_le_bytes());
        bytes.extend(u32::try_from(self.queues.len()).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend(self.features.to_le_bytes());
        bytes.extend(wide(self.state.len()).to_le_bytes());
        for (QueueSetup { index, size, indirect }, base) in &self.queues {
            for half in [index, size, indirect, &0] {
                bytes.extend(half.to_le_bytes());
            }
            bytes.extend(base.to_le_bytes());
        }
        bytes.extend_from_slice(&self.state);
        bytes
    }

    /// Reads what [`Self::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`Error::Snapshot`] when it is something else, or not whole.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let mut rest = bytes;
        if take::<8>(&mut rest)? != MAGIC {
            return Err(Error::Snapshot("no snapshot of this program".to_owned()));
        }
        let format = u32::from_le_bytes(take(&mut rest)?);
        if format != FORMAT {
            let what = format!("a snapshot of format {format}, this program knows {FORMAT}");
            return Err(Error::Snapshot(what));
        }
        let count = u32::from_le_bytes(take(&mut rest)?);
        let features = u64::from_le_bytes(take(&mut rest)?);
        let length = u64::from_le_bytes(take(&mut rest)?);
        let mut queues = Vec::new();
        for _ in 0..count {
            let mut half = || take(&mut rest).map(u16::from_le_bytes);
            let setup = QueueSetup { index: half()?, size: half()?, indirect: half()? };
            half()?;
            queues.push((setup, u32::from_le_bytes(take(&mut rest)?)));
        }
        if wide(rest.len()) != length {
            let found = rest.len();
            let what = format!("a snapshot with {found} bytes of device state instead of {length}");
            return Err(Error::Snapshot(what));
        }
        Ok(Self { features, queues, state: rest.to_vec() })
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], Error> {
    let mut part = [0; N];
    let short = |_| Error::Snapshot("a snapshot that ends too early".to_owned());
    rest.read_exact(&mut part).map_err(short)?;
    Ok(part)
}

impl Vmm {
    /// The state of a device whose queues sleep, or that has none active. Requests under way were
    /// finished by [`Self::sleep`]: pop them first, another process will not.
    ///
    /// # Errors
    /// [`Error::State`] while queues are active, [`Error::NotOffered`] without DEVICE_STATE,
    /// [`Error::Refused`] when the back-end cannot, [`Error::Snapshot`] when what it sends has no end.
    pub fn snapshot(&mut self) -> Result<VmmSnapshot, Error> {
        self.quiet()?;
        let state = self.connection().save_state()?;
        let queues = self.sleeping().iter().map(|(ring, base)| (ring.setup(), *base)).collect();
        Ok(VmmSnapshot { features: self.features(), queues, state })
    }

    /// Has a new device take a snapshot up, and lays its queues out anew in the memory that was
    /// shared, where they stood. They sleep; [`Self::wake`] starts them.
    ///
    /// # Errors
    /// [`Error::State`] when queues are active or asleep, [`Error::NotOffered`] without DEVICE_STATE,
    /// [`Error::Snapshot`] for features that the back-end does not offer, [`Error::Refused`] when it
    /// does not take the state; it can be asked again.
    pub fn restore(&mut self, snapshot: &VmmSnapshot) -> Result<Vec<Virtqueue>, Error> {
        self.quiet()?;
        if !self.sleeping().is_empty() {
            return Err(Error::State("a device whose queues sleep cannot be restored"));
        }
        let missing = snapshot.features & !self.offered();
        if missing != 0 {
            return Err(Error::Snapshot(format!(
                "a snapshot with features {:#x}: the back-end does not offer {missing:#x}",
                snapshot.features
            )));
        }
        self.connection().set_features(snapshot.features)?;
        self.connection().load_state(&snapshot.state)?;
        let memory = self.memory().cloned();
        let mut driven = Vec::with_capacity(snapshot.queues.len());
        let mut rings = Vec::with_capacity(snapshot.queues.len());
        for (setup, base) in &snapshot.queues {
            let memory = memory.as_ref().ok_or(Error::State("no memory was shared"))?;
            let ring = RingShare::new(memory, *setup, snapshot.features)?;
            let index = u16::try_from(*base & 0xffff).unwrap_or(0);
            driven.push(Virtqueue::starting_at(Arc::clone(&ring), snapshot.features, index)?);
            rings.push((ring, *base));
        }
        self.take_up(snapshot.features, rings);
        Ok(driven)
    }

    fn quiet(&self) -> Result<(), Error> {
        if !self.protocol_features().contains(ProtocolFeatures::DEVICE_STATE) {
            return Err(Error::NotOffered("DEVICE_STATE"));
        }
        if self.is_active() {
            return Err(Error::State("queues are active: send the device to sleep first"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_comes_back_as_it_was_and_not_in_parts() {
        let setup = QueueSetup { index: 3, size: 64, indirect: 8 };
        let snapshot = VmmSnapshot {
            features: 0x1_4000_0001,
            queues: vec![(setup, 7), (QueueSetup { index: 9, ..setup }, 0xffff)],
            state: b"state".to_vec(),
        };
        let bytes = snapshot.to_bytes();
        assert_eq!(VmmSnapshot::parse(&bytes).expect("whole"), snapshot);
        for end in 0..bytes.len() {
            VmmSnapshot::parse(&bytes[..end]).expect_err("cut");
        }
        VmmSnapshot::parse(&[&bytes[..], &[0]].concat()).expect_err("longer");
        let mut other = bytes.clone();
        other[8] = 2;
        let error = VmmSnapshot::parse(&other).expect_err("newer").to_string();
        assert_eq!(error, "a snapshot of format 2, this program knows 1");
        other[15] = 0xff;
        other[8] = 1;
        VmmSnapshot::parse(&other).expect_err("four thousand million queues");
    }
}
