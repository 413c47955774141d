//! Guests boot and run scripts.
use std::time::Duration;
use xtask::{guest::qemu::Machine, packages::Root};

#[test]
fn boots() {
    let root = Root::prepare(false).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let start = std::time::Instant::now();
    let mut guest = Machine::default().boot(&root, dir.path()).unwrap();
    eprintln!("boot {:?} {}", start.elapsed(), guest.release());
    let start = std::time::Instant::now();
    eprintln!("{}", guest.run("echo hello; cat /proc/cpuinfo | head -5; dmesg | tail -3", Duration::from_secs(20)).unwrap());
    eprintln!("script {:?}", start.elapsed());
    guest.reboot().unwrap();
    eprintln!("reboot {:?}", start.elapsed());
    guest.power_off().unwrap();
    eprintln!("off {:?}", start.elapsed());
    let start = std::time::Instant::now();
    let mut guest = xtask::guest::uml::boot(&root, dir.path(), &[]).unwrap();
    eprintln!("uml boot {:?} {}", start.elapsed(), guest.release());
    eprintln!("{}", guest.run("echo hello; cat /proc/cpuinfo | head -5; dmesg | tail -3", Duration::from_secs(20)).unwrap());
    guest.power_off().unwrap();
}
