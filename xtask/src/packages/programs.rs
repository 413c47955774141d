//! Wrappers for the root's programs, in one folder that can be put on the search path.
//!
//! So a test finds qemu-storage-daemon by its plain name whether the machine has it or not. A
//! wrapper ends in `exec`: the process that a test started is the program itself.

use super::Root;
use anyhow::Result;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

const PROGRAMS: &[&str] = &[
    "usr/bin/qemu-system-x86_64",
    "usr/bin/qemu-storage-daemon",
    "usr/bin/qemu-img",
    "sbin/mke2fs",
    "sbin/e2fsck",
];

/// Statically linked, or at home with any libraries.
const PLAIN: &[&str] = &["usr/bin/linux.uml", "bin/busybox"];

/// Writes the wrappers.
///
/// # Errors
/// When they cannot be written.
pub fn wrappers(root: &Root) -> Result<()> {
    let dir = root.wrappers();
    std::fs::create_dir_all(&dir)?;
    for program in PROGRAMS {
        let command = root.command(program);
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let words: Vec<_> = words.map(|word| quoted(&word.to_string_lossy())).collect();
        let data = quoted(&root.path("usr/share/qemu").to_string_lossy());
        let data =
            if program.contains("qemu-system") { format!(" -L {data}") } else { String::new() };
        write(&dir, program, &format!("exec {}{data} \"$@\"", words.join(" ")))?;
    }
    for program in PLAIN {
        let path = quoted(&root.path(program).to_string_lossy());
        write(&dir, program, &format!("exec {path} \"$@\""))?;
    }
    let valgrind = quoted(&root.path("usr/libexec/valgrind").to_string_lossy());
    let binary = quoted(&root.path("usr/bin/valgrind.bin").to_string_lossy());
    write(&dir, "valgrind", &format!("VALGRIND_LIB={valgrind} exec {binary} \"$@\""))
}

/// Plug-ins of DPDK that its own folder does not find when it lies elsewhere.
const PLUGINS: &[&str] = &["librte_net_vhost.so", "librte_net_virtio.so", "librte_mempool_ring.so"];

/// Writes the wrappers of other people's back-ends.
///
/// # Errors
/// When they cannot be written.
pub fn peers(root: &Root) -> Result<()> {
    let dir = root.wrappers();
    std::fs::create_dir_all(&dir)?;
    let program = "usr/bin/dpdk-testpmd";
    let command = root.command(program);
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| quoted(&word.to_string_lossy())).collect();
    let [_, usr] = root.library_dirs();
    let plugin = |name: &&str| {
        let path = usr.join("dpdk/pmds-23.0").join(name);
        format!(" -d {}", quoted(&path.to_string_lossy()))
    };
    let plugins: String = PLUGINS.iter().map(plugin).collect();
    write(&dir, program, &format!("exec {}{plugins} \"$@\"", words.join(" ")))
}

/// What a shell and make of a root of its own call, and busybox has.
const APPLETS: &[&str] = &[
    "ar", "cat", "cp", "env", "ls", "mkdir", "mv", "rm", "sed", "sh", "sort", "tar", "test",
    "true", "uname",
];

/// Makes a root that a guest can change into: programs by their plain names, and places for what lies outside.
///
/// # Errors
/// When they cannot be made.
pub fn tools(root: &Root) -> Result<()> {
    for applet in APPLETS {
        let at = root.path("bin").join(applet);
        if at.symlink_metadata().is_err() {
            std::os::unix::fs::symlink("/bin/busybox", at)?;
        }
    }
    for place in ["dev", "mnt", "proc", "tmp"] {
        std::fs::create_dir_all(root.path(place))?;
    }
    Ok(())
}

fn write(dir: &Path, program: &str, line: &str) -> Result<()> {
    let file = dir.join(program.rsplit('/').next().unwrap_or(program));
    std::fs::write(&file, format!("#!/bin/sh\n{line}\n"))?;
    Ok(std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755))?)
}

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}
