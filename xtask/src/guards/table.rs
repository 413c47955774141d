//! The kept table of guards: `xtask/guards.txt`.
//!
//! ```text
//! guard B3: a successor outside the table
//! file crates/outboard-queue/src/split/walk.rs
//! test outboard-queue split hostile_chains::b3_a_next_outside_the_table_breaks_the_ring
//! -the guard's text, exactly as it stands in the file (several lines, if need be)
//! +what stands there without it (no such line: nothing)
//! ```
//! A test is a package, the name of an integration test (or `lib`) and the test's path in it.
//! Lines that begin with `#` are remarks. Invariant: an entry that is not whole is refused.

use crate::paths;
use anyhow::{Context as _, Result, bail, ensure};
use std::path::Path;

/// Where the table lies, in the workspace.
pub const LIST: &str = "xtask/guards.txt";

/// One guard, and the test that misses it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guard {
    /// The hostile case that it is against.
    pub id: String,
    /// What it keeps out, in a few words.
    title: String,
    /// What to take away.
    pub removal: Removal,
    /// What has to fail then.
    pub test: Test,
}

impl Guard {
    /// What it keeps out, in a few words.
    #[must_use]
    pub fn title(&self) -> &str {
        &self.title
    }
}

/// A text of one file that is to give way to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removal {
    /// The file's path in the workspace.
    pub file: String,
    /// What stands there: it is found exactly once.
    pub text: String,
    /// What shall stand there.
    pub without: String,
}

impl Removal {
    /// The file's whole text below `root`, and where the guard begins in it.
    ///
    /// # Errors
    /// When the file cannot be read, or the text is not there exactly once.
    pub fn place(&self, root: &Path) -> Result<(String, usize)> {
        let whole = std::fs::read_to_string(root.join(&self.file)).context(self.file.clone())?;
        let mut found = whole.match_indices(self.text.as_str());
        let at = found.next().map(|(at, _)| at);
        let at = at.with_context(|| format!("not found in {}: {}", self.file, self.text))?;
        ensure!(found.next().is_none(), "twice or more in {}: {}", self.file, self.text);
        Ok((whole, at))
    }

    /// The file's text without the guard.
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub fn applied(&self, root: &Path) -> Result<String> {
        let (whole, at) = self.place(root)?;
        let rest = whole.get(at + self.text.len()..).unwrap_or_default();
        Ok(format!("{}{}{rest}", whole.get(..at).unwrap_or_default(), self.without))
    }
}

/// One test function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Test {
    /// The package.
    pub package: String,
    /// The integration test, or `lib`.
    pub target: String,
    /// The function, with its modules.
    pub name: String,
}

impl std::fmt::Display for Test {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.package, self.target, self.name)
    }
}

impl Test {
    /// Package, integration test and function, as the table of cases has them.
    #[must_use]
    pub fn short(&self) -> String {
        format!("{}/{}::{}", self.package, self.target, self.name)
    }

    /// Whether some source of the package has a function of this name.
    ///
    /// # Errors
    /// When none has.
    pub fn is_in(&self, root: &Path) -> Result<()> {
        let name = self.name.rsplit("::").next().unwrap_or(&self.name);
        let head = format!("fn {name}(");
        let part = if self.target == "lib" { "src" } else { "tests" };
        let there = contains(&root.join("crates").join(&self.package).join(part), &head)?;
        ensure!(there, "no such test: {self}");
        Ok(())
    }
}

fn contains(folder: &Path, text: &str) -> Result<bool> {
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let found = if path.is_dir() {
            contains(&path, text)?
        } else {
            std::fs::read(&path)?.windows(text.len()).any(|part| part == text.as_bytes())
        };
        if found {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The table of this tree.
///
/// # Errors
/// When it cannot be read or an entry is not whole.
pub fn read() -> Result<Vec<Guard>> {
    read_list(LIST)
}

/// A table of the same form that lies elsewhere in the workspace.
///
/// # Errors
/// As [`read`].
pub fn read_list(list: &'static str) -> Result<Vec<Guard>> {
    let text = std::fs::read_to_string(paths::workspace().join(list)).context(list)?;
    parse(&text).context(list)
}

fn parse(text: &str) -> Result<Vec<Guard>> {
    let mut guards = Vec::new();
    let lines: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
    for entry in lines.split(|line| line.is_empty()).filter(|entry| !entry.is_empty()) {
        guards.push(one(entry).with_context(|| entry.join("\n"))?);
    }
    ensure!(!guards.is_empty(), "it lists no guard");
    Ok(guards)
}

fn one(entry: &[&str]) -> Result<Guard> {
    let field = |name: &str| {
        let values: Vec<_> = entry.iter().filter_map(|line| line.strip_prefix(name)).collect();
        match values[..] {
            [value] => Ok(value.trim().to_owned()),
            _ => bail!("{} lines that begin with {name:?}, one wanted", values.len()),
        }
    };
    let lines = |mark: char| {
        let marked: Vec<_> = entry.iter().filter_map(|line| line.strip_prefix(mark)).collect();
        marked.join("\n")
    };
    let heading = field("guard ")?;
    let (id, title) = heading.split_once(": ").context("no `guard ID: title`")?;
    let test = field("test ")?;
    let words: Vec<_> = test.split(' ').collect();
    let [package, target, name] = words[..] else { bail!("a test is: package target name") };
    let removal = Removal { file: field("file ")?, text: lines('-'), without: lines('+') };
    ensure!(!removal.text.is_empty(), "no text of the guard");
    ensure!(removal.text != removal.without, "nothing changes");
    let [package, target, name] = [package, target, name].map(str::to_owned);
    let test = Test { package, target, name };
    Ok(Guard { id: id.to_owned(), title: title.to_owned(), removal, test })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENTRY: &str = "# a remark\nguard B3: outside\nfile a.rs\ntest p lib t::n\n\
                         -    if a {\n-        b\n+    if false {\n+        b\n";

    #[test]
    fn an_entry_is_read_with_its_text_as_it_stands() {
        let [guard] = &parse(ENTRY).unwrap()[..] else { panic!("one guard") };
        assert_eq!((guard.id.as_str(), guard.title()), ("B3", "outside"));
        assert_eq!(guard.removal.text, "    if a {\n        b");
        assert_eq!(guard.removal.without, "    if false {\n        b");
        assert_eq!(guard.test.to_string(), "p lib t::n");
    }

    #[test]
    fn an_entry_that_is_not_whole_is_refused() {
        for line in ["guard B3: outside", "file a.rs", "test p lib t::n"] {
            assert!(parse(&ENTRY.replace(line, "")).is_err(), "{line}");
        }
        assert!(parse(&ENTRY.replace('-', "+")).is_err());
        assert!(parse("").is_err());
    }

    #[test]
    fn a_text_is_replaced_where_it_stands_once_and_nowhere_else() {
        let folder = tempfile::tempdir().unwrap();
        let removal = |text: &str| Removal {
            file: "a.rs".to_owned(),
            text: text.to_owned(),
            without: "two".to_owned(),
        };
        std::fs::write(folder.path().join("a.rs"), "one; three; three").unwrap();
        assert_eq!(removal("one").applied(folder.path()).unwrap(), "two; three; three");
        assert!(removal("three").applied(folder.path()).is_err());
        assert!(removal("four").applied(folder.path()).is_err());
    }
}
