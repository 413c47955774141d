//! `examples/everything.rs` in a process of its own, message by message: each row of the table that
//! a device can offer, with an effect that can be seen ([protocol], Shows).

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;
#[expect(dead_code, reason = "the example's main")]
#[path = "../examples/everything.rs"]
mod example;

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{PATIENCE, Ring};
use outboard::protocol::payload::{CryptoSession, Uuid};
use outboard::protocol::{ProtocolFeatures, virtio};
use outboard_frontend::channel::{
    Channel, ChannelEvent, ChannelSetup, ChannelThread, SharedObjects, SharedRegions,
};
use outboard_frontend::transcript::{Direction, Recorder};
use outboard_frontend::{Connection, SharedMemory, Vmm, Wanted};

const MOMENT: Duration = Duration::from_millis(60);

/// The example's process, a front-end with a channel, and its command queue.
struct Rig {
    /// None: the device is in the process of the test.
    child: Option<Child>,
    vmm: Vmm,
    channel: ChannelThread,
    ring: Ring,
    tape: Tape,
    _memory: SharedMemory,
    _folder: tempfile::TempDir,
}

/// The messages that came over the channel, byte for byte.
#[derive(Clone, Default)]
struct Tape(Arc<Mutex<Vec<Vec<u8>>>>);

impl Recorder for Tape {
    fn message(&mut self, _: Direction, _: &[u8], _: usize) {}

    fn channel_message(&mut self, direction: Direction, bytes: &[u8], _: usize) {
        if direction == Direction::In {
            self.0.lock().unwrap().push(bytes.to_vec());
        }
    }
}

/// Examples stand beside the tests' own folder.
fn program() -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let built = tests.parent().and_then(|deps| deps.parent()).unwrap();
    built.join("examples/everything")
}

/// What the command queue's front-end takes.
fn wanted(more: ProtocolFeatures) -> Wanted {
    Wanted {
        features: common::FEATURES | virtio::NET_MTU,
        protocol: ProtocolFeatures::MQ
            | ProtocolFeatures::REPLY_ACK
            | ProtocolFeatures::CONFIG
            | ProtocolFeatures::BACKEND_REQ
            | ProtocolFeatures::BACKEND_SEND_FD
            | ProtocolFeatures::RESET_DEVICE
            | more,
        ..Wanted::default()
    }
}

