//! The model of one running ring: a split virtqueue walked in the plainest way, on the model's
//! copy of guest memory (virtio 1.3 §2.7).

use std::collections::VecDeque;

use super::guest::{Guest, Mem, Place, find, parts, user_to_guest};
use super::log::LogTo;
use super::notes::Notes;

/// How a driver is called, or told that its ring broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notify {
    /// An eventfd of the harness.
    Bell(usize),
    /// Something that takes nothing.
    Junk,
    /// A message on the back-end channel.
    Message,
}

/// How a ring is kicked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KickWay {
    Bell(usize),
    Junk,
    Message,
    Poll,
}

/// A change that was posted to a running ring and not yet taken.
#[derive(Clone, Debug)]
pub enum Change {
    Call(Option<Notify>),
    Err(Option<Notify>),
    Kick(KickWay),
    Enable(bool),
    Memory(Mem, bool),
    Process,
    Log(Option<LogTo>),
}

/// A request that the device took.
#[derive(Debug)]
pub struct Taken {
    pub head: u16,
    pub readable: Vec<(Place, usize)>,
    pub writable: Vec<(Place, usize)>,
    /// The guest-physical ranges that are marked in a log: address, bytes.
    pub note: Vec<(u64, u64)>,
    /// Bytes that the device has written.
    filled: usize,
}

impl Taken {
    pub fn bytes(list: &[(Place, usize)]) -> u64 {
        list.iter().map(|(_, len)| *len as u64).sum()
    }

    /// The first readable bytes.
    pub fn read(&self, guest: &Guest, most: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for &(place, len) in &self.readable {
            let part = len.min(most - bytes.len());
            bytes.extend_from_slice(guest.read(place, part));
        }
        bytes
    }

    /// The device fills the next writable bytes.
    pub fn fill(&mut self, guest: &mut Guest, byte: u8, most: usize) {
        let (mut skip, mut left) = (self.filled, most);
        for &((file, at), len) in &self.writable {
            let before = skip.min(len);
            let part = left.min(len - before);
            guest.write((file, at + before), &vec![byte; part]);
            (skip, left) = (skip - before, left - part);
        }
        self.filled += most - left;
    }
}

/// The three parts of a ring, in file places.
#[derive(Clone, Copy, Debug)]
struct Spot {
    desc: Place,
    avail: Place,
    used: Place,
}

/// Why a ring does not start.
#[derive(Debug, PartialEq, Eq)]
pub enum NoStart {
    /// No region there: it may come.
    Absent,
    /// It is wrong.
    Wrong,
}

/// What a ring is started with.
#[derive(Clone, Debug)]
pub struct Setup {
    pub size: u16,
    pub user: [u64; 3],
    pub features: u64,
    pub base: u16,
    pub enabled: bool,
    /// Requests of a disabled ring are taken and dropped.
    pub transmits: bool,
    pub kick: KickWay,
    pub call: Option<Notify>,
    pub err: Option<Notify>,
    pub log: Option<LogTo>,
    /// Its area of the in-flight region, and for how many entries that is.
    pub area: Option<(Place, u16)>,
}

/// A ring that the device holds.
#[derive(Debug)]
pub struct Live {
    pub setup: Setup,
    pub mem: Mem,
    spot: Option<Spot>,
    next_avail: u16,
    seen_avail: u16,
    next_used: u16,
    told_used: u16,
    armed: bool,
    /// The driver broke a rule: nothing more is taken from this ring.
    retired: bool,
    /// The same for the queue: stays when the memory changes.
    pub broken: bool,
    call_due: bool,
    pub held: Vec<Taken>,
    pub posted: VecDeque<Change>,
    pub next_mem: Option<Mem>,
    pub processing: bool,
    pub(super) notes: Option<Notes>,
    /// What an earlier process held is served, and nothing else.
    recovering: bool,
    /// Signals since the last check.
    pub signals: Vec<Notify>,
}

const INDIRECT_DESC: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;

