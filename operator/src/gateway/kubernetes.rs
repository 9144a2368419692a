//! Keeps the [`Directory`] in step with the Kubernetes API: ModelGroups, ModelPlacements,
//! EndpointSlices and the labels of namespaces, and the Secret with the gateway's signing key.
//!
//! An object that cannot be read (an older or broken version of it) never keeps the others from being served, and what it was
//! when it could be read is served on.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    sync::Arc,
};

use futures::{Stream, StreamExt, stream::BoxStream};
use k8s_openapi::{
    NamespaceResourceScope,
    api::core::v1::{Namespace as NamespaceObject, Secret},
    api::discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    core::DeserializeGuard,
    runtime::{WatchStreamExt, watcher},
};
use serde::de::DeserializeOwned;
use turret_crds::{ModelGroup, ModelPlacement, label, token::Scope};

use super::{
    catalog::{Catalog, Namespace},
    directory::Directory,
    endpoint,
};
use crate::{
    fleet::{Endpoint, WorkerId},
    keys::{GATEWAY_ISSUER, KeyError, SECRET_FIELD, Signer, SigningKey, TokenSource},
    relisting::relisting,
};

/// What is watched.
#[derive(Clone)]
pub struct Watched {
    /// The way to the API server.
    pub client: Client,
    /// The only namespaces to look at; none is all of them.
    pub namespaces: Vec<String>,
    /// The gateway's own namespace, where its Secret is.
    pub own_namespace: String,
    /// Name of that Secret.
    pub keys_secret: String,
}

impl Watched {
    /// The parts of the cluster that are watched, each by itself.
    fn parts(&self) -> Vec<Part> {
        if self.namespaces.is_empty() {
            return vec![None];
        }
        self.namespaces.iter().map(|name| Some(name.as_str().into())).collect()
    }

    fn api<K>(&self, part: &Part) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        match part {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        }
    }
}

/// A namespace, or all of them.
type Part = Option<Arc<str>>;

/// Objects of one kind, by namespace and name.
struct Objects<K> {
    current: BTreeMap<(String, String), K>,
    /// What lists that are being read have shown so far.
    listing: BTreeMap<Part, BTreeMap<(String, String), K>>,
    /// What has been listed.
    listed: BTreeSet<Part>,
}

impl<K: Resource<DynamicType = ()> + Clone> Objects<K> {
    fn new() -> Self {
        Self { current: BTreeMap::new(), listing: BTreeMap::new(), listed: BTreeSet::new() }
    }

    /// Takes an event of a watch in and notes the namespaces it touches.
    fn take(
        &mut self,
        part: &Part,
        event: watcher::Event<DeserializeGuard<K>>,
        touched: &mut BTreeSet<String>,
    ) {
        match event {
            watcher::Event::Init => drop(self.listing.insert(part.clone(), BTreeMap::new())),
            watcher::Event::InitApply(guard) => {
                let key = key(&guard);
                if let Some(object) = read(&key, guard).or_else(|| self.current.get(&key).cloned()) {
                    self.listing.entry(part.clone()).or_default().insert(key, object);
                }
            }
            watcher::Event::InitDone => {
                let mut listed = self.listing.remove(part).unwrap_or_default();
                // A list tells nothing of other namespaces than its own.
                let is_told = |namespace: &str| part.as_deref().is_none_or(|part| part == namespace);
                let told = self.current.keys().chain(listed.keys()).map(|(namespace, _)| namespace);
                touched.extend(told.filter(|namespace| is_told(namespace)).cloned());
                self.current.retain(|(namespace, _), _| !is_told(namespace));
                self.current.append(&mut listed);
                self.listed.insert(part.clone());
            }
            watcher::Event::Apply(guard) => {
                let key = key(&guard);
                let Some(object) = read(&key, guard) else { return };
                touched.insert(key.0.clone());
                self.current.insert(key, object);
            }
            watcher::Event::Delete(guard) => {
                let key = key(&guard);
                self.current.remove(&key);
                touched.insert(key.0);
            }
        }
    }

    fn get(&self, namespace: &str, name: &str) -> Option<&K> {
        self.current.get(&(namespace.to_owned(), name.to_owned()))
    }

