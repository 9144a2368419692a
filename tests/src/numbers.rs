//! Numbers that look random, and are the same in every run with the same seed: SplitMix64.

/// How far a state of SplitMix64 is from the next.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finish of SplitMix64: states that hardly differ give numbers that have nothing in common.
pub fn mixed(state: u64) -> u64 {
    let state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}

/// The number at a place: a function of the seed and the place alone.
pub fn scattered(seed: u64, place: u64) -> u64 {
    mixed(seed.wrapping_add(place.wrapping_add(1).wrapping_mul(STEP)))
}

/// Numbers of one seed, one after another.
#[derive(Clone, Debug)]
pub struct Numbers {
    seed: u64,
    place: u64,
}

impl Numbers {
    /// Those of a seed, from the first on.
    pub fn of(seed: u64) -> Self {
        Self { seed, place: 0 }
    }

    /// The next one.
    pub fn draw(&mut self) -> u64 {
        self.place += 1;
        scattered(self.seed, self.place - 1)
    }

    /// One below `bound`.
    ///
    /// # Panics
    /// When there is none.
    pub fn below(&mut self, bound: usize) -> usize {
        let bound = u64::try_from(bound).expect("a usize has at most 64 bits");
        usize::try_from(self.draw() % bound).expect("it is below a usize")
    }

    /// True so often on the whole.
    pub fn one_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    /// Any of these.
    ///
    /// # Panics
    /// When there is none.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// Puts these in any order.
    pub fn shuffle<T>(&mut self, all: &mut [T]) {
        for last in (1..all.len()).rev() {
            let other = self.below(last + 1);
            all.swap(last, other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_those_that_are_written_down() {
        // The first outputs of SplitMix64 with the seed 1234567.
        let mut numbers = Numbers::of(1_234_567);
        assert_eq!([numbers.draw(), numbers.draw()], [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]);
    }

    #[test]
    fn every_order_comes_up_and_nothing_is_lost() {
        let mut numbers = Numbers::of(7);
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..200 {
            let mut all = [1, 2, 3];
            numbers.shuffle(&mut all);
            seen.insert(all);
        }
        assert_eq!(seen.len(), 6);
        assert!((0..100).all(|_| numbers.below(3) < 3));
    }
}
