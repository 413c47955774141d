//! A guest whose tools lie on one share builds a program on another one, keeps it with git, and holds a file
//! against its model.
//!
//! `OUTBOARD_SECONDS=300` does the latter for so long.

use crate::lab::{Lab, sound};
use crate::share::{self, MINUTE};
use anyhow::{Result, ensure};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use xtask::backend::{self, Device};
use xtask::guest::qemu::Machine;
use xtask::packages::Root;
use xtask::process;

/// The tools' root is a share that nobody can write to; what is built lies on another one.
const BUILD: &str = r#"
mkdir /tools
mount -t virtiofs tools /tools
mount -t virtiofs share /tools/mnt
mount -t tmpfs tmp /tools/tmp
mount -o bind /dev /tools/dev
mount -o bind /proc /tools/proc
if touch /tools/source/new 2> /dev/null; then echo "written on a read-only share"; exit 1; fi
cat > /tools/tmp/build <<'END'
set -eu
export PATH=/usr/bin:/bin HOME=/tmp
cd /mnt
tar -xzf /source/lua5.4_*.orig.tar.gz
cd lua-*
make -C src CC=tcc AR="tcc -ar rcs" RANLIB=true generic > /tmp/made 2>&1 || { cat /tmp/made; exit 1; }
src/lua -e 'print("built: " .. 6 * 7)'
# The tree belongs to whom its authors' archive says.
git config --global --add safe.directory '*'
git init -q .
git add -A
git -c user.name=guest -c user.email=guest@test commit -q -m "built in a guest"
git gc -q
git fsck --full --strict
git status --porcelain
git log --format=%s
END
chroot /tools /bin/sh /tmp/build
umount /tools/mnt
"#;

/// Two files at once, each as its model, on what may be cached and on what may not.
/// Values of `--cache`, which are tags as well.
const CACHES: [&str; 4] = ["auto", "never", "always", "metadata"];

const MODEL: &str = "
seed=0
for tag in auto never always metadata; do
    mkdir /$tag
    mount -t virtiofs $tag /$tag
    seed=$((seed + 1))
    (files model /$tag SECONDS $seed || echo WRONG) &
done
wait
";

fn tools(lab: &Lab, tools: &Root) -> Result<Device> {
    let more = ["--readonly", "--cache", "always"];
    share::start_named(lab, "tools", &tools.path(""), &more)
}

/// The tree on the share is what its authors packed, and more.
fn is_as_packed(tools: &Root, share: &Path) -> Result<()> {
    let folder = fs::read_dir(tools.path("source"))?;
    let packed = folder.filter_map(|entry| Some(entry.ok()?.path()));
    let packed: Vec<_> = packed.filter(|path| path.to_string_lossy().ends_with(".gz")).collect();
    let mut compare = Command::new("tar");
    compare.arg("--compare").arg("-C").arg(share).arg("-zf").args(packed);
    process::output(&mut compare).map(drop)
}

#[test]
fn a_guest_whose_tools_are_a_share_builds_a_program_on_another_one_and_keeps_it_with_git()
-> Result<()> {
    let needs = || Root::tools().and_then(|_| backend::outboard()).map(drop);
    let Some(lab) = Lab::open(needs)? else { return Ok(()) };
    let (root, folder) = (Root::tools()?, share::shared(&lab)?);
    let tools = tools(&lab, &root)?;
    let device = share::start(&lab, &folder, &[])?;
    let machine = share::machine(&device, 1);
    let machine = machine.with_device("vhost-user-fs-pci,tag=tools", &tools.socket);
    let mut guest = sound(machine.boot(&lab.root, lab.path()), &device)?;
    let said = sound(guest.run(BUILD, 4 * MINUTE), &device)?;
    ensure!(said.contains("built: 42\n") && said.ends_with("built in a guest\n"), "{said}");
    is_as_packed(&root, &folder)?;
    sound(guest.power_off(), &device)?;
    tools.terminate()?;
    device.terminate()
}

/// How long files are held against their models.
fn seconds() -> u64 {
    std::env::var("OUTBOARD_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(3)
}

#[test]
fn files_of_a_share_are_what_their_models_are() -> Result<()> {
    let needs = || backend::files_example().and_then(|_| backend::outboard()).map(drop);
    let Some(lab) = Lab::open(needs)? else { return Ok(()) };
    let folder = share::shared(&lab)?;
    let mut machine = Machine {
        modules: vec!["virtiofs"],
        cpus: 2,
        ours: vec![backend::files_example()?],
        ..Machine::default()
    };
    let mut devices = Vec::new();
    for cache in CACHES {
        // Without this, what is not cached is not mapped: `metadata` shows that.
        let mapped = (cache == "never").then_some("--allow-mmap");
        let options: Vec<_> = ["--cache", cache].into_iter().chain(mapped).collect();
        let device = share::start_named(&lab, cache, &folder, &options)?;
        let card = format!("vhost-user-fs-pci,tag={cache}");
        machine = machine.with_device(&card, &device.socket);
        devices.push(device);
    }
    let all_sound = |said| devices.iter().try_fold(said, |said, device| sound(Ok(said), device));
    let mut guest = sound(machine.boot(&lab.root, lab.path()), &devices[0])?;
    let script = MODEL.replace("SECONDS", &seconds().to_string());
    let bound = 3 * MINUTE + Duration::from_secs(seconds());
    let said = sound(guest.run(&script, bound), &devices[0]).and_then(all_sound)?;
    let right = said.matches("all as its model").count();
    ensure!(!said.contains("WRONG") && right == CACHES.len(), "{said}");
    ensure!(said.matches("; 0 of ").count() == 1, "{said}");
    eprintln!("{}", said.trim());
    sound(guest.power_off(), &devices[0])?;
    devices.into_iter().try_for_each(Device::terminate)
}
