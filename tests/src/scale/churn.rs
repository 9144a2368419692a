//! Edits for a while: does memory grow?

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;
use turret_crds::{ModelGroup, ModelPlacement};

use super::client::apply;
use super::found::Churn;
use super::layout;
use super::numbers::slope;
use super::operator::Operator;
use super::order::Order;
use super::scene::Scene;
use crate::numbers::scattered;

/// Seed of what is chosen.
const SEED: u64 = 20_240_611;
/// All is written when nothing was for so long.
const QUIET: Duration = Duration::from_millis(1500);

/// What is edited.
#[derive(Debug, PartialEq)]
enum Edit {
    Group(Value),
    Placement(Value),
}

/// Edits random groups and placements at a fixed rate, and looks at the operator's memory every second.
pub async fn measure(scene: &Scene, operator: &Operator) -> Result<Churn> {
    let order = &scene.order;
    let (groups, placements) = (scene.all::<ModelGroup>(), scene.all::<ModelPlacement>());
    let mut follow = scene.follow()?;
    let mut edits = tokio::time::interval(Duration::from_secs(1) / order.churn_per_second);
    let mut looks = tokio::time::interval(Duration::from_secs(1));
    let used = operator.usage()?.cpu_seconds;
    let (mut samples, mut edited) = (Vec::new(), 0);
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(order.churn_seconds) {
        tokio::select! {
            _ = looks.tick() => {
                samples.push((began.elapsed().as_secs_f64(), operator.usage()?.resident_bytes));
            }
            _ = edits.tick() => {
                match edit(order, edited) {
                    Edit::Group(object) => apply(&groups, &object).await?,
                    Edit::Placement(object) => apply(&placements, &object).await?,
                }
                edited += 1;
            }
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    follow.quiet(QUIET, order.patience()).await?;
    let cpu_seconds = operator.usage()?.cpu_seconds - used;
    let writes = follow.writes().count();
    // At first it learns how much it needs.
    let later = samples.iter().filter(|(at, _)| *at >= seconds / 4.0);
    let points: Vec<(f64, f64)> = later.map(|(at, bytes)| (*at, *bytes as f64)).collect();
    let slope_bytes_per_second = slope(&points).context("there are too few samples for a line")?;
    Ok(Churn { edits: edited, seconds, writes, cpu_seconds, slope_bytes_per_second, samples })
}

/// The edit with this number. Pure.
fn edit(order: &Order, number: usize) -> Edit {
    let chosen = |of: usize| {
        let scattered = scattered(SEED, number as u64) % of as u64;
        usize::try_from(scattered).expect("less than a usize")
    };
    // No two edits of an object are the same.
    let touched = number + 1;
    if number.is_multiple_of(2) {
        Edit::Group(layout::group(&layout::group_name(chosen(order.groups)), order.lenses, touched))
    } else {
        let placement = chosen(order.placements);
        let group = layout::group_name(layout::group_of(placement, order.groups));
        let workers = usize::from(placement < order.workers);
        Edit::Placement(layout::placement(&layout::placement_name(placement), &group, workers, touched))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order() -> Order {
        serde_json::from_value(serde_json::json!({
            "kubeconfig": "k", "operatorKubeconfig": "o", "operatorUser": "u", "auditLog": "a",
            "operator": "p", "operatorLog": "l", "found": "f",
            "groups": 10, "lenses": 2, "placements": 20, "workers": 5, "rounds": 1, "fresh": 3,
            "eventSeconds": 1, "churnSeconds": 1, "churnPerSecond": 10,
        }))
        .unwrap()
    }

    #[test]
    fn edits_keep_to_what_is_declared_and_go_everywhere() {
        let order = order();
        let mut names = std::collections::BTreeSet::new();
        for number in 0..400 {
            match edit(&order, number) {
                Edit::Group(group) => {
                    names.insert(group["metadata"]["name"].to_string());
                    assert_eq!(group["spec"]["lenses"].as_array().unwrap().len(), 2);
                }
                Edit::Placement(placement) => {
                    let name = placement["metadata"]["name"].as_str().unwrap();
                    let has_worker = name < layout::placement_name(5).as_str();
                    assert_eq!(placement["spec"]["replicas"] == 1, has_worker, "{name}");
                    names.insert(name.to_owned());
                }
            }
        }
        assert_eq!(names.len(), 30);
        assert_ne!(edit(&order, 0), edit(&order, 2));
    }
}
