//! A block device on the rust-vmm framework (`vhost-user-backend`, `virtio-queue`, `vm-memory`), as its users write
//! them: what `cargo xtask bench --peers` calls "framework". `outboard-peers SOCKET IMAGE|null:BYTES [SPIN_US]`.
//!
//! It does what the framework allows to be fast: the file is mapped and copied from, notifications are off while the
//! ring is looked at, one call for each batch, and with SPIN_US it looks that long before it sleeps. No flush to disk,
//! no checks beyond memory safety: it is here to be measured, not to be used.

use std::fs::OpenOptions;
use std::io::{Error, ErrorKind, Result};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringMutex, VringState, VringT};
use virtio_queue::QueueOwnedT;
use vm_memory::mmap::MmapRegion;
use vm_memory::{
    Bytes, FileOffset, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    VolatileMemory,
};
use vmm_sys_util::epoll::EventSet;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

const SECTOR: u64 = 512;
/// VERSION_1, indirect descriptors, EVENT_IDX, FLUSH.
const FEATURES: u64 = 1 << 32 | 1 << 28 | 1 << 29 | 1 << 9;

struct Disk {
    memory: Memory,
    /// None: no bytes are moved.
    image: Option<MmapRegion>,
    bytes: u64,
    spin: Duration,
    event_idx: bool,
}

impl Disk {
    fn open(image: &str, spin: Duration, memory: Memory) -> Result<Self> {
        if let Some(bytes) = image.strip_prefix("null:") {
            let bytes = bytes.parse().map_err(Error::other)?;
            return Ok(Self { memory, image: None, bytes, spin, event_idx: false });
        }
        let file = OpenOptions::new().read(true).write(true).open(image)?;
        let bytes = file.metadata()?.len();
        let size = usize::try_from(bytes).map_err(Error::other)?;
        let image = MmapRegion::from_file(FileOffset::new(file, 0), size).map_err(Error::other)?;
        Ok(Self { memory, image: Some(image), bytes, spin, event_idx: false })
    }

    /// Serves what is in the ring; whether there was anything.
    fn batch(&self, vring: &mut VringState<Memory>) -> Result<bool> {
        let memory = self.memory.memory();
        let chains: Vec<_> =
            vring.get_queue_mut().iter(memory.clone()).map_err(Error::other)?.collect();
        for chain in &chains {
            let written = self.request(&memory, chain.clone()).unwrap_or(0);
            vring.add_used(chain.head_index(), written).map_err(Error::other)?;
        }
        if !chains.is_empty() && vring.needs_notification().map_err(Error::other)? {
            vring.signal_used_queue()?;
        }
        Ok(!chains.is_empty())
    }

    /// Moves the data of one request; answers the bytes written.
    fn request<M>(
        &self,
        memory: &GuestMemoryMmap,
        chain: virtio_queue::DescriptorChain<M>,
    ) -> Result<u32>
    where
        M: std::ops::Deref<Target = GuestMemoryMmap>,
    {
        let (mut header, mut at, mut written) = (None, 0, 0);
        let mut pieces = chain.peekable();
        while let Some(piece) = pieces.next() {
            let length = piece.len();
            let Some((kind, _)) = header else {
                let raw: [u64; 2] = memory.read_obj(piece.addr()).map_err(Error::other)?;
                header = Some(((raw[0] & 0xffff_ffff) as u32, raw[1]));
                at = raw[1].saturating_mul(SECTOR);
                continue;
            };
            if pieces.peek().is_none() {
                memory.write_obj(0_u8, piece.addr()).map_err(Error::other)?;
                return Ok(written + 1);
            }
            if let Some(image) = &self.image {
                let from = usize::try_from(at).map_err(Error::other)?;
                let there = image.get_slice(from, length as usize).map_err(Error::other)?;
                let here = memory.get_slice(piece.addr(), length as usize).map_err(Error::other)?;
                match kind {
                    0 => there.copy_to_volatile_slice(here),
                    1 => here.copy_to_volatile_slice(there),
                    _ => {}
                }
            }
            at += u64::from(length);
            written += if piece.is_write_only() { length } else { 0 };
        }
        Err(ErrorKind::InvalidData.into())
    }
}

impl VhostUserBackendMut for Disk {
    type Bitmap = ();
    type Vring = VringMutex<Memory>;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        FEATURES | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.event_idx = enabled;
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = (self.bytes / SECTOR).to_le_bytes().to_vec();
        config.resize(256, 0);
        let range = offset as usize..(offset as usize).saturating_add(size as usize);
        config.get(range).unwrap_or_default().to_vec()
    }

    fn update_memory(&mut self, memory: Memory) -> Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn handle_event(
        &mut self,
        event: u16,
        _: EventSet,
        vrings: &[VringMutex<Memory>],
        _: usize,
    ) -> Result<()> {
        let vring = vrings.get(usize::from(event)).ok_or(ErrorKind::NotFound)?;
        let mut vring = vring.get_mut();
        loop {
            vring.disable_notification().map_err(Error::other)?;
            let mut until = Instant::now() + self.spin;
            loop {
                if self.batch(&mut vring)? {
                    until = Instant::now() + self.spin;
                } else if Instant::now() >= until {
                    break;
                }
            }
            if !vring.enable_notification().map_err(Error::other)? {
                return Ok(());
            }
        }
    }
}

fn main() -> Result<()> {
    let mut words = std::env::args().skip(1);
    let (Some(socket), Some(image)) = (words.next(), words.next()) else {
        return Err(Error::other("usage: outboard-peers SOCKET IMAGE|null:BYTES [SPIN_US]"));
    };
    let spin = words.next().map_or(Ok(0), |text| text.parse()).map_err(Error::other)?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let disk = Disk::open(&image, Duration::from_micros(spin), memory.clone())?;
    let mut daemon =
        VhostUserDaemon::new("framework".to_owned(), Arc::new(Mutex::new(disk)), memory)
            .map_err(|error| Error::other(format!("{error:?}")))?;
    daemon.serve(socket).map_err(|error| Error::other(format!("{error:?}")))
}
