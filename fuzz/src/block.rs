//! Requests to a disk: any header, any segments, cut into descriptors in any way, against the
//! block device itself behind its own socket and thread (virtio 1.3 §5.2.6).
//!
//! Held for every request, against a model of the disk: the status, the length in the used ring,
//! every byte of the driver's memory and every byte of the image. Outside the sectors that a legal
//! request names nothing changes.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;

use outboard::{DeviceRequestHandler, HandlerOptions, WorkerDevice};
use outboard_devices::block::{Block, BlockOptions, EngineKind, Image, ImageOptions, feature};
use outboard_frontend::{Buffer, Connection, SharedMemory};
use outboard_protocol::{ProtocolFeatures, virtio};
use outboard_queue::{DriverQueue, QueueLayout};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::io::{pread, pwrite};

use crate::cover::{played, reached, wanted};
use crate::input::Input;

const SECTOR: usize = 512;
const SECTORS: usize = 24;
const DISK: usize = SECTORS * SECTOR;
const DATA: usize = 32 << 10;
const RING: u16 = 64;
const SERIAL: &str = "fuzzed";
/// Longest waits for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A disk, the front-end's ends of it, and the model.
struct Disk {
    image: OwnedFd,
    driver: DriverQueue,
    kick: OwnedFd,
    call: OwnedFd,
    data: Buffer,
    features: u64,
    model: Vec<u8>,
    /// What the driver's memory has to hold.
    memory: Vec<u8>,
    real: Vec<u8>,
    _front: Connection,
    _memory: SharedMemory,
    _thread: JoinHandle<()>,
}

thread_local! {
    static DISKS: std::cell::RefCell<Disk> = std::cell::RefCell::new(Disk::new());
}

/// Plays one script.
pub fn run(data: &[u8]) {
    wanted(|| {
        let kinds = [0, 1, 4, 8, 11, 13].iter().flat_map(|kind| [0, 1].map(|s| (kind, s)));
        let all = kinds.filter(|pair| !matches!(pair, (4 | 8, 1)));
        let mut wants: Vec<_> = all.map(|(kind, s)| format!("block {kind} status {s}")).collect();
        wants.extend(["other status 2", "11 status 2", "no status"].map(|w| format!("block {w}")));
        wants
    });
    DISKS.with_borrow_mut(|disk| {
        disk.reset();
        let mut input = Input::new(data);
        while !input.is_empty() {
            disk.batch(&mut input);
            disk.check();
        }
    });
}

/// A request as it was sent, and what has to come of it.
struct Sent {
    length: u32,
    writable: Vec<(usize, usize)>,
    bytes: Vec<u8>,
}

impl Disk {
    fn new() -> Self {
        let image = memfd_create("image", MemfdFlags::CLOEXEC).expect("an image");
        ftruncate(&image, DISK as u64).expect("its length");
        let path = format!("/proc/self/fd/{}", image.as_raw_fd());
        let opened = Image::open(path, ImageOptions::default()).expect("the image");
        let options = BlockOptions {
            serial: SERIAL.to_owned(),
            engine: EngineKind::Sync,
            ..BlockOptions::default()
        };
        let device = WorkerDevice::new(Block::new(opened, options).expect("a disk"));
        let device = device.expect("a device");
        let mut handler =
            DeviceRequestHandler::new(device, HandlerOptions::default()).expect("a handler");
        let (ours, theirs) = UnixStream::pair().expect("a socket");
        let thread = std::thread::spawn(move || {
            let _ = handler.run_blocking(theirs);
        });
        let mut front = Connection::from_fd(ours.into(), PATIENCE).expect("a connection");
        let memory = SharedMemory::with_size(1 << 20).expect("memory");
        let offered = front.get_features().expect("features");
        front.get_protocol_features().expect("protocol features");
        let protocol = ProtocolFeatures::REPLY_ACK | ProtocolFeatures::MQ;
        front.set_protocol_features(protocol).expect("protocol features");
        let rings = virtio::RING_INDIRECT_DESC | virtio::RING_EVENT_IDX;
        let own = feature::FLUSH | feature::DISCARD | feature::WRITE_ZEROES | feature::CONFIG_WCE;
        let features = virtio::VERSION_1 | virtio::PROTOCOL_FEATURES | rings | own;
        assert_eq!(offered & features, features, "a disk on a memory file can do all of it");
        front.set_features(features).expect("features");
        front.set_mem_table(memory.regions()).expect("memory");
        let area = memory.allocate(8192, 4096).expect("room for a ring");
        area.fill(0).expect("inside");
        let (layout, _) = QueueLayout::split_at(area.guest(), RING).expect("a ring");
        area.leak();
        let mut driver = DriverQueue::new(layout, features, memory.view()).expect("a ring");
        let tables = memory.allocate(16 * 16 * usize::from(RING), 4096).expect("room for tables");
        driver.set_indirect_area(tables.guest(), 16);
        tables.leak();
        let data = memory.allocate(DATA, 4096).expect("room for data");
        let bell = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let (kick, call) = (bell().expect("an eventfd"), bell().expect("an eventfd"));
        front.set_vring_num(0, RING).expect("a ring");
        front.set_vring_addr(0, &layout).expect("a ring");
        front.set_vring_base(0, 0).expect("a ring");
        front.set_vring_call(0, &call).expect("a ring");
        front.set_vring_kick(0, &kick).expect("a ring");
        front.set_vring_enable(0, true).expect("a ring");
        Self {
            image,
            driver,
            kick,
            call,
            data,
            features,
            model: vec![0; DISK],
            memory: vec![0; DATA],
            real: Vec::new(),
            _front: front,
            _memory: memory,
            _thread: thread,
        }
    }

