//! Locks the process in with the shared directory (hostile cases R16, B75, B76).
//!
//! ```text
//!  root:    mount and network namespaces of our own ─▶ the directory is "/" ─▶ few capabilities
//!  others:  Landlock: nothing but what lies in the directory
//!  both:    no new privileges
//! ```
//! In one process, without a fork: what holds for the calling thread holds for the threads it starts, so this
//! comes before the first one. What else is needed of the file system has to be open by then.
//! Invariant: [`Prepared::enter`] succeeds wholly, or the process is not to go on.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus,
};
use outboard::Error;
use rustix::fs::{CWD, Mode, OFlags, open, openat};
use rustix::io::Errno;
use rustix::mount::{
    MountPropagationFlags as Propagation, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_bind,
    mount_change, move_mount, open_tree, unmount,
};
use rustix::process::{chdir, chroot, fchdir, geteuid, pivot_root};
use rustix::thread::{
    CapabilitySet, CapabilitySets, UnshareFlags, capabilities, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs, set_thread_groups,
};
use tracing::warn;

/// What a share of other users' files needs.
const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// How the process is locked in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sandbox {
    /// As root in namespaces, otherwise with Landlock.
    Namespace,
    /// With chroot(2), for root.
    Chroot,
    /// Not at all.
    None,
}

/// A directory that is there, to be locked in with.
#[derive(Debug)]
pub struct Prepared {
    sandbox: Sandbox,
    folder: PathBuf,
    opened: OwnedFd,
    proc_self: OwnedFd,
    /// A directory of ours outside, where a file is to be removed at the end.
    removes: Option<OwnedFd>,
    open_files: u64,
}

/// What is left of the file system, for [`super::FsOptions::new`].
#[derive(Debug)]
pub struct Confined {
    pub(super) root: String,
    pub(super) mountinfo_prefix: Option<String>,
    pub(super) proc_self_fd: File,
    pub(super) mountinfo: File,
    pub(super) open_files: u64,
    /// Files can be opened by their handles (open_by_handle_at(2)).
    pub(super) by_handle: bool,
}

/// Names what was being done.
fn doing<E: Into<io::Error>>(what: &str) -> impl Fn(E) -> Error + '_ {
    move |error| Error::refused(format!("sandbox: {what}: {}", error.into()))
}

const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::CLOEXEC).union(OFlags::RDONLY);
const PLACE: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

impl Sandbox {
    /// Looks whether `folder` can be shared, and raises the limit of open files. Nothing is locked yet.
    ///
    /// # Errors
    /// The directory is none or cannot be opened; only root can do what is asked for.
    pub fn prepare(self, folder: &Path) -> Result<Prepared, Error> {
        let shown = folder.display();
        let failed = |error: io::Error| Error::refused(format!("{shown}: {error}"));
        let folder = folder.canonicalize().map_err(failed)?;
        let opened = open(&folder, DIRECTORY, Mode::empty()).map_err(io::Error::from);
        let opened = opened.map_err(failed)?;
        if self == Self::Chroot && !geteuid().is_root() {
            return Err(Error::refused("--sandbox chroot is for root"));
        }
        let proc_self = open("/proc/self", PLACE, Mode::empty()).map_err(doing("/proc/self"))?;
        let open_files = super::raise_open_files()?;
        Ok(Prepared { sandbox: self, folder, opened, proc_self, removes: None, open_files })
    }
}

impl Prepared {
    /// Files in this directory are to be removed at the end: a socket's.
    #[must_use]
    pub fn and_remove_in(mut self, folder: Option<&Path>) -> Self {
        self.removes = folder.and_then(|folder| open(folder, PLACE, Mode::empty()).ok());
        self
    }

