//! What is remembered of one lens, resident or not.
//!
//! Every counter decays, and no comparison pays for it: all entries decay by the same factor, which changes no
//! order. Counters of time are therefore kept at a common epoch that [`super::history`] moves, so that a *ratio* of
//! two is exact as it stands; frequencies per request, which span more than a float holds, are kept as logarithms.

/// Half-lives of [`Usage::frequency_log2`], in requests for any lens. Requests and not seconds: a day with a tenth of
/// the traffic needs the same eviction. Steps of 16, from what is asked just now to most of what was ever asked: a
/// half-life between two of them moves 3 % less at best, where it fits the traffic exactly.
pub const HALF_LIVES: [f64; 3] = [256.0, 4096.0, 65536.0];

/// [`Usage::rating_milli`] of a lens that nobody rated.
pub const UNRATED_MILLI: u16 = 1000;
/// So many average scores are counted beside those that were given: a single one decides little.
const PRIOR_SCORES: u64 = 4;

/// [`Usage::rating_milli`] of so many scores with this mean, thousandths from 0 (useless) to 1000 (perfect).
pub fn rating_milli(count: u64, mean_milli: u32) -> u16 {
    let sum = u128::from(count) * u128::from(mean_milli.min(1000)) + u128::from(PRIOR_SCORES) * 500;
    u16::try_from(2 * sum / u128::from(count.saturating_add(PRIOR_SCORES))).unwrap_or(UNRATED_MILLI)
}

/// One lens. Read for every resident when victims are chosen, so it is no larger than a cache line.
#[derive(Clone, Debug, PartialEq)]
pub struct Usage {
    /// Bytes in device memory.
    pub bytes: u64,
    /// When it was last loaded or served, seconds; negative infinity before that.
    pub last_used_seconds: f64,
    /// log2 of the number of its requests, each worth `2^(n / half_life)` where `n` is the request's number: the
    /// combined recency and frequency of LRFU, without its common factor. Negative infinity before the first.
    pub frequency_log2: [f64; HALF_LIVES.len()],
    /// log2 of the seconds that it takes to load, per byte.
    pub cost_per_byte_log2: f32,
    /// Times it was served, decayed, at the history's epoch.
    pub served: f32,
    /// Times it was loaded, decayed, at the history's epoch.
    pub loads: f32,
    /// Times it failed, decayed, at the history's epoch.
    pub errors: f32,
    /// Times it was served, ever.
    pub serves: u32,
    /// As declared; higher stays longer.
    pub priority: i16,
    /// What its users think of it, thousandths: 0 of useless answers, 1000 of average ones or of ones that nobody
    /// rated, 2000 of perfect ones.
    pub rating_milli: u16,
}

const _: () = assert!(size_of::<Usage>() <= 64);

impl Usage {
    /// A lens of which nothing is known but what was declared.
    pub fn new(bytes: u64, load_seconds: f64, priority: i16) -> Self {
        Self {
            bytes,
            last_used_seconds: f64::NEG_INFINITY,
            frequency_log2: [f64::NEG_INFINITY; HALF_LIVES.len()],
            cost_per_byte_log2: cost_per_byte_log2(bytes, load_seconds),
            served: 0.0,
            loads: 0.0,
            errors: 0.0,
            serves: 0,
            priority,
            rating_milli: UNRATED_MILLI,
        }
    }

    /// Seconds that it takes to load.
    pub fn load_seconds(&self) -> f64 {
        f64::from(self.cost_per_byte_log2).exp2() * self.bytes as f64
    }

    /// Where it is loaded from has changed, and with it the time.
    pub fn set_load_seconds(&mut self, load_seconds: f64) {
        self.cost_per_byte_log2 = cost_per_byte_log2(self.bytes, load_seconds);
    }

    /// Counts the request with this number, of all requests for any lens.
    pub fn count_request(&mut self, number: u64) {
        for (log2, half_life) in self.frequency_log2.iter_mut().zip(HALF_LIVES) {
            *log2 = add_log2(*log2, number as f64 / half_life);
        }
        self.serves = self.serves.saturating_add(1);
    }

    /// Its requests, decayed with one of [`HALF_LIVES`] until the request with this number.
    pub fn recent_requests(&self, half_life: usize, number: u64) -> f64 {
        (self.frequency_log2[half_life] - number as f64 / HALF_LIVES[half_life]).exp2()
    }
}

/// A size or a time of zero would be worth nothing, or everything, for ever: the least of either is one.
fn cost_per_byte_log2(bytes: u64, load_seconds: f64) -> f32 {
    (load_seconds.max(1e-9) / bytes.max(1) as f64).log2() as f32
}

/// log2(2^a + 2^b), where b is finite.
fn add_log2(a: f64, b: f64) -> f64 {
    let (less, more) = if a < b { (a, b) } else { (b, a) };
    more + (less - more).exp2().ln_1p() * std::f64::consts::LOG2_E
}

/// A float in its total order, as an integer: sorts fast, and `Ord` can be derived of what holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rank(i64);

impl From<f64> for Rank {
    fn from(value: f64) -> Self {
        // As `f64::total_cmp` does: the bits of negative numbers grow downwards. Adding zero makes -0 one with 0.
        let bits = (value + 0.0).to_bits().cast_signed();
        Self(bits ^ ((bits >> 63).cast_unsigned() >> 1).cast_signed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_in_the_order_of_the_floats() {
        let sorted = [f64::NEG_INFINITY, -2.0, -1.0, -1e-300, 0.0, 1e-300, 1.0, 2.0, f64::INFINITY];
        assert!(sorted.is_sorted_by_key(|f| Rank::from(*f)));
        assert_eq!(Rank::from(-0.0), Rank::from(0.0));
    }

    #[test]
    fn a_request_is_worth_half_after_a_half_life() {
        let mut usage = Usage::new(10, 1.0, 0);
        usage.count_request(0);
        assert_eq!(usage.recent_requests(0, 0), 1.0);
        assert!((usage.recent_requests(0, 256) - 0.5).abs() < 1e-12);
        usage.count_request(256);
        assert!((usage.recent_requests(0, 256) - 1.5).abs() < 1e-12);
        assert!((usage.recent_requests(1, 4096) - (0.5 + (-3840.0f64 / 4096.0).exp2())).abs() < 1e-12);
    }

    #[test]
    fn a_rating_moves_with_the_scores_and_one_decides_little() {
        assert_eq!(rating_milli(0, 0), UNRATED_MILLI);
        assert_eq!([rating_milli(1, 0), rating_milli(1, 1000)], [800, 1200]);
        assert_eq!(rating_milli(9, 500), UNRATED_MILLI);
        assert_eq!([rating_milli(1 << 40, 0), rating_milli(u64::MAX, 1000)], [0, 2000]);
    }

    #[test]
    fn the_time_to_load_is_what_it_was_set_to() {
        let mut usage = Usage::new(150_000_000, 3.0, 0);
        assert!((usage.load_seconds() - 3.0).abs() < 1e-5);
        usage.set_load_seconds(0.01);
        assert!((usage.load_seconds() - 0.01).abs() < 1e-7);
    }
}