fn locate(setup: &Setup, mem: &Mem) -> Result<Spot, NoStart> {
    let size = u64::from(setup.size);
    let lengths = [16 * size, 6 + 2 * size, 6 + 8 * size];
    let mut at = [0; 3];
    for ((at, user), length) in at.iter_mut().zip(setup.user).zip(lengths) {
        *at = user_to_guest(mem, user, length).ok_or_else(|| {
            let partly = user_to_guest(mem, user, 1).is_some();
            if partly { NoStart::Wrong } else { NoStart::Absent }
        })?;
    }
    let mut places = [(0, 0); 3];
    for (part, (place, align)) in places.iter_mut().zip([16, 2, 4]).enumerate() {
        let found = find(mem, at[part], lengths[part]).ok_or(NoStart::Wrong)?;
        if !at[part].is_multiple_of(align) || !(found.1 as u64).is_multiple_of(align) {
            return Err(NoStart::Wrong);
        }
        *place = found;
    }
    Ok(Spot { desc: places[0], avail: places[1], used: places[2] })
}

fn after((file, at): Place, bytes: usize) -> Place {
    (file, at + bytes)
}

impl Live {
    pub fn start(setup: Setup, mem: Mem, guest: &mut Guest) -> Result<Self, NoStart> {
        let spot = locate(&setup, &mem)?;
        let base = setup.base;
        let mut live = Self {
            setup,
            mem,
            spot: None,
            next_avail: base,
            seen_avail: base,
            next_used: 0,
            told_used: 0,
            armed: true,
            retired: false,
            broken: false,
            call_due: true,
            held: Vec::new(),
            posted: VecDeque::new(),
            next_mem: None,
            processing: false,
            notes: None,
            recovering: false,
            signals: Vec::new(),
        };
        live.settle_at(spot, guest)?;
        if live.setup.area.is_some() {
            // A process that was killed may have shown answers and not have called.
            live.signals.extend(live.setup.call);
        }
        Ok(live)
    }

    fn settle_at(&mut self, spot: Spot, guest: &mut Guest) -> Result<(), NoStart> {
        let used = guest.u16(after(spot.used, 2));
        self.notes = None;
        if let Some(area) = self.setup.area {
            let (notes, fresh) = Notes::start(area, self.setup.size, used, guest)?;
            if !fresh {
                self.next_avail = used.wrapping_add(notes.owed.len() as u16);
            }
            self.recovering = !notes.owed.is_empty();
            self.notes = Some(notes);
        } else {
            self.recovering = false;
        }
        self.spot = Some(spot);
        (self.seen_avail, self.next_used, self.told_used) = (self.next_avail, used, used);
        (self.armed, self.retired, self.call_due) = (true, false, true);
        Ok(())
    }

    /// Its requests are looked at twice.
    fn is_tracked(&self) -> bool {
        self.setup.log.is_some() || self.notes.is_some()
    }

    pub(super) fn is_retired(&self) -> bool {
        self.retired
    }

    /// What was seen and not taken is looked at again.
    pub(super) fn look_at_index_again(&mut self) {
        if !self.retired {
            self.seen_avail = self.next_avail;
        }
    }

    /// The used index, if the ring is there and it is the one that was written last.
    pub(super) fn used_index(&self, guest: &Guest) -> Option<u16> {
        let used = guest.u16(after(self.spot?.used, 2));
        (used == self.told_used).then_some(used)
    }

    /// The ranges that a request of this head would write, as its descriptors are now.
    pub(super) fn ranges_of(&self, head: u16, guest: &Guest) -> Vec<(u64, u64)> {
        let walked = if self.retired { Err(()) } else { self.walk(head, guest) };
        match walked {
            Ok(taken) => taken.note,
            // Nothing is known: all of memory.
            Err(()) => self.mem.iter().map(|reg| (reg.guest, reg.size)).collect(),
        }
    }

    fn has(&self, feature: u64) -> bool {
        self.setup.features & feature != 0
    }

    pub fn base(&self) -> u16 {
        self.next_avail
    }

    pub fn is_parked(&self) -> bool {
        self.spot.is_none()
    }

    fn looks(&self) -> bool {
        !self.recovering && self.may_look()
    }

    fn may_look(&self) -> bool {
        !self.broken && self.next_mem.is_none() && (self.setup.enabled || self.setup.transmits)
    }

    fn has_requests(&self, guest: &Guest) -> bool {
        self.looks()
            && !self.retired
            && self.spot.is_some_and(|spot| {
                self.next_avail != self.seen_avail
                    || guest.u16(after(spot.avail, 2)) != self.next_avail
            })
    }

