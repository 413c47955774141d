//! qemu-storage-daemon as a back-end that we did not write, on a fresh image, gone with the test.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use outboard_frontend::Connection;
use skip::skip;

mod skip;

/// A running daemon with one vhost-user-blk export.
pub(crate) struct Daemon {
    child: Child,
    folder: tempfile::TempDir,
}

impl Daemon {
    /// Starts it on an image of `size` bytes. `None`, after saying so, when it is not installed; with
    /// `CI=true` that is a failure.
    pub(crate) fn start(size: u64, queues: u16) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a folder for the test");
        let image = folder.path().join("disk.img");
        let file = std::fs::File::create(&image).expect("an image");
        file.set_len(size).expect("room for the image");
        let blockdev =
            format!("driver=file,filename={},discard=unmap,node-name=d", image.display());
        let export = format!(
            "type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={},writable=on,num-queues={queues}",
            folder.path().join("s").display()
        );
        let started = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &blockdev, "--export", &export])
            .stdin(Stdio::null())
            .spawn();
        match started {
            Ok(child) => Some(Self { child, folder }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                skip("qemu-storage-daemon is not installed (Debian: qemu-utils)");
                None
            }
            Err(error) => panic!("qemu-storage-daemon: {error}"),
        }
    }

    /// Where it listens.
    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    /// The file that its disk is.
    pub(crate) fn image(&self) -> PathBuf {
        self.folder.path().join("disk.img")
    }

    /// A fresh connection.
    pub(crate) fn connect(&self) -> Connection {
        let patience = Duration::from_secs(10);
        Connection::connect_patiently(self.socket(), patience, patience).expect("it listens")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
