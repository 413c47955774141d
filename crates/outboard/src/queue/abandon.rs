//! Stopping a ring without finishing what it holds (vhost-user, GET_VRING_BASE_SKIP_DRAIN): requests under way stay
//! noted in the in-flight region, for whoever serves the ring next.
//!
//! Invariant: after the queue has been given up nothing of it reaches guest memory: no data, no used element, no
//! call. What was finished before is shown first.

use outboard_queue::Chain;

use super::Queue;

impl Queue {
    /// Whether requests may be left behind: somebody will know of them.
    pub(crate) fn can_abandon(&self) -> bool {
        let area = self.setup.inflight.as_ref().filter(|_| self.setup.abandonable);
        area.is_some_and(|area| !area.is_poisoned())
    }

    /// Whether another process may serve these requests again.
    #[inline]
    pub(crate) fn is_tracked(&self) -> bool {
        self.setup.inflight.is_some()
    }

    /// Whether the requests that are served now were taken by an earlier process.
    #[inline]
    pub(crate) fn is_recovering(&self) -> bool {
        self.recovering
    }

    /// Whether requests may be left behind while the kernel still reads for them.
    #[inline]
    pub(crate) fn is_abandonable(&self) -> bool {
        self.setup.abandonable
    }

    /// Sets a request aside.
    pub(crate) fn hold(&mut self, token: u64, chain: Chain) {
        self.held.push((token, chain));
    }

    /// A request that was set aside.
    pub(crate) fn held(&mut self, token: u64) -> Option<Chain> {
        let at = self.held.iter().position(|(other, _)| *other == token)?;
        Some(self.held.swap_remove(at).1)
    }

    /// All that were set aside.
    pub(crate) fn take_held(&mut self) -> Vec<(u64, Chain)> {
        std::mem::take(&mut self.held)
    }

    /// Shows what is finished and shuts out who still has a request elsewhere. True once nobody is in guest memory
    /// with one; the mailbox wakes when that may have become so.
    pub(crate) fn abandon(&mut self) -> bool {
        for (chain, written) in self.mailbox.shut() {
            self.complete(chain, written);
        }
        self.publish();
        self.mailbox.is_empty()
    }
}
