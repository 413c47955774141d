//! Device state through the handler: saved, loaded, refused, given up (contract §1 and §2; cases
//! A79, A80, A82, C30, D-19).

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::{Echo, FEATURES, Finished, PATIENCE, PROTOCOL, Ring, open_descriptors, serve};
use outboard::protocol::{ProtocolFeatures, StateDirection, virtio};
use outboard::{
    DeviceRequestHandler, DeviceState, Error, HandlerOptions, MakeWorker, Model, QueueSpec,
    STATE_HEADER, Saved, Snapshot, WorkerDevice,
};
use outboard_frontend::{Connection, SharedMemory};

/// One test at a time: one of them counts this process's descriptors.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// An echo device that keeps some bytes; it takes versions up to 3, and no text that begins with
/// `no`. It is slow to make its state for as long as somebody holds `busy`.
#[derive(Clone, Default)]
struct Keeper {
    kept: Arc<Mutex<Vec<u8>>>,
    busy: Arc<Mutex<()>>,
    queues: u16,
}

impl Model for Keeper {
    type Worker = Echo;

    fn queues(&self) -> Vec<QueueSpec> {
        vec![QueueSpec::new("words", 256); usize::from(self.queues.max(2))]
    }

    fn make_worker(&self) -> MakeWorker<Echo> {
        Arc::new(|_| Ok(Echo))
    }

    fn features(&self) -> u64 {
        0b11
    }

    fn device_type(&self) -> String {
        "keeper".to_owned()
    }

    fn snapshot(&mut self) -> Result<Snapshot, Error> {
        let kept = self.kept.lock().unwrap().clone();
        if kept.starts_with(b"fail") {
            return Err(Error::refused("nothing to say"));
        }
        let busy = Arc::clone(&self.busy);
        Ok(Snapshot::later(3, move || {
            drop(busy.lock());
            if kept.starts_with(b"late") { Err(Error::refused("too late")) } else { Ok(kept) }
        }))
    }

    fn restore(&mut self, saved: Saved<'_>) -> Result<(), Error> {
        saved.up_to(3)?;
        if saved.bytes().starts_with(b"no") {
            return Err(Error::refused("not that"));
        }
        *self.kept.lock().unwrap() = saved.bytes().to_vec();
        Ok(())
    }
}

/// A keeper and its front-end.
struct Rig {
    front: Connection,
    memory: SharedMemory,
    model: Keeper,
    thread: JoinHandle<Finished<WorkerDevice<Keeper>>>,
}

impl Rig {
    fn connected(model: &Keeper, options: HandlerOptions) -> Self {
        let device = WorkerDevice::new(model.clone()).unwrap();
        let (ours, thread) = serve(DeviceRequestHandler::new(device, options).unwrap());
        let mut front = Connection::from_fd(ours.into(), PATIENCE).unwrap();
        front.set_owner().unwrap();
        front.get_features().unwrap();
        front.get_protocol_features().unwrap();
        front.set_protocol_features(PROTOCOL | ProtocolFeatures::DEVICE_STATE).unwrap();
        let memory = SharedMemory::with_size(1 << 20).unwrap();
        Self { front, memory, model: model.clone(), thread }
    }

    /// A keeper of these bytes, with features set.
    fn with(kept: &[u8]) -> Self {
        let model = Keeper::default();
        *model.kept.lock().unwrap() = kept.to_vec();
        let mut rig = Self::connected(&model, HandlerOptions::default());
        rig.front.set_features(FEATURES).unwrap();
        rig
    }

    /// As `with`, and impatient.
    fn hasty(kept: &[u8], milliseconds: u64) -> Self {
        Self::within(kept, Duration::from_millis(milliseconds))
    }

    fn within(kept: &[u8], state_deadline: Duration) -> Self {
        let model = Keeper::default();
        *model.kept.lock().unwrap() = kept.to_vec();
        let options = HandlerOptions { state_deadline, ..HandlerOptions::default() };
        let mut rig = Self::connected(&model, options);
        rig.front.set_features(FEATURES).unwrap();
        rig
    }

    fn kept(&self) -> Vec<u8> {
        self.model.kept.lock().unwrap().clone()
    }

