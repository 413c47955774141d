//! Which ports may be reached: ranges, as an operator writes them.

use std::ops::RangeInclusive;
use std::str::FromStr;

/// A set of ports. By itself it has all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ports(Vec<RangeInclusive<u32>>);

impl Ports {
    /// No port at all.
    #[must_use]
    pub fn none() -> Self {
        Self(Vec::new())
    }

    /// Whether `port` is one of them.
    #[must_use]
    pub fn contains(&self, port: u32) -> bool {
        self.0.iter().any(|range| range.contains(&port))
    }
}

impl Default for Ports {
    fn default() -> Self {
        Self(vec![0..=u32::MAX])
    }
}

impl FromStr for Ports {
    type Err = String;

    /// Numbers and ranges with commas between them, `all` or `none`: `22,1024-2047`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "all" => return Ok(Self::default()),
            "none" => return Ok(Self::none()),
            _ => {}
        }
        let range = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (first.parse().ok()?, last.parse().ok()?);
            (first <= last).then_some(first..=last)
        };
        let ranges: Option<Vec<_>> = text.split(',').map(range).collect();
        let ranges =
            ranges.ok_or_else(|| format!("{text:?}: ports are wanted, as in 22,1024-2047"))?;
        Ok(Self(ranges))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_as_numbers_and_ranges() {
        let ports: Ports = "22,1024-2047,4294967295".parse().expect("sound");
        for (port, inside) in
            [(21, false), (22, true), (1023, false), (1024, true), (2047, true), (2048, false)]
        {
            assert_eq!(ports.contains(port), inside, "{port}");
        }
        assert!(ports.contains(u32::MAX));
        assert!("all".parse::<Ports>().expect("sound").contains(0));
        assert!(!"none".parse::<Ports>().expect("sound").contains(0));
        for wrong in ["", ",", "1,", "5-4", "-1", "x", "4294967296", "1-2-3"] {
            assert!(wrong.parse::<Ports>().is_err(), "{wrong:?}");
        }
    }
}
