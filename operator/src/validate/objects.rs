//! Each object by itself: is it one of ours, and what do its CRD's rules say?

use serde_json::Value;
use turret_crds::validate::Rules;
use turret_crds::{GROUP, VERSION};

use super::files::Document;
use super::report::{Origin, Problem, Report, Severity};
use super::together::Declared;

/// Judges all objects in documents, each alone and then together. `namespace` is that of objects without one.
pub fn judge(documents: &[Document], namespace: &str) -> Report {
    let crds = turret_crds::crds();
    let kinds: Vec<(&str, Rules)> =
        crds.iter().map(|crd| (crd.spec.names.kind.as_str(), Rules::of(crd))).collect();
    let mut report = Report::default();
    let mut declared = Declared::default();
    for document in documents {
        for object in objects(&document.content) {
            let api_version = object["apiVersion"].as_str().unwrap_or_default();
            let version = api_version.strip_prefix(GROUP).and_then(|rest| rest.strip_prefix('/'));
            let Some(version) = version else {
                declared.namespaces.note(object);
                *report.skipped.entry(kind_of(object)).or_default() += 1;
                continue;
            };
            report.objects += 1;
            let origin = origin(document, object, namespace);
            let rules = kinds.iter().find(|(kind, _)| *kind == origin.kind && version == VERSION);
            let Some((_, rules)) = rules else {
                let message = format!("no matches for kind \"{}\" in version \"{api_version}\"", origin.kind);
                report.problems.push(error(&origin, String::new(), message));
                continue;
            };
            let judged = rules.judge(object);
            if judged.refusals.is_empty() {
                report.problems.extend(declared.add(origin, judged.object));
            } else {
                let refused = judged.refusals.into_iter().map(|r| error(&origin, r.path, r.message));
                report.problems.extend(refused);
            }
        }
    }
    report.problems.extend(declared.check());
    report
}

/// The objects of a document: itself, the items of a list of objects, or nothing.
fn objects(content: &Value) -> Vec<&Value> {
    let is_list = content["kind"].as_str().is_some_and(|kind| kind.ends_with("List"));
    match content["items"].as_array() {
        Some(items) if is_list => items.iter().collect(),
        _ if content.is_null() => Vec::new(),
        _ => vec![content],
    }
}

/// What somebody else's object is called where they are counted.
fn kind_of(object: &Value) -> String {
    match (object["apiVersion"].as_str(), object["kind"].as_str()) {
        (Some(version), Some(kind)) => format!("{version} {kind}"),
        _ => "without apiVersion and kind".into(),
    }
}

fn origin(document: &Document, object: &Value, namespace: &str) -> Origin {
    let given = |field: &str| object["metadata"][field].as_str().filter(|text| !text.is_empty());
    Origin {
        file: document.file.clone(),
        document: document.index,
        kind: object["kind"].as_str().unwrap_or_default().into(),
        namespace: given("namespace").unwrap_or(namespace).into(),
        name: given("name").unwrap_or_default().into(),
    }
}

fn error(origin: &Origin, path: String, message: String) -> Problem {
    Problem { origin: origin.clone(), severity: Severity::Error, path, message }
}

#[cfg(test)]
mod tests {
    use super::super::yaml;
    use super::*;

    /// What is said of the documents of one file.
    fn judged(text: &str) -> Report {
        let (contents, unread) = yaml::documents(text);
        assert_eq!(unread, None);
        let document =
            |(index, content): (usize, Value)| Document { file: "f.yaml".into(), index: index + 1, content };
        let documents: Vec<_> = contents.into_iter().enumerate().map(document).collect();
        judge(&documents, "default")
    }

    fn lines(report: &Report) -> Vec<String> {
        report.problems.iter().map(ToString::to_string).collect()
    }

    const GROUP_A: &str = "
apiVersion: turret.dev/v1alpha1
kind: ModelGroup
metadata: {name: a, namespace: team}
spec: {base: {source: {uri: 'file:///models/a'}}}
";

    #[test]
    fn an_object_is_refused_with_its_place_and_the_words_of_the_api_server() {
        let text = format!("{GROUP_A}---\n{}", GROUP_A.replace("name: a", "name: b").replace("file:", "s3:"));
        let report = judged(&text);
        assert_eq!(
            lines(&report),
            ["f.yaml:2 ModelGroup/team/b: spec.base.source.uri: Invalid value: \"s3:///models/a\": \
              uri must begin with pvc://NAME/, hf://ORG/REPO, https://host/ or file:///"]
        );
        assert_eq!((report.objects, report.exit_code()), (2, super::super::report::INVALID));
        assert_eq!(report.summary(), "checked 2 objects: 1 error, 0 warnings, 0 notes");
    }

    #[test]
    fn a_plain_yes_is_no_text() {
        let report =
            judged(&GROUP_A.replace("{base:", "{lenses: [{name: on, source: {uri: 'file:///l'}}], base:"));
        let said = lines(&report);
        assert!(
            said[0].contains("spec.lenses[0].name in body must be of type string: \"boolean\""),
            "{said:?}"
        );
    }

    #[test]
    fn objects_of_others_are_counted_and_lists_are_opened() {
        let report = judged(
            "
kind: List
apiVersion: v1
items:
- {apiVersion: apps/v1, kind: Deployment, spec: {replicas: many}}
- {apiVersion: turret.dev/v1alpha1, kind: ModelGroup, metadata: {name: g}, spec: {base: {source: {uri: 'pvc://v'}}}}
---
{apiVersion: apps/v1, kind: Deployment}
---
---
just: a mapping
",
        );
        assert_eq!(lines(&report), Vec::<String>::new());
        assert_eq!((report.objects, report.exit_code()), (1, 0));
        assert_eq!(
            report.summary(),
            "checked 1 object: 0 errors, 0 warnings, 0 notes; not looked at: 2 apps/v1 Deployment, 1 without apiVersion and kind"
        );
    }

    #[test]
    fn a_kind_or_version_that_we_do_not_have_is_an_error() {
        let report = judged(&format!(
            "{}---{}",
            GROUP_A.replace("v1alpha1", "v1"),
            GROUP_A.replace("ModelGroup", "ModelGroups")
        ));
        assert_eq!(
            lines(&report),
            [
                "f.yaml:1 ModelGroup/team/a: no matches for kind \"ModelGroup\" in version \"turret.dev/v1\"",
                "f.yaml:2 ModelGroups/team/a: no matches for kind \"ModelGroups\" in version \"turret.dev/v1alpha1\"",
            ]
        );
    }

    #[test]
    fn the_samples_are_fine_and_fit_together() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests");
        let files = super::super::files::read(&[folder.into()], std::io::empty());
        assert_eq!(files.unreadable, []);
        let report = judge(&files.documents, "default");
        assert_eq!(lines(&report), Vec::<String>::new());
        assert!(report.objects >= 5, "{}", report.summary());
        assert!(
            report.skipped["apiextensions.k8s.io/v1 CustomResourceDefinition"] >= 2,
            "{}",
            report.summary()
        );
    }
}
