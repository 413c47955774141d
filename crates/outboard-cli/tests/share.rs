//! What the options of `outboard fs` do, as a guest sees it: the program is started with them, and our front-end asks
//! it in FUSE (virtio 1.3 §5.11.6).

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]
#![expect(clippy::indexing_slicing, reason = "tests know their sizes")]

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use outboard_frontend::{Buffer, Connection, QueueSetup, SharedMemory, Virtqueue, Vmm, Wanted};

#[path = "../../outboard-frontend/tests/common/skip.rs"]
mod skip;

const PATIENCE: Duration = Duration::from_secs(60);
const ROOT: u64 = 1;
/// Where the reply has room in the arena.
const REPLY: u64 = 8192;
const HIPRIO: usize = 0;
const REQUESTS: usize = 1;

mod op {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const BATCH_FORGET: u32 = 42;
}

/// Bits of INIT (fuse(4)).
mod flag {
    pub(crate) const DO_READDIRPLUS: u64 = 1 << 13;
    pub(crate) const WRITEBACK_CACHE: u64 = 1 << 16;
    pub(crate) const POSIX_ACL: u64 = 1 << 20;
    pub(crate) const SUBMOUNTS: u64 = 1 << 27;
    pub(crate) const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub(crate) const SETXATTR_EXT: u64 = 1 << 29;
    pub(crate) const INIT_EXT: u64 = 1 << 30;
    pub(crate) const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
    /// What Linux says that these tests look at.
    pub(crate) const ALL: u64 = DO_READDIRPLUS
        | WRITEBACK_CACHE
        | (1 << 18) // PARALLEL_DIROPS
        | (1 << 6) // DONT_MASK
        | POSIX_ACL
        | SUBMOUNTS
        | HANDLE_KILLPRIV_V2
        | SETXATTR_EXT
        | INIT_EXT
        | DIRECT_IO_ALLOW_MMAP;
}

const EIO: i32 = 5;
const EBADF: i32 = 9;
const EINVAL: i32 = 22;
const EROFS: i32 = 30;
const ENOSYS: i32 = 38;
const EPROTO: i32 = 71;
const EOPNOTSUPP: i32 = 95;

/// Places in the entry that LOOKUP and CREATE reply with.
mod entry {
    pub(crate) const NAME_VALID: usize = 16;
    pub(crate) const ATTRIBUTES_VALID: usize = 24;
    pub(crate) const OWNER: usize = 108;
    pub(crate) const GROUP: usize = 112;
    pub(crate) const FLAGS: usize = 124;
    pub(crate) const HANDLE: usize = 128;
}