    /// The next request of an enabled ring; those of a disabled one that transmits are dropped.
    pub fn pop(&mut self, guest: &mut Guest) -> Option<Taken> {
        if !self.may_look() {
            return None;
        }
        loop {
            let spot = self.spot?;
            let next = if self.recovering {
                match self.next_owed(guest) {
                    Ok(None) if self.held.is_empty() => {
                        self.recovering = false;
                        continue;
                    }
                    owed => owed,
                }
            } else {
                self.next(spot, guest)
            };
            match next {
                Ok(Some(taken)) if self.setup.enabled => return Some(taken),
                Ok(Some(taken)) => self.put_used(guest, &taken, 0),
                Ok(None) => return None,
                Err(()) => {
                    (self.retired, self.broken) = (true, true);
                    self.seen_avail = self.next_avail;
                    self.signals.extend(self.setup.err);
                    return None;
                }
            }
        }
    }

    fn next(&mut self, spot: Spot, guest: &mut Guest) -> Result<Option<Taken>, ()> {
        if self.retired {
            return Ok(None);
        }
        if self.next_avail == self.seen_avail {
            let avail = guest.u16(after(spot.avail, 2));
            if avail == self.next_avail {
                return Ok(None);
            }
            if avail.wrapping_sub(self.next_avail) > self.setup.size {
                return Err(());
            }
            self.seen_avail = avail;
        }
        let slot = usize::from(self.next_avail % self.setup.size);
        let head = guest.u16(after(spot.avail, 4 + 2 * slot));
        let in_flight = self.held.iter().any(|taken| taken.head == head);
        if head >= self.setup.size || in_flight {
            return Err(());
        }
        let taken = self.walk(head, guest)?;
        self.next_avail = self.next_avail.wrapping_add(1);
        self.mark_ranges(guest, &taken.note);
        if let Some(notes) = &mut self.notes {
            notes.taken(guest, head);
        }
        if self.is_tracked() {
            self.seen_avail = self.next_avail;
        }
        Ok(Some(taken))
    }

    pub(super) fn walk(&self, head: u16, guest: &Guest) -> Result<Taken, ()> {
        let spot = self.spot.ok_or(())?;
        let size = self.setup.size;
        let mut table = guest.read(spot.desc, 16 * usize::from(size)).to_vec();
        let mut taken =
            Taken { head, readable: Vec::new(), writable: Vec::new(), note: Vec::new(), filled: 0 };
        let (mut at, mut inside, mut turned, mut steps, mut bytes) = (head, false, false, 0, 0u64);
        loop {
            let entry = table.get(16 * usize::from(at)..16 * (usize::from(at) + 1)).ok_or(())?;
            let addr = u64::from_le_bytes(entry[..8].try_into().map_err(drop)?);
            let len = u32::from_le_bytes(entry[8..12].try_into().map_err(drop)?);
            let flags = u16::from_le_bytes([entry[12], entry[13]]);
            let next = u16::from_le_bytes([entry[14], entry[15]]);
            if flags & 4 != 0 {
                let whole = len.is_multiple_of(16) && (1..=u32::from(size)).contains(&(len / 16));
                if inside || !self.has(INDIRECT_DESC) || flags & 1 != 0 || !whole {
                    return Err(());
                }
                let parts = parts(&self.mem, addr, len.into()).ok_or(())?;
                table = parts.iter().flat_map(|(at, len)| guest.read(*at, *len).to_vec()).collect();
                (inside, at) = (true, 0);
                continue;
            }
            let writable = flags & 2 != 0;
            if turned && !writable {
                return Err(());
            }
            turned |= writable;
            steps += 1;
            if steps > size {
                return Err(());
            }
            bytes += u64::from(len);
            let parts = parts(&self.mem, addr, len.into()).ok_or(())?;
            if writable { &mut taken.writable } else { &mut taken.readable }.extend(parts);
            if writable {
                taken.note.push((addr, len.into()));
            }
            if flags & 1 == 0 {
                break;
            }
            at = next;
        }
        if bytes > 1 << 32 { Err(()) } else { Ok(taken) }
    }

