//! A choice as users make it: a few things often, most of them seldom. The same numbers give the same choices.

/// Ranks from 0 on, each chosen in inverse proportion to a power of its place.
#[derive(Clone, Debug, PartialEq)]
pub struct Zipf {
    /// Up to which share of all choices each rank reaches; the last one reaches 1.
    reach: Vec<f64>,
}

impl Zipf {
    /// Over so many ranks; with an exponent of 1 the second is chosen half as often as the first.
    pub fn new(ranks: usize, exponent: f64) -> Self {
        let weights: Vec<f64> = (1..=ranks).map(|place| (place as f64).powf(-exponent)).collect();
        let sum: f64 = weights.iter().sum();
        let mut so_far = 0.0;
        let reach = weights.iter().map(|weight| {
            so_far += weight / sum;
            so_far
        });
        Self { reach: reach.collect() }
    }

    /// The rank that a number says.
    pub fn rank(&self, number: u64) -> usize {
        let share = (number >> 11) as f64 / (1_u64 << 53) as f64;
        let rank = self.reach.partition_point(|reach| *reach <= share);
        // Rounding may leave the last one a little below 1.
        rank.min(self.reach.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numbers::scattered;

    #[test]
    fn ranks_are_chosen_in_inverse_proportion_to_their_place() {
        let zipf = Zipf::new(20, 1.0);
        let mut counts = [0_u32; 20];
        for place in 0..100_000 {
            counts[zipf.rank(scattered(7, place))] += 1;
        }
        let share = |rank: usize| f64::from(counts[0]) / f64::from(counts[rank]);
        assert!((1.9..2.1).contains(&share(1)), "{counts:?}");
        assert!((9.0..11.0).contains(&share(9)), "{counts:?}");
        assert!(counts[19] > 0, "{counts:?}");
    }

    #[test]
    fn the_ends_of_the_numbers_are_the_ends_of_the_ranks() {
        let zipf = Zipf::new(3, 1.0);
        assert_eq!((zipf.rank(0), zipf.rank(u64::MAX)), (0, 2));
    }
}