type Said = Result<Vec<u8>, i32>;

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn u32s(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn u64s(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn name(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

/// A folder where extended attributes can be had, if anywhere.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    fs::create_dir(folder.path().join("share")).unwrap();
    folder
}

/// The program, and a front-end in front of it.
struct Share {
    folder: tempfile::TempDir,
    program: Killed,
    vmm: Vmm,
    queues: Vec<Virtqueue>,
    memory: SharedMemory,
    arena: Buffer,
    unique: u64,
    /// Who asks: user and group.
    who: (u32, u32),
    /// See [`flag`].
    negotiated: u64,
}

impl Share {
    /// Shares an empty directory with these options, mounted; and what was negotiated.
    fn mount(more: &[&str]) -> (Self, u64) {
        let mut share = Self::start(more);
        let negotiated = share.init(flag::ALL).unwrap();
        (share, negotiated)
    }

    fn start(more: &[&str]) -> Self {
        let folder = folder();
        let mut program = Command::new(env!("CARGO_BIN_EXE_outboard"));
        program.arg("fs").arg("--shared-dir").arg(folder.path().join("share"));
        program.arg("--socket-path").arg(folder.path().join("s")).args(more);
        Self::run(program, folder)
    }

    fn run(mut program: Command, folder: tempfile::TempDir) -> Self {
        let program = program.env("OUTBOARD_LOG", "error").stdin(Stdio::null()).spawn();
        let program = Killed(program.unwrap());
        let socket = folder.path().join("s");
        let connection = Connection::connect_patiently(socket, PATIENCE, PATIENCE).unwrap();
        let mut vmm = Vmm::new(connection, Wanted::default()).unwrap();
        let memory = SharedMemory::with_size(1 << 20).unwrap();
        let arena = memory.allocate(65536, 4096).unwrap();
        vmm.share_memory(memory.clone()).unwrap();
        let setup = |index| QueueSetup { index, size: 16, indirect: 0 };
        let queues = vmm.activate(&[setup(0), setup(1)]).unwrap();
        let who = (0, 0);
        Self { folder, program, vmm, queues, memory, arena, unique: 100, who, negotiated: 0 }
    }

    /// Mounts; what was negotiated of these bits.
    fn init(&mut self, bits: u64) -> Result<u64, i32> {
        let flags = [u32::try_from(bits & u64::from(u32::MAX)).unwrap(), (bits >> 32) as u32];
        let said =
            self.ask(op::INIT, ROOT, &u32s(&[&[7, 38, 65536], &flags[..], &[0; 11]].concat()))?;
        self.negotiated = u64::from(u32_at(&said, 12)) | u64::from(u32_at(&said, 32)) << 32;
        Ok(self.negotiated)
    }

    fn path(&self, entry: &str) -> PathBuf {
        self.folder.path().join("share").join(entry)
    }

    /// Asks on a queue; the bytes of the reply.
    fn ask_on(&mut self, queue: usize, operation: u32, node: u64, body: &[u8], room: u32) -> u32 {
        self.unique += 1;
        let length = u32::try_from(40 + body.len()).unwrap();
        let ids = u64s(&[self.unique, node]);
        let who = u32s(&[self.who.0, self.who.1, 1, 0]);
        let request = [&u32s(&[length, operation]), &ids, &who, body].concat();
        let at = self.arena.guest();
        self.memory.view().write(at, &request).unwrap();
        let reply = [(at + REPLY, room)];
        let reply = if room == 0 { &[][..] } else { &reply[..] };
        let queue = &mut self.queues[queue];
        assert!(queue.add(&[(at, length)], reply, self.unique).unwrap());
        queue.kick().unwrap();
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some((token, used)) = queue.pop().unwrap() {
                assert_eq!(token, self.unique);
                return used;
            }
            assert!(Instant::now() < until, "no answer to {operation}");
            queue.wait(Duration::from_millis(100)).unwrap();
        }
    }

    fn ask(&mut self, operation: u32, node: u64, body: &[u8]) -> Said {
        let used = self.ask_on(REQUESTS, operation, node, body, 4096);
        let mut bytes = vec![0; used as usize];
        self.memory.view().read(self.arena.guest() + REPLY, &mut bytes).unwrap();
        match i32::from_le_bytes(bytes[4..8].try_into().unwrap()) {
            0 => Ok(bytes[16..].to_vec()),
            error => Err(-error),
        }
    }

    fn lookup(&mut self, entry: &str) -> Said {
        self.ask(op::LOOKUP, ROOT, &name(entry))
    }

    fn create(&mut self, entry: &str) -> Said {
        // O_RDWR | O_CREAT | O_EXCL
        self.ask(op::CREATE, ROOT, &[u32s(&[0o302, 0o644, 0, 0]), name(entry)].concat())
    }

    /// The handle, and what the guest may do with its pages.
    fn open(&mut self, node: u64, flags: u32) -> Result<(u64, u32), i32> {
        let said = self.ask(op::OPEN, node, &u32s(&[flags, 0]))?;
        Ok((u64_at(&said, 0), u32_at(&said, 8)))
    }

    fn read(&mut self, node: u64, handle: u64) -> Said {
        let body = [u64s(&[handle, 0]), u32s(&[64, 0]), u64s(&[0]), u32s(&[0, 0])].concat();
        self.ask(op::READ, node, &body)
    }

    fn write(&mut self, node: u64, handle: u64, offset: u64, bytes: &[u8]) -> Said {
        self.write_as(node, [handle, offset], [0, 0], bytes)
    }

    /// Where, and how: flags of the write, and of the open file.
    fn write_as(&mut self, node: u64, at: [u64; 2], how: [u32; 2], bytes: &[u8]) -> Said {
        let size = u32::try_from(bytes.len()).unwrap();
        let head = [u64s(&at), u32s(&[size, how[0]]), u64s(&[0]), u32s(&[how[1], 0])].concat();
        self.ask(op::WRITE, node, &[&head, bytes].concat())
    }

    fn attributes(&mut self, node: u64) -> Said {
        self.ask(op::GETATTR, node, &[u32s(&[0, 0]), u64s(&[0])].concat())
    }

    fn set_xattr(&mut self, node: u64, attribute: &str, value: &[u8]) -> Said {
        let size = u32::try_from(value.len()).unwrap();
        let more = if self.negotiated & flag::SETXATTR_EXT != 0 { &[0, 0][..] } else { &[] };
        let head = u32s(&[&[size, 0], more].concat());
        self.ask(op::SETXATTR, node, &[&head, &name(attribute), value].concat())
    }

    fn xattr(&mut self, node: u64, attribute: &str) -> Said {
        self.ask(op::GETXATTR, node, &[u32s(&[256, 0]), name(attribute)].concat())
    }

    /// What the host has under this name.
    fn host_xattr(&self, entry: &str, attribute: &str) -> Option<Vec<u8>> {
        let mut value = [0; 256];
        let got = rustix::fs::getxattr(self.path(entry), attribute, &mut value).ok()?;
        Some(value[..got].to_vec())
    }

    /// With which flags the program has a file open.
    fn flags_of(&self, entry: &str) -> Vec<u32> {
        let proc = PathBuf::from(format!("/proc/{}", self.program.0.id()));
        let mut found = Vec::new();
        for one in fs::read_dir(proc.join("fd")).unwrap() {
            let one = one.unwrap();
            let there = fs::metadata(one.path()).map(|there| (there.dev(), there.ino())).ok();
            let wanted = fs::metadata(self.path(entry)).unwrap();
            if there == Some((wanted.dev(), wanted.ino())) {
                let info = fs::read_to_string(proc.join("fdinfo").join(one.file_name())).unwrap();
                let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
                found.push(u32::from_str_radix(flags.trim(), 8).unwrap());
            }
        }
        // O_PATH: its node, not the open file.
        found.retain(|flags| flags & 0o10_000_000 == 0);
        found
    }
}

#[test]
fn users_and_groups_are_translated_both_ways() {
    let (user, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let users =
        ["--translate-uid", &format!("map:77:{user}:1"), "--translate-uid", "forbid-guest:5:2"];
    let groups = ["--translate-gid", &format!("map:88:{group}:1")];
    let (mut share, _) = Share::mount(&[&users[..], &groups[..]].concat());
    share.who = (77, 88);
    let made = share.create("mine").unwrap();
    assert_eq!((u32_at(&made, entry::OWNER), u32_at(&made, entry::GROUP)), (77, 88));
    let on_host = fs::metadata(share.path("mine")).unwrap();
    assert_eq!((on_host.uid(), on_host.gid()), (user, group));
    fs::write(share.path("hosts"), "").unwrap();
    let seen = share.lookup("hosts").unwrap();
    assert_eq!((u32_at(&seen, entry::OWNER), u32_at(&seen, entry::GROUP)), (77, 88));
    share.who = (6, 88);
    assert_eq!(share.create("refused").unwrap_err(), EIO);
    assert!(!share.path("refused").exists());
}

#[test]
fn a_directory_that_is_a_mount_is_announced_unless_it_is_not_to_be() {
    const SUBMOUNT: u32 = 1;
    let seen = |more: &[&str], bits: u64| {
        let folder = folder();
        let (shared, socket) = (folder.path().join("share"), folder.path().join("s"));
        fs::create_dir(shared.join("plain")).unwrap();
        fs::create_dir(shared.join("mount")).unwrap();
        let mut program = Command::new("unshare");
        let script = "mount -t tmpfs none \"$1/mount\" && shift && exec \"$@\"";
        program.args(["-m", "sh", "-c", script, "sh"]).arg(&shared);
        program.args([env!("CARGO_BIN_EXE_outboard"), "fs", "--shared-dir"]).arg(&shared);
        program.arg("--socket-path").arg(socket).args(more);
        let mut share = Share::run(program, folder);
        share.init(bits).unwrap();
        ["plain", "mount"].map(|one| u32_at(&share.lookup(one).unwrap(), entry::FLAGS))
    };
    let try_it = ["-m", "mount", "-t", "tmpfs", "none", env!("CARGO_TARGET_TMPDIR")];
    if !Command::new("unshare").args(try_it).status().is_ok_and(|status| status.success()) {
        return skip::skip("nothing can be mounted here");
    }
    assert_eq!(seen(&[], flag::ALL), [0, SUBMOUNT], "as it is");
    assert_eq!(seen(&["--announce-submounts"], flag::ALL), [0, SUBMOUNT]);
    assert_eq!(seen(&["--no-announce-submounts"], flag::ALL), [0, 0]);
    let others = flag::ALL - flag::SUBMOUNTS;
    assert_eq!(seen(&[], others), [0, 0], "the guest does not know them");
}

#[test]
fn nodes_are_forgotten_and_requests_interrupted_on_the_queue_of_high_priority() {
    let (mut share, _) = Share::mount(&[]);
    let mut nodes = Vec::new();
    for entry in ["a", "b", "c", "kept"] {
        fs::write(share.path(entry), entry).unwrap();
        nodes.push(u64_at(&share.lookup(entry).unwrap(), 0));
    }
    share.lookup("kept").unwrap();
    for node in &nodes {
        share.attributes(*node).unwrap();
    }
    // Looked up once, forgotten once; "kept" was looked up twice.
    assert_eq!(share.ask_on(HIPRIO, op::FORGET, nodes[0], &u64s(&[1]), 0), 0, "no reply");
    assert_eq!(share.ask_on(HIPRIO, op::FORGET, nodes[3], &u64s(&[1]), 0), 0, "no reply");
    let batch = [u32s(&[2, 0]), u64s(&[nodes[1], 1, nodes[2], 1])].concat();
    assert_eq!(share.ask_on(HIPRIO, op::BATCH_FORGET, 0, &batch, 0), 0, "no reply");
    for node in &nodes[..3] {
        assert_eq!(share.attributes(*node).unwrap_err(), EBADF);
    }
    share.attributes(nodes[3]).unwrap();
    // What it names was answered before, or never was there: nothing happens, and nothing is said.
    for unique in [share.unique, 0, u64::MAX] {
        assert_eq!(share.ask_on(HIPRIO, op::INTERRUPT, 0, &u64s(&[unique]), 0), 0);
        assert_eq!(share.ask_on(HIPRIO, op::INTERRUPT, 0, &u64s(&[unique]), 64), 0);
    }
    let (handle, _) = share.open(nodes[3], 0).unwrap();
    assert_eq!(share.read(nodes[3], handle).unwrap(), b"kept");
    share.vmm.read_config(0, 36).unwrap();
}

/// A guest that collects what it writes reads what it has not, and says itself where the end is.
#[test]
fn with_writeback_what_is_open_to_be_written_can_be_read_and_the_guest_knows_the_end() {
    const WRONLY_APPEND: u32 = 0o2001;
    for (more, on) in [(&["--writeback"][..], true), (&["-o", "writeback"], true), (&[], false)] {
        let (mut share, negotiated) = Share::mount(more);
        assert_eq!(negotiated & flag::WRITEBACK_CACHE != 0, on, "{more:?}");
        fs::write(share.path("f"), "before").unwrap();
        let node = u64_at(&share.lookup("f").unwrap(), 0);
        let (handle, _) = share.open(node, WRONLY_APPEND).unwrap();
        let read = share.read(node, handle);
        assert_eq!(read, if on { Ok(b"before".to_vec()) } else { Err(EBADF) }, "{more:?}");
        // WRITE_CACHE: of what was collected.
        let how = [u32::from(on), WRONLY_APPEND];
        share.write_as(node, [handle, 0], how, b"AF").unwrap();
        let wanted = if on { "AFfore" } else { "beforeAF" };
        assert_eq!(fs::read_to_string(share.path("f")).unwrap(), wanted, "{more:?}");
    }
}

#[test]
fn extended_attributes_are_there_where_they_are_asked_for_and_mapped_as_is_said() {
    let value = b"green".to_vec();
    let map = ":map::user.guest.:";
    let lines: [(&[&str], _); 5] = [
        (&[], None),
        (&["--xattr"], Some("user.colour")),
        (&["-o", "xattr"], Some("user.colour")),
        (&["--xattrmap", map], Some("user.guest.user.colour")),
        (&["-o", "xattrmap=:map::user.guest.:"], Some("user.guest.user.colour")),
    ];
    for (more, on_host) in lines {
        let (mut share, _) = Share::mount(more);
        fs::write(share.path("f"), "").unwrap();
        let node = u64_at(&share.lookup("f").unwrap(), 0);
        let set = share.set_xattr(node, "user.colour", &value);
        let Some(on_host) = on_host else {
            assert_eq!(set, Err(ENOSYS), "{more:?}");
            continue;
        };
        if set == Err(EOPNOTSUPP) {
            eprintln!("skipped: the file system below has no extended attributes");
            return;
        }
        assert_eq!(set, Ok(Vec::new()), "{more:?}");
        assert_eq!(share.xattr(node, "user.colour"), Ok(value.clone()), "{more:?}");
        assert_eq!(share.host_xattr("f", on_host), Some(value.clone()), "{more:?}");
    }
}

#[test]
fn access_control_lists_of_the_guest_are_those_of_the_host() {
    const NAME: &str = "system.posix_acl_access";
    // The owner, user 4242, the group, the mask, others (acl(5)).
    let rights = [
        (1u16, 6u16, u32::MAX),
        (2, 4, 4242),
        (4, 4, u32::MAX),
        (16, 4, u32::MAX),
        (32, 0, u32::MAX),
    ];
    let mut list = u32s(&[2]);
    for (tag, right, id) in rights {
        list.extend([tag.to_le_bytes(), right.to_le_bytes()].concat());
        list.extend(id.to_le_bytes());
    }
    let lines: [(&[&str], _); 4] = [
        (&["--posix-acl"], true),
        (&["--posix-acl=auto"], true),
        (&["-o", "posix_acl"], true),
        (&["--xattr"], false),
    ];
    for (more, on) in lines {
        let (mut share, negotiated) = Share::mount(more);
        assert_eq!(negotiated & flag::POSIX_ACL != 0, on, "{more:?}");
        fs::write(share.path("f"), "").unwrap();
        let node = u64_at(&share.lookup("f").unwrap(), 0);
        match share.set_xattr(node, NAME, &list) {
            Err(EOPNOTSUPP) => assert_eq!(share.host_xattr("f", NAME), None),
            set => {
                assert_eq!((set, on), (Ok(Vec::new()), true), "{more:?}");
                assert_eq!(share.host_xattr("f", NAME), Some(list.clone()), "{more:?}");
                assert_eq!(share.xattr(node, NAME), Ok(list.clone()), "{more:?}");
            }
        }
    }
    // A guest that knows none: it is refused where they are demanded.
    let others = flag::ALL - flag::POSIX_ACL;
    assert_eq!(Share::start(&["--posix-acl"]).init(others), Err(EPROTO));
    assert!(Share::start(&["--posix-acl=auto"]).init(others).is_ok());
}

#[test]
fn nothing_is_changed_through_a_share_that_is_read_only() {
    let (mut share, _) = Share::mount(&["--readonly"]);
    fs::write(share.path("f"), "there").unwrap();
    let node = u64_at(&share.lookup("f").unwrap(), 0);
    let (handle, _) = share.open(node, 0).unwrap();
    assert_eq!(share.read(node, handle).unwrap(), b"there");
    assert_eq!(share.write(node, handle, 0, b"not"), Err(EROFS));
    assert_eq!(share.open(node, 2), Err(EROFS));
    assert_eq!(share.create("new"), Err(EROFS));
    assert_eq!(share.ask(op::UNLINK, ROOT, &name("f")), Err(EROFS));
    assert_eq!(fs::read_to_string(share.path("f")).unwrap(), "there");
}

/// Seconds that names and attributes hold, pages past the guest's cache (1) or kept when a file is opened (2), the
/// same for directories with the cache of what is in them (8), and READDIRPLUS.
#[test]
fn each_way_to_cache_tells_the_guest_what_it_may_keep() {
    let day = 86400;
    for (policy, valid, file, folder, plus) in [
        ("never", 0, 1, 0, false),
        ("metadata", day, 1, 2 | 8, true),
        ("auto", 1, 0, 0, true),
        ("always", day, 2, 2 | 8, true),
    ] {
        for older in [false, true] {
            let option = format!("cache={}", if policy == "never" { "none" } else { policy });
            let more = if older { ["-o", &option] } else { ["--cache", policy] };
            let (mut share, negotiated) = Share::mount(&more);
            assert_eq!(negotiated & flag::DO_READDIRPLUS != 0, plus, "{policy}");
            fs::write(share.path("f"), "").unwrap();
            let found = share.lookup("f").unwrap();
            let held = [entry::NAME_VALID, entry::ATTRIBUTES_VALID].map(|at| u64_at(&found, at));
            assert_eq!(held, [valid; 2], "{policy}");
            assert_eq!(share.open(u64_at(&found, 0), 0).unwrap().1, file, "{policy}");
            let opened = share.ask(op::OPENDIR, ROOT, &u32s(&[0, 0])).unwrap();
            assert_eq!(u32_at(&opened, 8), folder, "{policy}");
        }
    }
    let (_, negotiated) = Share::mount(&["--no-readdirplus"]);
    assert_eq!(negotiated & flag::DO_READDIRPLUS, 0);
}

#[test]
fn bits_that_only_some_guests_want_are_offered_where_they_are_asked_for() {
    for (option, bit) in
        [("--allow-mmap", flag::DIRECT_IO_ALLOW_MMAP), ("--killpriv-v2", flag::HANDLE_KILLPRIV_V2)]
    {
        assert_eq!(Share::mount(&[option]).1 & bit, bit, "{option}");
        assert_eq!(Share::mount(&[]).1 & bit, 0, "{option}");
    }
    const DIRECT: u32 = 0o40_000;
    const NOATIME: u32 = 0o1_000_000;
    for (more, kept) in [
        (&[][..], 0),
        (&["--allow-direct-io"], DIRECT),
        (&["-o", "allow_direct_io"], DIRECT),
        (&["--preserve-noatime"], NOATIME),
    ] {
        let (mut share, _) = Share::mount(more);
        fs::write(share.path("f"), "").unwrap();
        let node = u64_at(&share.lookup("f").unwrap(), 0);
        if share.open(node, DIRECT | NOATIME) == Err(EINVAL) && kept == DIRECT {
            eprintln!("skipped: the file system below has no O_DIRECT");
            continue;
        }
        let flags: Vec<_> =
            share.flags_of("f").into_iter().map(|flags| flags & (DIRECT | NOATIME)).collect();
        assert_eq!(flags, [kept], "{more:?}");
    }
}

/// As libvirt starts it: a listening socket by number, everything else as `-o`.
#[test]
fn the_line_that_libvirt_writes_is_understood() {
    let folder = folder();
    let listener = UnixListener::bind(folder.path().join("s")).unwrap();
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
    let mode = if rustix::process::geteuid().is_root() { "chroot" } else { "none" };
    let source = folder.path().join("share");
    let mut program = Command::new(env!("CARGO_BIN_EXE_outboard"));
    program.arg("fs").arg(format!("--fd={}", listener.as_raw_fd()));
    program.arg("-o").arg(format!("source={},cache=always,sandbox={mode}", source.display()));
    program.args(["-o", "xattr,no_flock,no_posix_lock", "--thread-pool-size=2"]);
    let mut share = Share::run(program, folder);
    drop(listener);
    share.init(flag::ALL).unwrap();
    let made = share.create("f").unwrap();
    let (node, handle) = (u64_at(&made, 0), u64_at(&made, entry::HANDLE));
    assert_eq!(u64_at(&made, entry::NAME_VALID), 86400, "cache=always");
    share.write(node, handle, 0, b"through libvirt").unwrap();
    assert_eq!(fs::read_to_string(share.path("f")).unwrap(), "through libvirt");
    assert_ne!(share.set_xattr(node, "user.colour", b"green"), Err(ENOSYS), "xattr");
    let root = fs::read_link(format!("/proc/{}/root", share.program.0.id())).unwrap();
    assert_eq!(root == source, mode == "chroot", "{}", root.display());
}
