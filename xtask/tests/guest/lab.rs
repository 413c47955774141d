//! What the guest tests share: the environment, or a counted skip.

use std::path::Path;
use tempfile::TempDir;
use xtask::backend::{self, Device, Disk};
use xtask::packages::Root;
use xtask::skips;

/// The packages and a folder for one test.
pub(crate) struct Lab {
    /// The packages.
    pub(crate) root: Root,
    /// Sockets, images and logs; removed with this.
    pub(crate) dir: TempDir,
}

impl Lab {
    /// The environment of the test `name`, or nothing when it cannot run here (which fails when
    /// nothing may be skipped). `needs` looks for what else the test wants.
    pub(crate) fn open(name: &str, needs: impl FnOnce() -> anyhow::Result<()>) -> Option<Self> {
        match Root::open().and_then(|root| needs().map(|()| root)) {
            Ok(root) => Some(Self { root, dir: tempfile::tempdir().expect("a folder") }),
            Err(why) => {
                skips::skip(name, &format!("{why:#}")).expect("nothing may be skipped");
                None
            }
        }
    }

    /// The same, for a test that uses a disk of `disk`'s make.
    pub(crate) fn for_disk(name: &str, disk: Disk) -> Option<Self> {
        Self::open(name, || match disk {
            Disk::Outboard => backend::outboard().map(drop),
            Disk::StorageDaemon => Ok(()),
        })
    }

    /// The folder.
    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// Takes the value, or fails the test with the error and what the device said.
pub(crate) fn sound<T>(result: anyhow::Result<T>, device: &Device) -> T {
    result.unwrap_or_else(|error| panic!("{error:#}\n{}", device.said()))
}
