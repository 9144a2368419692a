//! Rendezvous hashing: a key and a worker together have a number, and the worker with the highest is the key's first
//! choice. A worker that comes takes only the keys that it wins, one that goes gives up only those that it had.
//!
//! The hash is written down here, since the standard library's may be another one in any release: 64-bit FNV-1a of the
//! name, mixed by SplitMix64. To change it is to move every lens of every placement.

/// Most that a weight counts: so often is drawn for one pair.
pub(super) const MAX_WEIGHT: u32 = 64;

/// The hash of the name of a key or of a worker.
pub(super) fn hash(name: &str) -> u64 {
    mix(fnv_1a(name))
}

/// How much a key is drawn to a worker, of the hashes of both.
///
/// A worker of weight `w` draws `w` times and keeps its best, and so wins `w` keys for one that a worker of weight 1
/// wins. This needs no logarithm, whose last digit differs between machines.
pub(super) fn affinity(key: u64, worker: u64, weight: u32) -> u64 {
    // Without the turn a key and a worker of one name would cancel out.
    let pair = key ^ worker.rotate_left(17);
    let draws = u64::from(weight.clamp(1, MAX_WEIGHT));
    (0..draws).map(|draw| mix(pair.wrapping_add(draw))).fold(0, u64::max)
}

fn fnv_1a(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The output of SplitMix64 in state `state`.
fn mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_the_one_that_is_written_down() {
        // http://www.isthe.com/chongo/tech/comp/fnv/, test vectors of FNV-1a.
        for (name, expected) in
            [("", 0xcbf2_9ce4_8422_2325), ("a", 0xaf63_dc4c_8601_ec8c), ("foobar", 0x8594_4171_f739_67e8)]
        {
            assert_eq!(fnv_1a(name), expected, "{name}");
        }
        // The first outputs of SplitMix64 with the seed 1234567: its state grows by a constant.
        assert_eq!(mix(1_234_567), 6_457_827_717_110_365_317);
        assert_eq!(mix(0x9e37_79b9_7f4a_7c15 + 1_234_567), 3_203_168_211_198_807_973);

        assert_eq!(hash("a"), 0x5f29_c2aa_dd9b_8527);
        assert_eq!(affinity(hash("a:l0"), hash("w0"), 1), 0x49c3_87c8_d95a_ef3a);
        assert_eq!(affinity(hash("a:l0"), hash("w0"), 3), 0x6c93_6595_a4c1_2926);
    }

    #[test]
    fn a_worker_wins_keys_by_its_weight() {
        let weights = [3, 1, 1, 1];
        let mut won = [0_u32; 4];
        for n in 0..6000 {
            let key = hash(&format!("a:l{n}"));
            let draw = |at: usize| affinity(key, hash(&format!("w{at}")), weights[at]);
            let best = (0..4).max_by_key(|at| draw(*at)).expect("there are four");
            won[best] += 1;
        }
        for (won, weight) in won.into_iter().zip(weights) {
            assert!(won.abs_diff(weight * 1000) <= 60, "{won} of 6000 with a weight of {weight} in 6");
        }
    }

    #[test]
    fn any_weight_is_drawn_for_at_least_once_and_at_most_64_times() {
        let [key, worker] = [hash("a:l0"), hash("w0")];
        assert_eq!(affinity(key, worker, 0), affinity(key, worker, 1));
        assert_eq!(affinity(key, worker, u32::MAX), affinity(key, worker, MAX_WEIGHT));
    }
}
