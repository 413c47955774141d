//! Writes down what goes over a connection, one line a message: `> NAME …` out, `< NAME …` in. On the
//! back-end channel, where the back-end asks, the lines begin with `<<` and `>>`.
//!
//! The text is made from the bytes that really pass, not from what the caller meant. Invariant: it holds
//! nothing that changes from run to run (no descriptor numbers, no times; addresses are those of
//! [`SharedMemory`](crate::SharedMemory), which hands out the same ones each time), so that transcripts can be kept and
//! compared.

use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};

use outboard_protocol::header::{HEADER_SIZE, Header};
use outboard_protocol::payload::{
    self, ConfigHead, ExternalMap, GpuMap, Iotlb, Log, MemRegion, ShmemMap, SingleRegion,
    VringAddr, VringArea, VringState,
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

    /// The same on the back-end channel.
    fn channel_message(&mut self, direction: Direction, bytes: &[u8], fds: usize) {
        let _ = (direction, bytes, fds);
    }
}

/// Puts messages together for a recorder, whatever pieces they came in.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    held: Vec<u8>,
    fds: usize,
}

impl Pieces {
    /// Takes one piece; `with` hears of each message that is whole now.
    pub(crate) fn take(&mut self, bytes: &[u8], fds: usize, mut with: impl FnMut(&[u8], usize)) {
        self.held.extend_from_slice(bytes);
        self.fds += fds;
        while let Some(header) = payload::read::<Header>(&self.held) {
            let size = usize::try_from(header.size).unwrap_or(usize::MAX).min(4096);
            if self.held.len() < HEADER_SIZE + size {
                return;
            }
            let rest = self.held.split_off(HEADER_SIZE + size);
            with(&self.held, self.fds);
            (self.held, self.fds) = (rest, 0);
        }
    }
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

    fn channel_message(&mut self, direction: Direction, bytes: &[u8], fds: usize) {
        self.push(channel_line(direction, bytes, fds));
    }
}

/// One message of the main socket in the notation of the transcripts.
#[must_use]
pub fn line(direction: Direction, bytes: &[u8], fds: usize) -> String {
    match direction {
        Direction::Out => text(">", Side::FrontEnd, true, bytes, fds),
        Direction::In => text("<", Side::FrontEnd, false, bytes, fds),
    }
}

/// One message of the back-end channel in the notation of the transcripts.
#[must_use]
pub fn channel_line(direction: Direction, bytes: &[u8], fds: usize) -> String {
    match direction {
        Direction::Out => text(">>", Side::BackEnd, false, bytes, fds),
        Direction::In => text("<<", Side::BackEnd, true, bytes, fds),
    }
}

/// A request or a reply to one; `side` is who asks.
fn text(arrow: &str, side: Side, asks: bool, bytes: &[u8], fds: usize) -> String {
    let mut text = format!("{arrow} ");
    let Some(header) = payload::read::<Header>(bytes) else {
        let _ = write!(text, "{} bytes, no header", bytes.len());
        return text;
    };
    let body = bytes.get(HEADER_SIZE..).unwrap_or_default();
    match table::info(side, header.request) {
        Some(info) => {
            text.push_str(info.name);
            let shown = if asks { request(info.payload, body) } else { reply(info, body) };
            text.push_str(&shown.unwrap_or_else(|| format!(" {} bytes", body.len())));
        }
        None => {
            let _ = write!(text, "MESSAGE_{} {} bytes", header.request, body.len());
        }
    }
    if fds > 0 {
        let _ = write!(text, " +{fds} fd");
    }
    if asks && header.need_reply() {
        text.push_str(" need_reply");
    }
    if !asks && header.flags != 5 {
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
        _ => return mapping(kind, body),
    })
}

/// Payloads that tell where something lies: those of the channel, and the IOTLB.
fn mapping(kind: PayloadKind, body: &[u8]) -> Option<String> {
    Some(match kind {
        PayloadKind::Iotlb => {
            let at: Iotlb = payload::read(body)?;
            format!(
                " type {} iova {:#x} size {:#x} user {:#x} perm {}",
                at.kind, at.iova, at.size, at.uaddr, at.perm
            )
        }
        PayloadKind::VringArea => {
            let area: VringArea = payload::read(body)?;
            let ring = request(PayloadKind::VringFd, body)?;
            format!("{ring} size {:#x} offset {:#x}", area.size, area.offset)
        }
        PayloadKind::Uuid => format!(" {}", hex(body)),
        PayloadKind::ShmemMap => {
            let map: ShmemMap = payload::read(body)?;
            format!(
                " region {} at {:#x} size {:#x} file {:#x} flags {}",
                map.shmid, map.shm_offset, map.len, map.fd_offset, map.flags
            )
        }
        PayloadKind::GpuMap => {
            let map: GpuMap = payload::read(body)?;
            format!(
                " region {} at {:#x} size {:#x} memory {} handle {}",
                map.shmid, map.shm_offset, map.len, map.memory_idx, map.handle_type
            )
        }
        PayloadKind::ExternalMap => {
            let map: ExternalMap = payload::read(body)?;
            format!(" region {} at {:#x} size {:#x}", map.shmid, map.shm_offset, map.len)
        }
        _ => return None,
    })
}

fn reply(info: &MessageInfo, body: &[u8]) -> Option<String> {
    Some(match info.reply {
        _ if body.is_empty() => " (empty)".to_owned(),
        ReplyKind::Ack | ReplyKind::AckWheneverAsked | ReplyKind::StatusAndFd
            if body.len() == 8 =>
        {
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
    use outboard_protocol::{ChannelRequest, Frame};

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
    fn the_channel_has_arrows_of_its_own() {
        let ask = |request: ChannelRequest<()>| {
            let frame = request.encode(true);
            channel_line(Direction::In, &frame.bytes, frame.fds.len())
        };
        assert_eq!(ask(ChannelRequest::ConfigChange), "<< CONFIG_CHANGE_MSG need_reply");
        let map =
            ShmemMap { shmid: 1, shm_offset: 4096, len: 8192, flags: 1, ..ShmemMap::default() };
        assert_eq!(
            ask(ChannelRequest::ShmemMap(map, ())),
            "<< SHMEM_MAP region 1 at 0x1000 size 0x2000 file 0x0 flags 1 +1 fd need_reply"
        );
        let area = VringArea { vring: 0x102, size: 0, offset: 0 };
        assert_eq!(
            ask(ChannelRequest::HostNotifier(area, None)),
            "<< VRING_HOST_NOTIFIER_MSG ring 2 no fd size 0x0 offset 0x0 need_reply"
        );
        let answer = Frame::<()>::reply(9, &1u64.to_ne_bytes(), Vec::new());
        assert_eq!(channel_line(Direction::Out, &answer.bytes, 0), ">> SHMEM_MAP refused 0x1");
        let answer = Frame::<()>::reply(8, &0u64.to_ne_bytes(), Vec::new());
        let found = ">> SHARED_OBJECT_LOOKUP ok +1 fd";
        assert_eq!(channel_line(Direction::Out, &answer.bytes, 1), found);
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
