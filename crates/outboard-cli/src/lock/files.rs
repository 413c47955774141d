//! Which files a device program still reaches by name (Landlock): next to none, since what it stands on is open.
//!
//! What stays: sockets and links that are removed at the end, or made anew where a live upgrade did not bring them; this
//! program itself and what it maps, for back-traces. TCP ports can be neither bound nor connected to, and nothing outside can
//! be sent a signal. Connecting to a Unix socket by its name is not governed (nor is it by the kernels that there are).
//!
//! Invariant: entered before there is a second thread, since it holds for a thread and for those that it starts.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

/// What a program reaches by name when it is locked in.
#[derive(Debug, Default)]
pub(crate) struct Reach {
    rules: Vec<(PathBuf, BitFlags<AccessFs>)>,
    /// Files to be removed may lie anywhere: those of the program whose place is taken are told later.
    removes_anything: bool,
}

impl Reach {
    /// A socket of this path may be made anew and is removed at the end.
    pub(crate) fn socket(&mut self, path: &Path) {
        self.rules.push((folder(path), AccessFs::MakeSock | AccessFs::RemoveFile));
    }

    /// The same for a link.
    pub(crate) fn link(&mut self, path: &Path) {
        self.rules.push((folder(path), AccessFs::MakeSym | AccessFs::RemoveFile));
    }

    /// Interfaces may be opened.
    pub(crate) fn interfaces(&mut self) {
        let used = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
        self.rules.push(("/dev/net/tun".into(), used));
    }

    /// Addresses may be drawn.
    pub(crate) fn random(&mut self) {
        self.rules.push(("/dev/urandom".into(), AccessFs::ReadFile.into()));
    }

    /// Terminals may be made.
    pub(crate) fn terminals(&mut self) {
        let used = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
        self.rules.extend(["/dev/ptmx", "/dev/pts"].map(|path| (path.into(), used)));
    }

    /// The files of a program whose place is taken are removed at the end.
    pub(crate) fn heir(&mut self) {
        self.removes_anything = true;
    }

    /// Locks this thread in, and those that it starts, for good; whether the system could.
    ///
    /// # Errors
    /// The system has it and refuses.
    pub(super) fn enter(&self) -> Result<bool, RulesetError> {
        let mut governed = AccessFs::from_all(ABI::V5);
        if self.removes_anything {
            governed.remove(AccessFs::RemoveFile);
        }
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(governed)?
            .handle_access(AccessNet::from_all(ABI::V5))?
            .scope(Scope::Signal)?
            .create()?;
        let own = std::env::current_exe().ok().map(|path| (path, AccessFs::ReadFile.into()));
        let itself = (PathBuf::from("/proc/self"), BitFlags::from(AccessFs::ReadFile));
        for (path, access) in self.rules.iter().chain(own.iter()).chain([&itself]) {
            let left = *access & governed;
            // What is not there cannot be reached either.
            if let (Ok(opened), false) = (PathFd::new(path), left.is_empty()) {
                rules = rules.add_rule(PathBeneath::new(opened, left))?;
            }
        }
        Ok(rules.restrict_self()?.ruleset != RulesetStatus::NotEnforced)
    }
}

/// The folder that something lies in.
fn folder(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

#[cfg(test)]
#[path = "../../../outboard-frontend/tests/common/skip.rs"]
mod skip;

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;
    use std::os::unix::net::UnixListener;
    use std::process::Command;

    /// Says to this test program, started once more, in which folder it is to be locked in.
    const INSIDE: &str = "OUTBOARD_TEST_INSIDE";

    /// Not a test by itself: what the next one starts. Its exit code is the number of the first thing that was not as it
    /// is to be, 100 if all was, 101 where the system has no Landlock.
    #[test]
    fn inside() {
        let Some(folder) = std::env::var_os(INSIDE).map(PathBuf::from) else { return };
        let image = std::fs::File::open(folder.join("image")).expect("before");
        let mut reach = Reach::default();
        reach.socket(&folder.join("kept/socket"));
        // The thread of a test is not the first one, but it is the one that looks.
        if !reach.enter().expect("entered") {
            std::process::exit(101);
        }
        let refused = |outcome: std::io::Result<()>| {
            outcome.is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
        };
        let mut byte = [0; 1];
        let found = [
            refused(std::fs::File::open(folder.join("image")).map(drop)),
            refused(std::fs::File::open("/etc/passwd").map(drop)),
            refused(std::fs::write(folder.join("new"), "x")),
            refused(std::fs::remove_file(folder.join("image"))),
            refused(UnixListener::bind(folder.join("socket")).map(drop)),
            refused(std::fs::write(folder.join("kept/new"), "x")),
            refused(std::fs::read_dir(folder.join("kept")).map(drop)),
            std::io::Read::read(&mut &image, &mut byte).is_ok_and(|got| got == 1),
            UnixListener::bind(folder.join("kept/socket")).is_ok(),
            std::fs::remove_file(folder.join("kept/socket")).is_ok(),
            std::fs::read_to_string("/proc/self/maps").is_ok(),
        ];
        let wrong = found.iter().position(|sound| !sound);
        std::process::exit(wrong.map_or(100, |number| number.try_into().expect("few")));
    }

    #[test]
    fn what_was_open_stays_so_and_nothing_else_is_reached_but_the_sockets_folder() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("image"), "x").expect("written");
        std::fs::create_dir(folder.path().join("kept")).expect("made");
        let mut child = Command::new(std::env::current_exe().expect("this program"));
        child.args(["--exact", "lock::files::tests::inside"]).env(INSIDE, folder.path());
        let ended = child.stdout(std::process::Stdio::null()).status().expect("started");
        if ended.code() == Some(101) {
            return super::skip::skip("this kernel has no Landlock");
        }
        assert_eq!(ended.code(), Some(100), "the number of what was not as it is to be");
    }
}
