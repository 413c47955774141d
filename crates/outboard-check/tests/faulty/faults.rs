//! Faults of the protocol: what is changed in a request before the sound machine sees it, and in its
//! answers afterwards. A rule is broken by making the illegal legal.
//!
//! Invariant: an unknown name, and the empty one, changes nothing.

mod alone;

use std::os::fd::OwnedFd;

use outboard_protocol::Frame;
use outboard_protocol::features::{ProtocolFeatures as P, virtio};
use outboard_protocol::header::{HEADER_SIZE, Header, REPLY_FLAGS};
use outboard_protocol::payload::{MemRegion, decode_mem_table, read};
use outboard_protocol::table::{Side, info};
use zerocopy::IntoBytes as _;

use crate::device::{Device, Seen, memfd, size_of};

/// A whole request, to be changed at will.
pub(crate) struct Message {
    pub(crate) id: u32,
    pub(crate) flags: u32,
    size: u32,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

impl Message {
    pub(crate) fn new(bytes: &[u8], fds: Vec<OwnedFd>) -> Self {
        let header = read::<Header>(bytes).expect("a header");
        let payload = bytes[HEADER_SIZE..].to_vec();
        Self { id: header.request, flags: header.flags, size: header.size, payload, fds }
    }

    pub(crate) fn clone_head(&self) -> Self {
        let payload = self.payload.clone();
        Self { id: self.id, flags: self.flags, size: self.size, payload, fds: Vec::new() }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let whole = u32::try_from(self.payload.len()).expect("small");
        let size = if self.size > 4096 { self.size } else { whole };
        let header = Header { request: self.id, flags: self.flags, size };
        [header.as_bytes(), &self.payload].concat()
    }

    /// What is remembered of it.
    pub(crate) fn seen(&self) -> Seen {
        Seen { id: self.id, words: [self.word(0), self.word(4)] }
    }

    fn word(&self, at: usize) -> u32 {
        self.payload.get(at..).and_then(read).unwrap_or(0)
    }

    fn set(&mut self, at: usize, value: u32) {
        if let Some(place) = self.payload.get_mut(at..at + 4) {
            place.copy_from_slice(&value.to_ne_bytes());
        }
    }

    fn long(&self, at: usize) -> u64 {
        self.payload.get(at..).and_then(read).unwrap_or(0)
    }

    /// Whether the region that it names is there.
    fn knows(&self, device: &Device) -> bool {
        let region = self.payload.get(8..40).and_then(read::<MemRegion>).unwrap_or_default();
        device.state().regions().iter().any(|old| old.same_slot(&region))
    }

    fn number(&self) -> u64 {
        read(&self.payload).unwrap_or(0)
    }

    fn set_number(&mut self, value: u64) {
        if let Some(place) = self.payload.get_mut(..8) {
            place.copy_from_slice(&value.to_ne_bytes());
        }
    }

