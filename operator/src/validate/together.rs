//! What only shows when objects are looked at together: a placement is compiled with its groups, as the operator does.
//!
//! A group that a placement names may well be in the cluster and not among the files, so that is a note; so are the
//! labels of a namespace by which a group of another one allows it. What is certain to fail in a worker is a warning: the
//! API server accepts it, and the rest is served.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::iter;

use serde_json::Value;
use turret_crds::allowed_placements::not_permitted;
use turret_crds::condition::{FailureReason, reason};
use turret_crds::document::{Previous, compile};
use turret_crds::source::{Source, SourceLocation};
use turret_crds::{ModelGroup, ModelPlacement, ModelPlacementSpec};

use super::consent::{Consent, Namespaces};
use super::report::{Origin, Problem, Severity};

/// The valid objects among the files.
#[derive(Debug, Default)]
pub struct Declared {
    /// The namespaces.
    pub namespaces: Namespaces,
    groups: Vec<(Origin, ModelGroup)>,
    placements: Vec<(Origin, ModelPlacement)>,
}

/// Groups by namespace and name.
type Groups<'a> = BTreeMap<(String, String), &'a ModelGroup>;

impl Declared {
    /// Takes an object that the rules of its kind accept. A problem is one that the operator could not read, which would be a
    /// fault of the rules.
    pub fn add(&mut self, origin: Origin, mut object: Value) -> Option<Problem> {
        if let Some(metadata) = object["metadata"].as_object_mut() {
            metadata.insert("namespace".into(), origin.namespace.as_str().into());
        }
        let read = match origin.kind.as_str() {
            "ModelGroup" => {
                serde_json::from_value(object).map(|group| self.groups.push((origin.clone(), group)))
            }
            _ => serde_json::from_value(object)
                .map(|placement| self.placements.push((origin.clone(), placement))),
        };
        read.err().map(|error| problem(&origin, Severity::Error, "", error.to_string()))
    }

    /// Everything that shows only now.
    pub fn check(&self) -> Vec<Problem> {
        let groups: Groups<'_> = self
            .groups
            .iter()
            .map(|(origin, group)| ((origin.namespace.clone(), origin.name.clone()), group))
            .collect();
        let origins = self.groups.iter().map(|g| &g.0).chain(self.placements.iter().map(|p| &p.0));
        let mut problems = declared_twice(origins);
        for (origin, placement) in &self.placements {
            problems.extend(compiled(origin, placement, &groups, &self.namespaces));
        }
        problems
    }
}

fn problem(origin: &Origin, severity: Severity, path: &str, message: String) -> Problem {
    Problem { origin: origin.clone(), severity, path: path.into(), message }
}

/// Names what has the kind, namespace and name of something before it.
fn declared_twice<'a>(origins: impl Iterator<Item = &'a Origin>) -> Vec<Problem> {
    let mut first = BTreeMap::new();
    let mut problems = Vec::new();
    for origin in origins.filter(|origin| !origin.name.is_empty()) {
        match first.entry((&origin.kind, &origin.namespace, &origin.name)) {
            Entry::Vacant(entry) => {
                entry.insert(origin);
            }
            Entry::Occupied(entry) => {
                let Origin { file, document, .. } = entry.get();
                let message =
                    format!("{file}:{document} declares the same object; only one of them can be applied");
                problems.push(problem(origin, Severity::Warning, "", message));
            }
        }
    }
    problems
}

/// A placement with those of its groups that are there.
fn compiled(
    origin: &Origin,
    placement: &ModelPlacement,
    groups: &Groups<'_>,
    namespaces: &Namespaces,
) -> Vec<Problem> {
    let mut problems = Vec::new();
    let labels = namespaces.labels(&origin.namespace);
    for found in compile(placement, groups, &labels, &[], &Previous::default()).problems {
        match found.reason {
            // What the files do not show is only a note, see below.
            reason::GROUP_NOT_FOUND | reason::NOT_PERMITTED => {}
            // Its message begins with the path.
            _ => problems.push(problem(origin, Severity::Error, "", found.message)),
        }
    }
    for (index, placed) in placement.spec.groups.iter().enumerate() {
        let path = format!("spec.groups[{index}]");
        let (namespace, name) = placed.target(&origin.namespace);
        let is_own = namespace == origin.namespace;
        match groups.get(&(namespace.to_owned(), name.to_owned())) {
            Some(group) => {
                match namespaces.consent(group, &origin.namespace) {
                    Consent::Given => {}
                    Consent::Withheld => {
                        let message = not_permitted(placed, &origin.namespace).message;
                        problems.push(problem(origin, Severity::Error, &path, message));
                        continue;
                    }
                    Consent::Unknown => {
                        let message = format!(
                            "ModelGroup `{name}` of namespace `{namespace}` allows namespaces with certain labels; the \
                             Namespace `{}` is not among the files, so it was not checked whether it has them",
                            origin.namespace
                        );
                        problems.push(problem(origin, Severity::Note, &path, message));
                    }
                }
                for (needed, users) in unlisted(&placement.spec, group) {
                    let reason = needed.failure();
                    let message = format!(
                        "{users} of ModelGroup `{name}` would fail with {reason}: {needed} is not listed"
                    );
                    problems.push(problem(origin, Severity::Warning, needed.path(), message));
                }
            }
            None if is_own => {
                let message =
                    format!("ModelGroup `{name}` is not among the files, so it was not checked with it");
                problems.push(problem(origin, Severity::Note, &path, message));
            }
            None => {
                let message = format!(
                    "ModelGroup `{name}` of namespace `{namespace}` is not among the files, so it was not checked with it, \
                     nor whether it allows this placement"
                );
                problems.push(problem(origin, Severity::Note, &path, message));
            }
        }
    }
    problems
}

