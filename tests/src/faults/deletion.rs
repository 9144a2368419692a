//! Everything that can be deleted, in every way, with the operator there and without: nothing hangs, nothing is left that should
//! not be, and what is orphaned goes on and is in nobody's way unnoticed.
//!
//! Here garbage collection is Kubernetes' own. The chart, and the kinds themselves, are deleted where a chart is installed.

use std::fmt::{self, Display};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use futures::{StreamExt as _, stream};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::Api;
use kube::api::DeleteParams;
use serde::de::DeserializeOwned;
use turret_crds::{ModelGroup, ModelPlacement, label};

use super::end_state::EndState;
use super::step::{GROUP, PLACEMENT, Step, serves};
use super::story::{NO_IMAGE, Story};
use super::world::World;
use crate::cluster::eventually::{PATIENCE, eventually, when};

/// Cells that are tried at the same time.
const AT_ONCE: usize = 6;

/// What is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Placement,
    Group,
    Both,
    Namespace,
}

/// What becomes of what the deleted object owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Background,
    Foreground,
    Orphan,
}

impl How {
    fn params(self) -> DeleteParams {
        match self {
            Self::Background => DeleteParams::background(),
            Self::Foreground => DeleteParams::foreground(),
            Self::Orphan => DeleteParams::orphan(),
        }
    }
}

/// One of all the ways.
#[derive(Clone, Copy, Debug)]
struct Cell {
    what: What,
    how: How,
    is_operator_down: bool,
}

impl Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let operator = if self.is_operator_down { "down" } else { "up" };
        let text = format!("{:?}-{:?}-operator-{operator}", self.what, self.how);
        f.write_str(&text.to_lowercase())
    }
}

fn cells() -> Vec<Cell> {
    let mut cells = Vec::new();
    for is_operator_down in [false, true] {
        for what in [What::Placement, What::Group, What::Both] {
            let ways = [How::Background, How::Foreground, How::Orphan];
            cells.extend(ways.map(|how| Cell { what, how, is_operator_down }));
        }
        // All that is in a namespace is deleted with it, whatever is asked for.
        cells.push(Cell { what: What::Namespace, how: How::Background, is_operator_down });
    }
    cells
}

/// Tries every cell.
pub async fn whatever_is_deleted_and_however_nothing_hangs_and_nothing_is_left(world: &World) -> Result<()> {
    let tried: Vec<(Cell, Result<&'static str>)> = stream::iter(cells())
        .map(|cell| async move {
            let began = Instant::now();
            let tried = carry_out(world, cell).await;
            let seconds = began.elapsed().as_secs_f64();
            match &tried {
                Ok(end) => println!("    {cell}: {end} ({seconds:.1} s)"),
                Err(_) => println!("    {cell}: FAILED ({seconds:.1} s)"),
            }
            (cell, tried)
        })
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    let count = tried.len();
    let failed = tried.into_iter().filter_map(|(cell, tried)| Some((cell, tried.err()?)));
    let failed: Vec<String> = failed.map(|(cell, error)| format!("{cell}: {error:#}")).collect();
    if !failed.is_empty() {
        bail!("{} of {count} ways went wrong:\n{}", failed.len(), failed.join("\n"));
    }
    Ok(())
}

/// Answers what the end was.
async fn carry_out(world: &World, cell: Cell) -> Result<&'static str> {
    let mut story = Story::begin(world, &cell.to_string(), None, 0).await?;
    let start = story.carry_out(Step::Start, None, |state| Step::Start.is_reached(state)).await?;
    let serving = story.carry_out(Step::Create, None, |state| Step::Create.is_reached(state)).await?;
    story.proxy.begin_step(None);
    if cell.is_operator_down {
        story.halt().await;
    }
    delete(world, &story, cell).await?;
    if cell.what == What::Namespace {
        story.halt().await;
        return Ok("the namespace is gone");
    }
    if cell.is_operator_down {
        story.start(NO_IMAGE)?;
    }
    let end = match (cell.what, cell.how) {
        (What::Group, _) => {
            story.settles("a group is deleted", |state| group_is_missed(state, &serving)).await?;
            "its placement waits for the group, with the same workers"
        }
        (_, How::Orphan) => {
            let is_group_there = cell.what == What::Placement;
            story
                .settles("an orphaned placement", |state| is_orphaned(state, &serving, is_group_there))
                .await?;
            told_what_is_in_its_way(&mut story).await?;
            "what was orphaned served on, and was told to a new placement"
        }
        (What::Placement, _) => {
            story.settles("a placement is deleted", |state| Step::DeletePlacement.is_reached(state)).await?;
            "the group is not placed"
        }
        (What::Both | What::Namespace, _) => {
            story.settles("both are deleted", |state| Step::DeleteGroup.is_reached(state)).await?;
            "nothing is left"
        }
    };
    // Whatever it was, what is declared anew is served, and can be deleted.
    story.carry_out(Step::Create, None, |state| Step::Create.is_reached(state)).await?;
    let ending = story.end(&start).await?;
    if !ending.exits.is_empty() {
        bail!("the operator ended by itself: {:?}", ending.exits);
    }
    Ok(end)
}

