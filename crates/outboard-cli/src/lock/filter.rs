//! The system call filter (seccomp(2)): what is not expected is refused, what only an attacker does ends the process.
//!
//! ```text
//!  a list of what a program needs        not on it: EPERM, and the program goes on
//!  a list of what nobody needs           on it: the process is killed
//!  clone3: ENOSYS                        so that threads begin with clone, whose flags can be looked at
//! ```
//! Three programs for the kernel, which does the strictest that one of them says. What is merely unexpected does not
//! end the process, since nothing that a guest does may (a library's new way of doing something, say); with
//! [`Seccomp::Kill`], as our tests have it, it does, so that a list that lacks something is found.
//!
//! Invariant: installed for all threads at once, and not to be taken back. A call that is allowed whatever its arguments
//! are costs nothing more: the kernel (since 5.11) has looked once, when the filter came. Only `clone`, `ioctl`, `socket`
//! and, for shared directories, `unshare` are looked at each time.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter_all_threads,
};

use super::calls::{deadly, needed};
use super::{Program, Seccomp};

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

#[cfg(target_arch = "x86_64")]
const HERE: TargetArch = TargetArch::x86_64;
#[cfg(target_arch = "aarch64")]
const HERE: TargetArch = TargetArch::aarch64;

const CLONE_THREAD: u64 = 0x0001_0000;
/// CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET; CLONE_PTRACE.
const CLONE_NEW: u64 = 0x7e02_0000 | 0x2000;
const CLONE_FS: u64 = 0x200;
const AF_UNIX: u64 = 1;
/// Types into the terminal as if somebody had: TIOCSTI, TIOCLINUX.
const TYPING: [u64; 2] = [0x5412, 0x541c];

/// Installs the filter for all threads that there are and will be; also gives up new privileges.
///
/// # Errors
/// The system has no filters, or refuses.
pub(super) fn install(program: Program, mode: Seccomp) -> Result<(), seccompiler::Error> {
    for filter in filters(program, mode)? {
        apply_filter_all_threads(&filter)?;
    }
    Ok(())
}

/// For the kernel, in the order in which they are installed.
fn filters(program: Program, mode: Seccomp) -> Result<Vec<BpfProgram>, BackendError> {
    let unexpected = match mode {
        Seccomp::None => return Ok(Vec::new()),
        Seccomp::Errno => SeccompAction::Errno(libc::EPERM.unsigned_abs()),
        Seccomp::Kill => SeccompAction::KillProcess,
        Seccomp::Log => SeccompAction::Log,
    };
    let built = |rules, otherwise, found| -> Result<BpfProgram, BackendError> {
        SeccompFilter::new(rules, otherwise, found, HERE)?.try_into()
    };
    let unknown = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let clone3 = Rules::from([(libc::SYS_clone3, vec![])]);
    let mut all = vec![built(clone3, SeccompAction::Allow, unknown)?];
    if mode != Seccomp::Log {
        let killed = SeccompAction::KillProcess;
        all.push(built(forbidden(program)?, SeccompAction::Allow, killed)?);
    }
    // The last one: it lets no other come after it.
    all.push(built(allowed(program)?, unexpected, SeccompAction::Allow)?);
    Ok(all)
}

fn allowed(program: Program) -> Result<Rules, BackendError> {
    let mut rules: Rules = needed(program).map(|call| (call, vec![])).collect();
    let flags = SeccompCmpOp::MaskedEq(CLONE_THREAD | CLONE_NEW);
    rules.insert(libc::SYS_clone, vec![when(0, flags, CLONE_THREAD)?]);
    let sockets = match program {
        // A network interface that comes later is asked about with a socket of its own.
        Program::Serve => vec![],
        _ => vec![when(0, SeccompCmpOp::Eq, AF_UNIX)?],
    };
    rules.insert(libc::SYS_socket, sockets);
    if program.shares_files() {
        rules.insert(libc::SYS_unshare, vec![when(0, SeccompCmpOp::Eq, CLONE_FS)?]);
    }
    Ok(rules)
}