    fn of(&self, namespace: &str) -> impl Iterator<Item = &K> {
        let from = (namespace.to_owned(), String::new());
        self.current.range(from..).take_while(move |((ns, _), _)| ns == namespace).map(|(_, object)| object)
    }
}

/// A namespace itself counts as lying in it: what it touches is what is declared there.
fn key(object: &impl ResourceExt) -> (String, String) {
    let name = object.name_any();
    (object.namespace().unwrap_or_else(|| name.clone()), name)
}

fn read<K: Resource<DynamicType = ()>>(key: &(String, String), guard: DeserializeGuard<K>) -> Option<K> {
    match guard.0 {
        Ok(object) => Some(lean(object)),
        Err(error) => {
            tracing::warn!(kind = %K::kind(&()), namespace = key.0, name = key.1, %error, "passed over an object that cannot be read");
            None
        }
    }
}

/// Without the part of an object that is of no use here and often the largest.
fn lean<K: ResourceExt>(mut object: K) -> K {
    object.managed_fields_mut().clear();
    object
}

enum Seen {
    Group(Part, Box<watcher::Event<DeserializeGuard<ModelGroup>>>),
    Placement(Part, Box<watcher::Event<DeserializeGuard<ModelPlacement>>>),
    Slice(Part, Box<watcher::Event<DeserializeGuard<EndpointSlice>>>),
    Namespace(Box<watcher::Event<DeserializeGuard<NamespaceObject>>>),
}

/// Watches for ever. `tokens` signs what workers ask for.
pub async fn follow(watched: Watched, tokens: Arc<Signer>, directory: Arc<Directory>) {
    let parts = watched.parts();
    let mut events: Vec<BoxStream<'static, Seen>> =
        parts.iter().flat_map(|part| watches(&watched, part)).collect();
    let mut namespaces = Objects::new();
    // Roles say nothing of namespaces, so where only some are served their labels are not known.
    let sees_labels = watched.namespaces.is_empty();
    if sees_labels {
        let all = watch(Api::all(watched.client.clone()), watcher::Config::default());
        events.push(all.map(|event| Seen::Namespace(Box::new(event))).boxed());
    }
    let mut events = futures::stream::select_all(events).ready_chunks(256);
    let mut groups = Objects::new();
    let mut placements = Objects::new();
    let mut slices = Objects::new();
    let mut catalog = Catalog::default();
    while let Some(events) = events.next().await {
        let (mut declared, mut owners, mut addresses) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        for event in events {
            match event {
                Seen::Group(part, event) => groups.take(&part, *event, &mut owners),
                Seen::Placement(part, event) => placements.take(&part, *event, &mut declared),
                Seen::Slice(part, event) => slices.take(&part, *event, &mut addresses),
                Seen::Namespace(event) => namespaces.take(&None, *event, &mut declared),
            }
        }
        if !owners.is_empty() {
            declared.extend(users(&placements, &owners));
        }
        let listed = [groups.listed.len(), placements.listed.len(), slices.listed.len()];
        let complete = listed == [parts.len(); 3] && (!sees_labels || !namespaces.listed.is_empty());
        if complete && !catalog.complete {
            tracing::info!(
                groups = groups.current.len(),
                placements = placements.current.len(),
                "declarations are read"
            );
        }
        // Workers first: a group that appears finds its workers followed.
        if !addresses.is_empty() {
            directory.follow(endpoints(&slices, &tokens));
        }
        if !declared.is_empty() || complete != catalog.complete {
            catalog.complete = complete;
            for name in declared {
                let namespace = declare(&name, &groups, &placements, &namespaces);
                if namespace.placements.is_empty() {
                    catalog.namespaces.remove(&name);
                } else {
                    catalog.namespaces.insert(name, Arc::new(namespace));
                }
            }
            directory.declare(catalog.clone());
        }
    }
}

/// Namespaces whose placements name groups of one of these.
fn users(placements: &Objects<ModelPlacement>, owners: &BTreeSet<String>) -> BTreeSet<String> {
    let all = placements.current.iter();
    all.filter(|((own, _), p)| p.spec.groups.iter().any(|g| owners.contains(g.target(own).0)))
        .map(|((own, _), _)| own.clone())
        .collect()
}

