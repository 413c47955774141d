//! The test environment from Debian packages: QEMU, a kernel, busybox, User-mode Linux.
//!
//! Nothing is installed: packages are downloaded with an apt configuration of our own
//! ([`apt`]) and unpacked into `target/xtask/root` ([`unpack`]). QEMU runs from there with the
//! loader and libraries that came with it, so it does not matter what the machine has.
//! Invariant: a root with a stamp is whole; a run that was cut short leaves none.
//! A fresh machine: 210 MB, about 12 s. A second run: nothing to do.

pub mod apt;
pub mod programs;
pub mod unpack;

use crate::paths;
use anyhow::{Context as _, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What is fetched with all that it depends on.
const WITH_DEPENDENCIES: &[&str] = &[
    "qemu-system-x86",
    "qemu-utils",
    "e2fsprogs",
    "busybox-static",
    "user-mode-linux",
    "valgrind",
    "socat",
    "iperf3",
    "ethtool",
    "passt",
];

/// Names the newest kernel; only that one package is fetched, not the initramfs tools it asks for.
const KERNEL: &str = "linux-image-amd64";

/// The layout of [`Root`]; a root with another stamp is made again.
const FORMAT: u32 = 3;

/// What a root is made of.
struct Recipe {
    /// Below `target/xtask`.
    folder: &'static str,
    wanted: &'static [&'static str],
    kernel: Option<&'static str>,
    /// A package whose source is put beside them, packed as its authors did.
    source: Option<&'static str>,
    wrappers: fn(&Root) -> Result<()>,
}

/// Guests, and the programs of the tests.
const GUESTS: Recipe = Recipe {
    folder: "root",
    wanted: WITH_DEPENDENCIES,
    kernel: Some(KERNEL),
    source: None,
    wrappers: programs::wrappers,
};

/// What a guest builds programs with, on a root of its own, and a program to build.
const TOOLS: Recipe = Recipe {
    folder: "tools",
    wanted: &["busybox-static", "git", "libc6-dev", "make", "tcc"],
    kernel: None,
    source: Some("lua5.4"),
    wrappers: programs::tools,
};

/// Other people's back-ends that the judge judges, what one of them is linked with, and DPDK's driver.
const PEERS: Recipe = Recipe {
    folder: "peers",
    wanted: &[
        "dpdk-dev",
        "librte-net-vhost23",
        "librte-net-virtio23",
        "librte-mempool-ring23",
        "libcap-ng-dev",
        "libseccomp-dev",
    ],
    kernel: None,
    source: None,
    wrappers: programs::peers,
};

/// Packages unpacked, ready to use.
#[derive(Clone, Debug)]
pub struct Root(PathBuf);

impl Root {
    /// The root made by an earlier `cargo xtask packages`, if it is whole.
    ///
    /// # Errors
    /// When there is none: the text says what to do.
    pub fn open() -> Result<Self> {
        Self::found(&GUESTS)
    }

    fn found(recipe: &Recipe) -> Result<Self> {
        let dir = paths::xtask()?.join(recipe.folder);
        let text = std::fs::read_to_string(stamp(&dir)).unwrap_or_default();
        let whole = text.lines().next() == Some(format_line(recipe).as_str());
        anyhow::ensure!(whole, "the guest's packages are not there: run `cargo xtask packages`");
        Ok(Self(dir))
    }

    /// Opens the root, making it first when it is not there (or `refresh` asks for newer packages).
    ///
    /// # Errors
    /// When the archive cannot be reached or a package does not unpack.
    pub fn prepare(refresh: bool) -> Result<Self> {
        Self::made(&GUESTS, refresh)
    }

    /// The root of a compiler, git and what else a guest needs to build a program, made by an earlier
    /// `cargo xtask packages`.
    ///
    /// # Errors
    /// When there is none: the text says what to do.
    pub fn tools() -> Result<Self> {
        Self::found(&TOOLS)
    }

    /// The same, made first when it is not there: 25 MB, 130 MB unpacked.
    ///
    /// # Errors
    /// When the archive cannot be reached or a package does not unpack.
    pub fn prepare_tools(refresh: bool) -> Result<Self> {
        Self::made(&TOOLS, refresh)
    }

