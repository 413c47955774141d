//! Requests to a shared directory: any operation on any node, with any names, sizes and room, against the device itself
//! behind its own socket and thread (virtio 1.3 §5.11.6).
//!
//! Held for every request: it comes back once; its reply is as long as it says, is to this request, has an errno or
//! none, and lies in the room that was given; a name that is a path, or no name, does nothing; what was written is read
//! back. Whatever was asked, no byte of what lies beside the shared directory is seen, and nothing there changes.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use outboard_devices::fs::{Fs, FsOptions, Sandbox};

use crate::cover::{played, reached, wanted};
use crate::input::Input;
use crate::rig::{Rig, cut, folder};

/// What no guest may see.
const SECRET: &[u8] = b"what lies beside the share";
const ROOT: u64 = 1;
const REQUEST: u64 = 0;
const REPLY: u64 = 256 << 10;
/// Most room of a reply, with what is looked at behind it.
const ROOM: usize = 16 << 10;
const ARENA: usize = 1 << 20;
const QUEUE: usize = 1;

const NAMES: [&str; 14] = [
    "a",
    "b",
    "c",
    "dir",
    "file",
    "link",
    "",
    ".",
    "..",
    "../secret",
    "dir/../../secret",
    "/etc/passwd",
    "dir/inner",
    "secret",
];
/// How many of them are names.
const GOOD: usize = 6;

/// Operations that are played, with the bytes of their replies behind the header.
const PLAYED: [(u32, &str, usize); 36] = [
    (1, "LOOKUP", 128),
    (2, "FORGET", 0),
    (3, "GETATTR", 104),
    (4, "SETATTR", 104),
    (5, "READLINK", 64),
    (6, "SYMLINK", 128),
    (8, "MKNOD", 128),
    (9, "MKDIR", 128),
    (10, "UNLINK", 0),
    (11, "RMDIR", 0),
    (12, "RENAME", 0),
    (13, "LINK", 128),
    (14, "OPEN", 16),
    (15, "READ", 64),
    (16, "WRITE", 8),
    (17, "STATFS", 80),
    (18, "RELEASE", 0),
    (20, "FSYNC", 0),
    (21, "SETXATTR", 0),
    (22, "GETXATTR", 64),
    (23, "LISTXATTR", 64),
    (24, "REMOVEXATTR", 0),
    (25, "FLUSH", 0),
    (26, "INIT", 64),
    (27, "OPENDIR", 16),
    (28, "READDIR", 512),
    (29, "RELEASEDIR", 0),
    (34, "ACCESS", 0),
    (35, "CREATE", 144),
    (42, "BATCH_FORGET", 0),
    (43, "FALLOCATE", 0),
    (44, "READDIRPLUS", 1024),
    (45, "RENAME2", 0),
    (46, "LSEEK", 8),
    (47, "COPY_FILE_RANGE", 8),
    (48, "SETUPMAPPING", 0),
];

struct Share {
    rig: Rig,
    outside: PathBuf,
    unique: u64,
    nodes: Vec<u64>,
    /// Node and handle.
    handles: Vec<(u64, u64)>,
}

thread_local! {
    static SHARES: std::cell::RefCell<Share> = std::cell::RefCell::new(Share::new());
}

/// Plays one script.
pub fn run(data: &[u8]) {
    wanted(|| {
        let silent = [2, 42, 48];
        let done = PLAYED.iter().filter(|(op, ..)| !silent.contains(op));
        let mut all: Vec<_> = done.map(|(_, name, _)| format!("fs {name} done")).collect();
        for what in
            ["bad name refused", "errno", "no room", "no header", "wrong length", "read back"]
        {
            all.push(format!("fs {what}"));
        }
        all
    });
    SHARES.with_borrow_mut(|share| {
        share.begin();
        let mut input = Input::new(data);
        while !input.is_empty() {
            share.step(&mut input);
        }
        share.check();
    });
}

/// A request, and whether it names something that is no name.
struct Asked {
    opcode: u32,
    node: u64,
    body: Vec<u8>,
    bad: bool,
}

impl Share {
    fn new() -> Self {
        let outside = folder("fs");
        let share = outside.join("share");
        fs::create_dir(&share).expect("a share");
        fs::write(outside.join("secret"), SECRET).expect("a secret");
        let inside = Sandbox::None.prepare(&share).expect("a share").enter().expect("a share");
        let mut options = FsOptions::new("fuzzed", inside);
        options.semantics.xattr = true;
        options.semantics.readdirplus = true;
        let rig = Rig::new(Fs::new(options).expect("a device"), &[0, 1], 64, ARENA);
        Self { rig, outside, unique: 0, nodes: vec![ROOT], handles: Vec::new() }
    }

