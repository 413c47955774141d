//! Configuration space of the file system, to the byte (virtio 1.3 §5.11.4).
//!
//! ```text
//!  0 tag (UTF-8, filled up with NUL)                             36 num_request_queues     40 end
//! ```
//! Invariant: nothing there can be written. `notify_buf_size` is not there, since there is no notification
//! queue (VIRTIO_FS_F_NOTIFICATION).

/// Bytes of the configuration space.
pub const CONFIG_SIZE: u32 = 40;
/// Longest tag, in bytes.
pub const MOST_TAG: usize = 36;

/// Copies the configuration out from `offset`; what lies behind the end reads as zero.
pub(super) fn read(tag: &str, queues: u16, offset: u32, to: &mut [u8]) {
    let number = u32::from(queues).to_le_bytes();
    let tag = tag.bytes().chain(std::iter::repeat(0)).take(MOST_TAG);
    let all = tag.chain(number).chain(std::iter::repeat(0));
    let from = all.skip(usize::try_from(offset).unwrap_or(usize::MAX).min(CONFIG_SIZE as usize));
    to.iter_mut().zip(from).for_each(|(to, from)| *to = from);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_right_to_the_byte() {
        let mut bytes = [0xee; 44];
        read("src", 0x102, 0, &mut bytes);
        assert_eq!(&bytes[..4], b"src\0");
        assert_eq!(&bytes[32..], [0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0]);
        let mut part = [0xee; 4];
        read("src", 7, 1, &mut part);
        assert_eq!(&part, b"rc\0\0");
        read(&"t".repeat(36), 7, 35, &mut part);
        assert_eq!(part, [b't', 7, 0, 0]);
        read("src", 7, u32::MAX, &mut part);
        assert_eq!(part, [0; 4]);
    }
}
