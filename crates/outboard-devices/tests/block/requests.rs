//! Block requests of every kind and shape, through a real socket: cases B47 to B60 of bad and
//! unusual drivers, on every engine.

use crate::disk::*;
use outboard::LoopKind;
use outboard_devices::block::{Block, BlockOptions, Image, ImageOptions, feature};

const SECTORS: u64 = 256;

#[test]
fn requests_of_every_kind_do_what_they_say() {
    for engine in ENGINES {
        let file = numbered_file(SECTORS);
        let mut disk = Driven::new(open(&file), engine);
        assert_eq!(disk.read(7, 1024), [[number(7); 512], [number(8); 512]].concat());
        assert_eq!(disk.write(7, &[0xaa; 1024]), OK);
        assert_eq!(disk.read(7, 1024), [0xaa; 1024]);
        assert_eq!(disk.flush(), OK);
        assert_eq!(contents(file.as_file())[7 * 512..9 * 512], [0xaa; 1024]);
        assert_eq!(disk.run(DISCARD, 0, &segment(8, 8, 0), 0).status, OK);
        assert_eq!(disk.read(8, 4096), [0; 4096]);
        for unmap in [0, 1] {
            let zeroes = disk.run(WRITE_ZEROES, 0, &segment(20 + u64::from(unmap), 1, unmap), 0);
            assert_eq!((zeroes.status, zeroes.used), (OK, 1));
        }
        assert_eq!(disk.read(20, 1024), [0; 1024]);
        assert_eq!(disk.read(22, 512), [number(22); 512]);
        assert_eq!(file.as_file().metadata().expect("there").len(), SECTORS * 512);
        end(disk);
    }
}

#[test]
fn b47_the_header_may_be_cut_at_every_byte() {
    for engine in ENGINES {
        let file = numbered_file(SECTORS);
        let mut disk = Driven::new(open(&file), engine);
        for cut in 1..16 {
            let read = disk.run_cut(&header(IN, 3), &[cut], 513, &[512]);
            assert_eq!((read.status, read.used), (OK, 513), "cut at {cut}");
            assert_eq!(read.data, [number(3); 512], "cut at {cut}");
        }
        for pieces in 2..=16 {
            let cuts = vec![16 / pieces; pieces - 1];
            let read = disk.run_cut(&header(IN, 5), &cuts, 513, &[512]);
            assert_eq!((read.status, read.data), (OK, vec![number(5); 512]), "{pieces} pieces");
        }
        end(disk);
    }
}

#[test]
fn b47_b48_header_data_and_status_may_share_descriptors_and_be_cut_anywhere() {
    for engine in ENGINES {
        let file = numbered_file(SECTORS);
        let mut disk = Driven::new(open(&file), engine);
        // Header and data of a write in one descriptor, and cut across their seam.
        for cuts in [&[][..], &[1], &[15], &[17], &[8, 16, 1, 200], &[16, 511]] {
            let mut readable = header(OUT, 9);
            let fill = u8::try_from(cuts.len()).expect("small") + 0x40;
            readable.extend([fill; 1024]);
            let write = disk.run_cut(&readable, cuts, 1, &[]);
            assert_eq!((write.status, write.used), (OK, 1), "{cuts:?}");
            assert_eq!(disk.read(9, 1024), [fill; 1024], "{cuts:?}");
        }
        // The status as the tail of the data, and data in odd pieces.
        for cuts in [&[][..], &[1], &[512], &[511], &[3, 5, 7, 1000], &[1023, 1]] {
            let read = disk.run_cut(&header(IN, 20), &[16], 1025, cuts);
            assert_eq!((read.status, read.used), (OK, 1025), "{cuts:?}");
            assert_eq!(read.data, [[number(20); 512], [number(21); 512]].concat(), "{cuts:?}");
        }
        end(disk);
    }
}

#[test]
fn a_request_of_as_many_descriptors_as_the_ring_has_is_served() {
    for engine in ENGINES {
        let file = numbered_file(SECTORS);
        let mut disk = Driven::new(open(&file), engine);
        let read = disk.run_cut(&header(IN, 0), &[16], 254 * 512 + 1, &[512; 254]);
        assert_eq!((read.status, read.used), (OK, 254 * 512 + 1));
        let expected: Vec<_> = (0..254).flat_map(|sector| [number(sector); 512]).collect();
        assert_eq!(read.data, expected);
        end(disk);
    }
}

