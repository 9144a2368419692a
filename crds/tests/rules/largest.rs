//! Valid objects at the largest size the schemas allow: the API server charges CEL rules by it.

use serde_json::{Map, Value, json};

/// The largest valid object of a kind.
pub fn largest(kind: &str) -> Value {
    match kind {
        "ModelGroup" => group(),
        "ModelPlacement" => placement(),
        other => panic!("no kind is called {other}"),
    }
}

fn padded(start: &str, length: usize) -> String {
    format!("{start}{}", "a".repeat(length - start.len()))
}

fn named(n: usize, length: usize) -> String {
    padded(&format!("n{n}-"), length)
}

fn source(uri: &str) -> Value {
    json!({
        "uri": padded(uri, 1024),
        "digest": format!("sha256:{}", "0".repeat(64)),
        "revision": "0".repeat(40),
        "secretRef": {"name": "a".repeat(253)},
    })
}

fn map(count: usize, value: impl Fn(usize) -> Value) -> Value {
    // 253 characters before the slash and 63 behind it is the longest key Kubernetes knows.
    let key = |n: usize| format!("{}/{}", named(n, 253), "a".repeat(63));
    Value::Object((0..count).map(|n| (key(n), value(n))).collect::<Map<_, _>>())
}

fn group() -> Value {
    let lens = |n: usize| {
        json!({
            "name": named(n, 63),
            "kind": "LoRA",
            "source": source("hf://example-org/repo/"),
            "displayName": "a".repeat(128),
            "scaleMilli": -16000,
            "residency": "Preloaded",
            "priority": 1000,
        })
    };
    // The last lenses, so that the rules look at all of them.
    let target = |n: usize| json!({"lensName": named(255 - n, 63), "weight": 1000});
    let targets: Vec<_> = (0..4).map(target).collect();
    let alias = |n: usize| json!({"name": padded(&format!("alias{n}-"), 63), "targets": targets});
    json!({
        "apiVersion": "turret.dev/v1alpha1",
        "kind": "ModelGroup",
        "metadata": {"name": "a".repeat(63)},
        "spec": {
            "base": {"source": source("hf://example-org/"), "dtype": "BF16", "quantization": "Q8_0"},
            "lenses": (0..256).map(lens).collect::<Vec<_>>(),
            "aliases": (0..32).map(alias).collect::<Vec<_>>(),
            "allowedPlacements": {"namespaces": "Selector", "selector": {"matchLabels": map(16, |_| json!("a".repeat(63)))}},
        },
    })
}

fn placement() -> Value {
    let groups: Vec<_> = (0..16)
        .map(|n| json!({"name": named(n, 63), "groupRef": {"name": named(n, 63), "namespace": "a".repeat(63)}}))
        .collect();
    let volumes: Vec<_> = (0..16)
        .map(|n| json!({"name": named(n, 50), "persistentVolumeClaim": {"claimName": "a".repeat(253)}}))
        .collect();
    let secrets: Vec<_> = (0..16)
        .map(|n| json!({"name": named(n, 253), "hosts": (0..16).map(|n| named(n, 253)).collect::<Vec<_>>()}))
        .collect();
    let env: Vec<_> =
        (0..64).map(|n| json!({"name": padded(&format!("N{n}_"), 128), "value": "a".repeat(4096)})).collect();
    let toleration = json!({"key": "a".repeat(317), "operator": "Equal", "value": "a".repeat(63), "effect": "NoExecute", "tolerationSeconds": 30});
    let domain = |n: usize| {
        json!({
            "maxSkew": 1024,
            "topologyKey": format!("{}/{}", named(n, 253), "a".repeat(63)),
            "whenUnsatisfiable": "DoNotSchedule",
            "minDomains": 1024,
        })
    };
    json!({
        "apiVersion": "turret.dev/v1alpha1",
        "kind": "ModelPlacement",
        "metadata": {"name": "a".repeat(52)},
        "spec": {
            "groups": groups,
            // The last one, so that the rule looks at all of them.
            "defaultGroupName": named(15, 63),
            "replicas": 1024,
            "accelerator": {"resourceName": format!("{}/{}", "a".repeat(253), "a".repeat(62))},
            "memory": {"deviceBudget": padded("1", 1).repeat(18), "lensBudget": "9".repeat(17), "diskBudget": "1Pi"},
            "batching": {"maxContextTokens": 10_485_760, "maxRunningRows": 4096, "prefillChunkTokens": 65_536},
            "eviction": {"policy": "Specialization", "highWatermarkPercent": 100, "lowWatermarkPercent": 100, "idleSeconds": 604_800, "sweepSeconds": 3600},
            "switching": {"mode": "Manual", "activeGroupName": named(15, 63), "minHoldSeconds": 3600, "maxWaitSeconds": 3600, "drainSeconds": 3600, "lensPreload": "Declared"},
            "spread": {"minCopies": 64, "maxCopies": 64},
            "admission": {"maxQueuedRequests": 65_536, "holdSeconds": 3600},
            "autoscaling": {"minReplicas": 0, "maxReplicas": 1000, "targetRunningPerReplica": 4096, "scaleToZeroAfterSeconds": 604_800, "scaleDownDelaySeconds": 86_400},
            "cache": {"ephemeral": {"storageClassName": "a".repeat(253), "size": "1Pi"}},
            "warmupSeconds": 3600,
            "upgradePolicy": "Rolling",
            "sourceVolumes": volumes,
            "sourceSecrets": secrets,
            "terminationDrainSeconds": 3600,
            "worker": {
                "image": "a".repeat(512),
                "resources": {"requests": map(16, |_| json!("999999999.999999999m")), "limits": map(16, |_| json!("999999999.999999999Ti"))},
                "nodeSelector": map(32, |_| json!("a".repeat(63))),
                "tolerations": vec![toleration; 32],
                "topologySpreadConstraints": (0..4).map(domain).collect::<Vec<_>>(),
                "priorityClassName": "a".repeat(253),
                "serviceAccountName": "a".repeat(253),
                "runtimeClassName": "a".repeat(253),
                "env": env,
                "podLabels": map(32, |_| json!("a".repeat(63))),
                "podAnnotations": map(64, |_| json!("a".repeat(4096))),
            },
        },
    })
}
