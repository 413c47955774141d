//! Any layout of descriptors (R14): headers, data and status cut anywhere; cursors that take what is there.

use std::io::{self, Read};
use std::os::fd::AsFd;

use outboard_queue::ShortBuffer;

use crate::rig::*;

/// Offers `bytes` to read, cut after each of `cuts`, and `room` to write, cut after each of `room_cuts`.
fn offer(rig: &mut Rig, bytes: &[u8], cuts: &[usize], room: usize, room_cuts: &[usize]) {
    rig.view.write(DATA, bytes).unwrap();
    let mut pieces = Vec::new();
    for (len, cuts, base, flag) in
        [(bytes.len(), cuts, DATA, 0), (room, room_cuts, DATA + 0x8000, WRITE)]
    {
        let mut from = 0;
        for &to in cuts.iter().chain(&[len]).filter(|&&to| to <= len) {
            // Each piece lies by itself for what is written; what is read lies in one row.
            let gap = if flag == WRITE { 0x100 * pieces.len() as u64 } else { 0 };
            pieces.push((base + gap + from as u64, u32::try_from(to - from).unwrap(), flag));
            from = to;
        }
    }
    pieces.retain(|&(_, len, _)| len > 0);
    let last = pieces.len() - 1;
    for (at, &(addr, len, flag)) in pieces.iter().enumerate() {
        let more = if at < last { NEXT } else { 0 };
        let index = u16::try_from(at).unwrap();
        rig.desc(index, addr, len, flag | more, index + 1);
    }
    rig.offer(0);
}

/// R14: no layout is taken for granted.
#[test]
fn b47_a_header_cut_at_every_byte_is_read_whole() {
    let bytes = pattern(24, 7);
    for first in 0..=24 {
        for second in first..=24 {
            let mut rig = Rig::new(16, 0);
            offer(&mut rig, &bytes, &[first, second], 1, &[]);
            let mut chain = rig.take();
            let header: [u64; 2] = chain.readable().read_obj().unwrap();
            assert_eq!(header[0].to_le_bytes(), bytes[..8]);
            assert_eq!(header[1].to_le_bytes(), bytes[8..16]);
            let mut rest = [0; 8];
            chain.readable().read_exact(&mut rest).unwrap();
            assert_eq!(rest, bytes[16..]);
            assert!(chain.readable().is_empty());
        }
    }
}

#[test]
fn b47_a_header_of_one_byte_descriptors_is_read_whole() {
    let mut rig = Rig::new(32, 0);
    let bytes = pattern(16, 1);
    let cuts: Vec<_> = (1..16).collect();
    offer(&mut rig, &bytes, &cuts, 1, &[]);
    let header: [u8; 16] = rig.take().readable().read_obj().unwrap();
    assert_eq!(header, bytes[..]);
}

#[test]
fn b48_a_status_inside_any_descriptor_is_cut_off_the_end() {
    for cut in 0..=20 {
        for tail in 0..=20 {
            let mut rig = Rig::new(16, 0);
            offer(&mut rig, &[1], &[], 20, &[cut]);
            let mut chain = rig.take();
            chain.reserve_tail(tail).unwrap();
            let data = pattern(20 - tail, 50);
            let status = pattern(tail, 200);
            assert_eq!(chain.writable().len(), data.len() as u64);
            assert_eq!(chain.write_tail(&pattern(tail + 1, 0)), Err(short(tail + 1, tail)));
            chain.write_tail(&status).unwrap();
            chain.writable().write_all(&data).unwrap();
            assert_eq!(chain.writable().written(), data.len() as u64);
            assert!(chain.writable().is_empty());
            let whole: Vec<u8> = data.iter().chain(&status).copied().collect();
            assert_eq!(room(&rig, 20, cut), whole, "cut {cut}, tail {tail}");
        }
    }
}

/// The bytes in the room of a request that was cut at `cut`.
fn room(rig: &Rig, len: usize, cut: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let (front, back) = bytes.split_at_mut(cut);
    // The pieces are the second and the third of the request, unless one of them is empty (it leaves no gap then).
    rig.view.read(DATA + 0x8000 + 0x100, front).unwrap();
    rig.view.read(DATA + 0x8000 + 0x200 + cut as u64, back).unwrap();
    bytes
}

fn short(needed: usize, left: usize) -> ShortBuffer {
    ShortBuffer { needed: needed as u64, left: left as u64 }
}

#[test]
fn b49_a_request_without_room_for_a_status_says_so_and_goes_back() {
    let mut rig = Rig::new(8, 0);
    rig.desc(0, DATA, 16, 0, 0);
    rig.offer(0);
    let mut chain = rig.take();
    assert_eq!(chain.reserve_tail(1), Err(short(1, 0)));
    assert_eq!(chain.write_tail(&[0]), Err(short(1, 0)));
    rig.device.complete(chain, 0);
    rig.device.publish().unwrap();
    assert_eq!(rig.used(0), (0, 0));
}