/// Deletes, and waits until what was named is gone.
async fn delete(world: &World, story: &Story<'_>, cell: Cell) -> Result<()> {
    let params = cell.how.params();
    if matches!(cell.what, What::Placement | What::Both) {
        delete_one::<ModelPlacement>(&story.all(), PLACEMENT, &params).await?;
    }
    if matches!(cell.what, What::Group | What::Both) {
        delete_one::<ModelGroup>(&story.all(), GROUP, &params).await?;
    }
    if matches!(cell.what, What::Placement | What::Both) {
        is_gone::<ModelPlacement>(&story.all(), PLACEMENT).await?;
    }
    if matches!(cell.what, What::Group | What::Both) {
        is_gone::<ModelGroup>(&story.all(), GROUP).await?;
    }
    if cell.what == What::Namespace {
        let namespaces = Api::<Namespace>::all(world.client.clone());
        delete_one(&namespaces, &story.namespace, &params).await?;
        is_gone(&namespaces, &story.namespace).await?;
    }
    Ok(())
}

async fn delete_one<K>(api: &Api<K>, name: &str, params: &DeleteParams) -> Result<()>
where
    K: Clone + fmt::Debug + DeserializeOwned,
{
    api.delete(name, params).await.map(drop).with_context(|| format!("failed to delete `{name}`"))
}

async fn is_gone<K>(api: &Api<K>, name: &str) -> Result<()>
where
    K: kube::Resource + Clone + fmt::Debug + DeserializeOwned,
{
    eventually(PATIENCE, &format!("`{name}` is gone"), async || {
        let found = api.get_opt(name).await?;
        Ok(when(found.is_none(), || format!("{:?}", found.map(|object| object.meta().finalizers.clone()))))
    })
    .await
}

/// The workers are the same and are told that there is nothing to serve.
fn group_is_missed(state: &EndState, serving: &EndState) -> Result<(), String> {
    says(state, "Accepted", "GroupNotFound")?;
    if state.count("ModelGroup") > 0 {
        return Err("the group is there".to_owned());
    }
    same_workers(state, serving)
}

/// All that the placement owned is there, belongs to nobody, and its workers are the same.
fn is_orphaned(state: &EndState, serving: &EndState, is_group_there: bool) -> Result<(), String> {
    if state.count("ModelPlacement") > 0 || (state.count("ModelGroup") > 0) != is_group_there {
        return Err(format!("there are {:?}", state.objects.keys()));
    }
    for kind in ["ConfigMap", "Service", "PodDisruptionBudget", "Deployment"] {
        let name = format!("{kind}/{}", label::owned_name(PLACEMENT));
        let Some(object) = state.objects.get(&name) else { return Err(format!("{name} is gone")) };
        if object["metadata"]["owners"].as_array().is_none_or(|owners| !owners.is_empty()) {
            return Err(format!("{name} belongs to {}", object["metadata"]["owners"]));
        }
    }
    same_workers(state, serving)
}

fn same_workers(state: &EndState, serving: &EndState) -> Result<(), String> {
    let is_so = state.pods == serving.pods && state.count("worker") == serving.count("worker");
    when(is_so, || format!("the pods {:?} became {:?}", serving.pods, state.pods))
}

fn says(state: &EndState, type_: &str, reason: &str) -> Result<(), String> {
    let status = state.objects.get(&format!("ModelPlacement/{PLACEMENT}")).map(|object| &object["status"]);
    let conditions = status.and_then(|status| status["conditions"].as_array()).into_iter().flatten();
    let found: Vec<_> = conditions.filter(|condition| condition["type"] == type_).collect();
    let is_said =
        found.iter().any(|condition| condition["status"] == "False" && condition["reason"] == reason);
    when(is_said, || format!("{type_} is not False for {reason}: {found:?}"))
}

/// A new placement of the name touches nothing of what was orphaned, and says what is in its way. When that is removed, it
/// serves.
async fn told_what_is_in_its_way(story: &mut Story<'_>) -> Result<()> {
    let orphans = story.look().await?;
    let is_told = |state: &EndState| {
        says(state, "Accepted", "NameTaken")?;
        same_workers(state, &orphans)
    };
    story.carry_out(Step::Create, None, is_told).await?;
    let name = label::owned_name(PLACEMENT);
    // The pods first, as their placement is gone.
    story.delete::<Deployment>(&name).await?;
    story.settles("orphaned pods leave", |state| when(state.count("Pod") == 0, || "pods".to_owned())).await?;
    story.delete::<PodDisruptionBudget>(&name).await?;
    story.delete::<Service>(&name).await?;
    story.delete::<ConfigMap>(&name).await?;
    story.settles("what was in its way is removed", |state| serves(state, GROUP, PLACEMENT, 1)).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_way_is_tried_once_and_its_name_fits_into_that_of_a_namespace() {
        let names: std::collections::BTreeSet<String> = cells().iter().map(ToString::to_string).collect();
        assert_eq!((cells().len(), names.len()), (20, 20));
        assert!(names.contains("both-foreground-operator-down"));
        assert!(names.iter().all(|name| name.len() < 50));
    }

    #[test]
    fn what_is_orphaned_belongs_to_nobody_and_all_of_it_is_there() {
        let mut state = EndState::default();
        for kind in ["ConfigMap", "Service", "PodDisruptionBudget", "Deployment"] {
            let object = json!({"metadata": {"owners": []}});
            state.objects.insert(format!("{kind}/turret-{PLACEMENT}"), object);
        }
        let serving = state.clone();
        assert_eq!(is_orphaned(&state, &serving, false), Ok(()));
        assert!(is_orphaned(&state, &serving, true).is_err(), "the group is gone too");
        state.objects.insert(format!("Service/turret-{PLACEMENT}"), json!({"metadata": {"owners": [{}]}}));
        assert!(is_orphaned(&state, &serving, false).unwrap_err().contains("belongs to"));
        state.objects.remove(&format!("Service/turret-{PLACEMENT}"));
        assert!(is_orphaned(&state, &serving, false).unwrap_err().contains("is gone"));
    }
}
