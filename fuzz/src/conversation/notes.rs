//! The model's in-flight region of split rings (vhost-user, "Inflight I/O tracking"): what a ring
//! notes there and what a ring that starts makes of it.

use super::guest::{FILE, Guest, NOTES, Place};
use super::model::{Given, MAX_SIZE, Model, Msg, No, QUEUES, Ring, Then, half, word};
use super::ring::{Live, NoStart, Taken};
use crate::cover::reached;

const HEAD: usize = 16;
const ENTRY: usize = 16;

/// Bytes of a ring's area.
const fn area(entries: u16) -> u64 {
    (16 * entries as u64 + 16).next_multiple_of(64)
}

/// A region as the front-end gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    file: usize,
    offset: u64,
    rings: u16,
    entries: u16,
}

impl Region {
    /// The area of a ring, and of how many entries it is.
    pub fn area(&self, ring: usize) -> Option<(Place, u16)> {
        let inside = ring < usize::from(self.rings);
        let start = self.offset + ring as u64 * area(self.entries);
        inside.then_some(((self.file, start as usize), self.entries))
    }
}

/// What a ring keeps beside its area.
#[derive(Clone, Debug)]
pub struct Notes {
    at: Place,
    counter: u64,
    last: u16,
    /// Finished, and the used index does not cover it.
    batch: Vec<u16>,
    /// What the used index covered when it was stored last.
    shown: Vec<u16>,
    /// What an earlier process held, the oldest first.
    pub owed: Vec<u16>,
    /// The driver offered a head again that was not used yet: one flag stands for two requests.
    reused: bool,
}

impl Notes {
    fn field(&self, offset: usize) -> Place {
        (self.at.0, self.at.1 + offset)
    }

    fn entry(&self, head: u16, offset: usize) -> Place {
        self.field(HEAD + ENTRY * usize::from(head) + offset)
    }

    fn flag(&self, guest: &mut Guest, head: u16, flag: u8) {
        guest.write(self.entry(head, 0), &[flag]);
    }

    /// Begins with an area, or goes on with it. Nothing is written when it is none.
    pub fn start(
        (at, entries): (Place, u16),
        size: u16,
        used: u16,
        guest: &mut Guest,
    ) -> Result<(Self, bool), NoStart> {
        let mut notes = Self {
            at,
            counter: 0,
            last: 0,
            batch: Vec::new(),
            shown: Vec::new(),
            owed: Vec::new(),
            reused: false,
        };
        if entries < size {
            return Err(NoStart::Wrong);
        }
        if guest.u16(notes.field(8)) == 0 {
            (0..size).for_each(|head| notes.flag(guest, head, 0));
            guest.write(notes.field(0), &[0; 8]);
            guest.put_u16(notes.field(10), entries);
            guest.put_u16(notes.field(12), 0);
            guest.put_u16(notes.field(14), used);
            guest.put_u16(notes.field(8), 1);
            reached("conversation region fresh".into());
            return Ok((notes, true));
        }
        let head =
            (guest.u16(notes.field(8)), guest.u64(notes.field(0)), guest.u16(notes.field(10)));
        if head != (1, 0, entries) {
            return Err(NoStart::Wrong);
        }
        let is_set = |head: &u16| guest.read(notes.entry(*head, 0), 1) != [0];
        let mut held: Vec<u16> = (0..size).filter(is_set).collect();
        let last = guest.u16(notes.field(12));
        notes.last = if last < size { last } else { 0 };
        if !held.is_empty() {
            let shown = used.wrapping_sub(guest.u16(notes.field(14)));
            for head in notes.shown(shown, size, guest).ok_or(NoStart::Wrong)? {
                reached("conversation batch of a killed process was shown".into());
                notes.flag(guest, head, 0);
                held.retain(|other| *other != head);
            }
        }
        guest.put_u16(notes.field(14), used);
        held.sort_by_key(|head| (guest.u64(notes.entry(*head, 8)), *head));
        if let Some(newest) = held.last() {
            notes.counter = guest.u64(notes.entry(*newest, 8)).wrapping_add(1);
            reached("conversation ring owes requests".into());
        }
        notes.owed = held;
        Ok((notes, false))
    }

    /// The first `count` of the list.
    fn shown(&self, count: u16, size: u16, guest: &Guest) -> Option<Vec<u16>> {
        let (mut all, mut head) = (Vec::new(), guest.u16(self.field(12)));
        if count > size {
            return None;
        }
        for _ in 0..count {
            if head >= size || all.contains(&head) {
                return None;
            }
            all.push(head);
            head = guest.u16(self.entry(head, 6));
        }
        Some(all)
    }

    pub fn taken(&mut self, guest: &mut Guest, head: u16) {
        guest.write(self.entry(head, 8), &self.counter.to_le_bytes());
        self.counter = self.counter.wrapping_add(1);
        self.reused |= guest.read(self.entry(head, 0), 1) != [0];
        self.flag(guest, head, 1);
    }

