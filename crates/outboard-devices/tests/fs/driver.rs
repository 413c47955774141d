//! A driver of a shared directory: FUSE requests, one at a time.

use std::path::Path;

use outboard::LoopKind;
use outboard_devices::fs::{Fs, FsOptions, Sandbox};

use crate::rig::Rig;

/// What a request is about.
pub(crate) mod op {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const LISTXATTR: u32 = 23;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const SETUPMAPPING: u32 = 48;
    pub(crate) const REMOVEMAPPING: u32 = 49;
}

pub(crate) const ROOT: u64 = 1;
pub(crate) const EINVAL: i32 = 22;
pub(crate) const ENOENT: i32 = 2;
pub(crate) const ENFILE: i32 = 23;
pub(crate) const ENOSYS: i32 = 38;
pub(crate) const ENOTCONN: i32 = 107;

/// Where requests lie in the arena, and where there is room for replies.
const REQUEST: u64 = 0;
const REPLY: u64 = 2 << 20;

/// A driver that has mounted the directory.
pub(crate) struct Driver {
    pub(crate) rig: Rig,
    unique: u64,
}

/// Bytes of structures.
pub(crate) fn words(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

pub(crate) fn u32s(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub(crate) fn u64s(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub(crate) fn name(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

/// A share of `folder` without a sandbox: tests run beside each other in one process.
pub(crate) fn options(folder: &Path) -> FsOptions {
    let inside = Sandbox::None.prepare(folder).unwrap().enter().unwrap();
    FsOptions::new("share", inside)
}

impl Driver {
    /// Starts a device and queues 0 and 1, and mounts.
    pub(crate) fn mount(options: FsOptions) -> Self {
        let mut driver = Self::start(options);
        driver.init();
        driver
    }

    /// Starts a device and queues 0 and 1.
    pub(crate) fn start(options: FsOptions) -> Self {
        let mut driver = Self::asleep(options);
        driver.rig.activate(&[0, 1], 64);
        driver
    }

    /// Starts a device.
    pub(crate) fn asleep(options: FsOptions) -> Self {
        let device = Fs::new(options).unwrap();
        Self { rig: Rig::asleep(device, LoopKind::Epoll, u64::MAX), unique: 100 }
    }

    pub(crate) fn init(&mut self) {
        let said = self.ask(op::INIT, ROOT, &u32s(&[7, 38, 65536, 0]), 64).unwrap();
        assert_eq!(u32_at(&said, 0), 7);
    }

    /// A whole request.
    pub(crate) fn request(&mut self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        self.unique += 1;
        let length = u32::try_from(40 + body.len()).unwrap();
        let who = u32s(&[0, 0, 1, 0]);
        let ids = u64s(&[self.unique, node]);
        words(&[&u32s(&[length, opcode]), &ids, &who, body])
    }

    /// Asks on a queue with these bytes and this room, as one piece each. Returns the length used.
    pub(crate) fn send(&mut self, queue: usize, request: &[u8], room: u32) -> u32 {
        let pieces = [(self.rig.at(REPLY), room)];
        let room = if room == 0 { &[][..] } else { &pieces[..] };
        self.rig.store(self.rig.at(REQUEST), request);
        let readable = [(self.rig.at(REQUEST), u32::try_from(request.len()).unwrap())];
        let readable = if request.is_empty() { &[][..] } else { &readable[..] };
        self.rig.offer(queue, readable, room, 1);
        self.rig.back(queue).1
    }

    /// The reply that lies in memory: its error, or what follows the header.
    pub(crate) fn reply(&self, used: u32) -> Result<Vec<u8>, i32> {
        let bytes = self.rig.load(self.rig.at(REPLY), used);
        assert!(bytes.len() >= 16, "a reply has a header: {used}");
        assert_eq!(u32_at(&bytes, 0), used, "the header says how much was written");
        assert_eq!(u64_at(&bytes, 8), self.unique, "it is the reply to this request");
        match i32::from_le_bytes(bytes[4..8].try_into().unwrap()) {
            0 => Ok(bytes[16..].to_vec()),
            error => Err(-error),
        }
    }

    /// Asks, with so much room behind the reply's header.
    pub(crate) fn ask(
        &mut self,
        opcode: u32,
        node: u64,
        body: &[u8],
        room: u32,
    ) -> Result<Vec<u8>, i32> {
        let request = self.request(opcode, node, body);
        let used = self.send(1, &request, 16 + room);
        self.reply(used)
    }

    /// The node of an entry.
    pub(crate) fn lookup(&mut self, parent: u64, entry: &str) -> Result<u64, i32> {
        self.ask(op::LOOKUP, parent, &name(entry), 128).map(|entry| u64_at(&entry, 0))
    }

    /// The handle of an open file.
    pub(crate) fn open(&mut self, node: u64, flags: u32) -> Result<u64, i32> {
        self.ask(op::OPEN, node, &u32s(&[flags, 0]), 16).map(|opened| u64_at(&opened, 0))
    }

    /// Makes a file: its node and handle.
    pub(crate) fn create(&mut self, parent: u64, entry: &str) -> Result<(u64, u64), i32> {
        let body = words(&[&u32s(&[0o102, 0o644, 0, 0]), &name(entry)]);
        let made = self.ask(op::CREATE, parent, &body, 144)?;
        Ok((u64_at(&made, 0), u64_at(&made, 128)))
    }

    pub(crate) fn read(
        &mut self,
        node: u64,
        handle: u64,
        offset: u64,
        size: u32,
    ) -> Result<Vec<u8>, i32> {
        let body =
            words(&[&u64s(&[handle, offset]), &u32s(&[size, 0]), &u64s(&[0]), &u32s(&[0, 0])]);
        self.ask(op::READ, node, &body, size)
    }

    pub(crate) fn write(
        &mut self,
        node: u64,
        handle: u64,
        offset: u64,
        bytes: &[u8],
    ) -> Result<u32, i32> {
        let size = u32::try_from(bytes.len()).unwrap();
        let head =
            words(&[&u64s(&[handle, offset]), &u32s(&[size, 0]), &u64s(&[0]), &u32s(&[0, 0])]);
        let body = words(&[&head, bytes]);
        self.ask(op::WRITE, node, &body, 8).map(|said| u32_at(&said, 0))
    }

    pub(crate) fn release(&mut self, node: u64, handle: u64) -> Result<(), i32> {
        let body = words(&[&u64s(&[handle]), &u32s(&[0, 0]), &u64s(&[0])]);
        self.ask(op::RELEASE, node, &body, 0).map(drop)
    }
}
