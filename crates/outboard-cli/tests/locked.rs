//! Programs are locked in before they are connected to: with a filter of system calls all of them (hostile case C34),
//! with its directory `outboard fs` (R16).
#![expect(clippy::expect_used, reason = "a failed step of a test is its end")]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use program::Program;

mod program;
#[path = "../../outboard-frontend/tests/common/skip.rs"]
mod skip;

const OUTBOARD: &str = env!("CARGO_BIN_EXE_outboard");

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
    started(Path::new(OUTBOARD), folder, user, more)
}

/// The same, from this file.
fn started(program: &Path, folder: &Path, user: Option<u32>, more: &[&str]) -> Running {
    let (share, socket) = (folder.join("share"), folder.join("s"));
    let mut command = Command::new(program);
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
        return skip::skip("it is for root");
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
    let mut program = PathBuf::from(OUTBOARD);
    if user.is_some() {
        let others = fs::Permissions::from_mode(0o755);
        fs::set_permissions(folder.path(), others).expect("opened");
        for path in [folder.path(), &folder.path().join("share")] {
            chown(path, Some(mine), Some(mine)).expect("given away");
        }
        let reached = |program: &Path| {
            let said = Command::new(program).arg("--version").uid(mine).gid(mine).output();
            said.is_ok_and(|said| said.status.success())
        };
        if !reached(&program) {
            // It lies in a folder of root's own.
            program = folder.path().join("outboard");
            fs::copy(OUTBOARD, &program).expect("room");
            assert!(reached(&program), "nobody else can run it");
        }
    }
    let running = started(&program, folder.path(), user, &[]);
    assert_eq!(status(&running, "NoNewPrivs").as_deref(), Some("1"));
    ends_well(running, folder.path());
}

/// Each program, and the options that it needs in an empty folder; `seccomp` is how it is locked in.
fn programs(seccomp: &str) -> Vec<Vec<String>> {
    let lines = [
        "block --socket-path s ram:1M",
        "console --socket-path s",
        "fs --socket-path s --shared-dir share",
        "net --socket-path s --stream-listen link",
        "rng --socket-path s",
        "switch --port s --port t",
        "vsock --socket-path s --uds-path vm",
    ];
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let chosen = ["--seccomp".to_owned(), seccomp.to_owned()];
    let alone = lines.iter().map(|line| [words(line), chosen.to_vec()].concat());
    alone.chain([vec!["serve".to_owned(), format!("{seccomp}.toml")]]).collect()
}

/// What each thread of a process says of itself in a line of its status.
fn of_all_threads(process: u32, name: &str) -> Vec<String> {
    let threads = fs::read_dir(format!("/proc/{process}/task")).expect("threads");
    let one = |thread: std::io::Result<fs::DirEntry>| {
        let text = fs::read_to_string(thread.ok()?.path().join("status")).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        Some(line.trim().to_owned())
    };
    threads.filter_map(one).collect()
}

#[test]
fn c34_every_program_has_its_filter_on_all_threads_before_it_serves() {
    // We may stand behind a filter ourselves.
    let ours = of_all_threads(std::process::id(), "Seccomp").pop().expect("told");
    for (seccomp, held) in [("kill", "2"), ("errno", "2"), ("none", &ours)] {
        for words in programs(seccomp) {
            let folder = folder();
            let file = "[[device]]\ntype = 'rng'\nsocket-path = 's'\n\
                        [[device]]\ntype = 'block'\nsocket-path = 't'\nimage = 'ram:1M'\n";
            let file = format!("seccomp = '{seccomp}'\n{file}");
            fs::write(folder.path().join(format!("{seccomp}.toml")), file).expect("written");
            let mut command = Command::new(OUTBOARD);
            let mut running = Program::run(command.args(&words), folder.path());
            let said = running.says("locked in").unwrap_or_else(|| panic!("{words:?} ended"));
            assert!(said.contains(&format!("seccomp {seccomp}")), "{words:?}: {said}");
            let of_threads = of_all_threads(running.child.id(), "Seccomp");
            assert!(of_threads.iter().all(|own| own == held), "{words:?}: {of_threads:?}");
            assert!(!of_threads.is_empty(), "{words:?}");
            if seccomp != "none" {
                let given_up = of_all_threads(running.child.id(), "NoNewPrivs");
                assert!(given_up.iter().all(|own| own == "1"), "{words:?}: {given_up:?}");
            }
            UnixStream::connect(folder.path().join("s")).expect("it listens");
        }
    }
}

