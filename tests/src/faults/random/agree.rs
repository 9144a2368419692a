//! Brings a made-up spec to terms with the rules that are about several fields, and with what a simulated node can carry out.
//! Pure.

use serde_json::{Value, json};

use crate::faults::node::LABEL;

/// The group that every placement which is carried out names, so that none of them ever has nothing to serve.
pub const GROUP: &str = "g";

/// Changes what contradicts itself, as a person would after the API server has refused it.
pub fn agree(kind: &str, spec: &mut Value) {
    if kind == "ModelGroup" {
        source(&mut spec["base"]["source"]);
        spec["lenses"].as_array_mut().into_iter().flatten().for_each(|lens| source(&mut lens["source"]));
        aliases(spec);
        if let Some(allowed) = spec.get_mut("allowedPlacements") {
            if allowed["namespaces"] != "Selector" {
                remove(allowed, "selector");
            } else if allowed["selector"]["matchLabels"].as_object().is_none_or(serde_json::Map::is_empty) {
                allowed["selector"] = json!({"matchLabels": {"team": "vision"}});
            }
        }
        tidy(spec);
        return;
    }
    let first = spec["groups"][0]["name"].clone();
    for (outer, field) in [(None, "defaultGroupName"), (Some("switching"), "activeGroupName")] {
        let holder = match outer {
            Some(outer) => spec.get_mut(outer),
            None => Some(&mut *spec),
        };
        if let Some(holder) = holder.filter(|holder| holder.get(field).is_some()) {
            holder[field] = first.clone();
        }
    }
    if let Some(switching) = spec.get_mut("switching") {
        if switching["mode"] == "Manual" {
            switching["activeGroupName"] = first;
        } else {
            remove(switching, "activeGroupName");
        }
    }
    if let Some(eviction) = spec.get_mut("eviction") {
        let percent = |eviction: &Value, field: &str| eviction[field].as_i64();
        match (percent(eviction, "lowWatermarkPercent"), percent(eviction, "highWatermarkPercent")) {
            (Some(_), None) => remove(eviction, "lowWatermarkPercent"),
            (Some(low), Some(high)) if low > high => eviction["lowWatermarkPercent"] = json!(high),
            _ => {}
        }
    }
    if spec["memory"]["deviceBudget"] != Value::Null && spec["memory"]["lensBudget"] != Value::Null {
        spec["memory"]["deviceBudget"] = json!("4Gi");
    }
    if spec["worker"]["resources"]["limits"] != Value::Null {
        remove(&mut spec["worker"]["resources"], "requests");
    }
    only_one(spec, "accelerator", &["resourceName", "deviceClassName"]);
    only_one(spec, "cache", &["emptyDir", "ephemeral", "persistentVolumeClaim"]);
    if spec["cache"] != Value::Null && spec["memory"] != Value::Null {
        remove(&mut spec["memory"], "diskBudget");
    }
    let number = |value: &Value| value.as_i64();
    if let Some(spread) = spec.get_mut("spread") {
        let least = number(&spread["minCopies"]).unwrap_or(1);
        if number(&spread["maxCopies"]).unwrap_or(4) < least {
            spread["maxCopies"] = json!(least);
        }
    }
    if let Some(autoscaling) = spec.get_mut("autoscaling") {
        let least = number(&autoscaling["minReplicas"]).unwrap_or(0);
        if number(&autoscaling["maxReplicas"]).is_none_or(|most| most < least) {
            autoscaling["maxReplicas"] = json!(least.max(1));
        }
        if least > 0 {
            remove(autoscaling, "scaleToZeroAfterSeconds");
        }
    }
    tidy(spec);
}

/// Of fields that exclude each other the first that is there stays; where none is, nothing does.
fn only_one(spec: &mut Value, field: &str, choices: &[&str]) {
    let Some(choice) = spec.get(field) else { return };
    let kept = choices.iter().find(|one| choice.get(**one).is_some_and(|value| !value.is_null()));
    match kept {
        Some(kept) => choices.iter().filter(|one| *one != kept).for_each(|one| remove(&mut spec[field], one)),
        None => remove(spec, field),
    }
}