/// What a source needs its placement to list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Needed<'a> {
    Volume(&'a str),
    Secret(&'a str),
}

impl Needed<'_> {
    fn is_listed(self, spec: &ModelPlacementSpec) -> bool {
        match self {
            Self::Volume(name) => spec.source_volumes.iter().any(|volume| volume.name == name),
            Self::Secret(name) => spec.source_secrets.iter().any(|secret| secret.name == name),
        }
    }

    fn path(self) -> &'static str {
        match self {
            Self::Volume(_) => "spec.sourceVolumes",
            Self::Secret(_) => "spec.sourceSecrets",
        }
    }

    /// What a worker says of a source whose need is not listed.
    fn failure(self) -> FailureReason {
        match self {
            Self::Volume(_) => FailureReason::VolumeNotMounted,
            Self::Secret(_) => FailureReason::SecretNotMounted,
        }
    }
}

impl fmt::Display for Needed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Volume(name) => write!(f, "the volume `{name}`"),
            Self::Secret(name) => write!(f, "the Secret `{name}`"),
        }
    }
}

/// How much of a group has one need.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Users {
    base: bool,
    lenses: usize,
}

impl fmt::Display for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lenses = match self.lenses {
            1 => "1 lens".to_owned(),
            count => format!("{count} lenses"),
        };
        match (self.base, self.lenses) {
            (true, 0) => f.write_str("the base"),
            (true, _) => write!(f, "the base and {lenses}"),
            (false, _) => f.write_str(&lenses),
        }
    }
}

/// What the sources of a group need and the placement does not list.
fn unlisted<'a>(spec: &ModelPlacementSpec, group: &'a ModelGroup) -> BTreeMap<Needed<'a>, Users> {
    let mut unlisted: BTreeMap<Needed<'a>, Users> = BTreeMap::new();
    let base = iter::once((true, &group.spec.base.source));
    let lenses = group.spec.lenses.iter().map(|lens| (false, &lens.source));
    for (is_base, source) in base.chain(lenses) {
        for needed in needs(source).into_iter().flatten().filter(|needed| !needed.is_listed(spec)) {
            let users = unlisted.entry(needed).or_default();
            users.base |= is_base;
            users.lenses += usize::from(!is_base);
        }
    }
    unlisted
}

