//! Where an alias leads at the moment: pure.

use turret_crds::alias::WeightedLens;

/// The targets of an alias, of what is declared and of what workers say, each in its own words.
///
/// While a cut-over is under way, workers learn of it one after another. Until all of those that know the alias lead to
/// what is declared, one that does not is followed: its targets can be served everywhere, the new ones perhaps not. Lenses
/// that are not declared any more are left out.
pub fn current<'a>(
    declared: &[WeightedLens],
    is_declared: impl Fn(&str) -> bool,
    reported: impl IntoIterator<Item = &'a [WeightedLens]>,
) -> Vec<WeightedLens> {
    let mut behind = reported.into_iter().filter(|targets| *targets != declared);
    let followed = behind.find_map(|targets| {
        let left: Vec<_> = targets.iter().filter(|target| is_declared(&target.lens)).cloned().collect();
        (!left.is_empty()).then_some(left)
    });
    followed.unwrap_or_else(|| declared.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(lenses: &[&str]) -> Vec<WeightedLens> {
        lenses.iter().map(|lens| WeightedLens { lens: (*lens).into(), weight: 1 }).collect()
    }

    #[test]
    fn what_is_declared_counts_once_every_worker_says_so() {
        let (old, new, gone) = (to(&["old"]), to(&["new"]), to(&["gone", "old"]));
        for (reported, leads_to, why) in [
            (vec![], &new, "nobody knows the alias yet"),
            (vec![&old, &old], &old, "all are behind"),
            (vec![&new, &old], &old, "one is behind"),
            (vec![&new, &new], &new, "none is"),
            (vec![&gone], &old, "what is left of where one leads"),
        ] {
            let reported = reported.iter().map(|targets| targets.as_slice());
            assert_eq!(&current(&new, |lens| lens != "gone", reported), leads_to, "{why}");
        }
        let gone = to(&["gone"]);
        assert_eq!(current(&new, |lens| lens != "gone", [gone.as_slice()]), new, "nothing is left");
    }
}