    /// Ring 0, kicked and enabled.
    fn start(&mut self) -> Ring {
        self.front.set_mem_table(self.memory.regions()).unwrap();
        let ring = Ring::new(&self.memory, 0, FEATURES);
        self.front.set_vring_num(0, common::SIZE).unwrap();
        self.front.set_vring_addr(0, &ring.layout).unwrap();
        self.front.set_vring_base(0, 0).unwrap();
        self.front.set_vring_call(0, &ring.call).unwrap();
        self.front.set_vring_kick(0, &ring.kick).unwrap();
        self.front.set_vring_enable(0, true).unwrap();
        ring
    }

    /// The device runs, stops, saves and loads: whatever was refused before has done no harm.
    fn is_usable(&mut self) {
        let mut ring = self.start();
        ring.round(b"still here");
        self.front.get_vring_base(0).unwrap();
        let state = self.front.save_state().unwrap();
        self.front.load_state(&state).unwrap();
    }

    /// The transfer failed, and the device says so.
    fn is_refused(&mut self) {
        let said = self.front.check_device_state().unwrap_err();
        assert!(matches!(said, outboard_frontend::Error::Refused { code: 1, .. }), "{said}");
    }

    fn transfer(&mut self, direction: StateDirection, fd: impl Into<OwnedFd>) {
        assert!(self.front.set_device_state_fd(direction, fd.into()).unwrap().is_none());
    }

    fn leave(self) {
        drop(self.front);
        self.thread.join().unwrap().0.unwrap();
    }
}

/// The state of a keeper of these bytes, with the features of this file's front-end.
fn state_of(kept: &[u8]) -> DeviceState {
    DeviceState {
        device_type: "keeper".to_owned(),
        queues: 2,
        features: Some(FEATURES & !virtio::PROTOCOL_FEATURES),
        protocol_features: 0,
        version: 3,
        value: kept.to_vec(),
    }
}

#[test]
fn d19_a_state_goes_from_one_device_to_another_and_says_what_was_negotiated() {
    let _alone = alone();
    let mut source = Rig::with(b"pearls");
    let bytes = source.front.save_state().unwrap();
    let state = DeviceState::parse(&bytes, 100).unwrap();
    let protocol_features = (PROTOCOL | ProtocolFeatures::DEVICE_STATE).bits();
    assert_eq!(state, DeviceState { protocol_features, ..state_of(b"pearls") });
    let mut target = Rig::with(b"");
    target.front.load_state(&bytes).unwrap();
    assert_eq!(target.kept(), b"pearls");
    target.is_usable();
    source.leave();
    target.leave();
}

/// An author who wants to wait for ever says so.
#[test]
fn a_state_may_take_its_time_without_end() {
    let mut rig = Rig::within(b"slow", Duration::MAX);
    let state = rig.front.save_state().unwrap();
    rig.front.load_state(&state).unwrap();
    assert_eq!(rig.kept(), b"slow");
    rig.is_usable();
    rig.leave();
}

#[test]
fn a_device_that_says_nothing_of_state_is_saved_and_loaded_all_the_same() {
    let _alone = alone();
    let connect = || {
        let queues = [QueueSpec::new("requests", 256)];
        let device = WorkerDevice::plain(&queues, |_| Ok(Echo)).unwrap();
        let options = HandlerOptions::default();
        let (ours, thread) = serve(DeviceRequestHandler::new(device, options).unwrap());
        let mut front = Connection::from_fd(ours.into(), PATIENCE).unwrap();
        front.get_features().unwrap();
        front.get_protocol_features().unwrap();
        front.set_protocol_features(PROTOCOL | ProtocolFeatures::DEVICE_STATE).unwrap();
        front.set_features(FEATURES).unwrap();
        (front, thread)
    };
    let (mut source, first) = connect();
    let bytes = source.save_state().unwrap();
    assert_eq!(bytes.len(), STATE_HEADER);
    assert_eq!(DeviceState::parse(&bytes, 0).unwrap().device_type, "requests");
    let (mut target, second) = connect();
    target.load_state(&bytes).unwrap();
    let more = DeviceState { version: 1, ..DeviceState::parse(&bytes, 0).unwrap() };
    target.load_state(&more.to_bytes()).unwrap_err();
    drop((source, target));
    first.join().unwrap().0.unwrap();
    second.join().unwrap().0.unwrap();
}

