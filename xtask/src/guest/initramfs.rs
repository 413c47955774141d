//! The guest's first and only file system: busybox, the modules wanted, mke2fs with its
//! libraries, and our agent as `init`.

use super::{cpio::Archive, modules::Modules};
use crate::packages::Root;
use crate::process;
use anyhow::{Context as _, Result};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The agent: reads scripts from a serial port, answers with their output.
const INIT: &str = include_str!("init.sh");

/// The archive for a guest whose modules lie in `modules_dir` (`lib/modules/RELEASE`), with further
/// `programs` of the root, and programs of `ours`, in `/bin`.
///
/// # Errors
/// When a module or a program is missing from the root.
pub fn build(
    root: &Root,
    modules_dir: &Path,
    wanted: &[&str],
    programs: &[&str],
    ours: &[PathBuf],
) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for dir in ["bin", "sbin", "etc", "lib", "lib64", "lib/x86_64-linux-gnu", "modules", "dev"] {
        archive.directory(dir);
    }
    archive.file("init", true, INIT.as_bytes());
    archive.file("bin/busybox", true, &read(&root.path("bin/busybox"))?);
    let mut needed = BTreeSet::new();
    for program in ["sbin/mke2fs"].iter().chain(programs) {
        let place = program.strip_prefix("usr/").unwrap_or(program);
        archive.file(place, true, &read(&root.path(program))?);
        needed.extend(libraries(root, program)?);
    }
    for program in ours {
        let name = program.file_name().context("a program without a name")?.to_string_lossy();
        archive.file(&format!("bin/{name}"), true, &read(program)?);
        // A whole path stays what it is below the root.
        needed.extend(libraries(root, program.to_str().context("a path that is text")?)?);
    }
    for library in needed {
        let name = library.file_name().context("a library without a name")?.to_string_lossy();
        archive.file(&format!("lib/x86_64-linux-gnu/{name}"), true, &read(&library)?);
    }
    archive.link("lib64/ld-linux-x86-64.so.2", "/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2");
    archive.link("sbin/mkfs.ext4", "mke2fs");
    archive.file("etc/mke2fs.conf", false, &read(&root.path("etc/mke2fs.conf"))?);
    for (place, module) in Modules::read(modules_dir)?.in_order(wanted)?.iter().enumerate() {
        archive.file(&format!("modules/{place:02}-{}.ko", module.name), false, &module.bytes);
    }
    Ok(archive.finish())
}

/// The shared libraries that a program of the root needs, the loader among them.
fn libraries(root: &Root, program: &str) -> Result<Vec<PathBuf>> {
    let mut command = root.command(program);
    command.env("LD_TRACE_LOADED_OBJECTS", "1");
    let listed = process::output(&mut command)?;
    let mut found = vec![root.path("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")];
    for line in listed.lines() {
        let Some((name, rest)) = line.trim().split_once(" => ") else { continue };
        let path = rest.split(' ').next().unwrap_or_default();
        anyhow::ensure!(path.starts_with('/'), "{program} needs {name}, which is not in the root");
        found.push(PathBuf::from(path));
    }
    Ok(found)
}

fn read(file: &Path) -> Result<Vec<u8>> {
    std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}
