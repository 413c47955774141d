//! A disk's state in files that are kept: version 1, and a version 2 that a later program might
//! write; which program reads which, and what is refused ([state], Build 6). `BLESS=1` writes them.

use std::fs::File;
use std::path::{Path, PathBuf};

use outboard::protocol::virtio;
use outboard::{ConfigWrite, DeviceState, Model, STATE_HEADER, Saved};
use outboard_devices::block::{Block, BlockOptions, Image, ImageOptions, STATE_VERSION, feature};
use proptest::prelude::*;

use crate::later::Later;

const SECTORS: u64 = 2048;
/// The configuration's writeback byte.
const WCE: u32 = 32;

fn image(folder: &Path, sectors: u64, options: ImageOptions) -> Image {
    let path = folder.join(format!("{sectors}.img"));
    File::create(&path).expect("a file").set_len(sectors * 512).expect("room");
    Image::open(path, options).expect("an image")
}

fn disk(sectors: u64, options: ImageOptions) -> Block {
    let folder = tempfile::tempdir().expect("a folder");
    Block::new(image(folder.path(), sectors, options), BlockOptions::default()).expect("a disk")
}

fn usual() -> Block {
    disk(SECTORS, ImageOptions::default())
}

fn writeback(model: &impl Model) -> u8 {
    let mut byte = [7];
    model.read_config(WCE, &mut byte).expect("readable");
    byte[0]
}

/// The state of a model as a file, as the handler would frame it.
fn framed(model: &mut impl Model) -> Vec<u8> {
    let (version, value) = model.snapshot().expect("a state").into_bytes().expect("bytes");
    let features = virtio::VERSION_1 | feature::FLUSH | feature::CONFIG_WCE;
    let state = DeviceState {
        device_type: model.device_type(),
        queues: 1,
        features: Some(features),
        protocol_features: 0x200,
        version,
        value,
    };
    state.to_bytes()
}

/// A file that is kept, after a look whether `made` is still the same.
fn kept(name: &str, made: &[u8]) -> DeviceState {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/block/golden").join(name);
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, made).expect("written");
    }
    let bytes = std::fs::read(&path).expect("a golden file");
    assert_eq!(made, bytes, "{name}: what is written has changed: a new version is due");
    DeviceState::parse(&bytes, 1 << 20).expect("whole")
}

fn version1() -> DeviceState {
    let mut disk = usual();
    disk.write_config(WCE, &[0], ConfigWrite::Guest).expect("writable");
    kept("block-1.state", &framed(&mut disk))
}

fn version2() -> DeviceState {
    let mut later = Later::new(usual(), 77);
    later.disk.write_config(WCE, &[0], ConfigWrite::Guest).expect("writable");
    kept("block-2.state", &framed(&mut later))
}

#[test]
fn this_program_reads_version_1_and_refuses_version_2_with_both_numbers() {
    assert_eq!(STATE_VERSION, 1);
    let mut disk = usual();
    disk.restore(version1().saved()).expect("ours");
    assert_eq!(writeback(&disk), 0, "what the driver had chosen");
    let mut disk = usual();
    let refused = disk.restore(version2().saved()).expect_err("a later program's").to_string();
    assert_eq!(refused, "state version 2, this program knows up to 1");
    assert_eq!(writeback(&disk), 1, "nothing has changed");
}

#[test]
fn a_later_program_reads_both_versions() {
    let mut later = Later::new(usual(), 5);
    later.restore(version1().saved()).expect("an earlier program's");
    assert_eq!((writeback(&later), later.discarded), (0, 0));
    let mut later = Later::new(usual(), 5);
    later.restore(version2().saved()).expect("its own");
    assert_eq!((writeback(&later), later.discarded), (0, 77));
}

#[test]
fn a_guest_never_finds_another_disk_than_it_left() {
    let refused =
        |mut disk: Block| disk.restore(version1().saved()).expect_err("refused").to_string();
    let plain = ImageOptions::default();
    let text = refused(disk(SECTORS + 8, plain));
    assert_eq!(text, "state of a disk of 2048 sectors, this one has 2056");
    let text = refused(disk(SECTORS, ImageOptions { block_size: Some(4096), ..plain }));
    assert_eq!(text, "state of a disk with blocks of 512 bytes, this one has 4096");
    let text = refused(disk(SECTORS, ImageOptions { read_only: true, ..plain }));
    assert_eq!(text, "state of a writable disk, this one is read-only");
}

#[test]
fn a_version_1_with_every_bit_flipped_is_refused() {
    let bytes = framed(&mut usual());
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        DeviceState::parse(&flipped, 1 << 20).expect_err("damaged");
    }
}

/// A state with some bytes changed, and its checksum made right again.
fn mended(bytes: &[u8], changes: &[(prop::sample::Index, u8)]) -> Option<DeviceState> {
    let mut bytes = bytes.to_vec();
    for (at, value) in changes {
        let at = STATE_HEADER + at.index(bytes.len() - STATE_HEADER);
        bytes[at] = *value;
    }
    let state = DeviceState::parse(&framed(&mut usual()), 1 << 20).ok()?;
    Some(DeviceState { value: bytes[STATE_HEADER..].to_vec(), ..state })
}

proptest! {
    #[test]
    fn a_value_with_a_right_checksum_is_read_or_refused_whatever_it_says(
        changes in prop::collection::vec(any::<(prop::sample::Index, u8)>(), 1..12),
        cut in any::<prop::sample::Index>(),
        random in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut disk = usual();
        let bytes = framed(&mut disk);
        let mut state = mended(&bytes, &changes).expect("a state");
        let _ = disk.restore(state.saved());
        state.value.truncate(cut.index(state.value.len()));
        let _ = disk.restore(state.saved());
        let _ = disk.restore(Saved::new(1, &random, None));
        // It can still be saved.
        framed(&mut disk);
    }

    #[test]
    fn bytes_are_a_state_only_when_they_are_one_as_it_would_be_written(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        at in any::<prop::sample::Index>(),
    ) {
        let mut mutated = framed(&mut usual());
        let start = at.index(mutated.len());
        for (to, from) in mutated[start..].iter_mut().zip(&bytes) {
            *to = *from;
        }
        for bytes in [bytes, mutated] {
            if let Ok(state) = DeviceState::parse(&bytes, 1 << 20) {
                prop_assert_eq!(state.to_bytes(), bytes);
            }
        }
    }
}
