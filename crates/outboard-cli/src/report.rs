//! How the commands show figures to people: aligned tables and short numbers.
//!
//! Invariant: nothing here measures or decides; it turns values into text, and text only.

use std::fmt::Write as _;

/// A table of words and right-aligned figures. The first row is the heading.
#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with this heading.
    pub(crate) fn new<const N: usize>(heading: [&str; N]) -> Self {
        Self { rows: vec![heading.map(str::to_owned).to_vec()] }
    }

    /// Adds one row.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let mut widths = vec![0; columns];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        for row in &self.rows {
            let mut line = String::new();
            for (at, (cell, width)) in row.iter().zip(&widths).enumerate() {
                match at {
                    0 => write!(line, "  {cell:<width$}")?,
                    _ => write!(line, "  {cell:>width$}")?,
                }
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// A count in at most four figures: `950`, `12.3k`, `1.05M`.
pub(crate) fn short(value: f64) -> String {
    let (scaled, unit) = match value {
        v if v >= 1e9 => (v / 1e9, "G"),
        v if v >= 1e6 => (v / 1e6, "M"),
        v if v >= 1e3 => (v / 1e3, "k"),
        v => (v, ""),
    };
    match scaled {
        s if unit.is_empty() && s.fract() == 0.0 => format!("{s:.0}"),
        s if s >= 100.0 => format!("{s:.0}{unit}"),
        s if s >= 10.0 => format!("{s:.1}{unit}"),
        s => format!("{s:.2}{unit}"),
    }
}

/// A size in bytes with its largest whole unit: `512 B`, `4 KiB`, `1.5 GiB`.
pub(crate) fn bytes(value: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut whole = value;
    while whole >= 1024 && unit + 1 < UNITS.len() {
        whole /= 1024;
        unit += 1;
    }
    let scale = 1u64 << (10 * unit);
    let name = UNITS.get(unit).copied().unwrap_or("B");
    if value.is_multiple_of(scale) {
        return format!("{whole} {name}");
    }
    let tenths = u128::from(value) * 10 / u128::from(scale);
    format!("{}.{} {name}", tenths / 10, tenths % 10)
}

/// Reads a size: `4096`, `4k`, `1M`, `2G`, also `4KiB`.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let trimmed = text.trim();
    let digits = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(format!("'{text}' is no size (like 4096, 4k, 1M, 2G)")),
    };
    let number: u64 =
        number.parse().map_err(|_| format!("'{text}' is no size (like 4096, 4k, 1M, 2G)"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} does not fit into 64 bits"))
}

/// Writes to standard output. A reader that has gone (`| head`) is no failure of ours.
pub(crate) fn say(text: impl std::fmt::Display) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Microseconds to one place.
pub(crate) fn micros(value: f64) -> String {
    format!("{value:.1}")
}

/// A figure to two places, or a dash.
pub(crate) fn maybe(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"))
}

/// The name of a process in brackets, with a space before it; nothing when it is not known.
pub(crate) fn process_name(pid: u32) -> String {
    match std::fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => format!(" ({})", name.trim()),
        Err(_) => String::new(),
    }
}

/// A spinner with a line of text on standard error; only a terminal sees it.
pub(crate) fn spinner() -> indicatif::ProgressBar {
    let bar = indicatif::ProgressBar::new_spinner();
    bar.enable_steady_tick(std::time::Duration::from_millis(120));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_shown() {
        assert_eq!(parse_size("4k"), Ok(4096));
        assert_eq!(parse_size("2GiB"), Ok(2 << 30));
        assert_eq!(parse_size("77"), Ok(77));
        assert!(parse_size("k").is_err());
        assert!(parse_size("99999999999T").is_err());
        assert_eq!(bytes(4096), "4 KiB");
        assert_eq!(bytes(1536 << 20), "1.5 GiB");
        assert_eq!(bytes(0), "0 B");
    }

    #[test]
    fn counts_have_at_most_four_figures() {
        assert_eq!(short(950.0), "950");
        assert_eq!(short(12_345.0), "12.3k");
        assert_eq!(short(1_050_000.0), "1.05M");
        assert_eq!(short(157_400.0), "157k");
        assert_eq!(short(3.25), "3.25");
    }

    #[test]
    fn columns_are_aligned_and_nothing_trails() {
        let mut table = Table::new(["what", "IOPS"]);
        table.row(["read".to_owned(), "12.3k".to_owned()]);
        table.row(["write and flush".to_owned(), "9".to_owned()]);
        let text = table.to_string();
        assert_eq!(text.lines().map(str::len).collect::<Vec<_>>(), [24, 24, 24]);
    }
}
