//! The payloads of the messages, byte for byte (vhost-user, "Message Specification: Payload").
//!
//! Invariant: each struct has exactly the size it has on the wire, padding spelt out, integers at
//! wire width and in host order; nothing is range-checked here.

use std::fmt;

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Ring flag bit 0 of [`VringAddr::flags`]: log writes to the used ring.
pub const VRING_F_LOG: u32 = 1;
/// Bit 8 of a [`VringFd`]: no descriptor comes with the message.
pub const VRING_NO_FD: u64 = 0x100;
/// [`Iotlb::kind`]: the device has no entry for an address.
pub const IOTLB_MISS: u8 = 1;
/// [`Iotlb::kind`]: an entry is added.
pub const IOTLB_UPDATE: u8 = 2;
/// [`Iotlb::kind`]: entries are removed.
pub const IOTLB_INVALIDATE: u8 = 3;
/// [`Iotlb::kind`]: the device was not allowed an access.
pub const IOTLB_ACCESS_FAIL: u8 = 4;
/// [`ShmemMap::flags`] bit 0: the mapping is writable.
pub const SHMEM_MAP_RW: u64 = 1;
/// Most bytes of configuration space one message carries (QEMU's limit).
pub const MAX_CONFIG_SIZE: u32 = 256;
/// Most regions a memory table may have here.
pub const MAX_REGIONS: usize = 32;
/// Slots of a memory table body that are tolerated although the count is smaller.
pub const TOLERATED_SLOTS: usize = 8;

