//! One block request (virtio 1.3 §5.2.6) on the disk in memory.

use outboard_queue::Chain;

use super::{Device, SECTORS};

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

impl Device {
    /// Performs a request; how many bytes were written.
    pub(super) fn request(&mut self, chain: &mut Chain) -> u32 {
        let lone = chain.writable().segments().last().is_some_and(|last| last.len() == 1);
        if self.is("wants-status-alone") && !lone {
            return 0;
        }
        if chain.reserve_tail(1).is_err() {
            return 0;
        }
        let (status, written) = self.perform(chain);
        match chain.write_tail(&[status]) {
            Ok(()) => written + 1,
            Err(_) => 0,
        }
    }

    fn perform(&mut self, chain: &mut Chain) -> (u8, u32) {
        if self.minds_layout() {
            return (IOERR, 0);
        }
        let mut header = [0; 16];
        if chain.readable().read_exact(&mut header).is_err() && !self.is("takes-short-headers") {
            return (IOERR, 0);
        }
        let kind = u32::from_le_bytes(header[..4].try_into().expect("four bytes"));
        let sector = u64::from_le_bytes(header[8..].try_into().expect("eight bytes"));
        match kind {
            0 => self.read(chain, sector),
            1 => self.write(chain, sector),
            4 => (if self.is("flush-looks-at-the-sector") && sector != 0 { IOERR } else { OK }, 0),
            8 => self.id(chain),
            11 | 13 => (self.range(chain, kind), 0),
            _ if self.is("knows-every-request") => (OK, 0),
            _ => (UNSUPP, 0),
        }
    }

    /// Where a transfer lies on the disk.
    fn place(&self, sector: u64, len: u64) -> Option<usize> {
        if !len.is_multiple_of(512) && !self.is("takes-parts-of-sectors") {
            return None;
        }
        let count = len.div_ceil(512);
        let inside = sector.checked_add(count).is_some_and(|end| end <= SECTORS);
        inside.then(|| usize::try_from(sector * 512).expect("small"))
    }

    fn read(&self, chain: &mut Chain, sector: u64) -> (u8, u32) {
        let len = chain.writable().len();
        let Some(at) = self.place(sector, len) else {
            let inside = sector < SECTORS;
            return match self.fault.as_str() {
                "reads-past-the-end" if !inside && len == 512 => (OK, 0),
                "reads-across-the-end" if inside && len == 1024 => (OK, 0),
                _ => (IOERR, 0),
            };
        };
        let count = usize::try_from(len).expect("small");
        let end = (at + count).min(self.disk.len());
        let good = chain.writable().write_all(&self.disk[at..end]).is_ok();
        (if good { OK } else { IOERR }, u32::try_from(len).expect("small"))
    }

    fn write(&mut self, chain: &mut Chain, sector: u64) -> (u8, u32) {
        let len = chain.readable().len();
        let Some(at) = self.place(sector, len) else {
            return (if self.is("writes-past-the-end") { OK } else { IOERR }, 0);
        };
        if self.is("forgets-writes") {
            return (OK, 0);
        }
        let end = at + usize::try_from(len).expect("small");
        let good = chain.readable().read_exact(&mut self.disk[at..end]).is_ok();
        (if good { OK } else { IOERR }, 0)
    }

    fn id(&self, chain: &mut Chain) -> (u8, u32) {
        if self.is("has-no-id") {
            return (UNSUPP, 0);
        }
        let len = chain.writable().len().min(20);
        let id = &b"faulty\0\0\0\0\0\0\0\0\0\0\0\0\0\0"[..usize::try_from(len).expect("small")];
        let good = chain.writable().write_all(id).is_ok();
        (if good { OK } else { IOERR }, u32::try_from(len).expect("small"))
    }

    /// Discard and write-zeroes: checked, not performed.
    fn range(&self, chain: &mut Chain, kind: u32) -> u8 {
        let mut body = [0; 16];
        if kind == 13 && self.is("zeroes-anything") {
            return OK;
        }
        if chain.readable().len() != 16 || chain.readable().read_exact(&mut body).is_err() {
            return IOERR;
        }
        let sector = u64::from_le_bytes(body[..8].try_into().expect("eight bytes"));
        let count = u32::from_le_bytes(body[8..12].try_into().expect("four bytes"));
        let flags = u32::from_le_bytes(body[12..].try_into().expect("four bytes"));
        if self.is("discard-bad") && kind == 11 && flags == 0 {
            return OK;
        }
        let unmap = kind == 13 || self.is("discards-with-unmap");
        if flags & !u32::from(unmap) != 0 {
            return UNSUPP;
        }
        match sector.checked_add(u64::from(count)) {
            Some(end) if end <= SECTORS && count <= 1024 => OK,
            _ => IOERR,
        }
    }
}