    fn reset(&mut self) {
        for (at, byte) in self.model.iter_mut().enumerate() {
            *byte = (at / SECTOR + 1) as u8;
        }
        pwrite(&self.image, &self.model, 0).expect("the image");
        self.memory.fill(0xee);
        self.data.write(0, &self.memory).expect("inside");
    }

    /// Up to four requests at once; each has its part of the data to itself.
    fn batch(&mut self, input: &mut Input<'_>) {
        let count = 1 + input.below(4);
        let mut sent: Vec<Option<Sent>> = Vec::new();
        for slot in 0..count {
            let one = self.request(input, slot);
            sent.push(Some(one));
        }
        if self.driver.publish() {
            let _ = rustix::io::write(&self.kick, &1u64.to_ne_bytes());
        }
        played(count as u64);
        let mut left = count;
        while left > 0 {
            while let Some((token, length)) = self.driver.pop_used().expect("a sound ring") {
                let sent = sent[token as usize].take().expect("answered once");
                assert_eq!(length, sent.length, "the length told");
                let mut bytes = sent.bytes.iter();
                for (at, len) in sent.writable {
                    for place in &mut self.memory[at..at + len] {
                        *place = bytes.next().copied().unwrap_or(*place);
                    }
                }
                left -= 1;
            }
            if left > 0 && !self.driver.arm() {
                let time = Timespec::try_from(PATIENCE).expect("a time");
                let call = self.call.as_fd();
                let ready = poll(&mut [PollFd::new(&call, PollFlags::IN)], Some(&time));
                if ready == Err(Errno::INTR) {
                    // libFuzzer's own timer: one more look.
                    continue;
                }
                assert!(ready.expect("poll") > 0, "an answer within {PATIENCE:?}");
                let _ = rustix::io::read(&self.call, &mut [0; 8]);
            }
        }
    }

    /// One request into slot `slot`, and what has to come of it.
    fn request(&mut self, input: &mut Input<'_>, slot: usize) -> Sent {
        let kinds = [0, 0, 1, 1, 4, 8, 11, 13, 13];
        let kind = match input.byte() {
            0xf0.. => input.number() as u32,
            other => kinds[usize::from(other) % kinds.len()],
        };
        let sector = match input.byte() {
            0xe0.. => input.number(),
            other => u64::from(other) % (SECTORS as u64 + 2),
        };
        let mut readable = kind.to_le_bytes().to_vec();
        readable.extend(input.number().to_le_bytes().iter().take(4));
        readable.extend(sector.to_le_bytes());
        let odd = |input: &mut Input<'_>| if input.one_in(8) { input.below(600) } else { 0 };
        let mut writable = 1 + odd(input);
        match kind {
            0 => writable += SECTOR * input.below(5),
            1 => {
                let (length, byte) = (SECTOR * input.below(5) + odd(input), input.byte());
                readable.extend((0..length).map(|at| byte.wrapping_add(at as u8)));
            }
            11 | 13 => {
                for _ in 0..input.below(5) {
                    readable.extend(sector_of(input).to_le_bytes());
                    let count = if input.one_in(16) {
                        input.number() as u32
                    } else {
                        input.below(9) as u32
                    };
                    readable.extend(count.to_le_bytes());
                    let flags = if input.one_in(4) { input.below(4) as u32 } else { 0 };
                    readable.extend(flags.to_le_bytes());
                }
                readable.extend(vec![0; odd(input).min(20)]);
            }
            8 => writable += input.below(40),
            _ => writable += input.below(4),
        }
        match input.byte() {
            0xff => writable = 0,
            0xfe => readable.truncate(input.below(17)),
            _ => {}
        }
        let room = DATA / 4;
        let start = slot * room;
        readable.truncate(room / 2);
        self.memory[start..start + readable.len()].copy_from_slice(&readable);
        self.data.write(start, &readable).expect("inside");
        let reads = cut(input, start, readable.len());
        let writes = cut(input, start + room / 2, writable);
        let guest = |list: &[(usize, usize)]| -> Vec<(u64, u32)> {
            let base = self.data.guest();
            list.iter().map(|&(at, len)| (base + at as u64, len as u32)).collect()
        };
        let (r, w) = (guest(&reads), guest(&writes));
        let added = if input.one_in(2) {
            self.driver.add_indirect(&r, &w, slot as u64)
        } else {
            self.driver.add(&r, &w, slot as u64)
        };
        added.expect("there is room");
        let bytes = self.carry_out(&readable, writable);
        Sent { length: writable as u32, writable: writes, bytes }
    }

