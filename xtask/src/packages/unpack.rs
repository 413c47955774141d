//! Unpacks package files into one folder, without installing anything.
//!
//! Of the kernel's 106 MB only what a guest can use is written: the kernel, and the modules of
//! the folders in `KERNEL_PARTS`.

use crate::process;
use anyhow::{Context as _, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Patterns of the kernel package's files that are unpacked. The kernel's drivers for hardware
/// that no guest has are left out.
const KERNEL_PARTS: &[&str] = &[
    "./boot/vmlinuz-*",
    "./boot/config-*",
    "./lib/modules/*/modules.*",
    "./lib/modules/*/kernel/arch",
    "./lib/modules/*/kernel/block",
    "./lib/modules/*/kernel/crypto",
    "./lib/modules/*/kernel/drivers/block",
    "./lib/modules/*/kernel/drivers/char",
    "./lib/modules/*/kernel/drivers/crypto/virtio",
    "./lib/modules/*/kernel/drivers/gpu/drm",
    "./lib/modules/*/kernel/drivers/i2c",
    "./lib/modules/*/kernel/drivers/input",
    "./lib/modules/*/kernel/drivers/iommu",
    "./lib/modules/*/kernel/drivers/net/*.ko*",
    "./lib/modules/*/kernel/drivers/nvdimm",
    "./lib/modules/*/kernel/drivers/scsi/*.ko*",
    "./lib/modules/*/kernel/drivers/virtio",
    "./lib/modules/*/kernel/fs",
    "./lib/modules/*/kernel/lib",
    "./lib/modules/*/kernel/net",
    "./lib/modules/*/kernel/sound",
];

/// Unpacks each file into `root`, with a line of progress for the large ones.
///
/// # Errors
/// When a package is damaged or the disk is full.
pub fn packages(files: &[PathBuf], root: &Path) -> Result<()> {
    std::fs::create_dir_all(root)?;
    println!("packages: unpacking into {}", root.display());
    for file in files {
        let name = file.file_name().context("a package without a name")?.to_string_lossy();
        if name.starts_with("linux-image") {
            kernel(file, root)?;
        } else {
            process::output(Command::new("dpkg-deb").arg("-x").arg(file).arg(root))?;
        }
    }
    Ok(())
}

fn kernel(file: &Path, root: &Path) -> Result<()> {
    let mut unpack = Command::new("dpkg-deb");
    unpack.arg("--fsys-tarfile").arg(file).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut unpack = process::Running(unpack.spawn().context("cannot start dpkg-deb")?);
    let stream = unpack.0.stdout.take().context("dpkg-deb has no output")?;
    let mut tar = Command::new("tar");
    tar.arg("-x").arg("-C").arg(root).arg("--wildcards").args(KERNEL_PARTS).stdin(stream);
    // A pattern that matches nothing makes tar fail: the list above is checked by that.
    process::run(&mut tar)?;
    ensure!(unpack.0.wait()?.success(), "dpkg-deb cannot read {}", file.display());
    Ok(())
}
