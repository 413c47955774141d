//! What a back-end offers, asked without starting anything: features, protocol features, queues, memory
//! slots, and the configuration of the device types that are known here.
//!
//! Invariant: only questions are sent, and SET_PROTOCOL_FEATURES, without which some may not be asked; no
//! memory is shared and no ring starts. What the back-end refuses to say is `None` and not a failure.

mod config;
mod names;

use outboard_frontend::{Connection, Error};
use outboard_protocol::features::{ProtocolFeatures, virtio};
use serde::{Serialize, Serializer};

pub use config::{DeviceType, Field, decode};
pub use names::{device_feature, protocol_feature, ring_feature};

/// A set of bits with the names of those that are set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Bits {
    /// All of them.
    #[serde(serialize_with = "hexadecimal")]
    pub value: u64,
    /// Name and meaning of each, from the lowest on.
    pub set: Vec<Named>,
}

/// One bit with a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Named {
    /// Its number.
    pub bit: u32,
    /// Its name in the specification, without the prefix.
    pub name: String,
    /// What it means, in a few words.
    pub meaning: &'static str,
}

/// What a back-end offers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Offer {
    /// Process id of the back-end, where the kernel can tell.
    pub pid: Option<u32>,
    /// What it is: as the caller said, else as the bits suggest.
    pub device: Option<DeviceType>,
    /// Whether the type is a guess.
    pub guessed: bool,
    /// Virtio and vhost features.
    pub features: Bits,
    /// Protocol features; `None` when it has no such thing.
    pub protocol_features: Option<Bits>,
    /// Most queues (MQ).
    pub queues: Option<u64>,
    /// Most memory regions (CONFIGURE_MEM_SLOTS).
    pub memory_slots: Option<u64>,
    /// The first bytes of the configuration space (CONFIG), as many as it gave.
    #[serde(serialize_with = "bytes")]
    pub config: Option<Vec<u8>>,
    /// The configuration decoded, for a known type.
    pub fields: Vec<Field>,
}

/// Asks a back-end. `device` says what it is, where the caller knows.
///
/// # Errors
/// Anything the connection can fail with, except for refusals.
pub fn probe(mut connection: Connection, device: Option<DeviceType>) -> Result<Offer, Error> {
    let features = connection.get_features()?;
    let mut offered = None;
    let (mut queues, mut memory_slots, mut config) = (None, None, None);
    if features & virtio::PROTOCOL_FEATURES != 0 {
        let all = connection.get_protocol_features()?;
        offered = Some(all);
        let asked = ProtocolFeatures::MQ
            | ProtocolFeatures::REPLY_ACK
            | ProtocolFeatures::CONFIG
            | ProtocolFeatures::CONFIGURE_MEM_SLOTS;
        connection.set_protocol_features(all & asked)?;
        if all.contains(ProtocolFeatures::MQ) {
            queues = Some(connection.get_queue_num()?);
        }
        if all.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            memory_slots = Some(connection.get_max_mem_slots()?);
        }
        if all.contains(ProtocolFeatures::CONFIG) {
            config = longest_config(&mut connection, device)?;
        }
    }
    let guess = device.or_else(|| DeviceType::guess(features, config.as_deref()));
    let fields = match (guess, &config) {
        (Some(device), Some(bytes)) => decode(device, bytes, features),
        _ => Vec::new(),
    };
    Ok(Offer {
        pid: connection.peer_pid(),
        device: guess,
        guessed: device.is_none() && guess.is_some(),
        features: bits(features, |bit| {
            ring_feature(bit).or_else(|| guess.and_then(|device| device_feature(device, bit)))
        }),
        protocol_features: offered.map(|set| bits(set.bits(), protocol_feature)),
        queues,
        memory_slots,
        config,
        fields,
    })
}

/// The configuration, as much of it as the back-end gives: some refuse to give more than they have.
fn longest_config(
    connection: &mut Connection,
    device: Option<DeviceType>,
) -> Result<Option<Vec<u8>>, Error> {
    const SIZES: [u32; 9] = [96, 60, 40, 36, 24, 16, 12, 8, 4];
    let known = device.map(DeviceType::config_size).into_iter();
    for size in known.chain(SIZES) {
        match connection.get_config(0, size) {
            Ok(bytes) => return Ok(Some(bytes)),
            Err(Error::NoConfig { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

fn bits(value: u64, name: impl Fn(u32) -> Option<(&'static str, &'static str)>) -> Bits {
    let set = (0..u64::BITS)
        .filter(|&bit| value >> bit & 1 == 1)
        .map(|bit| match name(bit) {
            Some((name, meaning)) => Named { bit, name: name.to_owned(), meaning },
            None => Named { bit, name: format!("bit {bit}"), meaning: "" },
        })
        .collect();
    Bits { value, set }
}

fn hexadecimal<S: Serializer>(value: &u64, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&format!("{value:#x}"))
}

#[expect(clippy::ref_option, reason = "the signature is serde's")]
fn bytes<S: Serializer>(value: &Option<Vec<u8>>, to: S) -> Result<S::Ok, S::Error> {
    match value {
        None => to.serialize_none(),
        Some(bytes) => to.serialize_str(&hex(bytes)),
    }
}

/// Bytes as hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