    const fn asks(&self) -> bool {
        self.flags & 8 != 0
    }
}

/// What becomes of a request.
pub(crate) enum Action {
    Pass,
    Swallow,
    Close,
    Abort,
    Answer(Frame<OwnedFd>),
    /// Whatever comes now is read and not listened to.
    Deaf,
    /// Performed when the next of its kind comes.
    Late,
}

fn number(id: u32, value: u64) -> Frame<OwnedFd> {
    let header = Header { request: id, flags: REPLY_FLAGS, size: 8 };
    Frame { bytes: [header.as_bytes(), value.as_bytes()].concat(), fds: Vec::new() }
}

/// Says yes or no where an answer is asked for.
fn say(message: &Message, device: &Device, value: u64) -> Action {
    let agreed = device.state().acked_protocol_features().contains(P::REPLY_ACK);
    if message.asks() && agreed {
        Action::Answer(number(message.id, value))
    } else {
        Action::Swallow
    }
}

pub(crate) fn before(fault: &str, m: &mut Message, device: &Device) -> Action {
    if let Some(name) = fault.strip_prefix("gate-") {
        let row = info(Side::FrontEnd, m.id);
        let this = row.is_some_and(|row| row.name.eq_ignore_ascii_case(&name.replace('-', "_")));
        let open = row.is_some_and(|row| row.needs.is_open(device.state().negotiated()));
        return if this && !open { say(m, device, 0) } else { Action::Pass };
    }
    if let Some(name) = fault.strip_prefix("index-") {
        return index(name, m, device);
    }
    let alone = alone::before(fault, m, device);
    if !matches!(alone, Action::Pass) {
        return alone;
    }
    if fault == "aborts-on-unknown-bodies" && info(Side::FrontEnd, m.id).is_none() {
        return if m.payload.is_empty() { Action::Pass } else { Action::Abort };
    }
    let first = negotiation(fault, m, device);
    if !matches!(first, Action::Pass) {
        return first;
    }
    let second = rings(fault, m, device);
    if !matches!(second, Action::Pass) {
        return second;
    }
    let third = memory(fault, m, device);
    if !matches!(third, Action::Pass) {
        return third;
    }
    let fourth = kept(fault, m, device);
    if !matches!(fourth, Action::Pass) { fourth } else { other(fault, m, device) }
}

/// A ring number that is not checked.
fn index(name: &str, m: &mut Message, device: &Device) -> Action {
    let row = info(Side::FrontEnd, m.id);
    let this = row.is_some_and(|row| row.name.eq_ignore_ascii_case(&name.replace('-', "_")));
    let ring = if (12..15).contains(&m.id) { m.number() & 0xff } else { u64::from(m.word(0)) };
    match () {
        () if !this || ring < 2 => Action::Pass,
        () if m.id == 11 => Action::Abort,
        () => say(m, device, 0),
    }
}

fn negotiation(fault: &str, m: &mut Message, device: &Device) -> Action {
    let state = device.state();
    let acked = state.acked_protocol_features();
    match (fault, m.id) {
        ("features-unchecked", 2) => m.set_number(m.number() & state.offer().features),
        ("protocol-features-unchecked", 16) => {
            m.set_number(m.number() & state.offer().protocol_features.bits());
        }
        ("owner-once", 3) if state.features_set() => return say(m, device, 1),
        ("owner-demanded", 1) if !device.owned() => return Action::Close,
        ("no-features-again", 1) if state.features_set() => {
            return Action::Answer(number(1, state.offer().features & !virtio::RING_EVENT_IDX));
        }
        ("log-once", 2) if m.number() & virtio::LOG_ALL != 0 && device.trap.replace(true) => {
            return say(m, device, 1);
        }
        ("skips-unagreed", 10) if m.asks() && !acked.contains(P::REPLY_ACK) => {
            return Action::Swallow;
        }
        ("unknown-is-fine", id) if info(Side::FrontEnd, id).is_none() => return say(m, device, 0),
        ("unknown-is-answered", id) if info(Side::FrontEnd, id).is_none() => {
            return Action::Answer(number(id, 1));
        }
        ("barrier", 10) if !m.asks() && !device.acks() => return Action::Late,
        ("inband-alone", 16) if m.number() & P::INBAND_NOTIFICATIONS.bits() != 0 => {
            m.set_number(m.number() & !P::INBAND_NOTIFICATIONS.bits());
        }
        _ => {}
    }
    Action::Pass
}

fn rings(fault: &str, m: &mut Message, device: &Device) -> Action {
    let live = device.state().ring(0).is_some_and(|ring| ring.run.is_live());
    match (fault, m.id) {
        ("num-0", 8) if m.word(4) == 0 => m.set(4, 16),
        ("num-huge", 8) if m.word(4) > 0xffff => m.set(4, 256),
        ("num-small-only", 8) if m.word(4) > 64 => return say(m, device, 1),
        ("base-live", 10) if live => return say(m, device, 0),
        ("addr-unaligned", 9) => {
            for at in [8, 16, 24] {
                m.set(at, m.word(at) & !15);
            }
        }
        ("addr-flags", 9) => m.set(4, m.word(4) & 1),
        ("aborts-on-live-sizes", 8) if live && m.word(4) == 32768 => return Action::Abort,
        ("maps-before-it-looks", 12) if device.trap.get() => return Action::Abort,
        ("logs-rings-anywhere", 9) if m.word(4) == 1 && m.word(36) > 0 => return Action::Abort,
        ("addr-early", 9) if device.state().regions().is_empty() => return say(m, device, 1),
        ("base-wide", 10) => m.set(4, m.word(4) & 0xffff),
        ("kick-fd-missing", 12) | ("call-fd-missing", 13) | ("err-fd-missing", 14)
            if m.fds.is_empty() && m.number() < 2 =>
        {
            return say(m, device, 0);
        }
        ("enable-any", 18) if m.word(4) > 1 => m.set(4, 1),
        ("enable-without-bit-30", 18) => {
            let acked = device.state().acked_features() & virtio::PROTOCOL_FEATURES != 0;
            return if acked { Action::Pass } else { say(m, device, 0) };
        }
        ("enable-after-kick", 18) if !device.state().ring(0).is_some_and(|ring| ring.kicked) => {
            return say(m, device, 0);
        }
        _ => {}
    }
    Action::Pass
}

fn memory(fault: &str, m: &mut Message, device: &Device) -> Action {
    if m.id == 5 {
        return table(fault, m, device);
    }
    let region = m.payload.get(8..40).and_then(read::<MemRegion>).unwrap_or_default();
    match (fault, m.id) {
        ("slots-do-nothing", 37 | 38) => return say(m, device, 0),
        ("slot-overlaps", 37) => {
            let end = |r: &MemRegion| r.guest_addr.saturating_add(r.size);
            let overlap = device
                .state()
                .regions()
                .iter()
                .any(|old| region.guest_addr < end(old) && old.guest_addr < end(&region));
            return if overlap { say(m, device, 0) } else { Action::Pass };
        }
        ("slot-fd-refused", 38) if !m.fds.is_empty() => return say(m, device, 1),
        ("slot-offset", 38) if region.offset != 0 => return say(m, device, 1),
        ("slot-needs-no-fd", 37) if m.fds.is_empty() => return say(m, device, 0),
        ("slots-unlimited", 37) if device.state().regions().len() >= 32 => {
            return say(m, device, 0);
        }
        _ => {}
    }
    Action::Pass
}

fn table(fault: &str, m: &mut Message, device: &Device) -> Action {
    let all = decode_mem_table(&m.payload).unwrap_or_default();
    let refuse = match fault {
        "table-one-region" => all.len() > 1,
        "table-four-regions" => all.len() > 4,
        "table-sorted" => !all.is_sorted_by_key(|region| region.guest_addr),
        "table-once" => !device.state().regions().is_empty(),
        _ => false,
    };
    let accept = match fault {
        "table-empty-regions" => all.iter().any(|region| region.size == 0),
        "table-huge-regions" => all.iter().any(|region| region.size > 1 << 40),
        "table-fds-missing" => m.fds.len() < all.len(),
        "table-fds-left" => m.fds.len() > all.len(),
        "table-any-file" => m.fds.iter().any(|fd| {
            let stat = rustix::fs::fstat(fd).expect("an open descriptor");
            let kind = rustix::fs::FileType::from_raw_mode(stat.st_mode);
            kind != rustix::fs::FileType::RegularFile
        }),
        _ => false,
    };
    match () {
        () if refuse => return say(m, device, 1),
        () if accept => return say(m, device, 0),
        () => {}
    }
    match fault {
        "maps-before-it-looks" => {
            let short = |(region, fd): (&MemRegion, &OwnedFd)| size_of(fd) < region.size;
            device.trap.set(all.iter().zip(&m.fds).any(short));
        }
        "aborts-on-huge-files" if m.fds.iter().any(is_of_huge_pages) => return Action::Abort,
        "aborts-on-read-only-memory" if m.fds.iter().any(is_read_only_file) => {
            return Action::Abort;
        }
        "table-aborts-on-nine" if all.len() == 9 => return Action::Abort,
        "table-hangs-on-lies" if m.word(0) > 64 => loop {
            std::hint::spin_loop();
        },
        _ => {}
    }
    Action::Pass
}

fn is_of_huge_pages(fd: &OwnedFd) -> bool {
    rustix::fs::fstatfs(fd).is_ok_and(|stat| stat.f_type == 0x9584_58f6)
}

fn is_read_only_file(fd: &OwnedFd) -> bool {
    use rustix::fs::{FileType, OFlags};
    let kind = rustix::fs::fstat(fd).map(|stat| FileType::from_raw_mode(stat.st_mode));
    let flags = rustix::fs::fcntl_getfl(fd).unwrap_or(OFlags::RDWR);
    kind == Ok(FileType::RegularFile) && flags & OFlags::RWMODE == OFlags::RDONLY
}

/// What outlives a process, or moves to another one.
fn kept(fault: &str, m: &mut Message, device: &Device) -> Action {
    let live = device.state().ring(0).is_some_and(|ring| ring.run.is_live());
    match (fault, m.id) {
        ("state-at-any-time", 42) if live => return Action::Answer(number(42, 0x100)),
        ("state-loads-into-running", 42) if live && m.word(0) == 1 => {
            device.trap.set(true);
            return Action::Answer(number(42, 0x100));
        }
        ("state-loads-into-running", 43) if device.trap.replace(false) => {
            return Action::Answer(number(43, 0));
        }
        ("log-fd-refused", 7) => return say(m, device, 1),
        ("listens-unadvised", 29) if !device.is_advised() => return say(m, device, 0),
        ("postcopy-despite-slots", 28)
            if device.state().acked_protocol_features().contains(P::CONFIGURE_MEM_SLOTS) =>
        {
            let header = Header { request: 28, flags: REPLY_FLAGS, size: 0 };
            let bytes = header.as_bytes().to_vec();
            return Action::Answer(Frame { bytes, fds: vec![memfd(1)] });
        }
        ("inflight-any-number", 31) if m.word(16) == 0 || m.word(16) >> 16 == 0 => {
            let header = Header { request: 31, flags: REPLY_FLAGS, size: 24 };
            let bytes = [header.as_bytes(), &[1; 24]].concat();
            return Action::Answer(Frame { bytes, fds: vec![memfd(1)] });
        }
        ("state-any", 42) => m.set(0, 0),
        _ => {}
    }
    Action::Pass
}

fn other(fault: &str, m: &mut Message, device: &Device) -> Action {
    let legal = info(Side::FrontEnd, m.id).is_some_and(|row| row.payload.sizes().allows(m.size));
    match (fault, m.id) {
        ("config-offset-ignored", 24) => m.set(0, 0),
        ("config-late", 24) if !device.state().features_set() => m.set(4, 0),
        ("config-never", 24) => return Action::Swallow,
        ("config-impossible", 24) if !legal || m.word(4) == 0 || m.word(0) > 256 => {
            return Action::Swallow;
        }
        ("config-far", 25) if m.word(0) > 0 => return say(m, device, 0),
        ("reset-owner-closes", 4) => return Action::Close,
        ("status-refused", 39) => m.set_number(0),
        ("channel-fd-missing", 21) if m.fds.is_empty() => return say(m, device, 0),
        ("iotlb-refused", 22) => return Action::Answer(number(22, 1)),
        ("iotlb-any", 22) => return Action::Answer(number(22, 0)),
        ("crypto-any", 26) if m.payload.len() == 1072 => {
            let header = Header { request: 26, flags: REPLY_FLAGS, size: 1072 };
            let bytes = [header.as_bytes(), &[1; 1072]].concat();
            return Action::Answer(Frame { bytes, fds: Vec::new() });
        }
        ("talks-when-suspended", 11) => device.talk(),
        ("rarp-refused", 19) | ("mtu-refused", 20) => return say(m, device, 1),
        ("size-unchecked", _) if !legal && m.size < 4096 => return say(m, device, 0),
        ("version-unchecked", _) if m.flags & 3 != 1 => m.flags = m.flags & !3 | 1,
        ("reply-bit-unchecked", _) => m.flags &= !4,
        ("flag-means-reply", 10) if m.flags & 0x10 != 0 => m.flags |= 8,
        _ => {}
    }
    Action::Pass
}

/// The answers to a request, changed.
pub(crate) fn after(
    fault: &str,
    mut frame: Frame<OwnedFd>,
    request: &Message,
    device: &Device,
) -> Vec<Frame<OwnedFd>> {
    let ack = info(Side::FrontEnd, request.id).is_none_or(|row| !row.reply.is_own());
    let set = |frame: &mut Frame<OwnedFd>, at: usize, value: u32| {
        if let Some(place) = frame.bytes.get_mut(at..at + 4) {
            place.copy_from_slice(&value.to_ne_bytes());
        }
    };
    match (fault, request.id) {
        ("flags-of-replies", _) if !ack => set(&mut frame, 4, 0x1),
        ("flags-of-acks", _) if ack => set(&mut frame, 4, 0xd),
        ("ack-with-fd", 10) => frame.fds.push(memfd(1)),
        ("features-with-fd", 1) => frame.fds.push(memfd(1)),
        ("advice-with-bytes", 28) => {
            frame.bytes.extend([0; 8]);
            set(&mut frame, 8, 8);
        }
        ("features-twice" | "log-answered-twice", 1 | 6)
            if request.asks() == (request.id == 1)
                && fault.starts_with("log") == (request.id == 6) =>
        {
            let again = Frame { bytes: frame.bytes.clone(), fds: Vec::new() };
            return vec![frame, again];
        }
        ("features-of-4-bytes", 15) if device.state().acked_protocol_features().is_empty() => {
            set(&mut frame, 16, 0x8000_0000);
        }
        ("slots-0", 36) => frame.bytes[12..].fill(0),
        ("config-answered", 24) if !device.state().features_set() => {}
        ("config-answered", 24) if frame.bytes.len() > 24 => {
            frame.bytes.truncate(frame.bytes.len() - 1);
            let size = u32::try_from(frame.bytes.len() - 12).expect("small");
            set(&mut frame, 8, size);
        }
        ("config-head", 24) => set(&mut frame, 12, 4),
        ("config-tail", 24) if frame.bytes.len() > 200 => {
            if let Some(last) = frame.bytes.last_mut() {
                *last = 0x41;
            }
        }
        ("base-of-other-ring", 11) => set(&mut frame, 12, 1),
        ("state-with-fd-bit", 42) => set(&mut frame, 12, 0),
        ("state-failed", 42) => set(&mut frame, 12, 0x101),
        _ => {}
    }
    alone::after(fault, &mut frame, request, device);
    vec![frame]
}
