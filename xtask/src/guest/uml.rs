//! A guest in User-mode Linux: the kernel as a process, whose own vhost-user front end
//! (`arch/um/drivers/virtio_uml.c`) is one that neither QEMU nor we wrote. From start to ready:
//! about 2.5 s.

use super::{Guest, initramfs};
use crate::packages::Root;
use anyhow::{Context as _, Result};
use std::path::Path;
use std::process::{Command, Stdio};

/// Modules of every User-mode Linux guest.
const MODULES: &[&str] = &["virtio_blk", "virtio_console", "crc32c_generic", "ext4"];

/// Starts a guest whose devices are `(socket, virtio device number)`. Gives it when its agent is
/// ready.
///
/// # Errors
/// When the kernel does not start or come up: with the end of its console.
pub fn boot(root: &Root, dir: &Path, devices: &[(&Path, u32)]) -> Result<Guest> {
    let modules = root.path(&format!("usr/lib/uml/modules/{}", root.uml_release()?));
    let initrd = dir.join("initramfs");
    std::fs::write(&initrd, initramfs::build(root, &modules, MODULES, &[], &[])?)?;
    let mut command = Command::new(root.path("usr/bin/linux.uml"));
    command.arg("mem=128M").arg(format!("initrd={}", initrd.display()));
    command.args(["root=/dev/ram0", "con=null", "con0=null,fd:2", "console=tty0", "panic=-1"]);
    command.args(["ssl=null", "ssl0=fd:0,fd:1", "agent=ttyS0"]);
    command.arg(format!("uml_dir={}", dir.display()));
    for (socket, number) in devices {
        command.arg(format!("virtio_uml.device={}:{number}", socket.display()));
    }
    let console = std::fs::File::create(dir.join("console"))?;
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(console);
    let child = command.spawn().context("cannot start linux.uml")?;
    Guest::new(child, vec![dir.join("console")], None)
}