#[test]
fn b50_what_is_too_short_is_not_taken_at_all() {
    let mut rig = Rig::new(8, 0);
    offer(&mut rig, &pattern(10, 3), &[4], 6, &[2]);
    let mut chain = rig.take();
    assert_eq!(chain.readable().read_obj::<[u8; 11]>(), Err(short(11, 10)));
    assert_eq!(chain.readable().read_exact(&mut [0; 12]), Err(short(12, 10)));
    assert_eq!(chain.readable().skip(11), Err(short(11, 10)));
    assert_eq!(chain.writable().write_all(&[0; 7]), Err(short(7, 6)));
    assert_eq!(chain.writable().write_obj(&[0_u64; 1]), Err(short(8, 6)));
    assert_eq!(chain.writable().fill_zero(7), Err(short(7, 6)));
    assert_eq!(chain.writable().advance(7), Err(short(7, 6)));
    assert_eq!(chain.reserve_tail(7), Err(short(7, 6)));
    assert_eq!((chain.readable().len(), chain.writable().len()), (10, 6));
    assert_eq!(chain.writable().written(), 0);
}

#[test]
fn reading_and_writing_go_hand_in_hand() {
    let mut rig = Rig::new(16, 0);
    let bytes = pattern(100, 11);
    offer(&mut rig, &bytes, &[1, 7, 64], 120, &[50, 60]);
    let mut chain = rig.take();
    let (mut readable, mut writable) = chain.parts();
    let mut piece = [0; 10];
    while readable.read_exact(&mut piece).is_ok() {
        writable.write_all(&piece).unwrap();
    }
    writable.fill_zero(20).unwrap();
    assert!(readable.is_empty() && writable.is_empty());
    assert_eq!(chain.writable().written(), 120);
    let mut seen = [0; 50];
    rig.view.read(DATA + 0x8000 + 0x400, &mut seen).unwrap();
    assert_eq!(seen[..], bytes[..50]);
}

#[test]
fn a_file_goes_into_a_request_and_out_of_one() {
    let content = pattern(10_000, 77);
    let mut rig = Rig::new(16, 0);
    offer(&mut rig, &content, &[1, 4097, 8000], 10_000, &[3, 5000]);
    let mut chain = rig.take();
    let file = tempfile::tempfile().unwrap();
    let mut at = 100;
    while !chain.readable().is_empty() {
        at += chain.readable().write_to_file_at(file.as_fd(), at).unwrap() as u64;
    }
    assert_eq!(at, 10_100);
    chain.reserve_tail(1).unwrap();
    let mut done = 0;
    while !chain.writable().is_empty() {
        done += chain.writable().read_from_file_at(&file, 100 + done).unwrap() as u64;
    }
    assert_eq!((done, chain.writable().written()), (9_999, 9_999));
    assert_eq!(chain.writable().read_from_file_at(&file, 0).unwrap(), 0);
    let mut seen = vec![0; 5000];
    rig.view.read(DATA + 0x8000 + 0x500 + 3, &mut seen[3..]).unwrap();
    assert_eq!(seen[3..], content[3..5000]);
}

#[test]
fn the_end_of_a_file_is_a_transfer_of_nothing() {
    let mut rig = Rig::new(8, 0);
    offer(&mut rig, &[0], &[], 512, &[]);
    let mut chain = rig.take();
    let file = tempfile::tempfile().unwrap();
    assert_eq!(chain.writable().read_from_file_at(&file, 0).unwrap(), 0);
    assert_eq!(chain.writable().len(), 512);
    assert!(chain.writable().read_from_file_at(&file, u64::MAX).is_err());
}

/// Gives `chunk` bytes a time, and an interruption before each.
struct Trickle {
    chunk: usize,
    left: usize,
    interrupted: bool,
}

impl Read for Trickle {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.interrupted = !self.interrupted;
        if self.interrupted {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let count = self.chunk.min(self.left).min(to.len());
        to[..count].fill(0xa5);
        self.left -= count;
        Ok(count)
    }
}

#[test]
fn a_source_fills_a_request_up_to_the_limit_the_room_or_its_end() {
    for (chunk, left, max, room, expected) in [
        (1, 100, 50, 200, 50),
        (7, 30, 50, 200, 30),
        (10_000, 100_000, 60_000, 20_000, 20_000),
        (4096, 100_000, u32::MAX, 9_000, 9_000),
        (1, 0, 10, 10, 0),
        (1, 10, 0, 10, 0),
    ] {
        let mut rig = Rig::new(8, 0);
        offer(&mut rig, &[0], &[], room, &[room / 3]);
        let mut chain = rig.take();
        let mut source = Trickle { chunk, left, interrupted: false };
        let written = chain.writable().read_from(&mut source, max).unwrap();
        assert_eq!(written, expected);
        assert_eq!(chain.writable().written(), u64::from(expected));
    }
}