    /// What the device makes of a request: the writable bytes afterwards.
    fn carry_out(&mut self, readable: &[u8], writable: usize) -> Vec<u8> {
        let Some(room) = writable.checked_sub(1) else {
            reached("block no status".into());
            return Vec::new();
        };
        let mut data = vec![0; room];
        let kind = readable.first_chunk().map_or(u32::MAX, |kind| u32::from_le_bytes(*kind));
        let status = match self.effect(readable, &mut data) {
            Ok(()) => 0,
            Err(status) => {
                data.fill(0);
                status
            }
        };
        let known = [0, 1, 4, 8, 11, 13].contains(&kind);
        let name = if known { kind.to_string() } else { "other".to_owned() };
        reached(format!("block {name} status {status}"));
        data.push(status);
        data
    }

    fn effect(&mut self, readable: &[u8], data: &mut [u8]) -> Result<(), u8> {
        let (header, rest) = readable.split_at_checked(16).ok_or(1)?;
        let kind = u32::from_le_bytes(header[..4].try_into().map_err(|_| 1)?);
        let sector = u64::from_le_bytes(header[8..].try_into().map_err(|_| 1)?);
        match kind {
            0 => {
                let from = range(sector, data.len())?;
                data.copy_from_slice(&self.model[from..from + data.len()]);
            }
            1 => {
                let to = range(sector, rest.len())?;
                self.model[to..to + rest.len()].copy_from_slice(rest);
            }
            4 => {}
            8 => {
                let mut id = [0; 20];
                id[..SERIAL.len()].copy_from_slice(SERIAL.as_bytes());
                let count = data.len().min(20);
                data[..count].copy_from_slice(&id[..count]);
            }
            11 | 13 => {
                let most = if kind == 11 { 32 } else { 8 };
                let count = rest.len() / 16;
                if !rest.len().is_multiple_of(16) || count == 0 || count > most {
                    return Err(1);
                }
                let mut ranges = Vec::new();
                for segment in rest.chunks(16) {
                    let half = |at: usize| {
                        u32::from_le_bytes(segment[at..at + 4].try_into().unwrap_or_default())
                    };
                    let allowed = if kind == 13 { 1 } else { 0 };
                    if half(12) & !allowed != 0 {
                        return Err(2);
                    }
                    if half(8) > 1 << 22 {
                        return Err(1);
                    }
                    let first = u64::from(half(0)) | u64::from(half(4)) << 32;
                    let length = half(8) as usize * SECTOR;
                    ranges.push((range(first, length)?, length));
                }
                for (at, length) in ranges {
                    self.model[at..at + length].fill(0);
                }
            }
            _ => return Err(2),
        }
        Ok(())
    }

    fn check(&mut self) {
        self.real.resize(DATA, 0);
        self.data.read(0, &mut self.real).expect("inside");
        assert!(self.real == self.memory, "the driver's memory");
        self.real.resize(DISK, 0);
        let read = pread(&self.image, &mut self.real[..], 0).expect("the image");
        assert_eq!(read, DISK, "the image's length");
        assert!(self.real == self.model, "the image");
        let stat = rustix::fs::fstat(&self.image).expect("the image");
        assert_eq!(stat.st_size, DISK as i64, "the image does not grow");
        assert_ne!(self.features, 0);
    }
}

fn sector_of(input: &mut Input<'_>) -> u64 {
    if input.one_in(16) { input.number() } else { input.below(SECTORS + 2) as u64 }
}

/// The first byte of a range of the disk in whole sectors.
fn range(sector: u64, length: usize) -> Result<usize, u8> {
    let end = u128::from(sector) * SECTOR as u128 + length as u128;
    if !length.is_multiple_of(SECTOR) || end > DISK as u128 {
        return Err(1);
    }
    Ok(sector as usize * SECTOR)
}

/// Cuts a range into up to five pieces, some of them empty.
fn cut(input: &mut Input<'_>, start: usize, length: usize) -> Vec<(usize, usize)> {
    let (mut at, mut left, mut pieces) = (start, length, Vec::new());
    for _ in 0..input.below(5) {
        let part = (usize::from(input.byte()) * 5).min(left);
        pieces.push((at, part));
        (at, left) = (at + part, left - part);
    }
    if left > 0 {
        pieces.push((at, left));
    }
    pieces
}
