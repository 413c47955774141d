//! Writes down what goes over a connection, one line a message: `> NAME …` out, `< NAME …` in.
//!
//! The text is made from the bytes that really pass, not from what the caller meant. Invariant: it holds
//! nothing that changes from run to run (no descriptor numbers, no times; addresses are those of
//! [`SharedMemory`](crate::SharedMemory), which hands out the same ones each time), so that transcripts can be kept and
//! compared.

use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};

use outboard_protocol::header::{HEADER_SIZE, Header};
use outboard_protocol::payload::{
    self, ConfigHead, Log, MemRegion, SingleRegion, VringAddr, VringState,
};
use outboard_protocol::table::{self, MessageInfo, PayloadKind, ReplyKind, Side};

/// Which way a message went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the front-end to the back-end.
    Out,
    /// From the back-end to the front-end.
    In,
}

/// Hears of every message that passes a connection.
pub trait Recorder: Send {
    /// One whole message passed: its bytes, header first, and how many descriptors came with it.
    fn message(&mut self, direction: Direction, bytes: &[u8], fds: usize);
}

/// A [`Recorder`] that keeps the lines; clones share them.
#[derive(Clone, Debug, Default)]
pub struct Transcript {
    lines: Arc<Mutex<Vec<String>>>,
}

impl Transcript {
    /// An empty transcript.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a line of the caller's own, for what happens between messages.
    pub fn note(&self, text: &str) {
        self.push(format!("# {text}"));
    }

    /// All lines so far, each with its end.
    #[must_use]
    pub fn text(&self) -> String {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().fold(String::new(), |mut text, line| {
            text.push_str(line);
            text.push('\n');
            text
        })
    }

    fn push(&self, line: String) {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    }
}

impl Recorder for Transcript {
    fn message(&mut self, direction: Direction, bytes: &[u8], fds: usize) {
        self.push(line(direction, bytes, fds));
    }
}

/// One message in the notation of the transcripts.
#[must_use]
pub fn line(direction: Direction, bytes: &[u8], fds: usize) -> String {
    let mut text = match direction {
        Direction::Out => "> ".to_owned(),
        Direction::In => "< ".to_owned(),
    };
    let Some(header) = payload::read::<Header>(bytes) else {
        let _ = write!(text, "{} bytes, no header", bytes.len());
        return text;
    };
    let body = bytes.get(HEADER_SIZE..).unwrap_or_default();
    match table::info(Side::FrontEnd, header.request) {
        Some(info) => {
            text.push_str(info.name);
            let shown = match direction {
                Direction::Out => request(info.payload, body),
                Direction::In => reply(info, body),
            };
            text.push_str(&shown.unwrap_or_else(|| format!(" {} bytes", body.len())));
        }
        None => {
            let _ = write!(text, "MESSAGE_{} {} bytes", header.request, body.len());
        }
    }
    if fds > 0 {
        let _ = write!(text, " +{fds} fd");
    }
    if direction == Direction::Out && header.need_reply() {
        text.push_str(" need_reply");
    }
    if direction == Direction::In && header.flags != 5 {
        let _ = write!(text, " flags {:#x}", header.flags);
    }
    text
}

