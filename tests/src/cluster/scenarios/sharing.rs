//! A group of one team, placed by another one: while its owner allows it.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use turret_crds::ModelPlacement;
use turret_crds::condition::{ACCEPTED, READY};

use super::{LLAMA, QWEN, case, model};
use crate::cluster::eventually::when;
use crate::cluster::family::Family;
use crate::cluster::gateway::{Gateway, Mode};
use crate::cluster::objects::{group, placement};
use crate::cluster::release::Release;
use crate::cluster::space::{Space, changed};
use crate::cluster::worker::Direct;

/// The label by which the owner chooses who may place its group.
const MAY_SHARE: &str = "turret.test/may-share";

/// Not allowed, allowed to all, to those with a label, and deleted: the placement's own group is served all along, no pod is
/// replaced, and what is not allowed is told like what does not exist.
pub async fn a_group_is_placed_by_another_namespace_while_it_allows_it(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let owner = Space::create(release, "sharing-owner").await?;
    let user = Space::create(release, "sharing-user").await?;
    owner.apply(&[group(QWEN, "base").lens("pirate", "lenses/pirate").manifest()]).await?;
    let workers = placement("shared", &[LLAMA]).group_of(&owner.name, QWEN).switching_eagerly();
    user.apply(&[group(LLAMA, "base-b").manifest(), workers.manifest()]).await?;
    let gateway = Gateway::below_path_of(release.http.clone(), &release.gateway_url, &user.name);
    let teams = Teams { family: &family, release, owner: &owner, user: &user, gateway: &gateway };

    user.group_is(LLAMA, READY, "True", "Serving").await?;
    let lives = user.lives("shared").await?;
    let told = teams.is_withheld().await?;
    println!("    {told}");
    for word in ["allowedPlacements".to_owned(), "or it does not allow".into(), format!("`{}`", owner.name)] {
        ensure!(told.contains(&word), "{word:?} is not in what is told: {told}");
    }

    teams.allow(&json!({"namespaces": "All", "selector": null})).await?;
    teams.is_shared().await?;
    let with_label = json!({"namespaces": "Selector", "selector": {"matchLabels": {MAY_SHARE: "yes"}}});
    teams.allow(&with_label).await?;
    teams.is_withheld().await?;
    user.kubectl(&["label", "namespace", &user.name, &format!("{MAY_SHARE}=yes")]).await?;
    teams.is_shared().await?;

    // Whoever owns a group can delete it, whoever places it.
    owner.kubectl(&["delete", "modelgroup", QWEN, "--timeout=30s"]).await?;
    let gone = teams.is_lost().await?;
    ensure!(gone == told, "what does not exist is told as {gone:?}, and what is not allowed as {told:?}");
    changed(&lives, &user.lives("shared").await?)?;
    owner.remove().await?;
    user.remove().await
}

/// The team that owns the group, and the one that places it beside a group of its own.
struct Teams<'a> {
    family: &'a Family,
    release: &'a Release,
    owner: &'a Space<'a>,
    user: &'a Space<'a>,
    /// Asks for what is served in the namespace of the one that places it.
    gateway: &'a Gateway,
}

impl Teams<'_> {
    async fn allow(&self, allowed: &Value) -> Result<()> {
        let patch = json!({"spec": {"allowedPlacements": allowed}});
        self.owner.patch(&format!("modelgroup/{QWEN}"), &patch).await
    }

    /// Both teams are told that the group is served, and it answers right.
    async fn is_shared(&self) -> Result<()> {
        self.user.placement_is("shared", ACCEPTED, "True", "Valid").await?;
        self.user.serves("shared", &[LLAMA]).await?;
        let group = self.owner.group_is(QWEN, READY, "True", "Serving").await?;
        let placements = group.status.context("the operator wrote a status")?.placements;
        let expected = format!("{}/shared", self.user.name);
        ensure!(placements == [expected.as_str()], "the group says that it is placed by {placements:?}");
        let (model, case) = (model(QWEN, Some("pirate")), case(self.family, QWEN, Some("pirate")));
        self.user
            .eventually("the gateway has heard of the consent", async || {
                let asked = self.gateway.ask(&model, &case.messages, Mode::Whole).await;
                Ok(when(asked.is_ok(), || format!("{:?}", asked.err())))
            })
            .await?;
        self.gateway.verify(&model, case, Mode::Streamed).await?;
        self.own_group_answers().await
    }

    /// Both teams are told that the group is not placed, and nothing of it is left. Returns what the placement says.
    async fn is_withheld(&self) -> Result<String> {
        self.owner.group_is(QWEN, READY, "True", "NotPlaced").await?;
        self.is_lost().await
    }

    /// The placement is told that it may not have the group; its document and its worker have it no more, nor has the gateway,
    /// and all of them have its own. Returns what the placement says.
    async fn is_lost(&self) -> Result<String> {
        let placement = self.user.placement_is("shared", ACCEPTED, "False", "NotPermitted").await?;
        self.user
            .eventually("the worker serves the document without the group", async || {
                let document = self.user.document("shared").await?;
                let names: Vec<&str> = document.groups.iter().map(|group| group.name.as_str()).collect();
                let pod = self.user.workers("shared").await?.pop().context("a worker runs")?;
                let report = Direct::to(self.release, self.user, "shared", &pod).await?.report().await?;
                let is_served = report.serves(document.sequence, &document.digest);
                let is_known = report.base_of(QWEN).is_some();
                Ok(when(names == [LLAMA] && is_served && !is_known, || {
                    format!("the document has {names:?}; served {is_served}, the group is known {is_known}")
                }))
            })
            .await?;
        let messages = json!([{"role": "user", "content": "?"}]);
        self.user
            .eventually("the gateway has nothing of that name", async || {
                let asked = self.gateway.ask(QWEN, &messages, Mode::Whole).await;
                let is_unknown = asked.as_ref().is_err_and(|refused| refused.status == 404);
                Ok(when(is_unknown, || format!("{asked:?}")))
            })
            .await?;
        self.own_group_answers().await?;
        accepted(&placement)
    }

    async fn own_group_answers(&self) -> Result<()> {
        let case = case(self.family, LLAMA, None);
        self.gateway.verify(LLAMA, case, Mode::Whole).await.map(drop)
    }
}

/// What a placement says of its declaration.
fn accepted(placement: &ModelPlacement) -> Result<String> {
    let status = placement.status.as_ref().context("the operator wrote a status")?;
    let accepted = status.conditions.iter().find(|condition| condition.type_ == ACCEPTED);
    Ok(accepted.context("a placement says whether it is accepted")?.message.clone())
}
