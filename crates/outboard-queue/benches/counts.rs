//! Programs to count instructions of, for `cargo xtask counts` and for `valgrind --tool=callgrind`.
//!
//! `--list` prints the cases, `CASE ITERATIONS` runs one, `CASE ITERATIONS driver` only what its driver and its loop do,
//! which is taken from the other. An iteration is one block-shaped request: a 16-byte header, a
//! data buffer and a status byte in three descriptors, taken, its header read, its status written, given back and
//! shown to the driver. The driver costs one store per batch: its ring is filled beforehand and offered for ever.
//! The cases with a dirty log or an in-flight region are those of a device whose guest moves, and of one that
//! outlives a crash. A packed ring is written by both sides: its driver makes each request available again, five stores
//! for one of three descriptors. `regions`: header, data and status lie in different ones when there are eight.

#![expect(clippy::expect_used, reason = "a program of our own making, which may end")]

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use outboard_memory::{
    Cell16, DirtyLog, GuestMemory, PackedBody, PackedRing, Region, View, Window,
};
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
    /// Less: its bytes are left alone, header and status too. What is left is the ring's part.
    Alone,
    /// Writes are noted in a dirty log, the used ring's too.
    Log,
    /// Requests are noted in an in-flight region.
    Region,
    /// Order was promised.
    Order,
}

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    regions: u64,
    indirect: bool,
    event_idx: bool,
    batch: u16,
    kept: Kept,
    packed: bool,
}

const CASES: [Case; 22] = {
    const fn case(
        name: &'static str,
        regions: u64,
        indirect: bool,
        event_idx: bool,
        batch: u16,
    ) -> Case {
        Case { name, regions, indirect, event_idx, batch, kept: Kept::Nothing, packed: false }
    }
    const fn keeping(name: &'static str, kept: Kept, batch: u16) -> Case {
        Case { name, regions: 1, indirect: false, event_idx: true, batch, kept, packed: false }
    }
    const fn packed(name: &'static str, indirect: bool, batch: u16, kept: Kept) -> Case {
        Case { name, regions: 8, indirect, event_idx: true, batch, kept, packed: true }
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
        packed("packed-direct-8-regions", false, 1, Kept::Nothing),
        packed("packed-direct-8-regions-batch-32", false, 32, Kept::Nothing),
        packed("packed-indirect-8-regions", true, 1, Kept::Nothing),
        packed("packed-indirect-8-regions-batch-32", true, 32, Kept::Nothing),
        packed("packed-direct-8-regions-log", false, 1, Kept::Log),
        keeping("direct-1-region-in-order-batch-32", Kept::Order, 32),
        packed("packed-direct-8-regions-in-order-batch-32", false, 32, Kept::Order),
        keeping("direct-1-region-alone", Kept::Alone, 1),
        packed("packed-direct-8-regions-alone", false, 1, Kept::Alone),
        packed("packed-indirect-8-regions-alone", true, 1, Kept::Alone),
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
        [name, iterations, "driver"] => {
            let case = CASES.into_iter().find(|case| case.name == name).expect("a case of --list");
            run_driver(case, iterations.parse().expect("a number of iterations"));
        }
        // As `cargo bench` and `cargo test` call it: show that the cases run.
        _ => CASES.into_iter().for_each(|case| run(case, 64)),
    }
}

fn run(case: Case, iterations: u64) {
    if case.packed {
        let (mut queue, mut driver) = filled_packed(case);
        match case.batch {
            1 if case.kept == Kept::Alone => {
                packed_loop::<1>(&mut driver, iterations, || serve::<false>(&mut queue));
            }
            1 => packed_loop::<1>(&mut driver, iterations, || serve::<true>(&mut queue)),
            _ => packed_loop::<32>(&mut driver, iterations / 32 * 32, || serve::<true>(&mut queue)),
        }
        assert_eq!(queue.base(), driver.base());
        return;
    }
    let (mut queue, avail) = filled(case);
    match case.batch {
        1 if case.kept == Kept::Alone => {
            hot_loop::<1>(&avail, iterations, || serve::<false>(&mut queue));
        }
        1 => hot_loop::<1>(&avail, iterations, || serve::<true>(&mut queue)),
        _ => hot_loop::<32>(&avail, iterations / 32 * 32, || serve::<true>(&mut queue)),
    }
    let done = iterations - iterations % u64::from(case.batch);
    assert_eq!(u64::from(queue.base()), done % 0x1_0000);
}

/// The same without a device.
fn run_driver(case: Case, iterations: u64) {
    if case.packed {
        let (_, mut driver) = filled_packed(case);
        return match case.batch {
            1 => packed_loop::<1>(&mut driver, iterations, || false),
            _ => packed_loop::<32>(&mut driver, iterations / 32 * 32, || false),
        };
    }
    let (_, avail) = filled(case);
    match case.batch {
        1 => hot_loop::<1>(&avail, iterations, || false),
        _ => hot_loop::<32>(&avail, iterations / 32 * 32, || false),
    }
}

/// What is counted: the loop of a worker. The driver offers a batch, the device serves it and shows it.
#[inline(never)]
fn hot_loop<const BATCH: u16>(avail: &Cell16, iterations: u64, mut serve: impl FnMut() -> bool) {
    let mut done = 0;
    while done < iterations {
        done += u64::from(BATCH);
        avail.store(u16::try_from(done % 0x1_0000).expect("16 bits"), Ordering::Release);
        black_box(serve());
    }
}