impl Rig {
    fn start(more: ProtocolFeatures) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("everything.sock");
        let child = Command::new(program()).arg(&socket).spawn().unwrap();
        let connection = Connection::connect_patiently(&socket, PATIENCE, PATIENCE).unwrap();
        let vmm = Vmm::new(connection, wanted(more)).unwrap();
        Self::on(vmm, Some(child), folder, |vmm| vmm.open_channel(SharedObjects::new()).unwrap())
    }

    /// The device in a thread of this process, and a channel that knows that.
    fn inside(more: ProtocolFeatures) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = outboard::Server::from_socket(theirs.into()).unwrap();
        std::thread::spawn(|| server.serve(example::device().unwrap()));
        let connection = Connection::from_fd(ours.into(), PATIENCE).unwrap();
        let vmm = Vmm::new(connection, wanted(more)).unwrap();
        Self::on(vmm, None, tempfile::tempdir().unwrap(), |vmm| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let config = vmm.connection().get_shmem_config().unwrap();
            let setup = ChannelSetup {
                protocol: wanted(more).protocol,
                features: vmm.features(),
                queues: 2,
                regions: SharedRegions::new(&config).unwrap(),
                objects: SharedObjects::new(),
                same_process: true,
                patience: PATIENCE,
            };
            let channel = Channel::new(OwnedFd::from(ours), setup).unwrap();
            vmm.connection().set_backend_req_fd(&theirs).unwrap();
            channel
        })
    }

    fn on(
        mut vmm: Vmm,
        child: Option<Child>,
        folder: tempfile::TempDir,
        open: impl FnOnce(&mut Vmm) -> Channel,
    ) -> Self {
        let mut channel = open(&mut vmm);
        let tape = Tape::default();
        channel.record(tape.clone());
        let channel = channel.spawn().unwrap();
        let memory = SharedMemory::with_size(1 << 20).unwrap();
        let features = vmm.features();
        let front = vmm.connection();
        front.set_features(features).unwrap();
        front.set_mem_table(memory.regions()).unwrap();
        let ring = Ring::new(&memory, 0, features);
        front.set_vring_num(0, common::SIZE).unwrap();
        front.set_vring_addr(0, &ring.layout).unwrap();
        front.set_vring_call(0, &ring.call).unwrap();
        front.set_vring_kick(0, &ring.kick).unwrap();
        front.set_vring_enable(0, true).unwrap();
        Self { child, vmm, channel, ring, tape, _memory: memory, _folder: folder }
    }

    /// One command; its answer.
    fn order(&mut self, text: &str) -> String {
        let ring = &mut self.ring;
        let length = u32::try_from(text.len()).unwrap();
        ring.data.write(0, text.as_bytes()).unwrap();
        let guest = ring.data.guest();
        ring.driver.add(&[(guest, length)], &[(guest + 4096, 256)], 7).unwrap();
        ring.driver.publish();
        ring.kick();
        let mut answer = vec![0; ring.answered() as usize];
        ring.data.read(4096, &mut answer).unwrap();
        String::from_utf8(answer).unwrap()
    }

    fn event(&mut self) -> ChannelEvent {
        self.channel.next_event(PATIENCE).unwrap().unwrap()
    }

    fn front(&mut self) -> &mut Connection {
        self.vmm.connection()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn a_changed_configuration_is_announced_and_read_again() {
    let mut rig = Rig::start(ProtocolFeatures::empty());
    assert_eq!(rig.order("config 42"), "ok");
    assert!(matches!(rig.event(), ChannelEvent::ConfigChanged));
    assert_eq!(rig.front().get_config(0, 1).unwrap(), [42]);
}

#[test]
fn d31_a_config_change_goes_to_the_channel_of_that_moment() {
    let mut rig = Rig::start(ProtocolFeatures::empty());
    let second = rig.vmm.open_channel(SharedObjects::new()).unwrap().spawn().unwrap();
    let mut first = std::mem::replace(&mut rig.channel, second);
    assert_eq!(rig.order("config 43"), "ok");
    assert!(matches!(rig.event(), ChannelEvent::ConfigChanged));
    assert!(!matches!(first.next_event(MOMENT), Ok(Some(ChannelEvent::ConfigChanged))));
}

#[test]
fn mapped_bytes_are_read_back_in_each_of_several_regions() {
    let mut rig = Rig::start(ProtocolFeatures::SHMEM);
    let config = rig.front().get_shmem_config().unwrap();
    assert_eq!((config.count, config.sizes[1], config.sizes[7]), (2, 1 << 20, 64 << 10));
    assert_eq!(rig.order("map 1 0x2000 first"), "ok");
    assert_eq!(rig.order("map 7 0 second"), "ok");
    let read = |rig: &Rig, region, offset| {
        let mut bytes = [0; 6];
        rig.channel.regions().read(region, offset, &mut bytes).map(|()| bytes)
    };
    assert_eq!(read(&rig, 1, 0x2000).unwrap(), *b"first\0");
    assert_eq!(read(&rig, 7, 0).unwrap(), *b"second");
    assert!(rig.order("map 1 0x2000 again").starts_with("no: mapping at 0x2000 overlaps"));
    assert!(rig.order("map 7 0x10000 out").contains("outside of region 7"));
    assert!(rig.order("map 1 0x10 odd").contains("whole pages"));
    assert!(rig.order("unmap 1 0x5000").contains("nothing is mapped"));
    assert_eq!(rig.order("unmap 1 0x2000"), "ok");
    assert!(read(&rig, 1, 0x2000).is_err(), "the mapping is gone");
    assert_eq!(rig.order("map 1 0x2000 anew"), "ok");
}

#[test]
fn a_reset_forgets_mappings_and_serves_again() {
    let mut rig = Rig::start(ProtocolFeatures::SHMEM);
    assert_eq!(rig.order("map 1 0 page"), "ok");
    rig.front().reset_device().unwrap();
    rig.channel.regions().clear();
    let features = rig.vmm.features();
    let ring = Ring::new(&rig._memory, 0, features);
    let front = rig.vmm.connection();
    front.set_features(features).unwrap();
    front.set_vring_num(0, common::SIZE).unwrap();
    front.set_vring_base(0, 0).unwrap();
    front.set_vring_addr(0, &ring.layout).unwrap();
    front.set_vring_call(0, &ring.call).unwrap();
    front.set_vring_kick(0, &ring.kick).unwrap();
    front.set_vring_enable(0, true).unwrap();
    rig.ring = ring;
    assert_eq!(rig.order("map 1 0 again"), "ok", "the table was cleared");
    assert!(rig.order("told").contains("resets 1"));
}

#[test]
fn shared_objects_are_exported_asked_for_and_looked_up() {
    let mut rig = Rig::start(ProtocolFeatures::SHARED_OBJECT);
    assert_eq!(rig.order("object picture"), "ok");
    assert!(matches!(rig.event(), ChannelEvent::SharedObjectAdded { .. }));
    let mut name = Uuid::default();
    name.bytes[..7].copy_from_slice(b"picture");
    let object = rig.front().get_shared_object(name).unwrap().unwrap();
    let mut file = std::fs::File::from(object);
    let mut text = String::new();
    std::io::Seek::rewind(&mut file).unwrap();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "picture");
    name.bytes[0] = b'x';
    assert!(rig.front().get_shared_object(name).unwrap().is_none());
    let ours = tempfile::tempfile().unwrap();
    rig.channel.objects().insert(name, ours.into());
    assert_eq!(rig.order("lookup xicture"), "found true");
    assert!(rig.order("lookup nothing").starts_with("no: "));
}

