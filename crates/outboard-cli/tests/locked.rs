//! `outboard fs` is locked in with its directory before it is connected to (hostile case R16).
#![expect(clippy::expect_used, reason = "a failed step of a test is its end")]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A running device; killed at the end, whatever happens.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts it, and waits until it serves: a connection is taken only then.
fn start(folder: &Path, user: Option<u32>, more: &[&str]) -> Running {
    let (share, socket) = (folder.join("share"), folder.join("s"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_outboard"));
    command.args(["fs", "--shared-dir"]).arg(share).arg("--socket-path").arg(&socket).args(more);
    if let Some(user) = user {
        command.uid(user).gid(user);
    }
    let running = Running(command.stderr(Stdio::null()).spawn().expect("started"));
    let until = Instant::now() + Duration::from_secs(60);
    while status(&running, "Threads").is_none_or(|threads| threads == "1") {
        assert!(Instant::now() < until, "it does not serve");
        std::thread::sleep(Duration::from_millis(5)); // a thread's birth sends no event
    }
    UnixStream::connect(&socket).expect("it listens");
    running
}

/// A line of /proc/PID/status.
fn status(running: &Running, name: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{}/status", running.0.id())).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.trim().to_owned())
}

fn ends_well(mut running: Running, folder: &Path) {
    let id = i32::try_from(running.0.id()).ok().and_then(rustix::process::Pid::from_raw);
    rustix::process::kill_process(id.expect("a process"), rustix::process::Signal::TERM)
        .expect("told");
    assert!(running.0.wait().expect("ended").success());
    assert!(!folder.join("s").exists(), "its socket is removed from inside");
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    fs::create_dir(folder.path().join("share")).expect("made");
    folder
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn r16_as_root_the_directory_is_all_that_the_process_sees() {
    let folder = folder();
    if !is_root() {
        return;
    }
    let running = start(folder.path(), None, &[]);
    let root = fs::metadata(format!("/proc/{}/root", running.0.id())).expect("its root");
    let share = fs::metadata(folder.path().join("share")).expect("the directory");
    assert_eq!((root.dev(), root.ino()), (share.dev(), share.ino()));
    let link = |process: &str, kind: &str| fs::read_link(format!("/proc/{process}/ns/{kind}")).ok();
    for kind in ["mnt", "net"] {
        assert_ne!(link(&running.0.id().to_string(), kind), link("self", kind), "{kind}");
    }
    assert_eq!(status(&running, "NoNewPrivs").as_deref(), Some("1"));
    let effective = status(&running, "CapEff").expect("told");
    let effective = u64::from_str_radix(&effective, 16).expect("hexadecimal");
    const SYS_ADMIN: u64 = 1 << 21;
    const SYS_PTRACE: u64 = 1 << 19;
    assert_eq!(effective & (SYS_ADMIN | SYS_PTRACE), 0, "{effective:x}");
    ends_well(running, folder.path());
}

#[test]
fn r16_other_users_are_locked_in_too_and_chroot_is_for_root() {
    let folder = folder();
    let (user, mine) = if is_root() { (Some(65534), 65534) } else { (None, 0) };
    if user.is_some() {
        let program = Path::new(env!("CARGO_BIN_EXE_outboard"));
        let others = fs::Permissions::from_mode(0o755);
        fs::set_permissions(folder.path(), others).expect("opened");
        for path in [folder.path(), &folder.path().join("share")] {
            chown(path, Some(mine), Some(mine)).expect("given away");
        }
        let reached = Command::new(program).arg("--version").uid(mine).gid(mine).output();
        if !reached.is_ok_and(|said| said.status.success()) {
            return;
        }
    }
    let running = start(folder.path(), user, &[]);
    assert_eq!(status(&running, "NoNewPrivs").as_deref(), Some("1"));
    ends_well(running, folder.path());
}
