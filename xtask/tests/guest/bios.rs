//! SeaBIOS as a front end's driver: it sets up one small queue, polls it, and knows no more than
//! reads and writes (virtio 1.3, section 5.2.6). A boot sector of ours makes it do both.

use crate::disk::{MOUNT, UNMOUNT, script};
use crate::lab::{Lab, sound};
use anyhow::{Result, ensure};
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};
use xtask::backend::{Disk, check_ext4, image};
use xtask::guest::qemu::Machine;

/// Reads sectors 8 to 15 through the BIOS, writes them to sectors 64 to 71, and sends the first
/// 16 bytes to the first serial port.
const BOOT_SECTOR: [u8; 57] = [
    0x31, 0xc0, // xor ax, ax
    0x8e, 0xd8, // mov ds, ax
    0xbe, 0x29, 0x7c, // mov si, packet
    0xb4, 0x42, // mov ah, 42h: read
    0xcd, 0x13, // int 13h
    0x72, 0x19, // jc stop
    0xc6, 0x06, 0x31, 0x7c, 64, // mov byte [packet.sector], 64
    0xb8, 0x00, 0x43, // mov ax, 4300h: write
    0xcd, 0x13, // int 13h
    0x72, 0x0d, // jc stop
    0xbe, 0x00, 0x80, // mov si, 8000h
    0xb9, 16, 0x00, // mov cx, 16
    0xba, 0xf8, 0x03, // mov dx, 3f8h
    0xac, 0xee, 0xe2, 0xfc, // next: lodsb; out dx, al; loop next
    0xf4, 0xeb, 0xfd, // stop: hlt; jmp stop
    16, 0, 8, 0, 0x00, 0x80, 0, 0, // packet: 8 sectors, to 0:8000h,
    8, 0, 0, 0, 0, 0, 0, 0, // from sector 8
];

const GREETING: &[u8; 16] = b"read by the BIOS";

#[test]
fn a_bios_reads_and_writes_the_disk_and_leaves_it_fit_for_the_guest() -> Result<()> {
    let Some(lab) = Lab::for_disk(Disk::ours())? else { return Ok(()) };
    let path = image(lab.path(), 64)?;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path)?;
    file.write_all_at(&BOOT_SECTOR, 0)?;
    file.write_all_at(&[0x55, 0xaa], 510)?;
    let sectors: Vec<u8> = GREETING.iter().copied().cycle().take(8 * 512).collect();
    file.write_all_at(&sectors, 8 * 512)?;

    let device = Disk::ours().serve(&lab.root, lab.path(), &path, 1)?;
    let machine = Machine { seabios: true, ..Machine::default() };
    let machine =
        machine.with_device("vhost-user-blk-pci,num-queues=1,bootindex=1", &device.socket);
    let (bios, console) = machine.boot_disk(&lab.root, lab.path())?;
    let end = Instant::now() + Duration::from_secs(60);
    while !std::fs::read(&console)?.ends_with(GREETING) {
        ensure!(Instant::now() < end, "the BIOS does not boot our sector\n{}", device.said());
        std::thread::sleep(Duration::from_millis(20)); // a file's growth is seen by looking
    }
    drop(bios);
    let mut copied = vec![0; sectors.len()];
    file.read_exact_at(&mut copied, 64 * 512)?;
    ensure!(copied == sectors, "the BIOS wrote what it had read");

    let mut guest = sound(machine.boot(&lab.root, lab.path()), &device)?;
    script(&mut guest, &device, &["mkfs.ext4 -q -F /dev/vda", MOUNT, "echo x > /mnt/x", UNMOUNT])?;
    sound(guest.power_off(), &device)?;
    device.terminate()?;
    check_ext4(&lab.root, &path)
}
