//! The demand that an assignment is made for: the measured one, with its noise taken out.

/// Difference that is noise whatever the demand, thousandths of a row.
const NOISE_MILLIROWS: u64 = 500;

/// What an assignment for `before` goes on with when `measured` is measured; both in thousandths of a row.
///
/// `before` as long as the larger of both is at most a quarter and half a row more than the smaller. To fall to nothing
/// is always news, and to rise from nothing is once `measured` is `wakes_at`.
pub(super) fn settle(before: u64, measured: u64, wakes_at: u64) -> u64 {
    if measured == 0 || (before == 0 && measured < wakes_at) {
        return 0;
    }
    if before > 0 && near(before, measured) { before } else { measured }
}

fn near(a: u64, b: u64) -> bool {
    let (less, more) = (a.min(b), a.max(b));
    more <= less.saturating_add(less / 4).saturating_add(NOISE_MILLIROWS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_taken_out_and_news_is_not() {
        for (before, measured, settled, why) in [
            (16_000, 20_500, 16_000, "a quarter and half a row more"),
            (16_000, 20_501, 20_501, "more than that"),
            (20_500, 16_000, 20_500, "the same way back"),
            (20_501, 16_000, 16_000, "the same way back, beyond"),
            (100, 600, 100, "half a row is noise"),
            (100, 1, 100, "as long as there is any"),
            (100, 0, 0, "nothing is news"),
            (0, 49, 0, "hardly anything is nothing"),
            (0, 50, 50, "something"),
            (u64::MAX, u64::MAX - 1, u64::MAX, "no overflow"),
            (1, u64::MAX, u64::MAX, "no overflow"),
        ] {
            assert_eq!(settle(before, measured, 50), settled, "{before} → {measured}: {why}");
            assert_eq!(settle(settled, measured, 50), settled, "{before} → {measured}: settled for good");
        }
    }
}
