//! Files of which some bytes are others, and tensor files in their parts.

use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::Value;

/// One change of some bytes.
#[derive(Debug, Clone)]
pub(crate) enum Damage {
    Flip(Index, u8),
    Insert(Index, Vec<u8>),
    Delete(Index, usize),
    Cut(Index),
}

pub(crate) fn any_damage() -> impl Strategy<Value = Vec<Damage>> {
    let one = prop_oneof![
        4 => (any::<Index>(), 1..=255u8).prop_map(|(at, mask)| Damage::Flip(at, mask)),
        2 => (any::<Index>(), prop::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
        2 => (any::<Index>(), 1usize..40).prop_map(|(at, bytes)| Damage::Delete(at, bytes)),
        1 => any::<Index>().prop_map(Damage::Cut),
    ];
    prop::collection::vec(one, 1..4)
}

/// Damages some part of a file.
pub(crate) fn damaged(mut file: Vec<u8>, part: std::ops::Range<usize>, damage: &[Damage]) -> Vec<u8> {
    for one in damage {
        let part = part.start.min(file.len())..part.end.min(file.len());
        if part.is_empty() {
            break;
        }
        let at = |index: &Index| part.start + index.index(part.len());
        match one {
            Damage::Flip(index, mask) => file[at(index)] ^= mask,
            Damage::Insert(index, bytes) => drop(file.splice(at(index)..at(index), bytes.iter().copied())),
            Damage::Delete(index, bytes) => {
                let end = (at(index) + bytes).min(file.len());
                file.drain(at(index)..end);
            }
            Damage::Cut(index) => file.truncate(at(index)),
        }
    }
    file
}

/// A tensor file as its header and its data.
pub(crate) fn split(file: &[u8]) -> (Value, &[u8]) {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&file[8..8 + length]).unwrap(), &file[8 + length..])
}

pub(crate) fn joined(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}
