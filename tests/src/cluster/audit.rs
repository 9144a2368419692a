//! The API server's audit log: who asked for what, what was refused, and which rights were used.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use k8s_openapi::api::rbac::v1::PolicyRule;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use serde::Deserialize;

/// One request, as the API server wrote it down.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Request {
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`.
    pub verb: String,
    /// Who asked.
    pub user: User,
    /// For what.
    pub object_ref: Object,
    /// How it ended.
    pub response_status: Response,
    /// What the API server remarked.
    pub annotations: BTreeMap<String, String>,
    /// Where it came from: a pod's address.
    #[serde(rename = "sourceIPs")]
    pub source_ips: Vec<String>,
    /// When it came.
    pub request_received_timestamp: Option<MicroTime>,
    /// When it was answered.
    pub stage_timestamp: Option<MicroTime>,
}

/// Who asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct User {
    /// `system:serviceaccount:NAMESPACE:NAME` for a pod.
    pub username: String,
}

/// What was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Object {
    /// Plural of the kind.
    pub resource: String,
    /// Such as `status`.
    pub subresource: String,
    /// Empty for the core group.
    pub api_group: String,
    /// Empty for all namespaces.
    pub namespace: String,
    /// Empty for a list.
    pub name: String,
}

/// How a request ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Response {
    /// The HTTP status.
    pub code: u16,
}

/// The log, read onward from a place.
#[derive(Clone, Debug)]
pub struct AuditLog {
    file: PathBuf,
}

/// A place in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(u64);

impl AuditLog {
    /// The log in this file.
    pub fn at(file: &Path) -> Self {
        Self { file: file.into() }
    }

    /// Where the log begins.
    pub fn beginning() -> Mark {
        Mark(0)
    }

    /// Where the log ends now.
    pub fn mark(&self) -> Result<Mark> {
        let file = std::fs::metadata(&self.file);
        Ok(Mark(file.with_context(|| format!("failed to look at {}", self.file.display()))?.len()))
    }

    /// All requests of `user` since `mark`.
    pub fn of(&self, user: &str, mut mark: Mark) -> Result<Vec<Request>> {
        self.read_on(user, &mut mark)
    }

    /// The same; `mark` moves to the end of what was read.
    pub fn read_on(&self, user: &str, mark: &mut Mark) -> Result<Vec<Request>> {
        let unreadable = || format!("failed to read {}", self.file.display());
        let mut file = File::open(&self.file).with_context(unreadable)?;
        file.seek(SeekFrom::Start(mark.0)).with_context(unreadable)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).with_context(unreadable)?;
        // A line that is being written has no end yet; it belongs to the next look.
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let found = requests(&String::from_utf8_lossy(&bytes[..whole]), user)?;
        mark.0 += whole as u64;
        Ok(found)
    }
}

fn requests(text: &str, user: &str) -> Result<Vec<Request>> {
    text.lines()
        .filter(|line| line.contains(user))
        .map(|line| serde_json::from_str::<Request>(line).with_context(|| format!("no audit line: {line}")))
        .filter(|request| request.as_ref().map_or(true, |request| request.user.username == user))
        .collect()
}

impl Request {
    /// Whether it changes anything.
    pub fn is_write(&self) -> bool {
        !matches!(self.verb.as_str(), "get" | "list" | "watch")
    }

    /// Whether it was refused for want of a right. A namespace that is being deleted also refuses
    /// new objects with 403, whatever the rights.
    pub fn is_forbidden(&self) -> bool {
        self.annotations.get("authorization.k8s.io/decision").is_some_and(|decision| decision == "forbid")
    }

    /// `resource/subresource`, as RBAC writes it.
    pub fn rbac_resource(&self) -> String {
        match self.object_ref.subresource.as_str() {
            "" => self.object_ref.resource.clone(),
            sub => format!("{}/{sub}", self.object_ref.resource),
        }
    }

    /// The rights that RBAC asked for: a patch that made an object needed `create` as well.
    fn used_verbs(&self) -> Vec<&str> {
        match (self.verb.as_str(), self.response_status.code) {
            ("patch", 201) => vec!["patch", "create"],
            (verb, _) => vec![verb],
        }
    }
}

impl std::fmt::Display for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let object = &self.object_ref;
        let (kind, code) = (self.rbac_resource(), self.response_status.code);
        write!(f, "{} {kind} {}/{} → {code}", self.verb, object.namespace, object.name)
    }
}

/// One right: a verb on a resource, and on one object where names are listed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Right {
    group: String,
    resource: String,
    verb: String,
    name: Option<String>,
}

impl std::fmt::Display for Right {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.verb, self.resource)?;
        if let Some(name) = &self.name {
            write!(f, " `{name}`")?;
        }
        if self.group.is_empty() { Ok(()) } else { write!(f, " ({})", self.group) }
    }
}

/// Takes rules apart into single rights.
pub fn rights(rules: &[PolicyRule]) -> Vec<Right> {
    let mut rights = Vec::new();
    for rule in rules {
        let names: Vec<Option<String>> = match rule.resource_names.as_deref() {
            None | Some([]) => vec![None],
            Some(names) => names.iter().cloned().map(Some).collect(),
        };
        for group in rule.api_groups.iter().flatten() {
            for resource in rule.resources.iter().flatten() {
                for verb in &rule.verbs {
                    rights.extend(names.iter().map(|name| Right {
                        group: group.clone(),
                        resource: resource.clone(),
                        verb: verb.clone(),
                        name: name.clone(),
                    }));
                }
            }
        }
    }
    rights
}

/// The rights that none of `requests` needed.
pub fn unused<'a>(rights: &'a [Right], requests: &[Request]) -> Vec<&'a Right> {
    rights.iter().filter(|right| !requests.iter().any(|request| right.serves(request))).collect()
}

impl Right {
    fn serves(&self, request: &Request) -> bool {
        let object = &request.object_ref;
        // A list or watch of one object by a field selector carries its name in the audit log.
        request.used_verbs().contains(&self.verb.as_str())
            && object.api_group == self.group
            && request.rbac_resource() == self.resource
            && self.name.as_ref().is_none_or(|name| *name == object.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = concat!(
        r#"{"verb":"patch","user":{"username":"a"},"objectRef":{"resource":"services","namespace":"n","name":"s"},"responseStatus":{"code":201}}"#,
        "\n",
        r#"{"verb":"list","user":{"username":"a"},"objectRef":{"resource":"modelgroups","apiGroup":"turret.dev"},"responseStatus":{"code":200}}"#,
        "\n",
        r#"{"verb":"get","user":{"username":"ab"},"objectRef":{"resource":"pods"},"responseStatus":{"code":403},"annotations":{"authorization.k8s.io/decision":"forbid"}}"#,
        "\n",
        r#"{"verb":"get","user":{"username":"a"},"obj"#,
    );

    fn rule(group: &str, resource: &str, verbs: &[&str], names: &[&str]) -> PolicyRule {
        let owned = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        PolicyRule {
            api_groups: Some(owned(&[group])),
            resources: Some(owned(&[resource])),
            verbs: owned(verbs),
            resource_names: (!names.is_empty()).then(|| owned(names)),
            ..PolicyRule::default()
        }
    }

    #[test]
    fn only_whole_lines_of_the_user_count() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("log");
        std::fs::write(&file, LOG).unwrap();
        let (log, mut mark) = (AuditLog::at(&file), AuditLog::beginning());
        let requests = log.read_on("a", &mut mark).unwrap();
        assert_eq!(requests.len(), 2);
        assert_eq!(requests[0].to_string(), "patch services n/s → 201");
        assert!(requests[0].is_write() && !requests[1].is_write());
        assert!(!requests[0].is_forbidden());
        assert!(log.of("ab", AuditLog::beginning()).unwrap()[0].is_forbidden());

        // The rest of the last line is written: it is read once.
        std::fs::write(&file, format!("{LOG}ectRef\":{{\"resource\":\"pods\"}}}}\n")).unwrap();
        let rest = log.read_on("a", &mut mark).unwrap();
        assert_eq!(rest.iter().map(Request::rbac_resource).collect::<Vec<_>>(), ["pods"]);
        assert_eq!(log.read_on("a", &mut mark).unwrap(), []);
    }

    #[test]
    fn a_request_says_when_it_came_and_when_it_was_answered() {
        let line = r#"{"verb":"get","requestReceivedTimestamp":"2026-01-02T03:04:05.000250Z","stageTimestamp":"2026-01-02T03:04:05.001750Z"}"#;
        let request: Request = serde_json::from_str(line).unwrap();
        let (came, answered) = (request.request_received_timestamp, request.stage_timestamp);
        assert_eq!(answered.unwrap().0.duration_since(came.unwrap().0).as_micros(), 1500);
    }

    #[test]
    fn a_patch_that_makes_an_object_uses_the_right_to_create() {
        let whole = LOG.rsplit_once('\n').unwrap().0;
        let requests = requests(whole, "a").unwrap();
        let rules = [
            rule("", "services", &["create", "patch", "get"], &["s", "t"]),
            rule("turret.dev", "modelgroups", &["list", "watch"], &[]),
        ];
        let rights = rights(&rules);
        let unused: Vec<String> = unused(&rights, &requests).iter().map(ToString::to_string).collect();
        assert_eq!(
            unused,
            [
                "create services `t`",
                "patch services `t`",
                "get services `s`",
                "get services `t`",
                "watch modelgroups (turret.dev)",
            ]
        );
    }
}