    /// The share as it always begins, mounted anew.
    fn begin(&mut self) {
        let share = self.outside.join("share");
        for entry in fs::read_dir(&share).expect("the share").flatten() {
            if fs::remove_file(entry.path()).is_err() {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let _ = fs::create_dir(share.join("dir"));
        let _ = fs::write(share.join("file"), "what the host wrote");
        let _ = symlink("../secret", share.join("link"));
        (self.nodes, self.handles) = (vec![ROOT], Vec::new());
        let init =
            Asked { opcode: 26, node: ROOT, body: u32s(&[7, 38, 65536, 1 << 13]), bad: false };
        self.plain(init, 64).expect("mounted");
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let asked = self.request(input);
        played(1);
        let usual =
            PLAYED.iter().find(|(op, ..)| *op == asked.opcode).map_or(0, |(.., room)| *room);
        let room = match input.byte() {
            0..0xe0 => 16 + usual,
            _ => input.below(200) + input.below(60) * 256,
        };
        let length = 40 + asked.body.len();
        let (said, cut_to) = match input.byte() {
            0xff => (input.number() as u32, length),
            0xfe => (length as u32, input.below(41)),
            _ => (length as u32, length),
        };
        let reply = self.ask(&asked, room, said, cut_to, input);
        let whole = said as usize == length && cut_to == length;
        match &reply {
            Some(Ok(_)) => {
                assert!(whole, "a request whose length is wrong was carried out: {}", asked.opcode);
                assert!(
                    !asked.bad,
                    "operation {} with a path for a name was carried out",
                    asked.opcode
                );
            }
            Some(Err(_)) if asked.bad && whole => reached("fs bad name refused".into()),
            Some(Err(_)) if cut_to >= 40 && said as usize != cut_to => {
                reached("fs wrong length".into())
            }
            Some(Err(_)) => reached("fs errno".into()),
            None if cut_to < 40 => reached("fs no header".into()),
            None if room < 16 + usual => reached("fs no room".into()),
            None => {}
        }
        if let Some(Ok(bytes)) = reply {
            self.learn(&asked, &bytes);
        }
    }

    fn request(&mut self, input: &mut Input<'_>) -> Asked {
        let opcode = match input.byte() {
            0xf8.. => input.number() as u32,
            other => PLAYED[usize::from(other) % PLAYED.len()].0,
        };
        let node = self.node(input);
        let (of, handle) = self.handle(input);
        let node = match opcode {
            15 | 16 | 18 | 20 | 25 | 28 | 29 | 43 | 44 | 46 | 47 if !input.one_in(8) => of,
            _ => node,
        };
        let (first, second) = (name(input), name(input));
        let mut bad = first.1;
        let size = if input.one_in(6) { input.number() as u32 } else { input.below(64) as u32 };
        let offset = if input.one_in(6) { input.number() } else { u64::from(input.byte()) };
        let data = vec![input.byte(); input.below(64)];
        let body = match opcode {
            1 | 10 | 11 => first.0,
            2 => u64s(&[input.number()]),
            4 => {
                bad = false;
                self.attributes(input, handle)
            }
            6 => [first.0, second.0].concat(),
            8 => [u32s(&[[0o100_644, 0o010_644, 0o140_644][input.below(3)], 0, 0, 0]), first.0]
                .concat(),
            9 => [u32s(&[0o755, 0]), first.0].concat(),
            12 => {
                bad |= second.1;
                [u64s(&[self.node(input)]), first.0, second.0].concat()
            }
            45 => {
                bad |= second.1;
                [u64s(&[self.node(input)]), u32s(&[input.below(8) as u32, 0]), first.0, second.0]
                    .concat()
            }
            13 => [u64s(&[self.node(input)]), first.0].concat(),
            35 => [u32s(&[0o102 | (input.below(2) as u32 * 0o200), 0o644, 0, 0]), first.0].concat(),
            _ => {
                bad = false;
                self.by_handle(input, opcode, handle, (size, offset), &data, &first.0)
            }
        };
        Asked { opcode, node, body, bad }
    }

    /// Bodies of operations that name no entry.
    fn by_handle(
        &mut self,
        input: &mut Input<'_>,
        opcode: u32,
        handle: u64,
        (size, offset): (u32, u64),
        data: &[u8],
        word: &[u8],
    ) -> Vec<u8> {
        let some = |number: usize| number as u32;
        match opcode {
            3 => u64s(&[0, handle]),
            14 => u32s(&[[0, 1, 2, 0o1002][input.below(4)], 0]),
            27 | 34 => u32s(&[some(input.below(8)), 0]),
            15 | 28 | 44 => {
                let size = if opcode == 15 { size } else { size.saturating_mul(8) };
                [u64s(&[handle, offset]), u32s(&[size, 0]), u64s(&[0]), u32s(&[0, 0])].concat()
            }
            16 => {
                let said = if input.one_in(8) { size } else { some(data.len()) };
                let head = [u64s(&[handle, offset]), u32s(&[said, 0]), u64s(&[0]), u32s(&[0, 0])];
                [head.concat(), data.to_vec()].concat()
            }
            18 | 29 => [u64s(&[handle]), u32s(&[0, some(input.below(4))]), u64s(&[0])].concat(),
            20 => [u64s(&[handle]), u32s(&[some(input.below(2)), 0])].concat(),
            25 => [u64s(&[handle]), u32s(&[0, 0]), u64s(&[0])].concat(),
            21 => {
                let said = if input.one_in(8) { size } else { some(data.len()) };
                [u32s(&[said, 0]), b"user.".to_vec(), word.to_vec(), data.to_vec()].concat()
            }
            22 => [u32s(&[size, 0]), b"user.".to_vec(), word.to_vec()].concat(),
            23 => u32s(&[size, 0]),
            24 => [b"user.".to_vec(), word.to_vec()].concat(),
            26 => u32s(&[7, 27 + some(input.below(12)), 65536, 1 << 13]),
            42 => {
                let node = self.node(input);
                [u32s(&[1 + size / 32, 0]), u64s(&[node, 1])].concat()
            }
            // No more than that: the folder may be in memory.
            43 => {
                [u64s(&[handle, offset % 65536, u64::from(size % 65536)]), u32s(&[0, 0])].concat()
            }
            46 => [u64s(&[handle, offset]), u32s(&[some(input.below(6)), 0])].concat(),
            47 => {
                let (node, to) = self.handle(input);
                u64s(&[handle, offset, node, to, offset % 4096, u64::from(size % 65536), 0])
            }
            48 => u64s(&[handle, offset, u64::from(size), 3, offset]),
            _ => data.to_vec(),
        }
    }

    /// SETATTR: owners stay, so that the folder can be emptied by whoever runs this.
    fn attributes(&mut self, input: &mut Input<'_>, handle: u64) -> Vec<u8> {
        const MODE: u32 = 1;
        const SIZE: u32 = 1 << 3;
        const MTIME: u32 = 1 << 5;
        let valid = [MODE, SIZE, MTIME, SIZE | 1 << 6, 0][input.below(5)];
        let size = u64::from(input.byte()) * 16;
        let times = u64s(&[0, 5, 6, 7]);
        let rest = u32s(&[0, 0, 0, 0o700 | input.below(64) as u32, 0, 0, 0, 0]);
        [u32s(&[valid, 0]), u64s(&[handle, size]), times, rest].concat()
    }

    fn node(&mut self, input: &mut Input<'_>) -> u64 {
        match input.byte() {
            0xf0.. => input.number(),
            other => self.nodes[usize::from(other) % self.nodes.len()],
        }
    }

    fn handle(&mut self, input: &mut Input<'_>) -> (u64, u64) {
        match input.byte() {
            0xf0.. => (ROOT, input.number()),
            other if !self.handles.is_empty() => {
                self.handles[usize::from(other) % self.handles.len()]
            }
            _ => (ROOT, 0),
        }
    }

    /// What a good reply tells of nodes and handles.
    fn learn(&mut self, asked: &Asked, bytes: &[u8]) {
        if let Some((_, name, _)) = PLAYED.iter().find(|(op, ..)| *op == asked.opcode) {
            reached(format!("fs {name} done"));
        }
        match asked.opcode {
            1 | 6 | 8 | 9 | 13 | 35 if self.nodes.len() < 64 => self.nodes.push(u64_at(bytes, 0)),
            26 => (self.nodes, self.handles) = (vec![ROOT], Vec::new()),
            _ => {}
        }
        match asked.opcode {
            14 | 27 => self.handles.push((asked.node, u64_at(bytes, 0))),
            35 => self.handles.push((u64_at(bytes, 0), u64_at(bytes, 128))),
            16 => self.read_back(asked, bytes),
            _ => {}
        }
    }

    /// What was just written is there.
    fn read_back(&mut self, asked: &Asked, bytes: &[u8]) {
        let taken = bytes[..4].try_into().map_or(0, u32::from_le_bytes);
        let head = [&asked.body[..16], &u32s(&[taken, 0]), &u64s(&[0]), &u32s(&[0, 0])].concat();
        let again = Asked { opcode: 15, node: asked.node, body: head, bad: false };
        // A file that was opened to be written only says no.
        if let Ok(there) = self.plain(again, taken as usize) {
            assert!(there == asked.body[40..40 + taken as usize], "what was written is not there");
            reached("fs read back".into());
        }
    }

    fn plain(&mut self, asked: Asked, room: usize) -> Result<Vec<u8>, i32> {
        let length = 40 + asked.body.len();
        let none = &mut Input::new(&[]);
        self.ask(&asked, 16 + room, length as u32, length, none).expect("it has a reply")
    }

    /// Sends a request that says `said` bytes, of which `cut_to` are there. The reply, if there is one.
    fn ask(
        &mut self,
        asked: &Asked,
        room: usize,
        said: u32,
        cut_to: usize,
        input: &mut Input<'_>,
    ) -> Option<Result<Vec<u8>, i32>> {
        self.unique += 1;
        let ids = u64s(&[self.unique, asked.node]);
        let head = [u32s(&[said, asked.opcode]), ids, u32s(&[0, 0, 1, 0])].concat();
        let mut request = [head, asked.body.clone()].concat();
        request.truncate(cut_to);
        self.rig.store(REQUEST, &request);
        self.rig.store(REPLY, &vec![0xee; room + 64]);
        let readable = cut(input, REQUEST, request.len(), 2);
        let writable = cut(input, REPLY, room.min(ROOM), 2);
        if readable.is_empty() && writable.is_empty() {
            return None;
        }
        self.rig.offer(QUEUE, &readable, &writable, self.unique);
        let (token, used) = self.rig.back(QUEUE);
        assert_eq!(token, self.unique, "each comes back once");
        let bytes = self.rig.load(REPLY, room + 64);
        let used = used as usize;
        assert!(used <= room, "{used} bytes of {room}");
        assert!(bytes[room..].iter().all(|byte| *byte == 0xee), "written behind the room");
        assert!(self.rig.load(REQUEST, request.len()) == request, "the request was written to");
        assert!(
            !bytes.windows(SECRET.len()).any(|part| part == SECRET),
            "seen: operation {}",
            asked.opcode
        );
        if used == 0 {
            return None;
        }
        assert!(used >= 16, "a reply has a header: operation {}, {used} bytes", asked.opcode);
        assert_eq!(
            u32_at(&bytes, 0) as usize,
            used,
            "as long as it says: operation {}",
            asked.opcode
        );
        assert_eq!(u64_at(&bytes, 8), self.unique, "a reply to this request");
        match -(u32_at(&bytes, 4) as i32) {
            0 => Some(Ok(bytes[16..used].to_vec())),
            error => {
                assert!(
                    (1..4096).contains(&error),
                    "{error} is no errno: operation {}",
                    asked.opcode
                );
                assert_eq!(used, 16, "an error has nothing behind it");
                Some(Err(error))
            }
        }
    }

    /// Beside the share all is as it was.
    fn check(&self) {
        assert!(
            fs::read(self.outside.join("secret")).is_ok_and(|bytes| bytes == SECRET),
            "the secret"
        );
        assert_eq!(fs::read_dir(&self.outside).expect("there").count(), 2, "beside the share");
    }
}

/// A name with its end, and whether it is none.
fn name(input: &mut Input<'_>) -> (Vec<u8>, bool) {
    let (mut bytes, bad) = match input.byte() {
        0xf8.. => (vec![b'x'; 250 + input.below(20)], None),
        other => {
            let at = usize::from(other) % NAMES.len();
            (NAMES[at].as_bytes().to_vec(), Some((GOOD..13).contains(&at)))
        }
    };
    let bad = bad.unwrap_or(bytes.len() > 255);
    bytes.push(0);
    (bytes, bad)
}

fn u32s(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn u64s(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|part| part.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|part| part.try_into().ok()).map_or(0, u32::from_le_bytes)
}