fn request(kind: PayloadKind, body: &[u8]) -> Option<String> {
    Some(match kind {
        PayloadKind::Empty if body.is_empty() => String::new(),
        PayloadKind::U64 => format!(" {:#x}", payload::read_u64(body)?),
        PayloadKind::VringFd => {
            let word = payload::VringFd(payload::read_u64(body)?);
            format!(" ring {}{}", word.index(), if word.has_fd() { "" } else { " no fd" })
        }
        PayloadKind::VringState => ring_and_number(body)?,
        PayloadKind::VringAddr => {
            let at: VringAddr = payload::read(body)?;
            format!(
                " ring {} desc {:#x} used {:#x} avail {:#x} flags {} log {:#x}",
                at.index, at.desc, at.used, at.avail, at.flags, at.log_guest_addr
            )
        }
        PayloadKind::MemTable => {
            let regions = payload::decode_mem_table(body)?;
            regions.iter().fold(format!(" {} regions", regions.len()), |text, r| text + &region(r))
        }
        PayloadKind::SingleRegion => region(&payload::read::<SingleRegion>(body)?.region),
        PayloadKind::Log if body.len() >= size_of::<Log>() => {
            let log: Log = payload::read(body)?;
            format!(" size {:#x} offset {:#x}", log.mmap_size, log.mmap_offset)
        }
        PayloadKind::Config => {
            let head: ConfigHead = payload::read(body)?;
            let data = body.get(size_of::<ConfigHead>()..)?;
            let mut text = format!(" offset {} size {}", head.offset, head.size);
            if head.flags != 0 {
                let _ = write!(text, " flags {}", head.flags);
            }
            if data.iter().any(|&byte| byte != 0) {
                text.push_str(" = ");
                text.push_str(&hex(data));
            }
            text
        }
        PayloadKind::DeviceState => {
            let state: payload::DeviceState = payload::read(body)?;
            format!(" direction {} phase {}", state.direction, state.phase)
        }
        _ => return None,
    })
}

fn reply(info: &MessageInfo, body: &[u8]) -> Option<String> {
    Some(match info.reply {
        _ if body.is_empty() => " (empty)".to_owned(),
        ReplyKind::Ack | ReplyKind::AckWheneverAsked if body.len() == 8 => {
            match payload::read_u64(body)? {
                0 => " ok".to_owned(),
                code => format!(" refused {code:#x}"),
            }
        }
        ReplyKind::VringState => ring_and_number(body)?,
        ReplyKind::Config => request(PayloadKind::Config, body)?,
        ReplyKind::U64 | ReplyKind::Status | ReplyKind::DeviceState if body.len() == 8 => {
            format!(" {:#x}", payload::read_u64(body)?)
        }
        _ => return None,
    })
}

fn ring_and_number(body: &[u8]) -> Option<String> {
    let state: VringState = payload::read(body)?;
    Some(format!(" ring {} {}", state.index, state.num))
}

fn region(region: &MemRegion) -> String {
    format!(
        " [guest {:#x} size {:#x} user {:#x} offset {:#x}]",
        region.guest_addr, region.size, region.user_addr, region.offset
    )
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use outboard_protocol::Frame;

    fn out(id: u32, need_reply: bool, body: &[u8]) -> String {
        let frame = Frame::<()>::request(id, need_reply, body, Vec::new());
        line(Direction::Out, &frame.bytes, 0)
    }

    #[test]
    fn requests_and_replies_are_written_with_their_values() {
        assert_eq!(out(3, false, &[]), "> SET_OWNER");
        assert_eq!(out(2, true, &5u64.to_ne_bytes()), "> SET_FEATURES 0x5 need_reply");
        let ring = [1u32.to_ne_bytes(), 256u32.to_ne_bytes()].concat();
        assert_eq!(out(8, false, &ring), "> SET_VRING_NUM ring 1 256");
        let answer = Frame::<()>::reply(2, &1u64.to_ne_bytes(), Vec::new());
        assert_eq!(line(Direction::In, &answer.bytes, 0), "< SET_FEATURES refused 0x1");
    }

    #[test]
    fn what_makes_no_sense_is_written_by_its_length() {
        assert_eq!(line(Direction::In, &[1, 2, 3], 0), "< 3 bytes, no header");
        assert_eq!(out(200, false, &[0; 4]), "> MESSAGE_200 4 bytes");
        assert_eq!(out(9, false, &[0; 4]), "> SET_VRING_ADDR 4 bytes");
        let odd = Frame::<()>::raw(Header { request: 1, flags: 1, size: 0 }, &[], Vec::new());
        assert_eq!(line(Direction::In, &odd.bytes, 2), "< GET_FEATURES (empty) +2 fd flags 0x1");
    }
}
