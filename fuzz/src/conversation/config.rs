//! The model's guest memory tables and configuration space.

use std::rc::Rc;

use outboard_protocol::ProtocolFeatures as P;

use super::guest::{FILE, Reg};
use super::model::{CONFIG, Given, Model, Msg, No, Then, Wait, half, word};
use super::ring::Change;

fn meets(a: u64, a_size: u64, b: u64, b_size: u64) -> bool {
    let end = |start: u64, size: u64| u128::from(start) + u128::from(size);
    u128::from(a) < end(b, b_size) && u128::from(b) < end(a, a_size)
}

impl Model {
    /// SET_MEM_TABLE, ADD_MEM_REG, REM_MEM_REG.
    pub(super) fn memory(&mut self, msg: &Msg, wait: &mut Wait) -> Result<Then, No> {
        let p = &msg.payload;
        let four = |at: usize| [0, 8, 16, 24].map(|more| word(p, at + more));
        let mut regions = self.regions.clone();
        let drain = msg.id != 37;
        match msg.id {
            5 => {
                let count = half(p, 0) as usize;
                let slots = (p.len() - 8) / 32;
                if count > 32 || count > slots || slots > count.max(8) || msg.fds.len() != count {
                    return Err(No);
                }
                regions.clear();
                for at in 0..count {
                    self.add(&mut regions, four(8 + 32 * at), msg.fds[at])?;
                }
            }
            37 => self.add(&mut regions, four(8), msg.fds[0])?,
            _ => {
                let [guest, size, user, _] = four(8);
                let slot = |wire: &[u64; 4]| wire[..3] == [guest, size, user];
                let at = regions.iter().position(|(wire, _)| slot(wire)).ok_or(No)?;
                // It goes by the address it would be mapped with today.
                let today = if self.protocol.contains(P::GPA_ADDRESSES) { guest } else { user };
                if regions.remove(at).1.user != today {
                    return Err(No);
                }
            }
        }
        self.mem = Rc::new(regions.iter().map(|(_, reg)| *reg).collect());
        let live = self.live();
        for &ring in &live {
            let change = Change::Memory(Rc::clone(&self.mem), drain);
            self.post(ring, change, wait);
        }
        Ok(Then::Memory(regions))
    }

    fn add(
        &self,
        regions: &mut Vec<([u64; 4], Reg)>,
        wire: [u64; 4],
        given: Given,
    ) -> Result<(), No> {
        let [guest, size, user, offset] = wire;
        let wraps = [guest, user, offset].iter().any(|start| start.checked_add(size).is_none());
        if size == 0 || wraps {
            return Err(No);
        }
        let Given::File(file) = given else { return Err(No) };
        if offset.saturating_add(size) > FILE as u64 {
            return Err(No);
        }
        let today = if self.protocol.contains(P::GPA_ADDRESSES) { guest } else { user };
        for (other, reg) in regions.iter() {
            if meets(other[0], other[1], guest, size)
                || meets(other[2], other[1], user, size)
                || meets(reg.user, reg.size, today, size)
            {
                return Err(No);
            }
        }
        regions.push((wire, Reg { guest, user: today, size, file, offset }));
        Ok(())
    }

    fn config_range(p: &[u8]) -> Result<(usize, usize), No> {
        let (offset, size) = (half(p, 0), half(p, 4));
        let inside = offset.checked_add(size).is_some_and(|end| end <= 256);
        if size == 0 || !inside || p.len() != 12 + size as usize {
            return Err(No);
        }
        Ok((offset as usize, size as usize))
    }

    /// GET_CONFIG: what lies behind the device's configuration reads as zero.
    pub(super) fn read_config(&mut self, p: &[u8]) -> Result<Option<Vec<u8>>, No> {
        let (offset, size) = Self::config_range(p)?;
        if offset < CONFIG && std::mem::take(&mut self.refuse_config) {
            return Err(No);
        }
        let mut reply = p[..12].to_vec();
        reply.extend(
            (offset..offset + size).map(|at| self.config.get(at).copied().unwrap_or_default()),
        );
        Ok(Some(reply))
    }

    /// SET_CONFIG.
    pub(super) fn write_config(&mut self, p: &[u8]) -> Result<Then, No> {
        let (offset, size) = Self::config_range(p)?;
        if half(p, 8) > 1 || offset + size > CONFIG || std::mem::take(&mut self.refuse_config) {
            return Err(No);
        }
        self.config[offset..offset + size].copy_from_slice(&p[12..]);
        Ok(Then::Nothing)
    }
}