    /// Locks this thread in, and all that it will start.
    ///
    /// # Errors
    /// The system refuses; the thread is in an undefined state and must not go on.
    pub fn enter(self) -> Result<Confined, Error> {
        let is_root = geteuid().is_root();
        let mut proc_self_fd = self.opened_proc("fd", PLACE)?;
        let mut prefix = None;
        match self.sandbox {
            Sandbox::Namespace if is_root => proc_self_fd = self.enter_namespaces()?,
            Sandbox::Namespace => {}
            Sandbox::Chroot => {
                chroot(&self.folder).map_err(doing("chroot"))?;
                chdir("/").map_err(doing("chdir"))?;
                prefix = self.folder.to_str().map(str::to_owned);
            }
            Sandbox::None => {}
        }
        // Only now does it tell of the mounts that there are.
        let mountinfo = self.opened_proc("mountinfo", OFlags::RDONLY | OFlags::CLOEXEC)?;
        if is_root && self.sandbox != Sandbox::None {
            drop_capabilities().map_err(doing("capabilities"))?;
        }
        set_no_new_privs(true).map_err(doing("no new privileges"))?;
        if !is_root && self.sandbox == Sandbox::Namespace {
            self.restrict()?;
        }
        let inside =
            is_root && self.sandbox == Sandbox::Namespace || self.sandbox == Sandbox::Chroot;
        let root = match (inside, self.folder.to_str()) {
            (true, _) => "/".to_owned(),
            (false, Some(folder)) => folder.to_owned(),
            (false, None) => return Err(Error::refused("the directory's name is no UTF-8")),
        };
        Ok(Confined {
            root,
            mountinfo_prefix: prefix,
            proc_self_fd: proc_self_fd.into(),
            mountinfo: mountinfo.into(),
            open_files: self.open_files,
            by_handle: is_root && self.sandbox != Sandbox::Chroot,
        })
    }

    fn opened_proc(&self, name: &str, flags: OFlags) -> Result<OwnedFd, Error> {
        openat(&self.proc_self, name, flags, Mode::empty()).map_err(doing(name))
    }

    /// Our own mounts, of which the directory is the root, and no network. Returns /proc/self/fd, with
    /// nothing above it.
    fn enter_namespaces(&self) -> Result<OwnedFd, Error> {
        own_namespaces().map_err(doing("namespaces"))?;
        mount_change("/", Propagation::DOWNSTREAM | Propagation::REC).map_err(doing("/"))?;
        // In front of /proc, of which nothing else is needed any more.
        mount_bind("/proc/self/fd", "/proc").map_err(doing("/proc/self/fd"))?;
        let proc_self_fd = open("/proc", PLACE, Mode::empty()).map_err(doing("/proc/self/fd"))?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE;
        let new = open_tree(CWD, &self.folder, flags).map_err(doing("open_tree"))?;
        let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&new, "", CWD, &self.folder, empty).map_err(doing("move_mount"))?;
        let old = open("/", DIRECTORY, Mode::empty()).map_err(doing("/"))?;
        fchdir(&new).map_err(doing("fchdir"))?;
        // The root itself may be shared: there is nothing to leave then.
        if self.folder != Path::new("/") {
            pivot_root(".", ".").map_err(doing("pivot_root"))?;
            fchdir(&old).map_err(doing("fchdir"))?;
            let detached = mount_change(".", Propagation::DOWNSTREAM | Propagation::REC)
                .and_then(|()| unmount(".", UnmountFlags::DETACH));
            detached.map_err(doing("the old root"))?;
            fchdir(&new).map_err(doing("fchdir"))?;
        }
        Ok(proc_self_fd)
    }

    /// Landlock: all of the directory and nothing else.
    fn restrict(&self) -> Result<(), Error> {
        // Where it is now may not be read any more.
        fchdir(&self.opened).map_err(doing("fchdir"))?;
        let abi = ABI::V5;
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(abi))
            .and_then(Ruleset::create)
            .and_then(|rules| {
                rules.add_rule(PathBeneath::new(&self.opened, AccessFs::from_all(abi)))
            })
            .map_err(|error| Error::refused(format!("sandbox: Landlock: {error}")))?;
        if let Some(folder) = &self.removes {
            let rule = PathBeneath::new(folder, AccessFs::RemoveFile);
            rules = rules
                .add_rule(rule)
                .map_err(|error| Error::refused(format!("sandbox: Landlock: {error}")))?;
        }
        let status = rules
            .restrict_self()
            .map_err(|error| Error::refused(format!("sandbox: Landlock: {error}")))?;
        if status.ruleset == RulesetStatus::NotEnforced {
            warn!("this kernel has no Landlock: the process is not locked in");
        }
        Ok(())
    }
}

#[expect(deprecated, reason = "only sharing of descriptors makes unshare(2) unsafe")]
fn own_namespaces() -> Result<(), Errno> {
    rustix::thread::unshare(UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC)
}

/// Keeps what a share needs, for good.
fn drop_capabilities() -> Result<(), Errno> {
    set_thread_groups(&[])?;
    let have = capabilities(None)?.permitted;
    for (_, capability) in CapabilitySet::all().difference(KEPT).iter_names() {
        match remove_capability_from_bounding_set(capability) {
            // A capability that this kernel does not know.
            Ok(()) | Err(Errno::INVAL | Errno::PERM) => {}
            Err(error) => return Err(error),
        }
    }
    let kept = have & KEPT;
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: kept, permitted: kept, inheritable: none })
}
