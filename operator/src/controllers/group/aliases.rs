//! Which aliases of a group do not lead yet to what is declared, and why: pure.

use turret_crds::{
    ModelGroup,
    alias::{Alias, WeightedLens},
    report::ArtifactState,
};

use super::status::Placed;

/// Says of the aliases that still lead to their old targets on a placement where they lead, where they are to, and which
/// worker lacks what for that. `None` when all lead to what is declared.
pub fn held_back(group: &ModelGroup, placed: &Placed<'_>) -> Option<String> {
    let served = placed.document?.aliases.get(placed.group)?;
    let mut behind = group.spec.aliases.iter().filter_map(|alias| {
        let (declared, now) = (alias.declared(), served.iter().find(|a| a.name == alias.name)?);
        (now.targets != declared).then(|| sentence(alias, &now.targets, &declared, placed))
    });
    let first = behind.next()?;
    match behind.count() {
        0 => Some(first),
        more => Some(format!("{first}, and {more} more aliases")),
    }
}

fn sentence(alias: &Alias, now: &[WeightedLens], declared: &[WeightedLens], placed: &Placed<'_>) -> String {
    let (name, now, new) = (&alias.name, list(now), list(declared));
    let why = lacks(declared, placed).unwrap_or_else(|| "every worker can, so it is about to move".into());
    format!("alias `{name}` stays at {now} and moves to {new} when every worker can serve that: {why}")
}

/// What the first worker that cannot serve all of these lenses says.
fn lacks(lenses: &[WeightedLens], placed: &Placed<'_>) -> Option<String> {
    placed.assessment.believed.iter().find_map(|report| {
        lenses.iter().find_map(|WeightedLens { lens, .. }| {
            let worker = &report.worker.name;
            match report.lens(placed.group, lens).map(|l| &l.state) {
                Some(ArtifactState::Failed { reason, .. }) => {
                    Some(format!("on worker {worker} `{lens}` has failed ({reason})"))
                }
                Some(state) if state.is_ready() => None,
                _ => Some(format!("worker {worker} is still checking `{lens}`")),
            }
        })
    })
}

/// `` `a` ``, or `` `a` (90) and `b` (10) `` with their weights.
fn list(targets: &[WeightedLens]) -> String {
    match targets {
        [only] => format!("`{}`", only.lens),
        several => {
            let each: Vec<_> = several.iter().map(|t| format!("`{}` ({})", t.lens, t.weight)).collect();
            each.join(" and ")
        }
    }
}