/// The device's part of a batch. Whether to call the driver.
#[inline(always)]
fn serve<const TOUCHED: bool>(queue: &mut DeviceQueue) -> bool {
    while let Some(mut chain) = queue.pop().expect("an honest ring") {
        if !TOUCHED {
            queue.complete(chain, DATA + 1);
            continue;
        }
        let header: [u64; 2] = chain.readable().read_obj().expect("a header");
        chain.reserve_tail(1).expect("a status byte");
        let status = u8::from(header[0] > 1);
        chain.write_tail(&[status]).expect("the status byte");
        queue.complete(chain, DATA + 1);
    }
    queue.publish().expect("memory")
}

/// The same on a packed ring.
#[inline(never)]
fn packed_loop<const BATCH: u16>(
    driver: &mut Offers,
    iterations: u64,
    mut serve: impl FnMut() -> bool,
) {
    let mut done = 0;
    while done < iterations {
        done += u64::from(BATCH);
        for _ in 0..BATCH {
            driver.offer();
        }
        black_box(serve());
    }
}

/// The driver of a packed ring that offers the same requests for ever: only what the device wrote, and what changes
/// from lap to lap, is written.
struct Offers {
    ring: PackedRing,
    at: u16,
    /// AVAIL in odd laps, USED in even ones.
    available: u16,
    indirect: bool,
}

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

impl Offers {
    /// (Out of line, so that it is the same without a device, whatever registers that takes.)
    #[inline(never)]
    fn offer(&mut self) {
        let (at, order) = (self.at, Ordering::Release);
        if self.indirect {
            self.ring.set_used(at, at, 48);
            self.ring.set_flags(at, 4 | self.available, order);
            self.at += 1;
        } else {
            self.ring.set_used(at, at, 16);
            self.ring.set_flags(at + 2, 2 | self.available, order);
            self.ring.set_flags(at + 1, 3 | self.available, order);
            self.ring.set_flags(at, 1 | self.available, order);
            self.at += 3;
        }
        if self.at == PACKED_SIZE {
            self.at = 0;
            self.available ^= AVAIL | USED;
        }
    }

    fn base(&self) -> u32 {
        let wrap = u32::from(self.available == AVAIL) << 15;
        let half = u32::from(self.at) | wrap;
        half | half << 16
    }
}

/// 64 requests of three descriptors: no power of two.
const PACKED_SIZE: u16 = 3 * REQUESTS;

fn filled_packed(case: Case) -> (DeviceQueue, Offers) {
    let view = memory(case.regions);
    let (layout, end) = QueueLayout::packed_at(0, PACKED_SIZE).expect("room");
    let tables = end.next_multiple_of(16);
    let cells = view.cells(layout.desc, 16 * u64::from(PACKED_SIZE)).expect("the ring");
    let ring = cells.packed(0, PACKED_SIZE).expect("the ring");
    for at in 0..PACKED_SIZE {
        let request = if case.indirect { at } else { at / 3 };
        let buffers = buffers(request, case.regions);
        let body = if case.indirect {
            let table = tables + u64::from(request) * 48;
            for (at, (addr, len, write)) in (0_u64..).zip(buffers) {
                let entry = descriptor(addr, len, 0, write);
                view.write(table + 16 * at, &entry).expect("room");
            }
            PackedBody { addr: table, len: 48, id: at }
        } else {
            let (addr, len, _) = buffers[usize::from(at % 3)];
            PackedBody { addr, len, id: at / 3 }
        };
        ring.set_body(at, body).expect("inside");
    }
    let features = 1 << 34 | features(case);
    let mut queue = DeviceQueue::new(layout, features, 0x8000_8000, view).expect("a ring");
    keep(&mut queue, case.kept);
    (queue, Offers { ring, at: 0, available: AVAIL, indirect: case.indirect })
}

fn features(case: Case) -> u64 {
    let order = u64::from(case.kept == Kept::Order) << 35;
    u64::from(case.event_idx) << 29 | u64::from(case.indirect) << 28 | order
}

fn memory(regions: u64) -> View {
    let regions = (0..regions).map(|at| {
        let (region, _file) = Region::memfd(at * 2 * REGION, REGION).expect("memory");
        Arc::new(region)
    });
    View::new(Arc::new(GuestMemory::new(1, regions.collect()).expect("a layout")))
}

/// Address, length and WRITE of each buffer of a request.
fn buffers(request: u16, regions: u64) -> [(u64, u32, u16); 3] {
    let place =
        |at: u64| (u64::from(request) + at) % regions * 2 * REGION + REGION / 2 + at * 0x2_0000;
    [(place(0), 16, 0), (place(1), DATA, 2), (place(2), 1, 2)]
}

/// A ring whose every entry stands for a request, and its available index.
fn filled(case: Case) -> (DeviceQueue, Cell16) {
    let view = memory(case.regions);
    let (layout, tables) = QueueLayout::split_at(0, SIZE).expect("room");
    let tables = tables.next_multiple_of(16);
    for request in 0..REQUESTS {
        let buffers = buffers(request, case.regions);
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
    let features = features(case);
    let cells = view.cells(layout.avail, 4).expect("the available ring");
    let avail = cells.u16_at(2).expect("its index");
    let mut queue = DeviceQueue::new(layout, features, 0, view).expect("a ring");
    keep(&mut queue, case.kept);
    (queue, avail)
}

fn keep(queue: &mut DeviceQueue, kept: Kept) {
    match kept {
        Kept::Nothing | Kept::Alone | Kept::Order => {}
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