/// The size is part of the declaration, so that a layout that drifts does not compile.
macro_rules! wire {
    ($($(#[$meta:meta])* $name:ident: $size:literal { $($(#[$fmeta:meta])* $field:ident: $ty:ty),* $(,)? })*) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub struct $name { $($(#[$fmeta])* pub $field: $ty,)* }
        const _: () = assert!(size_of::<$name>() == $size);
        impl Default for $name {
            fn default() -> Self { Self::new_zeroed() }
        }
    )*};
}

wire! {
    /// A ring index and a number: size, base, enable flag or byte order.
    VringState: 8 {
        /// Ring index, unchecked.
        index: u32,
        /// The number.
        num: u32,
    }
    /// Where a ring lies. On the wire the order is descriptor table, used ring, available ring.
    VringAddr: 40 {
        /// Ring index, unchecked.
        index: u32,
        /// [`VRING_F_LOG`] or nothing.
        flags: u32,
        /// Descriptor table (or packed ring), 16-byte aligned.
        desc: u64,
        /// Used ring (or device event area), 4-byte aligned.
        used: u64,
        /// Available ring (2-byte aligned) or driver event area (4-byte aligned).
        avail: u64,
        /// Guest-physical address under which writes to the used ring are logged.
        log_guest_addr: u64,
    }
    /// One region of guest memory.
    MemRegion: 32 {
        /// Guest-physical address of the first byte.
        guest_addr: u64,
        /// Length in bytes.
        size: u64,
        /// Address of the first byte in the front-end.
        user_addr: u64,
        /// Offset of the first byte in the file.
        offset: u64,
    }
    /// One region of guest memory with the fields of XEN_MMAP.
    MemRegionXen: 40 {
        /// The plain region.
        region: MemRegion,
        /// Bit 0 foreign, bit 1 grant, bit 8 no map in advance.
        flags: u32,
        /// Xen domain.
        domid: u32,
    }
    /// Start of a memory table: the count; the regions follow.
    MemTableHead: 8 {
        /// Number of regions.
        count: u32,
        /// Zero.
        padding: u32,
    }
    /// The region of ADD_MEM_REG and REM_MEM_REG.
    SingleRegion: 40 {
        /// Zero.
        padding: u64,
        /// The region.
        region: MemRegion,
    }
    /// The dirty log of SET_LOG_BASE.
    Log: 16 {
        /// Bytes to map.
        mmap_size: u64,
        /// Offset in the file.
        mmap_offset: u64,
    }
    /// An IOTLB message in either direction.
    Iotlb: 32 {
        /// I/O virtual address.
        iova: u64,
        /// Bytes.
        size: u64,
        /// Address in the front-end.
        uaddr: u64,
        /// 1 read, 2 write, 3 both.
        perm: u8,
        /// 1 miss, 2 update, 3 invalidate, 4 access failure.
        kind: u8,
        /// Tail padding, present on the wire.
        padding: [u8; 6],
    }
    /// Start of a configuration message; the bytes follow.
    ConfigHead: 12 {
        /// Offset in the configuration space.
        offset: u32,
        /// Bytes that follow.
        size: u32,
        /// An enum: 0 a write of the guest, 1 live migration.
        flags: u32,
    }
    /// A host notifier area.
    VringArea: 24 {
        /// Ring index in bits 0–7, bit 8 no descriptor.
        vring: u64,
        /// Bytes.
        size: u64,
        /// Offset in the file.
        offset: u64,
    }
    /// The in-flight region. Twenty bytes without the tail padding are accepted as well.
    Inflight: 24 {
        /// Bytes to map; 0 in a reply: there is none.
        mmap_size: u64,
        /// Offset in the file.
        mmap_offset: u64,
        /// Number of rings in the region.
        num_queues: u16,
        /// Size of each ring.
        queue_size: u16,
        /// Tail padding.
        padding: [u8; 4],
    }
    /// A shared object's name, as raw bytes in RFC 4122 order.
    Uuid: 16 {
        /// The bytes.
        bytes: [u8; 16],
    }
    /// What SET_DEVICE_STATE_FD transfers.
    DeviceState: 8 {
        /// 0 save, 1 load.
        direction: u32,
        /// 0: all rings stopped; nothing else exists.
        phase: u32,
    }
    /// A mapping in a shared-memory region.
    ShmemMap: 40 {
        /// Region id.
        shmid: u8,
        /// Zero.
        padding: [u8; 7],
        /// Offset in the file.
        fd_offset: u64,
        /// Offset in the region.
        shm_offset: u64,
        /// Bytes.
        len: u64,
        /// Bit 0: writable.
        flags: u64,
    }
    /// Sizes of the shared-memory regions, by id; 0 marks an unused id.
    ShmemConfig: 2056 {
        /// Number of regions in use.
        count: u32,
        /// Zero.
        padding: u32,
        /// Size of each region in bytes.
        sizes: [u64; 256],
    }
    /// crosvm's GPU_MAP.
    GpuMap: 64 {
        /// Region id.
        shmid: u8,
        /// Zero.
        padding: [u8; 7],
        /// Offset in the region.
        shm_offset: u64,
        /// Bytes.
        len: u64,
        /// Vulkan memory type index.
        memory_idx: u32,
        /// Kind of handle.
        handle_type: u32,
        /// Vulkan device UUID.
        device_uuid: [u8; 16],
        /// Vulkan driver UUID.
        driver_uuid: [u8; 16],
    }
    /// crosvm's EXTERNAL_MAP: the pointer means something only inside one process.
    ExternalMap: 32 {
        /// Region id.
        shmid: u8,
        /// Zero.
        padding: [u8; 7],
        /// Offset in the region.
        shm_offset: u64,
        /// Bytes.
        len: u64,
        /// Host address; never accepted from another process.
        ptr: u64,
    }
}

/// A crypto session. The layout is that of a 64-bit host: it holds raw pointers, which are
/// never followed.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CryptoSession {
    /// Virtio-crypto operation code; the service is in bits 8–15.
    pub op_code: u64,
    /// Symmetric or asymmetric parameters and keys.
    pub body: [u8; 1056],
    /// Session id; negative in a reply: refused.
    pub session_id: i64,
}

const _: () = assert!(size_of::<CryptoSession>() == 1072);

impl Default for CryptoSession {
    fn default() -> Self {
        Self::new_zeroed()
    }
}

/// Shows no key.
impl fmt::Debug for CryptoSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CryptoKeys { key_len, auth_len, .. } = self.keys();
        f.debug_struct("CryptoSession")
            .field("op_code", &self.op_code)
            .field("key_len", &key_len)
            .field("auth_len", &auth_len)
            .field("session_id", &self.session_id)
            .finish()
    }
}

/// Reads a `T` from the first bytes; `None` when there are too few.
#[must_use]
pub fn read<T: FromBytes>(bytes: &[u8]) -> Option<T> {
    T::read_from_prefix(bytes).ok().map(|(value, _)| value)
}

/// Reads a `u64`; `None` when there are fewer than eight bytes.
#[must_use]
pub fn read_u64(bytes: &[u8]) -> Option<u64> {
    read::<u64>(bytes)
}

/// Bits 0–7 ring index, bit 8 no descriptor: the `u64` of KICK, CALL and ERR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VringFd(pub u64);