    /// The root of other people's back-ends and drivers, made by an earlier `cargo xtask packages`.
    ///
    /// # Errors
    /// When there is none: the text says what to do.
    pub fn peers() -> Result<Self> {
        Self::found(&PEERS)
    }

    /// The same, made first when it is not there: 75 MB, 380 MB unpacked.
    ///
    /// # Errors
    /// When the archive cannot be reached or a package does not unpack.
    pub fn prepare_peers(refresh: bool) -> Result<Self> {
        Self::made(&PEERS, refresh)
    }

    fn made(recipe: &Recipe, refresh: bool) -> Result<Self> {
        if !refresh && let Ok(root) = Self::found(recipe) {
            return Ok(root);
        }
        let xtask = paths::xtask()?;
        std::fs::create_dir_all(&xtask)?;
        let lock = std::fs::File::create(xtask.join("packages.lock"))?;
        lock.lock()?;
        if !refresh && let Ok(root) = Self::found(recipe) {
            return Ok(root); // another process made it while we waited
        }
        let dir = xtask.join(recipe.folder);
        if dir.exists() {
            std::fs::remove_dir_all(&dir).context("cannot remove the old root")?;
        }
        let archives = paths::cache()?.join("packages");
        let apt = apt::Apt::set_up(&xtask.join("apt"), &archives, recipe.source.is_some())?;
        apt.update()?;
        let files = apt.fetch(recipe.wanted, recipe.kernel)?;
        unpack::packages(&files, &dir)?;
        if let Some(source) = recipe.source {
            apt.fetch_source(source, &dir.join("source"))?;
        }
        let root = Self(dir);
        (recipe.wrappers)(&root)?;
        let names = files.iter().filter_map(|file| file.file_name()?.to_str());
        let first = std::iter::once(format_line(recipe));
        let lines: Vec<_> = first.chain(names.map(String::from)).collect();
        std::fs::write(stamp(&root.0), lines.join("\n") + "\n")?;
        Ok(root)
    }

    /// A path in the root: `root.path("bin/busybox")`.
    #[must_use]
    pub fn path(&self, inside: &str) -> PathBuf {
        self.0.join(inside)
    }

    /// The folder of commands that can be put on the search path ([`programs`]).
    #[must_use]
    pub fn wrappers(&self) -> PathBuf {
        self.path("wrappers")
    }

    /// Where the libraries lie.
    #[must_use]
    pub fn library_dirs(&self) -> [PathBuf; 2] {
        ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"].map(|dir| self.path(dir))
    }

    /// A command for a dynamically linked program of the root, run by the root's own loader with
    /// the root's own libraries.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let dirs = self.library_dirs().map(|dir| dir.to_string_lossy().into_owned());
        let mut command = Command::new(self.path("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(dirs.join(":")).arg(self.path(program));
        command.env("QEMU_MODULE_DIR", self.path("usr/lib/x86_64-linux-gnu/qemu"));
        command
    }

    /// The kernel's release, as in `lib/modules/RELEASE`.
    ///
    /// # Errors
    /// When the root holds no modules.
    pub fn kernel_release(&self) -> Result<String> {
        only_entry(&self.path("lib/modules"))
    }

    /// The release of the User-mode Linux kernel.
    ///
    /// # Errors
    /// When the root holds no modules for it.
    pub fn uml_release(&self) -> Result<String> {
        only_entry(&self.path("usr/lib/uml/modules"))
    }

    /// The names of the package files that the root was made from.
    ///
    /// # Errors
    /// When the stamp cannot be read.
    pub fn contents(&self) -> Result<Vec<String>> {
        let text = std::fs::read_to_string(stamp(&self.0))?;
        Ok(text.lines().skip(1).map(String::from).collect())
    }
}

fn stamp(root: &Path) -> PathBuf {
    root.join(".xtask-stamp")
}

fn format_line(recipe: &Recipe) -> String {
    let more = [recipe.kernel, recipe.source].into_iter().flatten();
    let words: Vec<_> = recipe.wanted.iter().copied().chain(more).collect();
    format!("format {FORMAT} {}", words.join(" "))
}

fn only_entry(dir: &Path) -> Result<String> {
    let mut entries = std::fs::read_dir(dir).with_context(|| format!("no {}", dir.display()))?;
    let entry = entries.next().with_context(|| format!("{} is empty", dir.display()))??;
    Ok(entry.file_name().to_string_lossy().into_owned())
}
