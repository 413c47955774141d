//! Many streams at once, each byte verified; `OUTBOARD_STREAMS` and `OUTBOARD_MIB` (each way, of all of them)
//! have another number of them.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::Builder;

use outboard_devices::vsock::{Header, Op, shut};

use crate::guest::{BOTH, Guest, Socket, number, options, patient, server};

/// The byte at a place of a stream.
fn byte(stream: usize, at: usize) -> u8 {
    let mixed = (stream as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (at as u64 / 7);
    let [_, _, _, low, .., high] = mixed.wrapping_mul(0xff51_afd7_ed55_8ccd).to_le_bytes();
    low ^ high ^ at.to_le_bytes()[0]
}

/// A server that sends back what it gets, until its end.
fn echo(mut host: UnixStream) {
    let mut bytes = vec![0; 16 << 10];
    loop {
        match host.read(&mut bytes).expect("read") {
            0 => return,
            count => host.write_all(&bytes[..count]).expect("sent"),
        }
    }
}

struct Stream {
    socket: Socket,
    sent: usize,
    back: usize,
    shut: bool,
    over: bool,
}

impl Stream {
    /// Sends more, or the end; false: there is nothing to be sent now.
    fn push(&mut self, guest: &mut Guest, number: usize, each: usize) -> bool {
        let room = usize::try_from(self.socket.credit.may_send()).expect("small");
        let most = room.min(16 << 10).min(each - self.sent);
        if most > 0 {
            let bytes: Vec<_> = (self.sent..self.sent + most).map(|at| byte(number, at)).collect();
            guest.say_with(&mut self.socket, Op::Data, 0, &bytes);
            self.sent += most;
        } else if self.sent == each && !self.shut {
            guest.say_with(&mut self.socket, Op::Shutdown, shut::SEND, &[]);
            self.shut = true;
        } else {
            return false;
        }
        true
    }

    fn hear(&mut self, guest: &mut Guest, number: usize, each: usize, packet: (Header, Vec<u8>)) {
        let (header, bytes) = packet;
        if self.over {
            return;
        }
        let credit = &mut self.socket.credit;
        credit.hear(header.credit()).expect("true");
        credit.received(header.length()).expect("no more than there is room for");
        credit.took(header.length());
        for got in bytes {
            assert_eq!(got, byte(number, self.back), "byte {} of stream {number}", self.back);
            self.back += 1;
        }
        if credit.should_tell() || header.op() == Some(Op::CreditRequest) {
            guest.say(&mut self.socket, Op::CreditUpdate);
        }
        assert_ne!(header.op(), Some(Op::Reset), "stream {number}");
        if header.op() == Some(Op::Shutdown) {
            assert_eq!(self.back, each, "the end of stream {number} comes last");
            guest.say(&mut self.socket, Op::Reset);
            self.over = true;
        }
    }
}

#[test]
fn many_streams_at_once_carry_every_byte_both_ways_and_end_in_order() {
    let streams = number("OUTBOARD_STREAMS", 40);
    let each = number("OUTBOARD_MIB", 4) * (1 << 20) / streams;
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).expect("more files");
    let folder = tempfile::tempdir().expect("a folder");
    let listener = server(folder.path(), 1);
    let mut guest = Guest::start(options(folder.path()), BOTH[1]);
    let mut all = Vec::new();
    for ours in 0..streams {
        let socket = guest.connect(u32::try_from(ours).expect("small"), 1);
        let host = patient(listener.accept().expect("a client").0);
        let thread = Builder::new().stack_size(128 << 10).spawn(move || echo(host));
        drop(thread.expect("a thread"));
        all.push(Stream { socket, sent: 0, back: 0, shut: false, over: false });
    }
    while all.iter().any(|stream| !stream.over) {
        let mut idle = true;
        for at in 0..streams {
            idle &= !all[at].push(&mut guest, at, each);
            guest.has_any(0);
            while let Some(packet) = guest.heard.pop_front() {
                let at = usize::try_from(packet.0.destination().port).expect("small");
                all[at].hear(&mut guest, at, each, packet);
                idle = false;
            }
        }
        if idle && all.iter().any(|stream| !stream.over) {
            let packet = guest.any();
            let at = usize::try_from(packet.0.destination().port).expect("small");
            all[at].hear(&mut guest, at, each, packet);
        }
    }
    assert!(all.iter().all(|stream| (stream.sent, stream.back) == (each, each)));
    guest.rig.end();
}
