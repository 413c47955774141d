//! The configuration spaces of the known device types, as names and values (virtio 1.3 chapter 5).
//!
//! Invariant: a field is shown only when all its bytes came and its feature is offered; nothing is
//! trusted, so a field that makes no sense is shown as it is, with the reason.

use outboard_frontend::block::{BlockConfig, SECTOR};
use outboard_protocol::payload;
use serde::Serialize;

/// A device type that [`decode`] knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceType {
    /// A disk.
    Block,
    /// A network card.
    Net,
    /// A console.
    Console,
    /// Sockets between host and guest.
    Vsock,
    /// A shared file system.
    Fs,
}

/// One decoded field.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// Its value, with the unit.
    pub value: String,
}

impl DeviceType {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Block, Self::Net, Self::Console, Self::Vsock, Self::Fs];

    /// Its name in a word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Block => "block",
            Self::Net => "net",
            Self::Console => "console",
            Self::Vsock => "vsock",
            Self::Fs => "fs",
        }
    }

    /// The type with this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|device| device.name() == name)
    }

    /// Bytes of the part of its configuration that is decoded here.
    #[must_use]
    pub const fn config_size(self) -> u32 {
        match self {
            Self::Block => 60,
            Self::Net | Self::Console => 12,
            Self::Vsock => 8,
            Self::Fs => 40,
        }
    }

    /// What a device probably is. Nothing in the protocol says it: a disk is known by the features that
    /// every disk has and no other device, together with a configuration that makes sense.
    #[must_use]
    pub fn guess(features: u64, config: Option<&[u8]>) -> Option<Self> {
        const MAC: u64 = 1 << 5;
        const STATUS: u64 = 1 << 16;
        const SEG_MAX: u64 = 1 << 2;
        const BLK_SIZE: u64 = 1 << 6;
        const FLUSH: u64 = 1 << 9;
        let has = |bits: u64| features & bits == bits;
        let config = config?;
        if let Some(tag) = tag(config)
            && features & 0xff_ffff == 0
            && config.len() >= 40
            && tag.bytes().all(|byte| byte.is_ascii_graphic())
        {
            return Some(Self::Fs);
        }
        let disk = BlockConfig::parse(config, features).is_ok_and(|config| config.capacity > 0);
        if disk && (has(FLUSH) || has(BLK_SIZE | SEG_MAX)) && !has(MAC | STATUS) {
            return Some(Self::Block);
        }
        None
    }
}

impl std::fmt::Display for DeviceType {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(self.name())
    }
}

/// The fields of a device's configuration.
#[must_use]
pub fn decode(device: DeviceType, bytes: &[u8], features: u64) -> Vec<Field> {
    let fields = match device {
        DeviceType::Block => block(bytes, features),
        DeviceType::Net => net(bytes, features),
        DeviceType::Console => console(bytes, features),
        DeviceType::Vsock => {
            vec![("guest cid", number::<8>(bytes, 0).map(|cid| cid.to_string()))]
        }
        DeviceType::Fs => vec![
            ("tag", tag(bytes).map(str::to_owned)),
            ("request queues", number::<4>(bytes, 36).map(|count| count.to_string())),
        ],
    };
    let present = fields.into_iter();
    present.filter_map(|(name, value)| Some(Field { name, value: value? })).collect()
}