#[test]
fn a_state_is_saved_again_and_after_saves_that_failed() {
    let _alone = alone();
    let mut rig = Rig::with(b"once");
    let first = rig.front.save_state().unwrap();
    assert_eq!(rig.front.save_state().unwrap(), first);
    // Nobody reads.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    rig.transfer(StateDirection::Save, writer);
    rig.front.check_device_state().unwrap_err();
    // The device cannot, now or on the transfer's thread.
    for word in [&b"fail"[..], b"late"] {
        *rig.model.kept.lock().unwrap() = word.to_vec();
        rig.front.save_state().unwrap_err();
    }
    *rig.model.kept.lock().unwrap() = b"twice".to_vec();
    let state = rig.front.save_state().unwrap();
    assert_eq!(DeviceState::parse(&state, 100).unwrap().value, b"twice");
    rig.is_usable();
    rig.leave();
}

/// Case C30.
#[test]
fn a_full_disk_under_the_state_is_an_error_and_the_device_runs_on() {
    let _alone = alone();
    let mut rig = Rig::with(b"much");
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    rig.transfer(StateDirection::Save, full);
    rig.front.check_device_state().unwrap_err();
    rig.is_usable();
    rig.leave();
}

#[test]
fn a_file_serves_as_well_as_a_pipe_and_a_socket() {
    let _alone = alone();
    let mut rig = Rig::with(b"in a file");
    let mut file = tempfile::tempfile().unwrap();
    rig.transfer(StateDirection::Save, file.try_clone().unwrap());
    rig.front.check_device_state().unwrap();
    file.rewind().unwrap();
    *rig.model.kept.lock().unwrap() = Vec::new();
    rig.transfer(StateDirection::Load, file);
    rig.front.check_device_state().unwrap();
    assert_eq!(rig.kept(), b"in a file");
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    rig.transfer(StateDirection::Load, theirs);
    ours.write_all(&state_of(b"over a socket").to_bytes()).unwrap();
    drop(ours);
    rig.front.check_device_state().unwrap();
    assert_eq!(rig.kept(), b"over a socket");
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    rig.transfer(StateDirection::Save, theirs);
    let mut bytes = Vec::new();
    ours.read_to_end(&mut bytes).unwrap();
    rig.front.check_device_state().unwrap();
    assert_eq!(DeviceState::parse(&bytes, 100).unwrap().value, b"over a socket");
    rig.leave();
}

#[test]
fn a_descriptor_that_cannot_carry_the_state_is_replaced_by_one_of_ours() {
    let _alone = alone();
    let mut rig = Rig::with(b"mine");
    let read_only = File::open("/dev/null").unwrap();
    let ours = rig.front.set_device_state_fd(StateDirection::Save, read_only.into()).unwrap();
    let mut bytes = Vec::new();
    File::from(ours.unwrap()).read_to_end(&mut bytes).unwrap();
    rig.front.check_device_state().unwrap();
    let write_only = OpenOptions::new().write(true).open("/dev/null").unwrap();
    let ours = rig.front.set_device_state_fd(StateDirection::Load, write_only.into()).unwrap();
    *rig.model.kept.lock().unwrap() = Vec::new();
    File::from(ours.unwrap()).write_all(&bytes).unwrap();
    rig.front.check_device_state().unwrap();
    assert_eq!(rig.kept(), b"mine");
    rig.leave();
}

#[test]
fn a_state_goes_over_our_own_pipes_when_the_options_say_so() {
    let _alone = alone();
    let model = Keeper::default();
    *model.kept.lock().unwrap() = vec![7; 1 << 20];
    let options = HandlerOptions { own_state_channel: true, ..HandlerOptions::default() };
    let mut rig = Rig::connected(&model, options);
    let state = rig.front.save_state().unwrap();
    *rig.model.kept.lock().unwrap() = Vec::new();
    rig.front.load_state(&state).unwrap();
    assert_eq!(rig.kept(), vec![7; 1 << 20]);
    rig.leave();
}

/// Case A79.
#[test]
fn no_state_is_transferred_while_a_ring_runs() {
    let _alone = alone();
    let mut rig = Rig::with(b"busy");
    let mut ring = rig.start();
    ring.round(b"one");
    for direction in [StateDirection::Save, StateDirection::Load] {
        let (reader, writer) = std::io::pipe().unwrap();
        let fd: OwnedFd =
            if direction == StateDirection::Save { writer.into() } else { reader.into() };
        let refused = rig.front.set_device_state_fd(direction, fd).unwrap_err();
        assert!(refused.to_string().ends_with("with 0x101"), "{refused}");
    }
    ring.round(b"two");
    rig.leave();
}

