//! POSIX rules on a share, one by one; what inotify tells; two guests on one directory.

use crate::lab::{Lab, sound};
use crate::share::{self, MINUTE};
use anyhow::{Result, ensure};
use std::fs;
use std::path::Path;
use xtask::backend::{self, Device};
use xtask::guest::Guest;
use xtask::guest::qemu::Machine;

fn lab() -> Result<Option<Lab>> {
    Lab::open(|| backend::files_example().and_then(|_| backend::outboard()).map(drop))
}

/// A guest with shares under these tags.
fn guest(lab: &Lab, name: &str, shares: &[(&str, &Device)]) -> Result<Guest> {
    let ours = vec![backend::files_example()?];
    let mut machine = Machine { modules: vec!["virtiofs"], ours, ..Machine::default() };
    for (tag, device) in shares {
        let kind = format!("vhost-user-fs-pci,tag={tag}");
        machine = machine.with_device(&kind, &device.socket);
    }
    let dir = lab.path().join(name);
    fs::create_dir(&dir)?;
    let mut booted = machine.boot(&lab.root, &dir);
    for (_, device) in shares {
        booted = sound(booted, device);
    }
    booted
}

fn mount(guest: &mut Guest, tag: &str) -> Result<()> {
    guest.run(&format!("mkdir /{tag}; mount -t virtiofs {tag} /{tag}"), MINUTE).map(drop)
}

#[test]
fn the_rules_of_posix_hold_whatever_is_cached() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let policies = ["auto", "never", "always", "metadata"];
    let mut devices = Vec::new();
    for policy in policies {
        let folder = lab.path().join(format!("share-{policy}"));
        fs::create_dir(&folder)?;
        let more = ["--cache", policy, "--posix-acl"];
        devices.push(share::start_named(&lab, policy, &folder, &more)?);
    }
    let shares: Vec<_> = policies.into_iter().zip(&devices).collect();
    let mut guest = guest(&lab, "guest", &shares)?;
    for (policy, device) in shares {
        mount(&mut guest, policy)?;
        let said = sound(guest.run(&format!("files rules /{policy}"), 2 * MINUTE), device)?;
        ensure!(!said.contains("BROKEN"), "--cache {policy}: {said}");
        eprintln!("--cache {policy}: {}", said.trim());
    }
    sound(guest.power_off(), &devices[0])?;
    devices.into_iter().try_for_each(Device::terminate)
}

/// Order instead of time: what the host made is there before what the guest makes, of which inotify tells.
#[test]
fn inotify_tells_of_what_the_guest_does_and_not_of_what_the_host_does() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let folder = share::shared(&lab)?;
    let device = share::start(&lab, &folder, &["--cache", "never"])?;
    let mut guest = guest(&lab, "guest", &[("share", &device)])?;
    mount(&mut guest, "share")?;
    let watch = "
        files watch /share loud > /tmp/told &
        for at in $(seq 600); do grep -q watching /tmp/told && break; sleep 0.1; done
        echo watching
        { IFS= read -r word < /dev/ttyS1; }
        cat /share/silent
        touch /share/loud
        wait
        cat /tmp/told";
    sound(guest.start(watch), &device)?;
    sound(guest.expect("watching", MINUTE), &device)?;
    fs::write(folder.join("silent"), "made by the host\n")?;
    guest.say("made")?;
    let said = sound(guest.finish(MINUTE), &device)?;
    ensure!(said.contains("made by the host\n") && said.contains("told of loud"), "{said}");
    ensure!(!said.contains("told of silent"), "inotify tells of the host: {said}");
    sound(guest.power_off(), &device)?;
    device.terminate()
}

/// One of two guests on one directory: each has a process of its own for each policy.
struct Side {
    guest: Guest,
    never: Device,
    auto: Device,
}

impl Side {
    fn start(lab: &Lab, folder: &Path, name: &str) -> Result<Self> {
        let start = |policy: &str| {
            let more = ["--cache", policy];
            share::start_named(lab, &format!("{name}-{policy}"), folder, &more)
        };
        let (never, auto) = (start("never")?, start("auto")?);
        let mut guest = guest(lab, name, &[("never", &never), ("auto", &auto)])?;
        mount(&mut guest, "never")?;
        mount(&mut guest, "auto")?;
        Ok(Self { guest, never, auto })
    }

    fn run(&mut self, script: &str) -> Result<String> {
        let ran = self.guest.run(script, MINUTE);
        sound(sound(ran, &self.never), &self.auto)
    }

    fn end(self) -> Result<()> {
        self.guest.power_off()?;
        self.never.terminate()?;
        self.auto.terminate()
    }
}

#[test]
fn two_guests_share_a_directory_and_each_sees_what_the_other_one_wrote() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let folder = share::shared(&lab)?;
    let mut one = Side::start(&lab, &folder, "one")?;
    let mut two = Side::start(&lab, &folder, "two")?;
    // Nothing is kept: what is written is there at once, through names that were looked at before.
    one.run("echo first > /never/told; cat /never/told")?;
    ensure!(two.run("cat /never/told; stat -c %s /never/told")? == "first\n6\n");
    one.run("echo and more >> /never/told")?;
    ensure!(two.run("cat /never/told; stat -c %s /never/told")? == "first\nand more\n15\n");
    two.run("mv /never/told /never/moved; rm /never/hello")?;
    ensure!(one.run("cat /never/moved; ls /never")? == "first\nand more\nmoved\n");
    // Names and sizes may be a second old, data not older than they.
    one.run("echo old > /auto/seen; cat /auto/seen")?;
    two.run("cat /auto/seen; echo newer >> /auto/seen")?;
    one.run(
        "for at in $(seq 600); do grep -q newer /auto/seen && break; sleep 0.1; done
         test \"$(cat /auto/seen)\" = \"$(printf 'old\\nnewer')\"",
    )?;
    // Both append to one file at once: no line is lost or cut.
    let append = |name| {
        format!(
            "echo begun; for at in $(seq 200); do echo {name} $at of two guests >> /never/log; done"
        )
    };
    one.guest.start(&append("one"))?;
    one.guest.expect("begun", MINUTE)?;
    two.run(&append("two"))?;
    one.guest.finish(MINUTE)?;
    let log = fs::read_to_string(folder.join("log"))?;
    for name in ["one", "two"] {
        let lines: Vec<_> = log.lines().filter(|line| line.starts_with(name)).collect();
        let right = (1..=200).map(|at| format!("{name} {at} of two guests"));
        ensure!(lines.into_iter().eq(right), "{name} is not whole in {log}");
    }
    ensure!(log.lines().count() == 400);
    // Locks are each guest's own.
    one.guest.start("files flock /never/lock < /dev/ttyS1")?;
    one.guest.expect("locked", MINUTE)?;
    ensure!(two.run("files flock /never/lock")? == "locked\n");
    one.guest.say("enough")?;
    one.guest.finish(MINUTE)?;
    one.end()?;
    two.end()
}
