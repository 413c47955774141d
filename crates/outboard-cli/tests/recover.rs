//! `outboard fs` that is killed and started again with its recovery file, under a front-end that connects anew: open
//! files, nodes and the requests under way (the in-flight region) go on.
//!
//! `OUTBOARD_ROUNDS=1000` kills it so many times under load.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]
#![expect(clippy::indexing_slicing, reason = "tests know their sizes")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use outboard_frontend::{Buffer, Connection, QueueSetup, SharedMemory, Virtqueue, Vmm, Wanted};

const PATIENCE: Duration = Duration::from_secs(60);
const ROOT: u64 = 1;
/// Requests that are under way at once; each has so many bytes of the arena, half of them for its reply.
const DEPTH: u64 = 32;
const SLOT: u64 = 8192;

const ENOENT: i32 = 2;
const ESTALE: i32 = 116;

mod op {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const CREATE: u32 = 35;
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A directory, the program that shares it, and a front-end that has mounted it.
struct Bench {
    folder: tempfile::TempDir,
    program: Option<Killed>,
    notes: String,
    vmm: Vmm,
    queue: Virtqueue,
    memory: SharedMemory,
    arena: Buffer,
    unique: u64,
}

/// A request: operation, node, what follows the header, and room behind the reply's header.
struct Asked(u32, u64, Vec<u8>, u32);

type Said = Result<Vec<u8>, i32>;

fn u32s(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn u64s(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn name(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

fn create(parent: u64, entry: &str, flags: u32) -> Asked {
    // O_RDWR | O_CREAT | O_EXCL
    Asked(op::CREATE, parent, [u32s(&[0o302 | flags, 0o644, 0, 0]), name(entry)].concat(), 144)
}

fn write(file: (u64, u64), offset: u64, flags: u32, bytes: &[u8]) -> Asked {
    let size = u32::try_from(bytes.len()).unwrap();
    let head = [u64s(&[file.1, offset]), u32s(&[size, 0]), u64s(&[0]), u32s(&[flags, 0])].concat();
    Asked(op::WRITE, file.0, [&head, bytes].concat(), 8)
}

fn start(folder: &Path, notes: &str, take_over: bool) -> Killed {
    let mut program = Command::new(env!("CARGO_BIN_EXE_outboard"));
    program.arg("fs").arg("--shared-dir").arg(folder.join("share"));
    program.arg("--recovery-file").arg(folder.join(notes));
    if take_over {
        program.arg("--take-over").arg(folder.join("control"));
    } else {
        program.arg("--socket-path").arg(folder.join("s"));
        program.arg("--control").arg(folder.join("control"));
    }
    Killed(program.env("OUTBOARD_LOG", "error").stdin(Stdio::null()).spawn().unwrap())
}

impl Bench {
    fn mount() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("share")).unwrap();
        let program = Some(start(folder.path(), "notes", false));
        let connection =
            Connection::connect_patiently(folder.path().join("s"), PATIENCE, PATIENCE).unwrap();
        let mut vmm = Vmm::new(connection, Wanted::default().with_inflight()).unwrap();
        let memory = SharedMemory::with_size(16 << 20).unwrap();
        let arena = memory.allocate(usize::try_from(DEPTH * SLOT).unwrap(), 4096).unwrap();
        vmm.share_memory(memory.clone()).unwrap();
        let setup = |index| QueueSetup { index, size: 128, indirect: 0 };
        let queue = vmm.activate(&[setup(0), setup(1)]).unwrap().remove(1);
        let notes = "notes".to_owned();
        let mut bench = Self { folder, program, notes, vmm, queue, memory, arena, unique: 0 };
        bench.ask(Asked(op::INIT, ROOT, u32s(&[7, 38, 65536, 0]), 64)).unwrap();
        bench
    }

    fn share(&self) -> PathBuf {
        self.folder.path().join("share")
    }

    /// The program is killed; another one takes its place.
    fn kill(&mut self) {
        drop(self.program.take());
        self.program = Some(start(self.folder.path(), &self.notes, false));
        let socket = self.folder.path().join("s");
        let connection = Connection::connect_patiently(socket, PATIENCE, PATIENCE).unwrap();
        self.vmm.reconnect(connection).unwrap();
    }

    /// Another program takes everything over, with another file for its notes.
    fn upgrade(&mut self) {
        self.notes += "-new";
        let mut newer = start(self.folder.path(), &self.notes, true);
        let mut old = self.program.take().unwrap();
        while old.0.try_wait().unwrap().is_none() {
            assert_eq!(newer.0.try_wait().unwrap(), None, "it takes over and stays");
            std::thread::sleep(Duration::from_millis(5)); // nothing tells of either
        }
        self.program = Some(newer);
    }

    fn ask(&mut self, asked: Asked) -> Said {
        self.ask_all(vec![asked], None).remove(0)
    }

    /// Asks all of it at once; after so many replies the program is killed.
    fn ask_all(&mut self, all: Vec<Asked>, kill: Option<usize>) -> Vec<Said> {
        let count = all.len();
        for (slot, Asked(operation, node, body, room)) in (0..).zip(all) {
            self.unique += 1;
            let length = u32::try_from(40 + body.len()).unwrap();
            let ids = u64s(&[self.unique, node]);
            let head = [u32s(&[length, operation]), ids, u32s(&[0, 0, 1, 0])].concat();
            let at = self.arena.guest() + slot * SLOT;
            self.memory.view().write(at, &[head, body].concat()).unwrap();
            let reply = [(at + SLOT / 2, 16 + room)];
            assert!(self.queue.add(&[(at, length)], &reply, slot).unwrap());
        }
        self.queue.kick().unwrap();
        let mut said = BTreeMap::new();
        let until = Instant::now() + PATIENCE;
        while said.len() < count {
            if kill == Some(said.len()) {
                self.kill();
            }
            while let Some((slot, used)) = self.queue.pop().unwrap() {
                said.insert(slot, self.reply(slot, used));
                if kill == Some(said.len()) && said.len() < count {
                    self.kill();
                }
            }
            assert!(Instant::now() < until, "{} of {count} replies", said.len());
            if said.len() < count {
                self.queue.wait(Duration::from_millis(100)).unwrap();
            }
        }
        said.into_values().collect()
    }

    fn reply(&self, slot: u64, used: u32) -> Said {
        let mut bytes = vec![0; used as usize];
        let at = self.arena.guest() + slot * SLOT + SLOT / 2;
        self.memory.view().read(at, &mut bytes).unwrap();
        match i32::from_le_bytes(bytes[4..8].try_into().unwrap()) {
            0 => Ok(bytes[16..].to_vec()),
            error => Err(-error),
        }
    }

    fn create(&mut self, parent: u64, entry: &str) -> (u64, u64) {
        let made = self.ask(create(parent, entry, 0)).unwrap();
        (u64_at(&made, 0), u64_at(&made, 128))
    }

    fn read(&mut self, file: (u64, u64)) -> Said {
        let body = [u64s(&[file.1, 0]), u32s(&[64, 0]), u64s(&[0]), u32s(&[0, 0])].concat();
        self.ask(Asked(op::READ, file.0, body, 64))
    }

    fn lookup(&mut self, parent: u64, entry: &str) -> Result<u64, i32> {
        self.ask(Asked(op::LOOKUP, parent, name(entry), 128)).map(|entry| u64_at(&entry, 0))
    }
}

#[test]
fn open_files_and_nodes_go_on_in_the_process_that_follows_a_killed_one() {
    let mut bench = Bench::mount();
    let made = bench.ask(Asked(op::MKDIR, ROOT, [u32s(&[0o755, 0]), name("d")].concat(), 128));
    let folder = u64_at(&made.unwrap(), 0);
    let kept = bench.create(folder, "kept");
    bench.ask(write(kept, 0, 0, b"what was written")).unwrap();
    let moved = bench.create(folder, "old");
    bench.ask(write(moved, 0, 0, b"moved")).unwrap();
    let body = [u64s(&[ROOT]), name("old"), name("new")].concat();
    bench.ask(Asked(op::RENAME, folder, body, 0)).unwrap();
    let swapped = bench.create(ROOT, "swapped");
    let gone = bench.create(ROOT, "gone");
    fs::remove_file(bench.share().join("swapped")).unwrap();
    fs::write(bench.share().join("swapped"), "another file").unwrap();
    bench.ask(Asked(op::UNLINK, ROOT, name("gone"), 0)).unwrap();
    for round in 0..3 {
        bench.kill();
        assert_eq!(bench.read(kept).unwrap(), b"what was written", "round {round}");
        assert_eq!(bench.read(moved).unwrap(), b"moved");
        assert_eq!(bench.lookup(folder, "kept"), Ok(kept.0), "it is the same node");
        assert_eq!(bench.lookup(ROOT, "new"), Ok(moved.0));
        assert_eq!(bench.lookup(folder, "old"), Err(ENOENT));
    }
    // What is not the same file any more, and what has no name: stale, and looked up anew it is another one.
    let attributes = |node| Asked(op::GETATTR, node, [u32s(&[0, 0]), u64s(&[0])].concat(), 104);
    for lost in [swapped, gone] {
        assert!(bench.read(lost).is_err());
        assert_eq!(bench.ask(attributes(lost.0)), Err(ESTALE));
    }
    assert_ne!(bench.lookup(ROOT, "swapped").unwrap(), swapped.0);
    bench.ask(write(kept, 0, 0, b"WHAT")).unwrap();
    let release = [u64s(&[kept.1]), u32s(&[0, 0]), u64s(&[0])].concat();
    bench.ask(Asked(op::RELEASE, kept.0, release, 0)).unwrap();
    bench.kill();
    assert!(bench.read(kept).is_err(), "it was closed");
    assert_eq!(fs::read(bench.share().join("d/kept")).unwrap(), b"WHAT was written");
}

#[test]
fn what_was_handed_over_is_noted_by_the_process_that_has_it_now() {
    let mut bench = Bench::mount();
    let before = bench.create(ROOT, "before");
    bench.ask(write(before, 0, 0, b"before")).unwrap();
    for round in 0..3 {
        bench.upgrade();
        let after = bench.create(ROOT, &format!("after-{round}"));
        bench.ask(write(after, 0, 0, b"after")).unwrap();
        bench.kill();
        assert_eq!(bench.read(before).unwrap(), b"before", "round {round}");
        assert_eq!(bench.read(after).unwrap(), b"after");
        assert_eq!(bench.lookup(ROOT, "before"), Ok(before.0), "it is the same node");
    }
}

fn rounds() -> usize {
    std::env::var("OUTBOARD_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(8)
}

/// One round: everything that is wrong when it is simply done twice. Directories, files made with O_EXCL, entries
/// that are removed and moved, lines appended to a log.
fn work(round: usize, log: (u64, u64), mut end: u64) -> (Vec<Asked>, Vec<String>) {
    const APPEND: u32 = 0o2000;
    let (mut all, mut lines) = (Vec::new(), Vec::new());
    for part in 0..4 {
        let entry = format!("{round}-{part}");
        let directory = [u32s(&[0o755, 0]), name(&format!("d{entry}"))].concat();
        all.push(Asked(op::MKDIR, ROOT, directory, 128));
        all.push(create(ROOT, &format!("f{entry}"), 0));
        let line = format!("line {entry}\n");
        all.push(write(log, end, APPEND, line.as_bytes()));
        end += line.len() as u64;
        lines.push(line);
        let body = [u64s(&[ROOT]), name(&format!("f{entry}")), name(&format!("m{entry}"))];
        all.push(Asked(op::RENAME, ROOT, body.concat(), 0));
        all.push(create(ROOT, &format!("g{entry}"), 0));
        all.push(Asked(op::UNLINK, ROOT, name(&format!("g{entry}")), 0));
    }
    (all, lines)
}

#[test]
fn requests_that_a_killed_process_had_are_each_carried_out_once() {
    let mut bench = Bench::mount();
    let log = bench.create(ROOT, "log");
    let mut expected = String::new();
    for round in 0..rounds() {
        let (all, lines) = work(round, log, expected.len() as u64);
        let count = all.len();
        let said = bench.ask_all(all, Some((round * 7) % count));
        for (at, said) in said.into_iter().enumerate() {
            assert!(said.is_ok(), "round {round}, request {at}: {said:?}");
        }
        expected.extend(lines);
        let written = fs::read_to_string(bench.share().join("log")).unwrap();
        assert_eq!(written, expected, "round {round}");
    }
    let mut found: Vec<_> = fs::read_dir(bench.share())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    let made = (0..rounds()).flat_map(|round| (0..4).map(move |part| format!("{round}-{part}")));
    let mut right: Vec<_> = made.flat_map(|at| [format!("d{at}"), format!("m{at}")]).collect();
    right.push("log".to_owned());
    right.sort();
    assert_eq!(found, right);
}