#[test]
fn b49_b50_without_a_status_byte_or_a_header_the_head_still_comes_back() {
    for engine in ENGINES {
        let file = numbered_file(SECTORS);
        let mut disk = Driven::new(open(&file), engine);
        // Nothing writable at all: also a write is not done.
        let mut readable = header(OUT, 4);
        readable.extend([0x55; 512]);
        assert_eq!(disk.run_cut(&readable, &[16], 0, &[]).used, 0);
        // Only a status byte: no header.
        let answer = disk.run_cut(&[], &[], 1, &[]);
        assert_eq!((answer.used, answer.status), (1, IOERR));
        // A header that is too short, and a status.
        for length in 1..16 {
            let short = header(IN, 0);
            let answer = disk.run_cut(&short[..length], &[], 513, &[512]);
            assert_eq!((answer.used, answer.status), (513, IOERR), "{length} bytes");
            assert_eq!(answer.data, [0; 512], "{length} bytes");
        }
        assert_eq!(disk.read(4, 512), [number(4); 512]);
        end(disk);
    }
}

#[test]
fn b51_unknown_kinds_are_answered_with_unsupp() {
    let file = numbered_file(SECTORS);
    let mut disk = Driven::new(open(&file), ENGINES[0]);
    for kind in [2, 3, 5, 7, 10, 14, 24, 0x100, 0x8000_0000, 0x8000_0001, u32::MAX] {
        let answer = disk.run(kind, 0, &[9; 512], 512);
        assert_eq!((answer.status, answer.used), (UNSUPP, 513), "kind {kind:#x}");
    }
    assert_eq!(disk.read(0, 512), [number(0); 512]);
    end(disk);
}

#[test]
fn b52_b53_what_is_outside_the_disk_or_no_whole_sector_fails_and_the_file_never_grows() {
    for engine in ENGINES {
        let file = numbered_file(SECTORS);
        let mut disk = Driven::new(open(&file), engine);
        let outside = [SECTORS, SECTORS + 1, 1 << 32, (1 << 55) - 1, 1 << 55, u64::MAX];
        for sector in outside {
            assert_eq!(disk.write(sector, &[1; 512]), IOERR, "write at {sector}");
            let read = disk.run(IN, sector, &[], 512);
            assert_eq!((read.status, read.data), (IOERR, vec![0; 512]), "read at {sector}");
        }
        assert_eq!(disk.write(SECTORS - 1, &[1; 1024]), IOERR);
        assert_eq!(disk.run(IN, SECTORS - 1, &[], 1024).status, IOERR);
        for bytes in [1, 511, 513, 1000] {
            assert_eq!(disk.write(0, &vec![1; bytes]), IOERR, "{bytes} bytes");
            assert_eq!(disk.run(IN, 0, &[], bytes).status, IOERR, "{bytes} bytes");
        }
        for (sector, sectors) in [(SECTORS, 1), (0, 257), (u64::MAX, 1), (u64::MAX, u32::MAX)] {
            for kind in [DISCARD, WRITE_ZEROES] {
                let answer = disk.run(kind, 0, &segment(sector, sectors, 0), 0);
                assert_eq!(answer.status, IOERR, "{sectors} at {sector}");
            }
        }
        assert_eq!(disk.read(SECTORS - 1, 512), [number(SECTORS - 1); 512]);
        end(disk);
        let expected: Vec<_> = (0..SECTORS).flat_map(|sector| [number(sector); 512]).collect();
        assert!(contents(file.as_file()) == expected, "nothing was written and nothing grew");
    }
}

#[test]
fn b54_segments_are_checked_before_the_first_is_carried_out() {
    for engine in ENGINES {
        let file = numbered_file(SECTORS);
        let mut disk = Driven::new(open(&file), engine);
        for kind in [DISCARD, WRITE_ZEROES] {
            for length in [0, 1, 15, 17, 31] {
                let bytes = [segment(0, 8, 0), segment(8, 8, 0)].concat();
                let answer = disk.run(kind, 0, &bytes[..length], 0);
                assert_eq!(answer.status, IOERR, "{length} bytes");
            }
            // The second segment is wrong in one way or another.
            for (bad, status) in [
                (segment(SECTORS, 1, 0), IOERR),
                (segment(0, 1 << 23, 0), IOERR),
                (segment(0, 1, 2), UNSUPP),
                (segment(0, 1, 0x8000_0000), UNSUPP),
            ] {
                let bytes = [segment(0, 8, 0), bad].concat();
                assert_eq!(disk.run(kind, 0, &bytes, 0).status, status);
            }
            let many = segment(0, 1, 0).repeat(33);
            assert_eq!(disk.run(kind, 0, &many, 0).status, IOERR);
        }
        let mega = segment(0, 1, 0).repeat(1 << 18);
        assert_eq!(disk.run(DISCARD, 0, &mega, 0).status, IOERR);
        assert_eq!(
            disk.read(0, 8 * 512),
            (0..8).flat_map(|n| [number(n); 512]).collect::<Vec<_>>()
        );
        // As many as there may be, cut across the seams.
        let good: Vec<u8> = (0..32).flat_map(|n| segment(n * 8, 8, 0)).collect();
        let readable = [header(DISCARD, 0), good].concat();
        assert_eq!(disk.run_cut(&readable, &[20, 7, 100], 1, &[]).status, OK);
        assert!(contents(file.as_file()).iter().all(|byte| *byte == 0), "all discarded");
        end(disk);
    }
}

