//! `cargo xtask judged`: the judge on our devices and on other people's, as `docs/judged.md`.
//!
//! Each program runs in a scratch folder of its own; `crates/outboard-check/peers/NAME.txt` lists what is
//! known of it. Invariant: a section is made of one run's `--json` alone, and only the sections of the
//! programs that were judged are written anew.

mod page;

use crate::packages::Root;
use crate::{paths, process};
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

/// The page.
const PAGE: &str = "docs/judged.md";

/// The version of virtiofsd that is built where Debian has no package of it.
const VIRTIOFSD: &str = "1.14.0";

/// A program to judge.
struct Subject {
    name: &'static str,
    /// Where it comes from.
    origin: &'static str,
    /// What shows its version; none for our own.
    version: Option<&'static [&'static str]>,
    /// The command; `{socket}` is the judge's.
    command: &'static [&'static str],
    /// Defects that the judge must find, in words, with the check that finds each.
    defects: &'static [(&'static str, &'static str)],
}

const SUBJECTS: &[Subject] = &[
    Subject {
        name: "outboard-block",
        origin: "our block device",
        version: None,
        command: &[
            "outboard",
            "block",
            "--num-queues",
            "2",
            "--socket-path",
            "{socket}",
            "disk.img",
        ],
        defects: &[],
    },
    Subject {
        name: "everything",
        origin: "our example of a device that offers all it can",
        version: None,
        command: &["everything", "{socket}"],
        defects: &[],
    },
    Subject {
        name: "qemu-storage-daemon",
        origin: "Debian's package qemu-utils; libvhost-user",
        version: Some(&["qemu-storage-daemon", "--version"]),
        command: &[
            "qemu-storage-daemon",
            "--blockdev",
            "driver=file,filename=disk.img,node-name=d,locking=off",
            "--export",
            "type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={socket},writable=on,num-queues=2",
        ],
        defects: &[
            ("a ring's index is out of range", "index-set-vring-num"),
            ("2^32-1 memory regions are announced", "regions-4-gi"),
            ("stray descriptors leak", "fd-stray-often"),
            ("a memory file is shorter than its region", "memory-short"),
        ],
    },
    Subject {
        name: "dpdk-net-vhost",
        origin: "Debian's packages dpdk-dev and librte-net-vhost23; testpmd with net_vhost",
        version: Some(&["dpdk-testpmd", "-v", "--no-huge", "-m", "16", "--no-pci", "--no-shconf"]),
        command: &[
            "dpdk-testpmd",
            "--lcores=0@0,1@1",
            "--no-huge",
            "-m",
            "64",
            "--no-pci",
            "--no-telemetry",
            "--no-shconf",
            "--vdev=net_vhost0,iface={socket},queues=1",
            "--",
            "--auto-start",
            "--stats-period=3600",
            "--total-num-mbufs=2048",
            "--nb-cores=1",
            "--forward-mode=rxonly",
        ],
        defects: &[],
    },
    Subject {
        name: "virtiofsd",
        origin: "the crate of that name, built with cargo install; rust-vmm's vhost-user-backend",
        version: Some(&["virtiofsd", "--version"]),
        command: &[
            "virtiofsd",
            "--socket-path",
            "{socket}",
            "--shared-dir",
            "share",
            "--sandbox",
            "none",
            "--seccomp",
            "none",
        ],
        defects: &[],
    },
];

/// What one run brought.
struct Judged {
    subject: &'static Subject,
    version: String,
    /// With smaller counts, as `--quick` has them.
    quick: bool,
    report: Value,
}

/// Judges all programs, or those named, and writes their sections.
///
/// # Errors
/// When a program cannot be had or judged, or a defect that it is known for is not found.
pub fn run(only: &[String], quick: bool) -> Result<()> {
    let known = |name: &String| SUBJECTS.iter().any(|subject| subject.name == name);
    if let Some(name) = only.iter().find(|name| !known(name)) {
        let names: Vec<_> = SUBJECTS.iter().map(|subject| subject.name).collect();
        bail!("there is no {name} to judge; there are {}", names.join(", "));
    }
    let path = search_path(only)?;
    let page = paths::workspace().join(PAGE);
    for subject in SUBJECTS {
        if !only.is_empty() && !only.iter().any(|name| name == subject.name) {
            continue;
        }
        let judged = judge(subject, &path, quick)?;
        println!("judged: {}: {}", subject.name, page::counts(&judged.report));
        defects_are_found(&judged)?;
        let there = std::fs::read_to_string(&page).unwrap_or_default();
        std::fs::write(&page, page::with_section(&there, &judged))?;
    }
    Ok(())
}

