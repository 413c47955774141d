//! Where things lie: the workspace, its target directory, and what xtask makes below it.
//!
//! Invariant: no path of one machine is written down; all are found at run time, the same way
//! from `cargo xtask` and from a test binary.

use anyhow::{Context as _, Result};
use std::path::PathBuf;
use std::sync::OnceLock;

/// The root of the workspace (the folder above `xtask`).
#[must_use]
pub fn workspace() -> PathBuf {
    // Where it was built and where it is run may differ when clones share a target directory.
    let told = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let manifest = told.filter(|dir| dir.ends_with("xtask"));
    let manifest = manifest.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")));
    manifest.parent().unwrap_or(&manifest).to_path_buf()
}

/// The target directory that cargo really uses: environment and configuration are both heard.
///
/// # Errors
/// When cargo cannot be asked.
pub fn target() -> Result<PathBuf> {
    static TARGET: OnceLock<PathBuf> = OnceLock::new();
    if let Some(known) = TARGET.get() {
        return Ok(known.clone());
    }
    let found = match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => workspace().join(dir),
        None => {
            let data = crate::lint::crates::metadata(&["--no-deps"])?;
            let dir = data["target_directory"].as_str();
            PathBuf::from(dir.context("cargo metadata names no target directory")?)
        }
    };
    Ok(TARGET.get_or_init(|| found).clone())
}

/// `target/xtask`: packages unpacked, guests' files, logs.
///
/// # Errors
/// When cargo cannot be asked.
pub fn xtask() -> Result<PathBuf> {
    Ok(target()?.join("xtask"))
}

/// A folder that outlives `cargo clean`, for downloads and tools: `$OUTBOARD_CACHE`, or `outboard` in the
/// user's cache folder; `target/xtask/cache` when there is no home.
///
/// # Errors
/// When neither is known and cargo cannot be asked.
pub fn cache() -> Result<PathBuf> {
    let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(dir) = var("OUTBOARD_CACHE") {
        return Ok(dir);
    }
    let home = var("XDG_CACHE_HOME").or_else(|| var("HOME").map(|home| home.join(".cache")));
    home.map_or_else(|| Ok(xtask()?.join("cache")), |dir| Ok(dir.join("outboard")))
}