fn forbidden(program: Program) -> Result<Rules, BackendError> {
    let mut rules: Rules = deadly(program).map(|call| (call, vec![])).collect();
    let typing = TYPING.map(|request| when(1, SeccompCmpOp::Eq, request));
    rules.insert(libc::SYS_ioctl, typing.into_iter().collect::<Result<_, _>>()?);
    // A thread of a shared directory has a working directory of its own.
    let unshared = match program.shares_files() {
        true => vec![when(0, SeccompCmpOp::Ne, CLONE_FS)?],
        false => vec![],
    };
    rules.insert(libc::SYS_unshare, unshared);
    Ok(rules)
}

/// A rule about the lower half of one argument.
fn when(argument: u8, compared: SeccompCmpOp, with: u64) -> Result<SeccompRule, BackendError> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, compared, with)?;
    SeccompRule::new(vec![condition])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;
    use std::net::TcpListener;
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::{Command, ExitStatus};

    /// Says to this test program, started once more, what it is to try behind the filter.
    const TRY: &str = "OUTBOARD_TEST_TRY";
    const SIGSYS: i32 = 31;

    /// Not a test by itself: what [`tried`] starts.
    #[test]
    fn behind_the_filter() {
        let Ok(what) = std::env::var(TRY) else { return };
        let (mode, what) = what.split_once(' ').expect("a mode and an attempt");
        let mode = clap::ValueEnum::from_str(mode, false).expect("a mode");
        install(Program::Device, mode).expect("filters");
        let refused = match what {
            "nothing" => std::thread::spawn(|| 7).join().is_err_and(|_| true),
            "execve" => Command::new("/bin/true").exec().kind() == ErrorKind::PermissionDenied,
            "fork" => Command::new("/bin/true")
                .status()
                .is_err_and(|error| error.kind() == ErrorKind::PermissionDenied),
            "internet" => TcpListener::bind("127.0.0.1:0")
                .is_err_and(|error| error.kind() == ErrorKind::PermissionDenied),
            other => panic!("{other}"),
        };
        std::process::exit(if refused { 3 } else { 0 });
    }

    fn tried(mode: &str, what: &str) -> ExitStatus {
        let this = std::env::current_exe().expect("this program");
        let mut child = Command::new(this);
        child.args(["--exact", "lock::filter::tests::behind_the_filter"]);
        child.env(TRY, format!("{mode} {what}")).stdout(std::process::Stdio::null());
        child.status().expect("started")
    }

    #[test]
    fn another_program_is_the_end_of_this_one() {
        assert_eq!(tried("none", "execve").code(), Some(0), "without a filter it runs");
        for mode in ["errno", "kill"] {
            assert_eq!(tried(mode, "execve").signal(), Some(SIGSYS), "{mode}");
        }
    }

    #[test]
    fn what_is_unexpected_is_refused_and_the_program_goes_on_unless_it_is_strict() {
        for what in ["fork", "internet"] {
            assert_eq!(tried("none", what).code(), Some(0), "{what}: without a filter it works");
            assert_eq!(tried("errno", what).code(), Some(3), "{what}");
            assert_eq!(tried("kill", what).signal(), Some(SIGSYS), "{what}");
            assert_eq!(tried("log", what).code(), Some(0), "{what}");
        }
    }

    #[test]
    fn threads_begin_and_end_behind_the_strict_filter() {
        assert_eq!(tried("kill", "nothing").code(), Some(0));
    }

    #[test]
    fn no_call_is_both_needed_and_deadly() {
        for program in [Program::Device, Program::Share, Program::Serve] {
            let allowed = allowed(program).expect("rules");
            let forbidden = forbidden(program).expect("rules");
            let both: Vec<_> = forbidden
                .iter()
                .filter(|(call, rules)| rules.is_empty() && allowed.contains_key(*call))
                .map(|(call, _)| call)
                .collect();
            assert!(both.is_empty(), "{program:?}: {both:?}");
        }
    }
}
