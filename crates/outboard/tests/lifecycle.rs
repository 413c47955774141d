//! The life-cycle of contract §4 in full: a device of sixteen queues in a process of its own
//! (`examples/keeper.rs`), two of them activated, put to sleep, saved to a file, restored in a second
//! process and woken; with and without a back-end channel, requests served and answers right before
//! and after each step, every message kept as a transcript. `BLESS=1` writes the transcripts anew.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use outboard::protocol::ProtocolFeatures;
use outboard_frontend::channel::{ChannelEvent, ChannelThread, SharedObjects};
use outboard_frontend::transcript::Transcript;
use outboard_frontend::{
    Buffer, Connection, QueueSetup, SharedMemory, Virtqueue, Vmm, VmmSnapshot, Wanted,
};

const PATIENCE: Duration = Duration::from_secs(20);
const QUEUES: [QueueSetup; 2] = [
    QueueSetup { index: 0, size: 64, indirect: 0 },
    QueueSetup { index: 1, size: 16, indirect: 0 },
];

/// The example's process.
struct Device {
    child: Child,
    folder: tempfile::TempDir,
}

impl Device {
    fn start() -> Self {
        let tests = std::env::current_exe().unwrap();
        let built = tests.parent().and_then(Path::parent).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("keeper.sock");
        let child = Command::new(built.join("examples/keeper")).arg(socket).spawn().unwrap();
        Self { child, folder }
    }