#[test]
fn b55_unmap_is_for_write_zeroes_on_disks_that_discard() {
    let file = numbered_file(SECTORS);
    let mut disk = Driven::new(open(&file), ENGINES[0]);
    assert_eq!(disk.run(DISCARD, 0, &segment(0, 8, 1), 0).status, UNSUPP);
    assert_eq!(disk.run(WRITE_ZEROES, 0, &segment(0, 8, 1), 0).status, OK);
    end(disk);
    let block = Block::new(open(&file), BlockOptions::default()).expect("a disk");
    let mut disk = Driven::asleep(block, LoopKind::Epoll, !feature::DISCARD);
    disk.activate(1);
    assert_eq!(disk.run(WRITE_ZEROES, 0, &segment(8, 8, 1), 0).status, UNSUPP);
    assert_eq!(disk.run(DISCARD, 0, &segment(8, 8, 0), 0).status, UNSUPP);
    assert_eq!(disk.read(8, 512), [number(8); 512]);
    assert_eq!(disk.run(WRITE_ZEROES, 0, &segment(8, 8, 0), 0).status, OK);
    assert_eq!(disk.read(8, 512), [0; 512]);
    end(disk);
}

#[test]
fn b57_a_read_only_disk_is_never_written() {
    for (engine, events) in ENGINES {
        let file = numbered_file(SECTORS);
        let read_only = ImageOptions { read_only: true, ..ImageOptions::default() };
        let image = Image::open(file.path(), read_only).expect("opens");
        let options = BlockOptions { engine, ..BlockOptions::default() };
        let mut disk = Driven::of(Block::new(image, options).expect("a disk"), events, 1);
        assert_ne!(disk.vmm.offered() & feature::RO, 0);
        assert_eq!(disk.vmm.offered() & (feature::DISCARD | feature::WRITE_ZEROES), 0);
        assert_eq!(disk.write(0, &[1; 512]), IOERR);
        assert_eq!(disk.run(DISCARD, 0, &segment(0, 8, 0), 0).status, IOERR);
        assert_eq!(disk.run(WRITE_ZEROES, 0, &segment(0, 8, 0), 0).status, IOERR);
        assert_eq!(disk.read(0, 512), [number(0); 512]);
        assert_eq!(disk.flush(), OK);
        end(disk);
    }
}

#[test]
fn b58_the_id_is_cut_to_the_buffer_and_may_be_scattered() {
    let file = numbered_file(SECTORS);
    for serial in ["", "disk-1", "12345678901234567890"] {
        let options = BlockOptions { serial: serial.to_owned(), ..BlockOptions::default() };
        let block = Block::new(open(&file), options).expect("a disk");
        let mut disk = Driven::of(block, LoopKind::Epoll, 1);
        let mut id = serial.as_bytes().to_vec();
        id.resize(512, 0);
        for room in [0, 1, 6, 19, 20, 21, 512] {
            for cuts in [&[][..], &[room], &[1, 3, 7]] {
                let answer = disk.run_cut(&header(GET_ID, 0), &[], room + 1, cuts);
                let used = answer.used as usize;
                assert_eq!((answer.status, used), (OK, room + 1), "{room} {cuts:?}");
                assert_eq!(answer.data, id[..room], "{room} {cuts:?}");
            }
        }
        end(disk);
    }
}

#[test]
fn b59_a_flush_takes_no_notice_of_data_sector_and_priority() {
    for engine in ENGINES {
        let file = numbered_file(SECTORS);
        let mut disk = Driven::new(open(&file), engine);
        let answer = disk.run(FLUSH, u64::MAX, &[1; 77], 5);
        assert_eq!((answer.status, answer.used), (OK, 6));
        end(disk);
    }
}

