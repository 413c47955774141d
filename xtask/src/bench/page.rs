//! `docs/performance.md`: a table for each scene, made of the figures.

use super::table::SCENES;
use serde_json::Value;
use std::fmt::Write as _;

const HEAD: &str = "# How fast, beside others\n\n\
    Written by `cargo xtask bench` from [`performance.json`](performance.json): do not edit; `--peers` measures anew. Each\n\
    row is one run of `outboard bench OURS --vs PEER`: rounds in turns (A B A B), medians, one queue, the driver on one\n\
    processor and both devices on the other. Only ratios within a row mean something: hosts move virtual processors, and\n\
    with the distance of two cores figures without work shift by two to ten. *CPU* is that of the whole back-end\n\
    process for each request.\n\n\
    storage-daemon is qemu-storage-daemon (aio=io_uring, an iothread); framework is [`benches/peers`](../benches/peers),\n\
    a device of 150 lines on the crates vhost-user-backend and virtio-queue that copies from a mapped file, sleeping at\n\
    once or (framework-spin) after 50 µs without requests. Our options are the defaults but where the title says\n\
    otherwise. A floor is what the project asks of itself.\n\n\
    ![ratios](performance.svg)\n";

const TAIL: &str = "\n## Tried, kept, left\n\
    Figures of single interleaved runs, the change against the same program without it.\n\n\
    - Kept: a look for events makes a system call only when the kernel has something to take or to give. No work, depth 1:\n\
    p50 1.1 µs against 1.6, CPU 1.25 µs against 1.69 for each request. At depth 32 within the noise.\n\
    - Kept: copies from the mapped file in place of `preadv`. /dev/shm, depth 32: CPU 0.9 to 1.0 µs against 2.1 in another run.\n\
    - Left: guest memory as fixed buffers of io_uring. O_DIRECT, depth 1, 32 and 128: CPU 34.1 µs against 37.3, 5.1 against 5.8,\n\
    3.3 against 3.8 (0.91, 0.88, 0.86). It pins all memory of the guest: a page that a balloon gave back and took again would be one page to the guest and another one to the ring, a guest's untouched memory would\n\
    all be taken from the host, and a postcopy migration would fetch all of it at once.\n\
    - Taken back: buffered writes made at once by the worker in place of io_uring (ext4, depth 32, on an overloaded machine:\n\
    0.7 of qemu-storage-daemon's rate, p50 29.9 ms against 12.4).\n\
    - Kept: after the last answer of io_uring the worker looks for the next request before it asks for a kick. O_DIRECT, depth\n\
    1, on an overloaded machine: p50 59 to 61 µs against 84 to 86, kicks 0.05 to 0.12 for a request against 1, CPU 32 to 34 µs\n\
    against 50; beside qemu-storage-daemon 1.35 of its rate at 0.62 to 0.71 of its CPU (before: 0.91 at 0.89, quiet machine).\n\
    - Taken back: the same after every answer, with others under way. Depth 32 and 128: 0.81 to 0.84 of the rate without it,\n\
    CPU the same. Again with a look at completions in between (10 and 30 µs): within the noise.\n\
    - Kept: the kernel hears of every 4 operations while the batch is still being taken; until then it heard of all of them\n\
    together, and the disk stood still meanwhile. O_DIRECT, depth 32, beside qemu-storage-daemon in the same run: 0.86 to 0.91\n\
    before, 1.06 to 1.11 after; 1 operation 1.12 (at 0.76 of its CPU in place of 0.62), 2 1.04, 8 0.98. Random writes at\n\
    depth 128: 1.35 to 1.82.\n\
    - Taken back: waiting up to 8 µs until what was answered together has come again together. The batches became whole\n\
    (31.9 of 32 requests for an interrupt of the disk, before 23 to 29), the rate stayed: the batch was not what was missing.\n\
    - Taken back: registered files. O_DIRECT, depth 32 and 128: 0.98 of the rate and CPU 8.23 µs against 8.12, 5.36 against\n\
    5.57, which is noise; and a killed process's ring would keep the image, and its lock, for longer than its writes last.\n\
    - Kept: a request gathered in two loops, what is readable and what is writable, with the place of a region's slot in bytes:\n\
    25 instructions fewer direct, 51 indirect (of 297 and 355); on packed rings 131 and 102 (of 529 and 498).\n\
    - Taken back: pointers in place of offsets in the list of pieces: 7 instructions more.\n\
    - Kept: places in a packed ring as pointers with the bytes up to its end, lengths in bytes, one bound for a walk in place of\n\
    three: 30 to 40 instructions of 344; then packed rings inlined into the worker's loop as split ones are: 22 of them, and 6 on\n\
    split rings (before the pointers: 13 to 23 fewer there, 4 to 10 more on split rings); the room of a list known beforehand: 5 to\n\
    10. Split direct 247 (was 267), indirect 280 (299), packed direct 269 (348), indirect 281 (370), in batches of 32 198,\n\
    231, 236, 246.\n\
    - Kept: a buffer translated with two branches in place of three (the sign of the offset, then the end), and a piece that is not\n\
    of the wanted length left to a function of its own: 6 to 13.\n\
    - Taken back: a tag of its own for the layout of a ring in place of a niche: 3 more on split rings. Not tried, for they would\n\
    cost one path what they save another: idle packed chains as a list through themselves (3 fewer, a recursive drop), room for 128\n\
    pieces in each list beforehand (5 fewer, 2 KiB a chain that lie a page apart).\n\
    - Order that was promised (VIRTIO_F_IN_ORDER) costs a device more than it saves: in batches of 32 451 instructions split and 358\n\
    packed, against 198 and 236, for its requests go the way of those that are looked at twice (474 and 374 before a chain whose turn\n\
    it is went by without being noted). The gain is the driver's; the sum of both is not measured. Nor is prefetching.\n\
    - Where the 269 of a packed request go: 75 are the walk (three translations of 8), 44 reading the header and writing the status,\n\
    35 what is done once a batch, 22 keeping and giving back the id. The 220 that the project asks of itself would want a request\n\
    that is translated when it is used.\n\
    - No work at depth 32 beside the framework: 1.22, 1.45 and, with fewer instructions, 1.64 in three runs; it moves with the distance\n\
    of the two processors. Two queues on one worker: row \"two workers beside one\".\n";