/// Case A82.
#[test]
fn an_outcome_is_told_once_and_only_after_a_transfer() {
    let _alone = alone();
    let mut rig = Rig::with(b"told");
    rig.front.check_device_state().unwrap_err();
    rig.front.save_state().unwrap();
    rig.front.check_device_state().unwrap_err();
    rig.leave();
}

/// Case A80.
#[test]
fn r17_states_that_are_cut_foreign_newer_or_of_another_device_are_refused_and_change_nothing() {
    let _alone = alone();
    let mut rig = Rig::with(b"old");
    let good = state_of(b"new");
    let bytes = good.to_bytes();
    let mut bad: Vec<Vec<u8>> = (0..bytes.len()).map(|end| bytes[..end].to_vec()).collect();
    bad.push([&bytes[..], b"x"].concat());
    bad.push(vec![0; 5000]);
    bad.push(vec![0xff; 200_000]);
    let mut newer = bytes.clone();
    newer[8] = 2;
    bad.push(newer);
    let mut vast = bytes.clone();
    vast[72..80].copy_from_slice(&(4u64 << 30).to_le_bytes());
    bad.push(vast);
    let negotiated = good.features.unwrap();
    for other in [
        DeviceState { device_type: "disk".to_owned(), ..good.clone() },
        DeviceState { queues: 3, ..good.clone() },
        DeviceState { version: 4, ..good.clone() },
        DeviceState { value: b"not this".to_vec(), ..good.clone() },
        DeviceState { features: Some(negotiated | 1 << 50), ..good.clone() },
        DeviceState { features: Some(negotiated | 1), ..good.clone() },
        DeviceState { protocol_features: ProtocolFeatures::SHMEM.bits(), ..good.clone() },
    ] {
        bad.push(other.to_bytes());
    }
    for (number, bytes) in bad.iter().enumerate() {
        rig.front.load_state(bytes).unwrap_err();
        assert_eq!(rig.kept(), b"old", "state {number}");
    }
    rig.is_usable();
    rig.front.load_state(&bytes).unwrap();
    assert_eq!(rig.kept(), b"new");
    rig.leave();
}

#[test]
fn a_state_loaded_before_the_features_holds_them_to_itself_until_a_ring_starts() {
    let _alone = alone();
    let mut rig = Rig::connected(&Keeper::default(), HandlerOptions::default());
    rig.front.load_state(&state_of(b"early").to_bytes()).unwrap();
    assert_eq!(rig.kept(), b"early");
    rig.front.set_features(FEATURES | 1).unwrap_err();
    rig.front.set_features(FEATURES).unwrap();
    let mut ring = rig.start();
    ring.round(b"runs");
    rig.front.get_vring_base(0).unwrap();
    rig.front.set_features(FEATURES | 1).unwrap();
    rig.leave();
}

#[test]
fn a_state_of_a_driver_that_chose_no_features_fits_any() {
    let _alone = alone();
    let mut rig = Rig::with(b"");
    rig.front.load_state(&DeviceState { features: None, ..state_of(b"any") }.to_bytes()).unwrap();
    rig.front.set_features(FEATURES | 1).unwrap();
    rig.leave();
}

/// Case A80.
#[test]
fn the_control_socket_answers_while_a_state_comes_and_goes() {
    let _alone = alone();
    let mut rig = Rig::with(&vec![5; 4 << 20]);
    let busy = Arc::clone(&rig.model.busy);
    let hold = busy.lock().unwrap();
    let (mut reader, writer) = std::io::pipe().unwrap();
    rig.transfer(StateDirection::Save, writer);
    rig.front.get_features().unwrap();
    drop(hold);
    rig.front.get_features().unwrap();
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).unwrap();
    rig.front.check_device_state().unwrap();
    let (reader, mut writer) = std::io::pipe().unwrap();
    rig.transfer(StateDirection::Load, reader);
    writer.write_all(&bytes[..100]).unwrap();
    rig.front.get_features().unwrap();
    writer.write_all(&bytes[100..]).unwrap();
    drop(writer);
    rig.front.check_device_state().unwrap();
    rig.leave();
}

