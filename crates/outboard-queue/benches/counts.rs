//! Programs to count instructions of, for `cargo xtask counts` and for `valgrind --tool=callgrind`.
//!
//! `--list` prints the cases, `CASE ITERATIONS` runs one. An iteration is one block-shaped request: a 16-byte header, a
//! data buffer and a status byte in three descriptors, taken, its header read, its status written, given back and
//! shown to the driver. The driver costs one store per batch: its ring is filled beforehand and offered for ever.
//! The cases with a dirty log or an in-flight region are those of a device whose guest moves, and of one that
//! outlives a crash. `regions`: header, data and status lie in different ones when there are eight.

#![expect(clippy::expect_used, reason = "a program of our own making, which may end")]

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use outboard_memory::{Cell16, DirtyLog, GuestMemory, Region, View, Window};
use outboard_queue::{DeviceQueue, InflightArea, QueueLayout, RingLog};

/// Requests that lie in the ring.
const REQUESTS: u16 = 64;
const SIZE: u16 = 256;
const REGION: u64 = 1 << 20;
const DATA: u32 = 4096;

/// What else is done for each request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kept {
    Nothing,
    /// Writes are noted in a dirty log, the used ring's too.
    Log,
    /// Requests are noted in an in-flight region.
    Region,
}

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    regions: u64,
    indirect: bool,
    event_idx: bool,
    batch: u16,
    kept: Kept,
}

const CASES: [Case; 12] = {
    const fn case(
        name: &'static str,
        regions: u64,
        indirect: bool,
        event_idx: bool,
        batch: u16,
    ) -> Case {
        Case { name, regions, indirect, event_idx, batch, kept: Kept::Nothing }
    }
    const fn keeping(name: &'static str, kept: Kept, batch: u16) -> Case {
        Case { name, regions: 1, indirect: false, event_idx: true, batch, kept }
    }
    [
        case("direct-1-region", 1, false, true, 1),
        case("direct-8-regions", 8, false, true, 1),
        case("direct-1-region-no-event", 1, false, false, 1),
        case("direct-1-region-batch-32", 1, false, true, 32),
        case("direct-8-regions-batch-32", 8, false, true, 32),
        case("indirect-1-region", 1, true, true, 1),
        case("indirect-8-regions", 8, true, true, 1),
        case("indirect-8-regions-batch-32", 8, true, true, 32),
        keeping("direct-1-region-inflight", Kept::Region, 1),
        keeping("direct-1-region-inflight-batch-32", Kept::Region, 32),
        keeping("direct-1-region-log", Kept::Log, 1),
        keeping("direct-1-region-log-batch-32", Kept::Log, 32),
    ]
};

fn main() {
    let arguments: Vec<_> =
        std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--list"] => CASES.iter().for_each(|case| println!("{}", case.name)),
        [name, iterations] => {
            let case = CASES.into_iter().find(|case| case.name == name).expect("a case of --list");
            run(case, iterations.parse().expect("a number of iterations"));
        }
        // As `cargo bench` and `cargo test` call it: show that the cases run.
        _ => CASES.into_iter().for_each(|case| run(case, 64)),
    }
}

fn run(case: Case, iterations: u64) {
    let (mut queue, avail) = filled(case);
    match case.batch {
        1 => hot_loop::<1>(&mut queue, &avail, iterations),
        _ => hot_loop::<32>(&mut queue, &avail, iterations / 32 * 32),
    }
    let done = iterations - iterations % u64::from(case.batch);
    assert_eq!(u64::from(queue.base()), done % 0x1_0000);
}

/// What is counted: the loop of a worker. The driver offers a batch, the device serves it and shows it.
#[inline(never)]
fn hot_loop<const BATCH: u16>(queue: &mut DeviceQueue, avail: &Cell16, iterations: u64) {
    let mut done = 0;
    while done < iterations {
        done += u64::from(BATCH);
        avail.store(u16::try_from(done % 0x1_0000).expect("16 bits"), Ordering::Release);
        while let Some(mut chain) = queue.pop().expect("an honest ring") {
            let header: [u64; 2] = chain.readable().read_obj().expect("a header");
            chain.reserve_tail(1).expect("a status byte");
            let status = u8::from(header[0] > 1);
            chain.write_tail(&[status]).expect("the status byte");
            queue.complete(chain, DATA + 1);
        }
        black_box(queue.publish().expect("memory"));
    }
}

/// A ring whose every entry stands for a request, and its available index.
fn filled(case: Case) -> (DeviceQueue, Cell16) {
    let regions = (0..case.regions).map(|at| {
        let (region, _file) = Region::memfd(at * 2 * REGION, REGION).expect("memory");
        Arc::new(region)
    });
    let memory = GuestMemory::new(1, regions.collect()).expect("a layout");
    let view = View::new(Arc::new(memory));
    let (layout, tables) = QueueLayout::split_at(0, SIZE).expect("room");
    let tables = tables.next_multiple_of(16);
    for request in 0..REQUESTS {
        let place = |at: u64| {
            (u64::from(request) + at) % case.regions * 2 * REGION + REGION / 2 + at * 0x2_0000
        };
        let buffers = [(place(0), 16, 0), (place(1), DATA, 2), (place(2), 1, 2)];
        let base = if case.indirect { 0 } else { 3 * request };
        let mut bytes = Vec::new();
        for (at, (addr, len, write)) in (0_u16..).zip(buffers) {
            let next = if at < 2 { 1 } else { 0 };
            bytes.extend(descriptor(addr, len, write | next, base + at + 1));
        }
        let head = if case.indirect {
            let table = tables + u64::from(request) * 48;
            view.write(table, &bytes).expect("room");
            view.write(layout.desc + 16 * u64::from(request), &descriptor(table, 48, 4, 0))
                .expect("room");
            request
        } else {
            view.write(layout.desc + 16 * u64::from(base), &bytes).expect("room");
            base
        };
        for entry in (request..SIZE).step_by(usize::from(REQUESTS)) {
            view.write(layout.avail + 4 + 2 * u64::from(entry), &head.to_le_bytes()).expect("room");
        }
    }
    let features = u64::from(case.event_idx) << 29 | u64::from(case.indirect) << 28;
    let cells = view.cells(layout.avail, 4).expect("the available ring");
    let avail = cells.u16_at(2).expect("its index");
    let mut queue = DeviceQueue::new(layout, features, 0, view).expect("a ring");
    keep(&mut queue, case.kept);
    (queue, avail)
}

fn keep(queue: &mut DeviceQueue, kept: Kept) {
    match kept {
        Kept::Nothing => {}
        Kept::Log => {
            let (log, _file) = DirtyLog::memfd(REGION).expect("a log");
            let used = Some(queue.layout().used);
            queue.set_log(Some(RingLog { log: Arc::new(log), used, notify: None }));
        }
        Kept::Region => {
            let size = InflightArea::size(SIZE);
            let (_region, file) = Region::memfd(0, size).expect("a file");
            let window = Window::map(file, 0, size, true).expect("mapped");
            let area = InflightArea::new(&Arc::new(window), 0, SIZE).expect("inside");
            queue.set_inflight(area).expect("a fresh area");
        }
    }
}

fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> Vec<u8> {
    [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()]
        .concat()
}