/// What a namespace serves, by its placements and the groups that these name anywhere.
fn declare(
    name: &str,
    groups: &Objects<ModelGroup>,
    placements: &Objects<ModelPlacement>,
    namespaces: &Objects<NamespaceObject>,
) -> Namespace {
    let named = placements.of(name).flat_map(|p| &p.spec.groups).filter_map(|placed| {
        let (namespace, group) = placed.target(name);
        groups.get(namespace, group)
    });
    let labels = namespaces.get(name, name).map(|namespace| namespace.labels().clone()).unwrap_or_default();
    Namespace::declared(named, placements.of(name), &labels)
}

/// The watches of a part of the cluster.
fn watches(watched: &Watched, part: &Part) -> [BoxStream<'static, Seen>; 3] {
    let all = watcher::Config::default();
    let of_placements = watcher::Config::default().labels(label::PLACEMENT);
    let at = part.clone();
    let groups = watch(watched.api(part), all.clone())
        .map(move |event| Seen::Group(at.clone(), Box::new(event)))
        .boxed();
    let at = part.clone();
    let placements =
        watch(watched.api(part), all).map(move |event| Seen::Placement(at.clone(), Box::new(event))).boxed();
    let at = part.clone();
    let slices = watch(watched.api(part), of_placements)
        .map(move |event| Seen::Slice(at.clone(), Box::new(event)))
        .boxed();
    [groups, placements, slices]
}

fn endpoints(
    slices: &Objects<EndpointSlice>,
    signer: &Arc<Signer>,
) -> Vec<Endpoint<super::directory::Place>> {
    endpoint::workers(slices.current.values())
        .into_iter()
        .map(|(id, worker)| Endpoint {
            id: WorkerId(id.into()),
            control_url: worker.control_url,
            token: TokenSource::Signed { signer: signer.clone(), placement_uid: worker.placement_uid },
            attached: worker.place,
        })
        .collect()
}

/// A watch that goes on through errors, with growing pauses, and logs them.
fn watch<K>(api: Api<K>, config: watcher::Config) -> impl Stream<Item = watcher::Event<K>> + Send + 'static
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let events = relisting(move || watcher(api.clone(), config.clone()).default_backoff());
    events.filter_map(|event| async move {
        event
            .inspect_err(
                |error| tracing::warn!(kind = %K::kind(&()), %error, "a watch failed and is opened again"),
            )
            .ok()
    })
}

/// Waits for the Secret with the gateway's key, which the operator fills, and follows its changes.
pub async fn signer(watched: &Watched) -> Arc<Signer> {
    let api: Api<Secret> = Api::namespaced(watched.client.clone(), &watched.own_namespace);
    let config = watcher::Config::default().fields(&format!("metadata.name={}", watched.keys_secret));
    let mut keys = watch(api, config)
        .filter_map(|event| async move {
            match event {
                watcher::Event::Apply(secret) | watcher::Event::InitApply(secret) => read_key(&secret),
                _ => None,
            }
        })
        .boxed();
    tracing::info!(secret = %watched.keys_secret, namespace = %watched.own_namespace, "waiting for the signing key");
    let Some(first) = keys.next().await else { unreachable!("a watch never ends") };
    tracing::info!(key = first.id(), "signing key read");
    let signer = Arc::new(Signer::new(GATEWAY_ISSUER, Scope::Serve, first));
    let followed = Arc::downgrade(&signer);
    tokio::spawn(async move {
        while let Some(key) = keys.next().await {
            let Some(signer) = followed.upgrade() else { return };
            tracing::info!(key = key.id(), "signing key read");
            signer.replace(key);
        }
    });
    signer
}