/// Case A80.
#[test]
fn a_peer_that_never_ends_or_reads_is_given_up_in_time() {
    let _alone = alone();
    let mut rig = Rig::hasty(&vec![1; 200_000], 500);
    let started = Instant::now();
    let (reader, mut writer) = std::io::pipe().unwrap();
    rig.transfer(StateDirection::Load, reader);
    writer.write_all(&state_of(b"slow").to_bytes()).unwrap();
    rig.is_refused();
    let (_reader, full) = std::io::pipe().unwrap();
    rig.transfer(StateDirection::Save, full);
    rig.is_refused();
    // One byte now and then is no end either.
    let (reader, writer) = UnixStream::pair().unwrap();
    rig.transfer(StateDirection::Load, reader);
    let trickle = std::thread::spawn(move || {
        let bytes = state_of(&[9; 1000]).to_bytes();
        bytes
            .iter()
            .take_while(|byte| {
                std::thread::sleep(Duration::from_millis(5));
                (&writer).write_all(&[**byte]).is_ok()
            })
            .count()
    });
    rig.is_refused();
    assert!(trickle.join().unwrap() < 1000, "our end is closed");
    assert!(started.elapsed() >= Duration::from_millis(1500), "all were waited for");
    assert_eq!(rig.kept(), vec![1; 200_000]);
    rig.is_usable();
    rig.leave();
}

#[test]
fn a_transfer_that_nobody_asks_about_is_replaced_by_the_next() {
    let _alone = alone();
    let mut rig = Rig::with(b"");
    let (reader, _held) = std::io::pipe().unwrap();
    rig.transfer(StateDirection::Load, reader);
    rig.front.load_state(&state_of(b"second").to_bytes()).unwrap();
    assert_eq!(rig.kept(), b"second");
    rig.leave();
}

#[test]
fn a_reset_ends_a_transfer() {
    let _alone = alone();
    let mut rig = Rig::with(b"");
    let (reader, mut held) = std::io::pipe().unwrap();
    rig.transfer(StateDirection::Load, reader);
    rig.front.reset_device().unwrap();
    assert!(held.write_all(b"x").is_err(), "our end is closed");
    rig.front.check_device_state().unwrap_err();
    rig.leave();
}

#[test]
fn a_ring_that_is_kicked_while_a_state_comes_in_starts_after_it() {
    let _alone = alone();
    let mut rig = Rig::with(b"");
    let (reader, mut writer) = std::io::pipe().unwrap();
    rig.transfer(StateDirection::Load, reader);
    let mut ring = rig.start();
    ring.offer(b"early");
    ring.kick();
    assert!(ring.silent_for(Duration::from_millis(50)));
    writer.write_all(&state_of(b"first").to_bytes()).unwrap();
    drop(writer);
    rig.front.check_device_state().unwrap();
    ring.expect(b"early");
    rig.leave();
}

#[test]
fn a_ring_that_starts_while_a_state_is_saved_makes_that_an_old_one() {
    let _alone = alone();
    let mut rig = Rig::with(b"then");
    let (mut reader, writer) = std::io::pipe().unwrap();
    rig.transfer(StateDirection::Save, writer);
    let mut ring = rig.start();
    ring.round(b"goes on");
    reader.read_to_end(&mut Vec::new()).unwrap();
    rig.front.check_device_state().unwrap_err();
    ring.round(b"and on");
    rig.leave();
}

#[test]
fn a_front_end_that_leaves_inside_a_transfer_leaves_nothing_behind() {
    let _alone = alone();
    let visit = |direction| {
        let mut rig = Rig::with(&vec![1; 1 << 20]);
        let (reader, writer) = std::io::pipe().unwrap();
        let (fd, held): (OwnedFd, OwnedFd) = match direction {
            StateDirection::Save => (writer.into(), reader.into()),
            StateDirection::Load => (reader.into(), writer.into()),
        };
        rig.transfer(direction, fd);
        rig.leave();
        drop(held);
    };
    visit(StateDirection::Save);
    let before = open_descriptors();
    for direction in [StateDirection::Save, StateDirection::Load] {
        visit(direction);
    }
    assert_eq!(open_descriptors(), before);
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names =
        tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    assert_eq!(names.filter(|name| name.trim() == "state").count(), 0, "threads of transfers");
}
