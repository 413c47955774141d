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

/// What was tried; written by hand.
const TAIL: &str = include_str!("tried.md");

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
    page + &alone(figures) + "\n" + TAIL
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
