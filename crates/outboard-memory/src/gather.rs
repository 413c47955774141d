//! The descriptors of a request, read one after the other, and their buffers, translated into pieces.
//!
//! This is the careful way, which takes any request; the usual request is gathered by
//! [`View::gather_usual`](crate::View::gather_usual).

use crate::buffers::{Buffers, MOST_PIECES, Segment, Span};
use crate::cells::Descriptor;
use crate::error::AccessError;
use crate::iotlb::Permission;
use crate::table::Table;
use crate::view::View;

/// Fills [`Buffers`] from the descriptors of a request: first what is readable, then, after [`turn`](Self::turn), what
/// is writable. What the buffers hold is of no use before [`finish`](Self::finish).
pub struct Gather<'a> {
    view: &'a View,
    to: &'a mut Buffers,
    table: Table<'a>,
    bytes: u64,
    /// What the device does with what is pushed now.
    access: Permission,
}

impl<'a> Gather<'a> {
    pub(crate) fn new(view: &'a View, table: Table<'a>, to: &'a mut Buffers) -> Self {
        to.recycle(view);
        to.room = 0;
        (to.readable, to.writable, to.tail) = Default::default();
        to.list.clear();
        Self { view, to, table, bytes: 0, access: Permission::READ }
    }

    /// Descriptor `at` of the present table, each of its bytes read once; `None` past the end.
    pub fn descriptor(&self, at: u16) -> Option<Descriptor> {
        self.table.get(at)
    }

    /// Goes on in an indirect table of `count` descriptors, at any address.
    ///
    /// # Errors
    /// Some byte of it is in no region.
    pub fn enter(&mut self, guest: u64, count: u16) -> Result<(), AccessError> {
        let len = u64::from(count) * 16;
        self.table = match self.view.find(guest, len, Permission::READ) {
            Ok(host) => Table::new(host, count),
            Err(_) => scattered(self.view, self.to, guest, count)?,
        };
        Ok(())
    }

    /// What follows is writable. Called once at most.
    pub fn turn(&mut self) {
        self.to.readable = Span::new(0, self.to.list.len());
        self.to.room = self.bytes;
        self.access = Permission::WRITE;
    }

    /// Appends a guest range: as one piece, or as several when it crosses regions that are neighbours in guest-physical
    /// space. No piece for a range of length 0.
    ///
    /// # Errors
    /// Some byte is in no region, or the device may not do with it what it is for.
    pub fn push(&mut self, guest: u64, len: u32) -> Result<(), AccessError> {
        let bytes = u64::from(len);
        self.bytes += bytes;
        let list = &mut self.to.list;
        self.view.each_part(guest, bytes, self.access, |base, len| {
            if list.len() >= MOST_PIECES {
                return Err(AccessError::TooManySegments { limit: MOST_PIECES });
            }
            if list.len() == list.capacity() {
                list.try_reserve(1).map_err(|_| AccessError::NoMemory)?;
            }
            list.push(Segment { base, len });
            Ok(())
        })
    }

    /// The buffers are complete; `turned` says whether the writable ones began. Returns the bytes and pieces of all.
    pub fn finish(mut self, turned: bool) -> (u64, usize) {
        if !turned {
            self.turn();
        }
        let used = self.to.list.len();
        self.to.writable = Span::new(self.to.readable.end(), used);
        self.to.room = self.bytes - self.to.room;
        self.to.measure();
        (self.bytes, used)
    }
}

/// A table across regions is read from a copy.
#[cold]
fn scattered<'a>(
    view: &View,
    to: &mut Buffers,
    guest: u64,
    count: u16,
) -> Result<Table<'a>, AccessError> {
    let bytes = usize::from(count) * 16;
    to.scratch.clear();
    to.scratch.try_reserve(bytes).map_err(|_| AccessError::NoMemory)?;
    to.scratch.resize(bytes, 0);
    view.read(guest, &mut to.scratch)?;
    Ok(Table::new(to.scratch.as_mut_ptr(), count))
}