impl VringFd {
    /// The word for ring `index`, with or without a descriptor.
    #[must_use]
    pub fn new(index: u8, has_fd: bool) -> Self {
        Self(u64::from(index) | if has_fd { 0 } else { VRING_NO_FD })
    }

    /// The ring index with every other bit that is set except bit 8, so that a word with reserved
    /// bits never passes for a small index.
    #[must_use]
    pub const fn index(self) -> u64 {
        self.0 & !VRING_NO_FD
    }

    /// Whether a descriptor must come with the message.
    #[must_use]
    pub const fn has_fd(self) -> bool {
        self.0 & VRING_NO_FD == 0
    }
}

/// The bytes of a memory table.
#[must_use]
pub fn encode_mem_table(regions: &[MemRegion]) -> Vec<u8> {
    let count = u32::try_from(regions.len()).unwrap_or(u32::MAX);
    let mut bytes = MemTableHead { count, padding: 0 }.as_bytes().to_vec();
    bytes.extend_from_slice(regions.as_bytes());
    bytes
}

/// The regions of a memory table; `None` when the body holds fewer than it announces.
/// Whole slots beyond the count are ignored (User-mode Linux sends them).
#[must_use]
pub fn decode_mem_table(bytes: &[u8]) -> Option<Vec<MemRegion>> {
    let (head, mut rest) = MemTableHead::read_from_prefix(bytes).ok()?;
    let count = usize::try_from(head.count).ok()?;
    if count > rest.len() / size_of::<MemRegion>() {
        return None;
    }
    let mut regions = Vec::with_capacity(count);
    for _ in 0..count {
        let (region, tail) = MemRegion::read_from_prefix(rest).ok()?;
        regions.push(region);
        rest = tail;
    }
    Some(regions)
}

/// The bytes of a configuration message.
#[must_use]
pub fn encode_config(offset: u32, flags: u32, bytes: &[u8]) -> Vec<u8> {
    let size = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let mut out = ConfigHead { offset, size, flags }.as_bytes().to_vec();
    out.extend_from_slice(bytes);
    out
}

/// An in-flight description of 24 or 20 bytes.
#[must_use]
pub fn decode_inflight(bytes: &[u8]) -> Option<Inflight> {
    let mut whole = [0; size_of::<Inflight>()];
    let taken = bytes.get(..bytes.len().min(whole.len()))?;
    if taken.len() < 20 {
        return None;
    }
    whole.get_mut(..taken.len())?.copy_from_slice(taken);
    read(&whole)
}

impl MemRegion {
    /// Whether both describe the same slot: REM_MEM_REG ignores the file offset.
    #[must_use]
    pub const fn same_slot(&self, other: &Self) -> bool {
        self.guest_addr == other.guest_addr
            && self.user_addr == other.user_addr
            && self.size == other.size
    }
}

impl Inflight {
    /// Bytes of one ring's area, the stride that libvhost-user and DPDK use as well.
    #[must_use]
    pub const fn area_size(queue_size: u16, packed: bool) -> u64 {
        let entries = queue_size as u64;
        let raw = if packed { 32 * entries + 29 } else { 16 * entries + 16 };
        raw.next_multiple_of(64)
    }
}

/// Lengths of a crypto session's keys, by the part of the union that the operation selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CryptoKeys {
    /// Cipher key (symmetric) or key (asymmetric), in bytes.
    pub key_len: u32,
    /// Most bytes that field may hold.
    pub key_room: u32,
    /// Authentication key in bytes (symmetric only).
    pub auth_len: u32,
    /// Most bytes that field may hold.
    pub auth_room: u32,
}

impl CryptoSession {
    /// The announced key lengths and the room for them.
    #[must_use]
    pub fn keys(&self) -> CryptoKeys {
        const SERVICE_AKCIPHER: u64 = 4;
        let word = |at: usize| self.body.get(at..).and_then(read::<u32>).unwrap_or(u32::MAX);
        // Offsets of the table count from the payload's start; the body begins at 8.
        if (self.op_code >> 8) & 0xff == SERVICE_AKCIPHER {
            CryptoKeys { key_len: word(16 - 8), key_room: 1024, auth_len: 0, auth_room: 0 }
        } else {
            CryptoKeys {
                key_len: word(12 - 8),
                key_room: 64,
                auth_len: word(24 - 8),
                auth_room: 512,
            }
        }
    }
}
