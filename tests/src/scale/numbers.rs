//! From samples to the numbers that are told. Pure.

/// The least of sorted values that so large a share of them does not exceed (the nearest rank). Nothing of nothing.
pub fn percentile(sorted: &[f64], share: f64) -> Option<f64> {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

/// By how much the second number grows with the first, along the line that fits best (least squares). Nothing of points that
/// are all at one place.
pub fn slope(points: &[(f64, f64)]) -> Option<f64> {
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (mean_x, mean_y) = (mean(|point| point.0), mean(|point| point.1));
    let squares: f64 = points.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
    let products: f64 = points.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
    (squares > 0.0).then(|| products / squares)
}

/// Since when a counter has hardly grown: by no more than `most_per_second`, for at least `seconds`. Samples are times in
/// seconds, ascending, with what the counter said.
pub fn settled(samples: &[(f64, u64)], most_per_second: f64, seconds: f64) -> Option<f64> {
    let (now, last) = *samples.last()?;
    let has_hardly_grown =
        |(at, count): &&(f64, u64)| last.saturating_sub(*count) as f64 <= most_per_second * (now - at);
    let (since, _) = samples.iter().find(has_hardly_grown)?;
    (now - since >= seconds).then_some(*since)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        let of_hundred = [0.5, 0.99, 1.0, 0.0].map(|share| percentile(&hundred, share));
        assert_eq!(of_hundred, [Some(50.0), Some(99.0), Some(100.0), Some(1.0)]);
        assert_eq!(percentile(&[7.0], 0.99), Some(7.0));
        assert_eq!(percentile(&[], 0.5), None);
    }

    #[test]
    fn a_line_is_fitted_through_what_scatters() {
        assert_eq!(slope(&[(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]), Some(2.0));
        assert_eq!(slope(&[(0.0, 4.0), (1.0, 6.0), (2.0, 4.0)]), Some(0.0));
        assert_eq!(slope(&[(1.0, 4.0), (1.0, 6.0)]), None);
        assert_eq!(slope(&[]), None);
    }

    #[test]
    fn a_counter_has_settled_when_it_stays_where_it_is() {
        let grows = [(0.0, 0), (1.0, 500), (2.0, 1000)];
        assert_eq!(settled(&grows, 10.0, 1.0), None, "it still grows");
        let rests = [(0.0, 0), (1.0, 500), (2.0, 1000), (3.0, 1005), (4.0, 1010)];
        assert_eq!(settled(&rests, 10.0, 1.0), Some(2.0));
        assert_eq!(settled(&rests, 10.0, 3.0), None, "not yet for so long");
        assert_eq!(settled(&rests, 1.0, 1.0), None, "it may not even grow by five");
        assert_eq!(settled(&[], 1.0, 1.0), None);
    }
}