fn needs(source: &Source) -> [Option<Needed<'_>>; 2] {
    let volume = match source.location() {
        Ok(SourceLocation::Volume { volume, .. }) => Some(Needed::Volume(volume)),
        _ => None,
    };
    [volume, source.secret_ref.as_ref().map(|secret| Needed::Secret(&secret.name))]
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::super::{files::Document, objects, report::Report, yaml};

    fn judged(text: &str) -> (Report, Vec<String>) {
        let (contents, unread) = yaml::documents(text);
        assert_eq!(unread, None);
        let document =
            |(index, content): (usize, Value)| Document { file: "f.yaml".into(), index: index + 1, content };
        let documents: Vec<_> = contents.into_iter().enumerate().map(document).collect();
        let report = objects::judge(&documents, "default");
        let lines = report.problems.iter().map(ToString::to_string).collect();
        (report, lines)
    }

    fn placement(spec: &str) -> String {
        format!(
            "\n---\napiVersion: turret.dev/v1alpha1\nkind: ModelPlacement\nmetadata: {{name: p}}\nspec: {{{spec}}}\n"
        )
    }

    const GROUP: &str = "
apiVersion: turret.dev/v1alpha1
kind: ModelGroup
metadata: {name: g}
spec:
  base: {source: {uri: 'pvc://models/base'}}
  lenses:
  - {name: a, source: {uri: 'pvc://models/a'}}
  - {name: b, source: {uri: 'https://models.example.org/b', secretRef: {name: token}}}
  - {name: c, source: {uri: 'pvc://lenses/c'}}
";

    #[test]
    fn a_group_that_is_not_among_the_files_is_only_noted() {
        let (report, lines) = judged(&placement("groups: [{name: x, groupRef: {name: elsewhere}}]"));
        assert_eq!(
            lines,
            [
                "f.yaml:1 ModelPlacement/default/p: note: spec.groups[0]: ModelGroup `elsewhere` is not among the files, \
              so it was not checked with it"
            ]
        );
        assert_eq!(report.exit_code(), 0);
    }

    #[test]
    fn what_could_never_be_served_is_an_error() {
        let spec = "groups: [{name: g, groupRef: {name: g, namespace: other}}], memory: {deviceBudget: 16Ei}";
        let other = GROUP.replace("name: g}", "name: g, namespace: other}");
        let (report, lines) = judged(&format!("{other}{}", placement(spec)));
        assert_eq!(lines.len(), 2, "{lines:?}");
        let start = "f.yaml:2 ModelPlacement/default/p: ";
        assert!(
            lines[0].starts_with(&format!("{start}spec.memory.deviceBudget: `16Ei` is not")),
            "{lines:?}"
        );
        let withheld =
            "spec.groups[0]: group `g`: namespace `other` has no ModelGroup `g`, or it does not allow";
        assert!(lines[1].starts_with(&format!("{start}{withheld}")), "{lines:?}");
        assert_eq!(report.exit_code(), super::super::report::INVALID);
    }

    #[test]
    fn consent_is_judged_by_the_labels_of_namespaces_among_the_files_and_is_a_note_without_them() {
        const USER: &str = "
---
apiVersion: v1
kind: Namespace
metadata: {name: default, labels: {team: b}}
";
        let spec = "groups: [{name: theirs, groupRef: {name: g, namespace: other}}]";
        let said = |group: &str, namespace: &str| {
            let (report, lines) = judged(&format!("{group}{}{namespace}", placement(spec)));
            (report.exit_code(), lines.join("\n"))
        };
        let allowing = |allowed: &str| {
            format!(
                "
apiVersion: turret.dev/v1alpha1
kind: ModelGroup
metadata: {{name: g, namespace: other}}
spec: {{base: {{source: {{uri: 'file:///models/base'}}}}, allowedPlacements: {allowed}}}
"
            )
        };
        let of_team = |team: &str| {
            allowing(&format!("{{namespaces: Selector, selector: {{matchLabels: {{team: {team}}}}}}}"))
        };
        let fine = (0, String::new());
        assert_eq!(said(&allowing("{namespaces: All}"), ""), fine);
        assert_eq!(said(&of_team("b"), USER), fine);
        let (code, text) = said(&of_team("c"), USER);
        assert_eq!(code, super::super::report::INVALID, "{text}");
        let (code, text) = said(&of_team("b"), "");
        assert!(text.contains("note: spec.groups[0]: ModelGroup `g` of namespace `other` allows"), "{text}");
        assert_eq!(code, 0);
        let (code, text) = said("", "");
        assert!(text.contains("nor whether it allows this placement"), "{text}");
        assert_eq!((code, text.lines().count()), (0, 1), "{text}");
    }

    #[test]
    fn what_a_worker_could_not_read_is_a_warning() {
        let (report, lines) = judged(&format!("{GROUP}{}", placement("groups: [{name: g}]")));
        let start = "f.yaml:2 ModelPlacement/default/p: warning: ";
        let expected = [
            "spec.sourceVolumes: 1 lens of ModelGroup `g` would fail with VolumeNotMounted: the volume `lenses` is not listed",
            "spec.sourceVolumes: the base and 1 lens of ModelGroup `g` would fail with VolumeNotMounted: the volume `models` \
             is not listed",
            "spec.sourceSecrets: 1 lens of ModelGroup `g` would fail with SecretNotMounted: the Secret `token` is not listed",
        ];
        assert_eq!(lines, expected.map(|line| format!("{start}{line}")));
        assert_eq!(report.exit_code(), 0);
        let listed = "groups: [{name: g}], sourceSecrets: [{name: token}], sourceVolumes: [\
                      {name: models, persistentVolumeClaim: {claimName: m}}, {name: lenses, persistentVolumeClaim: {claimName: l}}]";
        assert_eq!(judged(&format!("{GROUP}{}", placement(listed))).1, Vec::<String>::new());
    }

    #[test]
    fn an_object_that_is_declared_twice_is_named() {
        let (_, lines) = judged(&format!("{GROUP}---{GROUP}"));
        assert_eq!(
            lines,
            [
                "f.yaml:2 ModelGroup/default/g: warning: f.yaml:1 declares the same object; only one of them can be applied"
            ]
        );
    }
}
