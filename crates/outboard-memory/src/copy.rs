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
    if len <= SHORT {
        // SAFETY: the caller's promise is the same.
        unsafe { words(from, to, len) }
    } else {
        // SAFETY: both are valid for `len` bytes; guest memory and our own memory are different mappings.
        unsafe { ptr::copy_nonoverlapping(from, to, len) };
        compiler_fence(Ordering::SeqCst);
    }
}

/// Copies `len` bytes at `from` into guest memory at `to`.
///
/// # Safety
/// `from` is readable for `len` bytes and is no guest memory; `to` is writable for `len` bytes inside a live mapping.
#[inline(always)]
pub(crate) unsafe fn copy_out(from: *const u8, to: *mut u8, len: usize) {
    if len <= SHORT {
        // SAFETY: the caller's promise is the same.
        unsafe { words(from, to, len) }
    } else {
        compiler_fence(Ordering::SeqCst);
        // SAFETY: both are valid for `len` bytes; guest memory and our own memory are different mappings.
        unsafe { ptr::copy_nonoverlapping(from, to, len) };
        compiler_fence(Ordering::SeqCst);
    }
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

/// The short copy: eight bytes at a time, then four, two, one.
///
/// # Safety
/// `from` is readable and `to` writable for `len` bytes.
#[inline(always)]
unsafe fn words(from: *const u8, to: *mut u8, len: usize) {
    let mut done = 0;
    while len - done >= 8 {
        // SAFETY: `done + 8 <= len`.
        unsafe { word::<u64>(from, to, done) };
        done += 8;
    }
    if len & 4 != 0 {
        // SAFETY: `done` is a multiple of 8 and `len - done < 8` has bit 2 set, so `done + 4 <= len`.
        unsafe { word::<u32>(from, to, done) };
        done += 4;
    }
    if len & 2 != 0 {
        // SAFETY: as above, with bit 1.
        unsafe { word::<u16>(from, to, done) };
        done += 2;
    }
    if len & 1 != 0 {
        // SAFETY: as above, with bit 0.
        unsafe { word::<u8>(from, to, done) };
    }
}

/// One word from `from + at` to `to + at`.
///
/// # Safety
/// Both are valid for `at + size_of::<T>()` bytes.
#[inline(always)]
unsafe fn word<T: Copy>(from: *const u8, to: *mut u8, at: usize) {
    let from = from.wrapping_add(at).cast::<Unaligned<T>>();
    let to = to.wrapping_add(at).cast::<Unaligned<T>>();
    // SAFETY: valid by the caller's promise; the packed type has alignment 1.
    let value = unsafe { ptr::read_volatile(from) };
    // SAFETY: likewise.
    unsafe { ptr::write_volatile(to, value) };
}

/// Two 64-bit words of guest memory at any address.
///
/// # Safety
/// `from` is readable for 16 bytes inside a live mapping.
#[inline(always)]
pub(crate) unsafe fn read_pair(from: *const u8) -> (u64, u64) {
    let from = from.cast::<Unaligned<u64>>();
    // SAFETY: the caller's promise; alignment 1.
    let first = unsafe { ptr::read_volatile(from) };
    // SAFETY: likewise, the second eight bytes.
    let second = unsafe { ptr::read_volatile(from.wrapping_add(1)) };
    (first.0, second.0)
}

/// Writes two 64-bit words into guest memory at any address.
///
/// # Safety
/// `to` is writable for 16 bytes inside a live mapping.
#[inline(always)]
pub(crate) unsafe fn write_pair(to: *mut u8, first: u64, second: u64) {
    let to = to.cast::<Unaligned<u64>>();
    // SAFETY: the caller's promise; alignment 1.
    unsafe { ptr::write_volatile(to, Unaligned(first)) };
    // SAFETY: likewise, the second eight bytes.
    unsafe { ptr::write_volatile(to.wrapping_add(1), Unaligned(second)) };
}

/// One 64-bit word of guest memory at any address.
///
/// # Safety
/// `from` is readable for 8 bytes inside a live mapping.
#[inline(always)]
pub(crate) unsafe fn read_u64(from: *const u8) -> u64 {
    // SAFETY: the caller's promise; alignment 1.
    unsafe { ptr::read_volatile(from.cast::<Unaligned<u64>>()) }.0
}

/// Writes one 64-bit word into guest memory at any address.
///
/// # Safety
/// `to` is writable for 8 bytes inside a live mapping.
#[inline(always)]
pub(crate) unsafe fn write_u64(to: *mut u8, value: u64) {
    // SAFETY: the caller's promise; alignment 1.
    unsafe { ptr::write_volatile(to.cast::<Unaligned<u64>>(), Unaligned(value)) };
}
