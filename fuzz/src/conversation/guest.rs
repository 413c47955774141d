//! Memory of a conversation that both sides map: guest memory, the in-flight region and the dirty
//! logs; and the model's copy of its bytes.
//!
//! Invariant: the files hold what the copy holds. The harness changes both at once; what the
//! back-end writes has to be what the model wrote. Of a log's bits some must be set and some may
//! be, see `log.rs`.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use outboard_memory::Window;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::log::LogFile;

/// Bytes of a page, and of the offsets that the script uses.
pub const PAGE: usize = 4096;
/// Number of files that are guest memory.
pub const FILES: usize = 3;
/// The file of the in-flight region.
pub const NOTES: usize = FILES;
/// Number of logs.
pub const LOGS: usize = 2;
/// Bytes of a file.
pub const FILE: usize = 2 * PAGE;

/// A place in the files: which, and from which byte on.
pub type Place = (usize, usize);

/// A region as the model accepted it; `user` is the address by which rings are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reg {
    pub guest: u64,
    pub user: u64,
    pub size: u64,
    pub file: usize,
    pub offset: u64,
}

/// A generation of guest memory.
pub type Mem = Rc<Vec<Reg>>;

/// The file place of a guest range that lies in one region.
pub fn find(mem: &[Reg], guest: u64, len: u64) -> Option<Place> {
    let reg = mem.iter().find(|reg| guest >= reg.guest && guest - reg.guest < reg.size)?;
    let inside = guest - reg.guest;
    (len <= reg.size - inside).then(|| (reg.file, (reg.offset + inside) as usize))
}

/// The guest address of a front-end range that lies in one region.
pub fn user_to_guest(mem: &[Reg], user: u64, len: u64) -> Option<u64> {
    let reg = mem.iter().find(|reg| user >= reg.user && user - reg.user < reg.size)?;
    let inside = user - reg.user;
    (len <= reg.size - inside).then(|| reg.guest + inside)
}

/// The file places of a guest range, whatever regions it crosses.
pub fn parts(mem: &[Reg], guest: u64, len: u64) -> Option<Vec<(Place, usize)>> {
    guest.checked_add(len)?;
    let (mut at, mut left, mut all) = (guest, len, Vec::new());
    while left > 0 {
        let reg = mem.iter().find(|reg| at >= reg.guest && at - reg.guest < reg.size)?;
        let part = left.min(reg.size - (at - reg.guest));
        all.push(((reg.file, (reg.offset + at - reg.guest) as usize), part as usize));
        at += part;
        left -= part;
    }
    Some(all)
}

/// The files, and what must be in them.
pub struct Guest {
    fds: Vec<OwnedFd>,
    windows: Vec<Window>,
    model: Vec<Vec<u8>>,
    real: Vec<u8>,
    pub(super) logs: Vec<LogFile>,
    /// The front-end wrote into the in-flight region.
    pub scribbled: bool,
    /// The in-flight region as it was when the last used index was stored, if it has changed only
    /// by what follows that.
    torn: Option<Vec<u8>>,
}

fn file(size: usize) -> (OwnedFd, Window) {
    let file = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memory file");
    ftruncate(&file, size as u64).expect("its length");
    let ours = file.try_clone().expect("a descriptor");
    (file, Window::map(ours, 0, size as u64, true).expect("a mapping"))
}

impl Default for Guest {
    fn default() -> Self {
        let (fds, windows) = (0..=NOTES).map(|_| file(FILE)).unzip();
        let log = |_| {
            let (fd, window) = file(PAGE);
            LogFile::new(fd, window)
        };
        let logs = (0..LOGS).map(log).collect();
        Self {
            fds,
            windows,
            model: vec![vec![0; FILE]; NOTES + 1],
            real: vec![0; FILE],
            logs,
            scribbled: false,
            torn: None,
        }
    }
}

impl Guest {
    /// All zero again.
    pub fn reset(&mut self) {
        for (window, model) in self.windows.iter().zip(&mut self.model) {
            model.fill(0);
            window.write(0, model).expect("inside");
        }
        self.logs.iter_mut().for_each(LogFile::take);
        self.scribbled = false;
        self.torn = None;
    }

    /// A used index is stored now; the region follows.
    pub fn tear(&mut self, notes: impl FnOnce(&mut Self)) {
        let before = self.model[NOTES].clone();
        notes(self);
        self.torn = Some(before);
    }

    /// As [`Self::picture`], of a process that was killed right behind its last store of a used
    /// index; none if other requests came later.
    pub fn torn_picture(&self) -> Option<Vec<Vec<u8>>> {
        let mut picture = self.model.clone();
        picture[NOTES].clone_from(self.torn.as_ref()?);
        Some(picture)
    }

    /// All bytes of guest memory and of the in-flight region at this moment.
    pub fn picture(&self) -> Vec<Vec<u8>> {
        self.model.clone()
    }

    /// They are again as they were: what was written since is what a killed process did not write.
    pub fn put_back(&mut self, picture: Vec<Vec<u8>>) {
        for (window, bytes) in self.windows.iter().zip(&picture) {
            window.write(0, bytes).expect("inside");
        }
        self.model = picture;
    }

    /// One file's descriptor, to be sent.
    pub fn fd(&self, file: usize) -> &OwnedFd {
        &self.fds[file]
    }

    /// The driver writes: both sides see it.
    pub fn drive(&mut self, place: Place, bytes: &[u8]) {
        let room = FILE - place.1.min(FILE);
        let bytes = &bytes[..bytes.len().min(room)];
        self.scribbled |= place.0 == NOTES;
        self.write(place, bytes);
        self.windows[place.0].write(place.1 as u64, bytes).expect("inside");
    }

    /// The device is to write this.
    pub fn write(&mut self, (file, at): Place, bytes: &[u8]) {
        if file == NOTES {
            self.torn = None;
        }
        self.model[file][at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// What is there.
    pub fn read(&self, (file, at): Place, len: usize) -> &[u8] {
        &self.model[file][at..at + len]
    }

    pub fn u16(&self, place: Place) -> u16 {
        u16::from_le_bytes(self.read(place, 2).try_into().expect("two bytes"))
    }

    pub fn put_u16(&mut self, place: Place, value: u16) {
        self.write(place, &value.to_le_bytes());
    }

    pub fn u64(&self, place: Place) -> u64 {
        u64::from_le_bytes(self.read(place, 8).try_into().expect("eight bytes"))
    }

    /// The files hold what the model says.
    pub fn check(&mut self, when: &str) {
        self.logs.iter().for_each(|log| log.check(when));
        for (file, (window, model)) in self.windows.iter().zip(&self.model).enumerate() {
            window.read(0, &mut self.real).expect("inside");
            if self.real != *model {
                let at = self.real.iter().zip(model).position(|(real, model)| real != model);
                let at = at.unwrap_or(0);
                let end = FILE.min(at + 16);
                panic!(
                    "guest memory, {when}: file {file} at {at:#x} holds {:02x?}, {:02x?} wanted",
                    &self.real[at..end],
                    &model[at..end]
                );
            }
        }
    }
}