    pub fn completed(&mut self, guest: &mut Guest, head: u16) {
        guest.put_u16(self.entry(head, 6), self.last);
        guest.put_u16(self.field(12), head);
        self.last = head;
        self.batch.push(head);
    }

    pub fn published(&mut self, guest: &mut Guest, used: u16) {
        self.shown = std::mem::take(&mut self.batch);
        for head in &self.shown {
            self.flag(guest, *head, 0);
        }
        guest.put_u16(self.field(14), used);
    }
}

impl Live {
    /// Killed now, or in the middle of showing answers (`torn`), and the region given to another
    /// process: it owes what this one held. Unless the driver offered a head again that was not
    /// used yet: of such a ring nothing is promised.
    pub fn check_killed(&self, region: Region, ring: usize, torn: bool, guest: &mut Guest) {
        let (Some(notes), Some(area)) = (&self.notes, region.area(ring)) else { return };
        if guest.scribbled || notes.reused || region.file != NOTES {
            return;
        }
        let mut held: Vec<u16> = self.held.iter().map(|taken| taken.head).collect();
        held.extend(&notes.batch);
        held.extend(&notes.owed);
        held.sort_unstable();
        let shown = if torn { &notes.shown[..] } else { &[] };
        let mut all = [&held[..], shown].concat();
        all.sort_unstable();
        let twice = all.windows(2).any(|pair| pair[0] == pair[1]);
        let Some(used) = self.used_index(guest).filter(|_| !twice) else { return };
        let picture = guest.picture();
        let (next, _) = Notes::start(area, self.setup.size, used, guest).expect("our own region");
        guest.put_back(picture);
        let mut owed = next.owed;
        owed.sort_unstable();
        assert_eq!(owed, held, "what a process that follows a killed one owes on ring {ring}");
        if !owed.is_empty() {
            reached("conversation killed with requests in flight".into());
        }
    }

    /// The next request that an earlier process held.
    pub(super) fn next_owed(&mut self, guest: &mut Guest) -> Result<Option<Taken>, ()> {
        let Some(head) = self.notes.as_ref().and_then(|notes| notes.owed.first().copied()) else {
            return Ok(None);
        };
        let taken = self.walk(head, guest)?;
        if let Some(notes) = &mut self.notes {
            notes.owed.remove(0);
        }
        self.mark_ranges(guest, &taken.note);
        reached("conversation request of a killed process".into());
        Ok(Some(taken))
    }
}

impl Ring {
    /// Whether it has a place in the region.
    pub(super) fn has_place(&self, ring: usize, region: Option<Region>) -> bool {
        let Some(area) = region.and_then(|region| region.area(ring)) else { return true };
        self.size.unwrap_or(0) <= area.1
    }
}

impl Model {
    /// GET_INFLIGHT_FD and what both messages say.
    fn region(&self, msg: &Msg) -> Result<(u64, u64, u16, u16), No> {
        let p = &msg.payload;
        let (rings, entries) = (half(p, 16) as u16, (half(p, 16) >> 16) as u16);
        let sound =
            (1..=QUEUES as u16).contains(&rings) && (1..=MAX_SIZE as u16).contains(&entries);
        if !sound || !self.live().is_empty() {
            return Err(No);
        }
        Ok((word(p, 0), word(p, 8), rings, entries))
    }

    /// GET_INFLIGHT_FD: a file for so many rings, all zero.
    pub(super) fn new_region(&mut self, msg: &Msg) -> Result<Vec<u8>, No> {
        let (_, _, rings, entries) = self.region(msg)?;
        let size = u64::from(rings) * area(entries);
        self.files.push(size);
        let mut reply = size.to_le_bytes().to_vec();
        reply.extend([0; 8]);
        reply.extend(rings.to_le_bytes());
        reply.extend(entries.to_le_bytes());
        reply.extend([0; 4]);
        Ok(reply)
    }

    /// SET_INFLIGHT_FD: for the rings that start from now on.
    pub(super) fn set_region(&mut self, msg: &Msg) -> Result<Then, No> {
        let (size, offset, rings, entries) = self.region(msg)?;
        let end = offset.checked_add(size).ok_or(No)?;
        let Some(&Given::File(file)) = msg.fds.first() else { return Err(No) };
        let room = size >= u64::from(rings) * area(entries);
        if !room || !offset.is_multiple_of(8) || end > FILE as u64 {
            return Err(No);
        }
        let region = Some(Region { file, offset, rings, entries });
        if !self.rings.iter().enumerate().all(|(at, ring)| ring.has_place(at, region)) {
            return Err(No);
        }
        self.inflight = region;
        Ok(Then::Nothing)
    }
}
