//! The words of the transcripts: messages by name, numbers, sets of features. See `script.rs`.

use std::fmt::Write as _;

use outboard_protocol::features::{ProtocolFeatures, virtio};
use outboard_protocol::header::{FLAG_NEED_REPLY, Header, REPLY_FLAGS, VERSION};
use outboard_protocol::table::{PayloadKind, Side, info};
use outboard_protocol::{Frame, table};
use zerocopy::FromBytes;

use super::Fd;

/// The request that is written `NAME words…`.
pub(crate) fn frame(side: Side, rest: &str) -> Frame<Fd> {
    let (name, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    let (mut payload, mut fds, mut flags) = (Vec::new(), Vec::new(), VERSION);
    let mut size = None;
    for word in rest.split_whitespace() {
        match word.split_once(['=', ':']) {
            None if word == "need_reply" => flags |= FLAG_NEED_REPLY,
            Some(("fds", list)) => fds.extend(list.split(',').map(number::<Fd>)),
            Some(("flags", value)) => flags = number(value),
            Some(("size", value)) => size = Some(number(value)),
            Some(("u64", value)) => payload.extend(number::<u64>(value).to_ne_bytes()),
            Some(("u32", value)) => payload.extend(number::<u32>(value).to_ne_bytes()),
            Some(("u16", value)) => payload.extend(number::<u16>(value).to_ne_bytes()),
            Some(("u8", value)) => payload.push(number(value)),
            Some(("zero", value)) => payload.resize(payload.len() + number::<usize>(value), 0),
            _ => panic!("what is {word:?}?"),
        }
    }
    let header = Header {
        request: id(side, name),
        flags,
        size: size.unwrap_or_else(|| payload.len().try_into().expect("short")),
    };
    match name {
        "raw" => Frame { bytes: payload, fds },
        _ => Frame::raw(header, &payload, fds),
    }
}

/// One reply as a line.
pub(crate) fn reply_line(side: Side, frame: &Frame<Fd>) -> String {
    let (header, payload) = Header::read_from_prefix(&frame.bytes).expect("a header");
    assert_eq!(payload.len(), usize::try_from(header.size).expect("small"), "an honest size");
    assert_eq!(header.flags, REPLY_FLAGS, "every reply has flags 5");
    let row = info(side, header.request);
    let mut line = match row {
        Some(row) => format!("< {}", row.name),
        None => format!("< #{}", header.request),
    };
    let states =
        row.is_some_and(|row| row.payload == PayloadKind::VringState && row.reply.is_own());
    let words: Vec<_> =
        payload.chunks_exact(4).map(|word| u32::read_from_bytes(word).expect("4")).collect();
    match payload.len() {
        0 => line.push_str(" empty"),
        8 if states => {
            let _ = write!(line, " u32:{} u32:{:#x}", words[0], words[1]);
        }
        8 => {
            let _ = write!(line, " u64:{:#x}", u64::read_from_bytes(payload).expect("8"));
        }
        len if payload.iter().all(|byte| *byte == 0) => {
            let _ = write!(line, " zero:{len}");
        }
        len @ ..=64 => {
            let hex: String = payload.iter().map(|byte| format!("{byte:02x}")).collect();
            let _ = write!(line, " {len} bytes {hex}");
        }
        len => {
            let _ = write!(line, " {len} bytes");
        }
    }
    for fd in &frame.fds {
        let _ = write!(line, " fd {fd}");
    }
    line.push('\n');
    line
}

fn id(side: Side, name: &str) -> u32 {
    match name.strip_prefix('#') {
        Some(id) => number(id),
        None if name == "raw" => 0,
        None => {
            let row = table().iter().find(|row| row.side == side && row.name == name);
            row.unwrap_or_else(|| panic!("no message {name}")).id
        }
    }
}

pub(crate) fn pairs(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.split_whitespace().map(|word| word.split_once('=').expect("key=value"))
}

/// A number, decimal or with `0x`.
pub(crate) fn number<T: TryFrom<u64>>(text: &str) -> T {
    let value = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    let value = value.unwrap_or_else(|_| panic!("{text:?} is no number"));
    T::try_from(value).ok().unwrap_or_else(|| panic!("{text} does not fit"))
}

pub(crate) fn features(text: &str) -> u64 {
    let named = |name| match name {
        "VERSION_1" => virtio::VERSION_1,
        "EVENT_IDX" => virtio::RING_EVENT_IDX,
        "PACKED" => virtio::RING_PACKED,
        "IOMMU" => virtio::ACCESS_PLATFORM,
        "LOG_ALL" => virtio::LOG_ALL,
        "NET_MTU" => virtio::NET_MTU,
        "PROTOCOL_FEATURES" => virtio::PROTOCOL_FEATURES,
        other => number(other),
    };
    text.split('|').map(named).fold(0, |all, bit| all | bit)
}

pub(crate) fn protocol(text: &str) -> ProtocolFeatures {
    if text == "all" {
        return super::all_protocol();
    }
    if text.starts_with("0x") {
        return ProtocolFeatures::from_bits(number(text)).expect("known bits");
    }
    let named = |name| ProtocolFeatures::from_name(name).unwrap_or_else(|| panic!("no {name}"));
    text.split('|').map(named).fold(ProtocolFeatures::empty(), |all, bit| all | bit)
}
