//! A model of a disk, `Vec<u8>`, against the device: random requests in random shapes, and what
//! both hold afterwards.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::disk::*;

const SECTORS: u64 = 64;

/// A request as a driver might make it, good or bad.
#[derive(Clone, Debug)]
struct Asked {
    kind: u32,
    sector: u64,
    sectors: u32,
    /// Bytes that the data is longer than whole sectors.
    odd: usize,
    fill: u8,
    flags: u32,
    read_cuts: Vec<usize>,
    write_cuts: Vec<usize>,
    skew: u64,
}

fn asked() -> impl Strategy<Value = Asked> {
    let kind = prop_oneof![
        4 => Just(IN),
        4 => Just(OUT),
        1 => Just(FLUSH),
        2 => Just(DISCARD),
        2 => Just(WRITE_ZEROES),
    ];
    let sector = prop_oneof![9 => 0..SECTORS, 1 => any::<u64>()];
    let odd = prop_oneof![9 => Just(0), 1 => 1..512_usize];
    let flags = prop_oneof![4 => Just(0), 2 => Just(1), 1 => any::<u32>()];
    let cuts = || prop::collection::vec(1..2000_usize, 0..5);
    (kind, sector, 0..12_u32, odd, 1..=255_u8, flags, cuts(), cuts(), 0..4096_u64).prop_map(
        |(kind, sector, sectors, odd, fill, flags, read_cuts, write_cuts, skew)| Asked {
            kind,
            sector,
            sectors,
            odd,
            fill,
            flags,
            read_cuts,
            write_cuts,
            skew,
        },
    )
}

/// What the specification says of it; the disk changes with it.
fn expect(disk: &mut [u8], asked: &Asked) -> (Option<u8>, Vec<u8>) {
    let length = asked.sectors as usize * 512;
    let data = if asked.kind == IN { length + asked.odd } else { 0 };
    let start = usize::try_from(asked.sector).ok().and_then(|sector| sector.checked_mul(512));
    let range = start
        .and_then(|start| Some(start..start.checked_add(length)?))
        .filter(|range| range.end <= disk.len());
    match (asked.kind, range) {
        (FLUSH, _) => (OK, Vec::new()),
        (DISCARD, _) if asked.flags != 0 => (UNSUPP, Vec::new()),
        (WRITE_ZEROES, _) if asked.flags > 1 => (UNSUPP, Vec::new()),
        (DISCARD | WRITE_ZEROES, Some(range)) => {
            disk[range].fill(0);
            (OK, Vec::new())
        }
        (IN, Some(range)) if asked.odd == 0 => (OK, disk[range].to_vec()),
        (OUT, Some(range)) if asked.odd == 0 => {
            disk[range].fill(asked.fill);
            (OK, Vec::new())
        }
        _ => (IOERR, vec![0; data]),
    }
}

fn run(disk: &mut Driven, asked: &Asked) -> Answer {
    let length = asked.sectors as usize * 512 + asked.odd;
    let mut readable = header(asked.kind, asked.sector);
    let mut writable = 1;
    match asked.kind {
        IN => writable += length,
        OUT => readable.extend(vec![asked.fill; length]),
        DISCARD | WRITE_ZEROES => {
            readable.extend(segment(asked.sector, asked.sectors, asked.flags));
        }
        _ => {}
    }
    disk.run_at(asked.skew, &readable, &asked.read_cuts, writable, &asked.write_cuts)
}

#[test]
fn any_sequence_of_requests_leaves_what_a_plain_array_of_bytes_would_hold() {
    for engine in ENGINES {
        let file = numbered_file(SECTORS);
        let mut model = contents(file.as_file());
        let disk = std::cell::RefCell::new(Driven::new(open(&file), engine));
        let state = std::cell::RefCell::new(&mut model);
        // The disk goes on from case to case: what one left is what the next one finds.
        let config = Config { cases: 128, failure_persistence: None, ..Config::default() };
        TestRunner::new(config)
            .run(&prop::collection::vec(asked(), 1..12), |sequence| {
                for asked in &sequence {
                    let answer = run(&mut disk.borrow_mut(), asked);
                    let (status, data) = expect(&mut state.borrow_mut(), asked);
                    prop_assert_eq!(answer.status, status, "{:?}", asked);
                    prop_assert_eq!(answer.used as usize, answer.data.len() + 1);
                    prop_assert!(answer.data == data, "{:?}: other data", asked);
                }
                prop_assert!(contents(file.as_file()) == **state.borrow());
                Ok(())
            })
            .expect("as the model");
        end(disk.into_inner());
    }
}