/// Every folder that the programs lie in; what has to be fetched or built is.
fn search_path(only: &[String]) -> Result<OsString> {
    let wanted = |name: &str| only.is_empty() || only.iter().any(|one| one == name);
    let manifest = paths::workspace().join("Cargo.toml");
    let mut build = Command::new("cargo");
    build.args(["build", "--quiet", "--workspace", "--bins", "--examples", "--manifest-path"]);
    process::run(build.arg(manifest))?;
    let ours = paths::target()?.join("debug");
    let mut folders = vec![ours.join("examples"), ours];
    if wanted("dpdk-net-vhost") {
        folders.push(Root::prepare_peers(false)?.wrappers());
    }
    if wanted("qemu-storage-daemon") && process::find("qemu-storage-daemon").is_none() {
        folders.push(Root::prepare(false)?.wrappers());
    }
    if wanted("virtiofsd") && process::find("virtiofsd").is_none() {
        folders.push(virtiofsd_folder()?);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    folders.extend(std::env::split_paths(&path));
    Ok(std::env::join_paths(folders)?)
}

/// virtiofsd: the machine's, or ours, built once.
///
/// # Errors
/// When it does not build.
pub fn virtiofsd() -> Result<PathBuf> {
    match process::find("virtiofsd") {
        Some(found) => Ok(found),
        None => Ok(virtiofsd_folder()?.join("virtiofsd")),
    }
}

/// Builds virtiofsd, once; the folder that it lies in.
fn virtiofsd_folder() -> Result<PathBuf> {
    let tools = paths::xtask()?.join("tools");
    let bin = tools.join("bin");
    if !bin.join("virtiofsd").exists() {
        let [lib, usr] = Root::prepare_peers(false)?.library_dirs();
        let search = format!("-L native={} -L native={}", usr.display(), lib.display());
        let mut install = Command::new("cargo");
        install.args(["install", "virtiofsd", "--locked", "--version", VIRTIOFSD, "--root"]);
        install.arg(&tools).env("RUSTFLAGS", search);
        process::run(install.env("CARGO_TARGET_DIR", tools.join("build")))?;
    }
    Ok(bin)
}

/// The list of what is known of a program.
fn list(subject: &Subject) -> Option<String> {
    let list = format!("crates/outboard-check/peers/{}.txt", subject.name);
    paths::workspace().join(&list).exists().then_some(list)
}

fn judge(subject: &'static Subject, path: &OsString, quick: bool) -> Result<Judged> {
    let scratch = tempfile::tempdir()?;
    std::fs::File::create(scratch.path().join("disk.img"))?.set_len(8 << 20)?;
    std::fs::create_dir(scratch.path().join("share"))?;
    let version = match subject.version {
        None => "this tree".to_owned(),
        Some(words) => version(words, path)?,
    };
    let mut check = Command::new(program("outboard", path)?);
    check.args(["check", "--json"]).args(quick.then_some("--quick"));
    if let Some(list) = list(subject) {
        check.arg("--expect").arg(paths::workspace().join(list));
    }
    check.arg("--").args(subject.command);
    check.current_dir(scratch.path()).env("PATH", path);
    let done = check.output().with_context(|| process::shown(&check))?;
    let said = String::from_utf8_lossy(&done.stderr);
    let report: Value = serde_json::from_slice(&done.stdout)
        .with_context(|| format!("{} could not be judged: {}", subject.name, said.trim_end()))?;
    said.lines().for_each(|line| println!("{line}"));
    Ok(Judged { subject, version, quick, report })
}

/// The first line with a number in it that the program says of itself.
fn version(words: &[&str], path: &OsString) -> Result<String> {
    let (name, arguments) = words.split_first().context("no command")?;
    let mut command = Command::new(program(name, path)?);
    let said = command.args(arguments).stdin(std::process::Stdio::null()).output()?;
    let text = [said.stdout, said.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    let line = text.lines().find(|line| line.contains("version") || line.contains("Version"));
    let line = line.or_else(|| text.lines().next()).context("it says no version")?;
    Ok(line.trim_start_matches("EAL: ").to_owned())
}

fn program(name: &str, path: &OsString) -> Result<PathBuf> {
    let found = std::env::split_paths(path).map(|dir| dir.join(name)).find(|file| file.exists());
    found.with_context(|| format!("{name} is nowhere"))
}

/// A defect that is known and not found is a defect of the judge, or mended.
fn defects_are_found(judged: &Judged) -> Result<()> {
    for (what, id) in judged.subject.defects {
        let found = page::judgements(&judged.report).any(|one| one["id"] == *id && page::bad(one));
        ensure!(found, "{}: {what}: {id} does not find it", judged.subject.name);
    }
    Ok(())
}

/// How to judge a program in the same way again, and the options of the judge.
fn repeated(judged: &Judged) -> (String, String) {
    let Judged { subject, quick, .. } = judged;
    let quick = if *quick { " --quick" } else { "" };
    let expect = list(subject).map(|list| format!(" --expect {list}")).unwrap_or_default();
    let again = format!("cargo xtask judged{quick} --only {}", subject.name);
    (again, format!("outboard check --json{quick}{expect}"))
}

/// Whether the page's path is one of ours: used by its tests.
#[cfg(test)]
fn names() -> impl Iterator<Item = &'static str> {
    SUBJECTS.iter().map(|subject| subject.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_list_of_known_failures_belongs_to_a_program() {
        let folder = paths::workspace().join("crates/outboard-check/peers");
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            assert!(names().any(|known| known == name), "{name}");
        }
    }

    #[test]
    fn every_command_says_where_the_socket_goes() {
        for subject in SUBJECTS {
            assert!(subject.command.iter().any(|word| word.contains("{socket}")));
        }
    }
}
