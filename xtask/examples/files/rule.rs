//! Rules, each with its sentence and a folder of its own.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{Gid, Mode, OFlags, Uid, open};
use rustix::io::Errno;
use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};

/// Looks whether a rule holds, in an empty folder that anyone may write to.
pub(crate) type Check = fn(&Path) -> Result<()>;

/// Functions with their names for sentences.
macro_rules! rules {
    ($($name:ident),* $(,)?) => {
        &[$((stringify!($name), $name as crate::rule::Check)),*]
    };
}
pub(crate) use rules;

/// Looks at every rule below `dir`; the exit code tells whether all hold.
pub(crate) fn all(dir: &Path) -> Result<ExitCode> {
    let groups =
        [crate::names::RULES, crate::data::RULES, crate::owners::RULES, crate::locks::RULES];
    let (mut held, mut broken) = (0, 0);
    for (name, check) in groups.into_iter().flatten() {
        let folder = dir.join(name);
        fs::create_dir(&folder).with_context(|| format!("{}", folder.display()))?;
        rustix::fs::chmod(&folder, Mode::from_raw_mode(0o777))?;
        match check(&folder) {
            Ok(()) => held += 1,
            Err(why) => {
                broken += 1;
                println!("BROKEN {}: {why:#}", name.replace('_', " "));
            }
        }
        fs::remove_dir_all(&folder)
            .with_context(|| format!("cannot clear {}", folder.display()))?;
    }
    println!("{held} rules hold, {broken} do not");
    Ok(if broken == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What fails with this error, and with no other.
pub(crate) fn refused<T>(outcome: rustix::io::Result<T>, with: Errno) -> Result<()> {
    match outcome {
        Err(error) if error == with => Ok(()),
        Err(error) => bail!("{error} where {with} was to come"),
        Ok(_) => bail!("no error where {with} was to come"),
    }
}

/// Equal, or what was found and expected.
pub(crate) fn same<T: PartialEq + std::fmt::Debug>(found: T, expected: T) -> Result<()> {
    ensure!(found == expected, "{found:?}, expected {expected:?}");
    Ok(())
}

/// Opens, and makes with this mode if the flags say so.
pub(crate) fn opened(path: &Path, flags: OFlags, mode: u32) -> rustix::io::Result<OwnedFd> {
    open(path, flags | OFlags::CLOEXEC, Mode::from_raw_mode(mode))
}

/// Makes a file with these bytes.
pub(crate) fn made(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).with_context(|| format!("{}", path.display()))
}

/// Does it as another user with these groups, the first of them its own, on a thread of its own.
pub(crate) fn as_user<T: Send>(
    user: u32,
    groups: &[u32],
    what: impl FnOnce() -> T + Send,
) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| -> Result<T> {
            let groups: Vec<_> = groups.iter().map(|id| Gid::from_raw(*id)).collect();
            set_thread_groups(&groups)?;
            set_thread_gid(*groups.first().context("a group")?)?;
            set_thread_uid(Uid::from_raw(user))?;
            Ok(what())
        });
        match thread.join() {
            Ok(done) => done,
            Err(_) => bail!("the other user's thread panicked"),
        }
    })
}