type Fields = Vec<(&'static str, Option<String>)>;

fn block(bytes: &[u8], features: u64) -> Fields {
    let config = match BlockConfig::parse(bytes, features) {
        Ok(config) => config,
        Err(error) => return vec![("broken", Some(error.to_string()))],
    };
    let yes = |flag: bool| if flag { "yes" } else { "no" }.to_owned();
    let size = |sectors: u32| format!("{sectors} sectors ({} bytes)", u64::from(sectors) * SECTOR);
    vec![
        ("capacity", Some(format!("{} sectors ({} bytes)", config.capacity, config.bytes()))),
        ("block size", Some(format!("{} bytes", config.block_size))),
        ("read-only", Some(yes(config.read_only))),
        ("queues", Some(config.num_queues.to_string())),
        ("segments per request", config.seg_max.map(|max| format!("at most {max}"))),
        ("segment size", config.size_max.map(|max| format!("at most {max} bytes"))),
        ("write cache", config.writeback.map(|on| if on { "on" } else { "off" }.to_owned())),
        (
            "topology",
            config.topology.map(|topology| {
                format!(
                    "physical block {} bytes, first aligned block {}, good request {} blocks, best {}",
                    u64::from(config.block_size) << topology.physical_block_exp.min(31),
                    topology.alignment_offset,
                    topology.min_io_blocks,
                    topology.opt_io_blocks
                )
            }),
        ),
        (
            "discard",
            config.discard.map(|limits| {
                format!(
                    "up to {} in {} segments, granularity {} sectors",
                    size(limits.max_sectors),
                    limits.max_segments,
                    limits.alignment
                )
            }),
        ),
        (
            "write zeroes",
            config.write_zeroes.map(|limits| {
                let frees = if limits.may_unmap { "may free space" } else { "never frees space" };
                format!("up to {} in {} segments, {frees}", size(limits.max_sectors), limits.max_segments)
            }),
        ),
        (
            "geometry",
            config.geometry.map(|geometry| {
                let (c, h, s) = (geometry.cylinders, geometry.heads, geometry.sectors);
                format!("{c} cylinders, {h} heads, {s} sectors")
            }),
        ),
    ]
}

fn net(bytes: &[u8], features: u64) -> Fields {
    let has = |bit: u32| features >> bit & 1 == 1;
    let mac = bytes
        .get(..6)
        .map(|mac| mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":"));
    let link = number::<2>(bytes, 6).map(|status| if status & 1 == 1 { "up" } else { "down" });
    vec![
        ("mac address", mac.filter(|_| has(5))),
        ("link", link.filter(|_| has(16)).map(str::to_owned)),
        ("queue pairs", number::<2>(bytes, 8).filter(|_| has(22)).map(|pairs| pairs.to_string())),
        ("mtu", number::<2>(bytes, 10).filter(|_| has(3)).map(|mtu| format!("{mtu} bytes"))),
    ]
}

fn console(bytes: &[u8], features: u64) -> Fields {
    let has = |bit: u32| features >> bit & 1 == 1;
    let size = number::<2>(bytes, 0).zip(number::<2>(bytes, 2));
    vec![
        ("size", size.filter(|_| has(0)).map(|(cols, rows)| format!("{cols} x {rows}"))),
        ("ports", number::<4>(bytes, 4).filter(|_| has(1)).map(|ports| ports.to_string())),
    ]
}

/// The tag of a file system: up to 36 bytes of text, filled up with zeros.
fn tag(bytes: &[u8]) -> Option<&str> {
    let tag = bytes.get(..36)?;
    let end = tag.iter().position(|&byte| byte == 0).unwrap_or(tag.len());
    std::str::from_utf8(tag.get(..end)?).ok().filter(|tag| !tag.is_empty())
}

/// A little-endian number of `N` bytes.
fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<u64> {
    let mut wide = [0; 8];
    wide.get_mut(..N)?.copy_from_slice(bytes.get(at..at.checked_add(N)?)?);
    payload::read_u64(&wide).map(u64::from_le)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> Vec<u8> {
        let mut bytes = vec![0; 60];
        bytes[1] = 8;
        bytes[21] = 2;
        bytes
    }

    #[test]
    fn a_disk_is_guessed_by_what_only_disks_have() {
        let features = 1 << 9 | 1 << 6 | 1 << 32;
        assert_eq!(DeviceType::guess(features, Some(&disk())), Some(DeviceType::Block));
        assert_eq!(DeviceType::guess(features, Some(&[0; 60])), None, "no capacity");
        assert_eq!(DeviceType::guess(1 << 32, Some(&disk())), None, "no feature of a disk");
        assert_eq!(DeviceType::guess(features, None), None);
    }

    #[test]
    fn a_file_system_is_guessed_by_its_tag() {
        let mut bytes = vec![0; 40];
        bytes[..4].copy_from_slice(b"myfs");
        bytes[36] = 1;
        assert_eq!(DeviceType::guess(1 << 32, Some(&bytes)), Some(DeviceType::Fs));
        let fields = decode(DeviceType::Fs, &bytes, 0);
        assert_eq!(fields[0], Field { name: "tag", value: "myfs".to_owned() });
        assert_eq!(fields[1].value, "1");
    }

    #[test]
    fn fields_show_up_with_their_feature_and_their_bytes_only() {
        let names = |features: u64, bytes: &[u8]| -> Vec<&str> {
            decode(DeviceType::Net, bytes, features).into_iter().map(|field| field.name).collect()
        };
        assert_eq!(names(1 << 5 | 1 << 3, &[0; 12]), ["mac address", "mtu"]);
        assert_eq!(names(1 << 5 | 1 << 3, &[0; 11]), ["mac address"]);
        assert!(names(0, &[0; 12]).is_empty());
    }

    #[test]
    fn a_disk_that_makes_no_sense_is_shown_with_the_reason() {
        let fields = decode(DeviceType::Block, &[0; 60], 1 << 6);
        assert_eq!(fields.len(), 1);
        assert_eq!(fields[0].name, "broken");
    }
}