#[test]
fn a_host_notifier_reaches_the_front_end() {
    let mut rig = Rig::start(ProtocolFeatures::HOST_NOTIFIER);
    assert_eq!(rig.order("notifier 1"), "ok");
    assert!(matches!(rig.event(), ChannelEvent::HostNotifier { .. }));
    assert!(rig.order("notifier 9").starts_with("no: "), "there is no queue 9");
}

#[test]
fn the_rarp_address_and_the_mtu_reach_the_device() {
    let mut rig = Rig::start(ProtocolFeatures::RARP | ProtocolFeatures::MTU);
    rig.front().send_rarp([2, 0, 0, 1, 2, 3]).unwrap();
    rig.front().net_set_mtu(9000).unwrap();
    assert!(rig.front().net_set_mtu(12).is_err(), "refused");
    let told = rig.order("told");
    assert!(told.contains("mtu Some(9000)"), "{told}");
    assert!(told.contains("mac [02, 00, 00, 01, 02, 03]"), "{told}");
}

#[test]
fn crypto_sessions_are_opened_and_closed() {
    let mut rig = Rig::start(ProtocolFeatures::CRYPTO_SESSION);
    let session = CryptoSession::default();
    assert_eq!(rig.front().create_crypto_session(session).unwrap(), 1);
    assert!(rig.order("told").contains("sessions 1"));
    rig.front().close_crypto_session(1).unwrap();
    assert!(rig.front().close_crypto_session(1).is_err());
    assert!(rig.order("told").contains("sessions 0"));
}

