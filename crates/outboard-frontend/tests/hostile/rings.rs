//! A device that negotiates well and then writes nonsense into its ring: each kind is an error with the
//! queue's number, and none a panic, a hang or a wrong answer.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use crate::scripted::{PATIENCE, Peer, TIMEOUT, connect};
use outboard_frontend::block::{BlockDevice, BlockOptions};
use outboard_frontend::{Error, SharedMemory};
use outboard_protocol::Frame;
use outboard_protocol::header::Header;
use outboard_protocol::payload::{self, VringAddr};

/// The driver's memory and ring as the device sees them: through the descriptor it was sent.
struct Ring {
    file: File,
    guest: u64,
    addresses: VringAddr,
    call: Option<File>,
}

impl Ring {
    fn at(&self, user: u64) -> u64 {
        user - SharedMemory::user_address(self.guest)
    }

    fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.file.read_exact_at(&mut bytes, at).expect("inside");
        bytes
    }

    fn available(&self) -> u16 {
        u16::from_le_bytes(self.read(self.at(self.addresses.avail) + 2))
    }

    /// The first descriptor of the last chain, and where the status byte of that chain lies.
    fn chain(&self) -> (u16, u64) {
        let head = u16::from_le_bytes(self.read(self.at(self.addresses.avail) + 4));
        let mut at = head;
        loop {
            let descriptor: [u8; 16] = self.read(self.at(self.addresses.desc) + 16 * u64::from(at));
            let flags = u16::from_le_bytes([descriptor[12], descriptor[13]]);
            if flags & 1 == 0 {
                let address = u64::from_le_bytes(descriptor[..8].try_into().expect("eight bytes"));
                return (head, address - self.guest);
            }
            at = u16::from_le_bytes([descriptor[14], descriptor[15]]);
        }
    }

    fn use_up(&self, at: u64, id: u32, len: u32, index: u16) {
        let used = self.at(self.addresses.used);
        let element = [id.to_le_bytes(), len.to_le_bytes()].concat();
        self.file.write_all_at(&element, used + 4 + 8 * at).expect("inside");
        self.file.write_all_at(&index.to_le_bytes(), used + 2).expect("inside");
    }
}

/// What the first read of a device ends with that treats its ring like this.
fn first_read(nonsense: impl FnOnce(&Ring) + Send + 'static) -> Result<(), Error> {
    first_read_for(PATIENCE, nonsense)
}

/// The same with a timeout.
fn first_read_for(
    timeout: Duration,
    nonsense: impl FnOnce(&Ring) + Send + 'static,
) -> Result<(), Error> {
    let (mut ring, mut nonsense) = (None, Some(nonsense));
    let (connection, _peer) =
        connect(timeout, move |peer, header| serve(peer, header, &mut ring, &mut nonsense));
    let options = BlockOptions { timeout, queue_size: 16, depth: 4, ..BlockOptions::default() };
    let mut disk = BlockDevice::open(connection, options).expect("it negotiates well");
    let mut sector = [0; 512];
    disk.read(0, &mut sector)
}

fn serve(
    peer: &mut Peer,
    header: Header,
    ring: &mut Option<Ring>,
    nonsense: &mut Option<impl FnOnce(&Ring) + Send + 'static>,
) -> bool {
    match header.request {
        5 => {
            let regions = payload::decode_mem_table(&peer.body).expect("a table");
            let file = File::from(peer.fds.pop().expect("a file"));
            let addresses = VringAddr::default();
            *ring = Some(Ring { file, guest: regions[0].guest_addr, addresses, call: None });
        }
        9 => {
            if let (Some(ring), Some(addresses)) = (ring, payload::read(&peer.body)) {
                ring.addresses = addresses;
            }
        }
        13 => {
            if let Some(ring) = ring {
                ring.call = peer.fds.pop().map(File::from);
            }
        }
        24 => {
            let mut reply = peer.body.clone();
            reply[12] = 64;
            let reply = Frame::<()>::reply(24, &reply, Vec::new());
            return peer.try_send(&reply.bytes, &[]);
        }
        18 => {
            // The ring runs from here on; the thread stands for the device's worker.
            if let (Some(ring), Some(nonsense)) = (ring.take(), nonsense.take()) {
                std::thread::spawn(move || {
                    while ring.available() == 0 {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    nonsense(&ring);
                    if let Some(mut call) = ring.call {
                        call.write_all(&1u64.to_ne_bytes()).expect("an eventfd");
                    }
                });
            }
        }
        _ => {}
    }
    let value = peer.sane(header);
    peer.reply(header, value)
}

fn broken(outcome: Result<(), Error>, words: &str) {
    match outcome {
        Err(Error::Ring { queue: 0, reason }) if reason.contains(words) => {}
        other => panic!("expected '{words}', got {other:?}"),
    }
}

fn finish(ring: &Ring, status: u8, len: u32) {
    let (head, status_at) = ring.chain();
    ring.file.write_all_at(&[status], status_at).expect("inside");
    ring.use_up(0, u32::from(head), len, 1);
}

#[test]
fn a_request_done_well_is_read() {
    first_read(|ring| finish(ring, 0, 513)).expect("all is well");
}

#[test]
fn a_call_that_never_comes_costs_the_timeout_and_no_request() {
    let late = |ring: &Ring| {
        // A call now, for nothing, and none when the request is done.
        ring.call
            .as_ref()
            .expect("it was sent")
            .write_all(&1u64.to_ne_bytes())
            .expect("an eventfd");
        std::thread::sleep(TIMEOUT / 2);
        finish(ring, 0, 513);
        std::thread::sleep(TIMEOUT * 10);
    };
    first_read_for(TIMEOUT, late).expect("the last look finds it");
}

#[test]
fn a_failed_and_an_unsupported_request_are_told_apart() {
    for (status, words) in [(1, "i/o error"), (2, "not supported")] {
        let failed = first_read(move |ring| finish(ring, status, 1)).expect_err("it failed");
        assert!(failed.to_string().contains(words), "{failed}");
    }
}

#[test]
fn a_status_that_does_not_exist_or_was_not_written_is_an_error() {
    broken(first_read(|ring| finish(ring, 3, 513)), "status 0x3 does not exist");
    broken(
        first_read(|ring| ring.use_up(0, u32::from(ring.chain().0), 513, 1)),
        "status 0xff does not exist",
    );
}

#[test]
fn more_bytes_than_there_was_room_for_are_an_error() {
    for len in [514, u32::MAX] {
        broken(first_read(move |ring| finish(ring, 0, len)), "");
    }
}

#[test]
fn a_request_that_was_never_made_is_an_error() {
    for id in [1, 15, 16, 0xffff, u32::MAX] {
        broken(first_read(move |ring| ring.use_up(0, id, 0, 1)), "");
    }
}

#[test]
fn a_used_index_that_runs_ahead_is_an_error() {
    for index in [2, 17, 0x8000, u16::MAX] {
        broken(first_read(move |ring| ring.use_up(0, u32::from(ring.chain().0), 0, index)), "");
    }
}

#[test]
fn a_device_that_never_answers_a_request_is_an_error() {
    let stuck = first_read_for(TIMEOUT, |_| {}).expect_err("it never ends");
    assert!(matches!(stuck, Error::Stuck { queue: 0, in_flight: 1, .. }), "{stuck}");
}
