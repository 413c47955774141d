//! Kernel modules: which ones a guest needs, in the order in which they can be loaded.
//!
//! Debian's modules come as `.ko.xz` and, unpacked from the package, without `modules.dep`; the
//! `depends=` entry of each module says the same.

use anyhow::{Context as _, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A module ready to load.
#[derive(Debug)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// The unpacked file.
    pub bytes: Vec<u8>,
}

/// All modules below one `lib/modules/RELEASE`.
#[derive(Debug)]
pub struct Modules {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl Modules {
    /// Reads the folder `lib/modules/RELEASE`.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(dir: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        walk(&dir.join("kernel"), &mut files)?;
        let listed = std::fs::read_to_string(dir.join("modules.builtin")).unwrap_or_default();
        let builtin = listed.lines().filter_map(|line| name_of(Path::new(line))).collect();
        Ok(Self { files, builtin })
    }

    /// The wanted modules and what they need, each after what it needs.
    ///
    /// # Errors
    /// When a module is neither there nor built in.
    pub fn in_order(&self, wanted: &[&str]) -> Result<Vec<Module>> {
        let mut done = BTreeSet::new();
        let mut order = Vec::new();
        for name in wanted {
            self.visit(&name.replace('-', "_"), &mut done, &mut order)?;
        }
        Ok(order)
    }

    fn visit(&self, name: &str, done: &mut BTreeSet<String>, to: &mut Vec<Module>) -> Result<()> {
        if self.builtin.contains(name) || !done.insert(name.to_owned()) {
            return Ok(());
        }
        let file = self.files.get(name).with_context(|| format!("no kernel module {name}"))?;
        let bytes = unpacked(file)?;
        for need in needs(&bytes) {
            self.visit(&need.replace('-', "_"), done, to)?;
        }
        to.push(Module { name: name.to_owned(), bytes });
        Ok(())
    }
}

fn walk(dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(dir).with_context(|| format!("no {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            walk(&path, files)?;
        } else if let Some(name) = name_of(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// `…/virtio-rng.ko.xz` to `virtio_rng`.
fn name_of(file: &Path) -> Option<String> {
    let name = file.file_name()?.to_str()?;
    let stem = name.strip_suffix(".xz").unwrap_or(name).strip_suffix(".ko")?;
    Some(stem.replace('-', "_"))
}

fn unpacked(file: &Path) -> Result<Vec<u8>> {
    if file.extension().is_some_and(|end| end == "xz") {
        let done = Command::new("xz").arg("-dc").arg(file).output().context("cannot start xz")?;
        anyhow::ensure!(done.status.success(), "xz cannot unpack {}", file.display());
        return Ok(done.stdout);
    }
    std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

/// The names in the module's `depends=` entry.
fn needs(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = module.windows(key.len()).position(|window| window == key) else {
        return Vec::new();
    };
    let value = module.iter().skip(at + key.len()).take_while(|byte| **byte != 0).copied();
    let text = String::from_utf8_lossy(&value.collect::<Vec<_>>()).into_owned();
    text.split(',').filter(|name| !name.is_empty()).map(String::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_names_what_it_needs() {
        assert_eq!(needs(b"x\0depends=mbcache,jbd2\0retpoline=Y\0"), ["mbcache", "jbd2"]);
        assert!(needs(b"x\0depends=\0retpoline=Y\0").is_empty());
        assert!(needs(b"nothing of the kind").is_empty());
    }

    #[test]
    fn a_modules_name_is_its_file_name_with_underscores() {
        assert_eq!(name_of(Path::new("a/virtio-rng.ko.xz")).as_deref(), Some("virtio_rng"));
        assert_eq!(name_of(Path::new("a/ext4.ko")).as_deref(), Some("ext4"));
        assert_eq!(name_of(Path::new("a/modules.order")), None);
    }
}