/// The whole page.
pub(super) fn page(figures: &Value) -> String {
    let mut page = HEAD.to_owned();
    let machine = figures["machine"].as_str().unwrap_or_default();
    let _ = writeln!(
        page,
        "\nMeasured on {machine}. Above a load of one for each processor the rates are those of time slices and say\n\
         little; p50 and CPU then say more."
    );
    for scene in SCENES {
        let rows: Vec<_> = rows(figures).filter(|row| row["scene"] == scene.name).collect();
        if rows.is_empty() {
            continue;
        }
        let _ = write!(
            page,
            "\n## {}\n| work | beside | IOPS, ours / theirs | ratio | floor | p50 µs | p99 µs | CPU µs, ours / theirs |\n\
             |---|---|---|---|---|---|---|---|\n",
            scene.name
        );
        for row in rows {
            let _ = writeln!(page, "{}", line(row));
        }
    }
    page + &alone(figures) + TAIL
}

/// One request at a time, of all scenes: what a request waits for.
fn alone(figures: &Value) -> String {
    let mut table = "\n## One request at a time\n\
         Latency in µs, of the rows above.\n\n\
         | image | work | beside | p50, ours | theirs | p99, ours | theirs |\n\
         |---|---|---|---|---|---|---|\n"
        .to_owned();
    let lone = |row: &&Value| row["work"].as_str().is_some_and(is_alone);
    for row in rows(figures).filter(lone) {
        let text = |field: &str| row[field].as_str().unwrap_or_default();
        let time = |side: &str, field: &str| {
            row[side][field].as_f64().map_or_else(|| "–".to_owned(), short)
        };
        let _ = writeln!(
            table,
            "| {} | {} | {} | **{}** | {} | **{}** | {} |",
            text("scene"),
            text("work"),
            text("peer"),
            time("ours", "p50_us"),
            time("theirs", "p50_us"),
            time("ours", "p99_us"),
            time("theirs", "p99_us"),
        );
    }
    table
}

/// Whether a row's title says that no request waits behind another.
fn is_alone(work: &str) -> bool {
    work.split(", ").any(|part| part == "depth 1")
}

pub(super) fn rows(figures: &Value) -> impl Iterator<Item = &Value> {
    figures["rows"].as_array().into_iter().flatten()
}

fn line(row: &Value) -> String {
    let text = |field: &str| row[field].as_str().unwrap_or_default();
    let pair = |field: &str| {
        let one = |side: &str| row[side][field].as_f64().map_or("–".to_owned(), short);
        format!("{} / {}", one("ours"), one("theirs"))
    };
    let ratio = row["ratio"].as_f64().unwrap_or_default();
    let floor = row["floor"].as_f64().filter(|floor| *floor > 0.0);
    let floor = match floor {
        None => "–".to_owned(),
        Some(floor) if ratio >= floor => format!("{floor}"),
        Some(floor) => format!("{floor}, missed"),
    };
    format!(
        "| {} | {} | {} | **{ratio:.2}** | {floor} | {} | {} | {} |",
        text("work"),
        text("peer"),
        pair("iops"),
        pair("p50_us"),
        pair("p99_us"),
        pair("cpu_us"),
    )
}

/// A number of three digits, in thousands or millions.
fn short(number: f64) -> String {
    let (scaled, unit) = match number {
        n if n >= 1e6 => (n / 1e6, "M"),
        n if n >= 1e3 => (n / 1e3, "k"),
        n => (n, ""),
    };
    let digits = if scaled >= 100.0 { 0 } else { 1 + usize::from(scaled < 10.0) };
    format!("{scaled:.digits$}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_is_depth_1_and_no_other() {
        assert!(
            is_alone("randread 4k, depth 1") && is_alone("randread 4k, depth 1, driver sleeps")
        );
        assert!(!is_alone("randread 4k, depth 128"));
    }

    #[test]
    fn numbers_have_three_digits() {
        for (number, text) in
            [(0.25, "0.25"), (12.34, "12.3"), (456.7, "457"), (45_600.0, "45.6k"), (1.5e6, "1.50M")]
        {
            assert_eq!(short(number), text);
        }
    }
}