/// The key in a Secret; an empty one is about to be filled by the operator.
fn read_key(secret: &Secret) -> Option<SigningKey> {
    let pem = secret.data.as_ref()?.get(SECRET_FIELD)?;
    let key = std::str::from_utf8(&pem.0)
        .map_err(|_| KeyError::Malformed("it is not text".into()))
        .and_then(SigningKey::from_pem);
    key.inspect_err(
        |error| tracing::warn!(secret = %secret.name_any(), %error, "the signing key cannot be used"),
    )
    .ok()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use watcher::Event::{Apply, Delete, Init, InitApply, InitDone};

    use super::*;

    fn slice(namespace: &str, name: &str) -> DeserializeGuard<EndpointSlice> {
        serde_json::from_value(json!({
            "addressType": "IPv4", "metadata": {"name": name, "namespace": namespace}, "endpoints": [],
        }))
        .unwrap()
    }

    fn group(name: &str, spec: &Value) -> DeserializeGuard<ModelGroup> {
        serde_json::from_value(json!({
            "apiVersion": "turret.dev/v1alpha1", "kind": "ModelGroup",
            "metadata": {"name": name, "namespace": "n"}, "spec": spec,
        }))
        .unwrap()
    }

    fn names<K>(objects: &Objects<K>) -> Vec<String> {
        objects.current.keys().map(|(namespace, name)| format!("{namespace}/{name}")).collect()
    }

    #[test]
    fn a_list_of_one_namespace_says_nothing_of_another() {
        let mut objects = Objects::new();
        let mut touched = BTreeSet::new();
        let (a, b): (Part, Part) = (Some("a".into()), Some("b".into()));
        for (part, event) in [
            (&a, Init),
            (&b, Init),
            (&a, InitApply(slice("a", "x"))),
            (&b, InitApply(slice("b", "y"))),
            (&a, InitDone),
        ] {
            objects.take(part, event, &mut touched);
        }
        assert_eq!((names(&objects), objects.listed.len()), (vec!["a/x".to_owned()], 1));
        objects.take(&b, InitDone, &mut touched);
        assert_eq!((names(&objects), objects.listed.len()), (vec!["a/x".to_owned(), "b/y".to_owned()], 2));
        touched.clear();
        for event in [Init, InitApply(slice("b", "z")), InitDone] {
            objects.take(&b, event, &mut touched);
        }
        assert_eq!(names(&objects), ["a/x", "b/z"]);
        assert_eq!(touched, BTreeSet::from(["b".to_owned()]));
        objects.take(&a, Apply(slice("a", "w")), &mut touched);
        objects.take(&a, Delete(slice("a", "x")), &mut touched);
        assert_eq!(names(&objects), ["a/w", "b/z"]);
    }

    #[test]
    fn one_list_of_everything_replaces_all() {
        let mut objects = Objects::new();
        let mut touched = BTreeSet::new();
        for event in [Init, InitApply(slice("a", "x")), InitDone, Init, InitApply(slice("b", "y")), InitDone]
        {
            objects.take(&None, event, &mut touched);
        }
        assert_eq!(names(&objects), ["b/y"]);
        assert_eq!(touched, BTreeSet::from(["a".to_owned(), "b".to_owned()]));
    }

    #[test]
    fn an_object_that_cannot_be_read_keeps_none_of_the_others_from_being_served() {
        let (good, broken) = (json!({"base": {"source": {"uri": "file:///m"}}}), json!({"base": null}));
        let parts: [Part; 2] = [None, Some("n".into())];
        for part in parts {
            let (mut groups, mut touched) = (Objects::new(), BTreeSet::new());
            for event in [Init, InitApply(group("a", &good)), InitApply(group("b", &broken)), InitDone] {
                groups.take(&part, event, &mut touched);
            }
            assert_eq!((names(&groups), groups.listed.len()), (vec!["n/a".to_owned()], 1));
            assert_eq!(touched, BTreeSet::from(["n".to_owned()]));
            // It can be read, and then it cannot: what it was is served, over a new list too.
            for event in [Apply(group("b", &good)), Apply(group("b", &broken)), Init] {
                groups.take(&part, event, &mut touched);
            }
            for event in [InitApply(group("b", &broken)), InitDone] {
                groups.take(&part, event, &mut touched);
            }
            assert_eq!(names(&groups), ["n/b"]);
            groups.take(&part, Delete(group("b", &broken)), &mut touched);
            assert_eq!(names(&groups), [""; 0]);
        }
    }
}
