//! Memory of our own that the kernel reads into for a request that may be left behind: what arrives afterwards must not
//! reach guest memory, and an operation of a disk that does not answer cannot be recalled.
//!
//! Invariant: the buffers of one loop are bounded; where none is to be had the kernel reads into guest memory, and the
//! ring waits for it.

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Bytes of the largest read into one; a longer one moves in parts.
const LARGEST: usize = 1 << 20;
/// Pages of all buffers of a loop: 64 MiB.
const MOST_PAGES: usize = 16 << 10;
const PAGE: usize = 4096;

/// Memory that suits every disk's O_DIRECT.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

/// A buffer that an operation has.
pub(super) struct Landing {
    pages: Vec<Page>,
    length: usize,
}

impl Landing {
    /// The bytes to be filled.
    pub(super) fn room(&mut self) -> &mut [u8] {
        let bytes = self.pages.as_mut_slice().as_mut_bytes();
        bytes.get_mut(..self.length).unwrap_or_default()
    }

    /// The first `count` bytes, or what there is of them.
    pub(super) fn filled(&self, count: usize) -> &[u8] {
        let bytes = self.pages.as_slice().as_bytes();
        bytes.get(..count.min(self.length)).unwrap_or_default()
    }
}

impl std::fmt::Debug for Landing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Landing").field("length", &self.length).finish_non_exhaustive()
    }
}

/// The buffers of a loop.
#[derive(Default)]
pub(super) struct Landings {
    free: Vec<Vec<Page>>,
    /// Of all of them.
    pages: usize,
}

impl Landings {
    /// A buffer for a read of `length` bytes, or for the front of it.
    pub(super) fn take(&mut self, length: u64) -> Option<Landing> {
        let length = usize::try_from(length).map_or(LARGEST, |length| length.min(LARGEST));
        let need = length.div_ceil(PAGE);
        if length == 0 {
            return None;
        }
        if let Some(at) = self.free.iter().rposition(|pages| pages.len() >= need) {
            return Some(Landing { pages: self.free.swap_remove(at), length });
        }
        if self.pages + need > MOST_PAGES {
            for pages in self.free.drain(..) {
                self.pages -= pages.len();
            }
        }
        if self.pages + need > MOST_PAGES {
            return None;
        }
        self.pages += need;
        Some(Landing { pages: vec![Page::new_zeroed(); need], length })
    }

    /// The operation has ended.
    pub(super) fn give_back(&mut self, landing: Landing) {
        self.free.push(landing.pages);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_used_again_and_bounded() {
        let mut landings = Landings::default();
        let first = landings.take(4097).unwrap();
        assert_eq!(first.pages.len(), 2);
        assert_eq!(first.pages.as_ptr().addr() % PAGE, 0);
        landings.give_back(first);
        let mut again = landings.take(512).unwrap();
        assert_eq!((again.room().len(), landings.pages), (512, 2));
        again.room().fill(7);
        assert_eq!((again.filled(3), again.filled(9999).len()), (&[7; 3][..], 512));
        landings.give_back(again);
        assert!(landings.take(0).is_none());
        let all: Vec<_> = std::iter::from_fn(|| landings.take(u64::MAX)).collect();
        assert_eq!((all.len(), all[0].length), (64, LARGEST), "what was free has made room");
        assert!(landings.take(1).is_none());
        all.into_iter().for_each(|landing| landings.give_back(landing));
        assert!(landings.take(1).is_some());
    }
}
