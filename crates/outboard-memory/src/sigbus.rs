//! SIGBUS turned into an error of the access: a file may be cut short after it was mapped.
//!
//! ```text
//!  access ─▶ hole ─▶ SIGBUS ─▶ handler: which region? ─▶ zero page over the hole, poisoned := true ─▶ access goes on
//!                                        └ none of ours ─▶ the handler that was there before
//! ```
//! The registry of regions is read inside the signal handler: no lock, no allocation. Slots are never freed, only
//! reused; each is a small seqlock, so that a handler that looks at a slot while it changes skips it (the region the
//! faulting thread stands on cannot change: that thread keeps it mapped).
#![expect(unsafe_code, reason = "signal handlers and memory mapping; rustix has no sigaction")]

use std::io;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering, fence};

/// Slots per chunk of the registry.
const CHUNK: usize = 512;

/// Mapped regions whose file was cut short and which are still mapped. The cheap first look of every batch.
static POISONED: AtomicUsize = AtomicUsize::new(0);

static FIRST: Chunk = Chunk::new();

struct Chunk {
    slots: [Slot; CHUNK],
    next: AtomicPtr<Self>,
}

/// One mapped range known to the handler. `version` is odd while the slot changes.
#[derive(Debug)]
pub(crate) struct Slot {
    taken: AtomicBool,
    version: AtomicU32,
    start: AtomicUsize,
    len: AtomicUsize,
    page: AtomicUsize,
    poisoned: AtomicBool,
}

impl Chunk {
    const fn new() -> Self {
        Self { slots: [const { Slot::new() }; CHUNK], next: AtomicPtr::new(ptr::null_mut()) }
    }

    /// The next chunk, if there is one.
    fn following(&self) -> Option<&'static Self> {
        let next = self.next.load(Ordering::Acquire);
        // SAFETY: null, or a chunk leaked by `extend` and never freed.
        unsafe { next.as_ref() }
    }

    /// The next chunk, made if need be.
    fn extend(&self) -> &'static Self {
        if let Some(next) = self.following() {
            return next;
        }
        let fresh = Box::into_raw(Box::new(Self::new()));
        let raced =
            self.next.compare_exchange(ptr::null_mut(), fresh, Ordering::AcqRel, Ordering::Acquire);
        let next = match raced {
            Ok(_) => fresh,
            Err(other) => {
                // SAFETY: `fresh` came from a box a moment ago and was given to nobody.
                drop(unsafe { Box::from_raw(fresh) });
                other
            }
        };
        // SAFETY: chunks in the list are leaked, never freed.
        unsafe { &*next }
    }
}

impl Slot {
    const fn new() -> Self {
        Self {
            taken: AtomicBool::new(false),
            version: AtomicU32::new(0),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            page: AtomicUsize::new(0),
            poisoned: AtomicBool::new(false),
        }
    }