#[test]
fn b60_overlapping_writes_leave_no_mixed_sector() {
    for (engine, events) in ENGINES {
        let file = image_file(64 * 512);
        let options = BlockOptions { engine, num_queues: 2, threads: 2, ..BlockOptions::default() };
        let mut disk = Driven::of(Block::new(open(&file), options).expect("a disk"), events, 2);
        let base = disk.arena.guest();
        for round in 0..20_u64 {
            for (queue, fill) in [(0, 0x11), (1, 0x22)] {
                let at = base + queue * (1 << 20);
                let readable = [(at, 16), (at + 4096, 64 * 512)];
                disk.store(&readable, &[header(OUT, 0), vec![fill; 64 * 512]].concat());
                let ring = &mut disk.queues[usize::try_from(queue).expect("small")];
                assert!(ring.add(&readable, &[(at + (1 << 19), 1)], round).expect("fits"));
            }
            for ring in &mut disk.queues {
                ring.kick().expect("kicked");
            }
            for ring in &mut disk.queues {
                assert!(ring.wait(std::time::Duration::from_secs(20)).expect("waits"));
                assert_eq!(ring.pop().expect("whole"), Some((round, 1)));
            }
            for sector in contents(file.as_file()).chunks(512) {
                assert!(
                    sector.iter().all(|byte| *byte == sector[0]),
                    "{engine:?} on {events:?}, round {round}: a mixture"
                );
            }
        }
        end(disk);
    }
}

#[test]
fn direct_access_takes_buffers_and_positions_as_they_come() {
    for engine in ENGINES {
        let file = numbered_file(SECTORS);
        let direct = ImageOptions { direct: true, ..ImageOptions::default() };
        let image = Image::open(file.path(), direct).expect("a file system with direct access");
        let mut disk = Driven::new(image, engine);
        for skew in [0, 1, 3, 512, 4095] {
            for (sector, sectors) in [(0, 8), (8, 1), (1, 3), (100, 128)] {
                let bytes = sectors * 512;
                let fill = u8::try_from((skew + sector) % 200).expect("small") + 1;
                let out = [header(OUT, sector), vec![fill; bytes]].concat();
                let write = disk.run_at(skew, &out, &[16, 700], 1, &[]);
                assert_eq!(write.status, OK, "write {skew} {sector} {sectors}");
                let read = disk.run_at(skew, &header(IN, sector), &[], bytes + 1, &[512]);
                assert_eq!((read.status, read.used as usize), (OK, bytes + 1));
                assert_eq!(read.data, vec![fill; bytes], "read {skew} {sector} {sectors}");
                let start = usize::try_from(sector).expect("small") * 512;
                let stored = contents(file.as_file());
                assert!(stored[start..start + bytes].iter().all(|byte| *byte == fill), "{skew}");
            }
        }
        assert_eq!(disk.read(9, 512), [number(9); 512], "neighbours are untouched");
        assert_eq!(disk.flush(), OK);
        end(disk);
    }
}

#[test]
fn the_cache_mode_is_the_driver_s_to_change_while_requests_run() {
    let file = numbered_file(SECTORS);
    let mut disk = Driven::new(open(&file), ENGINES[2]);
    let mode = |disk: &mut Driven| disk.vmm.read_config(32, 1).expect("readable");
    assert_eq!(mode(&mut disk), [1]);
    disk.vmm.write_config(32, &[0]).expect("writable");
    assert_eq!(mode(&mut disk), [0]);
    assert_eq!(disk.write(0, &[7; 512]), OK);
    disk.vmm.write_config(0, &[1]).expect_err("the capacity is not the driver's");
    disk.vmm.write_config(32, &[1]).expect("writable");
    assert_eq!(disk.read(0, 512), [7; 512]);
    end(disk);
}

#[test]
fn a_second_running_writer_is_refused_until_the_first_one_stops() {
    let file = numbered_file(SECTORS);
    let mut first = Driven::new(open(&file), ENGINES[0]);
    let block = Block::new(open(&file), BlockOptions::default()).expect("holding it is allowed");
    let mut second = Driven::asleep(block, LoopKind::Epoll, u64::MAX);
    let setup = outboard_frontend::QueueSetup { index: 0, size: 64, indirect: 0 };
    let refused = second.vmm.activate(&[setup]).expect_err("refused");
    assert!(matches!(refused, outboard_frontend::Error::Refused { .. }), "{refused}");
    assert_eq!(first.write(0, &[3; 512]), OK);
    first.vmm.sleep().expect("sleeps");
    second.vmm.reset(Vec::new()).expect("stopped");
    second.activate(1);
    assert_eq!(second.read(0, 512), [3; 512]);
    first.vmm.wake().expect_err("now the second one runs");
    end(second);
    end(first);
}