#[test]
fn the_display_socket_reaches_the_device() {
    let mut rig = Rig::start(ProtocolFeatures::empty());
    let (_ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    rig.front().gpu_set_socket(&theirs).unwrap();
    assert!(rig.order("told").contains("display true"));
}

#[test]
fn the_status_byte_is_kept_and_a_broken_ring_needs_a_reset() {
    let mut rig = Rig::start(ProtocolFeatures::STATUS);
    rig.front().set_status(0xf).unwrap();
    assert_eq!(rig.front().get_status().unwrap(), 0xf);
    let view = rig._memory.view();
    let index = rig.ring.layout.avail + 2;
    view.write(index, &0x7fffu16.to_le_bytes()).unwrap();
    rig.ring.kick();
    let until = std::time::Instant::now() + PATIENCE;
    while rig.front().get_status().unwrap() & 0x40 == 0 {
        assert!(std::time::Instant::now() < until, "NEEDS_RESET");
    }
    rig.front().set_status(0).unwrap();
    assert_eq!(rig.front().get_status().unwrap(), 0);
    let text = "told";
    let ring = Ring::new(&rig._memory, 0, rig.vmm.features());
    let features = rig.vmm.features();
    let front = rig.vmm.connection();
    front.set_features(features).unwrap();
    front.set_vring_base(0, 0).unwrap();
    front.set_vring_addr(0, &ring.layout).unwrap();
    front.set_vring_call(0, &ring.call).unwrap();
    front.set_vring_kick(0, &ring.kick).unwrap();
    front.set_vring_enable(0, true).unwrap();
    rig.ring = ring;
    assert!(rig.order(text).contains("resets 1"));
}

#[test]
fn rings_are_kicked_and_call_by_messages() {
    let mut rig = Rig::start(ProtocolFeatures::INBAND_NOTIFICATIONS);
    rig.front().set_vring_call_polled(0).unwrap();
    while rig.channel.next_event(MOMENT).unwrap().is_some() {}
    let ring = &mut rig.ring;
    ring.data.write(0, b"told").unwrap();
    let guest = ring.data.guest();
    ring.driver.add(&[(guest, 4)], &[(guest + 4096, 256)], 7).unwrap();
    ring.driver.arm();
    ring.driver.publish();
    rig.vmm.connection().vring_kick(0).unwrap();
    assert!(rig.ring.driver.pop_used().unwrap().is_some(), "answered: the ring was processed");
    assert!(matches!(rig.event(), ChannelEvent::VringCall { .. }));
}

#[test]
fn ring_addresses_may_be_guest_physical() {
    let mut rig = Rig::start(ProtocolFeatures::GPA_ADDRESSES);
    // The rig's addresses were user addresses: the ring waits. Now the right ones.
    let mut ring = Ring::new(&rig._memory, 1, rig.vmm.features());
    let layout = ring.layout;
    let front = rig.vmm.connection();
    front.set_vring_num(1, common::SIZE).unwrap();
    let addresses = outboard_protocol::VringAddr {
        index: 1,
        flags: 0,
        desc: layout.desc,
        used: layout.used,
        avail: layout.avail,
        log_guest_addr: 0,
    };
    front.call(outboard_protocol::Request::SetVringAddr(addresses)).unwrap();
    front.set_vring_call(1, &ring.call).unwrap();
    front.set_vring_kick(1, &ring.kick).unwrap();
    ring.offer(b"into the void");
    ring.kick();
    assert_eq!(ring.answered(), 0, "a disabled transmit ring drops it: it was found");
}

#[test]
fn a_front_end_that_never_sends_kick_or_call_is_served_by_messages_alone() {
    // User-mode Linux does so once in-band notifications are negotiated.
    let mut rig = Rig::start(ProtocolFeatures::INBAND_NOTIFICATIONS);
    let mut ring = Ring::new(&rig._memory, 1, rig.vmm.features());
    let front = rig.vmm.connection();
    front.set_vring_num(1, common::SIZE).unwrap();
    front.set_vring_addr(1, &ring.layout).unwrap();
    front.set_vring_enable(1, true).unwrap();
    ring.offer(b"told");
    ring.driver.arm();
    front.vring_kick(1).unwrap();
    assert_ne!(ring.answered(), 0);
    loop {
        if matches!(rig.event(), ChannelEvent::VringCall { .. }) {
            break;
        }
    }
}

#[test]
fn what_is_offered_is_there_and_what_is_not_is_refused() {
    let mut rig = Rig::start(ProtocolFeatures::CONFIGURE_MEM_SLOTS);
    let front = rig.vmm.connection();
    let (features, protocol) =
        (front.get_features().unwrap(), front.get_protocol_features().unwrap());
    assert_eq!(features & common::FEATURES, common::FEATURES);
    assert_eq!(front.get_queue_num().unwrap(), 2);
    assert_eq!(front.get_max_mem_slots().unwrap(), 509);
    front.set_owner().unwrap();
    // While the ring runs only what is negotiated already may be negotiated.
    front.set_features(common::FEATURES | virtio::NET_MTU).unwrap();
    assert!(front.set_features(common::FEATURES).is_err(), "under a running ring");
    assert!(front.set_features(common::FEATURES | 1 << 63).is_err(), "not offered");
    // Byte order of legacy rings is not offered, and so refused.
    assert!(!protocol.contains(ProtocolFeatures::CROSS_ENDIAN));
    front.get_vring_base(1).unwrap();
    assert!(front.set_vring_endian(1, true).is_err());
    assert!(rig.order("told").contains("resets 0"), "all is as it was");
}

#[test]
fn the_configuration_is_written_where_the_device_lets_it_be() {
    let mut rig = Rig::start(ProtocolFeatures::empty());
    rig.front().set_config(3, &[7, 8], false).unwrap();
    assert_eq!(rig.front().get_config(2, 4).unwrap(), [0, 7, 8, 0]);
    assert!(rig.front().set_config(15, &[1, 2], false).is_err(), "there are 16 bytes");
}

#[test]
fn a_ring_is_disabled_by_reset_owner_and_stopped_with_its_base() {
    let mut rig = Rig::start(ProtocolFeatures::empty());
    assert!(rig.order("told").contains("resets 0"));
    rig.front().reset_owner().unwrap();
    let length = u32::try_from("told".len()).unwrap();
    let guest = rig.ring.data.guest();
    rig.ring.driver.add(&[(guest, length)], &[(guest + 4096, 256)], 7).unwrap();
    rig.ring.driver.publish();
    rig.ring.kick();
    assert!(rig.ring.silent_for(MOMENT), "a disabled ring holds its requests");
    assert_eq!(rig.front().get_vring_base(0).unwrap(), 1, "one request was taken");
    let ring = &rig.ring;
    let front = rig.vmm.connection();
    front.set_vring_num(0, common::SIZE).unwrap();
    front.set_vring_addr(0, &ring.layout).unwrap();
    front.set_vring_base(0, 1).unwrap();
    front.set_vring_call(0, &ring.call).unwrap();
    front.set_vring_err(0, &ring.err).unwrap();
    front.set_vring_kick(0, &ring.kick).unwrap();
    front.set_vring_enable(0, true).unwrap();
    assert_ne!(rig.ring.answered(), 0, "the request that waited");
    // Beyond the ring: it breaks, and the error descriptor says so.
    rig._memory.view().write(rig.ring.layout.avail + 2, &0x7fffu16.to_le_bytes()).unwrap();
    rig.ring.kick();
    assert!(common::rang(&rig.ring.err, PATIENCE), "SET_VRING_ERR");
}

#[test]
fn a_memory_slot_is_added_used_and_removed() {
    let mut rig = Rig::start(ProtocolFeatures::CONFIGURE_MEM_SLOTS);
    let (region, file) = outboard_memory::Region::memfd(1 << 40, 1 << 20).unwrap();
    let spec = *region.spec();
    let more = std::os::fd::AsFd::as_fd(&file);
    rig.front().add_mem_region(spec, more).unwrap();
    let memory = outboard_memory::GuestMemory::new(1, vec![Arc::new(region)]).unwrap();
    let view = outboard_memory::View::new(Arc::new(memory));
    view.write(1 << 40, b"told").unwrap();
    let ring = &mut rig.ring;
    ring.driver.add(&[(1 << 40, 4)], &[((1 << 40) + 4096, 256)], 7).unwrap();
    ring.driver.publish();
    ring.kick();
    let mut answer = vec![0; ring.answered() as usize];
    view.read((1 << 40) + 4096, &mut answer).unwrap();
    assert!(answer.starts_with(b"mtu"), "the answer lies in the new slot");
    rig.front().remove_mem_region(spec).unwrap();
    rig.front().set_vring_err(0, common::doorbell()).unwrap();
    let err = common::doorbell();
    rig.front().set_vring_err(0, &err).unwrap();
    // After the descriptor: a device that still looks at the ring needs no kick to find it.
    let ring = &mut rig.ring;
    ring.driver.add(&[(1 << 40, 4)], &[((1 << 40) + 4096, 256)], 7).unwrap();
    ring.driver.publish();
    rig.ring.kick();
    assert!(common::rang(&err, PATIENCE), "nothing is there any more");
}

#[test]
fn a_shared_object_is_taken_back() {
    let mut rig = Rig::start(ProtocolFeatures::SHARED_OBJECT);
    assert_eq!(rig.order("object picture"), "ok");
    assert!(matches!(rig.event(), ChannelEvent::SharedObjectAdded { .. }));
    assert_eq!(rig.order("forget picture"), "ok");
    assert!(matches!(rig.event(), ChannelEvent::SharedObjectRemoved { .. }));
    let mut name = Uuid::default();
    name.bytes[..7].copy_from_slice(b"picture");
    assert!(rig.front().get_shared_object(name).unwrap().is_none());
    assert!(rig.order("forget picture").starts_with("no: "), "there is none");
}

#[test]
fn a_broken_ring_is_told_by_message_where_no_descriptor_is() {
    let mut rig = Rig::start(ProtocolFeatures::INBAND_NOTIFICATIONS);
    rig.front().set_vring_err_polled(0).unwrap();
    rig._memory.view().write(rig.ring.layout.avail + 2, &0x7fffu16.to_le_bytes()).unwrap();
    rig.ring.kick();
    loop {
        if let ChannelEvent::VringErr { queue } = rig.event() {
            assert_eq!(queue, 0);
            break;
        }
    }
}

/// The payload of the message `id` that came over the channel, which is there by now.
fn payload(rig: &Rig, id: u32) -> Vec<u8> {
    let tape = rig.tape.0.lock().unwrap();
    let message = tape.iter().find(|bytes| bytes.starts_with(&id.to_le_bytes())).unwrap();
    message[12..].to_vec()
}

/// GPU_MAP against our own front-end, and byte for byte in crosvm's layout as it was recorded
/// (crosvm itself was not run).
#[test]
fn a_gpu_allocation_is_mapped_and_told_as_crosvm_lays_it_out() {
    let mut rig = Rig::start(ProtocolFeatures::SHMEM);
    assert_eq!(rig.order("gpu 1 0x4000 pixels"), "ok");
    let mut bytes = [0; 6];
    rig.channel.regions().read(1, 0x4000, &mut bytes).unwrap();
    assert_eq!(bytes, *b"pixels");
    let mut wanted = vec![0; 64];
    wanted[0] = 1;
    wanted[8..16].copy_from_slice(&0x4000u64.to_le_bytes());
    wanted[16..24].copy_from_slice(&4096u64.to_le_bytes());
    wanted[24..28].copy_from_slice(&3u32.to_le_bytes());
    wanted[28..32].copy_from_slice(&4u32.to_le_bytes());
    wanted[32..38].copy_from_slice(b"device");
    wanted[48..54].copy_from_slice(b"driver");
    assert_eq!(payload(&rig, 1006), wanted);
    assert!(rig.order("gpu 1 0x4000 again").contains("overlaps"));
    assert_eq!(rig.order("unmap 1 0x4000"), "ok");
}

/// EXTERNAL_MAP in one process with our own front-end, in crosvm's layout as it was recorded
/// (crosvm itself was not run); from another process it is always refused.
#[test]
fn memory_of_the_same_process_is_mapped_and_of_another_one_never() {
    let mut outside = Rig::start(ProtocolFeatures::SHMEM);
    assert!(outside.order("external 1 0 mine").starts_with("no: the front-end answered"));
    assert!(outside.channel.regions().mappings(1).is_empty());
    assert_eq!(outside.order("map 1 0 after"), "ok", "the place is free");

    let mut inside = Rig::inside(ProtocolFeatures::SHMEM);
    assert_eq!(inside.order("external 1 0x3000 mine"), "ok");
    let mut bytes = [0; 4];
    inside.channel.regions().read(1, 0x3000, &mut bytes).unwrap();
    assert_eq!(bytes, *b"mine");
    let told = payload(&inside, 1007);
    assert_eq!((told.len(), told[0]), (32, 1));
    assert_eq!(told[8..16], 0x3000u64.to_le_bytes());
    assert_eq!(told[16..24], 4096u64.to_le_bytes());
    assert_ne!(told[24..32], [0; 8], "the address");
}