    /// Whether an access hit a hole in this range.
    pub(crate) fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Relaxed)
    }

    fn set(&self, start: usize, len: usize, page: usize) {
        self.version.fetch_add(1, Ordering::AcqRel);
        self.start.store(start, Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        self.page.store(page, Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// The page of this range that holds `address`, as (start, bytes).
    fn page_of(&self, address: usize) -> Option<(usize, usize)> {
        let before = self.version.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Relaxed);
        let len = self.len.load(Ordering::Relaxed);
        let page = self.page.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let after = self.version.load(Ordering::Relaxed);
        if before != after || before % 2 == 1 || address.wrapping_sub(start) >= len {
            return None;
        }
        Some((address & !(page - 1), page))
    }

    pub(crate) fn poison(&self) {
        if !self.poisoned.swap(true, Ordering::Relaxed) {
            POISONED.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Whether any region mapped at present is poisoned: false says that none is.
#[inline(always)]
pub(crate) fn any_poisoned() -> bool {
    POISONED.load(Ordering::Relaxed) != 0
}

/// Makes a mapping known to the handler; `start` and `len` are multiples of `page`, a power of two.
pub(crate) fn register(start: usize, len: usize, page: usize) -> &'static Slot {
    let mut chunk = &FIRST;
    loop {
        for slot in &chunk.slots {
            if !slot.taken.load(Ordering::Relaxed) && !slot.taken.swap(true, Ordering::Acquire) {
                slot.set(start, len, page);
                return slot;
            }
        }
        chunk = chunk.extend();
    }
}

/// Forgets a mapping. Comes before the unmapping.
pub(crate) fn unregister(slot: &'static Slot) {
    slot.set(0, 0, 1);
    if slot.poisoned.swap(false, Ordering::Relaxed) {
        POISONED.fetch_sub(1, Ordering::Relaxed);
    }
    slot.taken.store(false, Ordering::Release);
}

fn find(address: usize) -> Option<(&'static Slot, usize, usize)> {
    let mut chunk = Some(&FIRST);
    while let Some(here) = chunk {
        for slot in &here.slots {
            if let Some((start, page)) = slot.page_of(address) {
                return Some((slot, start, page));
            }
        }
        chunk = here.following();
    }
    None
}

/// The disposition that was there before ours.
static EARLIER_HANDLER: AtomicUsize = AtomicUsize::new(libc::SIG_DFL);
static EARLIER_HAS_INFO: AtomicBool = AtomicBool::new(false);

/// Installs the SIGBUS handler of this process, once; [`Region::map`](crate::Region::map) calls it too. A handler
/// installed earlier is called for faults that are not in guest memory. A program that installs one later must call
/// the one it replaces.
///
/// # Errors
/// What `sigaction` says.
pub fn install_sigbus_guard() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    (*INSTALLED.get_or_init(|| install().map_err(|e| e.raw_os_error().unwrap_or(libc::EINVAL))))
        .map_err(io::Error::from_raw_os_error)
}

fn install() -> io::Result<()> {
    // SAFETY: all zeros is a valid sigaction: default handler, no flags, empty mask.
    let mut earlier: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: a null new action only reads the present one into `earlier`.
    if unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut earlier) } != 0 {
        return Err(io::Error::last_os_error());
    }
    EARLIER_HANDLER.store(earlier.sa_sigaction, Ordering::Relaxed);
    EARLIER_HAS_INFO.store(earlier.sa_flags & libc::SA_SIGINFO != 0, Ordering::Release);
    let mut ours = earlier;
    ours.sa_sigaction = on_sigbus as *const () as usize;
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `ours` is a full action whose handler is async-signal-safe: it loads atomics and calls mmap.
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const ours, ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

extern "C" fn on_sigbus(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: SA_SIGINFO: the kernel passes a valid siginfo, which nobody changes while the handler runs.
    let fault = unsafe { &*info };
    let code = fault.si_code;
    if code == libc::BUS_ADRERR {
        // SAFETY: a fault (BUS_ADRERR) carries an address.
        let address = unsafe { fault.si_addr() }.addr();
        if mend(address) {
            return;
        }
    }
    pass_on(signal, info, context, code);
}

/// Puts zeros over the hole at `address` when it lies in a region of ours.
fn mend(address: usize) -> bool {
    let Some((slot, start, page)) = find(address) else { return false };
    // Before the page changes: whoever stored into the new one finds the mark.
    slot.poison();
    // SAFETY: always valid; the handler must leave errno as the interrupted code knows it.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: the pointer to this thread's errno is valid for its life.
    let saved = unsafe { *errno };
    let at = ptr::without_provenance_mut(start);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the page lies in a mapping that the faulting thread keeps alive; only raw pointers by-value lead to it,
    // so that its contents may be replaced at any time.
    let put = unsafe { libc::mmap(at, page, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    // SAFETY: as above.
    unsafe { *errno = saved };
    put != libc::MAP_FAILED
}

/// Not ours: what would have happened without us.
fn pass_on(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
    code: libc::c_int,
) {
    let has_info = EARLIER_HAS_INFO.load(Ordering::Acquire);
    let earlier = EARLIER_HANDLER.load(Ordering::Relaxed);
    if earlier == libc::SIG_IGN && code <= 0 {
        return;
    }
    if earlier == libc::SIG_DFL || earlier == libc::SIG_IGN {
        // SAFETY: restores the default action; the fault repeats on return and ends the process, as it should.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        if code <= 0 {
            // SAFETY: sent by a process, so that it does not repeat by itself: raise is async-signal-safe.
            unsafe { libc::raise(signal) };
        }
    } else if has_info {
        type Full = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
        // SAFETY: the kernel told us that this address is a handler with three arguments.
        let handler = unsafe { std::mem::transmute::<usize, Full>(earlier) };
        handler(signal, info, context);
    } else {
        // SAFETY: the kernel told us that this address is a handler with one argument.
        let handler = unsafe { std::mem::transmute::<usize, extern "C" fn(libc::c_int)>(earlier) };
        handler(signal);
    }
}
