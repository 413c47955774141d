//! Why a device state is not saved or not taken, in numbers.

use std::io;

use thiserror::Error as ThisError;

use crate::error::Error;

/// Why a device state is refused.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum StateError {
    /// It is something else.
    #[error("no device state of ours: it begins with {0:02x?}")]
    Foreign([u8; 8]),
    /// It is of a later program.
    #[error("device state of format {found}, this program knows up to {newest}")]
    Format {
        /// Of the state.
        found: u32,
        /// Of this program.
        newest: u32,
    },
    /// It ends too early.
    #[error("device state ends after {found} bytes of {whole}")]
    Short {
        /// What came.
        found: u64,
        /// What was to come.
        whole: u64,
    },
    /// It goes on after its end.
    #[error("device state goes on after its {whole} bytes")]
    Long {
        /// What was to come.
        whole: u64,
    },
    /// It is larger than the limit.
    #[error("device state with a value of {length} bytes, the limit is {limit}")]
    TooLarge {
        /// What it says.
        length: u64,
        /// The limit.
        limit: u64,
    },
    /// A bit was changed on the way.
    #[error("device state is damaged: checksum {found:#010x}, its bytes have {computed:#010x}")]
    Damaged {
        /// What it says.
        found: u32,
        /// What its bytes have.
        computed: u32,
    },
    /// It is of another kind of device.
    #[error("state of a device of type {found:?}, this one is {expected:?}")]
    DeviceType {
        /// Of the state.
        found: String,
        /// Of this device.
        expected: String,
    },
    /// It is of a device of another size.
    #[error("state of a device with {found} queues, this one has {expected}")]
    Queues {
        /// Of the state.
        found: u16,
        /// Of this device.
        expected: u16,
    },
    /// Its driver uses features that this device does not offer.
    #[error("state with features {features:#x}: {missing:#x} of them are not offered here")]
    NotOffered {
        /// Of the state.
        features: u64,
        /// Not offered.
        missing: u64,
    },
    /// The front-end has negotiated other features.
    #[error("state with features {features:#x}, {negotiated:#x} were negotiated")]
    Negotiated {
        /// Of the state.
        features: u64,
        /// Of this connection.
        negotiated: u64,
    },
    /// Its front-end used protocol features that this device does not offer.
    #[error(
        "state with protocol features {features:#x}: {missing:#x} of them are not offered here"
    )]
    NotOfferedProtocol {
        /// Of the state.
        features: u64,
        /// Not offered.
        missing: u64,
    },
    /// The device cannot make its state, or does not take this one.
    #[error("device: {0}")]
    Device(#[from] Error),
    /// The descriptor failed.
    #[error("device state: {what}: {source}")]
    Io {
        /// What we were doing.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The other end took too long.
    #[error("device state was not through within {0} s")]
    Deadline(u64),
    /// The transfer was given up before its end.
    #[error("the transfer of the device state was given up")]
    GivenUp,
}