    /// A finished request goes into the used ring; the index moves when it is published.
    pub fn put_used(&mut self, guest: &mut Guest, taken: &Taken, written: u32) {
        let Some(spot) = self.spot else { return };
        let head = taken.head;
        self.mark_ranges(guest, &taken.note);
        self.mark_element(guest, self.next_used);
        if let Some(notes) = &mut self.notes {
            notes.completed(guest, head);
        }
        let slot = usize::from(self.next_used % self.setup.size);
        let mut element = u32::from(head).to_le_bytes().to_vec();
        element.extend(written.to_le_bytes());
        guest.write(after(spot.used, 4 + 8 * slot), &element);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// The driver sees what was finished, and is called if it asked for that.
    pub fn publish(&mut self, guest: &mut Guest) {
        let Some(spot) = self.spot else { return };
        let (old, new) = (self.told_used, self.next_used);
        if old == new {
            return;
        }
        guest.put_u16(after(spot.used, 2), new);
        self.told_used = new;
        if let Some(notes) = &mut self.notes {
            guest.tear(|guest| notes.published(guest, new));
        }
        self.mark_batch(guest, old, new);
        self.tell_log();
        let size = usize::from(self.setup.size);
        let wanted = if self.has(EVENT_IDX) {
            let event = guest.u16(after(spot.avail, 4 + 2 * size));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            guest.u16(spot.avail) & 1 == 0
        };
        // The first one after a start calls whatever the driver asked for: its wish may be old.
        if wanted || std::mem::take(&mut self.call_due) {
            self.signals.extend(self.setup.call);
        }
        self.call_due = false;
    }

    /// The device asks for a kick; whether there is work after all.
    pub fn arm(&mut self, guest: &mut Guest) -> bool {
        let Some(spot) = self.spot else { return false };
        if !self.looks() || self.retired {
            return false;
        }
        self.armed = true;
        self.wish(spot, guest, self.next_avail, 0);
        guest.u16(after(spot.avail, 2)) != self.next_avail
    }

    /// The device wants no kicks.
    pub fn disarm(&mut self, guest: &mut Guest) {
        let Some(spot) = self.spot else { return };
        if self.armed && !self.retired {
            self.armed = false;
            self.wish(spot, guest, self.next_avail.wrapping_sub(1), 1);
        }
    }

    fn wish(&self, spot: Spot, guest: &mut Guest, event: u16, flags: u16) {
        self.mark_wish(guest, self.has(EVENT_IDX));
        if self.has(EVENT_IDX) {
            guest.put_u16(after(spot.used, 4 + 8 * usize::from(self.setup.size)), event);
        } else {
            guest.put_u16(spot.used, flags);
        }
    }

    /// The queue looks into its mailbox.
    pub fn poll_control(&mut self, guest: &mut Guest) {
        while self.next_mem.is_none() {
            let Some(change) = self.posted.pop_front() else { break };
            match change {
                Change::Call(call) => {
                    self.setup.call = call;
                    // One call too many is harmless, one too few hangs the guest.
                    self.signals.extend(call);
                }
                Change::Err(err) => self.setup.err = err,
                Change::Kick(kick) => self.setup.kick = kick,
                Change::Enable(enabled) => self.setup.enabled = enabled,
                Change::Memory(mem, drain) if drain || self.spot.is_none() => {
                    self.next_mem = Some(mem);
                }
                Change::Memory(mem, _) => self.mem = mem,
                Change::Process => self.processing = true,
                Change::Log(log) => self.set_log(log, guest),
            }
            self.settle(guest);
        }
        self.settle(guest);
        let owes = self.notes.as_ref().is_some_and(|notes| !notes.owed.is_empty());
        self.recovering &= owes || !self.held.is_empty();
    }

    fn settle(&mut self, guest: &mut Guest) {
        if !self.held.is_empty() {
            return;
        }
        let Some(mem) = self.next_mem.take() else { return };
        self.publish(guest);
        (self.spot, self.notes) = (None, None);
        self.mem = mem;
        if let Ok(spot) = locate(&self.setup, &self.mem) {
            // A region that makes no sense by now: the ring waits for memory once more.
            let _ = self.settle_at(spot, guest);
        }
    }

    /// In-band kicks are answered once nothing is in flight and nothing waits.
    pub fn processed(&mut self, guest: &Guest) {
        let recovers = self.recovering && self.may_look();
        if self.held.is_empty() && !recovers && !self.has_requests(guest) {
            self.processing = false;
        }
    }

    /// Whether a change still waits for this ring.
    pub fn owes(&self) -> bool {
        !self.posted.is_empty() || self.next_mem.is_some() || self.processing
    }
}
