//! Requests of the bench's own: bounded in number, and with little to read in the answers.

use std::fmt::Debug;
use std::path::Path;

use anyhow::{Context, Result};
use futures::{StreamExt as _, TryStreamExt as _, future, stream};
use kube::api::{ListParams, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Requests at the same time: as many as the operator sends, which looks at 16 groups and 16 placements at once.
pub const AT_ONCE: usize = 32;
/// Objects on a page of a list, as in the operator's.
const PAGE: u32 = 500;

/// Who applies what users would.
pub fn user() -> PatchParams {
    PatchParams::apply("turret-bench").force()
}

/// A client with connections of its own.
pub async fn connect(kubeconfig: &Path) -> Result<Client> {
    let read = Kubeconfig::read_from(kubeconfig)
        .with_context(|| format!("failed to read {}", kubeconfig.display()))?;
    let config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

/// Applies an object.
pub async fn apply<K>(api: &Api<K>, object: &Value) -> Result<()>
where
    K: Clone + Debug + DeserializeOwned,
{
    let name = object["metadata"]["name"].as_str().context("an object has a name")?;
    let applied = api.patch_metadata(name, &user(), &Patch::Apply(object)).await;
    applied.map(drop).with_context(|| format!("failed to apply `{name}`"))
}

/// Applies many, [`AT_ONCE`].
pub async fn apply_all<K>(api: &Api<K>, objects: impl IntoIterator<Item = Value>) -> Result<()>
where
    K: Clone + Debug + DeserializeOwned,
{
    let applied = stream::iter(objects).map(|object| async move { apply(api, &object).await });
    applied.buffer_unordered(AT_ONCE).try_for_each(|()| future::ready(Ok(()))).await
}

/// Every object, page by page, typed; `seen` is shown each. Returns how many there are.
pub async fn list<K>(api: &Api<K>, labels: Option<&str>, mut seen: impl FnMut(K)) -> Result<usize>
where
    K: Clone + Debug + DeserializeOwned,
{
    let mut params = ListParams { label_selector: labels.map(str::to_owned), ..ListParams::default() };
    params = params.limit(PAGE);
    let mut count = 0;
    loop {
        let page = api.list(&params).await.context("failed to list")?;
        count += page.items.len();
        page.items.into_iter().for_each(&mut seen);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(count),
        }
    }
}
