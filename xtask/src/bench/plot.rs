//! `docs/performance.svg`: a bar for each row, as long as the logarithm of its ratio; the floor is a mark on it.

use super::page::rows;
use serde_json::Value;
use std::fmt::Write as _;

const LINE: u32 = 22;
const TOP: u32 = 48;
/// Where bars begin, and how many pixels are one doubling.
const LEFT: f64 = 430.0;
const DOUBLING: f64 = 84.0;
const WIDTH: u32 = 900;

/// The whole picture.
pub(super) fn plot(figures: &Value) -> String {
    let count = u32::try_from(rows(figures).count()).unwrap_or(0);
    let height = TOP + count * LINE + 16;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"18\" font-size=\"14\">Requests per second, times those of the peer; \
         the black mark is the floor</text>\n"
    );
    for power in -1..=5 {
        let x = at(2_f64.powi(power));
        let _ = writeln!(
            svg,
            "<line x1=\"{x:.1}\" y1=\"{}\" x2=\"{x:.1}\" y2=\"{}\" stroke=\"#ccc\"/>\
             <text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\" fill=\"#666\">{}</text>",
            TOP - 8,
            height - 12,
            TOP - 12,
            2_f64.powi(power)
        );
    }
    for (number, row) in (0..).zip(rows(figures)) {
        bar(&mut svg, TOP + number * LINE, row);
    }
    svg + "</svg>\n"
}

/// The place of a ratio.
fn at(ratio: f64) -> f64 {
    LEFT + DOUBLING * ratio.clamp(0.25, 34.0).log2()
}

fn bar(svg: &mut String, y: u32, row: &Value) {
    let text = |field: &str| row[field].as_str().unwrap_or_default();
    let scene =
        text("scene").split([' ', ',']).next_back().unwrap_or_default().trim_matches(['(', ')']);
    let ratio = row["ratio"].as_f64().unwrap_or(1.0);
    let (from, to) = (at(1.0).min(at(ratio)), at(1.0).max(at(ratio)));
    let colour = match text("peer") {
        "storage-daemon" => "#3465a4",
        "one-worker" => "#888888",
        _ => "#c17d11",
    };
    let _ = writeln!(
        svg,
        "<text x=\"10\" y=\"{}\">{scene}: {}, {}</text>\
         <rect x=\"{from:.1}\" y=\"{}\" width=\"{:.1}\" height=\"14\" fill=\"{colour}\"/>\
         <text x=\"{:.1}\" y=\"{}\">{ratio:.2}</text>",
        y + 12,
        text("work"),
        text("peer"),
        y + 1,
        to - from,
        to + 6.0,
        y + 12,
    );
    if let Some(floor) = row["floor"].as_f64().filter(|floor| *floor > 0.0) {
        let x = at(floor);
        let _ = writeln!(
            svg,
            "<line x1=\"{x:.1}\" y1=\"{}\" x2=\"{x:.1}\" y2=\"{}\" stroke=\"black\" stroke-width=\"2\"/>",
            y - 1,
            y + 17
        );
    }
}