    fn connect(&self, transcript: &Transcript) -> Connection {
        let socket = self.folder.path().join("keeper.sock");
        let mut connection = Connection::connect_patiently(&socket, PATIENCE, PATIENCE).unwrap();
        connection.record(transcript.clone());
        connection
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A front-end of that device.
struct Rig {
    vmm: Vmm,
    queues: Vec<Virtqueue>,
    channel: Option<ChannelThread>,
    data: Buffer,
    transcript: Transcript,
}

impl Rig {
    /// Step 1; with a channel or without.
    fn new(device: &Device, transcript: &Transcript, with_channel: bool) -> Self {
        let mut wanted = Wanted::default();
        wanted.protocol -= ProtocolFeatures::CONFIGURE_MEM_SLOTS;
        if with_channel {
            wanted.protocol |= ProtocolFeatures::BACKEND_REQ;
        }
        let mut vmm = Vmm::new(device.connect(transcript), wanted).unwrap();
        let channel =
            with_channel.then(|| vmm.open_channel(SharedObjects::new()).unwrap().spawn().unwrap());
        let memory = SharedMemory::with_size(1 << 20).unwrap();
        let data = memory.allocate(8192, 4096).unwrap();
        vmm.share_memory(memory).unwrap();
        Self { vmm, queues: Vec::new(), channel, data, transcript: transcript.clone() }
    }

    /// One line on a queue; the answer.
    fn say(&mut self, queue: usize, line: &str) -> String {
        let queue = &mut self.queues[queue];
        let guest = self.data.guest();
        let length = u32::try_from(line.len()).unwrap();
        self.data.write(0, line.as_bytes()).unwrap();
        assert!(queue.add(&[(guest, length)], &[(guest + 4096, 64)], 5).unwrap());
        queue.kick().unwrap();
        assert!(queue.wait(PATIENCE).unwrap(), "no answer to {line:?}");
        let (token, written) = queue.pop().unwrap().unwrap();
        assert_eq!(token, 5);
        let mut answer = vec![0; written as usize];
        self.data.read(4096, &mut answer).unwrap();
        String::from_utf8(answer).unwrap()
    }

    /// Requests on both queues; the device keeps `text` from here on and says so on the channel of
    /// the moment.
    fn serve(&mut self, kept: &str, text: &str) {
        assert_eq!(self.say(0, "what?"), kept);
        assert_eq!(self.say(1, "and you?"), kept);
        assert_eq!(self.say(1, &format!("keep {text}")), text);
        if let Some(channel) = &mut self.channel {
            let event = channel.next_event(PATIENCE).unwrap();
            assert!(matches!(event, Some(ChannelEvent::ConfigChanged)), "{event:?}");
            self.transcript.note("the configuration has changed");
        }
        let config = self.vmm.read_config(0, 16).unwrap();
        assert!(config.starts_with(text.as_bytes()) && config.len() == 16);
        assert_eq!(self.say(0, "and now?"), text);
    }

    fn activate(&mut self) {
        self.queues = self.vmm.activate(&QUEUES).unwrap();
    }
}

/// Whether PAGEFAULT is offered depends on the machine.
fn portable(text: &str) -> String {
    const OFFER: &str = "< GET_PROTOCOL_FEATURES 0x";
    let mut lines = String::new();
    for line in text.lines() {
        let bits = line.strip_prefix(OFFER).map(|bits| u64::from_str_radix(bits, 16).unwrap());
        match bits {
            Some(bits) => {
                let bits = bits & !ProtocolFeatures::PAGEFAULT.bits();
                lines.push_str(&format!("{OFFER}{bits:x}\n"));
            }
            None => lines.extend([line, "\n"]),
        }
    }
    lines
}

fn keep(name: &str, transcript: &Transcript) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/transcripts").join(name);
    let text = portable(&transcript.text());
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    for (number, (kept, now)) in kept.lines().zip(text.lines()).enumerate() {
        assert_eq!(kept, now, "{name}, line {}", number + 1);
    }
    assert_eq!(kept.lines().count(), text.lines().count(), "{name}: number of lines");
}

/// Steps 1 to 4; the snapshot is left in a file.
fn first_process(transcript: &Transcript, with_channel: bool, file: &Path) {
    let device = Device::start();
    transcript.note("1. negotiate, read the configuration");
    let mut rig = Rig::new(&device, transcript, with_channel);
    assert_eq!(rig.vmm.read_config(0, 16).unwrap(), [0; 16]);
    transcript.note("2. activate two of sixteen queues");
    rig.activate();
    rig.serve("", "one");
    transcript.note("3. reset; activate again");
    let queues = std::mem::take(&mut rig.queues);
    rig.vmm.reset(queues).unwrap();
    rig.activate();
    rig.serve("one", "two");
    transcript.note("4. sleep; snapshot");
    let bases = rig.vmm.sleep().unwrap().unwrap();
    assert_eq!(bases, [(0, 2), (1, 2)]);
    let snapshot = rig.vmm.snapshot().unwrap();
    std::fs::write(file, snapshot.to_bytes()).unwrap();
    transcript.note("4. wake");
    rig.vmm.wake().unwrap();
    rig.serve("two", "three");
    assert_eq!(
        rig.vmm.snapshot().unwrap_err().to_string().split(':').next(),
        Some("queues are active")
    );
    transcript.note("4. sleep; snapshot once more; disconnect");
    rig.vmm.sleep().unwrap().unwrap();
    let snapshot = rig.vmm.snapshot().unwrap();
    std::fs::write(file, snapshot.to_bytes()).unwrap();
}

/// Step 5, against a new process.
fn second_process(transcript: &Transcript, with_channel: bool, file: &Path) {
    let device = Device::start();
    transcript.note("5. a new process: connect; sleep answers None");
    let mut rig = Rig::new(&device, transcript, with_channel);
    assert_eq!(rig.vmm.sleep().unwrap(), None);
    transcript.note("5. restore");
    let snapshot = VmmSnapshot::parse(&std::fs::read(file).unwrap()).unwrap();
    assert_eq!(snapshot.queues.iter().map(|(setup, _)| *setup).collect::<Vec<_>>(), QUEUES);
    rig.queues = rig.vmm.restore(&snapshot).unwrap();
    assert_eq!(rig.vmm.read_config(0, 5).unwrap(), b"three");
    transcript.note("5. wake");
    rig.vmm.wake().unwrap();
    rig.serve("three", "four");
    transcript.note("5. and on: sleep, wake, reset, activate; disconnect");
    assert_eq!(rig.vmm.sleep().unwrap().unwrap(), [(0, 6), (1, 6)]);
    rig.vmm.wake().unwrap();
    rig.serve("four", "five");
    let queues = std::mem::take(&mut rig.queues);
    rig.vmm.reset(queues).unwrap();
    rig.activate();
    rig.serve("five", "six");
}

fn life_cycle(name: &str, with_channel: bool) {
    let folder = tempfile::tempdir().unwrap();
    let file: PathBuf = folder.path().join("snapshot");
    let transcript = Transcript::new();
    first_process(&transcript, with_channel, &file);
    second_process(&transcript, with_channel, &file);
    keep(name, &transcript);
}

#[test]
fn the_whole_life_cycle_without_a_channel_is_as_kept() {
    life_cycle("lifecycle.txt", false);
}

#[test]
fn the_whole_life_cycle_with_a_channel_is_as_kept() {
    life_cycle("lifecycle-channel.txt", true);
}

#[test]
fn a_device_that_refuses_a_snapshot_can_be_used_without_it() {
    let device = Device::start();
    let transcript = Transcript::new();
    let mut rig = Rig::new(&device, &transcript, false);
    let features = rig.vmm.features();
    let bad = VmmSnapshot { features, queues: Vec::new(), state: b"nothing of the kind".to_vec() };
    let refused = rig.vmm.restore(&bad).unwrap_err().to_string();
    assert_eq!(refused, "the back-end refused CHECK_DEVICE_STATE with 0x1");
    let more = VmmSnapshot { features: features | 1 << 60, ..bad };
    let refused = rig.vmm.restore(&more).unwrap_err().to_string();
    assert!(refused.ends_with("the back-end does not offer 0x1000000000000000"), "{refused}");
    rig.activate();
    rig.serve("", "fresh");
}