/// Aliases have names of their own, and lead to lenses that are there.
fn aliases(spec: &mut Value) {
    let names = |list: &Value| -> Vec<Value> {
        list.as_array().into_iter().flatten().map(|item| item["name"].clone()).collect()
    };
    let lenses = names(&spec["lenses"]);
    let Some(aliases) = spec.get_mut("aliases").and_then(Value::as_array_mut) else { return };
    if lenses.is_empty() {
        aliases.clear();
    }
    aliases.retain(|alias| !lenses.contains(&alias["name"]));
    for alias in aliases {
        let targets = alias["targets"].as_array_mut().into_iter().flatten();
        for (target, lens) in targets.zip(lenses.iter().cycle()) {
            target["lensName"] = lens.clone();
        }
        if let Some(targets) = alias["targets"].as_array_mut() {
            targets.truncate(lenses.len());
        }
    }
}

/// Leaves out what no simulated node has: volumes, devices, classes, accounts, zones; and lets pods go there.
pub fn ground(kind: &str, spec: &mut Value) {
    if kind == "ModelGroup" {
        return;
    }
    remove(spec, "accelerator");
    remove(spec, "sourceVolumes");
    remove(spec, "cache");
    // Nobody asks there, so nothing would be scaled by.
    remove(spec, "autoscaling");
    let worker = &mut spec["worker"];
    let absent = [
        "resources",
        "priorityClassName",
        "serviceAccountName",
        "runtimeClassName",
        "topologySpreadConstraints",
    ];
    absent.iter().for_each(|field| remove(worker, field));
    worker["nodeSelector"] = json!({LABEL: "true"});
    worker["tolerations"] = json!([{"operator": "Exists"}]);
    spec["replicas"] = json!(1 + spec["replicas"].as_i64().unwrap_or(0).rem_euclid(2));
    let groups = spec["groups"].as_array_mut().expect("a placement has a list of groups");
    groups.retain(|group| group["name"] != GROUP);
    groups.push(json!({"name": GROUP}));
}

fn source(source: &mut Value) {
    let uri = source["uri"].as_str().unwrap_or_default().to_owned();
    if !uri.starts_with("hf://") {
        remove(source, "revision");
    } else if source["revision"].is_null() {
        source["revision"] = json!("0123456789abcdef0123456789abcdef01234567");
    }
    if !uri.starts_with("hf://") && !uri.starts_with("https://") {
        remove(source, "secretRef");
    }
}

fn remove(from: &mut Value, field: &str) {
    if let Some(fields) = from.as_object_mut() {
        fields.remove(field);
    }
}

/// To look at a field that is not there has made a null of it.
fn tidy(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, child| !child.is_null());
            fields.values_mut().for_each(tidy);
        }
        Value::Array(items) => items.iter_mut().for_each(tidy),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use turret_crds::validate::Rules;

    use super::*;
    use crate::faults::random::generate::generate;
    use crate::faults::random::kind::kinds;
    use crate::numbers::Numbers;

    #[test]
    fn what_agrees_with_itself_is_nearly_always_valid_and_what_does_not_often_is_not() {
        for kind in kinds() {
            let (rules, mut numbers) = (Rules::of(&kind.crd), Numbers::of(11));
            let [mut raw, mut agreed, mut grounded] = [0; 3];
            for _ in 0..100 {
                let mut spec = generate(&kind.spec_schema(), "spec", &mut numbers);
                let is_valid = |spec: &Value| rules.judge(&kind.object("p", spec)).refusals.is_empty();
                raw += usize::from(is_valid(&spec));
                agree(kind.name(), &mut spec);
                agreed += usize::from(is_valid(&spec));
                ground(kind.name(), &mut spec);
                agree(kind.name(), &mut spec);
                grounded += usize::from(is_valid(&spec));
            }
            assert!(raw < 80, "{}: {raw} of 100 as they are made", kind.name());
            assert!(agreed > 90, "{}: {agreed} of 100 that agree", kind.name());
            assert!(grounded > 90, "{}: {grounded} of 100 that can be carried out", kind.name());
        }
    }
}
