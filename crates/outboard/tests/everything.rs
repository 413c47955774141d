//! `examples/everything.rs` in a process of its own, message by message: each row of the table that
//! a device can offer, with an effect that can be seen ([protocol], Shows).

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;

use common::{PATIENCE, Ring};
use outboard::protocol::payload::{CryptoSession, Uuid};
use outboard::protocol::{ProtocolFeatures, virtio};
use outboard_frontend::channel::{ChannelEvent, ChannelThread, SharedObjects};
use outboard_frontend::{Connection, SharedMemory, Vmm, Wanted};

const MOMENT: Duration = Duration::from_millis(60);

/// The example's process, a front-end with a channel, and its command queue.
struct Rig {
    child: Child,
    vmm: Vmm,
    channel: ChannelThread,
    ring: Ring,
    _memory: SharedMemory,
    _folder: tempfile::TempDir,
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
        let mut vmm = Vmm::new(connection, wanted(more)).unwrap();
        let channel = vmm.open_channel(SharedObjects::new()).unwrap().spawn().unwrap();
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
        Self { child, vmm, channel, ring, _memory: memory, _folder: folder }
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
        let _ = self.child.kill();
        let _ = self.child.wait();
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
