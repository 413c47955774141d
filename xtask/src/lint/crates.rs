//! Our crates among themselves and what they stand on: arrows one way, and a small tree.

use crate::process;
use anyhow::Result;
use std::process::Command;

/// What cargo knows of the workspace.
///
/// # Errors
/// When cargo fails or says something that is not JSON.
pub fn metadata(more: &[&str]) -> Result<serde_json::Value> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["metadata", "--format-version", "1", "--locked"]).args(more);
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    Ok(serde_json::from_str(&process::output(&mut command)?)?)
}
