//! Copies between guest memory and this process, each guest byte touched once.
//!
//! The guest may write at any time, so a value must not be read twice: a compiler is free to repeat a plain load,
//! never a volatile one. Short copies are volatile word by word; long ones are `memcpy` with a compiler fence behind
//! it, which keeps the optimiser from reading the source again in place of the copy.
#![expect(unsafe_code, reason = "raw copies are what this module is for")]

use std::ptr;
use std::sync::atomic::{Ordering, compiler_fence};

/// Longest copy done word by word.
const SHORT: usize = 64;

/// A word at any address.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned<T>(T);

/// Copies `len` bytes of guest memory at `from` to `to`.
///
/// # Safety
/// `from` is readable for `len` bytes inside a live mapping; `to` is writable for `len` bytes and is no guest memory.
#[inline(always)]
pub(crate) unsafe fn copy_in(from: *const u8, to: *mut u8, len: usize) {
    if len > SHORT {
        // SAFETY: both are valid for `len` bytes; guest memory and our own memory are different mappings.
        unsafe { ptr::copy_nonoverlapping(from, to, len) };
        compiler_fence(Ordering::SeqCst);
        return;
    }
    words(len, |at, size| match size {
        // SAFETY: `words` stays below `len`; so do the other three.
        8 => unsafe { word_in::<u64>(from, to, at) },
        // SAFETY: as above.
        4 => unsafe { word_in::<u32>(from, to, at) },
        // SAFETY: as above.
        2 => unsafe { word_in::<u16>(from, to, at) },
        // SAFETY: as above.
        _ => unsafe { word_in::<u8>(from, to, at) },
    });
}

/// Copies `len` bytes at `from` into guest memory at `to`.
///
/// # Safety
/// `from` is readable for `len` bytes and is no guest memory; `to` is writable for `len` bytes inside a live mapping.
#[inline(always)]
pub(crate) unsafe fn copy_out(from: *const u8, to: *mut u8, len: usize) {
    if len > SHORT {
        compiler_fence(Ordering::SeqCst);
        // SAFETY: both are valid for `len` bytes; guest memory and our own memory are different mappings.
        unsafe { ptr::copy_nonoverlapping(from, to, len) };
        compiler_fence(Ordering::SeqCst);
        return;
    }
    words(len, |at, size| match size {
        // SAFETY: `words` stays below `len`; so do the other three.
        8 => unsafe { word_out::<u64>(from, to, at) },
        // SAFETY: as above.
        4 => unsafe { word_out::<u32>(from, to, at) },
        // SAFETY: as above.
        2 => unsafe { word_out::<u16>(from, to, at) },
        // SAFETY: as above.
        _ => unsafe { byte_out(from, to, at) },
    });
}

/// Copies `len` bytes from one shared mapping to another, each touched once by a `memcpy`.
///
/// # Safety
/// `from` is readable and `to` writable for `len` bytes, in live mappings whose addresses do not overlap.
#[inline(always)]
pub(crate) unsafe fn across(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller's promise.
    unsafe { ptr::copy_nonoverlapping(from, to, len) };
    compiler_fence(Ordering::SeqCst);
}

/// Writes `len` zero bytes into guest memory at `to`.
///
/// # Safety
/// `to` is writable for `len` bytes inside a live mapping.
#[inline]
pub(crate) unsafe fn zero(to: *mut u8, len: usize) {
    // SAFETY: the caller's promise.
    unsafe { ptr::write_bytes(to, 0, len) };
    compiler_fence(Ordering::SeqCst);
}

/// Cuts `len` bytes into words of eight bytes, then four, two and one: calls `with` with the offset and the size of
/// each, so that offset plus size is at most `len`.
#[inline(always)]
fn words(len: usize, mut with: impl FnMut(usize, usize)) {
    let mut done = 0;
    while len - done >= 8 {
        with(done, 8);
        done += 8;
    }
    for size in [4, 2, 1] {
        if len & size != 0 {
            with(done, size);
            done += size;
        }
    }
}

/// One word of guest memory from `from + at` to `to + at`.
///
/// # Safety
/// Both are valid for `at + size_of::<T>()` bytes.
#[inline(always)]
unsafe fn word_in<T: Copy>(from: *const u8, to: *mut u8, at: usize) {
    // SAFETY: valid by the caller's promise; the packed type has alignment 1.
    let value = unsafe { ptr::read_volatile(from.wrapping_add(at).cast::<Unaligned<T>>()) };
    // SAFETY: likewise.
    unsafe { ptr::write(to.wrapping_add(at).cast::<Unaligned<T>>(), value) };
}

/// One word from `from + at` to guest memory at `to + at`.
///
/// # Safety
/// Both are valid for `at + size_of::<T>()` bytes.
#[inline(always)]
unsafe fn word_out<T: Copy>(from: *const u8, to: *mut u8, at: usize) {
    // SAFETY: valid by the caller's promise; the packed type has alignment 1.
    let value = unsafe { ptr::read(from.wrapping_add(at).cast::<Unaligned<T>>()) };
    // SAFETY: likewise.
    unsafe { ptr::write_volatile(to.wrapping_add(at).cast::<Unaligned<T>>(), value) };
}

/// One byte from `from + at` to guest memory at `to + at`. (By way of `Unaligned` it would go over the stack.)
///
/// # Safety
/// Both are valid for `at + 1` bytes.
#[inline(always)]
unsafe fn byte_out(from: *const u8, to: *mut u8, at: usize) {
    // SAFETY: valid by the caller's promise.
    let value = unsafe { ptr::read(from.wrapping_add(at)) };
    // SAFETY: likewise.
    unsafe { ptr::write_volatile(to.wrapping_add(at), value) };
}

/// A number of guest memory at any address.
///
/// # Safety
/// `from` is readable for the size of `T` inside a live mapping; any bytes are a `T`.
#[inline(always)]
pub(crate) unsafe fn read<T: Copy>(from: *const T) -> T {
    // SAFETY: the caller's promise; alignment 1.
    unsafe { ptr::read_volatile(from.cast::<Unaligned<T>>()) }.0
}

/// Writes two 64-bit words into guest memory at any address.
///
/// # Safety
/// `to` is writable for 16 bytes inside a live mapping.
#[cfg(not(outboard_loom))]
#[inline(always)]
pub(crate) unsafe fn write_pair(to: *mut u8, first: u64, second: u64) {
    let to = to.cast::<Unaligned<u64>>();
    // SAFETY: the caller's promise; alignment 1.
    unsafe { ptr::write_volatile(to, Unaligned(first)) };
    // SAFETY: likewise, the second eight bytes.
    unsafe { ptr::write_volatile(to.wrapping_add(1), Unaligned(second)) };
}
