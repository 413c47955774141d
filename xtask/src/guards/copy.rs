//! A copy of the tree to spoil, below the target directory.
//!
//! It lies at the same place every time and only files that differ are written, so that what was
//! built of it stays good. Invariant: a refreshed copy is the tree, whatever an earlier run that
//! was interrupted had left.

use super::table::Removal;
use crate::{paths, process};
use anyhow::{Context as _, Result};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A copy of the tree.
#[derive(Debug)]
pub struct Copy {
    root: PathBuf,
    target: PathBuf,
}

impl Copy {
    /// The copy of this name, made the same as the tree. Two runs at a time need two names.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn refreshed(name: &str) -> Result<Self> {
        let folder = paths::xtask()?.join(name);
        let copy = Self { root: folder.join("tree"), target: folder.join("target") };
        let tree = paths::workspace();
        let mut list = Command::new("git");
        list.args(["ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate"]);
        let listed = process::output(list.current_dir(&tree))?;
        let mut there = BTreeSet::new();
        for path in listed.lines() {
            // A file that was just removed is still listed.
            let Ok(bytes) = std::fs::read(tree.join(path)) else { continue };
            write(&copy.root.join(path), &bytes)?;
            there.insert(copy.root.join(path));
        }
        remove_others(&copy.root, &there)?;
        Ok(copy)
    }

    /// Where the copy lies: its workspace's root.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// A target directory for what is built of it.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Makes the change in the copy. It is taken back when the value is dropped.
    ///
    /// # Errors
    /// When the text is not found exactly once, or the file cannot be written.
    pub fn without(&self, removal: &Removal) -> Result<Removed> {
        let (whole, _) = removal.place(&self.root)?;
        let changed = removal.applied(&self.root)?;
        let file = self.root.join(&removal.file);
        let removed = Removed { file, whole };
        std::fs::write(&removed.file, changed).with_context(|| removal.file.clone())?;
        Ok(removed)
    }
}

/// A change in a copy, as long as this lives.
#[derive(Debug)]
pub struct Removed {
    file: PathBuf,
    whole: String,
}

impl Drop for Removed {
    fn drop(&mut self) {
        // When it fails, the next run writes the file anew.
        let _ = std::fs::write(&self.file, &self.whole);
    }
}

/// Writes a file that is not so already.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    if std::fs::read(path).is_ok_and(|there| there == bytes) {
        return Ok(());
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(path, bytes).with_context(|| path.display().to_string())
}

fn remove_others(folder: &Path, keep: &BTreeSet<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            remove_others(&path, keep)?;
        } else if !keep.contains(&path) {
            std::fs::remove_file(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_taken_back_when_it_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let copy = Copy { root: folder.path().into(), target: folder.path().join("target") };
        let file = folder.path().join("a.rs");
        std::fs::write(&file, "if true {}").unwrap();
        let [file_name, text, without] = ["a.rs", "true", "false"].map(str::to_owned);
        let removal = Removal { file: file_name, text, without };
        let removed = copy.without(&removal).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "if false {}");
        drop(removed);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "if true {}");
    }
}
