//! What the guest tests share: the environment, or a counted skip.

use anyhow::{Result, anyhow};
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
    /// The environment of a test, or nothing when it cannot run here (which fails when
    /// nothing may be skipped). `needs` looks for what else the test wants.
    pub(crate) fn open(needs: impl FnOnce() -> Result<()>) -> Result<Option<Self>> {
        match Root::open().and_then(|root| needs().map(|()| root)) {
            Ok(root) => Ok(Some(Self { root, dir: tempfile::tempdir()? })),
            Err(why) => {
                skips::skip(&name(), &format!("{why:#}"))?;
                Ok(None)
            }
        }
    }

    /// The same, for a test that uses a disk of `disk`'s make.
    pub(crate) fn for_disk(disk: Disk) -> Result<Option<Self>> {
        Self::open(|| match disk {
            Disk::Outboard => backend::outboard().map(drop),
            Disk::StorageDaemon => Ok(()),
        })
    }

    /// The folder.
    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// Adds what the device said to an error.
pub(crate) fn sound<T>(result: Result<T>, device: &Device) -> Result<T> {
    result.map_err(|error| anyhow!("{error:#}\n{}", device.said()))
}

/// The name of the test that runs: nextest tells it, elsewhere the thread carries it.
fn name() -> String {
    let thread = std::thread::current();
    let told = std::env::var("NEXTEST_TEST_NAME").ok();
    told.unwrap_or_else(|| thread.name().unwrap_or("a guest test").to_owned())
}