/// How a device of `outboard serve` shows that it is locked in.
#[test]
fn c34_what_holds_is_shown_by_every_device() {
    for seccomp in ["kill", "none"] {
        let folder = folder();
        let devices = ["one", "two"].map(|name| {
            format!("[[device]]\nname = '{name}'\ntype = 'rng'\nsocket-path = '{name}'\n")
        });
        let file = format!("seccomp = '{seccomp}'\ncontrol = 'c'\n{}", devices.concat());
        fs::write(folder.path().join("vm.toml"), file).expect("written");
        let mut command = Command::new(OUTBOARD);
        let mut running = Program::run(command.args(["serve", "vm.toml"]), folder.path());
        running.says("locked in").expect("it begins");
        let until = Instant::now() + Duration::from_secs(60);
        let told = loop {
            let mut ctl = Command::new(OUTBOARD);
            ctl.args(["ctl", "c", "stats", "--json"]).current_dir(folder.path());
            let told = ctl.output().expect("our own program");
            if told.status.success() {
                break told.stdout;
            }
            assert!(Instant::now() < until, "{}", String::from_utf8_lossy(&told.stderr));
        };
        let stats: serde_json::Value = serde_json::from_slice(&told).expect("JSON");
        for device in ["one", "two"] {
            let lock = &stats["stats"][device]["lock"];
            assert_eq!(lock["seccomp"], seccomp, "{stats}");
            assert_eq!(lock["sandbox"], "none", "{stats}");
        }
    }
}

#[test]
fn c34_without_an_option_what_is_unexpected_fails_and_no_more() {
    let folder = folder();
    let mut command = Command::new(OUTBOARD);
    command.args(["rng", "--socket-path", "s"]).env_remove("OUTBOARD_SECCOMP");
    let mut running = Program::run(&mut command, folder.path());
    assert!(running.says("locked in").is_some_and(|said| said.contains("seccomp errno")));
    assert!(of_all_threads(running.child.id(), "Seccomp").iter().all(|own| own == "2"));
    let id = i32::try_from(running.child.id()).ok().and_then(rustix::process::Pid::from_raw);
    rustix::process::kill_process(id.expect("a process"), rustix::process::Signal::TERM)
        .expect("told");
    assert_eq!(running.ends(), Some(0), "its end is not refused");
}

/// The kernel's word: a program that asks for Landlock by name does not begin without it.
#[test]
fn c34_who_asks_for_landlock_by_name_gets_it_or_exit_code_2() {
    for words in programs("kill") {
        if matches!(words[0].as_str(), "fs" | "serve") {
            continue;
        }
        let folder = folder();
        let mut command = Command::new(OUTBOARD);
        command.args(&words).args(["--sandbox", "landlock"]);
        let mut running = Program::run(&mut command, folder.path());
        match running.says("locked in") {
            Some(said) => assert!(said.contains("sandbox landlock, seccomp kill"), "{said}"),
            None => assert_eq!(running.ends(), Some(2), "{words:?}"),
        }
    }
}

#[test]
fn c34_a_console_on_its_own_terminal_is_kept_from_files_too() {
    let folder = folder();
    let begun = |port: &str| {
        let mut command = Command::new(OUTBOARD);
        command.args(["console", "--socket-path", "s", "--port", port]);
        let mut running = Program::run(&mut command, folder.path());
        let said = running.says("locked in").expect("it begins");
        said.split_once("sandbox").map(|(_, what)| what.to_owned())
    };
    assert_eq!(begun("stdio"), begun("pty"), "its thread for the terminal begins afterwards");
}
