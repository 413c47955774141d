//! What a device has thrown away is told when it ends: its counters go with it.
//!
//! Invariant: who has lost nothing says nothing.

use outboard::{Fact, Inspect};
use tracing::info;

/// Tells what of `inspect` counts losses and is not zero, in one line.
pub(crate) fn tell(name: &str, inspect: &Inspect) {
    if let Some(lost) = lost(inspect) {
        info!("{name} has thrown away: {lost}");
    }
}

/// `PATH COUNT` of each. What a card shows of its switch is the switch's to tell.
fn lost(inspect: &Inspect) -> Option<String> {
    let counts = inspect.facts().into_iter().filter_map(|(path, fact)| {
        let (place, name) = path.rsplit_once('/').unwrap_or(("", &path));
        match fact {
            Fact::Number(count) if count > 0 && name.starts_with("dropped") => {
                (place != "switch").then(|| format!("{path} {count}"))
            }
            _ => None,
        }
    });
    let counts: Vec<_> = counts.collect();
    (!counts.is_empty()).then(|| counts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_dropped_is_one_line_and_nothing_dropped_is_none() {
        let inspect = Inspect::new();
        inspect.set("pairs/0/dropped-refused", 0);
        inspect.set("pairs/0/sent-packets", 7);
        inspect.set("switch/dropped-stopped", 3);
        assert_eq!(lost(&inspect), None);
        inspect.set("ports/a/dropped-stopped", 3);
        inspect.set("dropped-late", 1);
        assert_eq!(lost(&inspect).as_deref(), Some("dropped-late 1, ports/a/dropped-stopped 3"));
    }
}
